"""Tables of what survives at which budget: of text that goes on, at equal cost and at equal cache, and of tasks."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from quickmerge.bench.stats import ratio_interval
from quickmerge.bench.table import Column, Table, interval, number, text

Row = dict[str, Any]
RESULTS = Path(__file__).parent / "results"
MODEL = "smollm2-135m"
MERGES = ("quickmerge", "truncate", "attention", "random", "tome")


SECOND = "gemma3-270m"


def _file(part: str, model: str) -> Path:
    return RESULTS / (f"{part}.json" if model == MODEL else f"{part}-{model}.json")


def _rows(model: str = MODEL, what: str = "rows") -> list[Row]:
    found: list[Row] = json.loads(_file("budgets", model).read_text(encoding="utf-8"))[what]
    return found


def _records() -> list[Row]:
    return _rows(what="documents")


def _there(model: str = MODEL) -> bool:
    return _file("budgets", model).is_file()


def _bold(row: Row) -> str:
    return f"**{row['way']}**" if row["way"].startswith(("quickmerge 0", "quickmerge 0.42, cache")) else str(row["way"])


WAY = Column("way", _bold, "l")
RECOVERY = Column("recovery (95 % interval)", interval("recovery", ".3f"))
COST = (
    Column("FLOPs", number("flops_ratio", ".2f")), Column("prefill", number("prefill_ratio", ".2f")),
    Column("cache", number("cache_ratio", ".2f")),
)  # fmt: skip


def is_merge(row: Row) -> bool:
    """Whether a way merges or drops tokens, and leaves what is cached alone."""
    return row["way"].split(" ")[0] in MERGES and "cache" not in row["way"]


def merging(model: str = MODEL) -> Table | None:
    """Recovery of ways to read fewer tokens, best first at each keep."""
    if not _there(model):
        return None
    rows = [row for row in _rows(model) if is_merge(row) or model != MODEL]
    return Table([WAY, RECOVERY, *COST], sorted(rows, key=lambda r: (round(r["cache_ratio"], 1), -r["recovery"])))


def caches(low: float, high: float) -> Table | None:
    """Recovery of everything that holds such a share of the cache, best first."""
    if not _there():
        return None
    rows = [row for row in _rows() if low <= row["cache_ratio"] <= high]
    paired = Column("less quickmerge 0.42", interval("paired", "+.3f"))
    return Table([WAY, RECOVERY, *COST, paired], sorted(rows, key=lambda r: -r["recovery"]))


def by_kind() -> Table | None:
    """Recovery by kind of document, of merging and of the same share of the most recent tokens."""
    if not _there():
        return None
    found: dict[tuple[str, str], list[Row]] = {}
    for row in _records():
        found.setdefault((row["way"], row["kind"]), []).append(row)
    kinds = sorted({kind for _, kind in found})
    ways = [row["way"] for row in _rows() if is_merge(row) and row["way"].split(" ")[0] in ("quickmerge", "truncate")]

    def of(kind: str) -> Callable[[Row], str]:
        def cell(row: Row) -> str:
            mine = found[row["way"], kind]
            worth = sum(r["nll_none"] - r["nll_full"] for r in mine)
            return f"{sum(r['nll_none'] - r['nll'] for r in mine) / worth:.3f}"

        return cell

    return Table([WAY, *(Column(kind, of(kind)) for kind in kinds)], [{"way": way} for way in ways])


def paired() -> Table | None:
    """QuickMerge less the most recent tokens, document by document, and less what it was before it kept spans."""
    if not _there():
        return None
    found = {(r["document"], r["way"]): r for r in _records()}
    names = list(dict.fromkeys(r["document"] for r in _records()))
    rows = []
    for keep in ("0.2", "0.42", "0.6"):
        row: Row = {"keep": keep}
        for rival in ("truncate", "quickmerge before spans"):
            if (names[0], f"{rival} {keep}") not in found:
                continue
            pairs = [(found[d, f"{rival} {keep}"], found[d, f"quickmerge {keep}"]) for d in names]
            gain = np.array([other["nll"] - mine["nll"] for other, mine in pairs])
            worth = np.array([mine["nll_none"] - mine["nll_full"] for _, mine in pairs])
            row[rival] = gain.sum() / worth.sum()
            row[f"{rival}_low"], row[f"{rival}_high"] = ratio_interval(gain, worth)
        rows.append(row)

    def against(rival: str) -> Column:
        cell = interval(rival, "+.3f")
        return Column(f"less {rival}", lambda r: cell(r) if rival in r else "")

    return Table([Column("keep", text("keep")), against("truncate"), against("quickmerge before spans")], rows)


def short() -> Table | None:
    """QuickMerge alone, for the README."""
    if not _there():
        return None
    every = {row["way"]: row for row in _rows()}
    rows: list[Row] = []
    for keep in ("0.6", "0.42", "0.2"):
        mine = every[f"quickmerge {keep}"]
        rivals = [r for way, r in every.items() if is_merge(r) and way.endswith(f" {keep}") and "quickmerge" not in way]
        best = max(rivals, key=lambda r: float(r["recovery"]))
        rows.append({**mine, "at": keep, "best": f"{best['recovery']:.3f} ({best['way'].split(' ')[0]})"})
    columns = [
        Column("keep", text("at")), RECOVERY, Column("prefill FLOPs", number("flops_ratio", ".2f")),
        Column("prefill time", number("prefill_ratio", ".2f")), Column("cache bytes", number("cache_ratio", ".2f")),
        Column("best baseline", text("best")),
    ]  # fmt: skip
    return Table(columns, rows)


# Tasks ---------------------------------------------------------------------------------------------------------------


def _tasks(model: str = MODEL) -> list[Row]:
    found: list[Row] = json.loads(_file("budget_tasks", model).read_text(encoding="utf-8"))["rows"]
    return found


def _share(row: Row | None, name: str) -> str:
    if row is None or row.get(name) is None:
        return ""
    return f"{100 * row[name]:.0f} % ({100 * row[f'{name}_low']:.0f} to {100 * row[f'{name}_high']:.0f})"


def asked(model: str = MODEL) -> Table | None:
    """Exact answers, of those that the plain model gives, by way and by how is asked."""
    if not _file("budget_tasks", model).is_file():
        return None
    whole = [row for row in _tasks(model) if row["task"] is None and row["mode"] != "later"]
    found = {(row["name"], row["mode"], row["format"]): row for row in whole}
    kinds = list(dict.fromkeys((row["mode"], row["format"]) for row in whole))
    names = [name for name in dict.fromkeys(row["name"] for row in whole) if name != "plain"]

    def of(mode: str, format: str) -> Column:
        title = f"question {'first and last' if mode == 'both' else mode}, {format}"
        return Column(title, lambda r: _share(found.get((r["way"], mode, format)), "exact_solvable"))

    def cost(name: str) -> Callable[[Row], str]:
        return lambda r: f"{found[r['way'], 'last', 'cue'][name]:.2f}"

    columns = [WAY, *(of(*kind) for kind in kinds), Column("FLOPs", cost("flops_ratio")),
               Column("cache", cost("cache_ratio"))]  # fmt: skip
    return Table(columns, [{"way": name} for name in names])


def each_task() -> Table | None:
    """The same by task, where the answer is begun and the question stands last."""
    if not (RESULTS / "budget_tasks.json").is_file():
        return None
    mine = [row for row in _tasks() if (row["mode"], row["format"]) == ("last", "cue") and row["task"] is not None]
    found = {(row["name"], row["task"]): row for row in mine}
    tasks = list(dict.fromkeys(row["task"] for row in mine))

    def of(task: str) -> Column:
        def cell(row: Row) -> str:
            here = found[row["way"], task]
            return f"{round(here['exact'] * here['prompts'])}/{here['prompts']}"

        return Column(task, cell)

    return Table([WAY, *map(of, tasks)], [{"way": name} for name in dict.fromkeys(row["name"] for row in mine)])


def later() -> Table | None:
    """A document that is read before anyone asks."""
    if not (RESULTS / "budget_tasks.json").is_file():
        return None
    rows = [row for row in _tasks() if row["task"] is None and row["mode"] == "later" and row["name"] != "plain"]
    columns = [
        Column("way", text("name"), "l"), Column("exact, of solvable", lambda r: _share(r, "exact_solvable")),
        Column("questions", lambda r: f"{r['solvable']} of {r['prompts']} solvable"),
        Column("FLOPs", number("flops_ratio", ".2f")), Column("prefill", number("prefill_ratio", ".2f")),
        Column("cache", number("cache_ratio", ".2f")),
    ]  # fmt: skip
    return Table(columns, rows)


def memory() -> Table | None:
    """What a smaller cache frees, and what a step takes."""
    path = RESULTS / "cache_memory.json"
    if not path.is_file():
        return None
    mib = 2**-20
    columns = [
        WAY, Column("cache", number("cache_bytes", ".0f", scale=mib, unit=" MiB")),
        Column("of the full one", lambda r: f"{r['cache_bytes'] / r['cache_bytes_full']:.2f}"),
        Column("resident memory behind the prompt", number("resident_bytes", "+.0f", scale=mib, unit=" MiB")),
        Column("decoding step (quartiles)", interval("step_speedup", ".2f", unit="x", ends=("_q1", "_q3"))),
    ]  # fmt: skip
    return Table(columns, json.loads(path.read_text(encoding="utf-8"))["rows"])


def between(low: float, high: float) -> Callable[[], Table | None]:
    """`caches` of such a share."""
    return lambda: caches(low, high)


BUDGETS: dict[str, Callable[[], Table | None]] = {
    "recovery": merging, "paired": paired, "kinds": by_kind, "short": short,
    "cache_41": between(0.2, 0.44), "cache_57": between(0.5, 0.6),
    "second_recovery": partial(merging, SECOND), "second_asked": partial(asked, SECOND),
    "asked": asked, "each_task": each_task, "later": later, "cache_memory": memory,
}  # fmt: skip
"""By the name in the docs."""

__all__: Sequence[str] = ["BUDGETS", "asked", "by_kind", "caches", "each_task", "later", "merging", "paired", "short"]
