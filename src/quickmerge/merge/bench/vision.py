"""The benchmark of vision transformers: quality and cost of every method on the same images, at equal FLOPs."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from statistics import median
from typing import TYPE_CHECKING, Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor

from quickmerge.bench.harness import Arm, Result, interleave, seconds_of
from quickmerge.bench.report import Report, Section
from quickmerge.bench.stats import mean_interval, spread
from quickmerge.bench.table import Column, Table, half_width, interval, number, text
from quickmerge.errors import QuickmergeError
from quickmerge.merge.attach import reduce
from quickmerge.merge.bench.vision_cost import LinearProbe, once_at, removal_at, vision_shape
from quickmerge.merge.reducers.base import Reducer
from quickmerge.merge.tokens.budget import Count
from quickmerge.merge.tokens.removal import Removal
from quickmerge.merge.vision.run import Level, full_length
from quickmerge.merge.vision.vit import VisionRun
from quickmerge.models.encoder import Encoder, find_encoder

if TYPE_CHECKING:
    pass

Row = dict[str, Any]


# Settings of the arms: ``keep``, the share of the FLOPs that was asked for, None for a method that comes as it was
# trained; ``resize``, pixels of both sides that images are brought to first; ``model``, the one that is run where a
# method was trained with its own.

FULL = Arm("full", settings={"keep": 1.0})


def images_of(arm: Arm, x: Tensor) -> Tensor:
    """The images ``(B, C, H, W)`` as an arm sees them."""
    side = arm.settings.get("resize")
    if side is None:
        return x
    return F.interpolate(x, size=(side, side), mode="bicubic", antialias=True, align_corners=False)


def run_arm(arm: Arm, model: Any, images: Tensor) -> Any:
    """The model's output for what `images_of` gave; positions are stretched where the model has to be told."""
    model = arm.settings.get("model") or model
    if "resize" in arm.settings and "interpolate_pos_encoding" in inspect.signature(model.forward).parameters:
        return model(images, interpolate_pos_encoding=True)
    return model(images)


@dataclass
class Seen:
    """What a forward gave for each image: pooled ``(B, D')``, patches ``(B, N, D)``, logits ``(B, C)`` or None."""

    pooled: Tensor
    patches: Tensor
    logits: Tensor | None
    entering: list[float]
    leaving: list[float]


def arms(
    model: Any,
    reducers: Sequence[Reducer],
    ratios: Sequence[float],
    pixels: Tensor,
    *,
    smaller: bool = True,
    trained: Sequence[tuple[Reducer, Any]] = (),
) -> list[Arm]:
    """Every method at every share of the FLOPs, as nearly as whole tokens allow.

    A method that takes tokens out in every block gets the constant `Removal` of that cost. One that reduces once
    (`Reducer.once`) does so a quarter of the way up, or further down where that can't save enough.

    Args:
        model: a supported vision transformer.
        reducers: one of each method; ``keep`` is replaced.
        ratios: shares of the FLOPs of the unmodified model.
        pixels: images ``(B, C, H, W)`` of the size to be measured.
        trained: methods that were trained for their blocks and their share, each with the model that it runs in (None:
            this one); they come as they are, once.
        smaller: also the unmodified model on smaller images, which is what saving tokens is free without any method.

    Raises:
        ValueError: for a share that can't be reached.
    """
    encoder = find_encoder(model)
    shape = vision_shape(encoder)
    with torch.no_grad(), _watch(encoder) as seen:
        model(pixels[:1])
    tokens = seen["hidden"].shape[1]
    prefix = tokens - math.prod(encoder.grid(pixels))
    found: list[Arm] = []
    for ratio in ratios:
        for reducer in reducers:
            layer: int | Removal
            if reducer.once:
                block, kept = once_at(shape, ratio, tokens)
                method, layer = replace(reducer, keep=Count(kept)), block
            else:
                method, layer = reducer, removal_at(shape, ratio, tokens, prefix)
            attach, made = _attach(model, method, layer), {"tower": (method, layer)}
            found.append(Arm(reducer.label, attach, {"keep": ratio}, made))
        if smaller and pixels.ndim == 4:
            side = _smaller(shape, encoder, ratio, pixels, prefix)
            found.append(Arm("smaller images", settings={"keep": ratio, "resize": side}))
    for reducer, own in trained:
        found.append(Arm(reducer.label, _attach(own or model, reducer, None), {"model": own}, {"tower": reducer}))
    return found


def _attach(model: Any, reducer: Reducer, layer: Any) -> Callable[[], VisionRun]:
    return lambda: cast("VisionRun", reduce(model, reducer, layer))


def _smaller(shape: Any, encoder: Encoder, ratio: float, pixels: Tensor, prefix: int) -> int:
    """Pixels of the sides at which the unmodified model costs the share ``ratio``, a whole number of patches."""
    patch = pixels.shape[-1] // encoder.grid(pixels)[2]
    full = [math.prod(encoder.grid(pixels)) + prefix] * len(encoder)

    def cost(side: int) -> float:
        tokens = [side * side + prefix] * len(encoder)
        return float(shape.macs(tokens, tokens) / shape.macs(full, full))

    sides = range(1, pixels.shape[-1] // patch + 1)
    return min(sides, key=lambda side: abs(cost(side) - ratio)) * patch


@contextmanager
def _watch(encoder: Encoder) -> Iterator[dict[str, Any]]:
    """What the encoder gives before a run makes it longer again."""
    seen: dict[str, Any] = {}

    def note(module: Any, args: Any, output: Any) -> None:
        seen["hidden"] = output.last_hidden_state

    handle = encoder.base.register_forward_hook(note, prepend=True)
    try:
        yield seen
    finally:
        handle.remove()


def look(model: Any, x: Tensor, arm: Arm | None = None, grid: tuple[int, int] | None = None) -> Seen:
    """Run the model on images ``(B, C, H, W)`` and see what comes out, by arm.

    Args:
        model: a supported vision transformer.
        x: the images.
        arm: how to run it; None for as it is.
        grid: height and width of the patch grid that ``patches`` are brought to, where images are made smaller.
    """
    arm = arm or FULL
    encoder = find_encoder(arm.settings.get("model") or model)
    images = images_of(arm, x)
    with torch.no_grad(), _watch(encoder) as seen, arm.context() as run:
        out = run_arm(arm, model, images)
    hidden: Tensor = seen["hidden"].float()
    frames, rows, columns = encoder.grid(images)
    level: Level | None = run.call.last if run is not None else None
    prefix = run.call.prefix if run is not None else hidden.shape[1] - frames * rows * columns
    weight = torch.ones(hidden.shape[:2]) if level is None else level.size.float()
    if level is not None and level.valid is not None:
        weight = weight * level.valid
    share = (weight / weight[:, prefix:].sum(1, keepdim=True))[:, prefix:, None]
    mean = (hidden[:, prefix:] * share).sum(1)
    pooled = mean if prefix == 0 else torch.cat([hidden[:, 0], mean], -1)
    patches = (hidden if level is None else full_length(hidden, level))[:, prefix:]
    if grid is not None and (rows, columns) != grid:
        square = patches.reshape(len(x) * frames, rows, columns, -1).permute(0, 3, 1, 2)
        square = F.interpolate(square, size=grid, mode="bilinear", align_corners=False)
        patches = square.permute(0, 2, 3, 1).reshape(len(x), frames * grid[0] * grid[1], -1)
    n = [float(hidden.shape[1])] * len(encoder)
    leaving = n if run is None else [float(w) for w in run.call.widths]
    if run is None:
        entering = n
    elif run.reducer.before:
        entering = leaving
    else:
        entering = [float(run.call.tokens), *leaving[:-1]]
    return Seen(pooled, patches, getattr(out, "logits", None), entering, leaving)


def bench_images(
    model: Any,
    batches: Sequence[Tensor],
    methods: Sequence[Arm],
    *,
    labels: Sequence[Any] | None = None,
    classes: Sequence[Any] | None = None,
    probe: LinearProbe | None = None,
    rounds: int = 0,
    advance: Callable[[str], None] = lambda _: None,
) -> Result:
    """Measure what every method does to the features, and to the labels where there are any.

    Fidelity is the cosine of an image's features with those of the unmodified model: of what is pooled (class token and
    mean patch, each patch counted once however many share a slot), and of every patch (a dropped one counts as 0).

    Args:
        model: a supported vision transformer in eval mode, with or without a classification head.
        batches: images ``(B, C, H, W)`` each.
        methods: see `arms`.
        labels: the true label of every image, in order.
        classes: what the model's outputs stand for, where it has a head.
        probe: a probe of pooled features, where it has none.
        rounds: how often each is timed on the first batch; 0 leaves times out.
        advance: called with a label before each measurement, for progress.

    Returns:
        One row for each method, the unmodified model first, and one record per image and method.

    Raises:
        QuickmergeError: labels for other than as many images, or without a head or probe to guess them.
    """
    count = sum(len(batch) for batch in batches)
    if labels is not None and len(labels) != count:
        raise QuickmergeError(f"labels must be one for each of {count} images, got {len(labels)}")
    if labels is not None and probe is None and classes is None:
        raise QuickmergeError("labels need classes (for a model with a head) or a probe, got neither")
    encoder = find_encoder(model)
    shape = vision_shape(encoder)
    everything = [FULL, *methods]
    records: list[Row] = []
    first = 0
    for batch in batches:
        full = look(model, batch)
        reference = _guess(full, classes, probe)
        grid = encoder.grid(batch)[1:]
        for arm in everything:
            advance(arm.label)
            seen = full if arm.name == "full" else look(model, batch, arm, grid)
            guess = _guess(seen, classes, probe)
            pooled = F.cosine_similarity(seen.pooled, full.pooled, dim=-1)
            patches = F.cosine_similarity(seen.patches, full.patches, dim=-1).mean(-1)
            ratio = shape.ratio(int(full.entering[0]), seen.entering, seen.leaving)
            for i in range(len(batch)):
                records.append({
                    "image": first + i, "method": arm.name, "asked": arm.keep, "ratio": ratio,
                    "pooled": float(pooled[i]), "patches": float(patches[i]),
                    "accuracy": None if labels is None or guess is None else float(guess[i] == labels[first + i]),
                    "agreement": None if guess is None or reference is None else float(guess[i] == reference[i]),
                    "tokens": sum(seen.leaving) / len(seen.leaving), "tokens_out": seen.leaving[-1],
                })  # fmt: skip
        first += len(batch)
    rows = [_row(records, arm) for arm in everything]
    if rounds:
        times = time_arms(model, batches[0], methods, rounds, advance)
        rows = [row | spent for row, spent in zip(rows, times, strict=True)]
    return Result(rows, records)


def _guess(seen: Seen, classes: Sequence[Any] | None, probe: LinearProbe | None) -> list[Any] | None:
    if probe is not None:
        return list(probe.predict(seen.pooled))
    if seen.logits is None or classes is None:
        return None
    return [classes[i] for i in seen.logits.argmax(-1).tolist()]


def _row(records: Sequence[Row], arm: Arm) -> Row:
    mine = [r for r in records if (r["method"], r["asked"]) == (arm.name, arm.keep)]
    full = {r["image"]: r for r in records if r["method"] == "full"}
    row: Row = {"method": arm.name, "asked": arm.keep, "images": len(mine)}
    for key in ("ratio", "tokens", "tokens_out"):
        row[key] = sum(r[key] for r in mine) / len(mine)
    for key in ("pooled", "patches", "accuracy", "agreement"):
        values = [r[key] for r in mine]
        if any(v is None for v in values):
            continue
        row[key], row[f"{key}_low"], row[f"{key}_high"] = mean_interval(values)
        if key == "accuracy":
            lost = [r[key] - full[r["image"]][key] for r in mine]
            row["accuracy_change"], row["accuracy_change_low"], row["accuracy_change_high"] = mean_interval(lost)
    return row


def time_arms(
    model: Any, x: Tensor, methods: Sequence[Arm], rounds: int, advance: Callable[[str], None] = lambda _: None
) -> list[Row]:
    """Throughput of every method beside that of the unmodified model: they take turns, in another order each round.

    Attaching and detaching are outside of what is timed, the method's own work inside.

    Returns:
        One row for each method: median seconds, images a second, and of the ratio to the unmodified model in the same
        round the median and the quartiles.
    """
    everything = [FULL, *methods]

    def timed(arm: Arm, x: Tensor, number: int) -> float:
        advance(arm.label)
        images = images_of(arm, x)
        with torch.inference_mode(), arm.context():
            return seconds_of(partial(run_arm, arm, model, images), x.device)

    spent = interleave(everything, [x], timed, rounds=rounds, warm_up=timed)
    rows = []
    for arm, seconds in zip(everything, spent, strict=True):
        gain = [a / b for a, b in zip(spent[0], seconds, strict=True)]
        rows.append({
            "method": arm.name, "asked": arm.keep, "rounds": rounds,
            "batch": len(x), "seconds": median(seconds), "images_per_second": len(x) / median(seconds),
            **spread("speedup", gain),
        })  # fmt: skip
    return rows


# The benchmark of vision transformers in a terminal and on a page.


_METHOD = (
    "FLOPs are the share of those of the unmodified model, embedding and head left out. Fidelity is the cosine of "
    "features with those of the unmodified model: of the class token and the mean patch together, and of each patch, "
    "where one that was dropped counts as 0.",
    "Speed-up is the time of the unmodified model over the method's, which took turns, the method's work inside.",
)


def _faithful(header: str, key: str, form: str) -> Column:
    """A share with its interval, where there is one."""

    def there(rows: Sequence[Mapping[str, Any]]) -> bool:
        return any(key in row for row in rows)

    return Column(header, interval(key, form), short=half_width(key, form), when=there)


COLUMNS = (
    Column("method", text("method")),
    Column("FLOPs", number("ratio", ".2f")),
    Column("tokens out", number("tokens_out", ".0f")),
    _faithful("accuracy", "accuracy", ".3f"),
    _faithful("pooled", "pooled", ".4f"),
    _faithful("patches", "patches", ".3f"),
    Column("images/s", number("images_per_second", ".1f", none="–")),
    Column("speed-up", number("speedup", ".2f", unit="x", none="–")),
)


def vision_report(rows: Sequence[Mapping[str, Any]], meta: Mapping[str, Any]) -> Report:
    """The report of these rows and of what was measured."""
    table = Table(COLUMNS, _ordered(rows))
    section = Section("What survives, for what it costs", table, "Cheapest last, most faithful first.")
    title = f"{meta['model']}: fewer tokens on {meta['images']} images"
    return Report(title, [section], _METHOD, meta, legend="± is half of the 95 % interval over images")


def _ordered(rows: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """The unmodified model, then by what was asked for, most faithful first."""
    return sorted(rows, key=lambda row: (-(row["asked"] or row["ratio"]), -row["pooled"]))
