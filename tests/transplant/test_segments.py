from tokenizer_samples import SENTENCES, byte_level, sentencepiece_bpe

from quickmerge.transplant.matching import Segmenter
from quickmerge.transplant.tokens import read_vocabulary

BYTES = ("é".encode()[:1], b"\xff\xfe", b" the", b"\n\n", b"", "猫".encode(), b"xyz ")


def test_pieces_spell_the_bytes_whatever_they_are() -> None:
    for tokenizer in (byte_level(), sentencepiece_bpe()):
        vocabulary = read_vocabulary(tokenizer)
        segmenter = Segmenter(vocabulary, tokenizer)
        for data in (*BYTES, *(sentence.encode() for sentence in SENTENCES)):
            assert vocabulary.spell(segmenter.cut(data)) == data
    assert [vocabulary.spell(ids) for ids in segmenter.cut_all(BYTES)] == list(BYTES)


def test_the_tokenizer_is_asked_first() -> None:
    tokenizer = byte_level()
    segmenter = Segmenter(read_vocabulary(tokenizer), tokenizer)
    for sentence in SENTENCES:
        assert segmenter.cut(sentence.encode()) == tuple(tokenizer(sentence)["input_ids"])


def test_a_token_can_be_left_out_of_its_own_pieces() -> None:
    vocabulary = read_vocabulary(byte_level())
    segmenter = Segmenter(vocabulary, byte_level())
    for token in vocabulary.tokens:
        if token.data is None:
            continue
        pieces = segmenter.without_tokenizer(token.data, whole=False)
        if len(token.data) == 1:
            assert pieces == ()
        else:
            assert len(pieces) >= 2 and vocabulary.spell(pieces) == token.data


def test_what_the_base_has_no_bytes_for_has_no_pieces() -> None:
    from tokenizer_samples import unigram

    segmenter = Segmenter(read_vocabulary(unigram()), unigram())
    assert segmenter.cut("字".encode()) == ()
