"""The command itself, with real Ray and real processes: whole, killed, resumed, refused."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pyarrow.parquet
import pytest
from batch_samples import prompts, save_tiny, write_lines

import quickmerge

COMMAND = [sys.executable, "-m", "quickmerge", "batch"]
ENVIRONMENT = {
    **os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(quickmerge.__file__).parents[1]), "COLUMNS": "200",
}  # fmt: skip
LONGEST = 540


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny(tmp_path_factory.mktemp("tiny"))


def arguments(tiny: Path, given: Path, out: Path, *more: str) -> list[str]:
    own = ["--input", str(given), "--out", str(out), "--model", str(tiny), "--min-tokens", "16", "--layer", "1"]
    return [*COMMAND, *own, "--max-new-tokens", "8", *more]


def run(command: list[str]) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command, capture_output=True, text=True, timeout=LONGEST, env=ENVIRONMENT, check=False, cwd="/"
    )


@contextlib.contextmanager
def started(command: list[str]) -> Iterator[subprocess.Popen[str]]:
    """A process of its own session, whose descendants are gone in the end."""
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=ENVIRONMENT, start_new_session=True
    )
    family = [psutil.Process(process.pid)]
    try:
        yield process
    finally:
        with contextlib.suppress(psutil.NoSuchProcess):
            family += family[0].children(recursive=True)
        for each in family:
            with contextlib.suppress(psutil.NoSuchProcess):
                each.kill()
        process.communicate(timeout=60)


def wait_for(process: subprocess.Popen[str], happened: Any) -> Any:
    """What ``happened()`` gives as soon as it is true; the process must be running until then."""
    end = time.monotonic() + LONGEST
    while not (found := happened()):
        if process.poll() is not None:
            raise AssertionError(f"it ended with {process.returncode}: {process.stderr and process.stderr.read()}")
        assert time.monotonic() < end, "it did not happen in time"
        time.sleep(0.05)
    return found


def parts(out: Path) -> list[Path]:
    return sorted(out.glob("results-*"))


def results(out: Path) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = []
    for path in parts(out):
        if path.suffix == ".parquet":
            rows += pyarrow.parquet.read_table(path).to_pylist()
        else:
            rows += [json.loads(line) for line in path.read_text().splitlines()]
    return rows


def workers_of(process: subprocess.Popen[str]) -> list[psutil.Process]:
    found = []
    for each in psutil.Process(process.pid).children(recursive=True):
        with contextlib.suppress(psutil.Error):
            if "MapWorker" in " ".join(each.cmdline()):
                found.append(each)
    return found


def checked(out: Path, texts: list[str]) -> dict[int, str]:
    """See that every row is there once, and give the answers by place."""
    found = results(out)
    assert sorted(each["index"] for each in found) == list(range(len(texts)))
    assert len({each["hash"] for each in found}) == len(texts)
    return {each["index"]: each["text"] for each in found}


def asked(folder: Path, count: int, **lengths: int) -> tuple[Path, list[str]]:
    texts = prompts(count, **lengths)
    return write_lines(folder / "in.jsonl", [{"prompt": text} for text in texts]), texts


def test_distributed_sixty_rows_killed_and_resumed(tiny: Path, tmp_path: Path) -> None:
    given, texts = asked(tmp_path, 60)
    with given.open("a") as file:
        file.write('{"prompt": 5}\n')
    out = tmp_path / "out"
    command = arguments(tiny, given, out, "--workers", "2", "--batch-size", "4", "--save-seconds", "0")
    with started(command) as process:
        wait_for(process, lambda: len(parts(out)) > 2)
        process.kill()
    before = results(out)
    assert 0 < len(before) < 60
    done = run(command)
    assert done.returncode == 3, done.stderr
    assert "1 rows can't be answered" in done.stdout
    assert "60 rows answered" in done.stdout
    assert "going on with" in done.stderr
    assert [line for line in done.stderr.splitlines() if "Ray" in line or "WARNING" in line or "INFO" in line] == []
    checked(out, texts)
    kept = {each["index"]: each for each in results(out)}
    assert all(kept[each["index"]] == each for each in before)
    assert json.loads((out / "errors.jsonl").read_text())["index"] == 60
    other = run([*command, "--keep", "0.7"])
    assert other.returncode == 2
    assert "recipe was" in other.stderr and "name another --out" in other.stderr
    assert other.stderr.count("\n") == 1


@pytest.mark.slow
def test_a_thousand_rows_survive_the_death_of_a_worker_and_of_the_driver(tiny: Path, tmp_path: Path) -> None:
    given, texts = asked(tmp_path, 1000, low=30, high=90)
    out = tmp_path / "out"
    command = arguments(tiny, given, out, "--workers", "2", "--save-seconds", "0.5")
    with started(command) as process:
        wait_for(process, lambda: parts(out))
        worker = wait_for(process, lambda: workers_of(process))[0]
        worker.kill()
        so_far = len(parts(out))
        wait_for(process, lambda: len(parts(out)) > so_far + 5)
        assert worker.pid not in [each.pid for each in workers_of(process)]
        os.kill(process.pid, signal.SIGKILL)
        process.wait(timeout=60)
    before = results(out)
    assert 0 < len(before) < 1000
    done = run(command)
    assert done.returncode == 0, done.stderr
    assert "1,000 rows answered" in done.stdout
    killed = checked(out, texts)
    whole = run(arguments(tiny, given, tmp_path / "whole", "--workers", "1", "--format", "jsonl"))
    assert whole.returncode == 0, whole.stderr
    assert checked(tmp_path / "whole", texts) == killed


@pytest.mark.slow
@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_ends_cleanly_and_says_how_to_go_on(tiny: Path, tmp_path: Path, number: int, code: int) -> None:
    given, texts = asked(tmp_path, 400, low=60, high=90)
    out = tmp_path / "out"
    command = arguments(tiny, given, out, "--workers", "1", "--batch-size", "4", "--save-seconds", "0.2")
    with started(command) as process:
        wait_for(process, lambda: parts(out))
        family = psutil.Process(process.pid).children(recursive=True)
        os.kill(process.pid, number)
        _, errors = process.communicate(timeout=120)
        assert process.returncode == code, errors
        assert "rows: the same command goes on from there" in errors
        assert "Traceback" not in errors
        _, alive = psutil.wait_procs(family, timeout=30)
        assert alive == []
    assert list(Path("/tmp").glob(f"quickmerge-ray-{process.pid}-*")) == []
    done = run(command)
    assert done.returncode == 0, done.stderr
    checked(out, texts)


@pytest.mark.slow
def test_a_cluster_by_its_address(tiny: Path, tmp_path: Path) -> None:
    given, texts = asked(tmp_path, 20)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    folder = Path(f"/tmp/qm-test-{os.getpid()}")
    head = [
        sys.executable, "-m", "ray.scripts.scripts", "start", "--head", "--block", f"--port={port}", "--num-cpus=2",
        "--node-ip-address=127.0.0.1", "--include-dashboard=false", "--disable-usage-stats", f"--temp-dir={folder}",
        "--object-store-memory=200000000",
    ]  # fmt: skip
    with started(head) as process:

        def answers() -> bool:
            with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), timeout=1):
                return True
            return False

        wait_for(process, answers)
        address = ["--ray-address", f"127.0.0.1:{port}"]
        large = run(arguments(tiny, given, tmp_path / "large", "--workers", "50", *address))
        assert large.returncode == 2 and "50 workers need 50 CPUs, and it has 2" in large.stderr
        deep = run([*arguments(tiny, given, tmp_path / "deep", *address)[:-4], *address, "--layer", "30"])
        assert deep.returncode == 2 and "layer" in deep.stderr and deep.stderr.count("\n") == 1, deep.stderr
        done = run(arguments(tiny, given, tmp_path / "out", "--workers", "2", *address))
        assert done.returncode == 0, done.stderr
        checked(tmp_path / "out", texts)
        assert process.poll() is None  # a cluster of others goes on


@pytest.mark.slow
def test_rows_that_kill_every_worker_end_the_job(tiny: Path, tmp_path: Path) -> None:
    given, _ = asked(tmp_path, 16)
    out = tmp_path / "out"
    command = arguments(tiny, given, out, "--batch-size", "16")
    with started([*command, "--max-new-tokens", "900"]) as process:
        killed: set[int] = set()

        def kill() -> bool:
            for each in workers_of(process):
                if each.pid not in killed and each.cpu_times().user > 1:
                    with contextlib.suppress(psutil.NoSuchProcess):
                        each.kill()
                    killed.add(each.pid)
            return process.poll() is not None

        end = time.monotonic() + LONGEST
        while not kill():
            assert time.monotonic() < end
            time.sleep(0.05)
        _, errors = process.communicate(timeout=60)
    assert process.returncode == 2, errors
    assert "workers died 4 times over the same rows" in errors
    assert errors.count("\n") == 1


def refused(*more: str) -> str:
    done = run([*COMMAND, *more])
    assert done.returncode == 2, done.stderr
    assert done.stderr.startswith("quickmerge: ") and done.stderr.count("\n") == 1
    assert done.stdout == ""
    return done.stderr


def test_what_was_given_is_refused_in_one_sentence(tiny: Path, tmp_path: Path) -> None:
    given, _ = asked(tmp_path, 2)
    out = tmp_path / "out"
    common = ("--input", str(given), "--out", str(out), "--model", str(tiny))
    assert "nobody answers at '127.0.0.1:1'" in refused(*common, "--ray-address", "127.0.0.1:1", "--layer", "1")
    assert "must be auto or host:port" in refused(*common, "--ray-address", "ray://a:1", "--layer", "1")
    assert "layer" in refused(*common, "--layer", "9")
    assert not out.exists()
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("x")
    assert "'thesis.txt'" in refused("--input", str(given), "--out", str(tmp_path / "mine"))
    assert "does not exist" in refused("--input", str(tmp_path / "no.jsonl"), "--out", str(out))
