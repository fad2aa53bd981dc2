"""The tokens between two blocks of a vision transformer, and the ways back to all of the original ones."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial, wraps
from operator import index
from typing import Any

import torch
from torch import Tensor, nn

from quickmerge.errors import QuickmergeError, UnsupportedModelError
from quickmerge.merge.reducers.base import Reducer
from quickmerge.merge.run import VisionStats
from quickmerge.merge.tokens.budget import Count, clamp_count, layers_of
from quickmerge.merge.tokens.plan import MergePlan, follow
from quickmerge.merge.tokens.removal import Removal, removal_for
from quickmerge.merge.tokens.saliency import AttentionTrace
from quickmerge.merge.tokens.view import Evidence, TokenView
from quickmerge.models.attachment import Attachment, PerThread, stands_aside
from quickmerge.models.encoder import Block, Encoder, prefix_of


@dataclass
class Level:
    """The tokens that enter a block: what each stands for, and where each original token has gone.

    ``size``, ``position`` and ``valid`` are ``(B, K)``; ``valid`` is None where no slot is padding. ``slot (B, N)`` is
    the place of each original token, -1 where it was dropped; ``alive`` says how many of every row were not dropped,
    None where rows differ, and ``single`` that every slot is known to hold one token. ``bias (B, 1, 1, K)`` is what
    attention adds to the scores, None for nothing. ``padded`` says that there was padding among the original tokens.
    """

    size: Tensor
    position: Tensor
    valid: Tensor | None
    slot: Tensor
    alive: int | None
    single: bool
    bias: Tensor | None = None
    padded: bool = False


def padded_rows(valid: Tensor) -> Level:
    """The original tokens of images that are padded: ``valid (B, N)``, where padding stands behind the others."""
    place = torch.arange(valid.shape[1], device=valid.device).expand(valid.shape)
    slot = torch.where(valid, place, -1)
    return Level(valid.long(), place, valid, slot, None, True, None, True)


def after(level: Level | None, plan: MergePlan, *, proportional: bool, dtype: torch.dtype) -> Level:
    """The tokens after ``plan`` was carried out on those of ``level``; None stands for the original ones.

    Args:
        level: what the plan was made for.
        plan: what was decided.
        proportional: whether attention adds log(size) to the scores (ToMe, arXiv 2210.09461, eq. 1).
        dtype: of the bias.
    """
    slot = plan.slot if level is None else follow(level.slot, plan.slot)
    valid = None
    if plan.seat is not None and plan.moved is not None:
        alive = slot.shape[1] if level is None else level.alive
    elif plan.seat is not None and (level is None or level.single):
        alive = plan.slots
    else:  # what was dropped may have been many tokens in one row and one in another: it has to be counted
        counts = (slot >= 0).sum(-1)
        alive = int(counts[0]) if bool((counts == counts[0]).all()) else None
        alive = None if level is not None and level.padded else alive
        valid = None if bool(plan.valid.all()) else plan.valid
    single = plan.seat is not None and plan.moved is None and (level is None or level.single)
    bias = None
    if proportional or valid is not None:
        precise = torch.promote_types(dtype, torch.float32)
        bias = (plan.size.clamp_min(1) if proportional else torch.ones_like(plan.size)).to(precise).log()
        if valid is not None:
            bias = bias.masked_fill(~valid, -torch.inf)
        bias = bias.to(dtype)[:, None, None]
    padded = level is not None and level.padded
    return Level(plan.size, plan.position, valid, slot, alive, single, bias, padded)


def spread(y: Tensor, level: Level, prefix: int) -> Tensor:
    """Give every original token that was not dropped the features of its slot: ``(B, K, D)`` to ``(B, alive, D)``.

    The mean over these is the mean over slots weighted by size, and attention over them is attention with log(size)
    added to the scores, so whatever pools the tokens pools them as it should. Where rows have dropped different
    numbers of tokens, what they dropped is filled with the mean of the patches that they have, those behind the first
    ``prefix`` tokens, which leaves that mean as it is.
    """
    if level.alive == level.slot.shape[1]:
        return _gather(y, level.slot)
    if level.alive is not None:
        first = (level.slot >= 0).long().argsort(dim=-1, descending=True, stable=True)[:, : level.alive]
        return _gather(y, level.slot.gather(1, first))
    there = (level.slot >= 0)[..., None]
    out = torch.where(there, _gather(y, level.slot.clamp_min(0)), 0.0)
    mean = out[:, prefix:].sum(1, keepdim=True) / there[:, prefix:].sum(1, keepdim=True)
    return torch.where(there, out, mean).to(y.dtype)


def full_length(y: Tensor, level: Level) -> Tensor:
    """Every original token with the features of its slot, ``(B, K, D)`` to ``(B, N, D)``; zero where it was dropped."""
    out = _gather(y, level.slot.clamp_min(0))
    return out if level.alive == level.slot.shape[1] else torch.where((level.slot >= 0)[..., None], out, 0.0)


def _gather(y: Tensor, index: Tensor) -> Tensor:
    row = torch.arange(y.shape[0], device=y.device)[:, None] * y.shape[1]
    return y.flatten(0, 1).index_select(0, (index + row).flatten()).view(*index.shape, y.shape[-1])


def pick(mask: Tensor, level: Level) -> Tensor:
    """Rows and columns of a bias on the scores ``(B or 1, H or 1, N or 1, N)`` for the places where the slots stand."""
    at = level.position
    b, h, k, n = at.shape[0], mask.shape[1], at.shape[1], mask.shape[-1]
    rows = mask.expand(b, -1, -1, -1)
    if mask.shape[2] != 1:
        rows = rows.gather(2, at[:, None, :, None].expand(b, h, k, n))
    return rows.gather(3, at[:, None, None].expand(b, h, rows.shape[2], k))


def as_bias(mask: Tensor, dtype: torch.dtype) -> Tensor:
    """A mask as what is added to the scores."""
    if mask.dtype != torch.bool:
        return mask
    return torch.zeros(mask.shape, dtype=dtype, device=mask.device).masked_fill(~mask, torch.finfo(dtype).min)


def first_members(level: Level) -> Tensor:
    """``(B, K)`` long: the first of the original tokens that are in each slot; of padding, any."""
    rows, tokens = level.slot.shape
    index = torch.arange(tokens, device=level.slot.device).expand(rows, -1)
    index = torch.where(level.slot >= 0, index, tokens - 1)
    found = index.new_full(level.size.shape, tokens - 1)
    return found.scatter_reduce(1, level.slot.clamp_min(0), index, "amin")


def tokens_of(output: Any) -> Tensor:
    """The tokens in what a block gives, which may be a tuple that begins with them."""
    found: Tensor = output[0] if isinstance(output, (tuple, list)) else output
    return found


def with_tokens(output: Any, tokens: Tensor) -> Any:
    """The same with other tokens."""
    return type(output)([tokens, *output[1:]]) if isinstance(output, (tuple, list)) else tokens


# What runs on vision transformers have in common: deciding, and merging between the halves of a block.
#
# A block of a vision transformer computes ``y = x + attention(norm(x))`` and then ``y + feed_forward(norm(y))``. Tokens
# are merged between the two (ToMe, arXiv 2210.09461), so that the feed-forward part of this block and all of the next
# ones read fewer. The block's own code runs. The hook in front of its second norm writes the K merged tokens over the
# first rows of the residual y, which the block still holds, and hands on these rows alone; behind the feed-forward part
# a hook pads with zeros what the block is about to add; the block's own hook cuts off the rows that are left over.
# Where neither gradients nor a tracer look on, the residual that the block holds is made the merged tokens instead, and
# nothing is padded nor cut. Layer scale, dropout and stochastic depth stay the block's. Of a block that is not built
# like that, the output is merged.


@dataclass
class Call:
    """The state of one forward: by block, what its attention reads and what was decided in it.

    ``masked`` says that the model was told which patches are there; ``valid (B, patches)`` which are, None for all;
    ``lengths`` how many tokens each image has then.
    ``padded`` says of a block that took tokens out whether it goes on at full width, its last rows meaningless.
    ``arriving`` holds what the block before left where a block takes tokens out in front of its attention: a block
    that is computed again for gradient checkpointing starts from there.
    """

    grid: tuple[int, int, int]
    tokens: int = 0
    prefix: int = 0
    targets: list[Reducer | None] = field(default_factory=list)
    levels: list[Level | None] = field(default_factory=list)
    traces: list[AttentionTrace | None] = field(default_factory=list)
    plans: list[MergePlan | None] = field(default_factory=list)
    widths: list[int] = field(default_factory=list)
    arriving: dict[int, Level | None] = field(default_factory=dict)
    padded: dict[int, bool] = field(default_factory=dict)
    masked: bool = False
    valid: Tensor | None = None
    lengths: list[int] | None = None

    @property
    def last(self) -> Level | None:
        """The tokens that leave the last block, None if none was ever taken out."""
        return self.levels[-1]


@dataclass(frozen=True, eq=False)
class EachRow:
    """A budget: how many tokens each row keeps, ``(B,)`` long."""

    tokens: Tensor

    def count(self, view: TokenView, saliency: Tensor | None) -> Tensor:  # noqa: D102
        return clamp_count(self.tokens, view)


def schedule_for(
    encoder: Encoder, reducer: Reducer, layer: int | Sequence[int] | Removal | None
) -> Removal | tuple[int, ...] | None:
    """Where ``reducer`` acts in ``encoder``, of what a user said; None for everywhere, as its ``keep`` asks.

    Raises:
        ValueError: for a setting out of range, naming it.
    """
    if not isinstance(reducer, Reducer):
        raise ValueError(f"reducer must be a quickmerge reducer such as ToMe(), got {reducer!r}")
    if "vision" not in reducer.places:
        raise ValueError(f"reducer {reducer.name} is not for vision transformers; those of `quickmerge ls` are")
    blocks: tuple[int, ...] = ()
    if layer is None:
        layer = reducer.stages(len(encoder))
    if layer is not None and not isinstance(layer, Removal):
        blocks = layers_of(layer)
        if not encoder.has_rising(blocks):
            raise ValueError(f"layer must be rising blocks in 0..{len(encoder) - 1} or a Removal, got {layer!r}")
    elif layer is None and not isinstance(reducer.keep, (int, float)):
        raise ValueError(f"layer must say which blocks merge where keep is a budget, got None and {reducer.keep!r}")
    if isinstance(layer, Removal):
        layer.wanted(len(encoder))
    reducer.check(encoder.model, blocks, "vision")
    return layer if isinstance(layer, Removal) else blocks or None


def unless_aside(hook: Callable[..., Any]) -> Callable[..., Any]:
    """A hook that does nothing while runs stand aside, as the attention functions in front of a model's do."""

    @wraps(hook)
    def heard(*args: Any) -> Any:
        # A compiler of graphs can't look; what it compiles is what the run makes of the model.
        return None if not torch.compiler.is_compiling() and stands_aside() else hook(*args)

    return heard


class VisionRun(Attachment):
    """One attachment of a reducer to a vision transformer.

    A run sees every forward of the model while it is attached. Afterwards ask it for `summary`, and for the `call`
    that the last forward left. Subclasses know how a library's models hand over pixels, attention and tokens.
    """

    _active: PerThread[Call | None] = PerThread(lambda: None)

    def __init__(
        self, encoder: Encoder, reducer: Reducer, schedule: Removal | tuple[int, ...] | None, *, unmerge: bool = False
    ) -> None:
        super().__init__(encoder.model)
        self.encoder = encoder
        self.reducer = reducer.on(next(encoder.model.parameters()).device)
        self.schedule = schedule
        self.unmerge = unmerge
        self.call: Call | None = None

    # Attaching --------------------------------------------------------------------------------------------------

    def _hook_second_half(self, index: int, block: Block) -> None:
        if block.second_norm is None or block.feed_forward is None:
            self._note(
                block.module.register_forward_hook(unless_aside(partial(self._merge_behind, index)), prepend=True)
            )
            return
        self._note(block.second_norm.register_forward_pre_hook(unless_aside(partial(self._before_second_norm, index))))
        if block.adds_residual:
            self._note(
                block.feed_forward.register_forward_pre_hook(unless_aside(partial(self._before_residual, index)))
            )
        else:
            self._note(block.feed_forward.register_forward_hook(unless_aside(partial(self._after_feed_forward, index))))
            # In front of whatever records the blocks' outputs.
            self._note(
                block.module.register_forward_hook(unless_aside(partial(self._after_block, index)), prepend=True)
            )

    # One forward ------------------------------------------------------------------------------------------------

    def _start(self, call: Call, hidden: Tensor) -> None:
        """What the first block's input tells: how many tokens there are, and how many each block shall leave."""
        depth, tokens = len(self.encoder), index(hidden.shape[1])  # a number to compilers too: see `Encoder.grid`
        call.grid = (index(call.grid[0]), index(call.grid[1]), index(call.grid[2]))
        call.tokens = tokens
        call.prefix = prefix_of(tokens, call.grid, type(self.encoder.model).__name__)
        call.levels, call.traces = [None] * (depth + 1), [None] * depth
        call.plans, call.widths, call.targets = [None] * depth, [tokens] * depth, [None] * depth
        lengths = [tokens]
        if call.valid is not None:
            valid = torch.nn.functional.pad(call.valid.to(hidden.device), (call.prefix, 0), value=True)
            call.levels[0] = padded_rows(valid)
            lengths = call.lengths = valid.sum(-1).tolist()
        if isinstance(self.schedule, tuple):
            for stage, block in enumerate(self.schedule):
                keep = self.reducer.keep
                if isinstance(keep, (int, float)):
                    share = keep ** (stage + 1)
                    # One patch at least, or a mean over patches would be one over nothing.
                    left = [call.prefix + max(1, int((n - call.prefix) * share + 1e-9)) for n in lengths]
                    call.targets[block] = self._toward(left, lengths, hidden.device)
                else:
                    call.targets[block] = self.reducer
            return
        before, counts = lengths, []
        for n in lengths:
            removal = self.schedule
            if removal is None:
                removal = removal_for(float(self.reducer.keep), n, call.prefix, depth)  # type: ignore[arg-type]
            counts.append(removal.counts(n, call.prefix, depth))
        for block, left in enumerate(map(list, zip(*counts, strict=True))):
            call.targets[block] = self._toward(left, before, hidden.device)
            before = left

    def _toward(self, left: list[int], before: list[int], device: torch.device) -> Reducer | None:
        """The method down to as many tokens as ``left`` says, for all images or for each; None if that is no fewer."""
        if left == before:
            return None
        if len(left) == 1:
            return replace(self.reducer, keep=Count(max(1, left[0])))
        return replace(self.reducer, keep=EachRow(torch.tensor([max(1, n) for n in left], device=device)))

    def _enter_block(self, call: Call, index: int, hidden: Tensor) -> Tensor:
        """What block ``index`` reads of ``hidden (B, N, D)``: less, if the method takes tokens out in front of it."""
        if not call.tokens:
            self._start(call, hidden)
        elif hidden.shape[1] != self._expected(call, index):
            raise UnsupportedModelError(
                f"{type(self.encoder.model).__name__} can't be merged in: {hidden.shape[1]} tokens enter block {index} "
                f"where the block before left {self._expected(call, index)}, so tokens join or leave between its blocks"
            )
        if self.reducer.before and call.targets[index] is not None:
            call.levels[index] = call.arriving.setdefault(index, call.levels[index])
            plan, hidden = self._decide(call, index, hidden)
            if plan is not None:
                call.levels[index] = self._after(call.levels[index], plan, hidden.dtype)
        call.levels[index + 1] = call.levels[index]
        call.widths[index] = hidden.shape[1]
        return hidden

    def _expected(self, call: Call, index: int) -> int:
        level = call.arriving.get(index, call.levels[index])
        return call.tokens if level is None else level.size.shape[1]

    def _merge_behind(self, index: int, module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        """Merge what a block gives, where its halves are not known."""
        call = self._current()
        call.plans[index] = None if not self.reducer.before else call.plans[index]
        if self.reducer.before or call.targets[index] is None:
            return None
        plan, merged = self._decide(call, index, tokens_of(output))
        if plan is None:
            return None
        call.levels[index + 1] = self._after(call.levels[index], plan, merged.dtype)
        call.widths[index] = plan.slots
        return with_tokens(output, merged)

    def _before_second_norm(self, index: int, module: nn.Module, args: tuple[Any, ...]) -> Any:
        call = self._current()
        call.plans[index] = None if not self.reducer.before else call.plans[index]
        if self.reducer.before or call.targets[index] is None:
            return None
        residual = args[0]
        # Where gradients flow, what the merge saves for them must not be overwritten below.
        source = residual.clone() if residual.requires_grad and torch.is_grad_enabled() else residual
        plan, merged = self._decide(call, index, source)
        if plan is None:
            return None
        call.levels[index + 1] = self._after(call.levels[index], plan, merged.dtype)
        call.widths[index] = plan.slots
        call.padded[index] = not _plain(residual)
        if call.padded[index]:
            residual[:, : plan.slots] = merged
        else:
            residual.data = merged
        return (merged,)

    def _after_feed_forward(self, index: int, module: nn.Module, args: tuple[Any, ...], output: Tensor) -> Any:
        short = self._short(index)
        if short is None or not self._current().padded[index]:
            return None
        return nn.functional.pad(output, (0, 0, 0, short.slot.shape[1] - short.slots))

    def _before_residual(self, index: int, module: nn.Module, args: tuple[Any, ...]) -> Any:
        short = self._short(index)
        return None if short is None else (args[0], args[1][:, : short.slots])

    def _after_block(self, index: int, module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        short = self._short(index)
        if short is None or not self._current().padded[index]:
            return None
        return with_tokens(output, tokens_of(output)[:, : short.slots])

    def _short(self, index: int) -> MergePlan | None:
        """The plan that was carried out inside block ``index``, None if there was none."""
        return None if self.reducer.before else self._current().plans[index]

    def _current(self) -> Call:
        if self._active is None:
            raise QuickmergeError("a block was called outside of its model's forward, which a run can't follow")
        return self._active

    # Deciding ---------------------------------------------------------------------------------------------------

    def _decide(self, call: Call, index: int, hidden: Tensor) -> tuple[MergePlan | None, Tensor]:
        reducer, level = call.targets[index], call.levels[index]
        assert reducer is not None
        trace = call.traces[index] if not reducer.before else None
        # What a call holds on to must not keep a graph alive that nobody will go back through.
        call.traces[index] = None
        known: dict[str, Any] = {} if level is None else {"size": level.size, "position": level.position}
        if level is None or level.valid is None:
            known["prefix"] = call.prefix
        else:
            index_of = torch.arange(hidden.shape[1], device=hidden.device)
            known |= {"valid": level.valid, "protected": (index_of < call.prefix) & level.valid}
        view = TokenView(
            hidden,
            grid=call.grid,
            evidence=Evidence(attention=() if trace is None else (trace,), layer=index, depth=len(self.encoder)),
            **known,
        )
        plan = reducer.plan(view)
        # Where there are as many slots as tokens, one image may keep all of them while others have fewer.
        if plan.slots == hidden.shape[1] and (plan.seat is not None or _keeps_all(plan, view)):
            return None, hidden
        call.plans[index] = plan
        return plan, reducer.combine(view, plan, hidden)

    def _after(self, level: Level | None, plan: MergePlan, dtype: torch.dtype) -> Level:
        return after(level, plan, proportional=self.reducer.proportional, dtype=dtype)

    # Afterwards -------------------------------------------------------------------------------------------------

    def summary(self) -> VisionStats:
        """Tokens in and left after each block of the last forward; prints as a line."""
        call = self.call
        if call is None:
            return VisionStats(repr(self.reducer))
        return VisionStats(repr(self.reducer), call.grid, call.tokens, call.prefix, [float(n) for n in call.widths])


def _keeps_all(plan: MergePlan, view: TokenView) -> bool:
    """True if no image of the batch loses a token."""
    return bool((plan.valid.sum(-1) == view.valid.sum(-1)).all())


def _plain(residual: Tensor) -> bool:
    """True if nobody but the block will ask what ``residual`` was: no gradient, and no compiler or exporter."""
    watched = torch.is_grad_enabled() and residual.requires_grad
    return type(residual) is Tensor and not watched and not torch.compiler.is_compiling()
