"""``calibrate``: the smallest share of the tokens at which a score stays above a floor, on somebody's own documents.

Every score is a share of what the plain model has: of the improvement that reading a document brings (recovery), of the
literals that it can repeat, of the tasks that it solves. So the plain model is measured once, and 1 is as good.
"""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

from quickmerge._version import __version__
from quickmerge.bench.records import Records
from quickmerge.bench.stats import ratio_interval
from quickmerge.datasets.tasks import TASKS
from quickmerge.errors import QuickmergeError, UnsupportedModelError, near_match, whole_number
from quickmerge.merge.bench.cost import Shape, model_shape
from quickmerge.merge.cache import Evictor
from quickmerge.merge.place import Merge
from quickmerge.merge.reducers.base import Reducer
from quickmerge.merge.text.modes import Prefix
from quickmerge.models.precision import dtype_name
from quickmerge.models.vlm import holds_vlm, unwrapped
from quickmerge.recipe.measured import Measured
from quickmerge.recipe.recipe import Recipe
from quickmerge.recipe.scores import Item, Score, literals_score, recovery_score, tasks_score

__all__ = ["FEW", "HALF", "SCORES", "Calibration", "Point", "calibrate"]

SCORES = ("recovery", "literals")
"""What may be asked to stay above a floor, beside names of tasks."""

FEW = 5
"""Documents without which there is no interval."""

HALF = 8
"""Documents that each half must have, or none is held out."""


@dataclass(frozen=True)
class Point:
    """What was measured at one share: the score with its interval over ``documents``, and what reading them took.

    ``low`` and ``high`` are None where documents are too few, ``flops_ratio`` where FLOPs can't be counted.
    """

    keep: float
    value: float
    low: float | None
    high: float | None
    documents: int
    flops_ratio: float | None
    cache_ratio: float

    def score(self, confident: bool) -> float:
        """What is held against a floor."""
        return self.low if confident and self.low is not None else self.value

    def __str__(self) -> str:
        interval = "" if self.low is None else f" ({self.low:.3f} to {self.high:.3f})"
        flops = "" if self.flops_ratio is None else f", FLOPs {100 * self.flops_ratio:.0f} %"
        return f"keep {self.keep:g}: {self.value:.3f}{interval}{flops}, cache {100 * self.cache_ratio:.0f} %"


@dataclass(frozen=True)
class Calibration:
    """What `calibrate` found; prints as a few lines.

    Attributes:
        score: what was measured.
        floor: that it was to stay above.
        confident: whether the lower end of the interval had to, and not only the score itself.
        points: every share that was measured, rising, on the documents that one was chosen on.
        chosen: the smallest that stays above the floor; None where none does.
        check: the same share on the documents that were held out; None where there were too few.
        recipe: with that share, and the record of how it was found; None where none was chosen.
        notes: what else there is to know, a sentence each.
    """

    score: str
    floor: float
    confident: bool
    points: tuple[Point, ...]
    chosen: Point | None
    check: Point | None
    recipe: Recipe | None
    notes: tuple[str, ...]

    @property
    def monotone(self) -> bool:
        """Whether no share scored more than a larger one."""
        return all(a.value <= b.value + 1e-9 for a, b in pairwise(self.points))

    @property
    def best(self) -> Point:
        """The measured point with the best score; of equal ones that with the smallest share."""
        return max(self.points, key=lambda point: (point.score(self.confident), -point.keep))

    def as_dict(self) -> dict[str, Any]:
        """Everything, for JSON."""
        made = asdict(replace(self, recipe=None))
        recipe = None if self.recipe is None else self.recipe.as_dict()
        return {**made, "notes": list(self.notes), "monotone": self.monotone, "recipe": recipe}

    def __str__(self) -> str:
        lines = [f"{self.score}, as a share of the plain model's; floor {self.floor:g}"]
        lines += [f"  {point}" + (" <- chosen" if point == self.chosen else "") for point in self.points]
        if self.check is not None:
            lines.append(f"held out: {self.check}, {self.check.documents} documents")
        if self.chosen is None:
            lines.append(f"no keep below 1 stays above {self.floor:g}: the best is {self.best}")
        return "\n".join([*lines, *(f"note: {note}" for note in self.notes)])


def calibrate(
    model: Any,
    tokenizer: Any,
    texts: Sequence[str],
    recipe: Recipe | Reducer | Merge | Evictor,
    *,
    floor: float = 0.97,
    score: str = "recovery",
    tokens: int = 1024,
    target: int = 192,
    confident: bool = False,
    lowest: float = 0.05,
    step: float = 0.01,
    literals: int = 8,
    samples: int = 24,
    seed: int = 0,
    name: str | None = None,
    records: Path | None = None,
    advance: Callable[[str], None] = lambda _: None,
) -> Calibration:
    """Find the smallest ``keep`` of a recipe at which a score stays above a floor on ``texts``.

    Shares are halved in, on the assumption that a score falls with the share; the measured points say whether it did.
    Where there are documents enough, half of them choose and the other half, which had no part in it, say what the
    choice is worth: of several shares that are tried, the one that looks good is lucky, too.

    The point estimate decides, or with ``confident`` the lower end of its 95 % interval.

    Args:
        model: a causal LM in eval mode, in the precision in which it will be used.
        tokenizer: of the model.
        texts: documents of at least 1,000 tokens each.
        recipe: whose ``keep`` is sought: that of what merges the text, else that of the method for the cache. The rest
            stays.
        floor: in (0, 1], a share of what the plain model has.
        score: ``"recovery"``, of what follows the documents; ``"literals"``, of the literals that the plain model can
            repeat; or names of tasks (see `quickmerge.datasets.tasks`) with commas, of those that it solves, asked in
            the midst of the documents.
        tokens: of each context.
        target: of what follows it, for recovery.
        confident: see above.
        lowest: share below which none is tried.
        step: between shares.
        literals: of each document that are asked for.
        samples: of each task.
        seed: divides documents, and draws literals.
        name: what the record calls the model; default: its own name.
        records: a file of JSON lines that every measurement is added to; what stands there is not measured again.
        advance: called with a label before each measurement, for progress.

    Returns:
        A `Calibration`, with the recipe that was found.

    Raises:
        UnsupportedModelError: for a model that is no language model, or can't be served.
        QuickmergeError: naming the argument that is out of range, the text that is too short, or what has no ``keep``.
    """
    recipe = _as_recipe(recipe)
    check_floor(floor, score, lowest, step)
    tokens, target = whole_number("tokens", tokens, 2), whole_number("target", target, 2)
    texts = [texts] if isinstance(texts, str) else list(texts)
    if not texts:
        raise QuickmergeError("texts must be at least one document, got none")
    _check_reaches(recipe, tokens)
    model = unwrapped(model)
    if holds_vlm(model):
        raise UnsupportedModelError(f"calibrate is for language models, got {type(model).__name__}")
    reads = _reading(recipe, tokenizer)
    with_keep(reads, 0.5).check(model)
    items, scored = _scored(model, tokenizer, texts, score, tokens, target, literals, samples, seed)
    measure = _Measure(model, reads, scored, records, {
        "score": score, "model": _name(model, name), "tokens": tokens, "target": target, "seed": seed,
        "literals": literals, "dtype": dtype_name(model), "recipe": _told(recipe),
    }, advance)  # fmt: skip
    mine, others, notes = _halves(items, seed)
    few = len(mine) < FEW
    if few and confident:
        raise QuickmergeError(
            f"confident needs an interval, and of {len(mine)} documents there is none: give at least {FEW}"
        )
    if few:
        notes.append(f"{len(mine)} documents are too few for an interval, which takes {FEW}")
    grid = [round(lowest + i * step, 6) for i in range(int((1 - lowest) / step + 1e-9) + 1)]
    points: dict[float, Point] = {}
    # All below ``low`` are taken to miss the floor, and all from ``high`` on to meet it; keep=1 is the plain model.
    low, high = -1, len(grid) if grid[-1] < 1 else len(grid) - 1
    while high - low > 1:
        middle = (low + high) // 2
        points[grid[middle]] = point = measure.point(grid[middle], mine)
        low, high = (low, middle) if point.score(confident) >= floor else (middle, high)
    every = tuple(points[keep] for keep in sorted(points))
    chosen = points.get(grid[high]) if high < len(grid) else None
    check = None if chosen is None or not others else measure.point(chosen.keep, others)
    found = None
    if chosen is not None:
        found = with_keep(recipe, chosen.keep)
        last = chosen if check is None else check
        found = replace(found, calibration=Measured(
            label=found.label, model=_name(model, name), score=score, floor=floor, value=last.value, low=last.low,
            high=last.high, documents=last.documents, held_out=check is not None, confident=confident, tokens=tokens,
            dtype=dtype_name(model), texts=_digest(texts), seed=seed, quickmerge=__version__,
            flops_ratio=last.flops_ratio, cache_ratio=last.cache_ratio,
        ))  # fmt: skip
    made = Calibration(score, floor, confident, every, chosen, check, found, tuple(notes))
    return replace(made, notes=(*made.notes, *_remarks(made)))


def with_keep(recipe: Recipe, keep: float) -> Recipe:
    """The recipe with another share: of what merges the text, else of the method for the cache.

    Raises:
        QuickmergeError: it has neither, or a share that is no plain number.
    """
    if isinstance(recipe.merge, Merge):
        was = recipe.merge.reducer.keep
        if isinstance(was, bool) or not isinstance(was, (int, float)):
            raise QuickmergeError(f"recipe must have a number as keep of merge to calibrate it, got {was!r:.80}")
        return replace(recipe, merge=replace(recipe.merge, reducer=replace(recipe.merge.reducer, keep=keep)))
    if isinstance(recipe.cache, Evictor):
        return replace(recipe, cache=replace(recipe.cache, keep=keep))
    raise QuickmergeError(f"recipe must merge the text or evict from the cache to have a keep, got {recipe.label}")


def check_floor(floor: float, score: str, lowest: float, step: float) -> None:
    """Raise QuickmergeError for a number out of range, or a score that there is not."""
    for what, value in (("floor", floor), ("lowest", lowest), ("step", step)):
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value <= 1:
            raise QuickmergeError(f"{what} must be a number in (0, 1], got {value!r:.80}")
    if step < 0.001:
        raise QuickmergeError(f"step must be at least 0.001, got {step:g}")
    if lowest == 1:
        raise QuickmergeError("lowest must be below 1, at which nothing is reduced, got 1")
    for each in score.split(",") if isinstance(score, str) and score not in SCORES else ():
        if each.strip() not in TASKS:
            allowed = [*SCORES, *TASKS]
            hint = near_match(each.strip(), allowed)
            raise QuickmergeError(
                f"score must be {', '.join(SCORES)}, or tasks of {', '.join(TASKS)}, got {each!r}{hint}"
            )
    if not isinstance(score, str):
        raise QuickmergeError(f"score must be a name such as recovery, got {score!r:.80}")


def _as_recipe(given: Any) -> Recipe:
    if isinstance(given, (Reducer, Merge)):
        given = Recipe(merge=given)
    elif isinstance(given, Evictor):
        given = Recipe(cache=given)
    if not isinstance(given, Recipe):
        raise QuickmergeError(
            f"recipe must be a Recipe, a reducer, a Merge or a method for the cache, got {given!r:.200}"
        )
    for name in ("visual", "tower"):
        if getattr(given, name) is not None:
            raise QuickmergeError(f"recipe must have no {name} to be calibrated on texts, got {given.label}")
    with_keep(given, 0.5)
    return given


def _reading(recipe: Recipe, tokenizer: Any) -> Recipe:
    """The recipe as it is measured: where literals stay alone, they are found by this tokenizer."""
    if not isinstance(recipe.merge, Merge) or recipe.merge.mode is None or recipe.merge.mode.tokenizer is not None:
        return recipe
    return replace(recipe, merge=replace(recipe.merge, mode=replace(recipe.merge.mode, tokenizer=tokenizer)))


def _check_reaches(recipe: Recipe, tokens: int) -> None:
    """Refuse contexts that the recipe reads in full: every share would look perfect."""
    if isinstance(recipe.merge, Merge):
        mode = recipe.merge.mode or Prefix()
        least = mode.min_tokens if isinstance(mode, Prefix) else mode.chunk + mode.window
    else:
        assert isinstance(recipe.cache, Evictor)
        least = recipe.cache.min_tokens
    if tokens < least:
        raise QuickmergeError(
            f"tokens must be at least {least}, below which the recipe leaves texts alone, got {tokens}"
        )


def _scored(
    model: Any, tokenizer: Any, texts: Sequence[str], score: str, tokens: int, target: int, literals: int, samples: int,
    seed: int,
) -> tuple[list[Item], Score]:  # fmt: skip
    if score == "recovery":
        return recovery_score(model, tokenizer, texts, tokens, target)
    if score == "literals":
        return literals_score(model, tokenizer, texts, tokens, target, whole_number("literals", literals), seed)
    names = [each.strip() for each in score.split(",")]
    return tasks_score(model, tokenizer, texts, tokens, names, whole_number("samples", samples))


def _halves(items: Sequence[Item], seed: int) -> tuple[list[Item], list[Item], list[str]]:
    """Those that choose, those that are held out, and what there is to say of it."""
    if len(items) < 2 * HALF:
        note = (
            f"{len(items)} documents are too few to hold half of them out, which takes {2 * HALF}: the score is of the "
            "documents that the share was chosen on, and flatters it"
        )
        return list(items), [], [note]
    order = list(items)
    random.Random(seed).shuffle(order)
    half = (len(order) + 1) // 2
    return order[:half], order[half:], []


class _Measure:
    """Measures shares on documents, each pair once, and the plain model once for each document."""

    def __init__(
        self, model: Any, recipe: Recipe, score: Score, records: Path | None, settings: Mapping[str, Any],
        advance: Callable[[str], None],
    ) -> None:  # fmt: skip
        self.recipe, self.score, self.advance = recipe, score, advance
        self.records = Records(records, settings, ("item", "keep"))
        try:
            self.shape: Shape | None = model_shape(model)
        except UnsupportedModelError:
            self.shape = None

    def _record(self, item: Item, keep: float | None) -> dict[str, Any]:
        held = self.records.get(item.key, keep)
        self.advance(f"{item.name}: {'plain' if keep is None else f'keep {keep:g}'}")
        if held is None:
            if keep is None:
                held = self.score.plain(item)
            else:
                recipe = with_keep(self.recipe, keep)
                held = self.score.reduced(item, self._record(item, None), recipe, self.shape)
            self.records.add({"item": item.key, "keep": keep, **held})
        return held

    def point(self, keep: float, items: Sequence[Item]) -> Point:
        """One share on some documents."""
        rows = [(self._record(item, None), self._record(item, keep)) for item in items]
        top, bottom = [row["top"] for _, row in rows], [plain["bottom"] for plain, _ in rows]
        if sum(bottom) <= 0:
            raise QuickmergeError(
                f"texts must be of some use to the plain model to calibrate by them: {self.score.nothing}"
            )
        low, high = ratio_interval(top, bottom) if len(items) >= FEW else (None, None)
        flops = [row["flops_ratio"] for _, row in rows]
        return Point(
            keep, sum(top) / sum(bottom), low, high, len(items),
            None if None in flops else sum(flops) / len(flops),
            sum(row["cache_ratio"] for _, row in rows) / len(rows),
        )  # fmt: skip


def _remarks(made: Calibration) -> list[str]:
    found = []
    if not made.monotone:
        a, b = max(pairwise(made.points), key=lambda pair: pair[0].value - pair[1].value)
        found.append(
            f"the score does not rise with the share everywhere: keep {a.keep:g} has {a.value:.3f} and keep {b.keep:g} "
            f"{b.value:.3f}, so that a smaller share than the chosen one may do"
        )
    if made.check is not None and made.check.score(made.confident) < made.floor:
        found.append(
            f"on the documents that were held out the score is below the floor, {made.check.value:.3f}: take more "
            "documents, a higher floor, or confident"
        )
    return found


def _name(model: Any, name: str | None) -> str:
    return name or Path(str(getattr(model, "name_or_path", "") or "")).name or type(model).__name__


def _told(recipe: Recipe) -> str:
    """What tells a recipe from others, whatever its share."""
    try:
        return json.dumps(replace(with_keep(recipe, 0.5), calibration=None).as_dict(), sort_keys=True)
    except QuickmergeError:
        return with_keep(recipe, 0.5).label


def _digest(texts: Sequence[str]) -> str:
    digest = hashlib.sha256()
    for text in texts:
        digest.update(hashlib.sha256(text.encode("utf-8", "surrogatepass")).digest())
    return digest.hexdigest()[:16]
