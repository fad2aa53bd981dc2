"""Tables of CALMs and autoencoders: each takes the rows of a list in a result file."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from quickmerge.bench.table import Cell, Column, Table, number, text, unless
from quickmerge.calm.bench import BRIER, MODEL, OPERATIONS, PARAMETERS, PATCH, draws_table, gap, pace, terms_table

Row = dict[str, Any]

SEEN = Column("tokens seen", number("train_tokens", ".1f", scale=1e-6, unit=" M"))


def quality(rows: Sequence[Row]) -> Table:
    """BrierLM at the same places, and what it took."""
    own = number("autoencoder_parameters", ".2f", scale=1e-6, unit=" M")
    columns = [
        MODEL, PATCH, Column("BrierLM (95 %)", BRIER.cell), Column("difference (paired)", gap), PARAMETERS,
        Column("of them autoencoder", unless(lambda r: not r["autoencoder_parameters"], own)), SEEN,
        Column("training FLOPs", number("train_flops", ".1f", scale=1e-12, unit=" T")), OPERATIONS,
    ]  # fmt: skip
    return Table(columns, rows)


def speed(rows: Sequence[Row]) -> Table:
    """Tokens a second by batch, medians and quartiles of rounds."""
    columns = [Column(f"tokens/s at batch {batch} (quartiles)", pace(rows, batch, ",.0f"))
               for batch in dict.fromkeys(r["batch"] for r in rows)]  # fmt: skip
    return Table([MODEL, *columns], [{"method": method} for method in dict.fromkeys(r["method"] for r in rows)])


def autoencoders(rows: Sequence[Row]) -> Table:
    """What each autoencoder is, and how much of its vectors is in use."""
    columns = [
        Column("autoencoder", text("method")), Column("vocabulary", number("vocabulary", ",")),
        Column("K, l, width", lambda r: f"{r['patch']}, {r['latent']}, {r['width']}"),
        Column("price, free", lambda r: f"{r['kl_weight']:g}, {r['kl_floor']:g}"),
        Column("hidden, dropped", lambda r: f"{r['token_dropout']:g}, {r['latent_dropout']:g}"), PARAMETERS,
        Column("tokens seen", number("train_tokens", ".2f", scale=1e-6, unit=" M")),
        Column("in use", lambda r: f"{r['active']} of {r['latent']}"),
        Column("above the free part", text("above_floor")), Column("nats/chunk", number("kl", ".0f")),
        Column("its own noise", number("std", ".2f")), Column("tokens under it", percent("posterior_accuracy")),
    ]  # fmt: skip
    return Table(columns, rows)


def autoencoder_noise(rows: Sequence[Row]) -> Table:
    """Tokens and whole chunks that are found again, by the noise on the vector."""
    sigmas = [key.removeprefix("chunk_accuracy_") for key in rows[0] if key.startswith("chunk_accuracy_")]
    tokens, low, high = (percent(f"accuracy_{sigmas[0]}{end}") for end in ("", "_low", "_high"))
    columns = [
        Column("autoencoder", text("method")),
        Column("tokens, no noise (95 %)", lambda r: f"{tokens(r)} ({low(r)} to {high(r)})"),
        Column("chunks", percent(f"chunk_accuracy_{sigmas[0]}")),
    ]
    for sigma in sigmas[1:]:
        columns.append(Column(f"tokens, noise {sigma}", percent(f"accuracy_{sigma}")))
        columns.append(Column("chunks", percent(f"chunk_accuracy_{sigma}")))
    return Table(columns, rows)


def percent(key: str) -> Cell:
    """A share down to the hundredth, and never rounded up to all."""
    return lambda row: f"{int(1e4 * row[key] + 1e-9) / 100:.2f} %"


CALM: dict[str, tuple[str, Callable[[Sequence[Row]], Table], str]] = {
    "calm": ("calm", quality, "rows"),
    "calm_terms": ("calm", terms_table, "rows"),
    "calm_speed": ("calm", speed, "speeds"),
    "calm_temperature": ("calm", draws_table, "temperatures"),
    "calm_autoencoder": ("calm_autoencoder", autoencoders, "rows"),
    "calm_autoencoder_noise": ("calm_autoencoder", autoencoder_noise, "rows"),
}
"""By the name in the docs: the result file, what makes the table of it, and the list that it is made of."""
