import sys
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from quickmerge.datasets import ImageFolder, TextWindows, find_data, from_disk
from quickmerge.errors import QuickmergeError


@pytest.fixture
def datasets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    module = pytest.importorskip("datasets")
    monkeypatch.setattr(module.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    return module


def save(datasets: Any, path: Path, **columns: list[Any]) -> Path:
    datasets.Dataset.from_dict(columns).save_to_disk(path)
    return path


def pictures() -> list[Image.Image]:
    return [Image.new("RGB", (4, 4), colour) for colour in ("red", "blue")]


def test_the_only_string_column(datasets: Any, tmp_path: Path) -> None:
    column = from_disk(save(datasets, tmp_path / "data", body=["sea", None, "whale"], year=[1, 2, 3]))
    assert (column.name, column.kind, len(column)) == ("body", "text", 3)
    assert list(column) == ["sea", "", "whale"]
    assert column[-1] == "whale"
    assert column[1:] == ["", "whale"]
    with pytest.raises(IndexError):
        column[3]


def test_a_column_named_text_goes_before_other_strings(datasets: Any, tmp_path: Path) -> None:
    path = save(datasets, tmp_path / "data", title=["a"], text=["sea"])
    assert list(from_disk(path)) == ["sea"]
    assert list(from_disk(path, "title")) == ["a"]


def test_images(datasets: Any, tmp_path: Path) -> None:
    column = from_disk(save(datasets, tmp_path / "data", image=pictures(), label=[0, 1]))
    assert (column.name, column.kind) == ("image", "images")
    images = ImageFolder(column, 2)
    assert images[1][:, 0, 0].tolist() == [0, 0, 1]
    assert images.describe(1) == "image 2"
    assert images.fingerprint() != ImageFolder(column, 4).fingerprint()


def test_texts_become_windows(datasets: Any, tmp_path: Path) -> None:
    def letters(text: str, **_: Any) -> dict[str, list[int]]:
        return {"input_ids": [ord(letter) for letter in text]}

    windows = TextWindows(letters, from_disk(save(datasets, tmp_path / "data", text=["ab", "cdef"])), 3)
    assert windows[0].tolist() == [99, 100, 101]
    assert windows.describe(0) == "text 2, tokens 0-3"


def test_a_choice_is_left_to_the_user(datasets: Any, tmp_path: Path) -> None:
    strings = save(datasets, tmp_path / "strings", a=["x"], b=["y"], n=[1])
    both = save(datasets, tmp_path / "both", text=["x", "y"], image=pictures())
    listed = r"a \(text\), b \(text\), n \(neither text nor image\)"
    with pytest.raises(QuickmergeError, match=f"several columns to train on, name one of them: {listed}"):
        from_disk(strings)
    with pytest.raises(QuickmergeError, match=r"name one of them: text \(text\), image \(images\)"):
        from_disk(both)
    assert from_disk(both, "image").kind == "images"


def test_columns_that_will_not_do(datasets: Any, tmp_path: Path) -> None:
    path = save(datasets, tmp_path / "data", body=["x"], n=[1])
    with pytest.raises(
        QuickmergeError, match=r"a column 'bodi' of texts or images \(did you mean 'body'\?\), got body"
    ):
        from_disk(path, "bodi")
    with pytest.raises(QuickmergeError, match="a column 'n' of texts or images, got"):
        from_disk(path, "n")
    with pytest.raises(QuickmergeError, match=r"must have a column of texts or images, got n \(neither"):
        from_disk(save(datasets, tmp_path / "numbers", n=[1]))


def test_splits(datasets: Any, tmp_path: Path) -> None:
    part = datasets.Dataset.from_dict({"text": ["sea"]})
    other = datasets.Dataset.from_dict({"text": ["whale"]})
    for name, splits in {"both": {"test": other, "train": part}, "one": {"test": other}}.items():
        datasets.DatasetDict(splits).save_to_disk(tmp_path / name)
    datasets.DatasetDict({"a": part, "b": part}).save_to_disk(tmp_path / "odd")
    assert list(from_disk(tmp_path / "both")) == ["sea"]
    assert list(from_disk(tmp_path / "one")) == ["whale"]
    with pytest.raises(QuickmergeError, match="must hold a split named train, got a, b"):
        from_disk(tmp_path / "odd")


def test_parquet_and_jsonl_and_several(datasets: Any, tmp_path: Path) -> None:
    files = tmp_path / "files"
    files.mkdir()
    datasets.Dataset.from_dict({"text": ["a", "b"]}).to_parquet(files / "a.parquet")
    (files / "b.jsonl").write_text('{"text": "c"}\n{"text": "d"}\n')
    data = find_data([files])
    assert data.kind == "dataset"
    assert list(from_disk(data.files)) == ["a", "b", "c", "d"]
    assert list(from_disk(files / "b.jsonl")) == ["c", "d"]


def test_what_cannot_be_read_is_named(datasets: Any, tmp_path: Path) -> None:
    (tmp_path / "a.parquet").write_bytes(b"no")
    (tmp_path / "a.jsonl").write_text("{no")
    (tmp_path / "a.csv").write_text("a,b\n")
    (tmp_path / "folder").mkdir()
    for name in ("a.parquet", "a.jsonl", "folder"):
        with pytest.raises(QuickmergeError, match=f"{name} can't be read as a dataset: .") as told:
            from_disk(tmp_path / name)
        assert "\n" not in str(told.value)
    with pytest.raises(QuickmergeError, match=r"a\.csv must be a folder written by save_to_disk"):
        from_disk(tmp_path / "a.csv")
    with pytest.raises(QuickmergeError, match="gone does not exist"):
        from_disk(tmp_path / "gone")
    with pytest.raises(QuickmergeError, match="no datasets"):
        from_disk([])


def test_parts_must_have_the_same_columns(datasets: Any, tmp_path: Path) -> None:
    one = save(datasets, tmp_path / "one", text=["a"])
    other = save(datasets, tmp_path / "other", text=[1])
    with pytest.raises(QuickmergeError, match="one and the other datasets must hold the same columns"):
        from_disk([one, other])


def test_without_the_extra_the_error_says_how_to_get_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(QuickmergeError, match=r"datasets, which is not installed: pip install quickmerge\[datasets\]"):
        from_disk(tmp_path)
