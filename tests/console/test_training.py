"""What training commands share."""

from __future__ import annotations

from pathlib import Path

import pytest

from quickmerge.console import training
from quickmerge.console.training import reads_once, text_documents
from quickmerge.errors import QuickmergeError

FEW, MANY = 10, 2**80


def never() -> int:
    raise AssertionError("what is not needed costs a look at an image")


@pytest.mark.parametrize(
    ("wanted", "need", "looks", "folder", "read", "told"),
    [
        (None, FEW, 9, None, True, "the features of 5 texts take 0.00 GiB of memory: read once"),
        (True, FEW, 1, None, True, "of memory: read once"),
        (None, MANY, 9, None, False, "that may be used: texts are read in every step"),
        (None, MANY, 1, Path("there"), True, "in there: read once"),
    ],
)
def test_features_are_kept_where_that_fits_and_saves_something(
    capsys, wanted: bool | None, need: int, looks: int, folder: Path | None, read: bool, told: str
) -> None:
    assert reads_once(wanted, "texts", 5, lambda: need, looks=looks, folder=folder) is read
    assert told in " ".join(capsys.readouterr().err.split())


@pytest.mark.parametrize(("wanted", "looks"), [(False, 9), (None, 5)])
def test_nothing_is_asked_or_told_where_it_would_save_nothing(capsys, wanted: bool | None, looks: int) -> None:
    assert reads_once(wanted, "texts", 5, never, looks=looks) is False and capsys.readouterr().err == ""


def test_what_is_asked_for_and_does_not_fit_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(training, "SHARE_OF_MEMORY", 0.0)
    with pytest.raises(QuickmergeError, match="--keep-features can't be used: the features of 5 texts take"):
        reads_once(True, "texts", 5, lambda: FEW, looks=9)


def test_documents_are_texts(tmp_path: Path) -> None:
    from PIL import Image

    (tmp_path / "a.txt").write_text("the sea")
    assert [path.name for path in text_documents([tmp_path], None)] == ["a.txt"]
    Image.new("RGB", (4, 4)).save(tmp_path / "b.png")
    with pytest.raises(QuickmergeError, match="--data must name texts, got images"):
        text_documents([tmp_path / "b.png"], None)
