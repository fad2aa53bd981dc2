"""Trying a vision transformer on a few random patches, to see how it is built, or which trait of it can't be served.

Nothing is known by name. A small batch goes through what stands in front of the first block: which tokens change with
the pixels tells the patches from the tokens in front of them, and whether they are in raster order. Then a copy of the
block, in float64 on the CPU, reads these tokens in another order, with what it is told of places in that order too: it
must give the same in that order. Last, what it calls is watched, and its feed-forward part silenced once, which tells
where the residual stream can be merged.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from quickmerge.models.compat import attention_implementation, calls_attention, choose_attention
from quickmerge.models.decoder import AttentionFunction, watch_modules
from quickmerge.models.encoder_inputs import PACKED, Example, examples, named_arguments, packs
from quickmerge.models.encoder_places import FORMS, PLACES, Layout, at_places, has_tables

ROWS = 3
EQUAL = 1e-5
"""How far the outputs of a block in float64 may lie apart, beside what it adds to its input: attention may take its
softmax in float32."""


class TraitError(Exception):
    """A trait because of which a vision transformer can't be served; the text names it."""


class _ReachedError(Exception):
    """A forward has come to the block that was asked for."""


@dataclass(frozen=True)
class Entry:
    """What a block was called with, and the batch that this was made of."""

    example: Example
    args: tuple[Any, ...]
    kwargs: dict[str, Any]

    @property
    def hidden(self) -> Tensor:
        """The tokens, ``(B, N, D)``."""
        return self.args[0]  # type: ignore[no-any-return]


def first_argument(module: nn.Module) -> str:
    """The name of what a block reads first, its tokens."""
    return named_arguments(module)[0].name


SECOND_NORMS = ("layernorm_after", "norm2", "layer_norm2", "rms_norm2", "ffn_norm")
FEED_FORWARDS = ("mlp", "ffn", "feed_forward", "output")
"""What parts of a block are called, for models on the meta device, which are asked for their shapes and can't run."""


def _by_name(block: nn.Module) -> Layout:
    names = [name for name, _ in block.named_children()]
    norm = next((name for name in SECOND_NORMS if name in names), None)
    feed = next((name for name in FEED_FORWARDS if name in names), None)
    if norm is None or feed is None:
        raise TraitError("weights on the meta device, where blocks with parts of these names can't be tried")
    return Layout(0, norm=norm, feed=feed, adds_residual=feed == "output")


@torch.no_grad()
def probe(base: Any, blocks: Sequence[nn.Module]) -> tuple[Layout, ...]:
    """How each block of ``base`` is built; blocks of one kind are tried once.

    Raises:
        TraitError: naming what can't be served.
    """
    if any(weight.is_meta for weight in base.parameters()):
        return tuple(map(_by_name, blocks))
    found: dict[Any, Layout] = {}
    layouts: list[Layout] = []
    prefix: int | None = None
    for block in blocks:
        kind = _kind(block)
        if kind not in found:
            entry = enter(base, block)
            if prefix is None:
                prefix = prefix_by_pixels(entry)
            elif entry.hidden.shape[1] - prefix != _count(entry.example.grid):
                raise TraitError("tokens that join or leave between its blocks")
            found[kind] = _layout(block, entry, prefix)
        layouts.append(found[kind])
    return tuple(layouts)


def _count(grid: tuple[int, int, int]) -> int:
    return grid[0] * grid[1] * grid[2]


def _kind(block: nn.Module) -> Any:
    """What tells blocks apart that are built in different ways: classes and plain settings of all that is inside."""
    told = []
    for name, module in block.named_modules():
        own = {
            key: value for key, value in vars(module).items()
            if isinstance(value, (bool, int, str)) and not key.startswith("_") and key not in ("layer_idx", "training")
        }  # fmt: skip
        told.append((name, type(module), tuple(sorted(own.items(), key=lambda item: item[0]))))
    return tuple(told)


# In front of the block ----------------------------------------------------------------------------------------------


def enter(base: Any, block: nn.Module) -> Entry:
    """What ``block`` is called with when ``base`` reads a small batch.

    Of its images the second differs from the first in every pixel, and the third from the second in the patch that
    comes second in raster order.

    Raises:
        TraitError: if no batch that could be made reaches the block.
    """
    seen: list[tuple[tuple[Any, ...], dict[str, Any]]] = []
    name = first_argument(block)

    def stop(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        kwargs = dict(kwargs)
        seen.append((args if args else (kwargs.pop(name),), kwargs))
        raise _ReachedError

    failed: Exception | None = None
    handle = block.register_forward_pre_hook(stop, with_kwargs=True, prepend=True)
    try:
        with _as_evaluated(base), torch.random.fork_rng(devices=[]):
            for example in examples(base, ROWS):
                _third_differs_in_one_patch(example)
                try:
                    base(**example.inputs)
                except _ReachedError:
                    return Entry(example, *seen[-1])
                except Exception as error:
                    failed = failed or error
    finally:
        handle.remove()
    if failed is None:
        raise TraitError("no size of patches in its configuration, or a block that its forward does not reach")
    named = [p.name for p in named_arguments(base)]
    if packs(named):
        raise TraitError(f"{PACKED} (its forward takes {', '.join(name for name in named if packs([name]))})")
    raise TraitError(f"inputs that could not be made (it raised {type(failed).__name__}: {str(failed)[:120]!r})")


def _third_differs_in_one_patch(example: Example) -> None:
    pixels, (t, h, w) = example.pixels, example.grid
    pixels[2] = pixels[1]
    if pixels.ndim == 3:
        pixels[2, 1] = pixels[0, 1]
        return
    high, wide = pixels.shape[-2] // h, pixels.shape[-1] // w
    part = (..., slice(0, high), slice(wide, 2 * wide))
    if pixels.ndim == 5:
        deep = pixels.shape[1] // t
        pixels[2, :deep][part] = pixels[0, :deep][part]
    else:
        pixels[2][part] = pixels[0][part]


@contextmanager
def _as_evaluated(base: nn.Module) -> Iterator[None]:
    """Without dropout, each part as it was afterwards."""
    were = [module for module in base.modules() if module.training]
    try:
        for module in were:
            module.training = False
        yield
    finally:
        for module in were:
            module.training = True


def prefix_by_pixels(entry: Entry) -> int:
    """How many tokens stand in front of the patches: those that no pixel changes.

    Raises:
        TraitError: if the tokens are no plain sequence of all patches behind those.
    """
    hidden, grid = entry.hidden, entry.example.grid
    count = _count(grid)
    if not isinstance(hidden, Tensor) or hidden.ndim != 3:
        shape = tuple(hidden.shape) if isinstance(hidden, Tensor) else type(hidden).__name__
        raise TraitError(f"input of its blocks, which is no sequence of patches (B, N, D) (it is {shape})")
    if hidden.shape[0] == 1:
        raise TraitError(PACKED)
    if hidden.shape[0] != ROWS:
        raise TraitError("frames, tiles or windows that are read apart from one another")
    changed = (hidden[0] != hidden[1]).any(-1)
    if int(changed.sum()) != count:
        raise TraitError(
            f"{int(changed.sum())} tokens for {count} patches in front of its first block (patches are masked, joined "
            "or pooled there)"
        )
    prefix = hidden.shape[1] - count
    if not bool(changed[prefix:].all()):
        raise TraitError("tokens behind its patches")
    apart = (hidden[1] - hidden[2]).abs().float().sum(-1)
    if bool(apart.any()) and int(apart.argmax()) != prefix + 1:
        raise TraitError("patches that are not in raster order")
    return prefix


# The block ----------------------------------------------------------------------------------------------------------


@dataclass
class _Look:
    """Sees the attention of a block, and hands on a bias over all tokens as one over tokens in another order."""

    position: Tensor | None = None
    calls: int = 0
    biased: bool = False
    tokens: int = 0

    def attend(self, layer: int, call: AttentionFunction, module: nn.Module, args: tuple[Any, ...], kwargs: Any) -> Any:
        self.calls += 1
        query, key, value = args[:3]
        mask = args[3] if len(args) > 3 else kwargs.pop("attention_mask", None)
        if key.shape[2] != self.tokens or query.shape[2] != self.tokens:
            raise TraitError("attention over other tokens than those of the sequence (windows or pooled keys)")
        if mask is not None:
            self.biased = True
            if self.position is not None:
                mask = mask.expand(query.shape[0], -1, -1, -1)
                rows = self.position[:, None, :, None]
                if mask.shape[2] == self.tokens:
                    mask = mask.gather(2, rows.expand(-1, mask.shape[1], -1, mask.shape[3]))
                columns = self.position[:, None, None].expand(-1, mask.shape[1], mask.shape[2], -1)
                mask = mask.gather(3, columns)
        return call(module, query, key, value, mask, *args[4:], **kwargs)


@dataclass
class _Copy:
    """A block in float64 on the CPU with what it was called with."""

    block: nn.Module
    rest: tuple[Any, ...]
    kwargs: dict[str, Any]
    look: _Look = field(default_factory=_Look)

    def __call__(self, hidden: Tensor, rest: tuple[Any, ...] | None = None, kwargs: Any = None) -> Tensor:
        rest, kwargs = (self.rest, self.kwargs) if rest is None else (rest, kwargs)
        return first(self.block(hidden, *rest, **kwargs))  # type: ignore[no-any-return]


def first(output: Any) -> Any:
    """The tokens in what a block gives, which may be a tuple that begins with them."""
    return output[0] if isinstance(output, (tuple, list)) else output


def _layout(block: nn.Module, entry: Entry, prefix: int) -> Layout:
    attentions = [name for name, module in block.named_modules() if calls_attention(module)]
    if len(attentions) != 1:
        raise TraitError(f"blocks with {len(attentions)} attention modules (one is served)")
    hidden = _precise(entry.hidden)
    precise = _precise_copy(block)
    made = _Copy(precise, tuple(map(_precise, entry.args[1:])), {k: _precise(v) for k, v in entry.kwargs.items()})
    made.look.tokens = hidden.shape[1]
    attention = precise.get_submodule(attentions[0])
    undo = watch_modules(_Alone(precise, attention), [attention], made.look)
    try:
        plain = made(hidden)
        if made.look.calls != 1:
            raise TraitError(f"attention that is computed {made.look.calls} times in a block (once is served)")
        if not isinstance(plain, Tensor) or plain.shape != hidden.shape:
            raise TraitError("blocks that give other tokens than they are given")
        form, told, tables = _form(made, hidden, plain, prefix)
        norm, feed, adds = _halves(made, attentions[0], hidden)
    finally:
        undo()
    traits = [
        *(["rotary tables"] if tables else []),
        *([f"places told as {told}"] if told is not None else []),
        *(["bias on the scores"] if made.look.biased else []),
        *(["merges behind blocks"] if norm is None else []),
    ]
    return Layout(prefix, form, told, norm, feed, adds, tuple(traits))


class _Alone:
    """What stands for a model of which only one block is there."""

    def __init__(self, block: nn.Module, attention: Any) -> None:
        self.configs = {id(m.config): m.config for m in block.modules() if hasattr(m, "config")}
        self.config = attention.config

    def set_attn_implementation(self, name: str) -> None:
        for config in self.configs.values():
            choose_attention(config, name)


def _precise_copy(block: nn.Module) -> nn.Module:
    """A copy in float64 on the CPU, that calculates nothing for a backward pass."""
    made = copy.deepcopy(block).cpu().double().eval().requires_grad_(False)  # leaves complex numbers alone
    implementation = {attention_implementation(m.config) for m in made.modules() if hasattr(m, "config")}
    assert implementation, "attention that is asked of a registry has a configuration"
    return made


def _precise(value: Any) -> Any:
    if isinstance(value, (tuple, list)):
        return type(value)([_precise(each) for each in value]) if type(value) in (tuple, list) else value
    if not isinstance(value, Tensor):
        return value
    value = value.detach().to("cpu")
    if value.is_complex():
        return value.to(torch.complex128)
    return value.to(torch.float64) if value.is_floating_point() else value


def _form(made: _Copy, hidden: Tensor, plain: Tensor, prefix: int) -> tuple[int, str | None, bool]:
    """In which form the block takes tables, and by which argument places: those with which order does not matter."""
    tokens = hidden.shape[1]
    generator = torch.Generator().manual_seed(1)
    order = torch.stack([torch.randperm(tokens - prefix, generator=generator) for _ in range(len(hidden))]) + prefix
    order = torch.cat([torch.arange(prefix).expand(len(hidden), -1), order], 1)
    rows = torch.arange(len(hidden))[:, None]
    mixed, wanted = hidden[rows, order], plain[rows, order]
    scale = (plain - hidden).abs().max()
    names = [p.name for p in named_arguments(made.block)]
    told: list[str | None] = [None, *(name for name in PLACES if name in names and not prefix)]
    made.look.position = order
    try:
        for argument in told:
            for form in range(len(FORMS)):
                rest, kwargs = at_places(
                    made.rest, made.kwargs, order, tokens=tokens, prefix=prefix, form=form,
                    told=where_told(made.block, argument, len(made.rest)),
                )  # fmt: skip
                try:
                    got = made(mixed, rest, kwargs)
                except Exception:  # tables that can't be broadcast in this form
                    continue
                if got.shape == wanted.shape and bool((got - wanted).abs().max() <= EQUAL * scale):
                    return form, argument, has_tables((*made.rest, *made.kwargs.values()), tokens, prefix)
    finally:
        made.look.position = None
    raise TraitError("blocks that go by the order of their tokens, or read their places in a table for a whole batch")


def where_told(block: nn.Module, argument: str | None, given: int) -> int | str | None:
    """Where a block is given ``argument`` when ``given`` positional arguments follow its tokens; see `at_places`."""
    if argument is None:
        return None
    index = [p.name for p in named_arguments(block)].index(argument) - 1
    return index if index < given else argument


# Its halves ---------------------------------------------------------------------------------------------------------


@dataclass
class _Called:
    """One call of a module inside a block."""

    name: str
    args: tuple[Any, ...]
    output: Any


def _halves(made: _Copy, attention: str, hidden: Tensor) -> tuple[str | None, str | None, bool]:
    """The names of what norms the residual stream behind attention and of the feed-forward part, and whether that one
    adds the residual itself; Nones where the block does not compute ``y = x + ..`` and then ``y + feed(norm(y))``."""
    calls: list[_Called] = []
    handles = []
    for name, module in made.block.named_modules():
        if not name:
            continue

        def note(module: nn.Module, args: Any, kwargs: Any, output: Any, name: str = name) -> None:
            calls.append(_Called(name, (*args, *kwargs.values()), output))

        handles.append(module.register_forward_hook(note, with_kwargs=True))
    try:
        output = made(hidden)
    finally:
        for handle in handles:
            handle.remove()
    ends = [i for i, call in enumerate(calls) if call.name == attention]
    behind = [call for call in calls[ends[0] + 1 :] if not _inside(attention, call.name)]
    for norm in sorted(behind, key=lambda call: call.name.count(".")):
        stream = norm.args[0] if norm.args else None
        if not isinstance(stream, Tensor) or stream.shape != hidden.shape or norm.output is stream:
            continue
        readers = [call for call in behind if call.args and call.args[0] is norm.output]
        for reader in sorted(readers, key=lambda call: call.name.count(".")):
            adding = [c for c in behind if len(c.args) > 1 and c.args[1] is stream and c.output is output]
            if adding:
                return norm.name, adding[0].name, True
            if _is_residual(made, hidden, norm.name, reader.name):
                return norm.name, reader.name, False
    return None, None, False


def _inside(name: str, outer: str) -> bool:
    return name == outer or name.startswith(outer + ".")


def _is_residual(made: _Copy, hidden: Tensor, norm: str, feed: str) -> bool:
    """Whether the block gives what enters ``norm`` when ``feed`` gives nothing, and gives something else otherwise."""
    streams: list[Tensor] = []
    handles = [
        made.block.get_submodule(norm).register_forward_pre_hook(lambda module, args: streams.append(args[0].clone())),
        made.block.get_submodule(feed).register_forward_hook(lambda module, args, output: torch.zeros_like(output)),
    ]
    try:
        silenced = made(hidden)
    except Exception:  # what is no tensor can't be silenced
        return False
    finally:
        for handle in handles:
            handle.remove()
    return torch.equal(silenced, streams[0]) and not torch.equal(silenced, hidden)
