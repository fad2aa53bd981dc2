import math
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import transformers as hf
from tokenizer_samples import SENTENCES, byte_level, sentencepiece_bpe
from transplant_samples import SIZE

from quickmerge.errors import QuickmergeError
from quickmerge.transplant.quality import compare_logits, score_texts

TEXTS = [" ".join(SENTENCES), "Ein größeres Café. 猫\n\nthe the cat"]


def model_of(rows: int, seed: int = 0) -> Any:
    torch.manual_seed(seed)
    sizes = {**SIZE, "num_key_value_heads": 2, "max_position_embeddings": 512, "initializer_range": 0.3}
    return hf.LlamaForCausalLM(hf.LlamaConfig(vocab_size=rows, tie_word_embeddings=False, **sizes)).eval()


def with_start(tokenizer: Any) -> Any:
    """The same tokenizer with its eos before every text."""
    import copy

    from tokenizers import processors

    new = copy.deepcopy(tokenizer)
    mark = tokenizer.eos_token
    new.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{mark} $A", special_tokens=[(mark, tokenizer.eos_token_id)]
    )
    return new


@pytest.mark.parametrize("start", [False, True])
@pytest.mark.parametrize("cut", [byte_level, sentencepiece_bpe])
def test_bits_are_those_of_every_token_and_bytes_those_of_the_text(cut: Any, start: bool) -> None:
    tokenizer = with_start(cut()) if start else cut()
    model = model_of(len(tokenizer))
    new = np.random.default_rng(0).random(len(tokenizer)) < 0.5
    found = score_texts(model, tokenizer, TEXTS, new=new)
    bits = new_bits = tokens = new_tokens = 0.0
    for text in TEXTS:
        ids = tokenizer(text)["input_ids"]
        logp = model.double()(torch.tensor([ids])).logits[0].log_softmax(-1)
        for place in range(1, len(ids)):
            one = -float(logp[place - 1, ids[place]].detach()) / math.log(2)
            bits, tokens = bits + one, tokens + 1
            new_bits, new_tokens = new_bits + one * new[ids[place]], new_tokens + new[ids[place]]
    assert (found.tokens, found.new_tokens) == (tokens, new_tokens)
    assert found.bits == pytest.approx(bits, rel=1e-5) and found.new_bits == pytest.approx(new_bits, rel=1e-5)
    whole = sum(len(text.encode()) for text in TEXTS)
    if start:
        assert found.bytes == whole
    else:  # nothing can predict a first token
        first = sum(len(t[: tokenizer(t, return_offsets_mapping=True)["offset_mapping"][0][1]].encode()) for t in TEXTS)
        assert found.bytes == whole - first
    assert found.bits_per_byte == found.bits / found.bytes and found.tokens_per_byte == found.tokens / found.bytes


def test_windows_overlap_by_a_half_and_score_every_token_once() -> None:
    tokenizer = byte_level()
    model, window = model_of(len(tokenizer)), 16
    ids = tokenizer(TEXTS[0])["input_ids"]
    bits, scored, start = 0.0, 1, 0
    while scored < len(ids):
        end = min(start + window, len(ids))
        logp = model(torch.tensor([ids[start:end]])).logits[0].log_softmax(-1)
        bits -= sum(float(logp[i - start - 1, ids[i]]) for i in range(scored, end)) / math.log(2)
        start, scored = end - window // 2, end
    told: list[tuple[int, int]] = []
    found = score_texts(model, tokenizer, TEXTS[:1], window=window, advance=lambda *amounts: told.append(amounts))
    assert found.tokens == len(ids) - 1 and found.bits == pytest.approx(bits, rel=1e-5)
    assert told[-1] == (len(ids) - 1, len(ids)) and len(told) > 5


def test_a_text_of_one_token_can_not_be_scored() -> None:
    with pytest.raises(QuickmergeError, match="at least two tokens"):
        score_texts(model_of(len(byte_level())), byte_level(), ["a"])


def test_rows_that_win_are_seen() -> None:
    tokenizer = byte_level()
    model = model_of(len(tokenizer))
    new = np.zeros(len(tokenizer), bool)
    new[5:9] = True
    ids = [i for text in TEXTS for i in tokenizer(text)["input_ids"]]
    with torch.no_grad():
        states = model.model(torch.tensor([ids[:256]])).last_hidden_state[0]
        logits = model.lm_head(states)
    fair = compare_logits(model, tokenizer, TEXTS, new, ~new)
    assert fair.new_mean == pytest.approx(float(logits[:, 5:9].mean()), abs=1e-4)
    assert fair.shared_spread == pytest.approx(float(logits[:, ~torch.from_numpy(new)].std()), rel=1e-3)
    assert fair.share_won < 0.2
    with torch.no_grad():  # a row that has what all hidden states have in common, and much of it
        model.lm_head.weight[5] = 50 * states.mean(0)
    unfair = compare_logits(model, tokenizer, TEXTS, new, ~new)
    assert unfair.share_won > 0.8 and unfair.loud[0] == 0 and unfair.loudest > unfair.high


def test_no_quality_of_what_was_not_written() -> None:
    from quickmerge.transplant.quality import measure

    with pytest.raises(QuickmergeError, match="got one of a dry run"):
        measure("x", SimpleNamespace(out=None), ["a b"])  # type: ignore[arg-type]
