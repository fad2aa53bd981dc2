"""A model with other rows for a while."""

from pathlib import Path

import pytest
import torch
from tokenizer_samples import SENTENCES
from transplant_samples import model_folder

from quickmerge.models import load
from quickmerge.transplant.choose_by_text import Exchanged
from quickmerge.transplant.quality import score_texts


@pytest.mark.parametrize("family", ["llama", "llama tied", "gpt2", "neox", "phi"])
def test_the_model_is_as_before_whatever_happens(family: str, tmp_path: Path) -> None:
    model, tokenizer = load(model_folder(tmp_path / "base", family), progress=False)
    table = model.get_input_embeddings()
    table.padding_idx = table.num_embeddings - 1  # a row that a smaller vocabulary lacks
    before = {name: value.clone() for name, value in model.state_dict().items()}
    bits = score_texts(model, tokenizer, SENTENCES).bits
    parts = {"input": table.weight, "output": model.get_output_embeddings().weight}
    bias = getattr(model.get_output_embeddings(), "bias", None)
    with pytest.raises(RuntimeError, match="on purpose"), Exchanged(model) as exchanged:
        smaller = {side: weight.detach()[:300] * 2 for side, weight in parts.items()}
        if bias is not None:
            smaller["bias"] = bias.detach()[:300] + 1
        exchanged.put(smaller)
        ids = torch.arange(290, 300)[None]
        assert model(ids).logits.shape == (1, 10, 300)
        tied = model.get_input_embeddings().weight is model.get_output_embeddings().weight
        assert tied is exchanged.tied is (family in ("llama tied", "gpt2"))
        raise RuntimeError("on purpose")
    after = model.state_dict()
    assert after.keys() == before.keys() and all(torch.equal(value, before[name]) for name, value in after.items())
    assert table.padding_idx == table.num_embeddings - 1
    assert score_texts(model, tokenizer, SENTENCES).bits == bits
