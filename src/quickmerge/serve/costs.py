"""What reading prompts took while another program asked for texts: counted batch by batch, and summed for each task."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, fields
from typing import Any

from quickmerge.bench.table import Column, Table, number, text
from quickmerge.errors import UnsupportedModelError
from quickmerge.merge.bench.cost import Shape, model_shape
from quickmerge.merge.place import Merge
from quickmerge.merge.run import RunStats, observe
from quickmerge.merge.text.modes import BlockCausal
from quickmerge.recipe import Recipe, RecipeRun, apply

__all__ = ["Cost", "Counted", "costs_table"]

MIB = 2**-20


@dataclass
class Cost:
    """Sums over the prompts that were read.

    Attributes:
        rows: prompts, or texts to be scored.
        rows_whole: of these, how many were read in full although they were to be reduced: too short, or protected.
        tokens_in: their tokens.
        tokens_kept: of these, how many are read above the first merge, mean over these blocks. In block-causal mode
            what the blocks hold at the end.
        prefill_seconds: of the decoder's forwards over them, the reducer inside.
        reducer_seconds: of these, what the reducer took.
        flops: FLOPs of the prefills as shares of the plain model's, summed over rows; None where they aren't counted.
        cache_bytes: of their caches when they had been read.
        cache_bytes_full: the same of the plain model.
        decode_seconds: of the forwards behind them.
        decode_steps: how many forwards that were.
        visual_in: visual tokens of the prompts, of a vision-language model.
        visual_kept: of these, how many its language model reads.
    """

    rows: int = 0
    rows_whole: int = 0
    tokens_in: float = 0.0
    tokens_kept: float = 0.0
    prefill_seconds: float = 0.0
    reducer_seconds: float = 0.0
    flops: float | None = 0.0
    cache_bytes: float = 0.0
    cache_bytes_full: float = 0.0
    decode_seconds: float = 0.0
    decode_steps: int = 0
    visual_in: float = 0.0
    visual_kept: float = 0.0

    def add(self, other: Cost) -> None:
        """Add the sums of another one; what was once not counted stays so."""
        for each in fields(self):
            mine, theirs = getattr(self, each.name), getattr(other, each.name)
            setattr(self, each.name, None if mine is None or theirs is None else mine + theirs)

    def as_dict(self) -> dict[str, Any]:
        """For JSON: the counts, and by the prompt what readers compare: tokens, seconds, and shares of the plain model.

        Keys ``tokens_in``, ``tokens_kept``, ``prefill_seconds`` and ``cache_bytes`` are means over prompts.
        """
        rows = max(self.rows, 1)
        seen = {"visual_in": self.visual_in / rows, "visual_kept": self.visual_kept / rows} if self.visual_in else {}
        return {
            "prompts": self.rows,
            "prompts_read_whole": self.rows_whole,
            "tokens_in": self.tokens_in / rows,
            "tokens_kept": self.tokens_kept / rows,
            "prefill_seconds": self.prefill_seconds / rows,
            "reducer_seconds": self.reducer_seconds / rows,
            "flops_ratio": None if self.flops is None else self.flops / rows,
            "cache_bytes": self.cache_bytes / rows,
            "cache_ratio": self.cache_bytes / self.cache_bytes_full if self.cache_bytes_full else None,
            "decode_seconds": self.decode_seconds,
            "decode_steps": self.decode_steps,
            **seen,
        }


class Counted:
    """A model with a recipe, which may be empty, that is run a batch at a time and counted.

    The plain model is counted by the same clock, so that two runs can be compared.

    Args:
        model: of transformers.
        recipe: what is done to it inside `batch`.

    Raises:
        UnsupportedModelError: the model can't be served with this recipe.
        QuickmergeError: a setting does not fit the model.
    """

    def __init__(self, model: Any, recipe: Recipe) -> None:
        self.recipe = recipe
        self.costs: dict[str, Cost] = {}
        """By what `batch` was told, such as the name of a task."""
        self._run: RecipeRun | None = None
        if not recipe.empty:
            self._run = apply(model, recipe)
            self._run.attach()  # so that what does not fit is told before anything is read
            self._run.detach()
        # What merges, or makes the cache smaller, counts by itself; beside all else somebody has to look on.
        self._watch: Any = None
        if not recipe.merges and recipe.evictor is None:
            try:
                self._watch = observe(model)
            except UnsupportedModelError:
                if self._run is not None:
                    raise
        self._shape: Shape | None = None
        with suppress(UnsupportedModelError):  # of experts, for one, FLOPs aren't counted
            self._shape = model_shape(model)

    @contextmanager
    def batch(self, name: str) -> Iterator[None]:
        """Within the block the model runs with its recipe, once over a batch of prompts, counted under ``name``."""
        with ExitStack() as stack:
            for run in (self._run, self._watch):
                if run is not None:
                    stack.enter_context(run)
            yield
            self._count(name)

    @property
    def total(self) -> Cost:
        """All together."""
        found = Cost()
        for cost in self.costs.values():
            found.add(cost)
        return found

    def as_dict(self) -> dict[str, Any]:
        """For JSON: ``"all"``, and ``"by_task"`` where there is more than one."""
        found: dict[str, Any] = {"all": self.total.as_dict()}
        if len(self.costs) > 1:
            found["by_task"] = {name: cost.as_dict() for name, cost in self.costs.items()}
        return found

    def _count(self, name: str) -> None:
        stats = self._stats()
        if stats is None or not stats.rows:
            return
        rows = stats.rows
        share = self._flops(stats)
        self.costs.setdefault(name, Cost()).add(
            Cost(
                rows, stats.rows_short + stats.rows_protected, rows * stats.tokens_in, rows * stats.tokens_kept,
                stats.prefill_seconds, stats.reducer_seconds, None if share is None else rows * share,
                stats.prompt_cache_bytes, stats.prompt_cache_bytes_full, stats.decode_seconds, stats.decode_steps,
                *(rows * getattr(stats, name, 0.0) for name in ("visual_in", "visual_kept")),
            )
        )  # fmt: skip

    def _stats(self) -> RunStats | None:
        if self._watch is not None:
            found: RunStats = self._watch.summary()
            return found
        if self._run is None:
            return None
        for name, stats in self._run.summary().of.items():
            if {"merge", "visual", "tower", "cache"} & set(name.split("+")):
                return stats if isinstance(stats, RunStats) else None
        return None

    def _flops(self, stats: RunStats) -> float | None:
        merge = self.recipe.merge if isinstance(self.recipe.merge, Merge) else None
        if {"visual", "tower"} & set(self.recipe.merges):
            return None
        if merge is None and self.recipe.evictor is None:
            return 1.0
        # In block-causal mode every block still reads all tokens; what a query sees changes from chunk to chunk.
        if self._shape is None or (merge is not None and isinstance(merge.mode, BlockCausal)):
            return None
        evictor = self.recipe.evictor
        if evictor is not None and stats.tokens_in < evictor.min_tokens:
            evictor = None
        reducer = None if merge is None else merge.reducer
        return float(self._shape.flops_ratio(reducer, stats.tokens_per_layer, stats.tokens_in, evictor))


def _share(key: str) -> Any:
    def cell(row: Mapping[str, Any]) -> str:
        return "-" if row[key] is None else f"{100 * row[key]:.0f} %"

    return cell


def _whole(row: Mapping[str, Any]) -> bool:
    return bool(row["prompts_read_whole"])


COLUMNS = (
    Column("task", text("task"), "l"),
    Column("prompts", number("prompts", ",")),
    Column("read whole", number("prompts_read_whole", ","), when=lambda rows: any(map(_whole, rows))),
    Column("tokens in", number("tokens_in", ",.0f")),
    Column("tokens kept", number("tokens_kept", ",.0f")),
    Column("FLOPs", _share("flops_ratio")),
    Column("prefill", number("prefill_seconds", ".3f", unit=" s")),
    Column("cache", number("cache_bytes", ".2f", scale=MIB, unit=" MiB")),
    Column("of the full", _share("cache_ratio")),
)  # fmt: skip


def costs_table(costs: Mapping[str, Any]) -> Table:
    """The table of what `Counted.as_dict` gave: means over prompts, for each task and for all."""
    rows = [{"task": name, **row} for name, row in costs.get("by_task", {}).items()]
    return Table(COLUMNS, [*rows, {"task": "all", **costs["all"]}])
