"""The prior that ships, on the real model."""

from __future__ import annotations

import copy

import pytest
import torch
from caches import past

import quickmerge as qm
from quickmerge.data import PRIORS
from quickmerge.merge.attach import reduce
from quickmerge.models.identity import model_hash

MOST = 20 * 2**20


@pytest.mark.parametrize("name", PRIORS)
def test_it_is_small_and_says_what_it_is_for(name: str) -> None:
    folder = qm.shipped_prior(name)
    assert folder is not None
    assert sum(path.stat().st_size for path in folder.iterdir()) < MOST
    prior = qm.Prior.from_pretrained(folder)
    about = prior.config.trained_for
    assert about["model"] == name and about["layers"]
    assert qm.shipped_prior("no such") is None


def test_it_fits_its_model_in_both_types(smollm2) -> None:
    model, _ = smollm2
    reducer = qm.QuickMergePrior.from_prior(qm.Prior.from_pretrained(qm.shipped_prior("smollm2-135m")), keep=0.2)
    reducer.check(model, (8, 25), "prefix")
    # In half precision it is the same model; and copies of the file that were made before all weights counted fit too.
    assert model_hash(copy.deepcopy(model).to(torch.bfloat16)) == reducer.prior.config.trained_for["hash"]
    reducer.prior.config.trained_for["hash"] = "df959bd01cbd4d71b8f35198b2247647610878847c500379f5447497283bc886"
    reducer.check(model, (8, 25), "prefix")


@pytest.mark.slow
def test_it_predicts_better_from_few_tokens_than_none(smollm2) -> None:
    """On the shipped document, which no training has seen: lower NLL of what follows."""
    from transformers import DynamicCache

    from quickmerge.data import demo_document

    model, tokenizer = smollm2
    ids = tokenizer(demo_document(), return_tensors="pt")["input_ids"]
    prior = qm.Prior.from_pretrained(qm.shipped_prior("smollm2-135m"))

    def nll(reducer: qm.QuickMerge, start: int) -> float:
        cache = DynamicCache(config=model.config)
        window = ids[:, start : start + 1216]
        with torch.no_grad(), reduce(model, reducer):
            model(window[:, :1024], **past(cache), logits_to_keep=1)
            logits = model(window[:, 1024:-1], **past(cache)).logits.log_softmax(-1)
        return float(-logits.gather(-1, window[:, 1025:, None]).mean())

    starts = range(0, ids.shape[1] - 1216, 600)
    for keep in (0.2, 0.42):
        plain = sum(nll(qm.QuickMerge(keep=keep), start) for start in starts)
        with_prior = sum(nll(qm.QuickMergePrior.from_prior(prior, keep=keep), start) for start in starts)
        assert with_prior < plain
