"""BrierLM of an ordinary causal language model, the yardstick of a CALM, from its probabilities.

What the samples of a CALM only estimate (see `quickmerge.continuous.brier`), probabilities give exactly for one token:
``P(y)`` is a product along the true text, and ``sum_v P(v)^2`` is a sum over the vocabulary. For several tokens
``sum_x P(x)^2 = sum_{x_1} P(x_1)^2 sum_{x_2} P(x_2 | x_1)^2 ...`` has too many terms. With ``Z_1 = sum_v P(v)^2`` and a
token g drawn with probability ``P(g)^2 / Z_1``, ``E[Z_1 S_g] = sum_v P(v)^2 S_v``: so one path of tokens, each drawn in
proportion to its squared probability, gives an unbiased estimate as the product of the Z along it. Every path counts,
where two paths drawn from P itself nearly always part.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from quickmerge.continuous.branches import branch_cache, branch_mask, can_branch
from quickmerge.continuous.brier import GRAMS
from quickmerge.errors import QuickmergeError, whole_number
from quickmerge.models.compat import cache_argument, returned_cache

__all__ = ["discrete_terms"]


@torch.no_grad()
def discrete_terms(
    model: Any,
    window: Tensor,
    places: Tensor,
    *,
    paths: int = 4,
    generator: torch.Generator | None = None,
    at_once: int = 64,
) -> Tensor:
    """Brier-1 to Brier-4 at some places of a text; Brier-1 exact, the others unbiased.

    Args:
        model: a causal LM of transformers in eval mode.
        window: ``(L,)`` token ids.
        places: ``(P,)``: the outcome is ``window[place : place + 4]``, given what is before it.
        paths: of colliding tokens for each place, which are averaged over.
        generator: where the paths come from; None for the global generator.
        at_once: branches that are read in one pass.

    Returns:
        ``(P, 4)`` float64.

    Raises:
        QuickmergeError: a place has nothing before it or fewer than four tokens from it on.
        ValueError: ``paths`` or ``at_once`` is no whole number of at least 1.
    """
    paths = whole_number("paths", paths)
    at_once = whole_number("at_once", at_once)
    length = len(window)
    if len(places) == 0 or int(places.min()) < 1 or int(places.max()) > length - GRAMS:
        raise QuickmergeError(f"places must be from 1 to {length - GRAMS} in a window of {length} tokens, got {places}")
    window = window.to(model.device)
    read = model(input_ids=window[None], use_cache=True)
    log = read.logits[0].double().log_softmax(-1)  # (L, V): entry t predicts token t + 1
    following = places.to(model.device)[:, None] + torch.arange(GRAMS, device=model.device)  # (P, 4)
    likely = log[following - 1, window[following]].cumsum(-1).exp()
    first = log[following[:, 0] - 1]  # (P, V)
    cache = returned_cache(read)
    cache = cache if can_branch(cache) else None
    parts = []
    for start in range(0, len(places), block := max(1, at_once // paths)):
        here = slice(start, start + block)
        rows = following[here, 0].repeat_interleave(paths)
        found = _collisions(model, window, cache, rows, first[here].repeat_interleave(paths, 0), generator)
        parts.append(found.view(-1, paths, GRAMS).mean(1))
    terms: Tensor = 2 * likely - torch.cat(parts)
    return terms.cpu()


def _collisions(
    model: Any, window: Tensor, cache: Any, places: Tensor, log: Tensor, generator: torch.Generator | None
) -> Tensor:
    """``(B, 4)``: products of the sums of squares along a path from each place, whose first is of ``log (B, V)``."""
    total = [(2 * log).exp().sum(-1)]
    own = branch_cache(cache, len(places)) if cache is not None else None
    path = places.new_empty(len(places), 0)
    for depth in range(1, GRAMS):
        weight = (2 * log).softmax(-1)
        origin = weight if generator is None else weight.to(generator.device)
        drawn = torch.multinomial(origin, 1, generator=generator).to(places.device)
        path = torch.cat([path, drawn], 1)
        if own is not None:
            out = model(
                input_ids=drawn,
                attention_mask=branch_mask(places, len(window), depth),
                position_ids=(places + depth - 1)[:, None],
                **cache_argument(model, own),
                use_cache=True,
            )
            logits = out.logits[:, -1]
        else:
            logits = _read_again(model, window, places, path)
        log = logits.double().log_softmax(-1)
        total.append(total[-1] * (2 * log).exp().sum(-1))
    return torch.stack(total, -1)


def _read_again(model: Any, window: Tensor, places: Tensor, path: Tensor) -> Tensor:
    """Logits behind each path ``(B, n)``, for a model whose cache can't branch.

    What stands behind a path in its row is seen by nothing that is asked for.
    """
    rows = window.expand(len(places), -1).clone()
    behind = places[:, None] + torch.arange(path.shape[1], device=places.device)
    rows.scatter_(1, behind, path)
    logits: Tensor = model(input_ids=rows[:, : int(behind.max()) + 1], use_cache=False).logits
    return logits[torch.arange(len(places), device=places.device), behind[:, -1]]
