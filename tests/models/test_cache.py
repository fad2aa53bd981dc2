import threading
from pathlib import Path

import pytest

from quickmerge.errors import CacheFolderError
from quickmerge.models import cache_folder, load
from quickmerge.models.download import replacing_folder
from quickmerge.staging import new_stage


def test_the_environment_names_the_folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv("QUICKMERGE_CACHE", str(tmp_path / "own"))
    assert cache_folder() == tmp_path / "own"
    assert cache_folder(tmp_path / "given") == tmp_path / "given"
    monkeypatch.delenv("QUICKMERGE_CACHE")
    assert cache_folder() == tmp_path / "quickmerge"
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert cache_folder() == Path.home() / ".cache" / "quickmerge"


def test_a_folder_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(CacheFolderError) as caught:
        load("smollm2-135m", cache_dir=tmp_path / "file" / "cache", progress=False)
    assert str(tmp_path / "file" / "cache") in str(caught.value)
    assert "QUICKMERGE_CACHE" in str(caught.value)


def test_a_folder_appears_whole_or_not_at_all(tmp_path: Path) -> None:
    target = tmp_path / "target"
    with pytest.raises(KeyboardInterrupt), replacing_folder(target) as work:
        (work / "half").write_text("")
        raise KeyboardInterrupt
    assert [path.name for path in tmp_path.iterdir() if path.is_dir()] == []
    with replacing_folder(target) as work:
        (work / "whole").write_text("")
        assert not target.exists()
    assert [path.name for path in target.iterdir()] == ["whole"]


def test_what_a_killed_run_left_is_removed_and_nothing_of_the_users(tmp_path: Path) -> None:
    left_over = new_stage(tmp_path, "target")
    (left_over.new / "half").write_text("")
    own = tmp_path / ".target.abc.tmp"
    own.mkdir()
    with replacing_folder(tmp_path / "target"):
        assert not left_over.folder.exists() and own.exists()


def test_a_home_that_is_not_there_is_told_in_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("QUICKMERGE_CACHE", "~no-such-user/cache")
    with pytest.raises(CacheFolderError, match="no-such-user"):
        cache_folder()


def test_two_at_once_make_one(tmp_path: Path) -> None:
    target = tmp_path / "target"
    made = []

    def make(word: str) -> None:
        with replacing_folder(target) as work:
            if not target.exists():
                made.append(word)
                (work / "word").write_text(word)

    threads = [threading.Thread(target=make, args=(word,)) for word in "abcd"]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert made == [(target / "word").read_text()]
    assert not list(tmp_path.glob(".target.*.quickmerge"))
