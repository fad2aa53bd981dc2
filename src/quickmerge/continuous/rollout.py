"""BrierLM of a CALM, from draws of its head; how draws become unbiased terms is in `quickmerge.continuous.brier`."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from quickmerge.continuous.branches import branch_cache, branch_mask, can_branch
from quickmerge.continuous.brier import GRAMS, along_chunks, colliding_sample, collision_shares, hit_shares
from quickmerge.errors import QuickmergeError, whole_number

__all__ = ["calm_terms"]


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
        model: a `quickmerge.continuous.CalmForCausalLM` in eval mode.
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
