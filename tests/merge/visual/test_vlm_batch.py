"""A batch of prompts with images is read as its rows are, in every supported family."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from vlm_zoo import EXACT, FAMILIES, METHODS, ROWS, model_of, prompt, row_of, write

import quickmerge as qm

CASES = [
    *((name, 0) for name in METHODS),
    *((name, 2) for name in ("scope", "quickmerge")),
    *((name, [0, 2]) for name in ("tome", "trimtokenator")),
]


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(("name", "layer"), CASES)
def test_a_batch_equals_its_rows(family: str, name: str, layer: Any) -> None:
    model = model_of(family)
    with qm.reduce(model, METHODS[name], layer=layer) as run, torch.no_grad():
        texts = write(model, prompt(model, ROWS), 3)
        logits = model(**prompt(model, ROWS)).logits[:, -1]
        left = [image.left for image in run.images]
        alone = []
        for i in range(len(ROWS)):
            inputs = row_of(model, ROWS, i)
            assert write(model, inputs, 3)[0].tolist() == texts[i].tolist()
            assert torch.allclose(model(**inputs).logits[0, -1], logits[i], atol=EXACT, rtol=EXACT)
            alone += [image.left for image in run.images]
        assert alone == left


@pytest.mark.parametrize("family", ["llava", "qwen2_5_vl"])
def test_padding_on_the_right_is_left_there(family: str) -> None:
    model = model_of(family)
    inputs = prompt(model, ROWS)
    mask = inputs["attention_mask"].bool()
    for name in {"input_ids", "mm_token_type_ids"} & set(inputs):
        rows = [torch.cat([row[there], row[~there]]) for row, there in zip(inputs[name], mask, strict=True)]
        inputs[name] = torch.stack(rows)
    inputs["attention_mask"] = mask.long().sort(-1, descending=True).values
    with qm.reduce(model, METHODS["scope"], layer=[0, 2]) as run, torch.no_grad():
        logits = model(**inputs).logits
        assert run.columns is not None
        ends = (run.columns >= 0).sum(-1) - 1
        assert bool((run.columns[:, 0] == 0).all())
        for i in range(len(ROWS)):
            alone = model(**row_of(model, ROWS, i)).logits[0, -1]
            assert torch.allclose(logits[i, ends[i]], alone, atol=EXACT, rtol=EXACT)


@pytest.mark.parametrize("family", ["llava", "qwen3_vl"])
def test_half_precision_runs_and_stays_near(family: str) -> None:
    model = model_of(family)
    inputs = prompt(model, ROWS)
    half = {k: v.bfloat16() if v.is_floating_point() else v for k, v in inputs.items()}
    low = type(model)._from_config(model.config, attn_implementation="sdpa").bfloat16().eval()
    low.load_state_dict(model.state_dict())
    # Which tokens stay must not turn on rounding for the two to be compared.
    with qm.reduce(model, METHODS["random"], layer=[0, 2]), torch.no_grad():
        logits = model(**inputs).logits
    with qm.reduce(low, METHODS["random"], layer=[0, 2]), torch.no_grad():
        near = low(**half).logits
    assert near.dtype == torch.bfloat16
    assert float((near.float() - logits)[:, -1].abs().mean() / logits[:, -1].abs().mean()) < 0.1
    for name in METHODS:
        with qm.reduce(low, METHODS[name], layer=[0, 2]) as run, torch.no_grad():
            assert torch.isfinite(low(**half).logits[:, -1]).all()
        assert run.summary().visual_kept < run.summary().visual_in
