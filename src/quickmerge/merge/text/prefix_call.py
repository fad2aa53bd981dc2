"""What one forward of prefix mode knows: which tokens it reads, what was decided of them, and what each block reads.

The object goes along with the arguments of the decoder, its blocks and their attention; see
`quickmerge.merge.text.prefix`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from quickmerge.merge.cache.heads import HeadTables
from quickmerge.merge.text.merged_cache import PromptState, Segment
from quickmerge.merge.tokens.plan import MergePlan
from quickmerge.merge.tokens.saliency import AttentionTrace
from quickmerge.merge.tokens.view import Known

CALL = "quickmerge_prefix"
"""Keyword by which a forward hands its state to its blocks, and a block to its attention."""


@dataclass(frozen=True)
class Reading:
    """What was decided of a prompt: a plan for each merge from the lowest block up, where, and what stayed alone."""

    layers: tuple[int, ...] = ()
    plans: tuple[MergePlan, ...] = ()
    composed: tuple[MergePlan, ...] = ()
    protected: Tensor | None = None


@dataclass
class PrefixCall:
    """The state of one forward.

    ``fresh``: whether it reads a prompt; else ``valid (B, q)`` are the tokens that it reads behind one. Of a prompt
    there are ``valid (B, N)``, ``protected``, ``exempt``, ``asked``, ``length (B,)`` and ``whole (B,)``, the rows that
    are not reduced; ``drafts`` tokens come behind its N. ``segments`` are those that this forward's blocks read, by
    first block, whatever becomes of the cache's. ``plans``, ``source`` and ``added`` are by the block in front of which
    they are carried out: a block that is computed again finds them there. ``ids (B, N)`` are those of the prompt, where
    it has any, and ``group`` tells the span of each token in front of the next merge. ``see`` gives, for a block, what
    tokens behind a prompt see of one another, ``(B or 1, 1, q, q)``, where they are no text but a tree.

    ``given (B,)`` is how many tokens a prompt had, and ``stands (B, N)`` where those that are read stand in it. Where
    its cache is to be made smaller, ``lines (B, N)`` tell the span of each token, for methods that ask, ``scores`` are
    of the entries ``(B, G, n)`` of each block, and ``later`` are the arguments by which drafts are read behind what is
    left; ``heads`` are, behind such a prompt, the tables of each block, this forward's tokens among them.
    ``places (1 or B, N)`` are where the tokens that enter the decoder stand, for blocks that aren't told;
    ``entered`` is the last block that was.

    What the host knows, so that nobody waits for a device: of a prompt ``known``, of the tokens in front of the next
    merge, with ``lengths`` of those in front of the first block; ``kept_whole``, which rows are not reduced, and
    ``reach``, the first and last place of any slot. ``whole_new`` says whether all tokens behind a prompt are valid,
    and ``last_place`` where the last of any row stands. None where it isn't known.
    """

    fresh: bool
    state: PromptState
    valid: Tensor
    protected: Tensor | None = None
    exempt: Tensor | None = None
    asked: Tensor | None = None
    length: Tensor | None = None
    whole: Tensor | None = None
    ids: Tensor | None = None
    group: Tensor | None = None
    drafts: int = 0
    segments: dict[int, Segment] = field(default_factory=dict)
    plans: dict[int, MergePlan] = field(default_factory=dict)
    composed: list[MergePlan] = field(default_factory=list)
    source: dict[int, Tensor] = field(default_factory=dict)
    added: dict[int, Tensor] = field(default_factory=dict)
    traces: dict[int, AttentionTrace] = field(default_factory=dict)
    masks: dict[tuple[int, int | None, str], Any] = field(default_factory=dict)
    see: Callable[[int], Tensor] | None = None
    given: Tensor | None = None
    stands: Tensor | None = None
    lines: Tensor | None = None
    scores: dict[int, Tensor] = field(default_factory=dict)
    heads: dict[int, HeadTables] = field(default_factory=dict)
    later: dict[str, Tensor] = field(default_factory=dict)
    places: Tensor | None = None
    entered: int = -1
    known: Known | None = None
    lengths: tuple[int, ...] | None = None
    kept_whole: tuple[bool, ...] | None = None
    reach: tuple[int, int] | None = None
    drafts_whole: bool | None = None
    whole_new: bool | None = None
    last_place: int | None = None

    def __post_init__(self) -> None:
        if self.known is not None:
            self.lengths = self.known.valid

    @property
    def plan(self) -> MergePlan | None:
        """All merges so far composed."""
        return self.composed[-1] if self.composed else None

    def first(self, layer: int) -> int | None:
        """The block that the segment of a block begins with; None below the first merge."""
        below = [first for first in self.segments if first <= layer]
        return max(below) if below else None

    def segment(self, layer: int) -> Segment | None:
        """The segment a block belongs to; None below the first merge and where merging changed nothing."""
        first = self.first(layer)
        return None if first is None else self.segments[first]

    def tokens(self, layer: int) -> int:
        """How many tokens, slots among them, enter a block of this forward, in front of a merge there."""
        below = self.segment(layer - 1) if self.fresh else None
        return self.valid.shape[1] if below is None else below.valid.shape[1]

    def marked(self, layer: int, mask: Tensor | None) -> Tensor | None:
        """``(B, n)`` bool, which entries of a block hold a token that ``mask (B, N)`` marks; None: none."""
        first = self.first(layer)
        if mask is None or first is None:
            return mask
        return self.composed[list(self.plans).index(first)].carry(mask)

    def decide(self, index: int, plan: MergePlan) -> None:
        """Note the plan of the merge in front of a block."""
        self.composed.append(plan if self.plan is None else self.plan.compose(plan))
        self.plans[index] = plan
        if self.known is not None and plan.counts is not None and plan.counts != self.known.valid:
            self.known = self.known.merged(plan.counts)
        self.forget_below(index)

    def forget_below(self, index: int) -> None:
        """Drop what was measured below a merge: nobody above asks for it."""
        self.traces = {layer: trace for layer, trace in self.traces.items() if layer >= index}
