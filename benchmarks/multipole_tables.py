"""Tables of multipole attention: each takes the rows of a result."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from quickmerge.bench.table import Cell, Column, Table, interval, number, plus_minus, text

Row = dict[str, Any]

MANY = 10**5
"""A budget beyond this stands for all keys."""
PLAIN = ("multipole", "sparse", "runs of keys", "random clusters", "window", "window of as many bytes", "best keys")
"""What is compared with the usual settings, in this order."""

MIB = 2**-20
BUDGET = Column("budget", number("budget", none="all"))
SHAPE = Column("shape", text("shape"))
TOKENS = Column("tokens", number("tokens", ","))
EXTRA = plus_minus("extra", "+.4f", "_sd")


def context(rows: Sequence[Row]) -> Table:
    """How far each kind of attention is from full attention on long texts, by budget."""
    lengths = sorted({r["length"] for r in rows})
    longest = lengths[-1]
    dense = next(r for r in rows if r["name"] == "dense" and r["length"] == longest)
    columns = [
        Column("attention", text("name")), BUDGET,
        *(Column(f"KL, {n:,} tokens", at(n, plus_minus("kl", ".4f", "_sd"))) for n in lengths),
        Column(f"same first choice, {longest:,}", at(longest, number("agreement", ".1f", scale=100, unit=" %"))),
        Column(f"NLL above dense ({dense['nll']:.3f}), {longest:,}", at(longest, EXTRA)),
    ]  # fmt: skip
    return Table(columns, _by(rows, "length", PLAIN, {}))


def variants(rows: Sequence[Row]) -> Table:
    """Settings of multipole attention: what each does to the distance from full attention."""
    lengths = sorted({r["length"] for r in rows})

    def setting(r: Row) -> str:
        if r["name"] == "sparse":
            return "replacement=False"
        return ", ".join(f"{k}={_number(v)}" for k, v in r["settings"].items()) or "defaults"

    columns = [
        Column("setting", setting), BUDGET,
        *(Column(f"KL, {n:,} tokens", at(n, plus_minus("kl", ".4f", "_sd"))) for n in lengths),
        Column("clustered keys read", lambda r: " / ".join(f"{r['at'][n]['kept']:.0f}" for n in lengths)),
    ]  # fmt: skip
    found = [
        line for settings in _settings(rows)
        for line in _by(rows, "length", ("multipole",) if settings else ("multipole", "sparse"), settings)
    ]  # fmt: skip
    return Table(columns, found)


def retrieval(rows: Sequence[Row]) -> Table:
    """Nats per token of a span's second copy, and how many of its tokens are the first choice, by how far it is."""
    nll, right = plus_minus("nll", ".2f", "_sd"), number("right", ".0f", scale=100, unit=" %")

    def after(length: int) -> Column:
        return Column(f"NLL (right), after {length:,}", at(length, lambda r: f"{nll(r)} ({right(r)})"))

    order: list[tuple[tuple[str, ...], Row]] = [(("dense", "dense, another span"), {}), (("multipole", "sparse"), {})]
    order += [(("multipole", "sparse"), {"space": "windowed"}), (PLAIN[2:], {})]
    name = Column("attention", lambda r: r["name"] + "".join(f", {v}" for v in r["settings"].values()))
    columns = [name, BUDGET, *map(after, sorted({r["length"] for r in rows}))]
    return Table(columns, [line for names, settings in order for line in _by(rows, "length", names, settings)])


def generation(rows: Sequence[Row]) -> Table:
    """How far from full attention while a text goes on, by quarter, with the clusters updated or not."""
    names = tuple(dict.fromkeys(r["name"] for r in rows if r["name"] != "dense"))
    columns = [
        Column("clusters", text("name")), BUDGET,
        *(Column(f"KL, quarter {q}", at(q, plus_minus("kl", ".4f", "_sd"))) for q in range(1, 5)),
        Column("NLL above dense, last quarter", at(4, EXTRA)),
        Column("keys in the buffer at most", at(4, number("buffer", ".0f"))),
    ]  # fmt: skip
    found = [line for settings in _settings(rows) for line in _by(rows, "quarter", names, settings)]
    return Table(columns, sorted(found, key=lambda r: MANY if r["budget"] is None else r["budget"]))


def step(rows: Sequence[Row]) -> Table:
    """One step of attention, dense and multipole."""

    def milliseconds(name: str) -> Column:
        return Column(f"{name}, ms", lambda r: f"{1e3 * r['seconds'][name][1]:.2f}")

    columns = [
        SHAPE, TOKENS, *map(milliseconds, rows[0]["seconds"]),
        Column("ratio to the fastest dense (quartiles)", interval("speedup", ".2f", unit="x")),
        Column("with updates", interval("speedup_with_updates", ".2f", unit="x")),
        Column("bytes read", lambda r: f"{MIB * r['dense_bytes']:.0f} / {MIB * r['multipole_bytes']:.0f} MiB"),
        Column("bytes allow", number("allowed_by_bytes", ".1f", unit="x")),
        Column("of it", number("of_allowed", ".0f", scale=100, unit=" %")),
    ]  # fmt: skip
    return Table(columns, rows)


def prompt(rows: Sequence[Row]) -> Table:
    """What the clusters cost: made for a prompt, updated, and held."""

    def share(r: Row) -> str:
        dense = r["prefill_seconds"]
        return f"{dense:.2f} s ({100 * r['clustering_seconds'] / dense:.0f} %)" if dense else ""

    columns = [
        SHAPE, TOKENS, Column("clustering the prompt", number("clustering_seconds", ".2f", unit=" s")),
        Column("its dense attention (share of it)", share),
        Column("steps until paid", number("steps_until_paid", ",.0f", none="never")),
        Column("update", number("update_seconds", ".0f", scale=1e3, unit=" ms")),
        Column("of it per step", number("update_seconds_per_step", ".2f", scale=1e3, unit=" ms")),
        Column("memory beside the cache", lambda r: f"{100 * r['cluster_bytes'] / r['dense_bytes']:.1f} %"),
    ]  # fmt: skip
    return Table(columns, rows)


def generate(rows: Sequence[Row]) -> Table:
    """Tokens a second of a whole model."""
    attention, update = (
        number(f"{what}_seconds_per_step", ".1f", scale=1e3) for what in ("attention", "update")
    )  # fmt: skip
    columns = [
        Column("prompt", number("tokens", ",")), Column("attention", text("name")),
        Column("tokens a second", number("tokens_per_second", ".2f")),
        Column("ratio to dense (quartiles)", interval("speedup", ".2f", unit="x")),
        Column("to dense in place", number("speedup_in_place", ".2f", unit="x")),
        Column("attention's share of a step", number("attention_share", ".0f", scale=100, unit=" %")),
        Column("attention + update a step", lambda r: f"{attention(r)} + {update(r)} ms"),
        Column("cache + clusters", lambda r: f"{MIB * r['cache_bytes']:.0f} + {MIB * r['cluster_bytes']:.0f} MiB"),
        Column("same tokens", number("same_tokens", ".0f", scale=100, unit=" %")),
    ]  # fmt: skip
    return Table(columns, rows)


def waits(rows: Sequence[Row]) -> Table:
    """How long single tokens take, by processor time."""

    def milliseconds(key: str, heading: str) -> Column:
        return Column(heading, number(key, ".0f", scale=1e3, unit=" ms"))

    columns = [
        Column("clustering", text("name")), milliseconds("first", "first token"), milliseconds("p50", "median"),
        milliseconds("p95", "95 %"), milliseconds("p99", "99 %"), milliseconds("max", "longest"),
        Column("longest by median", number("max_by_median", ".2f", unit="x")),
        Column("by the clock: median, longest", lambda r: f"{1e3 * r['wall_p50']:.0f}, {1e3 * r['wall_max']:.0f} ms"),
        Column("blocks clustered for one token", number("most_at_once", ".1f")),
    ]  # fmt: skip
    return Table(columns, rows)


def at(key: Any, cell: Cell) -> Cell:
    """A cell of the row that a line has at ``key``."""
    return lambda line: cell(line["at"][key])


def _by(rows: Sequence[Row], key: str, names: Sequence[str], settings: Row) -> list[Row]:
    """Lines of name, budget and rows by ``key``, for ``names`` with just these settings; small budgets first."""
    found = []
    for name in names:
        mine = [r for r in rows if r["name"] == name and r["settings"] == settings]
        for budget in sorted({r["budget"] for r in mine}, key=lambda b: MANY if b is None else b):
            own = {r[key]: r for r in mine if r["budget"] == budget}
            found.append({"name": name, "budget": budget, "settings": settings, "at": own})
    return found


def _settings(rows: Sequence[Row]) -> list[Row]:
    """The settings that there are, the usual ones first."""
    found: list[Row] = [{}]
    for r in rows:
        if r["settings"] not in found and r["name"] not in PLAIN[1:]:
            found.append(r["settings"])
    return found


def _number(value: Any) -> str:
    """1/16 rather than 0.0625."""
    return f"1/{round(1 / value)}" if isinstance(value, float) and value < 0.5 else str(value)


MULTIPOLE: dict[str, tuple[str, Callable[[Sequence[Row]], Table]]] = {
    "multipole_context": ("multipole_context", context),
    "multipole_variants": ("multipole_context", variants),
    "multipole_retrieval": ("multipole_retrieval", retrieval),
    "multipole_generation": ("multipole_generation", generation),
    "multipole_step": ("multipole_speed", step),
    "multipole_prompt": ("multipole_speed", prompt),
    "multipole_generate": ("multipole_generate", generate),
    "multipole_waits": ("multipole_waits", waits),
}
"""Which result each table is made of, and how."""
