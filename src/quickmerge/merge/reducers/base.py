"""What every method is: a frozen dataclass of its settings and one function from tokens to a plan."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from copy import deepcopy
from dataclasses import dataclass, fields
from typing import Any, ClassVar, TypeVar

import torch
from torch import Tensor, nn

from quickmerge.merge.tokens.budget import Budget, Count, Ratio, as_budget
from quickmerge.merge.tokens.plan import MergePlan, anchors_of
from quickmerge.merge.tokens.saliency import AttentionTrace
from quickmerge.merge.tokens.selection import keep_best
from quickmerge.merge.tokens.view import Evidence, TokenView

Network = TypeVar("Network", bound=nn.Module)


@dataclass(frozen=True)
class Needs:
    """What a method must be told beside the tokens, as the `Evidence` of a view.

    Args:
        layers: how many layers below the merge must hand over their queries, keys and values.
        rows: how many query rows of each of these are read, at most.
        visual: what is measured of visual tokens that a language model is given, for a view of these alone.
            ``"tower"``: ``view.hidden`` is what the vision tower made of them, not what the language model gets.
            ``"attention"`` or ``"norm"``: the saliency is the attention that they receive, or that times the length of
            their values. ``"key"``: their keys. ``"text"``: the embeddings of the text.
        spans: which spans of the text `TokenView.group` tells: ``"line"`` (a line or a sentence) or ``"word"``, which
            a host that can't tell them refuses; ``"auto"``: lines, where the host knows the tokens' text. None: none.
    """

    layers: int = 0
    rows: int = 0
    visual: frozenset[str] = frozenset()
    spans: str | None = None


@dataclass(frozen=True)
class Reducer(ABC):
    """Base of all reducers.

    Args:
        keep: share of the tokens that is kept, in (0, 1], or a `Budget`.

    A subclass sets ``name`` (what the command line calls it) and ``source`` (paper), and implements `plan`.
    Reducers hold settings only; a run's state lives with the host, so one object may serve many models at once.
    """

    keep: float | Budget = 0.4

    name: ClassVar[str]
    source: ClassVar[str] = ""
    proportional: ClassVar[bool] = False
    """True if attention above the merge should add log(size) to the scores of a slot (ToMe, eq. 1)."""
    places: ClassVar[tuple[str, ...]] = ("text", "vision")
    """Where the method may run: ``"text"``, the prompt of a language model; ``"vision"``, a vision transformer, and the
    visual tokens that a language model is given; or both."""
    once: ClassVar[bool] = False
    """True if the method is made to reduce once and not in every block."""
    before: ClassVar[bool] = False
    """True if a vision transformer's block should read fewer tokens as a whole, and not from its attention on."""

    def __post_init__(self) -> None:
        as_budget(self.keep)
        if not isinstance(self.proportional, bool):
            raise ValueError(f"proportional must be True or False, got {self.proportional!r}")

    @property
    def label(self) -> str:
        """The name and every setting that is not the default, as `quickmerge.merge.reducers.make_reducer` reads it."""
        own = [(f.name, getattr(self, f.name), f.default) for f in fields(self) if f.name != "keep"]
        return ":".join([self.name, *(f"{name}={value}" for name, value, default in own if value != default)])

    @property
    def needs(self) -> Needs:
        """What a host must measure beside the tokens; nothing else is measured."""
        return Needs()

    def __init_subclass__(cls) -> None:
        super().__init_subclass__()
        for name in ("probes", "asks", "voters"):
            if name in vars(cls):
                raise TypeError(
                    f"{cls.__name__}.{name} is no longer asked for: give it by Reducer.needs, as Needs(...)"
                )

    def stages(self, depth: int) -> tuple[int, ...] | None:
        """The blocks of a vision transformer of ``depth`` blocks that the method acts at when nobody names any.

        None leaves it to the host. Only methods that were trained for certain blocks have something to say.
        """
        return None

    def check(self, model: Any, layers: tuple[int, ...], mode: str) -> None:  # noqa: B027
        """Raise unless the method may run in ``model`` with merges before the blocks ``layers``.

        Only methods that were trained for a model have anything to object to.
        """

    def on(self, device: torch.device) -> Reducer:
        """The same method with what it has learnt on ``device``: itself where nothing has to be moved, else a copy.

        A run takes its reducer so. The reducer that it was given stays where it is, since it may serve other models.
        """
        return self

    def align(self, view: TokenView, plan: MergePlan) -> Mapping[int, Tensor]:
        """What a trained method adds to the slots of its first merge, by block: ``{block: (B, K, D)}``.

        Each is added to the hidden states that enter the block, in the forward that reads the prompt. Most methods
        add nothing.
        """
        return {}

    def align_flops(self, tokens: float, slots: float) -> float:
        """FLOPs of `align`, and of whatever else is trained, for ``tokens`` merged into ``slots``."""
        return 0.0

    @property
    def weights_bytes(self) -> int:
        """Memory of what the method has learned; 0 for methods that were not trained."""
        return 0

    @property
    def budget(self) -> Budget:
        """`keep` as a budget."""
        return as_budget(self.keep)

    def combine(self, view: TokenView, plan: MergePlan, x: Tensor) -> Tensor:
        """Make the slots of ``plan``: ``x (B, N, D)``, the tokens of ``view``, to ``(B, K, D)``.

        The weighted sum of the members for almost all methods.
        """
        return plan.merge(x)

    @abstractmethod
    def plan(self, view: TokenView) -> MergePlan:
        """Decide for a batch of tokens which are kept, merged and dropped. A pure function of the view."""


class ScoreReducer(Reducer):
    """Keeps the highest-scoring tokens and drops the rest: a subclass only says what the score is."""

    @abstractmethod
    def score(self, view: TokenView) -> Tensor:
        """``(B, N)``, higher is kept; padding may hold anything finite."""

    def plan(self, view: TokenView) -> MergePlan:
        """Keep the ``keep`` best-scoring tokens; protected tokens are always among them."""
        return keep_best(view, self.budget, self.score(view))


def moved(network: Network, device: torch.device) -> Network:
    """``network`` where it is on ``device`` already, else a copy that is."""
    return network if all(p.device == device for p in network.parameters()) else deepcopy(network).to(device)


def mean_attention(view: TokenView, measure: Callable[[AttentionTrace, Tensor, Tensor], Tensor]) -> Tensor:
    """Mean of an attention statistic over the probed layers and their heads: ``(B, N)``.

    Raises:
        ValueError: if there is no trace to read.
    """
    if not view.evidence.attention:
        raise ValueError("attention must hold at least one layer's trace for this reducer, got none")
    per_layer = [measure(t, view.valid, view.position).mean(1) for t in view.evidence.attention]
    return torch.stack(per_layer).mean(0)


# What methods share that read attention in both directions, as it is in vision transformers.


def sees_all(view: TokenView) -> bool:
    """True for images and video, where every token sees every other one."""
    return view.prefix is not None or view.grid is not None


def voters(view: TokenView, patches: int | Tensor) -> Tensor:
    """The tokens whose attention is read: ``(B, w)`` long, filled up with -1.

    All protected tokens, and of the other ones as many as ``patches`` says (for all rows, or ``(B,)``; at most as many
    as there are), evenly spaced.
    """
    b, n = view.hidden.shape[:2]
    device = view.hidden.device
    if view.prefix is not None and isinstance(patches, int):
        free = n - view.prefix
        wanted = min(patches, free)
        spaced = view.prefix + _spaced(wanted, free, device)
        return torch.cat([torch.arange(view.prefix, device=device), spaced]).expand(b, -1)
    most = torch.as_tensor(patches, device=device).expand(b)
    return torch.cat([_some(view.protected & view.valid, most.new_full((b,), n)), _some(view.free, most)], 1)


def key_bias(view: TokenView, proportional: bool) -> Tensor | None:
    """What the host adds to the scores of each key: ``(B, N)``, log(size) if ``proportional``, -inf for padding."""
    bias = view.size.clamp_min(1).to(torch.float32).log() if proportional else None
    if view.prefix is not None:
        return bias
    return (torch.zeros(view.valid.shape, device=view.valid.device) if bias is None else bias).masked_fill(
        ~view.valid, -torch.inf
    )


def _spaced(wanted: int, there: int, device: torch.device) -> Tensor:
    return (2 * torch.arange(wanted, device=device) + 1) * there // (2 * max(1, wanted))


def _some(mask: Tensor, most: Tensor) -> Tensor:
    """At most ``most (B,)`` marked tokens of each row of ``mask (B, N)``, evenly spaced: ``(B, w)``, -1 for none."""
    count = mask.sum(-1)
    wanted = torch.minimum(count, most)
    index = torch.arange(int(wanted.max()), device=mask.device)
    rank = (2 * index + 1) * count[:, None] // (2 * wanted.clamp_min(1)[:, None])
    rows = mask.long().argsort(dim=-1, descending=True, stable=True).gather(1, rank.clamp_max(mask.shape[1] - 1))
    return torch.where(index < wanted[:, None], rows, -1)


# Choosing visual tokens as a pure function of tensors, for engines that serve models in their own way.


@torch.no_grad()
def select_visual_tokens(
    features: Tensor,
    reducer: Reducer,
    *,
    saliency: Tensor | None = None,
    key: Tensor | None = None,
    text: Tensor | None = None,
    text_valid: Tensor | None = None,
    grid: tuple[int, int, int] | None = None,
    valid: Tensor | None = None,
    depth: int = 1,
) -> tuple[Tensor, MergePlan]:
    """Which visual tokens of some images are kept, an image a row; no model is looked at.

    How many are kept is known beforehand, ``min(K, n)`` of the n tokens of a row, so an engine can make room for them.

    Args:
        features: ``(B, N, D)`` what is compared: of the vision tower for SCOPE, of the projector for TrimTokenator.
        reducer: with a share or a `Count` for ``keep``.
        saliency: ``(B, N)`` how much attention each token receives, for SCOPE, Attention and QuickMergeVision.
        key: ``(B, N, d)`` keys, mean over heads, for ToMe, ToFu and QuickMergeVision.
        text: ``(B, M, D)`` embeddings of the question, for TrimTokenator.
        text_valid: ``(B, M)`` bool, False for padding.
        grid: ``(T, H, W)`` of the tokens, for Pool.
        valid: ``(B, N)`` bool, False for padding.
        depth: blocks of the language model that reads the tokens, for ToFu.

    Returns:
        ``(B, N)`` bool, the tokens that are kept, or that others merge into; and the plan, whose ``merge`` makes them.

    Raises:
        ValueError: for a method that is not for visual tokens, a budget that looks at the tokens, or where the method
            needs something that was not given.
    """
    view = _view_of(features, reducer, saliency, key, text, text_valid, grid, valid, depth)
    plan = reducer.plan(view)
    kept = torch.zeros(*features.shape[:2], dtype=torch.bool, device=features.device)
    rows = torch.arange(kept.shape[0], device=kept.device)[:, None].expand_as(plan.position)
    kept[rows[plan.valid], anchors_of(plan, view)[plan.valid]] = True
    return kept, plan


@torch.no_grad()
def merge_visual_tokens(
    hidden: Tensor,
    reducer: Reducer,
    *,
    features: Tensor | None = None,
    saliency: Tensor | None = None,
    key: Tensor | None = None,
    grid: tuple[int, int, int] | None = None,
    depth: int = 1,
) -> tuple[Tensor, Tensor, MergePlan]:
    """What a language model is given of some images of N tokens each, and which of their tokens that stands for.

    Does what a run does behind the projector, and looks at no model; see `select_visual_tokens` for the arguments.

    Args:
        hidden: ``(B, N, D)`` what the language model would be given.
        reducer: with a share or a `Count` for ``keep``.
        features: ``(B, N, E)`` what is compared, where that is not ``hidden``.
        saliency: ``(B, N)``.
        key: ``(B, N, d)``.
        grid: ``(T, H, W)`` of the tokens.
        depth: blocks of the language model.

    Returns:
        ``(B, K, D)``; ``(B, K)`` long, rising: the token at whose place each of these stands; and the plan.

    Raises:
        ValueError: as `select_visual_tokens`.
    """
    view = _view_of(hidden if features is None else features, reducer, saliency, key, None, None, grid, None, depth)
    plan = reducer.plan(view)
    anchors = anchors_of(plan, view)
    if plan.slots == hidden.shape[1]:
        return hidden, anchors, plan
    return reducer.combine(view, plan, hidden).to(hidden.dtype), anchors, plan


def _view_of(
    features: Tensor,
    reducer: Reducer,
    saliency: Tensor | None,
    key: Tensor | None,
    text: Tensor | None,
    text_valid: Tensor | None,
    grid: tuple[int, int, int] | None,
    valid: Tensor | None,
    depth: int,
) -> TokenView:
    if not isinstance(reducer, Reducer) or "vision" not in reducer.places:
        raise ValueError(f"reducer must be one for visual tokens, such as SCOPE(keep=0.25), got {reducer!r}")
    if not isinstance(reducer.budget, (Count, Ratio)):
        raise ValueError(f"keep must be a share or a Count, which are known beforehand, got {reducer.keep!r}")
    evidence = Evidence(text=text, text_valid=text_valid, saliency=saliency, key=key, layer=0, depth=depth)
    return TokenView(features, valid=valid, grid=grid, evidence=evidence)  # type: ignore[arg-type]
