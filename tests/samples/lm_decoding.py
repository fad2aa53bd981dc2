"""What Multipole attention and speculation must do on a model of any family, one function each.

They take a tiny model and raise AssertionError where a law is broken; what is refused raises UnsupportedModelError.
"""

from __future__ import annotations

import copy
import inspect
from typing import Any

import torch
from decoding_samples import Scripted
from torch import Tensor

import quickmerge as qm
from quickmerge.models.attachment import aside
from quickmerge.models.compat import cache_argument, returned_cache
from quickmerge.speculative import PromptLookup, SpeculativeDecoding
from quickmerge.speculative.proof import check_target

CLUSTERED: dict[str, Any] = {"sink": 2, "interval": 4, "block": 16, "ratio": 1 / 4, "queries": 8}
"""Settings with which a prompt of some twenty tokens has clusters that are updated while it is gone on with."""

EVERYTHING = 1000
"""A budget for every key."""

NEW = 12
"""Tokens that are written: more than a window, and than the interval of clusters."""


class PlainError(Exception):
    """The model itself, outside of any run, can't read what a law would be tried on."""


def prompts(model: Any, lengths: tuple[int, ...]) -> dict[str, Tensor]:
    """Prompts that repeat themselves, padded on the left where the model itself can read such a batch."""
    draws = torch.Generator().manual_seed(1)
    rows = []
    for length in lengths:
        row = torch.randint(3, 97, (-(-2 * length // 3),), generator=draws)
        rows.append(torch.cat([row, row])[:length])
    ids = torch.zeros(len(rows), max(lengths), dtype=torch.long)
    mask = torch.zeros_like(ids)
    for i, row in enumerate(rows):
        ids[i, -len(row) :], mask[i, -len(row) :] = row, 1
    position = (mask.cumsum(-1) - 1).clamp_min(0)
    if bool(model(ids, attention_mask=mask, **positions(model, position)).logits[:, -1].isfinite().all()):
        return {"input_ids": ids, "attention_mask": mask}
    # Softmax in float32 of a float64 mask: of a place that sees nothing a model of that kind knows nothing.
    return prompts(model, (min(lengths),) * len(lengths))


def positions(model: Any, position: Tensor) -> dict[str, Tensor]:
    """``position_ids`` for a model that takes them."""
    return {"position_ids": position} if "position_ids" in inspect.signature(model.forward).parameters else {}


def doubled(model: Any) -> Any:
    """A copy in float64, in which only a tie could tell two ways of reading apart; as it is if it can't be that."""
    model = copy.deepcopy(model)
    if model._can_set_experts_implementation():
        model.set_experts_implementation("eager")
    model.generation_config.eos_token_id = None
    model = model.double()
    try:
        ids, mask = torch.arange(3, 9)[None], torch.tensor([[0, 0, 1, 1, 1, 1]])
        model.generate(ids, attention_mask=mask, max_new_tokens=2, do_sample=False, pad_token_id=0)
    except (RuntimeError, ValueError):  # some part of it is made in float32 whatever the others are
        model = model.float()
    return model


def write(model: Any, inputs: dict[str, Tensor], **more: Any) -> Any:
    """Greedy tokens with what comes with them."""
    told = {"do_sample": False, "use_cache": True, "pad_token_id": 0, "return_dict_in_generate": True, **more}
    told.setdefault("output_logits", "custom_generate" not in more)
    return model.generate(**inputs, max_new_tokens=NEW, min_new_tokens=NEW, **told)


@torch.no_grad()
def multipole(model: Any, layer: int = 0) -> None:
    """With a budget for all keys it is the model; with less it is not, and a batch still equals its rows."""
    model = doubled(model)
    with qm.multipole(model, budget=EVERYTHING, **CLUSTERED):
        pass  # what is refused is refused here
    try:
        inputs = prompts(model, (26, 17))
        plain = write(model, inputs)
    except RuntimeError as error:
        raise PlainError(f"the tiny model itself can't write behind a padded prompt ({error})") from error
    with qm.multipole(model, budget=EVERYTHING, **CLUSTERED) as run:
        full = write(model, inputs)
    assert run.summary().clusters > 0 and run.summary().updates > 0, "nothing was clustered"
    _agree(full, plain, "a budget for all keys")
    with qm.multipole(model, budget=4, **CLUSTERED) as run:
        less = write(model, inputs)
        assert run.summary().read_share < 0.7, "not less was read"
        first = _first(less)
        assert not torch.allclose(first, _first(plain), rtol=1e-6, atol=1e-7), "with less it is the same"
        start = int((1 - inputs["attention_mask"][1]).sum())
        row = {name: x[1:, start:] for name, x in inputs.items()}
        # A model of recurrent blocks may itself read padding as something.
        if torch.allclose(_first(write_plain(model, row)), _first(plain)[1:], rtol=1e-4, atol=1e-4):
            assert torch.allclose(_first(write(model, row)), first[1:], rtol=1e-4, atol=1e-4), "a row of a batch alone"
    _agree(write(model, inputs), plain, "the model afterwards")


def write_plain(model: Any, inputs: dict[str, Tensor]) -> Any:
    """`write` by the model as it is, whatever run it is inside of."""
    with aside():
        return write(model, inputs)


def _first(found: Any) -> Tensor:
    """Logits of the second token, the first one for which clusters were read."""
    return found.logits[1].float()


def _agree(found: Any, wanted: Any, what: str) -> None:
    assert torch.equal(found.sequences, wanted.sequences), f"{what}: another text"
    a, b = torch.stack(found.logits), torch.stack(wanted.logits)
    assert torch.allclose(a, b, rtol=1e-4, atol=1e-4 * float(b.abs().max())), (
        f"{what}: {float((a - b).abs().max()):.1e}"
    )


@torch.no_grad()
def speculation(model: Any, layer: int = 0) -> None:
    """Drafts change no text, right or wrong ones, and what the cache holds behind it is what it would hold."""
    model = doubled(model)
    check_target(model)  # what is refused is refused here
    inputs = prompts(model, (14, 9))
    plain = write(model, inputs)
    for drafter in (PromptLookup(), Scripted(plain.sequences, 0.8)):
        decoding = SpeculativeDecoding(drafter, tree=6)
        found = write(model, inputs, custom_generate=decoding)
        assert torch.equal(found.sequences, plain.sequences), f"{type(drafter).__name__}: another text"
    _go_on(model, plain, found, inputs["attention_mask"])
    row = {name: x[:1] for name, x in inputs.items()}
    decoding.drafter = Scripted(plain.sequences[:1], 0.8, seed=1)
    wanted = write(model, row).sequences
    if torch.equal(wanted, plain.sequences[:1]):
        assert torch.equal(write(model, row, custom_generate=decoding).sequences, wanted), "another text of a row"
        assert decoding.stats.tokens_per_pass > 1, "drafts that are right give nothing"


def _go_on(model: Any, plain: Any, found: Any, mask: Tensor) -> None:
    """Two more tokens behind both caches."""
    mask = torch.cat([mask, torch.ones(len(mask), NEW, dtype=mask.dtype)], 1)
    logits = []
    for out in (plain, found):
        last, position = out.sequences[:, -1:], mask.sum(-1, keepdim=True) - 1
        given = {**cache_argument(model, returned_cache(out)), "use_cache": True}
        logits.append(model(last, attention_mask=mask, **positions(model, position), **given).logits[:, -1])
    scale = float(logits[0].abs().max())
    assert torch.allclose(logits[1], logits[0], rtol=1e-5, atol=1e-5 * scale), "behind the cache it goes on otherwise"


CHECKS = {"multipole": multipole, "speculation": speculation}
"""By capability, as in `lm_checks`."""
