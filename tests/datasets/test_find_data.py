from pathlib import Path

import pytest

from quickmerge.datasets import find_data
from quickmerge.errors import QuickmergeError


def fill(folder: Path, **files: bytes) -> None:
    for name, content in files.items():
        path = folder / name.replace("__", "/").replace("_", ".")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)


def test_a_folder_of_texts_without_what_is_hidden_binary_or_empty(tmp_path: Path) -> None:
    fill(tmp_path, b_txt=b"sea", deep__a_py=b"x = 1", noext="wal\u00f6".encode(), zip_bin=b"PK\0\1", empty_txt=b"")
    fill(tmp_path, latin_txt="wal\u00f6".encode("latin-1"), _hidden=b"no")
    (tmp_path / ".git").mkdir()
    (tmp_path / ".git" / "config").write_text("no")
    data = find_data([tmp_path])
    assert data.kind == "text"
    assert [path.relative_to(tmp_path).as_posix() for path in data.files] == ["b.txt", "deep/a.py", "noext"]


def test_a_character_cut_in_two_at_the_end_of_the_sniffed_bytes_is_text(tmp_path: Path) -> None:
    (tmp_path / "long.txt").write_text("a" + "ö" * 40_000, encoding="utf-8")
    assert find_data([tmp_path]).files == (tmp_path / "long.txt",)
    (tmp_path / "cut.txt").write_bytes("ö".encode()[:1])
    with pytest.raises(QuickmergeError, match="got other bytes than UTF-8"):
        find_data([tmp_path / "cut.txt"])


def test_neither_order_nor_repetition_matters(tmp_path: Path) -> None:
    fill(tmp_path, b_txt=b"b", a_txt=b"a", sub__c_txt=b"c")
    paths = [tmp_path / "b.txt", tmp_path / "sub", tmp_path, tmp_path / "a.txt"]
    assert find_data(paths) == find_data(paths[::-1]) == find_data([tmp_path])
    assert len(find_data([tmp_path, tmp_path / "sub" / ".." / "a.txt"]).files) == 3


@pytest.mark.parametrize(
    ("name", "kind"), [("a.JPG", "images"), ("a.gif", "images"), ("a.mp4", "videos"), ("a.jsonl", "dataset")]
)
def test_suffixes(tmp_path: Path, name: str, kind: str) -> None:
    (tmp_path / name).write_bytes(b"\0")
    assert find_data([tmp_path]).kind == find_data([tmp_path / name]).kind == kind


def test_a_saved_dataset_is_one_thing_wherever_it_lies(tmp_path: Path) -> None:
    fill(tmp_path, one__data_arrow=b"\0", many__train__data_arrow=b"\0")
    for name in ("one/dataset_info.json", "one/state.json", "many/dataset_dict.json", "many/train/state.json"):
        (tmp_path / name).write_text("{}")
    data = find_data([tmp_path])
    assert data.kind == "dataset"
    assert data.files == (tmp_path / "many", tmp_path / "one")
    assert find_data([tmp_path / "one"]).files == (tmp_path / "one",)


def test_mixed_kinds_are_told(tmp_path: Path) -> None:
    fill(tmp_path, a_txt=b"a", b_txt=b"b", c_png=b"\0")
    with pytest.raises(
        QuickmergeError, match=r"of one kind, got 2 text files \(.*a\.txt, \.\.\.\) and 1 image \(.*c\."
    ):
        find_data([tmp_path])


def test_nothing_usable_says_what_was_looked_for_and_where(tmp_path: Path) -> None:
    fill(tmp_path, zip_bin=b"PK\0\1")
    with pytest.raises(
        QuickmergeError, match=r"no training data in .*: looked for UTF-8 text, images \(.*\.png"
    ) as told:
        find_data([tmp_path])
    assert str(tmp_path) in str(told.value)
    assert "\n" not in str(told.value)
    with pytest.raises(QuickmergeError, match="no training data in no paths"):
        find_data([])


@pytest.mark.parametrize(
    ("content", "reason"), [(b"PK\0\1", "binary data"), (b"", "an empty file"), (b"\xff\xfe", "other bytes than UTF-8")]
)
def test_a_named_file_must_be_usable(tmp_path: Path, content: bytes, reason: str) -> None:
    (tmp_path / "a.bin").write_bytes(content)
    with pytest.raises(QuickmergeError, match=f"a.bin can't be trained on: .* got {reason}"):
        find_data([tmp_path / "a.bin"])


def test_a_named_path_must_exist(tmp_path: Path) -> None:
    with pytest.raises(QuickmergeError, match="gone does not exist"):
        find_data([tmp_path / "gone"])


def test_a_hidden_file_that_is_named_is_taken(tmp_path: Path) -> None:
    (tmp_path / ".notes").write_text("sea")
    assert find_data([tmp_path / ".notes"]).files == (tmp_path / ".notes",)
