"""Draft heads as a folder: config.json and model.safetensors."""

from __future__ import annotations

import copy
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from quickmerge.errors import QuickmergeError, near_match, whole_number
from quickmerge.models.identity import hash_like, model_hash
from quickmerge.models.kinds import KINDS
from quickmerge.models.moved import onto, read
from quickmerge.models.part import CONFIG, WEIGHTS, open_part, save_part
from quickmerge.models.share import HubMixin, HubOptions, fetched
from quickmerge.speculative.drafter import Drafter
from quickmerge.speculative.gumiho.config import GumihoConfig
from quickmerge.speculative.gumiho.draft import Start, full_tree, levels, ranked
from quickmerge.speculative.gumiho.network import Ends, GumihoNetwork, RowCache, check_fit, check_target
from quickmerge.speculative.tree import Tree, best_first

__all__ = ["FTA", "Gumiho", "load", "save"]


def save(network: GumihoNetwork, folder: Path | str, dtype: torch.dtype | None = None) -> None:
    """Write both files, or neither; see `Gumiho.save_pretrained`."""
    state = {
        name: value.to(dtype if value.is_floating_point() else None) for name, value in network.state_dict().items()
    }
    save_part(folder, json.loads(network.config.to_json()), state)


def load(folder: Path | str) -> GumihoNetwork:
    """Read a network, in float32 and for inference; see `Gumiho.from_pretrained`."""
    part = open_part("draft heads", folder, f"draft heads must be a folder with {CONFIG} and {WEIGHTS}")
    config = GumihoConfig.from_data(part.config, part.folder / CONFIG)

    def check(state: Mapping[str, torch.Tensor]) -> None:
        drafted = state.get("drafted")
        if drafted is not None and not _are_ids(drafted, config.vocabulary):
            raise QuickmergeError(
                f"{part.weights} is damaged: drafted must be rising token ids below {config.vocabulary}"
            )

    return part.fill(lambda: GumihoNetwork(config), check)


def _are_ids(drafted: torch.Tensor, vocabulary: int) -> bool:
    rising = bool((drafted.diff() > 0).all())
    return drafted.dtype == torch.long and rising and int(drafted[0]) >= 0 and int(drafted[-1]) < vocabulary


# Gumiho as a drafter: heads that were trained for one model, and what they remember of the texts at hand.


FTA = ("off", "duplicate", "reference")
CHUNK = 1024
"""Pairs of a prompt that the serial head reads at once, since a mask has a place for each two of them."""


class Gumiho(HubMixin, Drafter):
    """Drafts with heads on the target's last hidden state (Gumiho, arXiv 2503.10135).

    The first ``serial`` tokens come one after the other from a small transformer, and ``heads`` more all at once from
    parallel networks: early tokens decide more often how much of a draft is accepted, so they get the better head.

    The heads compute on the target's device; ``network`` itself is left as it is.

    Args:
        network: trained heads.
        dtype: what the heads compute in, such as ``"bfloat16"``; None is the target's type. The text does not depend
            on it. A processor that multiplies bfloat16 drafts faster in it for a target in float32.
        beam: nodes of one depth that the heads are asked about.
        fta: Full Tree Attention, which lets short paths go on with the tokens of others. ``"off"``: none.
            ``"duplicate"``: by nodes of their own, which changes the draft and not the text. ``"reference"``: as
            published, where a leaf sees the borrowed token. **That is lossy**: the text may differ from the target's.

    Raises:
        ValueError: for a setting out of range.
    """

    needs_features: bool = True
    hub_kind = KINDS["gumiho"]

    def __init__(
        self, network: GumihoNetwork, *, dtype: torch.dtype | str | None = None, beam: int = 8, fta: str = "off"
    ) -> None:
        beam = whole_number("beam", beam)
        found = getattr(torch, dtype, None) if isinstance(dtype, str) else dtype
        if dtype is not None and not (isinstance(found, torch.dtype) and found.is_floating_point):
            raise ValueError(f"dtype must be a floating-point type of torch or its name, or None, got {dtype!r}")
        if fta not in FTA:
            raise ValueError(f"fta must be one of {', '.join(FTA)}, got {fta!r}{near_match(str(fta), FTA)}")
        self.network, self.dtype, self.beam, self.fta = network.eval(), found, beam, fta
        self._work: tuple[Any, GumihoNetwork, Ends] | None = None
        self._begin(0)

    @classmethod
    def new(cls, model: PreTrainedModel, *, drafted: Tensor | None = None, **shape: Any) -> Gumiho:
        """Untrained heads for a model, drawn from torch's global generator.

        Args:
            model: a causal LM, which they are then tied to.
            drafted: ids of the tokens that can be drafted; None for all.
            **shape: fields of `GumihoConfig`; what is left out is as in the model's own layers.

        Raises:
            UnsupportedModelError, ValueError: the model has no output matrix to share, or a field is out of range.
        """
        check_target(model)
        if drafted is not None:
            drafted = torch.unique(drafted)
            shape["draft_vocabulary"] = len(drafted)
        known = {"hash": model_hash(model), **shape.pop("trained_for", {})}
        network = GumihoNetwork(GumihoConfig.of(model, trained_for=known, **shape))
        if drafted is not None:
            network.drafted.copy_(drafted)
        return cls(network)

    @classmethod
    def from_pretrained(cls, folder: Path | str, **settings: Any) -> Gumiho:
        """Load heads that were trained.

        Args:
            folder: with config.json and model.safetensors, or an id of the hub such as ``"owner/name"``.
            **settings: ``dtype``, ``beam`` and ``fta``; and how it is taken from the hub, see
                `quickmerge.models.share.HubOptions`.

        Raises:
            QuickmergeError: if the folder holds no draft heads, or its weights are damaged or do not fit its config; or
                the hub has no such heads.
        """
        hub = {name: settings.pop(name) for name in HubOptions.__annotations__ if name in settings}
        return cls(load(fetched(folder, cls.hub_kind, **hub)), **settings)

    def save_pretrained(self, folder: Path | str, dtype: torch.dtype | None = None) -> None:
        """Write config.json and model.safetensors into ``folder``; nothing of the target is among them.

        Args:
            folder: where to; made if need be.
            dtype: of the stored weights, for example ``torch.float16`` for half the size; default as they are.

        Raises:
            QuickmergeError: if the disk is full or not writable; what was there before is still there.
        """
        save(self.network, folder, dtype)

    @property
    def config(self) -> GumihoConfig:
        """Shape of the heads, and the model that they were trained for."""
        return self.network.config

    # What the engine asks for -----------------------------------------------------------------------------------

    def check(self, model: PreTrainedModel) -> None:
        """Raise an error unless ``model`` is the one that the heads were trained for; get them ready for it."""
        check_fit(model, self.config)
        wanted = self.config.trained_for.get("hash")
        given = model_hash(model) if wanted is None else hash_like(model, wanted)
        if given != wanted:
            name = self.config.trained_for.get("model", "another model")
            raise QuickmergeError(
                f"the draft heads were trained for {name} (weights {str(wanted)[:12]}), got a {type(model).__name__} "
                f"with other weights ({given[:12]}): load that model, in float32 or bfloat16, or train heads for this "
                "one (quickmerge train gumiho)"
            )
        state = (given, self.dtype or model.dtype, model.device, model_hash(self.network))
        if self._work is None or self._work[0] != state:
            self._work = (state, *self._ready(model))

    def _ready(self, model: PreTrainedModel) -> tuple[GumihoNetwork, Ends]:
        network, dtype = self.network, self.dtype or model.dtype
        weight = next(network.parameters())
        if (weight.dtype, weight.device) != (dtype, model.device):
            network = copy.deepcopy(network).to(model.device, dtype)
        return network, Ends(model, getattr(network, "drafted", None), dtype)

    def begin(
        self, model: PreTrainedModel, ids: Tensor, valid: Tensor, features: Tensor | None, positions: Tensor
    ) -> None:
        """Take in the prompt; see `Drafter.begin`."""
        self.check(model)
        self._begin(len(ids))
        assert features is not None
        told, there = (x for x in read(ids, valid) if x is not None)
        self.accept([row[keep] for row, keep in zip(told, there, strict=True)], _where(features, there))

    def _begin(self, rows: int) -> None:
        self._cache = RowCache(rows)
        self._tokens: list[list[Tensor]] = [[] for _ in range(rows)]  # read by the target, not by the serial head
        self._features: list[list[Tensor]] = [[] for _ in range(rows)]
        self._pair: Tensor | None = None  # (B, H) the newest fused pair of each row

    def accept(self, tokens: list[Tensor], features: list[Tensor] | None) -> None:
        """Take in what is now part of the text; see `Drafter.accept`."""
        assert features is not None
        for row, (ids, seen) in enumerate(zip(tokens, features, strict=True)):
            self._tokens[row].append(ids)
            self._features[row].append(seen)

    def rows(self, index: Tensor) -> None:
        """Go on with some rows; see `Drafter.rows`."""
        kept = index.tolist()
        self._tokens, self._features = [self._tokens[row] for row in kept], [self._features[row] for row in kept]
        self._cache.rows(index)
        self._pair = None if self._pair is None else self._pair[onto(index, self._pair.device)]

    @torch.no_grad()
    def draft(self, last: Tensor, nodes: int) -> list[Tree]:
        """The best tree of ``nodes`` nodes that the heads' distributions hold; see `Drafter.draft`."""
        assert self._work is not None
        _, network, ends = self._work
        start = self._read(network, ends, last)
        depth = min(self.config.depth, nodes - 1)
        found = levels(network, ends, self._cache, start, min(self.beam, nodes - 1), nodes - 1, depth)
        rows = ranked(found, self.config.serial, borrow=self.fta == "duplicate")
        trees = [best_first(root, row, nodes) for root, row in zip(last.tolist(), rows, strict=True)]
        return [full_tree(tree) for tree in trees] if self.fta == "reference" else trees

    def _read(self, network: GumihoNetwork, ends: Ends, last: Tensor) -> Start:
        """Let the serial head read the pairs that are new: each token with the feature before it."""
        count = [sum(len(part) for part in parts) for parts in self._features]
        held, device = [part for parts in self._features for part in parts], self._features[0][0].device
        # Each row's own to the left, zeros behind; the tokens are on the host, but for those of a prompt.
        shift = [sum(count[:row]) for row in range(len(count))]
        wide = range(max(count))
        place = torch.tensor([[at + i if i < n else -1 for i in wide] for at, n in zip(shift, count, strict=True)])
        there, place = onto(place >= 0, device), onto(place.clamp_min(0), device)
        features = torch.where(there[..., None], torch.cat(held)[place], 0)
        tokens = self._shifted(last, count, device)
        self._tokens, self._features = [[] for _ in count], [[] for _ in count]
        pairs = network.fuse(ends.embed(tokens), features.to(ends.dtype))
        earlier = torch.zeros_like(pairs[:, :1]) if self._pair is None else self._pair[:, None]
        behind = onto(torch.tensor(count), device)
        every = torch.arange(len(count), device=device)
        before, self._pair = torch.cat([earlier, pairs], 1)[every, behind - 1], pairs[every, behind - 1]
        guess = self._pair
        if self.config.serial:
            guess = self._extend(network, pairs, count)[every, behind - 1]
        return Start(guess, before, self._pair)

    def _shifted(self, last: Tensor, count: list[int], device: torch.device) -> Tensor:
        """``(B, K)``: the new tokens of each row but its first, and its ``last`` one; zeros behind the ``count``."""
        rows = [torch.cat([*(each.cpu() for each in parts), last[row : row + 1].cpu()])[1:]
                for row, parts in enumerate(self._tokens)]  # fmt: skip
        tokens = torch.zeros(len(rows), max(count), dtype=torch.long)
        for row, (each, n) in enumerate(zip(rows, count, strict=True)):
            tokens[row, :n] = each
        return onto(tokens, device)

    def _extend(self, network: GumihoNetwork, pairs: Tensor, count: list[int]) -> Tensor:
        """Put new pairs ``(B, K, H)``, of which the first ``count`` are a row's, behind what the serial head has read.

        What lies behind a row's own pairs is read too, into columns that the next pairs of the row overwrite.
        """
        cache, device = self._cache, pairs.device
        length = onto(torch.tensor(cache.length), device)[:, None]
        even = cache.length[0] if len(set(cache.length)) == 1 else None
        out = []
        for start in range(0, pairs.shape[1], CHUNK):
            part = pairs[:, start : start + CHUNK]
            at = length + torch.arange(start, start + part.shape[1], device=device)
            width = max(cache.length) + start + part.shape[1]
            see = torch.arange(width, device=device) <= at[..., None]
            cache.aim(at, width, None if even is None else even + start)
            out.append(network.serial(part, at, see[:, None], cache))
        cache.length = [old + new for old, new in zip(cache.length, count, strict=True)]
        return torch.cat(out, 1)


def _where(features: Tensor, there: Tensor) -> list[Tensor]:
    """The features ``(k, H)`` of each row of ``(B, n, H)`` at its tokens, which are ``there (B, n)`` on the host."""
    if bool(there.all()):
        return list(features)
    at = onto(there.flatten().nonzero().flatten(), features.device)
    return list(torch.split(features.flatten(0, 1).index_select(0, at), there.sum(-1).tolist()))
