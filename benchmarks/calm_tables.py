"""Tables of CALMs and autoencoders: each takes the rows of a list in a result file and gives headers and cells."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from quickmerge.calm.bench import draw_cells, term_cells

Row = dict[str, Any]
Table = tuple[list[str], list[list[str]]]


def quality(rows: Sequence[Row]) -> Table:
    """BrierLM at the same places, and what it took."""
    headers = ["model", "K", "BrierLM (95 %)", "difference (paired)", "parameters", "of them autoencoder",
               "tokens seen", "training operations", "operations/token"]  # fmt: skip
    body = [
        [
            str(r["method"]),
            "" if r["kind"] == "tokens" else str(r["patch"]),
            f"{r['brier_lm']:.2f} ({r['brier_lm_low']:.2f} to {r['brier_lm_high']:.2f})",
            "" if "gap" not in r else f"{r['gap']:+.2f} ({r['gap_low']:+.2f} to {r['gap_high']:+.2f})",
            f"{r['parameters'] / 1e6:.2f} M",
            f"{r['autoencoder_parameters'] / 1e6:.2f} M" if r["autoencoder_parameters"] else "",
            f"{r['train_tokens'] / 1e6:.1f} M",
            f"{r['train_flops'] / 1e12:.1f} T",
            f"{r['flops'] / 1e6:.2f} M ({r['flops_ratio']:.2f}x)",
        ]
        for r in rows
    ]
    return headers, body


def speed(rows: Sequence[Row]) -> Table:
    """Tokens a second by batch, medians and quartiles of rounds."""
    batches = list(dict.fromkeys(r["batch"] for r in rows))
    found = {(r["method"], r["batch"]): r for r in rows}
    body = []
    for method in dict.fromkeys(r["method"] for r in rows):
        cells = [str(method)]
        for batch in batches:
            r = found[method, batch]
            middle, low, high = (r[f"per_second{end}"] for end in ("", "_low", "_high"))
            cells.append(f"{middle:,.0f} ({low:,.0f} to {high:,.0f}), {r['speedup']:.2f}x")
        body.append(cells)
    return ["model", *(f"tokens/s at batch {batch} (quartiles)" for batch in batches)], body


def autoencoders(rows: Sequence[Row]) -> Table:
    """What each autoencoder is, and how much of its vectors is in use."""
    headers = ["autoencoder", "vocabulary", "K, l, width", "price, free", "hidden, dropped", "parameters",
               "tokens seen", "in use", "above the free part", "nats/chunk", "its own noise",
               "tokens under it"]  # fmt: skip
    body = [
        [
            str(r["method"]),
            f"{r['vocabulary']:,}",
            f"{r['patch']}, {r['latent']}, {r['width']}",
            f"{r['kl_weight']:g}, {r['kl_floor']:g}",
            f"{r['token_dropout']:g}, {r['latent_dropout']:g}",
            f"{r['parameters'] / 1e6:.2f} M",
            f"{r['train_tokens'] / 1e6:.2f} M",
            f"{r['active']} of {r['latent']}",
            str(r["above_floor"]),
            f"{r['kl']:.0f}",
            f"{r['std']:.2f}",
            percent(r["posterior_accuracy"]),
        ]
        for r in rows
    ]
    return headers, body


def autoencoder_noise(rows: Sequence[Row]) -> Table:
    """Tokens and whole chunks that are found again, by the noise on the vector."""
    sigmas = [key.removeprefix("chunk_accuracy_") for key in rows[0] if key.startswith("chunk_accuracy_")]
    headers = ["autoencoder", "tokens, no noise (95 %)", "chunks"]
    headers += [text for sigma in sigmas[1:] for text in (f"tokens, noise {sigma}", "chunks")]
    body = []
    for r in rows:
        low, high = (percent(r[f"accuracy_{sigmas[0]}_{end}"]) for end in ("low", "high"))
        cells = [str(r["method"]), f"{percent(r[f'accuracy_{sigmas[0]}'])} ({low} to {high})"]
        cells.append(percent(r[f"chunk_accuracy_{sigmas[0]}"]))
        for sigma in sigmas[1:]:
            cells += [percent(r[f"accuracy_{sigma}"]), percent(r[f"chunk_accuracy_{sigma}"])]
        body.append(cells)
    return headers, body


def percent(share: float) -> str:
    """Down to the hundredth, and never rounded up to all."""
    return f"{int(1e4 * share + 1e-9) / 100:.2f} %"


CALM: dict[str, tuple[str, Callable[[Sequence[Row]], Table], str]] = {
    "calm": ("calm", quality, "rows"),
    "calm_terms": ("calm", term_cells, "rows"),
    "calm_speed": ("calm", speed, "speeds"),
    "calm_temperature": ("calm", draw_cells, "temperatures"),
    "calm_autoencoder": ("calm_autoencoder", autoencoders, "rows"),
    "calm_autoencoder_noise": ("calm_autoencoder", autoencoder_noise, "rows"),
}
"""By the name in the docs: the result file, what makes the table of it, and the list that it is made of."""
