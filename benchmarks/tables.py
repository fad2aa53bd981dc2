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
from calm_tables import CALM
from gumiho_tables import GUMIHO
from multipole_tables import MULTIPOLE
from transplant_tables import TRANSPLANT
from trust_tables import TRUST

from quickmerge.bench.quality import bootstrap

HERE = Path(__file__).parent
PAGES = [HERE.parent / "README.md", *sorted((HERE.parent / "docs").glob("*.md"))]
BLOCK = re.compile(r"(<!-- table:(\w+) -->\n)(.*?)(<!-- /table -->)", re.S)
Row = dict[str, Any]


def rows_of(name: str, key: str = "rows") -> list[Row]:
    """The rows of a result file, or another of its lists."""
    data: dict[str, Any] = json.loads((HERE / "results" / f"{name}.json").read_text(encoding="utf-8"))
    rows: list[Row] = data[key]
    return rows


def markdown(headers: list[str], body: list[list[str]]) -> str:
    """A Markdown table, numbers to the right."""
    lines = ["| " + " | ".join(headers) + " |", "| --- |" + " ---: |" * (len(headers) - 1)]
    return "\n".join(lines + ["| " + " | ".join(row) + " |" for row in body]) + "\n"


def overall() -> list[Row]:
    """Context recovery over all documents, best first at each keep."""
    rows = [r for r in rows_of("context_recovery") if r["kind"] is None]
    return sorted(rows, key=lambda r: (r["keep"], -r["recovery"]))


def recovery() -> str:
    """Every reducer at every keep."""
    body = [
        [
            f"**{r['reducer']}**" if r["reducer"] == "quickmerge" else r["reducer"],
            f"{r['keep']:g}",
            f"{r['recovery']:.3f} ({r['recovery_low']:.3f} to {r['recovery_high']:.3f})",
            f"{r['nll']:.3f}",
            f"{r['flops_ratio']:.3f}",
            f"{r['prefill_speedup']:.2f}x",
            f"{1e3 * r['reducer_seconds']:.0f} ms",
            f"{r['cache_bytes'] / 2**20:.1f} MiB ({r['cache_ratio']:.2f})",
        ]
        for r in overall()
    ]
    headers = ["reducer", "keep", "recovery (95 % interval)", "NLL", "FLOPs", "prefill", "reducer", "cache"]
    return markdown(headers, body)


def kinds() -> str:
    """Recovery by kind of document."""
    rows = rows_of("context_recovery")
    names = sorted({r["kind"] for r in rows if r["kind"] is not None})
    body = []
    for r in overall():
        same = {k["kind"]: k for k in rows if (k["reducer"], k["keep"]) == (r["reducer"], r["keep"])}
        body.append([r["reducer"], f"{r['keep']:g}", *(f"{same[n]['recovery']:.3f}" for n in names)])
    return markdown(["reducer", "keep", *names], body)


def paired() -> str:
    """QuickMerge less the best baseline, document by document, with the interval of that difference."""
    data = rows_of("context_recovery", "documents")
    found = {(r["document"], r["reducer"], r["keep"]): r for r in data}
    kinds = sorted({r["kind"] for r in data})
    body = []
    for keep in sorted({r["keep"] for r in data}):
        rival = next(r["reducer"] for r in overall() if r["keep"] == keep and r["reducer"] != "quickmerge")
        cells = []
        for kind in (None, *kinds):
            mine = [r for r in data if (r["reducer"], r["keep"]) == ("quickmerge", keep) and kind in (None, r["kind"])]
            gain = np.array([found[r["document"], rival, keep]["nll"] - r["nll"] for r in mine])
            worth = np.array([r["nll_none"] - r["nll_full"] for r in mine])
            low, high = bootstrap(gain, worth, resamples=2000, seed=0)
            cells.append(f"{gain.sum() / worth.sum():+.3f} ({low:+.3f} to {high:+.3f})")
        body.append([f"{keep:g}", rival, *cells])
    return markdown(["keep", "best baseline", "all", *kinds], body)


def short() -> str:
    """QuickMerge alone, for the README."""
    rows = [r for r in overall() if r["reducer"] == "quickmerge"]
    full = rows[0]
    rivals = [r for r in overall() if r["reducer"] != "quickmerge"]
    best = {r["keep"]: r for r in sorted(rivals, key=lambda r: float(r["recovery"]))}
    body = [["1 (all tokens)", "1.000", f"{full['nll_full']:.3f}", "1.00", "1.00x", "1.00", ""]]
    body += [
        [
            f"{r['keep']:g}",
            f"{r['recovery']:.3f}",
            f"{r['nll']:.3f}",
            f"{r['flops_ratio']:.2f}",
            f"{r['prefill_speedup']:.2f}x",
            f"{r['cache_ratio']:.2f}",
            f"{best[r['keep']]['recovery']:.3f} ({best[r['keep']]['reducer']})",
        ]
        for r in sorted(rows, key=lambda r: -r["keep"])
    ]
    body.append(["0 (no context)", "0.000", f"{full['nll_none']:.3f}", "", "", "", ""])
    return markdown(["keep", "recovery", "NLL", "prefill FLOPs", "prefill speed", "cache bytes", "best baseline"], body)


def speed() -> str:
    """Measured prefill speed beside the limit."""
    body = [
        [
            f"{r['tokens']:,}",
            f"{r['keep']:g}",
            f"{r['full_seconds']:.2f} s",
            f"{r['reduced_seconds']:.2f} s",
            f"{r['speedup']:.2f}x ({r['speedup_q1']:.2f} to {r['speedup_q3']:.2f})",
            f"{r['allowed_by_flops']:.2f}x",
            f"{100 * r['of_allowed']:.0f} %",
            f"{100 * r['reducer_share']:.1f} %",
        ]
        for r in rows_of("prefill_speed")
    ]
    headers = ["tokens", "keep", "full", "reduced", "speed-up (quartiles)", "FLOPs allow", "of it", "reducer's share"]
    return markdown(headers, body)


def prior_needle() -> str:
    """The same with the prior and without."""
    return needle("prior_needle")


def needle(name: str = "needle") -> str:
    """A fact in the middle: how often it is still found, in all and by where it stood."""
    rows = sorted(rows_of(name), key=lambda r: (-r["keep"], r["nll"]))
    depths = list(rows[0]["exact_by_depth"])
    body = [
        [
            r["reducer"] if r["keep"] < 1 else "all tokens",
            f"{r['keep']:g}",
            f"{r['flops_ratio']:.2f}",
            f"{r['nll']:.3f}",
            f"{100 * r['exact']:.0f} %",
            *(f"{100 * r['exact_by_depth'][d]:.0f} %" for d in depths),
        ]
        for r in rows
    ]
    headers = ["reducer", "keep", "FLOPs", "NLL of the code", "code right", *(f"at {float(d):.0%}" for d in depths)]
    return markdown(headers, body)


def block_causal() -> str:
    """Perplexity with a bounded cache."""
    rows = sorted(rows_of("block_causal"), key=lambda r: (-r["keep"], r["perplexity"]))
    body = [
        [
            r["reducer"],
            f"{r['keep']:g}",
            f"{r['entries_at_end']:.0f}",
            f"{r['perplexity']:.2f}",
            f"{r['extra_nll']:+.4f} ± {r['extra_nll_stderr']:.4f}",
        ]
        for r in rows
    ]
    return markdown(["reducer", "keep", "cache entries at the end", "perplexity", "extra nats per token"], body)


def prior_recovery() -> str:
    """With the prior and without, and the share of what was lost that it wins back, document by document."""
    rows = sorted((r for r in rows_of("prior_recovery") if r["kind"] is None), key=lambda r: (r["keep"], r["recovery"]))
    found = {(r["document"], r["reducer"], r["keep"]): r for r in rows_of("prior_recovery", "documents")}
    documents = sorted({key[0] for key in found})
    body = []
    for r in rows:
        back = ""
        if r["reducer"] == "quickmerge+prior":
            plain = [found[d, "quickmerge", r["keep"]] for d in documents]
            gain = np.array([p["nll"] - found[p["document"], r["reducer"], r["keep"]]["nll"] for p in plain])
            lost = np.array([p["nll"] - p["nll_full"] for p in plain])
            low, high = bootstrap(gain, lost, resamples=2000, seed=0)
            back = f"{100 * gain.sum() / lost.sum():.0f} % ({100 * low:.0f} to {100 * high:.0f})"
        body.append([
            f"**{r['reducer']}**" if back else r["reducer"], f"{r['keep']:g}",
            f"{r['recovery']:.3f} ({r['recovery_low']:.3f} to {r['recovery_high']:.3f})", back, f"{r['nll']:.3f}",
            f"{r['flops_ratio']:.3f}", f"{r['prefill_speedup']:.2f}x", f"{1e3 * r['reducer_seconds']:.0f} ms",
        ])  # fmt: skip
    headers = ["reducer", "keep", "recovery (95 % interval)", "won back of what was lost", "NLL", "FLOPs", "prefill",
               "reducer"]  # fmt: skip
    return markdown(headers, body)


def prior_kinds() -> str:
    """Recovery with the prior and without by kind of document."""
    rows = rows_of("prior_recovery")
    kinds = sorted({r["kind"] for r in rows if r["kind"] is not None})
    body = []
    for r in sorted((r for r in rows if r["kind"] is None), key=lambda r: (r["keep"], r["recovery"])):
        same = {k["kind"]: k for k in rows if (k["reducer"], k["keep"]) == (r["reducer"], r["keep"])}
        body.append([r["reducer"], f"{r['keep']:g}", *(f"{same[n]['recovery']:.3f}" for n in kinds)])
    return markdown(["reducer", "keep", *kinds], body)


def prior_ablation() -> str:
    """Short trainings that differ in one thing."""
    body = [
        [
            r["variant"],
            f"{r['keep']:g}",
            f"{r['recovery']:.3f} ({r['recovery_low']:.3f} to {r['recovery_high']:.3f})",
            f"{100 * r['won_back']:.0f} %",
            f"{r['nll']:.3f}",
        ]
        for r in sorted(rows_of("prior_ablation"), key=lambda r: (r["keep"], -r["recovery"]))
    ]
    return markdown(["variant", "keep", "recovery (95 % interval)", "won back", "NLL"], body)


def prior_cost() -> str:
    """The prior's own time beside what the prefill saves."""
    body = [
        [
            f"{r['tokens']:,}",
            f"{r['keep']:g}",
            f"{r['full_seconds']:.2f} s",
            f"{r['plain_seconds']:.2f} s",
            f"{r['prior_seconds']:.2f} s",
            f"{1e3 * r['prior_own_seconds']:.0f} ms",
            f"{100 * r['share_of_saved']:.1f} % ({100 * r['share_q1']:.1f} to {100 * r['share_q3']:.1f})",
            f"{100 * r['flops_share_of_saved']:.1f} %",
        ]
        for r in rows_of("prior_cost")
    ]
    headers = ["tokens", "keep", "full", "quickmerge", "with prior", "prior's own", "of what is saved (quartiles)",
               "the same in FLOPs"]  # fmt: skip
    return markdown(headers, body)


def prior_budget() -> str:
    """A fixed share against a budget that follows surprise."""
    body = [
        [
            r["reducer"],
            f"{r['keep']:g}",
            r["budget"],
            f"{r['entries_at_end']:.0f}",
            f"{r['perplexity']:.2f}",
            f"{r['gain']:+.4f} ± {r['gain_stderr']:.4f}" if r["budget"] != "fixed share" else "",
        ]
        for r in rows_of("prior_budget")
    ]
    headers = ["reducer", "keep", "budget", "entries at the end", "perplexity", "nats gained per token"]
    return markdown(headers, body)


def patch_merge() -> str:
    """What GridMerge loses, and how far its slots reach, by what similarity counts."""
    rows = rows_of("patch_prior", "similarity")
    keeps = sorted({r["keep"] for r in rows}, reverse=True)
    body = []
    for weight in sorted({r["similarity"] for r in rows}):
        here = {r["keep"]: r for r in rows if r["similarity"] == weight}
        body.append([f"{weight:g}", *(f"{100 * here[k]['lost']:.0f} %, {100 * here[k]['far']:.0f} %" for k in keeps)])
    return markdown(["similarity counts", *(f"keep {keep:g}: lost, far" for keep in keeps)], body)


def patch_prior() -> str:
    """Next-slot prediction of pictures per original patch."""

    def share(row: Row, name: str) -> str:
        if f"{name}_explained" not in row:
            return ""
        error = f" ± {row[f'{name}_explained_stderr']:.3f}" if name != "floor" else ""
        return f"{row[f'{name}_explained']:.3f}{error}"

    body = [
        [
            f"{r['kind']}: {r['way']}",
            f"{r['keep']:g}",
            str(r["tokens"]),
            f"{1e3 * r['mse']:.1f} ± {1e3 * r['mse_stderr']:.1f}",
            share(r, "mse"),
            share(r, "floor"),
            share(r, "copy"),
            f"{r['flops_ratio']:.2f}",
            f"{r['seconds_ratio']:.2f}",
        ]
        for r in rows_of("patch_prior")
    ]
    headers = ["", "keep", "tokens", "squared error x 1000", "explained", "at most", "copy alone", "operations", "time"]
    return markdown(headers, body)


def _with_interval(row: Row, key: str, digits: int) -> str:
    low, high = (f"{row[f'{key}_{end}']:.{digits}f}" for end in ("low", "high"))
    return f"{row[key]:.{digits}f} ({low} to {high})"


def vision_quality(name: str = "vision_quality") -> str:
    """Labels and features of a vision transformer by method at equal operations."""
    body = []
    for r in sorted(rows_of(name), key=lambda r: (-(r["asked"] or r["ratio"]), -r["correct"], -r["pooled"])):
        change = "" if r["method"] == "full" else _with_interval(r, "correct_change", 3)
        body.append([
            f"**{r['method']}**" if r["method"].startswith("quickmerge") else r["method"],
            f"{r['ratio']:.2f}",
            f"{r['tokens_out']:.0f}",
            _with_interval(r, "correct", 3),
            change,
            _with_interval(r, "pooled", 4),
            _with_interval(r, "patches", 3),
        ])  # fmt: skip
    headers = ["method", "GMAC share", "tokens left", "accuracy (95 %)", "change (paired)", "pooled features",
               "patch features"]  # fmt: skip
    return markdown(headers, body)


def vision_fashion() -> str:
    """The same on Fashion-MNIST."""
    return vision_quality("vision_fashion")


def vision_speed() -> str:
    """Time of a vision transformer by method beside what operations allow."""
    body = [
        [
            r["method"],
            f"{r['batch']}",
            f"{1e3 * r['seconds']:.0f} ms",
            f"{r['speedup']:.2f}x ({r['speedup_low']:.2f} to {r['speedup_high']:.2f})",
            f"{r['limit']:.2f}x",
            f"{r['aim']:.2f}x" if r["aim"] else "",
        ]
        for r in rows_of("vision_speed")
    ]
    return markdown(["method", "batch", "time", "speed-up (quartiles)", "operations allow", "aim"], body)


def vision_video() -> str:
    """What is left of a video's features when patches are merged across time."""
    rows = sorted(rows_of("vision_video"), key=lambda r: (-r["keep"], -r["fidelity"]))
    body = [[r["method"], f"{r['keep']:g}", f"{r['fidelity']:.3f} ({r['low']:.3f} to {r['high']:.3f})"] for r in rows]
    return markdown(["method", "keep", "patch features (95 %)"], body)


def vlm_quality(data: str = "scenes") -> str:
    """Right answers of a vision-language model by method, share of the visual tokens and kind of question."""
    rows = [r for r in rows_of("vlm_quality") if r["data"] == data]
    kinds = list(rows[0]["kinds"])
    body = []
    for r in sorted(rows, key=lambda r: (-r["keep"], -r["exact"])):
        full = r["method"] == "full"
        body.append([
            "all tokens" if full else r["method"],
            f"{r['visual_kept']:.0f}",
            f"{100 * r['exact']:.1f} % ({100 * r['exact_low']:.1f} to {100 * r['exact_high']:.1f})",
            "" if full else f"{100 * r['change']:+.1f} ({100 * r['change_low']:+.1f} to {100 * r['change_high']:+.1f})",
            *(f"{100 * r['kinds'][kind]['exact']:.0f} %" for kind in kinds),
        ])  # fmt: skip
    return markdown(["method", "visual tokens", "right answers (95 %)", "change (paired)", *kinds], body)


def vlm_mosaics() -> str:
    """The same on photographs."""
    return vlm_quality("mosaics")


def vlm_speed() -> str:
    """Seconds from a picture to the first token by method, and where they go."""
    body = [
        [
            "all tokens" if r["method"] == "full" else r["method"],
            f"{r['visual_kept']:.0f}",
            f"{1e3 * r['seconds']:.0f} ms",
            f"{r['speedup']:.2f}x ({r['speedup_low']:.2f} to {r['speedup_high']:.2f})",
            f"{1e3 * r['tower_seconds']:.0f} ms",
            f"{1e3 * r['prefill_seconds']:.0f} ms",
            f"{1e3 * r['reducer_seconds']:.1f} ms",
            f"{r['cache_bytes'] / 2**20:.1f} MiB",
        ]
        for r in sorted(rows_of("vlm_quality"), key=lambda r: (-r["keep"], r["seconds"]))
        if r["data"] == "scenes"
    ]
    headers = ["method", "visual tokens", "picture to first token", "speed-up (quartiles)", "vision tower",
               "language model", "reducer", "cache"]  # fmt: skip
    return markdown(headers, body)


def vlm_places() -> str:
    """Where in a vision-language model visual tokens are reduced."""
    body = [
        [
            "all tokens" if r["method"] == "full" else r["method"],
            f"{100 * r['exact']:.1f} %",
            "" if r["method"] == "full" else _change(r),
            *(f"{100 * kind['exact']:.0f}" for kind in r["kinds"].values()),
        ]
        for r in rows_of("vlm_places")
    ]
    kinds = list(rows_of("vlm_places")[0]["kinds"])
    return markdown(["where", "right", "change (paired)", *kinds], body)


def _change(r: Row) -> str:
    return f"{100 * r['change']:+.1f} ({100 * r['change_low']:+.1f} to {100 * r['change_high']:+.1f})"


def selection() -> str:
    """What choosing visual tokens costs, beside the plain way to the same choice."""
    body = [
        [
            r["method"],
            f"{r['tokens']:,}",
            f"{r['keep']}",
            f"{1e3 * r['seconds']:.1f} ms",
            f"{1e3 * r['plain_seconds']:.1f} ms",
            f"{r['speedup']:.2f}x ({r['speedup_low']:.2f} to {r['speedup_high']:.2f})",
        ]
        for r in rows_of("selection")
    ]
    return markdown(["method", "tokens", "kept", "here", "as in the paper, vectorised", "ratio (quartiles)"], body)


def subsets() -> str:
    """Greedy choices beside the best of all subsets."""
    body = [
        [r["objective"], f"{r['keep']} of {r['tokens']}", f"{r['subsets']:,}", f"{r['mean']:.3f}", f"{r['least']:.3f}"]
        for r in rows_of("selection", "subsets")
    ]
    return markdown(["greedy", "tokens", "subsets", "of the best, mean", "worst of 40 draws"], body)


def _spread(values: list[float], digits: int = 3) -> str:
    """Mean and standard deviation over seeds."""
    mean = f"{np.mean(values):.{digits}f}"
    return f"{mean} ± {np.std(values, ddof=1):.{digits}f}" if len(values) > 1 else mean


def _labels(found: list[Row]) -> list[str]:
    """What recognised labels score over seeds: exact recall and precision, then F1 by meaning and its floor."""
    at = [_spread([r["exact_at"][k]["recall"] for r in found]) for k in ("5", "10")]
    own = _spread([r["exact_at_own"]["recall"] for r in found])
    precision = _spread([r["exact"]["precision"] for r in found])
    means = [_spread([r["meaning"][what] for r in found]) for what in ("recall", "precision", "f1")]
    floor = f"{np.mean([r['floor']['f1'] for r in found]):.3f}"
    return [own, *at, precision, " / ".join(mean.split(" ± ")[0] for mean in means[:2]), means[2], floor]


LABELS = ["recall at as many as there are", "at 5", "at 10", "precision of all", "R / P by meaning", "F1", "its floor"]


def _recognition() -> dict[str, list[Row]]:
    """The runs of the recognition benchmark by variant."""
    grouped: dict[str, list[Row]] = {}
    for run in rows_of("recognition", "runs"):
        grouped.setdefault(run["variant"], []).append(run)
    return grouped


def recognition_ways() -> str:
    """Ways to get labels out of a recogniser."""
    body = []
    for name, runs in _recognition().items():
        if name == "paper" or name.startswith("reference"):
            body += [[name, way, *_labels([run["ways"][way] for run in runs])] for way in runs[0]["ways"]]
    return markdown(["trained with", "decoded by", *LABELS], body)


def recognition_ablation() -> str:
    """Depth, masks and objectives of a recogniser, all decoded by one-shot sampling."""
    body = []
    for name, runs in _recognition().items():
        seconds = _spread([run["train_seconds"] for run in runs], 0)
        body.append([name, f"{runs[0]['blocks']}", f"{runs[0]['tokens']}",
                     *_labels([run["ways"]["one-shot"] for run in runs]), f"{seconds} s"])  # fmt: skip
    return markdown(["variant", "blocks", "image tokens", *LABELS, "training"], body)


def recognition_times() -> str:
    """Seconds to decode a picture by way, beside one-shot sampling with a cache."""
    body = []
    for name, runs in _recognition().items():
        for way in runs[0].get("times", {}):
            each = [run["times"][way] for run in runs]
            seconds = f"{1e3 * np.mean([r['seconds'] for r in each]):.0f} ms"
            body.append([name, way, seconds, f"{_spread([r['ratio'] for r in each], 2)}x"])
    return markdown(["trained with", "decoded by", "median of a picture", "beside one-shot"], body)


def recognition_tokens() -> str:
    """The recogniser of the committed recipe, with all image tokens and with fewer."""
    body = []
    for r in rows_of("recognizer_tokens"):
        seconds = f"{1e3 * r['decode_seconds']:.0f} ms"
        body.append([r["data"], r["reducer"], f"{r['keep']:g}", f"{r['tokens']:.0f}", *_labels([r]), seconds])
    return markdown(["pictures", "method", "keep", "image tokens", *LABELS, "decoding"], body)


def recognition_kinds() -> str:
    """What that recogniser finds among its ten best, by what the labels name."""
    found = {(r["data"], r["kind"], r["way"]): r for r in rows_of("recognizer_tokens", "kinds")}
    body = []
    for data, kind in dict.fromkeys((r["data"], r["kind"]) for r in found.values()):
        ways = [found[data, kind, way] for way in ("one-shot", "best-first")]
        body.append([data, kind, str(ways[0]["labels"]), *(f"{r['found'] / r['labels']:.3f}" for r in ways)])
    return markdown(["pictures", "labels of kind", "number", "found by one-shot", "found by best-first"], body)


def matrix() -> str:
    """The support matrix that the tests hold: families down, attention and cache across."""
    cells: dict[str, str] = json.loads((HERE.parent / "tests" / "merge" / "matrix.json").read_text(encoding="utf-8"))
    split = {tuple(key.split(" / ")): result for key, result in cells.items()}
    families = sorted({key[0] for key in split})
    columns = sorted({(key[1], key[3]) for key in split}, key=lambda c: (c[0] == "flex_attention", c))

    def cell(family: str, attention: str, cache: str) -> str:
        found = {
            key[2]: result for key, result in split.items() if (key[0], key[1], key[3]) == (family, attention, cache)
        }
        passing = [padding for padding, result in found.items() if result == "pass"]
        if not found:
            return ""
        return "padding " + ", ".join(sorted(passing)) if passing else "raises"

    headers = ["family", *(f"{attention}, cache {cache}" for attention, cache in columns)]
    return markdown(headers, [[f, *(cell(f, *column) for column in columns)] for f in families])


def made_of(result: str, make: Callable[[Sequence[Row]], tuple[list[str], list[list[str]]]], key: str = "rows") -> str:
    """A table that ``make`` makes of the rows of a result file, or of another of its lists."""
    if not (HERE / "results" / f"{result}.json").is_file():
        return "*Not measured yet.*\n"
    return markdown(*make(rows_of(result, key)))


TABLES: dict[str, Callable[[], str]] = {
    f.__name__: f
    for f in (
        recovery,
        kinds,
        paired,
        short,
        needle,
        speed,
        block_causal,
        matrix,
        prior_recovery,
        prior_kinds,
        prior_needle,
        prior_ablation,
        prior_cost,
        prior_budget,
        patch_merge,
        patch_prior,
        vision_quality,
        vision_fashion,
        vision_speed,
        vision_video,
        recognition_ways,
        recognition_ablation,
        recognition_times,
        recognition_tokens,
        recognition_kinds,
        vlm_quality,
        vlm_mosaics,
        vlm_speed,
        vlm_places,
        selection,
        subsets,
    )
}
TABLES |= {name: partial(made_of, *of) for name, of in (MULTIPOLE | GUMIHO | CALM | TRANSPLANT | TRUST).items()}


def main() -> int:
    """Rewrite the pages, or with ``--check`` only say which are stale."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true")
    check = parser.parse_args().check
    stale = []
    for page in PAGES:
        text = page.read_text(encoding="utf-8")
        fresh = BLOCK.sub(lambda m: m[1] + TABLES[m[2]]() + m[4], text)
        if fresh != text:
            stale.append(page.name)
            if not check:
                page.write_text(fresh, encoding="utf-8")
    print("stale: " + ", ".join(stale) if stale else "the tables are up to date")
    return int(check and bool(stale))


if __name__ == "__main__":
    sys.exit(main())
