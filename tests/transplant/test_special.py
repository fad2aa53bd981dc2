"""Special tokens are matched by what they are for."""

from __future__ import annotations

import pytest
from tokenizer_samples import from_words, wordpiece
from tokenizers import AddedToken

from quickmerge.errors import QuickmergeError
from quickmerge.models.tokenizers import roles_by_spelling
from quickmerge.transplant.tokens import Vocabulary, is_marker, is_reserved, match_special, read_vocabulary


def vocabulary(*texts: str, **roles: str) -> Vocabulary:
    return read_vocabulary(from_words({"Ġuser": 0}, *(AddedToken(text, special=True) for text in texts), **roles))


def found(donor: Vocabulary, base: Vocabulary, special: dict[str, str] | None = None) -> dict[str, list[str]]:
    pairs, unmapped = match_special(donor, base, special)
    assert {*pairs, *unmapped} >= {token.id for token in donor.tokens if token.special}
    assert not set(pairs) & set(unmapped)
    return {donor.by_id[one].text: [base.by_id[other].text for other in others] for one, others in pairs.items()}


def test_roles_come_before_texts() -> None:
    # what ends a text must still end it: the base stops on <|im_end|>
    donor = vocabulary("<|im_end|>", "<|endoftext|>", eos_token="<|endoftext|>")
    base = vocabulary("<|endoftext|>", "<|im_end|>", eos_token="<|im_end|>")
    assert found(donor, base) == {"<|im_end|>": ["<|im_end|>"], "<|endoftext|>": ["<|im_end|>"]}


def test_a_token_with_several_roles_keeps_them_all_the_end_first() -> None:
    donor = vocabulary("<|x|>", bos_token="<|x|>", eos_token="<|x|>", pad_token="<|x|>")
    base = vocabulary("<s>", "</s>", "<pad>", bos_token="<s>", eos_token="</s>", pad_token="<pad>")
    assert found(donor, base) == {"<|x|>": ["</s>", "<s>"]}
    same = vocabulary("<|y|>", bos_token="<|y|>", eos_token="<|y|>")
    assert found(donor, same) == {"<|x|>": ["<|y|>"]}


def test_what_fills_a_batch_is_matched_last() -> None:
    donor = vocabulary("<|endoftext|>", "<|pad|>", pad_token="<|endoftext|>")
    base = vocabulary("</s>", "<|endoftext|>", eos_token="</s>", pad_token="</s>")
    # eos by the way it's spelled, since the tokenizer names none
    assert found(donor, base) == {"<|endoftext|>": ["</s>"]}
    donor, base = vocabulary("<|p|>", pad_token="<|p|>"), vocabulary("<|p|>", "<|q|>", pad_token="<|q|>")
    assert found(donor, base) == {"<|p|>": ["<|p|>"]}
    assert found(vocabulary("<|r|>", pad_token="<|r|>"), base) == {"<|r|>": ["<|q|>"]}


def test_encoders_and_decoders_open_and_close_texts_alike() -> None:
    base = vocabulary("<s>", "</s>", "<unk>")
    donor = read_vocabulary(wordpiece())
    assert found(donor, base) == {"[UNK]": ["<unk>"], "[CLS]": ["<s>"], "[SEP]": ["</s>"]}
    pairs, unmapped = match_special(donor, base)
    assert [donor.by_id[one].text for one in unmapped] == ["[PAD]", "[MASK]"]
    assert list(pairs) == sorted(pairs)
    assert found(base, donor) == {"<s>": ["[CLS]"], "</s>": ["[SEP]"], "<unk>": ["[UNK]"]}


def test_a_text_that_is_plain_in_the_base_is_no_match() -> None:
    donor = vocabulary("user", "<|a|>")
    base = read_vocabulary(from_words({"user": 0, "<|a|>": 1}))
    assert match_special(donor, base)[0] == {}


def test_the_users_map_wins() -> None:
    donor = vocabulary("<|u|>", "<s>", bos_token="<s>")
    tokenizer = from_words({"Ġuser": 0}, AddedToken("<s>", special=True), AddedToken("<|v|>", special=True))
    base = read_vocabulary(tokenizer)
    wanted = {"<|u|>": " user user", "<s>": "<|v|>"}
    pairs, _ = match_special(donor, base, wanted, base_tokenizer=tokenizer)
    assert pairs == {donor.by_text["<|u|>"].id: (0, 0), donor.by_text["<s>"].id: (base.by_text["<|v|>"].id,)}
    # a single token of the base needs no tokenizer
    assert match_special(donor, base, {"<|u|>": "Ġuser"})[0][donor.by_text["<|u|>"].id] == (0,)


def test_a_map_that_cannot_be_followed_is_refused() -> None:
    donor, base = vocabulary("<|user|>"), vocabulary("<s>")
    with pytest.raises(
        QuickmergeError, match=r"special names '<\|usr\|>' \(did you mean '<\|user\|>'\?\), which the donor"
    ):
        match_special(donor, base, {"<|usr|>": "user"})
    with pytest.raises(QuickmergeError, match="'two words', which is no token of the base: give base_tokenizer too"):
        match_special(donor, base, {"<|user|>": "two words"})
    encoder = wordpiece()
    for meaning, count in (("", 0), ("\u0b95", 1)):
        with pytest.raises(
            QuickmergeError, match=f"must map it to a text that the base's tokenizer knows .it gives {count}"
        ):
            match_special(donor, read_vocabulary(encoder), {"<|user|>": meaning}, base_tokenizer=encoder)


def test_what_reads_like_a_marker() -> None:
    yes = ("<|im_start|>", "<｜begin▁of▁sentence｜>", "[INST]", "[/INST]", "<think>", "</tool_call>", "<start_of_turn>")
    no = ("<td>", "</h1>", "  ", "[1]", "<", "a<b>", "<0x0A>", "hello", "[a]")
    assert all(is_marker(text) for text in yes)
    assert not any(is_marker(text) for text in no)
    assert all(
        is_reserved(text) for text in ("<unused7>", "[unused12]", "<|reserved_special_token_0|>", "<extra_id_3>")
    )
    assert not any(is_reserved(text) for text in ("unused7", "[unused]", "<|im_start|>", "<s>"))


def test_roles_by_spelling() -> None:
    assert roles_by_spelling(["<s>", "</s>", "x"]) == {"bos": "<s>", "eos": "</s>"}
    assert roles_by_spelling(["<|endoftext|>", "</s>"]) == {"eos": "</s>"}
    assert roles_by_spelling([]) == {}
