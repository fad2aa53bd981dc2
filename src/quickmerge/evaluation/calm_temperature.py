"""What a temperature does to a CALM: how often it is right, how often it repeats itself, and the draws it takes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from quickmerge.continuous.temperature import Drawn, batch, exact, expected_draws, split_inverse
from quickmerge.errors import whole_number
from quickmerge.evaluation.calm import BrierText
from quickmerge.evaluation.calm_cost import writing_cost

__all__ = ["temperature_rows"]

Row = dict[str, Any]

TWICE = 2
"""Chunks that are made at each place, so that they can be the same."""


@torch.no_grad()
def temperature_rows(
    model: Any,
    text: BrierText,
    temperatures: Sequence[float],
    *,
    places: int = 64,
    count: int = 200,
    pilot: int = 1000,
    most_draws: int = 10_000,
    seed: int = 0,
    advance: Callable[[str], None] = lambda _: None,
) -> list[Row]:
    """Draw two chunks at some places at each temperature, by the exact method, and by ``batch`` where it can.

    A row has ``right``, the share of chunks that are what stands there, ``same``, the share of places whose two chunks
    are the same, ``draws`` that were looked at for a chunk on average and ``made`` for it, ``gave_up``, the share of
    chunks for which ``most_draws`` were not enough (they count in ``right`` and ``same`` at temperature 1),
    ``expected``, what the formula says of the shares of chunks among ``pilot`` draws at each place, and ``flops`` for
    a token.

    Args:
        model: a CALM in eval mode.
        text: places of held-out texts.
        temperatures: each in (0, 1].
        places: the first so many of the text.
        count: draws of the batch method.
        pilot: draws at each place for the formula. A chunk that is rarer is not seen, so that where no chunk is likely
            the formula says too few.
        most_draws: of the exact method for a chunk.
        seed: of all that is random.
        advance: called with a label after each row.

    Raises:
        QuickmergeError: a temperature is not in (0, 1].
        ValueError: a number is out of range.
    """
    places, count, pilot = whole_number("places", places), whole_number("count", count), whole_number("pilot", pilot)
    ways = [(t, "exact") for t in temperatures]
    ways += [(t, "batch") for t in temperatures if split_inverse(t)[1] == 0 and t != 1]  # at 1 one draw does
    states, truth = _states(model, text, places)
    generator = torch.Generator().manual_seed(seed)
    shares = _shares(model.sample_chunks(states, pilot, generator=generator))
    twice = states.repeat_interleave(TWICE, 0)
    context = text.windows.shape[1] / 2
    rows = []
    for temperature, method in ways:

        def sampler(draws: int) -> Tensor:
            drawn: Tensor = model.sample_chunks(twice, draws, generator=generator)
            return drawn

        if method == "exact":
            found = exact(sampler, temperature, generator=generator, most_draws=most_draws, give_up=True)
            expected = sum(expected_draws(p, temperature) for p in shares) / len(shares)
        else:
            found, expected = batch(sampler, temperature, count, generator=generator), float(count)
        rows.append({
            "temperature": temperature, "temperature_method": method, "places": len(states), **_quality(found, truth),
            "draws": float(found.draws.double().mean()), "expected": expected, "made": found.made,
            "gave_up": float((~found.exact).double().mean()) if method == "exact" else 0.0,
            "flops": writing_cost(model, context, max(1, round(float(found.draws.double().mean())))).total,
        })  # fmt: skip
        advance(f"temperature {temperature:g}, {method}")
    return rows


def _states(model: Any, text: BrierText, most: int) -> tuple[Tensor, Tensor]:
    """``(P, D)`` of the first places of a text, and the chunks ``(P, K)`` that stand there."""
    patch = model.config.patch
    states, truth = [], []
    for window, place in text.places[:most].tolist():
        ids = text.windows[window, : place + patch].to(model.device)
        states.append(model.hidden(ids[None, :place])[0][0, -1])
        truth.append(ids[place:])
    return torch.stack(states), torch.stack(truth)


def _shares(chunks: Tensor) -> list[Tensor]:
    """The share of each different chunk among the draws ``(N, P, K)`` of each place."""
    shares = []
    for column in chunks.unbind(1):
        counts: Tensor = torch.unique(column, dim=0, return_counts=True)[1]
        shares.append(counts.double() / len(column))
    return shares


def _quality(found: Drawn, truth: Tensor) -> Row:
    pairs = found.chunks.view(-1, TWICE, found.chunks.shape[1])
    right = (pairs == truth[:, None]).all(-1).double().mean()
    return {"right": float(right), "same": float((pairs[:, 0] == pairs[:, 1]).all(-1).double().mean())}
