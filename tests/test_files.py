import errno
import json
import os
import stat
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from quickmerge.errors import QuickmergeError
from quickmerge.files import check_output, read_text, settle, write_bytes, write_folder, write_json
from quickmerge.staging import new_part, new_stage


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


@pytest.fixture(params=[0o022, 0o077, 0o002], ids=oct)
def umask(request: pytest.FixtureRequest) -> Iterator[int]:
    before = os.umask(request.param)
    yield request.param
    os.umask(before)


def test_a_folder_is_written_and_replaced_whole(tmp_path: Path) -> None:
    target = tmp_path / "deep" / "target"
    write_folder(target, lambda work: write_json(work / "sub" / "one.json", {"a": 1}))
    assert (target / "sub" / "one.json").read_text() == '{\n "a": 1\n}\n'
    write_folder(target, lambda work: write_bytes(work / "two", b"2"))
    assert names(target) == ["two"] and names(target.parent) == ["target"]


def test_what_fails_leaves_the_old_folder(tmp_path: Path) -> None:
    target = tmp_path / "target"
    write_folder(target, lambda work: write_bytes(work / "old", b""))

    def fill(work: Path) -> None:
        write_bytes(work / "new", b"")
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with pytest.raises(QuickmergeError) as caught:
        write_folder(target, fill)
    assert str(target) in str(caught.value) and "No space left on device" in str(caught.value)
    assert names(tmp_path) == ["target"] and names(target) == ["old"]


def test_a_swap_that_fails_is_undone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    target = tmp_path / "target"
    write_folder(target, lambda work: write_bytes(work / "old", b""))
    rename, calls = os.rename, []

    def second_fails(*paths: Any) -> None:
        calls.append(paths)
        if len(calls) == 2:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        rename(*paths)

    monkeypatch.setattr(os, "rename", second_fails)
    with pytest.raises(QuickmergeError, match="Input/output error"):
        write_folder(target, lambda work: write_bytes(work / "new", b""))
    assert names(tmp_path) == ["target"] and names(target) == ["old"]


def test_settling_brings_back_what_was_away_and_removes_the_rest(tmp_path: Path) -> None:
    away, half, other = new_stage(tmp_path, "a"), new_stage(tmp_path, "a"), new_stage(tmp_path, "a.b")
    (away.folder / "old").mkdir()
    (away.old / "word").write_text("old")
    (half.new / "half").write_text("")
    (tmp_path / ".c.0123456789abcdef0123456789abcdef.quickmerge").mkdir()  # killed before its mark was made
    part, handle = new_part(tmp_path)
    os.close(handle)
    settle(tmp_path, "a")
    assert (tmp_path / "a" / "word").read_text() == "old"
    assert other.folder.exists() and part.exists() and not half.folder.exists()
    settle(tmp_path)
    assert names(tmp_path) == ["a"]


def test_what_a_running_write_holds_is_left_alone(tmp_path: Path) -> None:
    def fill(work: Path) -> None:
        write_bytes(work / "one", b"1")
        settle(tmp_path)
        assert (work / "one").exists()

    write_folder(tmp_path / "target", fill)
    assert names(tmp_path / "target") == ["one"]


OWN = st.from_regex(
    r"\.?[a-c]{1,2}(\.[a-c0-9]{1,8}){0,2}(\.(old|tmp|part|quickmerge|quickmerge-part))?", fullmatch=True
)


@given(st.dictionaries(OWN, st.booleans(), max_size=8))
def test_nothing_of_the_users_is_touched_whatever_it_is_called(tmp_path_factory: Any, entries: dict[str, bool]) -> None:
    folder = tmp_path_factory.mktemp("own")
    marked = ".a.0123456789abcdef0123456789abcdef.quickmerge"  # even one with the form of ours, but without our mark
    for name, is_folder in {**entries, marked: True}.items():
        if is_folder:
            (folder / name).mkdir()
            (folder / name / "word").write_text(name)
        else:
            (folder / name).write_text(name)
    before = {path: path.read_text() for path in folder.rglob("*") if path.is_file()}
    write_folder(folder / "target", lambda work: write_bytes(work / "new", b""))
    write_folder(folder / "target", lambda work: write_bytes(work / "new", b""))
    write_bytes(folder / "file", b"")
    settle(folder)
    assert {path: path.read_text() for path in before} == before
    assert set(names(folder)) == {*entries, marked, "target", "file"}


def test_a_link_stays_and_what_it_leads_to_is_written(tmp_path: Path) -> None:
    real, link = tmp_path / "disk" / "real", tmp_path / "link"
    write_folder(real, lambda work: write_bytes(work / "old", b""))
    link.symlink_to(real)
    write_folder(link, lambda work: write_bytes(work / "new", b""))
    assert link.is_symlink() and names(real) == ["new"] and names(tmp_path) == ["disk", "link"]
    (tmp_path / "to-file").symlink_to(Path("disk") / "file")  # to nothing yet
    for word in (b"one", b"two"):
        write_bytes(tmp_path / "to-file", word)
        assert (tmp_path / "to-file").is_symlink() and (tmp_path / "disk" / "file").read_bytes() == word
    (tmp_path / "circle").symlink_to(tmp_path / "circle")
    for write in (lambda path: write_bytes(path, b""), lambda path: write_folder(path, lambda work: None)):
        with pytest.raises(QuickmergeError, match="circle can't be written"):
            write(tmp_path / "circle")


def test_modes_are_what_the_umask_asks_for(tmp_path: Path, umask: int) -> None:
    def fill(work: Path) -> None:
        (work / "sub").mkdir(mode=0o700)
        for path in (work / "private", work / "sub" / "private"):
            os.close(os.open(path, os.O_WRONLY | os.O_CREAT, 0o600))  # as libraries write weights

    write_bytes(tmp_path / "file", b"")
    write_folder(tmp_path / "made" / "folder", fill)
    for path in [tmp_path / "file", *(tmp_path / "made").rglob("*"), tmp_path / "made"]:
        assert mode(path) == (0o777 if path.is_dir() else 0o666) & ~umask, path


def test_a_file_that_is_replaced_keeps_its_mode(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_text("old")
    path.chmod(0o640)
    write_bytes(path, b"new")
    assert mode(path) == 0o640 and path.read_bytes() == b"new"


def test_a_file_is_written_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "file"
    write_bytes(path, b"old")

    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(QuickmergeError, match="No space left"):
        write_bytes(path, b"new")
    assert path.read_bytes() == b"old" and names(tmp_path) == ["file"]


def test_a_named_pipe_is_written_through(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pipe, found = tmp_path / "pipe", []
    os.mkfifo(pipe)
    check_output(pipe)
    reader = threading.Thread(target=lambda: found.append(pipe.read_bytes()))
    reader.start()
    write_bytes(pipe, b"x" * 200_000)  # more than a pipe holds at once
    reader.join()
    assert found == [b"x" * 200_000] and stat.S_ISFIFO(pipe.stat().st_mode)
    monkeypatch.setattr("quickmerge.files.PATIENCE", 0.1)
    with pytest.raises(QuickmergeError, match="nobody reads"):
        write_bytes(pipe, b"")
    assert stat.S_ISFIFO(pipe.stat().st_mode) and names(tmp_path) == ["pipe"]


def test_devices_stay_devices(tmp_path: Path) -> None:
    places = [Path("/dev/null")]
    try:
        os.mknod(tmp_path / "null", 0o666 | stat.S_IFCHR, os.makedev(1, 3))
        places.append(tmp_path / "null")
    except PermissionError:
        pass  # only root makes devices
    for path in places:
        check_output(path)
        write_json(path, {"a": 1})
        assert stat.S_ISCHR(path.stat().st_mode)
    with pytest.raises(QuickmergeError, match="No space left"):
        write_bytes(Path("/dev/full"), b"x")


@pytest.mark.parametrize("path", ["/dev/stdout", "/dev/fd/1", "/proc/self/fd/1", "link"])
@pytest.mark.parametrize("into", ["pipe", "file"])
def test_what_goes_to_stdout_follows_what_was_printed(tmp_path: Path, path: str, into: str) -> None:
    if path == "link":
        (tmp_path / "link").symlink_to("/dev/stdout")
        path = str(tmp_path / "link")
    code = (
        "import sys; from pathlib import Path; from quickmerge.files import *; path = Path(sys.argv[1]);"
        "check_output(path); print('before'); write_json(path, [1]); print('after')"
    )
    command = [sys.executable, "-c", code, path]
    if into == "file":
        with (tmp_path / "out").open("wb") as out:
            subprocess.run(command, stdout=out, check=True)
        said = (tmp_path / "out").read_text()
    else:
        said = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert said == "before\n[\n 1\n]\nafter\n"


def test_what_cannot_be_written_is_told_beforehand(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    wrong = {
        tmp_path: "it is a folder",
        tmp_path / "file" / "below": "Not a directory",
        tmp_path / "nul\0byte": "no name of a file",
        tmp_path / "half\ud800": "no name of a file",
        tmp_path / ("x" * 5000): "File name too long",
        Path("/dev/fd/7654"): "Bad file descriptor",
    }
    for path, reason in wrong.items():
        for write in (check_output, lambda path: write_bytes(path, b"")):
            with pytest.raises(QuickmergeError, match=reason):
                write(path)
    with pytest.raises(QuickmergeError, match="Not a directory"):
        write_folder(tmp_path / "file", lambda work: None)
    check_output(None, tmp_path / "deep" / "new.json", tmp_path / "file")
    assert names(tmp_path) == ["deep", "file"] and (tmp_path / "file").read_text() == "mine"


def test_names_as_long_as_the_disk_allows(tmp_path: Path) -> None:
    write_bytes(tmp_path / ("x" * 255), b"1")
    assert names(tmp_path) == ["x" * 255]


def test_json_is_utf8_whatever_its_text_holds(tmp_path: Path) -> None:
    write_json(tmp_path / "a.json", {"text": "é \ud800"})
    assert json.loads((tmp_path / "a.json").read_text(encoding="utf-8")) == {"text": "é \ud800"}


def test_text_is_read_from_regular_files_and_open_pipes_alone(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "zero").symlink_to("/dev/zero")
    for name, kind in (("pipe", "a named pipe"), ("zero", "a device")):
        with pytest.raises(QuickmergeError, match=f"regular file, got {kind}"):
            read_text(tmp_path / name)
    with pytest.raises(QuickmergeError, match="no name of a file"):
        read_text(Path("a\0b"))
    ends = os.pipe()
    os.write(ends[1], b"some words")
    os.close(ends[1])
    try:
        assert read_text(Path(f"/dev/fd/{ends[0]}")) == "some words"
    finally:
        os.close(ends[0])
