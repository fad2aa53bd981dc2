"""What a recipe does to a model, told beforehand from shapes: tokens, FLOPs, bytes, and from what length it pays."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from quickmerge.errors import QuickmergeError, whole_number
from quickmerge.merge.bench.cost import Shape, break_even, model_shape, plan_cost
from quickmerge.merge.bench.vision_cost import vision_shape
from quickmerge.merge.cache.evictor import Evictor, layer_counts
from quickmerge.merge.place import Merge
from quickmerge.merge.run import layer_runs
from quickmerge.merge.text.modes import MIN_TOKENS, BlockCausal, Prefix
from quickmerge.merge.tokens.budget import Budget, Count, Ratio, Schedule, as_budget
from quickmerge.merge.tokens.removal import Removal, removal_for
from quickmerge.merge.vision.run import schedule_for
from quickmerge.models.encoder import Encoder, find_encoder, holds_encoder, holds_timm
from quickmerge.models.vlm import check_kind, holds_vlm, unwrapped
from quickmerge.multipole.cost import clusters_of, least, pays_from, rows_read
from quickmerge.multipole.settings import Multipole
from quickmerge.recipe.ingredients import Ingredients
from quickmerge.recipe.measured import Measured, PaysFrom
from quickmerge.recipe.parts import check_places
from quickmerge.recipe.speculation import Speculation
from quickmerge.speculative.gumiho import Gumiho

__all__ = ["Effect", "Told", "tell"]


@dataclass(frozen=True)
class Effect:
    """What one ingredient does.

    Attributes:
        name: the argument of the recipe.
        label: its settings in short.
        lossless: whether the model writes what it would have written without it.
        pays_from: the fewest tokens of a prompt at which it does less work than it saves; None if at no length, or if
            that depends on the text.
        lines: what else there is to say, a sentence or a number each.
    """

    name: str
    label: str
    lossless: bool
    pays_from: int | None
    lines: tuple[str, ...]


@dataclass(frozen=True)
class Told:
    """What a recipe does to a model; prints as a few lines.

    Numbers are of one prompt in a language model, and of one image in a vision transformer. They are None where they
    depend on what is read. FLOPs are those of reading the prompt, of reducers too, and without the head.

    Attributes:
        model: its class.
        tokens: that are given, to the first block.
        effects: of each ingredient, in the order in which the model meets them.
        tokens_per_layer: what each block reads.
        flops: of the prompt.
        flops_full: of the model alone.
        cache_bytes: keys and values of the prompt; None in a vision transformer.
        cache_bytes_full: of the model alone.
        calibration: what was measured of the recipe, where it was calibrated.
        break_even: from which length merging pays, where that was measured.
        min_tokens: of prompts that are merged, fewer of which are read in full; None where no prompt is.
    """

    model: str
    tokens: int
    effects: tuple[Effect, ...]
    tokens_per_layer: tuple[float, ...] | None
    flops: float | None
    flops_full: float
    cache_bytes: float | None
    cache_bytes_full: float | None
    calibration: Measured | None = None
    break_even: PaysFrom | None = None
    min_tokens: int | None = None

    @property
    def lossless(self) -> bool:
        """Whether the model writes what it would have written alone."""
        return all(effect.lossless for effect in self.effects)

    def as_dict(self) -> dict[str, Any]:
        """Everything, for JSON."""
        out: dict[str, Any] = {**self.__dict__, "lossless": self.lossless}
        out["effects"] = [{**effect.__dict__, "lines": list(effect.lines)} for effect in self.effects]
        for name in ("calibration", "break_even"):
            out[name] = None if (record := getattr(self, name)) is None else record.as_dict()
        out["tokens_per_layer"] = None if self.tokens_per_layer is None else list(self.tokens_per_layer)
        return out

    def __str__(self) -> str:
        lines = [f"{self.model}, {self.tokens} tokens: {'lossless' if self.lossless else 'lossy'}"]
        if not self.effects:
            lines.append("nothing is done to the model")
        for effect in self.effects:
            lines.append(f"{effect.name}: {effect.label} ({'lossless' if effect.lossless else 'lossy'})")
            lines += [f"  {line}" for line in effect.lines]
        if self.calibration is not None:
            lines.append(str(self.calibration))
        if self.break_even is not None:
            lines.append(str(self.break_even))
        elif self.min_tokens:
            usual = ", the default" if self.min_tokens == MIN_TOKENS else ""
            lines.append(f"break-even: not measured; shorter prompts than {self.min_tokens} tokens{usual}, are read in "
                         "full (calibrate --speed measures)")  # fmt: skip
        if self.tokens_per_layer is None or self.flops is None:
            lines.append("tokens, FLOPs and cache depend on what is read")
            return "\n".join(lines)
        runs = layer_runs(self.tokens_per_layer)
        lines.append("read: " + ", ".join(
            f"{n:g} in layers {a}-{b}" if a != b else f"{n:g} in layer {a}" for a, b, n in runs
        ))  # fmt: skip
        share = 100 * self.flops / self.flops_full
        lines.append(f"FLOPs: {self.flops:.3g} of {self.flops_full:.3g} ({share:.1f} %)")
        if self.cache_bytes is not None and self.cache_bytes_full is not None:
            held, full = self.cache_bytes / 2**20, self.cache_bytes_full / 2**20
            lines.append(f"cache: {held:.1f} MiB of {full:.1f} MiB")
        return "\n".join(lines)


def tell(recipe: Ingredients, model: Any, tokens: int, visual: int | None = None) -> Told:
    """See `quickmerge.Recipe.told`."""
    model = unwrapped(model)
    check_kind(model)
    check_places(model, recipe.merges)
    if holds_timm(model) or (holds_encoder(model) and not holds_vlm(model)):
        return _tell_vision(recipe, model)
    tokens = whole_number("tokens", tokens)
    if visual is not None and whole_number("visual", visual, 0) > tokens:
        raise QuickmergeError(f"visual must be at most the {tokens} tokens of the prompt, got {visual}")
    return _Prompt(recipe, model, tokens, visual).told()


_LITERALS = "literals stay alone, on top of what is kept: numbers, identifiers, paths, addresses, quoted text"


class _Prompt:
    """A prompt in a language model: what each block reads of it, while ingredient after ingredient is told."""

    def __init__(self, recipe: Ingredients, model: Any, tokens: int, visual: int | None) -> None:
        self.recipe, self.model, self.tokens, self.visual = recipe, model, tokens, visual
        self.shape: Shape = model_shape(model)
        self.layers: list[float] | None = [float(tokens)] * len(self.shape.weights)
        self.held: list[float] | None = None  # by block, where caches hold other numbers than are read
        self.own = 0.0

    def told(self) -> Told:
        effects = []
        merges, shape = self.recipe.merges, self.shape
        full = [float(self.tokens)] * len(shape.weights)
        if "tower" in merges:
            effects.append(self._tower(merges["tower"]))
        if "visual" in merges:
            effects.append(self._visual(merges["visual"]))
        if "merge" in merges:
            effects.append(self._text(merges["merge"]))
        if self.recipe.evictor is not None:
            effects.append(self._cache(self.recipe.evictor))
        if isinstance(self.recipe.attention, Multipole):
            effects.append(self._attention(self.recipe.attention))
        if self.recipe.speculation is not None:
            effects.append(_drafts(self.recipe.speculation))
        held = self.held or self.layers
        return Told(
            type(self.model).__name__, self.tokens, tuple(effects), None if self.layers is None else tuple(self.layers),
            None if self.layers is None else self.shape.prefill_flops(self.layers) + self.own,
            shape.prefill_flops(full), None if held is None else shape.cache_bytes(held), shape.cache_bytes(full),
            min_tokens=self._least(),
        )  # fmt: skip

    def _least(self) -> int | None:
        """Tokens of a prompt, fewer of which are read in full; None where nothing of it is merged."""
        merge = self.recipe.merges.get("merge")
        mode = None if merge is None else merge.mode or Prefix()
        return mode.min_tokens if isinstance(mode, Prefix) else None

    def _tower(self, merge: Merge) -> Effect:
        lines = ["patches are merged inside the vision tower"]
        if not merge.unmerge:
            self.layers = None
            lines.append("how many slots the language model reads of them depends on the images and the tower")
        return Effect("tower", merge.label, _keeps_all(as_budget(merge.reducer.keep)), None, tuple(lines))

    def _visual(self, merge: Merge) -> Effect:
        kept = as_budget(merge.reducer.keep)
        first = (merge.layer,) if isinstance(merge.layer, int) else merge.layer or (0,)
        assert isinstance(first, tuple)
        if first[-1] >= len(self.shape.weights):
            raise QuickmergeError(f"layer must lie in 0..{len(self.shape.weights) - 1}, got {first[-1]}")
        lines = ["text, template and question are never reduced"]
        if self.visual is None or not isinstance(kept, (Ratio, Count)):
            self.layers = None
            lines.append("how many visual tokens there are depends on the images: give visual=")
        elif self.layers is not None:
            for i, block in enumerate(first):
                left = _left(merge.reducer.keep, self.visual, i + 1)
                self.layers[block:] = [self.tokens - self.visual + left] * (len(self.layers) - block)
                lines.append(f"{left:g} of {self.visual} visual tokens are left from block {block} on")
        return Effect("visual", merge.label, _keeps_all(kept), None, tuple(lines))

    def _text(self, merge: Merge) -> Effect:
        if isinstance(merge.mode, BlockCausal):
            return self._chunks(merge, merge.mode)
        mode, shape, reducer = merge.mode or Prefix(), self.shape, merge.reducer
        schedule = merge.layer if isinstance(merge.layer, Schedule) else Schedule.of(_blocks(merge), len(shape.weights))
        schedule.check(len(shape.weights))
        protected = mode.sinks + mode.recent
        kept = as_budget(reducer.keep)
        lossless = _keeps_all(kept)
        lines = [_LITERALS] if mode.keeps_literals and not lossless else []
        lines += [f"prompts of fewer than {mode.min_tokens} tokens are read in full"] if mode.min_tokens else []
        if not isinstance(kept, (Ratio, Count)) or (mode.keeps_literals and not lossless):
            self.layers = None
            lines.append("how many tokens are kept depends on the text")
            return Effect("merge", merge.label, lossless, None, tuple(lines))
        even = break_even(shape, reducer, schedule, protected)
        pays = None if even is None else max(even, mode.min_tokens)
        if self.layers is not None:
            entering = round(self.layers[schedule.layers[0]])
            if entering < mode.min_tokens or entering <= protected:
                lines.append(f"{entering} tokens are read in full")
            else:
                cost = plan_cost(shape, reducer, schedule, entering, protected)
                self.own += shape.reducer_flops(reducer, cost.tokens_per_layer, entering)
                self.layers = [min(*pair) for pair in zip(self.layers, cost.tokens_per_layer, strict=True)]
        lines.append("never pays" if pays is None else f"pays from prompts of {pays} tokens on")
        return Effect("merge", merge.label, lossless, pays, tuple(lines))

    def _chunks(self, merge: Merge, mode: BlockCausal) -> Effect:
        """Every finished chunk is merged once it has left the window; blocks read all tokens."""
        kept, depth = as_budget(merge.reducer.keep), len(self.shape.weights)
        first = merge.layer if isinstance(merge.layer, int) else 0
        if first >= depth:
            raise QuickmergeError(f"layer must be one block in 0..{depth - 1} in block_causal mode, got {first}")
        least = mode.window + mode.chunk
        lines = [f"chunks of {mode.chunk} tokens are merged behind a window of {mode.window}, from block {first} on"]
        literals = mode.protect is not None and not _keeps_all(kept)
        lines += [_LITERALS] * literals
        if isinstance(kept, (Ratio, Count)) and self.layers is not None and not literals:
            self.held = [float(self.tokens)] * first + [
                _chunked(self.tokens, kept, mode) for _ in range(depth - first)
            ]  # fmt: skip
            lines.append(f"caches of these blocks hold about {self.held[-1]:g} of {self.tokens} tokens")
        elif self.layers is not None:
            self.layers = None
            lines.append("how many tokens are kept depends on the text")
        lines.append("every token of the prompt is read; what pays is the cache, and each new token's attention")
        return Effect("merge", merge.label, _keeps_all(kept), least, tuple(lines))

    def _cache(self, evictor: Evictor) -> Effect:
        """Entries leave when the prompt has been read; blocks read what they would read anyway."""
        shape = self.shape
        lines = ["the prompt is read with all entries; they leave when it has been, and their memory with them"]
        if evictor.min_tokens:
            lines.append(f"caches of prompts of fewer than {evictor.min_tokens} tokens are left alone")
        least = max(1, evictor.min_tokens)
        if evictor.protect is not None and evictor.keep < 1:
            self.layers = None
            lines.append(_LITERALS.replace("stay alone", "stay"))
        if self.layers is None or self.tokens < least:
            return Effect("cache", evictor.label, evictor.keep == 1, least, tuple(lines))

        def there(tokens: float, window: int | None) -> int:
            return round(tokens if window is None else min(tokens, window - 1))

        held = [there(n, window) for n, window in zip(self.layers, shape.windows, strict=True)]
        full = [there(self.tokens, window) for window in shape.windows]
        counts = layer_counts(evictor.keep, held, full)
        self.held = [float(n) for n in counts]
        self.own += evictor.flops(shape, self.layers)
        share = 100 * sum(counts) / sum(full)
        lines.append(f"{sum(counts)} of {sum(full)} entries of each key head are left ({share:.0f} %)")
        return Effect("cache", evictor.label, evictor.keep == 1, least, tuple(lines))

    def _attention(self, settings: Multipole) -> Effect:
        shape = self.shape
        full = [i for i, window in enumerate(shape.windows) if window is None and i >= settings.first]
        if not full:
            raise QuickmergeError(
                f"attention needs blocks with full attention from first={settings.first} on, and "
                f"{type(self.model).__name__} has none there"
            )
        pays = pays_from(settings, shape.key_heads, shape.head_dim, shape.bytes_per_value)
        lines = [f"the prompt is read by the model's own attention; {len(full)} of {len(shape.windows)} blocks then "
                 "read clusters"]  # fmt: skip
        held = self.held or self.layers
        if held is not None:
            dense = sum(held[i] for i in full) / len(full)
            rows = sum(min(held[i], rows_read(settings, held[i])) for i in full) / len(full)
            lines.append(f"a new token reads about {rows:.0f} of {dense:.0f} keys for each key-value head "
                         f"({100 * rows / dense:.0f} %)")  # fmt: skip
            each = 2 * shape.key_heads * shape.head_dim * shape.bytes_per_value
            extra = sum(clusters_of(settings, held[i]) for i in full) * each
            lines.append(f"clusters take about {extra / 2**20:.1f} MiB beside the cache")
        if settings.min_tokens:
            lines.append(f"rows of fewer than {settings.min_tokens} tokens are read in full")
        fewer = least(lambda n: rows_read(settings, n) < n)
        if fewer is not None:
            lines.append(f"reads less from {fewer} tokens in the cache on")
        lines.append("never pays" if pays is None else f"pays from {pays} tokens in the cache on, as one core reads")
        return Effect("attention", settings.label, False, pays, tuple(lines))


def _drafts(settings: Speculation) -> Effect:
    drafter = settings.drafter
    lossless = not (isinstance(drafter, Gumiho) and drafter.fta == "reference")
    size = f"at most {settings.nodes} nodes, as many as pay" if settings.tree == "auto" else f"{settings.tree} nodes"
    lines = [f"a pass of the model reads a tree of {size}, and every text is decoded by what it accepts of it"]
    if isinstance(drafter, Gumiho):
        held = sum(p.numel() * p.element_size() for p in drafter.network.parameters())
        lines.append(f"heads of {held / 2**20:.1f} MiB draft up to {drafter.config.depth} tokens")
    if lossless:
        lines.append("writes what the model, with all else of this recipe, writes without it")
        lines.append("pays at any length as far as drafts are accepted; a draft that is not costs time alone")
    return Effect("decoding", type(drafter).__name__, lossless, 1, tuple(lines))


# Vision transformers ------------------------------------------------------------------------------------------------


def _tell_vision(recipe: Ingredients, model: Any) -> Told:
    name = type(model).__name__
    for other in ("cache", "attention", "decoding"):
        if getattr(recipe, other) is not None:
            raise QuickmergeError(f"{other} must be left out for {name}, a vision transformer, which writes no text")
    merge = recipe.merges.get("tower")
    if not holds_encoder(model):
        raise QuickmergeError(f"{name} is a model of timm, whose FLOPs are counted by quickmerge bench image alone")
    encoder = find_encoder(model)
    shape = vision_shape(encoder)
    tokens, prefix = _image_tokens(encoder)
    depth = len(encoder)
    full = [float(tokens)] * depth
    whole = shape.macs(full, full)
    if merge is None:
        return Told(name, tokens, (), tuple(full), whole, whole, None, None)
    assert not isinstance(merge.layer, Schedule)  # a recipe has seen to that
    schedule = schedule_for(encoder, merge.reducer, merge.layer)
    kept = as_budget(merge.reducer.keep)
    left: list[float] | None = None
    if schedule is None:
        assert isinstance(merge.reducer.keep, (int, float))
        schedule = removal_for(float(merge.reducer.keep), tokens, prefix, depth)
    if isinstance(schedule, Removal):
        left = [float(n) for n in schedule.counts(tokens, prefix, depth)]
    elif isinstance(kept, (Ratio, Count)):
        left = list(full)
        for i, block in enumerate(schedule):
            kept_here = _patches_left(merge.reducer.keep, left[block], tokens, prefix, i + 1)
            left[block:] = [kept_here] * (depth - block)
    lossless = left is not None and min(left) >= tokens
    effect = Effect("tower", merge.label, lossless, None, (f"class and register tokens stay alone: {prefix}",))
    flops = None
    if left is not None:
        entering = left if merge.reducer.before else [float(tokens), *left[:-1]]
        flops = shape.macs(entering, left)
    return Told(name, tokens, (effect,), None if left is None else tuple(left), flops, whole, None, None)


@torch.no_grad()
def _image_tokens(encoder: Encoder) -> tuple[int, int]:
    """How many tokens an image of the model's own size has, and how many of them stand in front of the patches."""
    config, like = encoder.config, next(encoder.base.parameters())
    size = config.image_size if isinstance(config.image_size, int) else max(config.image_size)
    channels = getattr(config, "num_channels", 3)
    frames = getattr(config, "num_frames", None)
    sides = (channels, size, size) if frames is None else (frames, channels, size, size)
    pixels = torch.zeros(1, *sides, device=like.device, dtype=like.dtype)
    embeddings: Any = encoder.base.embeddings
    found = embeddings(pixels)
    tokens = int((found[0] if isinstance(found, tuple) else found).shape[1])
    return tokens, tokens - math.prod(encoder.grid(pixels))


# Numbers ------------------------------------------------------------------------------------------------------------


def _blocks(merge: Merge) -> int | Sequence[int] | None:
    if merge.layer is None or isinstance(merge.layer, int):
        return merge.layer
    assert isinstance(merge.layer, tuple)
    return merge.layer


def _keeps_all(budget: Budget) -> bool:
    return isinstance(budget, Ratio) and budget.keep == 1


def _left(keep: Any, tokens: int, stage: int = 1) -> float:
    """How many of ``tokens`` are left by the merge number ``stage``: a bare number is a share of what was left before.

    Args:
        keep: a number, a `Ratio` or a `Count`.
        tokens: that there were at first.
        stage: from 1 on.
    """
    if isinstance(keep, Count):
        return float(min(keep.tokens, tokens))
    share = keep.keep if isinstance(keep, Ratio) else keep**stage
    return float(max(1, math.floor(tokens * share + 0.5 + 1e-9))) if tokens else 0.0


def _patches_left(keep: Any, before: float, tokens: int, prefix: int, stage: int) -> float:
    """The same of an image's tokens: a bare number is a share of its patches, a `Ratio` of what is left by now."""
    if isinstance(keep, (Count, Ratio)):
        return max(_left(keep, round(before)), float(prefix), 1.0)
    return float(prefix + max(1, int((tokens - prefix) * keep**stage + 1e-9)))


def _chunked(tokens: int, budget: Ratio | Count, mode: BlockCausal) -> float:
    """What a cache in block-causal mode holds of a prompt."""
    chunks = max(0, tokens - mode.window) // mode.chunk
    each = _left(budget, mode.chunk)
    return min(float(tokens), chunks * each + (tokens - chunks * mode.chunk))
