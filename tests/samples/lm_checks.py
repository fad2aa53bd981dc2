"""What a capability must do on a model of any family, one function a capability.

Each takes a tiny model and the block in front of which its prompt is merged, and raises AssertionError where a law is
broken; what a library refuses raises UnsupportedModelError.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import lm_decoding
import torch
from torch import Tensor

import quickmerge as qm
from quickmerge.models.compat import cache_argument, returned_cache
from quickmerge.models.decoder import find_decoder

LONG, SHORT = 24, 19
SETTINGS: dict[str, Any] = {"sinks": 1, "recent": 3, "min_tokens": 0}
TOLERANCE = 5e-4
"""Of logits in float32, of models whose attention is far from flat."""

REDUCERS: tuple[Callable[[float], Any], ...] = (
    lambda keep: qm.QuickMerge(keep=keep, window=8, spans="none"),
    lambda keep: qm.ToMe(keep=keep),
)


def ids_of(rows: int, length: int, seed: int = 0) -> Tensor:
    """Random ids without special tokens."""
    return torch.randint(3, 97, (rows, length), generator=torch.Generator().manual_seed(seed))


def padded() -> tuple[Tensor, Tensor, Tensor]:
    """Ids, mask and positions of a long and a short row, padded on the left."""
    ids = ids_of(2, LONG, 1)
    mask = torch.ones_like(ids)
    mask[1, : LONG - SHORT] = 0
    return ids * mask, mask, (mask.cumsum(-1) - 1).clamp_min(0)


def close(a: Tensor, b: Tensor, what: str) -> None:
    """Assert that logits agree, relative to how large they are."""
    scale = max(1.0, float(b.abs().max()))
    worst = float((a.float() - b.float()).abs().max())
    assert worst <= TOLERANCE * scale, f"{what}: logits differ by {worst:.2e} of {scale:.2e}"


def generated(model: Any, ids: Tensor, mask: Tensor, new: int = 3, **more: Any) -> Any:
    """Greedy tokens with their logits."""
    return model.generate(
        ids, attention_mask=mask, max_new_tokens=new, min_new_tokens=new, do_sample=False,
        return_dict_in_generate=True, output_logits=True, pad_token_id=0, **more,
    )  # fmt: skip


@torch.no_grad()
def prefix(model: Any, layer: int) -> None:
    """Merging a prompt in front of a block; see `test_families`."""
    with qm.reduce(model, REDUCERS[0](0.5), layer, **SETTINGS):
        pass  # what can't be served is refused here
    ids, mask, position = padded()
    inputs = {"attention_mask": mask, "position_ids": position}
    depth = len(find_decoder(model))
    plain, plain_padded = model(ids_of(2, LONG)).logits, model(ids, **inputs).logits
    once, itself = generated(model, ids, mask), own_deviation(model)
    # What a model does not do by itself, in the installed transformers, no one can ask of it with fewer tokens.
    alone, beams = itself[0] and holds(_rows_alone, model, ids, mask), itself[0] and holds(_beams, model)
    for reducer in REDUCERS:
        # Keeping everything is the model, bit for bit.
        with qm.reduce(model, reducer(1.0), layer, **SETTINGS):
            assert torch.equal(model(ids_of(2, LONG)).logits, plain), "keep=1 differs from the model"
            assert torch.equal(model(ids, **inputs).logits, plain_padded), "keep=1 differs from the model, padded"
            again = generated(model, ids, mask)
            assert torch.equal(again.sequences, once.sequences), "keep=1 writes another text"
        with qm.reduce(model, reducer(0.5), layer, **SETTINGS) as run:
            out = model(ids_of(2, LONG))
            assert run.summary().tokens_per_layer == [LONG] * layer + [LONG / 2] * (depth - layer), "tokens per layer"
            assert out.logits.shape[1] == LONG // 2 and bool(out.logits.isfinite().all()), "logits of the slots"
            _goes_on_cached(model, *itself)
            if alone:
                _rows_alone(model, ids, mask)
            if beams:
                _beams(model)
        assert torch.equal(model(ids_of(2, LONG)).logits, plain), "the model is not what it was"


def holds(law: Callable[..., None], *args: Any) -> bool:
    """Whether a law holds."""
    try:
        law(*args)
    except AssertionError:
        return False
    return True


def own_deviation(model: Any) -> tuple[bool, bool]:
    """Whether a plain model goes on with its cache, by one token and by two at once, as it reads without one."""
    ids = ids_of(2, LONG + 2, 2)
    whole = model(ids, use_cache=False).logits
    found = []
    for new in (1, 2):
        cache = returned_cache(model(ids[:, :LONG], use_cache=True))
        more = model(ids[:, LONG : LONG + new], **cache_argument(model, cache), use_cache=True).logits
        found.append(float((more - whole[:, LONG : LONG + new]).abs().max()) <= TOLERANCE * float(whole.abs().max()))
    return found[0], found[1]


def _goes_on_cached(model: Any, one: bool, several: bool) -> None:
    """What is written behind a merged prompt with a cache is what is read without one."""
    if not one:
        return
    ids = ids_of(2, LONG, 2)
    out = generated(model, ids, torch.ones_like(ids))
    whole = out.sequences[:, :-1]
    told = whole.shape[1] - LONG + 1
    uncached = model(whole, use_cache=False, logits_to_keep=told).logits[:, -told:]
    for step, logits in enumerate(out.logits):
        close(logits, uncached[:, step], f"cached step {step}")
    if not several:
        return
    first = model(ids, use_cache=True)
    cache = returned_cache(first)
    more = model(whole[:, LONG:], **cache_argument(model, cache), use_cache=True).logits
    close(more, uncached[:, 1:], "several tokens behind the cache")


def _rows_alone(model: Any, ids: Tensor, mask: Tensor) -> None:
    """A batch padded on the left writes what its rows write alone."""
    batch = generated(model, ids, mask)
    for i in range(len(ids)):
        row = ids[i : i + 1, LONG - int(mask[i].sum()) :]
        alone = generated(model, row, torch.ones_like(row))
        for step, (a, b) in enumerate(zip(batch.logits, alone.logits, strict=True)):
            close(a[i : i + 1], b, f"row {i} of a padded batch, step {step}")


def _beams(model: Any) -> None:
    """The score of a beam is that of its text, so its cache has followed it."""
    ids = ids_of(1, LONG, 3)
    out = generated(model, ids, torch.ones_like(ids), num_beams=3, output_scores=True, length_penalty=0.0)
    text = out.sequences
    told = text.shape[1] - LONG
    logits = model(text[:, :-1], use_cache=False, logits_to_keep=told).logits[:, -told:].log_softmax(-1)
    score = logits.gather(-1, text[:, LONG:, None]).sum()
    assert abs(float(score) - float(out.sequences_scores[0])) < 1e-2, "the score of a beam is not that of its text"


CHUNKS: dict[str, Any] = {"mode": "block_causal", "sinks": 1, "chunk": 8, "window": 4}


@torch.no_grad()
def block_causal(model: Any, layer: int) -> None:
    """Merging keys and values chunk by chunk; ``layer`` is of no account, all blocks with full attention are merged."""
    with qm.reduce(model, REDUCERS[0](0.5), **CHUNKS):
        pass  # what can't be served is refused here
    ids = ids_of(2, LONG + 2, 4)
    plain, itself = model(ids).logits, own_deviation(model)
    traits = find_decoder(model).traits
    for reducer in REDUCERS:
        with qm.reduce(model, reducer(1.0), **CHUNKS):
            close(model(ids).logits, plain, "keep=1")
        with qm.reduce(model, reducer(0.5), **CHUNKS) as run:
            whole = model(ids).logits
            counts = run.summary().tokens_per_layer
            assert any(n < ids.shape[1] for n in counts), "nothing was merged"
            for traits_of, n in zip(traits, counts, strict=True):
                assert n == ids.shape[1] or traits_of.attention == "full", "another kind of block was merged"
            assert whole.shape == plain.shape and bool(whole.isfinite().all())
            # What comes later changes nothing: a shorter text has the same logits.
            close(model(ids[:, :LONG], use_cache=False).logits, whole[:, :LONG], "a shorter text")
            if itself[0]:
                _in_pieces(model, ids, whole, several=itself[1])
        assert torch.equal(model(ids).logits, plain), "the model is not what it was"


def _in_pieces(model: Any, ids: Tensor, whole: Tensor, several: bool) -> None:
    """A text that is fed in pieces has the logits of the whole."""
    first = model(ids[:, :LONG], use_cache=True)
    cache = returned_cache(first)
    pieces = [ids[:, LONG:]] if several else [ids[:, LONG + i : LONG + i + 1] for i in range(2)]
    logits = [model(piece, use_cache=True, **cache_argument(model, cache)).logits for piece in pieces]
    close(torch.cat([first.logits, *logits], 1), whole, "in pieces")


CHECKS: dict[str, Callable[[Any, int], None]] = {
    "prefix": prefix,
    "block_causal": block_causal,
    **lm_decoding.CHECKS,
}
"""By capability."""
