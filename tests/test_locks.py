"""One writer at a time, whoever it is and however it ends."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from quickmerge.errors import QuickmergeError
from quickmerge.locks import LOCK, sole_writer

HOLD = (
    "import sys, time; from pathlib import Path; from quickmerge.locks import sole_writer\n"
    "with sole_writer(Path(sys.argv[1])): print('held', flush=True); time.sleep(60)"
)


@pytest.fixture
def other(tmp_path: Path) -> subprocess.Popen[str]:
    """A process that writes ``tmp_path / "out"``."""
    process = subprocess.Popen([sys.executable, "-c", HOLD, str(tmp_path / "out")], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None and process.stdout.readline() == "held\n"
    yield process
    process.kill()
    process.wait()
    process.stdout.close()


@pytest.mark.skipif(os.name == "nt", reason="Windows has no such locks")
def test_a_second_process_is_told_of_the_first_and_takes_over_when_that_is_killed(
    tmp_path: Path, other: subprocess.Popen[str]
) -> None:
    out = tmp_path / "out"
    told = f"out must be written by one run at a time, but process {other.pid} "
    with pytest.raises(QuickmergeError, match=told), sole_writer(out):
        raise AssertionError("two at once")
    assert [path.name for path in out.iterdir()] == [LOCK]
    other.send_signal(signal.SIGKILL)
    other.wait()
    with sole_writer(out):
        assert (out / LOCK).read_text().split()[0] == str(os.getpid())
    assert list(out.iterdir()) == []


@pytest.mark.skipif(os.name == "nt", reason="Windows has no such locks")
def test_of_threads_one_writes_at_a_time_and_none_is_lost(tmp_path: Path) -> None:
    out, inside, most, refused, written = tmp_path / "out", [0], [0], [0], []
    gate = threading.Lock()

    def write(number: int) -> None:
        end = time.monotonic() + 30
        while time.monotonic() < end:
            try:
                with sole_writer(out):
                    with gate:
                        inside[0] += 1
                        most[0] = max(most[0], inside[0])
                    time.sleep(0.001)
                    written.append(number)
                    with gate:
                        inside[0] -= 1
                return
            except QuickmergeError as error:
                assert f"process {os.getpid()} (this one)" in str(error) or "another one" in str(error)
                refused[0] += 1

    threads = [threading.Thread(target=write, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(written) == list(range(8)) and most[0] == 1 and refused[0] > 0
    assert not (out / LOCK).exists()


def test_what_was_there_stays_and_what_cannot_be_written_is_told(tmp_path: Path) -> None:
    (tmp_path / "kept").mkdir()
    with sole_writer(tmp_path / "kept"):
        pass
    assert (tmp_path / "kept").is_dir()
    (tmp_path / "file").touch()
    with pytest.raises(QuickmergeError, match=r"file can't be written"), sole_writer(tmp_path / "file"):
        pass
