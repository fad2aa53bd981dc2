"""Going on from many places of one text, which is read once: every branch sees the text up to its own place."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor
from transformers import Cache

from quickmerge.calm.brier import GRAMS, along_chunks, colliding_sample, collision_shares, hit_shares
from quickmerge.errors import QuickmergeError, whole_number
from quickmerge.models.compat import DynamicLayer, cache_argument, returned_cache

__all__ = ["branch_cache", "branch_mask", "calm_terms", "can_branch", "discrete_terms"]


def can_branch(cache: Any) -> bool:
    """Whether every layer keeps all that it has read in plain sight.

    Layers that forget (sliding windows) or keep a state can't go back to an earlier place.
    """
    return isinstance(cache, Cache) and all(type(layer) is DynamicLayer for layer in cache.layers)


def branch_cache(cache: Cache, rows: int) -> Cache:
    """A copy of a text's cache for each of ``rows`` branches; the given one, of batch size 1, stays as it is."""
    own = copy.deepcopy(cache)
    own.batch_repeat_interleave(rows)
    return own


def branch_mask(places: Tensor, length: int, new: int) -> Tensor:
    """Attention mask ``(B, length + new)`` of branches that have read ``new`` entries of their own behind the text.

    Args:
        places: ``(B,)``: the branch sees the text's entries before this one.
        length: entries of the text in the cache.
        new: entries of the branch.
    """
    seen = torch.arange(length, device=places.device) < places[:, None]
    return torch.cat([seen, seen.new_ones(len(places), new)], 1).long()


# BrierLM of a CALM, from draws of its head; how draws become unbiased terms is in `quickmerge.calm.brier`.


@torch.no_grad()
def calm_terms(
    model: Any,
    window: Tensor,
    places: Tensor,
    *,
    samples: int = 16,
    paths: int = 1,
    generator: torch.Generator | None = None,
    at_once: int = 64,
) -> Tensor:
    """Brier-1 to Brier-4 at some places of a text, unbiased each.

    With chunks of four tokens or more the next chunk says everything. With shorter ones the draws of the chunks behind
    it follow the true text for hits, and paths of colliding chunks for collisions.

    Args:
        model: a `quickmerge.calm.CalmForCausalLM` in eval mode.
        window: ``(L,)`` token ids; what is left over of the last chunk is not read.
        places: ``(P,)``, multiples of K: the outcome is ``window[place : place + 4]``, given what is before it.
        samples: R, draws at each place, at least 2.
        paths: of colliding chunks for each place, which are averaged over; with one chunk there is none.
        generator: of all that is random; None for the global generator.
        at_once: branches that are read in one pass.

    Returns:
        ``(P, 4)`` float64.

    Raises:
        QuickmergeError: a place is no multiple of K, has nothing before it, or too few tokens from it on; the backbone
            can't go on from places inside a text (sliding windows, states) and chunks are shorter than four tokens.
        ValueError: a number is out of range.
    """
    samples = whole_number("samples", samples, 2)
    paths = whole_number("paths", paths)
    at_once = whole_number("at_once", at_once)
    patch = int(model.config.patch)
    chunks = -(-GRAMS // patch)
    truth = window[: len(window) // patch * patch].view(-1, patch).to(model.device)
    most = (len(truth) - chunks) * patch
    if len(places) == 0 or bool((places % patch).any()) or int(places.min()) < patch or int(places.max()) > most:
        raise QuickmergeError(
            f"places must be multiples of {patch} from {patch} to {most} in a window of {len(window)} tokens, "
            f"got {places}"
        )
    states, cache = model.hidden(truth.view(1, -1), use_cache=chunks > 1)
    at = (places // patch).to(model.device)
    first: Tensor = model.sample_chunks(states[0, at - 1], samples, generator=generator)
    hits = [hit_shares(first, truth[at])]
    for later in range(1, chunks):
        drawn = model.sample_chunks(states[0, at + later - 1], samples, generator=generator)
        hits.append(hit_shares(drawn, truth[at + later]))
    pairs = [collision_shares(first)]
    if chunks == 1:
        return _terms(hits, pairs)
    if not can_branch(cache):
        raise QuickmergeError(
            f"chunks of {patch} tokens are too short for BrierLM with this backbone: what it keeps of a text "
            f"({type(cache).__name__} with sliding windows or states) can't be gone back in"
        )
    found = []
    for start in range(0, len(at), block := max(1, at_once // paths)):
        here = slice(start, start + block)
        rows, drawn = at[here].repeat_interleave(paths), first[:, here].repeat_interleave(paths, 1)
        behind = _behind(model, truth, cache, rows, drawn, chunks - 1, generator)
        # With the share of the first chunk in front of each path, before the mean over paths.
        whole = [pairs[0][here].repeat_interleave(paths, 0), *behind]
        found.append(along_chunks(whole).view(-1, paths, GRAMS).mean(1))
    return (2 * along_chunks(hits) - torch.cat(found)).cpu()


def _terms(hits: list[Tensor], pairs: list[Tensor]) -> Tensor:
    return (2 * along_chunks(hits) - along_chunks(pairs)).cpu()


def _behind(
    model: Any, truth: Tensor, cache: Any, at: Tensor, drawn: Tensor, more: int, generator: torch.Generator | None
) -> list[Tensor]:
    """Shares of colliding draws of the ``more`` chunks behind the first, of which ``drawn (R, B, K)`` are.

    Branch b sees the chunks of the text before ``at[b]``, and one path of colliding chunks. Where no pair of draws was
    equal the path is over: the share of that chunk, which everything behind it is multiplied with, is zero.
    """
    samples, _, patch = drawn.shape
    shares = [at.new_zeros(len(at), patch, dtype=torch.float64) for _ in range(more)]
    alive = torch.nonzero(collision_shares(drawn)[:, -1] > 0)[:, 0]
    if not len(alive):
        return shares
    # Branches that end later stay in the pass, so that the cache need not be cut anew.
    own, places = branch_cache(cache, len(alive)), at[alive]
    drawn = drawn[:, alive]
    for depth in range(1, more + 1):
        path = colliding_sample(drawn, generator)
        mask = branch_mask(places, len(truth), depth).repeat_interleave(patch, 1)
        states, own = model.hidden(path, attention_mask=mask, cache=own, use_cache=True)
        drawn = model.sample_chunks(states[:, -1], samples, generator=generator)
        shares[depth - 1][alive] = collision_shares(drawn)
    return shares


# BrierLM of an ordinary causal language model, the yardstick of a CALM, from its probabilities.
#
# What the samples of a CALM only estimate (see `quickmerge.calm.brier`), probabilities give exactly for one token:
# ``P(y)`` is a product along the true text, and ``sum_v P(v)^2`` is a sum over the vocabulary. For several tokens
# ``sum_x P(x)^2 = sum_{x_1} P(x_1)^2 sum_{x_2} P(x_2 | x_1)^2 ...`` has too many terms. With ``Z_1 = sum_v P(v)^2`` and
# a token g drawn with probability ``P(g)^2 / Z_1``, ``E[Z_1 S_g] = sum_v P(v)^2 S_v``: so one path of tokens, each
# drawn in proportion to its squared probability, gives an unbiased estimate as the product of the Z along it. Every
# path counts, where two paths drawn from P itself nearly always part.


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
