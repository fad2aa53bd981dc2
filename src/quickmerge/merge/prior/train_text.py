"""Training a prior for a language model: the frozen model should predict from merged slots as from all tokens."""

from __future__ import annotations

import json
import random
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from transformers import DynamicCache, PreTrainedModel

from quickmerge.errors import whole_number
from quickmerge.merge.attach import reduce
from quickmerge.merge.prior.config import PriorConfig
from quickmerge.merge.prior.model import (
    BACKWARD,
    FORWARD,
    Prior,
    check_collapse,
    collapse_penalty,
    relative_spread,
    unit,
)
from quickmerge.merge.prior.network import noisy_select
from quickmerge.merge.prior.reducer import QuickMergePrior
from quickmerge.merge.tokens.budget import Schedule
from quickmerge.merge.tokens.plan import MergePlan, within_width
from quickmerge.merge.tokens.saliency import numbered
from quickmerge.merge.tokens.view import TokenView
from quickmerge.models.compat import cache_argument
from quickmerge.models.decoder import find_decoder
from quickmerge.models.identity import model_hash
from quickmerge.models.part import model_label
from quickmerge.models.spans import tokenizer_of
from quickmerge.models.traits import not_plain
from quickmerge.sampling import evenly
from quickmerge.training.config import TrainingConfig
from quickmerge.training.loop import TrainingResult, train
from quickmerge.training.objective import Dataset, Objective
from quickmerge.training.sharding import place_frozen

DRAWS = 2
"""Keeps that each step trains at, drawn from those that are trained for."""


TRAINED: Mapping[str, Any] = {"window": 16, "recency": 0.7, "spans": "auto", "width": 64}
"""Settings that a prior is trained with unless others are asked for: those of `QuickMerge`, whole lines where a
tokenizer is known, with slots of bounded width, so that there are some to correct."""


@dataclass(frozen=True)
class Weights:
    """How the losses are added: ``kl`` to the full-context model, ``nll`` of the text, ``ar`` and ``collapse``."""

    kl: float = 1.0
    nll: float = 0.0
    ar: float = 0.05
    collapse: float = 1.0

    def __post_init__(self) -> None:
        for name in ("kl", "nll", "ar", "collapse"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value < float("inf"):
                raise ValueError(f"{name} must be a weight of at least 0, got {value!r}")


@dataclass(frozen=True)
class LearningMerge(QuickMergePrior):
    """The method as it is trained: a noisy choice with gates, gradients through everything, losses noted.

    ``temperature`` is that of the Gumbel noise and of the gates, in units of the log-saliency; ``notes`` takes the
    prior's own losses of the prompt just merged.
    """

    temperature: float = 0.0
    notes: dict[str, Tensor] = field(default_factory=dict, compare=False, repr=False)

    name: ClassVar[str] = "quickmerge+prior (learning)"

    def check(self, model: Any, layers: tuple[int, ...], mode: str) -> None:
        """Nothing to refuse: the prior is being made for this model."""

    def on(self, device: torch.device) -> LearningMerge:
        """Itself: the prior that learns is no copy, and training has put it where it belongs."""
        return self

    def plan(self, view: TokenView) -> MergePlan:
        """`QuickMerge.plan` with Gumbel noise on the log-saliency, at the first merge."""
        if not self.first(view):
            return super().plan(view)
        plain = super(QuickMergePrior, self).saliency(view)
        saliency = self.learned(view, plain)
        score = saliency.clamp_min(torch.finfo(plain.dtype).tiny).log()
        count = self.budget.count(view, plain)
        spans = self.whole(view)
        anchor, gate = noisy_select(
            score, count, view, self.recent(view, count), self.temperature,
            spans=None if spans is None else numbered(spans),
            choose=None if self.width is None else self._choose,
        )  # fmt: skip
        self.notes["gate"] = gate
        return self.merge_into(view, anchor, saliency.detach())

    def _choose(self, view: TokenView, score: Tensor, count: Tensor) -> Tensor:
        assert self.width is not None
        return within_width(view, score, count, self.width)

    def align(self, view: TokenView, plan: MergePlan) -> Mapping[int, Tensor]:
        """Corrections with their gradients, and the losses of the prior itself."""
        prior, gate = self.prior, self.notes.pop("gate")
        encoded = prior.encode(view, plan)
        state = prior.read(encoded, plan.position, plan.valid)
        self.notes["ar"], _ = prior.next_loss(encoded, state, view, plan, FORWARD)
        if prior.config.directions == "both":
            back = prior.read(encoded, plan.position, plan.valid, BACKWARD)
            self.notes["ar_back"], _ = prior.next_loss(encoded, back, view, plan, BACKWARD)
        added = prior.correct(state, view.hidden)
        slots = plan.merge(view.hidden)
        corrected = slots + added[min(added)] if added else slots
        # Brought to one length, since the few very long tokens of a residual stream would hide the others.
        share = relative_spread(unit(_precise(corrected)), unit(_precise(view.hidden)), plan.valid, view.valid)
        self.notes["spread"] = share
        if gate.requires_grad:
            first, pull = int(prior.config.trained_for["layers"][0]), gate_pull(plan, gate, slots)
            added[first] = added[first] + pull if first in added else pull
        return added


def gate_pull(plan: MergePlan, gate: Tensor, slots: Tensor) -> Tensor:
    """A term that is zero, whose gradient says what each kept token is worth to the model.

    A token that is not kept is represented by the next anchor. So the slot is relaxed to
    ``g x_k + (1 - g) x_(k+1)`` with the gate ``g``, which is 1 in the forward pass.

    Args:
        plan: the merge.
        gate: ``(B, N)``, 1 for kept tokens, with the gradient of the soft choice.
        slots: ``(B, K, D)`` merged features.
    """
    kept = (gate.detach() > 0.5) & (plan.slot >= 0)
    into = torch.where(kept, plan.slot, plan.slots)
    wide = gate.new_ones(len(gate), plan.slots + 1)
    by_slot = wide.scatter(1, into, torch.where(kept, gate, 1.0))[:, : plan.slots]
    follower = torch.cat([slots[:, 1:], slots[:, -1:]], 1)
    return ((by_slot - 1)[..., None] * (slots - follower).detach()).to(slots.dtype)


class PriorText(Objective):
    """The loss of a prior for a frozen language model, on windows ``(B, context + target)`` of token ids.

    The context is read through merged and corrected slots, the target after it in full. The loss is

        ``kl KL(full || merged) + nll NLL + ar (L_forward + L_backward) + collapse relu(1/2 - spread)^2``

    where KL and NLL are means over target tokens and the full model reads every token of the context.

    Args:
        model: the language model; it is frozen and stays outside the module tree.
        prior: what is trained.
        keeps: shares to keep; each step draws two of them. One that is named twice is drawn more often.
        context: tokens that are merged; the rest of a window is the target.
        weights: of the losses.
        temperature: of the Gumbel noise, at the start and at the end; it goes down geometrically between them.
        settings: of the reducer.
        memory: takes what the full model made of each window, so that a second epoch, or another training with the
            same dict, need not read it again: ``target`` times D values a window. None: nothing is remembered.
    """

    uses_every_parameter: ClassVar[bool] = False

    def __init__(
        self,
        model: PreTrainedModel,
        prior: Prior,
        *,
        keeps: Sequence[float],
        context: int,
        weights: Weights | None = None,
        temperature: tuple[float, float] = (1.0, 0.1),
        settings: Mapping[str, Any] | None = None,
        memory: dict[bytes, Tensor] | None = None,
    ) -> None:
        super().__init__()
        context = whole_number("context", context)
        if not keeps or any(not 0 < keep < 1 for keep in keeps):
            raise ValueError(f"keeps must be shares in (0, 1), got {list(keeps)}")
        start, end = temperature
        if not (start >= end > 0 or start == end == 0):
            raise ValueError(f"temperature must fall from one positive number to another, or be 0, got {temperature}")
        model.requires_grad_(False)
        model.eval()
        self._model = [model]  # in a list, so that it is no part of what is trained
        self.prior = prior
        self.keeps, self.context, self.temperature = tuple(keeps), context, temperature
        self.weights = weights or Weights()
        self.schedule = Schedule(tuple(prior.config.trained_for["layers"]), prior.config.trained_for["decay"])
        self.settings, self.memory = dict(settings or {}), memory

    def frozen(self) -> Sequence[tuple[nn.Module, Sequence[nn.Module]]]:
        """The language model."""
        return [(self._model[0], list(find_decoder(self._model[0]).layers))]

    def place(self, device: torch.device) -> None:
        """Move the language model along."""
        place_frozen(self._model[0], device)

    @torch.no_grad()
    def calibrate(self, windows: Dataset, windows_read: int = 8) -> None:
        """Set the prior's scale of features from the merged slots of some windows."""
        slots: list[Tensor] = []

        class Look(LearningMerge):
            def align(self, view: TokenView, plan: MergePlan) -> Mapping[int, Tensor]:
                slots.append(plan.merge(view.hidden)[plan.valid])
                return {}

        model = self._model[0]
        look = Look(keep=max(self.keeps), prior=self.prior, **self.settings)
        for index in evenly(range(len(windows)), windows_read, at="middle"):
            with reduce(model, look, self.schedule, min_tokens=0):
                ids = torch.as_tensor(windows[index])[None, : self.context].to(model.device)
                model.base_model(ids, use_cache=False)
        self.prior.calibrate(torch.cat(slots).float().to(self.prior.mean.device))

    def _heat(self, progress: float) -> float:
        start, end = self.temperature
        return start if start == end else float(start * (end / start) ** progress)

    def forward(self, batch: Tensor, progress: float) -> dict[str, Tensor]:
        """Losses of a batch of windows ``(B, context + target)``, averaged over the drawn keeps."""
        model = self._model[0]
        with torch.no_grad():
            full = _precise(model.get_output_embeddings()(self._read_whole(batch))).log_softmax(-1)
        # One pass of the full model serves several keeps, since it is the most expensive part. The draw depends on the
        # step alone, so that all processes train at the same keeps.
        keeps = random.Random(f"{progress:.9f}").sample(self.keeps, min(DRAWS, len(self.keeps)))
        each = [self._at(keep, batch, full, self._heat(progress) if self.training else 0.0) for keep in keeps]
        return {name: torch.stack([losses[name] for losses in each]).mean() for name in each[0]}

    def _read_whole(self, batch: Tensor) -> Tensor:
        """Last hidden states ``(B, target - 1, D)`` of the target, every token of the context read; remembered."""
        # Of a sharded model every process must take part in every forward: what one remembers another may not.
        remembers = self.memory is not None and not self.sharded
        keys = [row.cpu().numpy().tobytes() for row in batch] if remembers else []
        if remembers and self.memory is not None and all(key in self.memory for key in keys):
            return torch.stack([self.memory[key] for key in keys]).to(batch.device)
        whole: Tensor = self._model[0].base_model(batch[:, :-1]).last_hidden_state[:, self.context :]
        if remembers and self.memory is not None:
            self.memory.update(zip(keys, whole.cpu().unbind(), strict=True))
        return whole

    def _at(self, keep: float, batch: Tensor, full: Tensor, temperature: float) -> dict[str, Tensor]:
        """Losses at one keep, against the log-probabilities ``full (B, target - 1, V)``."""
        model, w = self._model[0], self.weights
        context, target = batch[:, : self.context], batch[:, self.context :]
        reducer = LearningMerge(keep=keep, prior=self.prior, temperature=temperature, **self.settings)
        cache = DynamicCache(config=model.config)
        with reduce(model, reducer, self.schedule, min_tokens=0):
            model.base_model(context, **cache_argument(model.base_model, cache), use_cache=True)
            read = model.base_model(
                target[:, :-1], **cache_argument(model.base_model, cache), use_cache=True
            ).last_hidden_state
        merged = _precise(model.get_output_embeddings()(read)).log_softmax(-1)
        kl = (full.exp() * (full - merged)).sum(-1).mean()
        nll = -merged.gather(-1, target[:, 1:, None]).mean()
        notes = reducer.notes
        check_collapse(notes["spread"].detach(), "the merged sequence")
        ar = notes["ar"] + notes.get("ar_back", 0.0)
        loss = w.kl * kl + w.nll * nll + w.ar * ar + w.collapse * collapse_penalty(notes["spread"])
        told = {"kl": kl, "nll": nll, **notes}
        return {"loss": loss, **{name: value.detach() for name, value in told.items()}}


def _precise(x: Tensor) -> Tensor:
    """In float32 at least."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def train_prior_text(
    model: PreTrainedModel,
    windows: Dataset,
    config: TrainingConfig,
    out: Path,
    *,
    name: str,
    keeps: Sequence[float],
    context: int,
    layer: int | Sequence[int] | None = None,
    depths: Sequence[int] | None = None,
    reducer: Mapping[str, Any] | None = None,
    weights: Weights | None = None,
    temperature: tuple[float, float] = (1.0, 0.1),
    resume: bool = False,
    half: bool = False,
    memory: dict[bytes, Tensor] | None = None,
    **shape: Any,
) -> TrainingResult:
    """Train a prior for a frozen language model and save it in ``out``.

    Args:
        model: a supported causal LM; it is frozen, and cast to bfloat16 where ``config.precision`` is ``"bf16"``.
        windows: token windows ``(context + target,)`` by index.
        config: settings of the loop.
        out: folder for config.json, model.safetensors, checkpoints and metrics.
        name: what the model is called in messages.
        keeps: shares to train at.
        context: tokens of a window that are merged; the others are predicted.
        layer: where to merge, as in `quickmerge.reduce`.
        depths: blocks in front of which slots are corrected; default `default_depths`, an empty list for none.
        reducer: settings of `QuickMergePrior`, in place of `TRAINED`; they are stored with the prior.
        weights: of the losses.
        temperature: of the Gumbel noise, at the start and at the end.
        resume: go on from the newest checkpoint.
        half: store the prior's weights in float16.
        memory: as in `PriorText`.
        **shape: further fields of `PriorConfig`.

    Raises:
        QuickmergeError, ValueError: for anything that does not fit; see `quickmerge.training.train`.
    """
    reducer = dict(TRAINED if reducer is None else reducer)
    if reducer.get("spans") == "auto":  # said as it was, so that nothing else is used with another tokenizer
        reducer["spans"] = "none" if tokenizer_of(model) is None else "line"
    decoder = find_decoder(model)
    decoder.need("training a prior", not_plain)
    schedule = Schedule.of(layer, len(decoder))
    settings = {"name": name, "hash": model_hash(model)}
    chosen = default_depths(schedule, len(decoder)) if depths is None else tuple(depths)
    for depth in chosen:
        if not schedule.layers[0] <= depth < len(decoder):
            raise ValueError(
                f"depths must lie in {schedule.layers[0]}..{len(decoder) - 1}, where slots are, got {depth}"
            )
    trained_for = {
        "model": model_label(settings["name"]), "hash": settings["hash"], "layers": list(schedule.layers),
        "decay": schedule.decay, "keeps": list(keeps), "context": context, "reducer": reducer,
    }  # fmt: skip
    torch.manual_seed(config.seed)
    prior = Prior(PriorConfig(features=decoder.config.hidden_size, depths=chosen, trained_for=trained_for, **shape))
    if config.precision == "bf16":
        model.to(torch.bfloat16)
    objective = PriorText(
        model,
        prior,
        keeps=keeps,
        context=context,
        weights=weights,
        temperature=temperature,
        settings=reducer,
        memory=memory,
    )
    fingerprint: dict[str, Any] = {"prior": json.loads(prior.config.to_json()), "weights": asdict(objective.weights),
                                   "temperature": list(temperature)}  # fmt: skip
    if hasattr(windows, "fingerprint"):
        fingerprint["data"] = windows.fingerprint()
    if len(windows):
        objective.calibrate(windows)

    def finish(folder: Path) -> None:
        prior.save_pretrained(folder, torch.float16 if half else None)

    return train(
        objective, windows, config, out, resume=resume, fingerprint=fingerprint,
        finish=finish,
    )  # fmt: skip


def default_depths(schedule: Schedule, depth: int) -> tuple[int, ...]:
    """The first reduced block and three more at equal distances below the last merge (or the top)."""
    first = schedule.layers[0]
    last = schedule.layers[-1] if len(schedule.layers) > 1 else depth
    return tuple(sorted({first + (last - first) * i // 4 for i in range(4)}))
