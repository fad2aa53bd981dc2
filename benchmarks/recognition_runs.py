"""What a run of benchmarks/recognition.py trains and measures: one recogniser of one variant and seed."""

from __future__ import annotations

import json
import shutil
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from quickmerge.bench.harness import interleave, now, seconds_of
from quickmerge.bench.stats import quartiles
from quickmerge.console.options import write_json
from quickmerge.errors import QuickmergeError
from quickmerge.recognition import Guess, Prefix, Recognizer, decode
from quickmerge.recognition.metric import Encode, scores
from quickmerge.recognition.train import LabelledScenes, train_recognizer
from quickmerge.training import TrainingConfig
from quickmerge.training.checkpoint import folders

TOP = 10
BATCH = 10
MEASURED = "measured.json"
Way = Callable[[Recognizer, Prefix], list[list[Guess]]]

WAYS: dict[str, Way] = {
    "one-shot": lambda r, p: decode.one_shot(r, p, TOP),
    # A label below this is none that anybody wants, and without a limit a badly trained model is searched for long.
    "best-first": lambda r, p: decode.best_first(r, p, TOP, minimum=1e-4),
    "greedy": lambda r, p: decode.greedy(r, p, labels=TOP),
    "beam": lambda r, p: decode.beam(r, p, labels=TOP),
}
"""The ways to get labels that are compared."""

TIMED: dict[str, Way] = {
    **WAYS,
    "one-shot, cache copied": lambda r, p: decode.one_shot(r, p, TOP, layout="batch"),
    "one-shot, no cache": lambda r, p: decode.one_shot(r, p, TOP, layout="uncached"),
}
"""These and two other ways to the same result are timed."""


@dataclass(frozen=True)
class Variant:
    """What tells a recogniser from the others.

    Args:
        name: in the results.
        blocks: of the language model.
        mask: what labels see.
        objective: what it is trained with.
        pool: image tokens of ``pool x pool`` patches are averaged into one; 1 keeps all.
        ways: how labels are got from it.
        timed: whether the ways are timed.
    """

    name: str
    blocks: int
    mask: str = "independent"
    objective: str = "paper"
    pool: int = 4
    ways: tuple[str, ...] = ("one-shot", "best-first")
    timed: bool = False

    def folder(self, work: Path, seed: int) -> Path:
        """Where a run leaves what it made."""
        return work / f"{self.name.replace(' ', '-').replace(',', '')}-seed{seed}"


def pooled(features: Tensor, by: int) -> Tensor:
    """Means of ``by x by`` squares of a square grid of tokens: ``(B, M, D)`` to ``(B, M / by^2, D)``."""
    side = round(features.shape[1] ** 0.5)
    if by == 1:
        return features
    if side * side != features.shape[1] or side % by:
        raise QuickmergeError(f"image tokens must be a square grid of sides that {by} divides, got {features.shape[1]}")
    grid = features.unflatten(1, (side // by, by, side // by, by))
    return grid.mean((2, 4)).flatten(1, 2)


def train_run(
    fresh: Callable[[Variant], Recognizer],
    variant: Variant,
    seed: int,
    dataset: LabelledScenes,
    config: TrainingConfig,
    out: Path,
    align: int,
) -> tuple[Recognizer, float]:
    """Train a recogniser, or go on with it; returns it with the training seconds."""
    torch.manual_seed(seed)
    recognizer = fresh(variant)
    result = train_recognizer(
        recognizer, dataset, config, out, objective=variant.objective, align=align, resume=bool(folders(out))
    )
    return recognizer.eval(), result.seconds


@torch.inference_mode()
def measure_ways(
    recognizer: Recognizer, features: Tensor, labels: Sequence[Sequence[str]], ways: Sequence[str], encode: Encode
) -> dict[str, Any]:
    """Scores of each way on test images."""
    found: dict[str, Any] = {}
    for way in ways:
        given: list[list[str]] = []
        for start in range(0, len(features), BATCH):
            prefix = recognizer.prefix(features[start : start + BATCH].float())
            given += [[guess.label for guess in row] for row in WAYS[way](recognizer, prefix)]
        found[way] = scores(labels, given, encode)
    return found


@torch.inference_mode()
def measure_times(recognizer: Recognizer, features: Tensor, count: int) -> dict[str, Any]:
    """Seconds to read one image's prefix and decode it, by way, one way after the other for each image.

    The order turns from image to image; before that every way warms up on the first one.
    """

    def timed(way: str, one: Tensor, number: int) -> float:
        return seconds_of(lambda: TIMED[way](recognizer, recognizer.prefix(one)), one.device)

    shown = [features[index % len(features)][None].float() for index in range(count)]
    seconds = dict(zip(TIMED, interleave(list(TIMED), shown, timed, warm_up=timed), strict=True))
    out = {}
    for way, each in seconds.items():
        low, middle, high = quartiles(each)
        ratio = statistics.median(one / other for one, other in zip(each, seconds["one-shot"], strict=True))
        out[way] = {"seconds": middle, "low": low, "high": high, "ratio": ratio}
    return out


@torch.inference_mode()
def measure_reduced(
    recognizer: Recognizer,
    look: Callable[[str, float], list[tuple[Tensor, Tensor | None]]],
    labels: Sequence[Sequence[str]],
    arms: Sequence[tuple[str, float]],
    encode: Encode,
) -> list[dict[str, Any]]:
    """Scores with fewer image tokens; ``look(reducer, keep)`` gives batches of features and which are valid.

    The ways to reduce take turns from batch to batch, so that a busy moment does not fall on one of them.
    """
    seen = {arm: look(*arm) for arm in arms}

    def guessed(arm: tuple[str, float], batch: int, number: int) -> tuple[float, int, list[list[str]]]:
        features, valid = seen[arm][batch]
        began = now(features.device)
        guesses = WAYS["one-shot"](recognizer, recognizer.prefix(features.float(), valid))
        spent = now(features.device) - began
        tokens = features.shape[0] * features.shape[1] if valid is None else int(valid.sum())
        return spent, tokens, [[guess.label for guess in row] for row in guesses]

    rows = []
    for (reducer, keep), found in zip(arms, interleave(arms, range(len(seen[arms[0]])), guessed), strict=True):
        spent, tokens, batches = zip(*found, strict=True)
        given = [row for batch in batches for row in batch]
        rows.append({
            "reducer": reducer, "keep": keep, "tokens": sum(tokens) / len(given),
            "decode_seconds": sum(spent) / len(given), **scores(labels, given, encode),
        })  # fmt: skip
    return rows


def finished(out: Path, settings: dict[str, Any]) -> dict[str, Any] | None:
    """What an earlier call measured in this folder, if it did.

    Raises:
        QuickmergeError: it was with other settings.
    """
    path = out / MEASURED
    if not path.is_file():
        return None
    data: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    if data["settings"] != settings:
        name = next(key for key in settings if data["settings"].get(key) != settings[key])
        raise QuickmergeError(
            f"{path} was measured with {name}={data['settings'].get(name)!r}, and {settings[name]!r} is asked for now: "
            "delete it, or give another --work"
        )
    return data


def finish(out: Path, data: dict[str, Any]) -> None:
    """Write what was measured, and remove the weights, which fill a disk by dozens."""
    write_json(out / MEASURED, data)
    for path in out.iterdir():
        if path.name not in (MEASURED, "metrics.jsonl"):
            (partial(shutil.rmtree, ignore_errors=True) if path.is_dir() else Path.unlink)(path)
