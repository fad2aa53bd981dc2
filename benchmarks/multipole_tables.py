"""Tables of multipole attention: each takes the rows of a result and gives headers and cells."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

Row = dict[str, Any]
Table = tuple[list[str], list[list[str]]]

MANY = 10**5
"""A budget beyond this stands for all keys."""
PLAIN = ("multipole", "sparse", "runs of keys", "random clusters", "window", "window of as many bytes", "best keys")
"""What is compared with the usual settings, in this order."""


def context(rows: Sequence[Row]) -> Table:
    """How far each kind of attention is from full attention on long texts, by budget."""
    lengths = sorted({r["length"] for r in rows})
    longest = lengths[-1]
    body = []
    for name, budget, found in _by(rows, "length", PLAIN, {}):
        last = found[longest]
        body.append([name, _budget(budget), *(_spread(found[n], "kl", 4) for n in lengths),
                     f"{100 * last['agreement']:.1f} %", _spread(last, "extra", 4, sign=True)])  # fmt: skip
    dense = next(r for r in rows if r["name"] == "dense" and r["length"] == longest)
    headers = ["attention", "budget", *(f"KL, {n:,} tokens" for n in lengths), f"same first choice, {longest:,}",
               f"NLL above dense ({dense['nll']:.3f}), {longest:,}"]  # fmt: skip
    return headers, body


def variants(rows: Sequence[Row]) -> Table:
    """Settings of multipole attention: what each does to the distance from full attention."""
    lengths = sorted({r["length"] for r in rows})
    body = []
    for settings in _settings(rows):
        for name, budget, found in _by(rows, "length", ("multipole", "sparse"), settings):
            if name == "sparse" and settings:
                continue
            said = ", ".join(f"{k}={_number(v)}" for k, v in settings.items()) or "defaults"
            said = "replacement=False" if name == "sparse" else said
            kept = [f"{found[n]['kept']:.0f}" for n in lengths]
            body.append([said, _budget(budget), *(_spread(found[n], "kl", 4) for n in lengths), " / ".join(kept)])
    headers = ["setting", "budget", *(f"KL, {n:,} tokens" for n in lengths), "clustered keys read"]
    return headers, body


def retrieval(rows: Sequence[Row]) -> Table:
    """Nats per token of a span's second copy, and how many of its tokens are the first choice, by how far it is."""
    lengths = sorted({r["length"] for r in rows})
    body = []
    order: list[tuple[tuple[str, ...], Row]] = [(("dense", "dense, another span"), {}), (("multipole", "sparse"), {})]
    order += [(("multipole", "sparse"), {"space": "windowed"}), (PLAIN[2:], {})]
    for names, settings in order:
        for name, budget, found in _by(rows, "length", names, settings):
            said = name + "".join(f", {v}" for v in settings.values())
            body.append([said, _budget(budget), *(f"{_spread(found[n], 'nll', 2)} ({100 * found[n]['right']:.0f} %)"
                                                  for n in lengths)])  # fmt: skip
    return ["attention", "budget", *(f"NLL (right), after {n:,}" for n in lengths)], body


def generation(rows: Sequence[Row]) -> Table:
    """How far from full attention while a text goes on, by quarter, with the clusters updated or not."""
    names = tuple(dict.fromkeys(r["name"] for r in rows if r["name"] != "dense"))
    body = []
    for settings in _settings(rows):
        for name, budget, found in _by(rows, "quarter", names, settings):
            body.append([name, _budget(budget), *(_spread(found[q], "kl", 4) for q in range(1, 5)),
                         _spread(found[4], "extra", 4, sign=True), f"{found[4]['buffer']:.0f}"])  # fmt: skip
    body.sort(key=lambda row: int(row[1]) if row[1].isdigit() else MANY)
    return ["clusters", "budget", *(f"KL, quarter {q}" for q in range(1, 5)), "NLL above dense, last quarter",
            "keys in the buffer at most"], body  # fmt: skip


def step(rows: Sequence[Row]) -> Table:
    """One step of attention, dense and multipole."""
    body = []
    for r in rows:
        times = {name: f"{1e3 * s[1]:.2f}" for name, s in r["seconds"].items()}
        body.append([
            r["shape"], f"{r['tokens']:,}", *times.values(), _ratio(r, "speedup"), _ratio(r, "speedup_with_updates"),
            f"{r['dense_bytes'] / 2**20:.0f} / {r['multipole_bytes'] / 2**20:.0f} MiB",
            f"{r['allowed_by_bytes']:.1f}x", f"{100 * r['of_allowed']:.0f} %",
        ])  # fmt: skip
    names = [f"{name}, ms" for name in rows[0]["seconds"]]
    return ["shape", "tokens", *names, "ratio to the fastest dense (quartiles)", "with updates", "bytes read",
            "bytes allow", "of it"], body  # fmt: skip


def prompt(rows: Sequence[Row]) -> Table:
    """What the clusters cost: made for a prompt, updated, and held."""
    body = []
    for r in rows:
        dense = r["prefill_seconds"]
        share = f"{dense:.2f} s ({100 * r['clustering_seconds'] / dense:.0f} %)" if dense else ""
        paid = "never" if r["steps_until_paid"] is None else f"{r['steps_until_paid']:,.0f}"
        body.append([r["shape"], f"{r['tokens']:,}", f"{r['clustering_seconds']:.2f} s", share, paid,
                     f"{1e3 * r['update_seconds']:.0f} ms", f"{1e3 * r['update_seconds_per_step']:.2f} ms",
                     f"{100 * r['cluster_bytes'] / r['dense_bytes']:.1f} %"])  # fmt: skip
    return ["shape", "tokens", "clustering the prompt", "its dense attention (share of it)", "steps until paid",
            "update", "of it per step", "memory beside the cache"], body  # fmt: skip


def generate(rows: Sequence[Row]) -> Table:
    """Tokens a second of a whole model."""
    body = [
        [
            f"{r['tokens']:,}", r["name"], f"{r['tokens_per_second']:.2f}", _ratio(r, "speedup"),
            f"{r['speedup_in_place']:.2f}x", f"{100 * r['attention_share']:.0f} %",
            f"{1e3 * r['attention_seconds_per_step']:.1f} + {1e3 * r['update_seconds_per_step']:.1f} ms",
            f"{r['cache_bytes'] / 2**20:.0f} + {r['cluster_bytes'] / 2**20:.0f} MiB", f"{100 * r['same_tokens']:.0f} %",
        ]
        for r in rows
    ]  # fmt: skip
    return ["prompt", "attention", "tokens a second", "ratio to dense (quartiles)", "to dense in place",
            "attention's share of a step", "attention + update a step", "cache + clusters",
            "same tokens"], body  # fmt: skip


def _by(
    rows: Sequence[Row], key: str, names: Sequence[str], settings: Row
) -> list[tuple[str, int | None, dict[int, Row]]]:
    """Name, budget and rows by ``key``, for each of ``names`` with just these settings; smaller budgets first."""
    found = []
    for name in names:
        mine = [r for r in rows if r["name"] == name and r["settings"] == settings]
        for budget in sorted({r["budget"] for r in mine}, key=lambda b: MANY if b is None else b):
            found.append((name, budget, {r[key]: r for r in mine if r["budget"] == budget}))
    return found


def _settings(rows: Sequence[Row]) -> list[Row]:
    """The settings that there are, the usual ones first."""
    found: list[Row] = [{}]
    for r in rows:
        if r["settings"] not in found and r["name"] not in PLAIN[1:]:
            found.append(r["settings"])
    return found


def _spread(row: Row, key: str, digits: int, sign: bool = False) -> str:
    """Mean and standard deviation over documents."""
    form = f"+.{digits}f" if sign else f".{digits}f"
    # Rounded first and 0 added, so that nothing prints as -0.
    return f"{round(row[key], digits) + 0.0:{form}} ± {row[key + '_sd']:.{digits}f}"


def _budget(budget: int | None) -> str:
    return "all" if budget is None else str(budget)


def _number(value: Any) -> str:
    """1/16 rather than 0.0625."""
    return f"1/{round(1 / value)}" if isinstance(value, float) and value < 0.5 else str(value)


def _ratio(row: Row, key: str) -> str:
    return f"{row[key]:.2f}x ({row[key + '_low']:.2f} to {row[key + '_high']:.2f})"


MULTIPOLE: dict[str, tuple[str, Callable[[Sequence[Row]], Table]]] = {
    "multipole_context": ("multipole_context", context),
    "multipole_variants": ("multipole_context", variants),
    "multipole_retrieval": ("multipole_retrieval", retrieval),
    "multipole_generation": ("multipole_generation", generation),
    "multipole_step": ("multipole_speed", step),
    "multipole_prompt": ("multipole_speed", prompt),
    "multipole_generate": ("multipole_generate", generate),
}
"""Which result each table is made of, and how."""
