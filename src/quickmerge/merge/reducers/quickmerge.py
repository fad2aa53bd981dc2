"""QuickMerge++: keep by attention norm, merge the rest into what is kept."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, ClassVar, Self

import torch
from torch import Tensor

from quickmerge.errors import near_match, number_at_least, whole_number
from quickmerge.merge.cache.evictor import as_share
from quickmerge.merge.reducers.base import Needs, Reducer, key_bias, mean_attention, voters
from quickmerge.merge.reducers.tofu import OPERATORS, mlerp
from quickmerge.merge.reducers.tome import match_down, mean_key
from quickmerge.merge.tokens.budget import Budget, Entropy, as_budget, fixed_count, how_many, known_count, select
from quickmerge.merge.tokens.plan import MergePlan, next_anchor, within_width
from quickmerge.merge.tokens.saliency import (
    attention_entropy,
    attention_norm,
    bidirectional_attention,
    lift,
    pool,
    times_value_norm,
)
from quickmerge.merge.tokens.view import TokenView

NEAREST_SHARE = 1 / 8
"""``nearest`` is at most this share of a row, so that in a short prompt too most tokens can get votes."""

VOTERS = 16
"""The last tokens of a prompt, where a question stands. With fewer, behind a chat template, its marks alone vote."""

VOTERS_BEHIND = 64
"""Voters of a chunk in ``block_causal`` mode, where no question is known and all of the window behind it may ask."""

POOL, SHARE = 15, 0.1
"""Neighbourhood and share of a merged token in a prompt. In a chunk, which chooses for itself in every block, pooling
and merging do harm (docs/results/block-causal.md): each token is there for itself, and what is not kept is dropped."""

SPANS = ("auto", "line", "word", "none")

MEASURES = ("norm", "entropy", "focus")
"""What saliency is: the attention norm, how widely a token attends, or how narrowly."""

ALL = sys.maxsize
"""As many voters as there are tokens."""

MASS, FLOOR = "mass", 1e-5
"""Members of a slot weigh what their saliency is of the largest in the row, and this at least."""

WIDTH = 16
"""Tokens of a slot at most, by the paper's preset."""

TYPICAL = 0.8633
"""``exp H / N`` of the preset's saliency, mean over windows of 1,024 tokens of the shipped document, SmolLM2-135M."""

TYPICAL_PATCHES = 0.78
"""The same of patches in the middle block of ViT-S/14, mean over 16 images; 0.84 in block 2 and 0.38 in block 8."""

FIRST_OF_MEAN = 22 / 17.75
"""What the first of the default's merges leaves, against the mean over all blocks from it on (see `Schedule`)."""


@dataclass(frozen=True)
class QuickMerge(Reducer):
    """QuickMerge++ (arXiv 2508.13204), training-free.

    Saliency is the attention norm, the root mean square length of what each token adds to the outputs of the last
    ``window`` tokens, averaged over probed layers and heads and over a neighbourhood of ``pool`` tokens, and then the
    largest in each span of the text:
    ``s_j = max_{j'' in span(j)} mean_{|j'-j''| <= pool/2} mean_{l,h} sqrt(mean_i [i - j' >= nearest] ||p_lhij'
    v_lhj'||^2)``. A merged token can't be recalled, so that a line is kept or merged as a whole. Of the tokens
    that the budget allows, the share ``recency`` goes to the most recent ones (where protected tokens leave fewer
    places, to the newest of these) and the rest to the most salient. These stay as anchors; each other token merges
    into the next anchor on its right with share ``merge`` against the anchor's 1.

    Args:
        keep: share of the tokens kept, or a budget such as `Entropy`.
        layers: how many blocks below the merge are probed.
        window: how many of the last tokens vote by their attention, or ``"all"``. None: 16 of a prompt, and in
            ``block_causal`` mode the 64 behind a chunk.
        nearest: votes count only for tokens at least this far before the voter (but at most an eighth of the row).
            Attention is mostly to close tokens, which are kept for being recent anyway; without the limit it would
            spend the rest of the budget on them too.
        pool: neighbourhood, in tokens, that a salient token lifts with it; odd. None: 15 in a prompt, and in
            ``block_causal`` mode 1.
        recency: share of the kept tokens that are kept for being the most recent, in [0, 1].
        merge: share of a merged token against its anchor's 1; 0 drops instead of merging. None: 0.1 in a prompt, and in
            ``block_causal`` mode 0.
            ``"mass"``: the members of a slot, its anchor too, weigh as much as their saliency.
        spans: ``"line"`` (a line or sentence, of about 32 tokens at most), ``"word"`` or ``"none"``; ``"auto"``: lines,
            where a tokenizer tells the text of the tokens, in prefix mode.
        cache: share of the entries that the cache holds when the prompt has been read, in (0, 1]; entries of every
            layer and key head leave it until then, by `quickmerge.AttentionNorm`. None: what the merge leaves.
        measure: ``"norm"``, the attention norm; or ``"entropy"``, how widely a token itself attends, the entropy of its
            attention over the largest possible, mean over the layers and heads; or ``"focus"``, 1 less that. The
            public code of the paper has both signs. Nobody votes then, and ``window`` and ``nearest`` play no part.
        width: tokens that merge into a slot at most; runs that are longer have further slots, within the budget. None:
            as many as there are.
        proportional: attention above the merge adds log(size) to the scores of a slot.
    """

    layers: int = 2
    window: int | str | None = None
    nearest: int = 64
    pool: int | None = None
    recency: float = 0.7
    merge: float | str | None = None
    spans: str = "auto"
    cache: float | None = None
    measure: str = "norm"
    width: int | None = None
    # A default of the class for others, a setting of each object here.
    proportional: bool = field(default=False, kw_only=True)  # type: ignore[misc]
    name: ClassVar[str] = "quickmerge"
    source: ClassVar[str] = "arXiv 2508.13204"

    def __post_init__(self) -> None:
        super().__post_init__()
        said = {
            "window": self.window not in (None, "all"),
            "pool": self.pool is not None,
            "width": self.width is not None,
        }
        given = [name for name, there in said.items() if there]
        for name in ("layers", *given):
            object.__setattr__(self, name, whole_number(name, getattr(self, name)))
        object.__setattr__(self, "nearest", whole_number("nearest", self.nearest, 0))
        if self.pool is not None and self.pool % 2 == 0:
            raise ValueError(f"pool must be odd, got {self.pool}")
        for name in ("recency", *(["merge"] if self.merge not in (None, MASS) else [])):
            value = getattr(self, name)
            if isinstance(value, bool) or not (isinstance(value, (int, float)) and 0 <= value <= 1):
                raise ValueError(f"{name} must be a number in [0, 1], got {value!r}")
        if self.cache is not None:
            object.__setattr__(self, "cache", as_share("cache", self.cache, low=False))
        if self.spans not in SPANS:
            hint = near_match(str(self.spans), SPANS)
            raise ValueError(f"spans must be one of {', '.join(SPANS)}, got {self.spans!r}{hint}")
        if self.measure not in MEASURES:
            hint = near_match(str(self.measure), MEASURES)
            raise ValueError(f"measure must be one of {', '.join(MEASURES)}, got {self.measure!r}{hint}")

    @classmethod
    def paper(cls, keep: float | Budget = 0.42, **settings: Any) -> Self:
        """QuickMerge++ as it is published, as far as that is known: no text of its method section is at hand.

        Its abstract names attention-norm saliency, an entropy budget and norm-preserving merging into few tokens, and
        its public code weights members by their saliency. So here every token votes about all before it, nothing is
        kept for being recent or for the span it is in, slots are runs of at most 16 tokens that end at a salient one,
        members weigh what their saliency is, and log(size) is added in attention.

        Args:
            keep: a budget; or the mean share of tokens that the blocks above read, by an `Entropy` budget whose scale
                was measured for SmolLM2-135M and prompts of about 1,024 tokens. For another model or length
                `quickmerge.merge.calibrate.calibrated` measures it.
            **settings: in place of the preset's.
        """
        if isinstance(keep, (int, float)):
            as_budget(keep)
            keep = Entropy(scale=keep * FIRST_OF_MEAN / TYPICAL)
        preset: dict[str, Any] = {
            "window": "all", "nearest": 0, "pool": 1, "recency": 0.0, "merge": MASS, "spans": "none", "width": WIDTH,
            "proportional": True,
        }  # fmt: skip
        return cls(keep=keep, **{**preset, **settings})

    @property
    def needs(self) -> Needs:  # noqa: D102
        rows = VOTERS if self.window is None else self._window(VOTERS) if self.measure == "norm" else ALL
        return Needs(self.layers, rows, spans=None if self.spans == "none" else self.spans)

    def check(self, model: Any, layers: tuple[int, ...], mode: str) -> None:
        """Refuse to tell lines or words of a chunk, which no mode but prefix knows the text of."""
        if mode != "prefix" and self.spans not in ("auto", "none"):
            raise ValueError(f"spans must be auto or none in {mode} mode, got {self.spans!r}")

    def saliency(self, view: TokenView) -> Tensor:
        """``(B, N)`` pooled attention norm, and where spans are known the largest in each."""
        bias = key_bias(view, True) if self.proportional else None
        if self.measure == "norm":
            nearest = (view.length * NEAREST_SHARE).long().clamp_max(self.nearest)
            window = self._window(VOTERS if view.latest else VOTERS_BEHIND)
            plain = mean_attention(view, partial(attention_norm, window=window, nearest=nearest, bias=bias))
        else:
            plain = mean_attention(view, partial(attention_entropy, bias=bias))
            plain = plain if self.measure == "entropy" else 1 - plain
        wide = (POOL if view.latest else 1) if self.pool is None else self.pool
        pooled = pool(plain, view.valid, wide)
        return pooled if self.spans == "none" or view.group is None else lift(pooled, view.group, view.valid)

    def _window(self, usual: int) -> int:
        """How many tokens vote, where ``usual`` do if nothing is said."""
        return usual if self.window is None else ALL if isinstance(self.window, str) else self.window

    def recent(self, view: TokenView, count: Tensor) -> Tensor:
        """``(B, N)`` bool: the most recent tokens, the share ``recency`` of the ``count (B,)`` kept ones.

        Exempt tokens are neither among them nor counted. Never more than there are places for: of unprotected tokens
        the newest that fit beside the protected ones.
        """
        if not view.latest:
            return torch.zeros_like(view.valid)
        share = count - (view.valid & ~view.counted).sum(-1)
        most = (share.double() * self.recency + 1e-9).floor()[:, None]
        places = (count - (view.protected & view.valid).sum(-1))[:, None]
        recent = view.counted & (_from_the_end(view.counted) <= most)
        return recent & (view.protected | (_from_the_end(view.free) <= places))

    def merge_into(
        self, view: TokenView, anchor: Tensor, saliency: Tensor | None = None, kept: Sequence[int] | None = None
    ) -> MergePlan:
        """The plan that keeps the tokens ``anchor (B, N)`` and merges each other one into the next of them.

        ``saliency (B, N)`` is what members weigh with ``merge="mass"``; ``kept`` is of `MergePlan.from_anchors`.
        """
        merge = (SHARE if view.latest else 0) if self.merge is None else self.merge
        if merge == 0:
            return MergePlan.from_anchors(view, anchor, kept=kept)
        if isinstance(merge, str):
            saliency = self.saliency(view) if saliency is None else saliency
            share = relative_mass(saliency)
        else:
            share = torch.where(anchor, 1.0, float(merge))
        return MergePlan.from_anchors(view, anchor, next_anchor(view, anchor), share, kept=kept)

    def plan(self, view: TokenView) -> MergePlan:  # noqa: D102
        saliency = self.saliency(view)
        count, kept = self.budget.count(view, saliency), known_count(self.budget, view)
        score = torch.where(self.recent(view, count), torch.inf, saliency)
        if self.width is None:
            return self.merge_into(view, select(score, count, view), saliency, kept)
        return self.merge_into(view, within_width(view, score, count, self.width), saliency, kept)


def relative_mass(saliency: Tensor) -> Tensor:
    """``(B, N)`` positive: what each token weighs in its slot, ``m_j = s_j / max s + 1e-5``, equal where all are zero.

    The small constant is that of the paper's public code; it keeps a slot of tokens without any saliency a mean.
    """
    largest = saliency.amax(-1, keepdim=True)
    return saliency / torch.where(largest > 0, largest, 1.0) + FLOOR


def _from_the_end(mask: Tensor) -> Tensor:
    """``(B, N)`` long: 1 for the last marked token of each row, 2 for the one before it, and so on."""
    return mask.flip(-1).long().cumsum(-1).flip(-1)


# QuickMerge++ inside a vision transformer: what little is read, and what is alike, merges.


@dataclass(frozen=True)
class QuickMergeVision(Reducer):
    """QuickMerge++ (arXiv 2508.13204) for the blocks of a vision transformer, training-free.

    Saliency is the attention norm, the root mean square length of what each token adds to the outputs of the voters,
    averaged over heads: ``s_j = mean_h sqrt(mean_i ||p_hij v_hj||^2)``. Voters are the prefix tokens and ``votes``
    patches, evenly spaced. Tokens are matched as in ToMe, each of the one half with its most similar one (cosine of
    the keys, averaged over heads) of the other half, and those merge first, weighted by size, that cost least:

        ``c_i = s_i^alpha (1 - cos(m_i, m_partner))``

    So tokens stay that are read much and resemble no other. A slot is the mean of its members by size, scaled to the
    norm of the longest (`quickmerge.merge.reducers.tofu`), since a mean is shorter than what went into it. The paper
    publishes no rule for what merges with what; this is ours. Where more than half must go, several rounds follow one
    another, in which a slot has the sum of its members' saliency. Attention above the merge adds log(size).

    Args:
        keep: share of the tokens kept, or a budget such as `Entropy`, which may keep more of one image than of another.
        alpha: how much saliency counts, of at least 0; at 0 similarity alone decides, as in ToMe.
        votes: how many patches vote beside the prefix, or ``"all"``.
        operator: ``"mlerp"``, or ``"average"`` for the mean as it is.
        weights: what members weigh in their slot: ``"size"``, or ``"mass"``, their saliency.
        proportional: attention above the merge adds log(size) to the scores of a slot.
    """

    alpha: float = 0.25
    votes: int | str = 32
    operator: str = "mlerp"
    weights: str = "size"
    proportional: bool = field(default=True, kw_only=True)  # type: ignore[misc]
    name: ClassVar[str] = "quickmerge"
    source: ClassVar[str] = "arXiv 2508.13204"
    places: ClassVar[tuple[str, ...]] = ("vision",)

    def __post_init__(self) -> None:
        super().__post_init__()
        number_at_least("alpha", self.alpha, 0)
        if self.votes != "all":
            object.__setattr__(self, "votes", whole_number("votes", self.votes))
        if self.weights not in ("size", MASS):
            raise ValueError(f"weights must be one of size, mass, got {self.weights!r}")
        if self.operator not in OPERATORS:
            raise ValueError(f"operator must be one of {', '.join(OPERATORS)}, got {self.operator!r}")

    @property
    def needs(self) -> Needs:  # noqa: D102
        return Needs(1, self._voters + 1, frozenset({"key", "norm"}))

    @classmethod
    def paper(cls, keep: float | Budget = 0.42, **settings: Any) -> Self:
        """QuickMerge++ as it is published, as far as that is known; see `QuickMerge.paper`.

        Every patch votes, and members weigh what their saliency is.

        Args:
            keep: a budget; or a share, by an `Entropy` budget whose scale was measured for ViT-S/14.
            **settings: in place of the preset's.
        """
        if isinstance(keep, (int, float)):
            as_budget(keep)
            keep = Entropy(scale=keep / TYPICAL_PATCHES)
        return cls(keep=keep, **{"votes": "all", "operator": "average", "weights": MASS, **settings})

    @property
    def _voters(self) -> int:
        return ALL - 1 if isinstance(self.votes, str) else self.votes

    @torch.no_grad()
    def saliency(self, view: TokenView) -> Tensor:
        """``(B, N)`` attention norm, zero for padding; the view's own saliency where it has one.

        Raises:
            ValueError: if there is no trace to read.
        """
        if view.evidence.saliency is not None:
            return torch.where(view.valid, view.evidence.saliency, 0.0)
        if not view.evidence.attention:
            raise ValueError(f"attention must hold the trace of the view's block for {self.name}, got none")
        trace = view.evidence.attention[-1]
        received = bidirectional_attention(trace, voters(view, self._voters), key_bias(view, True), moment=2)
        added = times_value_norm(received, trace.value)
        return torch.where(view.valid, added.mean(1), 0.0)

    def plan(self, view: TokenView) -> MergePlan:  # noqa: D102
        metric, count = mean_key(view, self.name), fixed_count(self.budget, view)
        by_size = self.weights == "size"
        if self.alpha == 0 and count is not None and by_size:
            return match_down(view, metric, count)
        saliency = self.saliency(view)
        left, kept = how_many(self.budget, view, saliency), known_count(self.budget, view)
        share = None if by_size else relative_mass(saliency)
        if self.alpha == 0:
            return match_down(view, metric, left, share=share, kept=kept)
        # On a scale of its own, so that no power of it vanishes.
        relative = saliency / saliency.amax(-1, keepdim=True).clamp_min(torch.finfo(saliency.dtype).tiny)
        return match_down(view, metric, left, share=share, saliency=relative, power=self.alpha, kept=kept)

    def combine(self, view: TokenView, plan: MergePlan, x: Tensor) -> Tensor:
        """The mean of each slot's members by size, scaled to the norm of the longest; one member is a copy."""
        return plan.merge(x) if self.operator == "average" else mlerp(plan, x)
