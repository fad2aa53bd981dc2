"""Put the committed results into README.md and docs/: every number there comes from a JSON file.

    python benchmarks/tables.py [--check]

A block between ``<!-- table:NAME -->`` and ``<!-- /table -->`` is replaced by the table of that name.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from budget_tables import BUDGETS
from calm_tables import CALM
from cpu_tables import CPU
from curve_tables import CURVES
from gumiho_tables import GUMIHO
from harness_tables import HARNESS
from literal_tables import LITERALS
from multipole_tables import MULTIPOLE
from recipe_tables import RECIPES
from server_tables import SERVER
from transplant_tables import TRANSPLANT
from trust_tables import TRUST
from vision_zoo_tables import vision_refused, vision_zoo
from vlm_zoo_tables import VLM_ZOO
from wait_tables import WAITS

from quickmerge.bench.stats import ratio_interval
from quickmerge.bench.table import Cell, Column, Table, interval, number, plus_minus, text, unless
from quickmerge.models.families import CAPABILITIES
from quickmerge.models.families import rows as family_rows

HERE = Path(__file__).parent
PAGES = [HERE.parent / "README.md", *sorted((HERE.parent / "docs").rglob("*.md"))]
BLOCK = re.compile(r"(<!-- table:(\w+) -->\n)(.*?)(<!-- /table -->)", re.S)
MIB = 2**-20
Row = dict[str, Any]

KEEP = Column("keep", number("keep"))
TOKENS = Column("tokens", number("tokens", ","))
NLL = Column("NLL", number("nll", ".3f"))
RECOVERY = Column("recovery (95 % interval)", interval("recovery", ".3f"))
COST = (
    Column("FLOPs", number("flops_ratio", ".3f")),
    Column("prefill", number("prefill_speedup", ".2f", unit="x")),
    Column("reducer", number("reducer_seconds", ".0f", scale=1e3, unit=" ms")),
)
QUARTILES = ("_q1", "_q3")


def rows_of(name: str, key: str = "rows") -> list[Row]:
    """The rows of a result file, or another of its lists."""
    data: dict[str, Any] = json.loads((HERE / "results" / f"{name}.json").read_text(encoding="utf-8"))
    rows: list[Row] = data[key]
    return rows


def strong(key: str, test: Callable[[Row], bool]) -> Cell:
    """A name, set off where ``test`` of the row holds."""
    return lambda r: f"**{r[key]}**" if test(r) else str(r[key])


def is_full(r: Row) -> bool:
    """Whether a row is the model that reads everything."""
    return bool(r["method"] == "full")


def method(name: str = "method") -> Column:
    """The method, by what it leaves."""
    return Column(name, unless(is_full, text("method"), "all tokens"))


def overall(name: str, best: int = -1) -> list[Row]:
    """Context recovery over all documents, best first at each keep, or with ``best=1`` last."""
    rows = [r for r in rows_of(name) if r["kind"] is None]
    return sorted(rows, key=lambda r: (r["keep"], best * r["recovery"]))


def kinds(name: str, best: int = -1) -> Table:
    """Recovery by kind of document."""
    found = {(r["reducer"], r["keep"], r["kind"]): r["recovery"] for r in rows_of(name)}
    names = sorted({kind for _, _, kind in found if kind is not None})

    def of(kind: str) -> Column:
        return Column(kind, lambda r: f"{found[r['reducer'], r['keep'], kind]:.3f}")

    return Table([Column("reducer", text("reducer")), KEEP, *map(of, names)], overall(name, best))


def speed(rows: Sequence[Row]) -> Table:
    """Measured prefill speed beside the limit."""
    columns = [
        TOKENS, KEEP, Column("full", number("full_seconds", ".2f", unit=" s")),
        Column("reduced", number("reduced_seconds", ".2f", unit=" s")),
        Column("speed-up (quartiles)", interval("speedup", ".2f", unit="x", ends=QUARTILES)),
        Column("FLOPs allow", number("allowed_by_flops", ".2f", unit="x")),
        Column("of it", number("of_allowed", ".0f", scale=100, unit=" %")),
        Column("reducer's share", number("reducer_share", ".1f", scale=100, unit=" %")),
    ]  # fmt: skip
    return Table(columns, rows)


def needle(rows: Sequence[Row]) -> Table:
    """A fact in the middle: how often it is still found, in all and by where it stood."""
    rows = sorted(rows, key=lambda r: (-r["keep"], r["nll"]))

    def at(depth: str) -> Column:
        return Column(f"at {float(depth):.0%}", lambda r: f"{100 * r['exact_by_depth'][depth]:.0f} %")

    columns = [
        Column("reducer", unless(lambda r: r["keep"] >= 1, text("reducer"), "all tokens")), KEEP,
        Column("FLOPs", number("flops_ratio", ".2f")), Column("NLL of the code", number("nll", ".3f")),
        Column("code right", number("exact", ".0f", scale=100, unit=" %")), *map(at, rows[0]["exact_by_depth"]),
    ]  # fmt: skip
    return Table(columns, rows)


def block_causal(rows: Sequence[Row]) -> Table:
    """Perplexity with a bounded cache."""
    columns = [
        Column("reducer", text("reducer")), KEEP, Column("cache entries at the end", number("entries_at_end", ".0f")),
        Column("perplexity", number("perplexity", ".2f")),
        Column("extra nats per token", plus_minus("extra_nll", "+.4f", "_stderr")),
    ]  # fmt: skip
    return Table(columns, sorted(rows, key=lambda r: (-r["keep"], r["perplexity"])))


def prior_recovery() -> Table:
    """With the prior and without, and the share of what was lost that it wins back, document by document."""
    found = {(r["document"], r["reducer"], r["keep"]): r for r in rows_of("prior_recovery", "documents")}
    documents = sorted({key[0] for key in found})

    def back(r: Row) -> str:
        if r["reducer"] != "quickmerge+prior":
            return ""
        plain = [found[d, "quickmerge", r["keep"]] for d in documents]
        gain = np.array([p["nll"] - found[p["document"], r["reducer"], r["keep"]]["nll"] for p in plain])
        lost = np.array([p["nll"] - p["nll_full"] for p in plain])
        low, high = ratio_interval(gain, lost)
        return f"{100 * gain.sum() / lost.sum():.0f} % ({100 * low:.0f} to {100 * high:.0f})"

    columns = [
        Column("reducer", strong("reducer", lambda r: r["reducer"] == "quickmerge+prior")), KEEP, RECOVERY,
        Column("won back of what was lost", back), NLL, *COST,
    ]  # fmt: skip
    return Table(columns, overall("prior_recovery", best=1))


def prior_ablation(rows: Sequence[Row]) -> Table:
    """Short trainings that differ in one thing."""
    won = Column("won back", number("won_back", ".0f", scale=100, unit=" %"))
    rows = sorted(rows, key=lambda r: (r["keep"], -r["recovery"]))
    return Table([Column("variant", text("variant")), KEEP, RECOVERY, won, NLL], rows)


def prior_cost(rows: Sequence[Row]) -> Table:
    """The prior's own time beside what the prefill saves."""
    columns = [
        TOKENS, KEEP, *(
            Column(name, number(f"{key}_seconds", ".2f", unit=" s"))
            for name, key in (("full", "full"), ("quickmerge", "plain"), ("with prior", "prior"))
        ),
        Column("prior's own", number("prior_own_seconds", ".0f", scale=1e3, unit=" ms")),
        Column(
            "of what is saved (quartiles)",
            interval("share_of_saved", ".1f", scale=100, unit=" %", ends=QUARTILES, base="share"),
        ),
        Column("the same in FLOPs", number("flops_share_of_saved", ".1f", scale=100, unit=" %")),
    ]  # fmt: skip
    return Table(columns, rows)


def prior_budget(rows: Sequence[Row]) -> Table:
    """A fixed share against a budget that followed surprise, which is gone: the record of what it was worth."""
    gain = unless(lambda r: r["budget"] == "fixed share", plus_minus("gain", "+.4f", "_stderr"))
    columns = [
        Column("reducer", text("reducer")), KEEP, Column("budget", text("budget")),
        Column("entries at the end", number("entries_at_end", ".0f")),
        Column("perplexity", number("perplexity", ".2f")), Column("nats gained per token", gain),
    ]  # fmt: skip
    return Table(columns, rows)


def patch_merge() -> Table:
    """What GridMerge loses, and how far its slots reach, by what similarity counts."""
    rows = rows_of("patch_prior", "similarity")
    here = {(r["similarity"], r["keep"]): f"{100 * r['lost']:.0f} %, {100 * r['far']:.0f} %" for r in rows}

    def at(keep: float) -> Column:
        return Column(f"keep {keep:g}: lost, far", lambda r: here[r["similarity"], keep])

    columns = [Column("similarity counts", number("similarity")), *map(at, sorted({k for _, k in here}, reverse=True))]
    return Table(columns, [{"similarity": weight} for weight in sorted({weight for weight, _ in here})])


def patch_prior(rows: Sequence[Row]) -> Table:
    """Next-slot prediction of images per original patch."""

    def explained(name: str) -> Cell:
        there = plus_minus(f"{name}_explained", ".3f", "_stderr")
        return unless(lambda r: f"{name}_explained" not in r, there)

    columns = [
        Column("", lambda r: f"{r['kind']}: {r['way']}"), KEEP, Column("tokens", text("tokens")),
        Column("squared error x 1000", plus_minus("mse", ".1f", "_stderr", scale=1e3)),
        Column("explained", explained("mse")), Column("at most", number("floor_explained", ".3f")),
        Column("copy alone", explained("copy")), Column("FLOPs", number("flops_ratio", ".2f")),
        Column("time", number("seconds_ratio", ".2f")),
    ]  # fmt: skip
    return Table(columns, rows)


def vision_quality(rows: Sequence[Row]) -> Table:
    """Labels and features of a vision transformer by method at equal FLOPs."""
    columns = [
        Column("method", strong("method", lambda r: r["method"].startswith("quickmerge"))),
        Column("GMAC share", number("ratio", ".2f")), Column("tokens left", number("tokens_out", ".0f")),
        Column("accuracy (95 %)", interval("accuracy", ".3f")),
        Column("change (paired)", unless(is_full, interval("accuracy_change", ".3f"))),
        Column("pooled features", interval("pooled", ".4f")), Column("patch features", interval("patches", ".3f")),
    ]  # fmt: skip
    rows = sorted(rows, key=lambda r: (-(r["asked"] or r["ratio"]), -r["accuracy"], -r["pooled"]))
    return Table(columns, rows)


def vision_published(rows: Sequence[Row]) -> Table:
    """Features of photographs by the published form beside the default."""
    columns = [
        Column("method", strong("method", lambda r: r["method"].startswith("quickmerge"))),
        Column("FLOPs", number("ratio", ".2f")),
        Column("pooled features", interval("pooled", ".3f")), Column("patch features", interval("patches", ".3f")),
    ]  # fmt: skip
    return Table(columns, [r for r in rows if r["method"] != "full"])


def vision_speed(rows: Sequence[Row]) -> Table:
    """Time of a vision transformer by method beside what FLOPs allow."""
    columns = [
        Column("method", text("method")), Column("batch", text("batch")),
        Column("time", number("seconds", ".0f", scale=1e3, unit=" ms")),
        Column("speed-up (quartiles)", interval("speedup", ".2f", unit="x")),
        Column("FLOPs allow", number("limit", ".2f", unit="x")),
        Column("aim", unless(lambda r: not r["aim"], number("aim", ".2f", unit="x"))),
    ]  # fmt: skip
    return Table(columns, rows)


def vision_video(rows: Sequence[Row]) -> Table:
    """What is left of a video's features when patches are merged across time."""
    features = Column("patch features (95 %)", interval("fidelity", ".3f", ends=("low", "high"), base=""))
    rows = sorted(rows, key=lambda r: (-r["keep"], -r["fidelity"]))
    return Table([Column("method", text("method")), KEEP, features], rows)


VISUAL = Column("visual tokens", number("visual_kept", ".0f"))
CHANGE = Column("change (paired)", unless(is_full, interval("change", "+.1f", scale=100)))


def asked(rows: Sequence[Row], unit: str = "") -> list[Column]:
    """A column of right answers for each kind of question."""

    def of(kind: str) -> Column:
        return Column(kind, lambda r: f"{100 * r['kinds'][kind]['exact']:.0f}{unit}")

    return [of(kind) for kind in rows[0]["kinds"]]


def vlm_quality(data: str = "scenes") -> Table:
    """Right answers of a vision-language model by method, share of the visual tokens and kind of question."""
    rows = sorted(
        (r for r in rows_of("vlm_quality") if r["data"] == data), key=lambda r: (-r["keep"], -r["exact"])
    )  # fmt: skip
    right = Column("right answers (95 %)", interval("exact", ".1f", scale=100, unit=" %"))
    return Table([method(), VISUAL, right, CHANGE, *asked(rows, " %")], rows)


def vlm_mosaics() -> Table:
    """The same on photographs."""
    return vlm_quality("mosaics")


def vlm_speed() -> Table:
    """Seconds from an image to the first token by method, and where they go."""
    columns = [
        method(), VISUAL, Column("image to first token", number("seconds", ".0f", scale=1e3, unit=" ms")),
        Column("speed-up (quartiles)", interval("speedup", ".2f", unit="x")),
        Column("vision tower", number("tower_seconds", ".0f", scale=1e3, unit=" ms")),
        Column("language model", number("prefill_seconds", ".0f", scale=1e3, unit=" ms")),
        Column("reducer", number("reducer_seconds", ".1f", scale=1e3, unit=" ms")),
        Column("cache", number("cache_bytes", ".1f", scale=MIB, unit=" MiB")),
    ]  # fmt: skip
    rows = sorted(rows_of("vlm_quality"), key=lambda r: (-r["keep"], r["seconds"]))
    return Table(columns, [r for r in rows if r["data"] == "scenes"])


def vlm_places(rows: Sequence[Row]) -> Table:
    """Where in a vision-language model visual tokens are reduced."""
    right = Column("right", number("exact", ".1f", scale=100, unit=" %"))
    return Table([method("where"), right, CHANGE, *asked(rows)], rows)


def vlm_places_cost(rows: Sequence[Row]) -> Table:
    """What merging at several places of a vision-language model saves."""
    columns = [
        Column("merged", text("method")),
        Column("tokens in the tower", number("tower_tokens", ".0f")),
        Column("visual tokens", number("visual", ".0f")),
        Column("tokens in the language model", number("text_tokens", ".0f")),
        Column("tower", number("tower_flops", ".1f", scale=1e-9, unit=" GFLOPs")),
        Column("language model", number("text_flops", ".1f", scale=1e-9, unit=" GFLOPs")),
        Column("both", number("flops_ratio", ".0f", scale=100, unit=" %")),
        Column("cache", number("cache_bytes", ".1f", scale=MIB, unit=" MiB")),
    ]
    return Table(columns, rows)


def selection(rows: Sequence[Row]) -> Table:
    """What choosing visual tokens costs, beside the plain way to the same choice."""
    columns = [
        Column("method", text("method")), TOKENS, Column("kept", text("keep")),
        Column("here", number("seconds", ".1f", scale=1e3, unit=" ms")),
        Column("as in the paper, vectorised", number("plain_seconds", ".1f", scale=1e3, unit=" ms")),
        Column("ratio (quartiles)", interval("speedup", ".2f", unit="x")),
    ]  # fmt: skip
    return Table(columns, rows)


def subsets(rows: Sequence[Row]) -> Table:
    """Greedy choices beside the best of all subsets."""
    columns = [
        Column("greedy", text("objective")), Column("tokens", lambda r: f"{r['keep']} of {r['tokens']}"),
        Column("subsets", number("subsets", ",")), Column("of the best, mean", number("mean", ".3f")),
        Column("worst of 40 draws", number("least", ".3f")),
    ]  # fmt: skip
    return Table(columns, rows)


# What recognised labels score over seeds. A row holds what was found by each seed.


def _spread(values: Sequence[float], digits: int = 3) -> str:
    """Mean and standard deviation over seeds."""
    mean = f"{np.mean(values):.{digits}f}"
    return f"{mean} ± {np.std(values, ddof=1):.{digits}f}" if len(values) > 1 else mean


def _over(name: str, *path: str) -> Column:
    """A score by mean and deviation over what was found."""

    def cell(r: Row) -> str:
        values = r["found"]
        for key in path:
            values = [value[key] for value in values]
        return _spread(values)

    return Column(name, cell)


LABELS = [
    _over("recall at as many as there are", "exact_at_own", "recall"), _over("at 5", "exact_at", "5", "recall"),
    _over("at 10", "exact_at", "10", "recall"), _over("precision of all", "exact", "precision"),
    Column("R / P by meaning", lambda r: " / ".join(
        f"{np.mean([one['meaning'][what] for one in r['found']]):.3f}" for what in ("recall", "precision"))),
    _over("F1", "meaning", "f1"),
    Column("its floor", lambda r: f"{np.mean([one['floor']['f1'] for one in r['found']]):.3f}"),
]  # fmt: skip
"""Exact recall and precision, then F1 by meaning and its floor."""


def _recognition() -> dict[str, list[Row]]:
    """The runs of the recognition benchmark by variant."""
    grouped: dict[str, list[Row]] = {}
    for run in rows_of("recognition", "runs"):
        grouped.setdefault(run["variant"], []).append(run)
    return grouped


def recognition_ways() -> Table:
    """Ways to get labels out of a recogniser."""
    rows = [
        {"name": name, "way": way, "found": [run["ways"][way] for run in runs]}
        for name, runs in _recognition().items() if name == "paper" or name.startswith("reference")
        for way in runs[0]["ways"]
    ]  # fmt: skip
    return Table([Column("trained with", text("name")), Column("decoded by", text("way")), *LABELS], rows)


def recognition_ablation() -> Table:
    """Depth, masks and objectives of a recogniser, all decoded by one-shot sampling."""
    rows = [
        {**runs[0], "found": [run["ways"]["one-shot"] for run in runs],
         "seconds": _spread([run["train_seconds"] for run in runs], 0)}
        for runs in _recognition().values()
    ]  # fmt: skip
    columns = [
        Column("variant", text("variant")), Column("blocks", text("blocks")), Column("image tokens", text("tokens")),
        *LABELS, Column("training", lambda r: f"{r['seconds']} s"),
    ]  # fmt: skip
    return Table(columns, rows)


def recognition_times() -> Table:
    """Seconds to decode an image by way, beside one-shot sampling with a cache."""
    rows = [
        {"name": name, "way": way, "each": [run["times"][way] for run in runs]}
        for name, runs in _recognition().items() for way in runs[0].get("times", {})
    ]  # fmt: skip
    columns = [
        Column("trained with", text("name")), Column("decoded by", text("way")),
        Column("median of an image", lambda r: f"{1e3 * np.mean([one['seconds'] for one in r['each']]):.0f} ms"),
        Column("beside one-shot", lambda r: f"{_spread([one['ratio'] for one in r['each']], 2)}x"),
    ]  # fmt: skip
    return Table(columns, rows)


def recognition_tokens(rows: Sequence[Row]) -> Table:
    """The recogniser of the committed recipe, with all image tokens and with fewer."""
    columns = [
        Column("images", text("data")), Column("method", text("reducer")), KEEP,
        Column("image tokens", number("tokens", ".0f")), *LABELS,
        Column("decoding", number("decode_seconds", ".0f", scale=1e3, unit=" ms")),
    ]  # fmt: skip
    return Table(columns, [{**r, "found": [r]} for r in rows])


def recognition_kinds() -> Table:
    """What that recogniser finds among its ten best, by what the labels name."""
    found = {(r["data"], r["kind"], r["way"]): r for r in rows_of("recognizer_tokens", "kinds")}

    def share(way: str) -> Cell:
        return lambda r: f"{found[r['data'], r['kind'], way]['found'] / r['labels']:.3f}"

    columns = [
        Column("images", text("data")), Column("labels of kind", text("kind")), Column("number", text("labels")),
        *(Column(f"found by {way}", share(way)) for way in ("one-shot", "best-first")),
    ]  # fmt: skip
    return Table(columns, [r for r in found.values() if r["way"] == "one-shot"])


def how_models_come(rows: Sequence[Row]) -> Table:
    """Recovery of one model in several forms, each beside its own NLL."""
    columns = [
        Column("comes as", text("form")), KEEP, RECOVERY, Column("NLL reduced", number("nll", ".3f")),
        Column("all tokens", number("nll_full", ".3f")), Column("no context", number("nll_none", ".3f")),
    ]  # fmt: skip
    return Table(columns, rows)


def precision(rows: Sequence[Row]) -> Table:
    """One model in several dtypes: quality, exact match with float32, and how many times as fast passes are."""
    columns = [
        Column("dtype", text("form")), RECOVERY, Column("NLL, all tokens", number("nll_full", ".3f")),
        Column("tokens as float32", number("same_tokens", ".0f", scale=100, unit=" %")),
        *(
            Column(name, number(f"{key}_speedup", ".2f", unit="x"))
            for name, key in (("a step", "step"), ("four tokens", "four"), ("a piece of a prompt", "piece"))
        ),
    ]  # fmt: skip
    return Table(columns, rows)


def matrix() -> Table:
    """The support matrix that the tests hold: families down, attention and cache across."""
    cells: dict[str, str] = json.loads((HERE.parent / "tests" / "merge" / "matrix.json").read_text(encoding="utf-8"))
    split = {tuple(key.split(" / ")): result for key, result in cells.items()}

    def of(attention: str, cache: str) -> Column:
        def cell(r: Row) -> str:
            found = {key[2]: result for key, result in split.items() if (*key[:2], key[3]) == (
                r["family"], attention, cache)}  # fmt: skip
            passing = sorted(padding for padding, result in found.items() if result == "pass")
            if not found:
                return ""
            return "padding " + ", ".join(passing) if passing else "raises"

        return Column(f"{attention}, cache {cache}", cell)

    across = sorted({(key[1], key[3]) for key in split}, key=lambda c: (c[0] == "flex_attention", c))
    columns = [Column("family", text("family")), *(of(*one) for one in across)]
    return Table(columns, [{"family": family} for family in sorted({key[0] for key in split})])


def families() -> Table:
    """What was proven of every family of language models, the most used first."""

    def of(capability: str) -> Column:
        return Column(capability.replace("_", "-"), text(capability))

    found = [{"family": family, **cells} for family, cells in family_rows().items()]
    return Table([Column("family", text("family")), *map(of, CAPABILITIES)], found)


def made_of(result: str, make: Callable[[Any], Table], key: str | None = "rows") -> Table | None:
    """What ``make`` makes of the rows of a result file, another of its lists, or all of it; None: it is missing."""
    file = HERE / "results" / f"{result}.json"
    if not file.is_file():
        return None
    return make(json.loads(file.read_text(encoding="utf-8")) if key is None else rows_of(result, key))


OWN: dict[str, tuple[str, Callable[[Sequence[Row]], Table], str]] = {
    "speed": ("prefill_speed", speed, "rows"),
    "prior_needle": ("prior_needle", needle, "rows"),
    "block_causal": ("block_causal", block_causal, "rows"),
    "how_models_come": ("how_models_come", how_models_come, "rows"),
    "precision": ("precision", precision, "rows"),
    "prior_ablation": ("prior_ablation", prior_ablation, "rows"),
    "prior_cost": ("prior_cost", prior_cost, "rows"),
    "prior_budget": ("prior_budget", prior_budget, "rows"),
    "patch_prior": ("patch_prior", patch_prior, "rows"),
    "vision_quality": ("vision_quality", vision_quality, "rows"),
    "vision_fashion": ("vision_fashion", vision_quality, "rows"),
    "vision_published": ("vision_published", vision_published, "rows"),
    "vision_speed": ("vision_speed", vision_speed, "rows"),
    "vision_video": ("vision_video", vision_video, "rows"),
    "vlm_places": ("vlm_places", vlm_places, "rows"),
    "vlm_places_cost": ("vlm_places_cost", vlm_places_cost, "rows"),
    "selection": ("selection", selection, "rows"),
    "subsets": ("selection", subsets, "subsets"),
    "recognition_tokens": ("recognizer_tokens", recognition_tokens, "rows"),
}
"""By the name in the docs: the result file, what makes the table of it, and the list that it is made of."""
TABLES: dict[str, Callable[[], Table | None]] = {
    make.__name__: make
    for make in (
        matrix, families, prior_recovery, patch_merge, recognition_ways, recognition_ablation,
        recognition_times, recognition_kinds, vlm_quality, vlm_mosaics, vlm_speed, vision_zoo, vision_refused,
    )
}  # fmt: skip
TABLES["prior_kinds"] = partial(kinds, "prior_recovery", 1)
TABLES |= BUDGETS | VLM_ZOO | HARNESS | LITERALS
MADE = OWN | MULTIPOLE | GUMIHO | CALM | TRANSPLANT | TRUST | RECIPES | SERVER | WAITS | CURVES | CPU
TABLES |= {name: partial(made_of, *of) for name, of in MADE.items()}


def written(name: str) -> str:
    """The table of that name in Markdown."""
    table = TABLES[name]()
    return "*Not measured yet.*\n" if table is None else table.markdown()


def main() -> int:
    """Rewrite the pages, or with ``--check`` only say which are stale."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true")
    check = parser.parse_args().check
    stale = []
    for page in PAGES:
        text = page.read_text(encoding="utf-8")
        fresh = BLOCK.sub(lambda m: m[1] + written(m[2]) + m[4], text)
        if fresh != text:
            stale.append(page.relative_to(HERE.parent).as_posix())
            if not check:
                page.write_text(fresh, encoding="utf-8")
    print("stale: " + ", ".join(stale) if stale else "the tables are up to date")
    return int(check and bool(stale))


if __name__ == "__main__":
    sys.exit(main())
