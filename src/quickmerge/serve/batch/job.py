"""A batch job on Ray Data: rows go to workers as these are free, and this process alone writes what comes back.

Ray restarts a worker that dies and gives its rows to another one. What this process has written is done; a job that is
killed and begun again asks for the rest, so no row is lost and none is there twice.
"""

from __future__ import annotations

import logging
import os
import shutil
import signal
import socket
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from quickmerge.errors import QuickmergeError, UnsupportedModelError, first_sentence, need
from quickmerge.serve.batch.rows import Row
from quickmerge.serve.batch.store import Store

if TYPE_CHECKING:
    from quickmerge.serve.batch.writer import Checked, WriterSettings

__all__ = ["SAVE_SECONDS", "Cluster", "Progress", "need_ray", "run_job", "try_out"]

RETRIES = 3
"""How often rows are given to another worker when theirs has died: rows that kill every worker end the job."""
SAVE_SECONDS, SAVE_ROWS = 10.0, 2_000
"""What is written becomes a part of the results when so much time has passed, or so many rows are there."""
WINDOW = 32
"""Batches within which rows of about the same length are put together."""
ANSWER_SECONDS = 5.0
"""A cluster that does not answer in this time is not there."""
STORE_BYTES = 2**29
"""Of Ray's object store on one machine, where prompts and answers wait."""


@dataclass(frozen=True)
class Cluster:
    """Where the workers run.

    Args:
        workers: how many.
        address: of a Ray cluster, ``"auto"`` or ``"host:port"``; None starts Ray on this machine, for this job alone.
        cpus: cores of each worker; None divides this machine's among the workers, and is 1 on a cluster.
        gpus: GPUs of each worker.
    """

    workers: int = 1
    address: str | None = None
    cpus: int | None = None
    gpus: float = 0

    @property
    def cores(self) -> int:
        """Cores of each worker."""
        if self.cpus is not None:
            return self.cpus
        return max(1, _cores() // self.workers) if self.address is None else 1

    @property
    def threads(self) -> int | None:
        """That a worker computes with; None where the environment says it."""
        return None if os.environ.get("OMP_NUM_THREADS") else self.cores


@dataclass
class Progress:
    """What a job has done in this call: rows answered and rows that can't be, tokens read and kept, and seconds."""

    rows: int = 0
    errors: int = 0
    tokens_read: int = 0
    tokens_kept: float = 0.0
    began: float = field(default_factory=time.monotonic)

    @property
    def rate(self) -> float:
        """Rows a second."""
        return (self.rows + self.errors) / max(time.monotonic() - self.began, 1e-9)

    def add(self, result: Mapping[str, Any]) -> None:
        """Count one row."""
        if "error" in result:
            self.errors += 1
            return
        self.rows += 1
        self.tokens_read += result["tokens_read"]
        self.tokens_kept += result["tokens_kept"]


def need_ray() -> Any:
    """Ray, quiet and without telemetry.

    Raises:
        QuickmergeError: it is not installed.
    """
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    # What its core says of itself on stderr is for its programmers; what ends a job comes as an error.
    os.environ.setdefault("RAY_BACKEND_LOG_LEVEL", "fatal")
    ray = need("ray", "ray", "batch jobs")
    need("pyarrow", "ray", "batch jobs")
    need("pandas", "ray", "batch jobs")
    return ray


def run_job(
    rows: Sequence[Row],
    settings: WriterSettings,
    store: Store,
    cluster: Cluster,
    *,
    batch: int = 8,
    save_seconds: float = SAVE_SECONDS,
    tell: Callable[[Progress], None] = lambda _: None,
) -> Progress:
    """Let workers answer rows, and write what they answer into the store.

    Args:
        rows: that are not done yet.
        settings: of the workers.
        store: of the job, which this process alone writes.
        cluster: where the workers run.
        batch: rows that a worker answers at once.
        save_seconds: between two parts of the results.
        tell: called whenever rows have come back.

    Returns:
        What was done.

    Raises:
        QuickmergeError: the cluster can't be reached or is too small, workers die again and again, or the disk is full.
            What was written is kept, in every case, and so it is when this is interrupted.
    """
    progress = Progress()
    bad = [row for row in rows if row.error]
    store.add_errors([{"index": row.index, "id": row.id, "hash": row.hash, "error": row.error} for row in bad])
    progress.errors += len(bad)
    tell(progress)
    good = [row for row in rows if not row.error]
    if not good:
        return progress
    held: list[dict[str, Any]] = []
    with _ray(cluster), _terminable():
        try:
            saved = time.monotonic()
            for results in _results(good, settings, cluster, batch):
                held += results
                for result in results:
                    progress.add(result)
                tell(progress)
                if time.monotonic() - saved > save_seconds or len(held) >= SAVE_ROWS:
                    _save(store, held)
                    saved = time.monotonic()
        finally:
            _save(store, held)
    missing = len(rows) - progress.rows - progress.errors
    if missing:
        raise QuickmergeError(f"{missing} rows came back from no worker: run the same command again")
    return progress


def _save(store: Store, held: list[dict[str, Any]]) -> None:
    done, held[:] = list(held), []
    store.add([each for each in done if "error" not in each])
    store.add_errors([each for each in done if "error" in each])


def _results(
    rows: Sequence[Row], settings: WriterSettings, cluster: Cluster, batch: int
) -> Iterator[list[dict[str, Any]]]:
    """What workers answer, batch by batch, each row once, in the order in which they do."""
    import json

    import pyarrow  # type: ignore[import-untyped]
    from ray import data

    _quiet_data(data)
    blocks = [pyarrow.table({"row": [row.to_json() for row in part]}) for part in _blocks(rows, batch)]
    asked = data.from_arrow(blocks).map_batches(
        _Worker,
        fn_constructor_args=(settings,),
        batch_size=batch,
        batch_format="numpy",
        compute=data.ActorPoolStrategy(size=cluster.workers),
        num_cpus=cluster.cores,
        num_gpus=cluster.gpus,
        max_restarts=-1,
        max_task_retries=RETRIES,
    )
    seen: set[int] = set()
    with _workers_told():
        tables: Iterator[Any] = iter(asked.iter_batches(batch_size=None, batch_format="pyarrow", prefetch_batches=0))
        for table in tables:
            results = [json.loads(line) for line in table["result"].to_pylist()]
            new = [result for result in results if result["index"] not in seen]
            seen.update(result["index"] for result in new)
            yield new


class _Worker:
    """What runs in each process of the pool: the model is loaded once."""

    def __init__(self, settings: WriterSettings) -> None:
        from quickmerge.console.options import quiet
        from quickmerge.serve.batch.writer import Writer

        quiet()
        self._writer = Writer(settings)

    def __call__(self, given: dict[str, Any]) -> dict[str, list[str]]:
        import json

        rows = [Row.from_json(str(line)) for line in given["row"]]
        return {"result": [json.dumps(each) for each in self._writer.write(rows)]}


def _blocks(rows: Sequence[Row], batch: int) -> Iterator[list[Row]]:
    """Rows of about the same length together, and all not far from their place in the input."""
    step = batch * WINDOW
    for at in range(0, len(rows), step):
        part = sorted(rows[at : at + step], key=lambda row: row.length)
        for low in range(0, len(part), batch):
            yield part[low : low + batch]


# Before the workers -------------------------------------------------------------------------------------------------


def try_out(settings: WriterSettings, cluster: Cluster) -> Checked:
    """Try the model and its recipe out where the workers will run: here, or by one task on the cluster.

    Raises:
        QuickmergeError: the model can't be loaded, the recipe is for another one, or the cluster is not there.
    """
    from quickmerge.serve.batch.writer import check

    if cluster.address is None:
        return check(settings)
    with _ray(cluster) as ray, _workers_told():
        task = ray.remote(num_cpus=cluster.cores, num_gpus=cluster.gpus, max_retries=0)(check)
        found: Checked = ray.get(task.remote(settings))
        return found


@contextmanager
def _workers_told() -> Iterator[None]:
    """Tell in one sentence what went wrong in a worker."""
    import ray.exceptions

    try:
        yield
    except ray.exceptions.RayError as error:
        own = _own(error)
        if own is not None:
            raise type(own)(str(own)) from error
        dead = isinstance(error, (ray.exceptions.ActorDiedError, ray.exceptions.WorkerCrashedError))
        what = f"workers died {RETRIES + 1} times over the same rows" if dead else "a worker failed"
        raise QuickmergeError(
            f"{what} ({_cause(error)}): what was answered is kept, and the same command goes on from it"
        ) from error


def _own(error: BaseException | None) -> QuickmergeError | None:
    """An error of ours that a worker raised, however it is wrapped."""
    while error is not None:
        if isinstance(error, QuickmergeError):
            kind = UnsupportedModelError if isinstance(error, UnsupportedModelError) else QuickmergeError
            return kind(str(getattr(error, "cause", None) or error))
        error = getattr(error, "cause", None) or error.__cause__
    return None


def _cause(error: BaseException) -> str:
    """The innermost reason; Ray's own errors hold the whole trace of the worker."""
    inner = getattr(error, "cause", None) or error
    lines = [line.strip() for line in str(inner).splitlines() if line.strip()]
    return first_sentence(RuntimeError(lines[-1] if lines else type(inner).__name__))


# Ray itself ---------------------------------------------------------------------------------------------------------


@contextmanager
def _ray(cluster: Cluster) -> Iterator[Any]:
    """Ray, started or joined, and left in the end; what it puts into a temporary folder goes with it."""
    ray = need_ray()
    quiet = {"log_to_driver": False, "logging_level": logging.ERROR, "configure_logging": True}
    folder: Path | None = None
    with _output_aside():
        if cluster.address is None:
            folder = _new_folder()
            _start(
                ray, folder, num_cpus=cluster.workers * cluster.cores, include_dashboard=False,
                object_store_memory=STORE_BYTES, **quiet,
            )  # fmt: skip
        else:
            _answers(cluster.address)
            try:
                ray.init(address=cluster.address, **quiet)
            except (ConnectionError, RuntimeError, ValueError, OSError) as error:
                raise _nobody(cluster.address, first_sentence(error)) from error
    try:
        _check_size(ray, cluster)
        yield ray
    finally:
        with _output_aside():
            ray.shutdown()
        if folder is not None:
            shutil.rmtree(folder, ignore_errors=True)


STARTS = 3
"""How often Ray's start is tried: it gives its processes half a minute, which a busy machine may need longer for."""


def _start(ray: Any, folder: Path, **settings: Any) -> None:
    for left in reversed(range(STARTS)):
        try:
            ray.init(address="local", _temp_dir=str(folder), **settings)
            return
        except Exception as error:  # of many kinds, bare ones among them
            ray.shutdown()
            if not left:
                shutil.rmtree(folder, ignore_errors=True)
                raise QuickmergeError(
                    f"Ray can't be started on this machine ({first_sentence(error)}): the same command tries it again"
                ) from error


def _check_size(ray: Any, cluster: Cluster) -> None:
    """Raise QuickmergeError where the workers would wait for ever."""
    there = ray.cluster_resources()
    for name, each in (("CPU", float(cluster.cores)), ("GPU", float(cluster.gpus))):
        wanted, have = each * cluster.workers, float(there.get(name, 0))
        if wanted > have:
            raise QuickmergeError(
                f"--workers must be at most what the cluster has room for: {cluster.workers} workers need {wanted:g} "
                f"{name}s, and it has {have:g}"
            )


def _answers(address: str) -> None:
    """Raise QuickmergeError unless somebody listens at an address; Ray itself tries for minutes."""
    if address == "auto":
        return
    host, colon, port = address.rpartition(":")
    if "://" in address or not colon or not host or not port.isdigit() or not 0 < int(port) < 2**16:
        raise QuickmergeError(
            f"--ray-address must be auto or host:port, got {address!r}: with a Ray Client address (ray://) start the "
            "command on a machine of the cluster"
        )
    try:
        with socket.create_connection((host.strip("[]"), int(port)), timeout=ANSWER_SECONDS):
            return
    except OSError as error:
        raise _nobody(address, error.strerror or first_sentence(error)) from None


def _nobody(address: str, reason: str) -> QuickmergeError:
    return QuickmergeError(
        f"--ray-address must be that of a running Ray cluster, and nobody answers at {address!r} ({reason}): start one "
        "with ray start --head, or leave it out"
    )


PREFIX = "quickmerge-ray-"


def _new_folder() -> Path:
    """A short name, since sockets lie in it; those of jobs that were killed are removed on the occasion."""
    base = Path(tempfile.gettempdir())
    if len(str(base)) > 30:
        base = Path("/tmp")
    for old in base.glob(f"{PREFIX}*"):
        number = old.name.removeprefix(PREFIX).partition("-")[0]
        if number.isdigit() and not _alive(int(number)) and old.stat().st_uid == os.getuid():
            shutil.rmtree(old, ignore_errors=True)
    return Path(tempfile.mkdtemp(prefix=f"{PREFIX}{os.getpid()}-", dir=base))


def _alive(number: int) -> bool:
    try:
        os.kill(number, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


@contextmanager
def _output_aside() -> Iterator[None]:
    """Ray's processes say hello and goodbye on the standard streams, below Python: keep that off the screen."""
    try:
        streams = [sys.stdout.fileno(), sys.stderr.fileno()]
    except (OSError, ValueError, AttributeError):  # a stream that is no file, in a test
        yield
        return
    sys.stdout.flush()
    sys.stderr.flush()
    kept = [(stream, os.dup(stream)) for stream in streams]
    nowhere = os.open(os.devnull, os.O_WRONLY)
    try:
        for stream in streams:
            os.dup2(nowhere, stream)
        yield
    finally:
        for stream, copy in kept:
            os.dup2(copy, stream)
            os.close(copy)
        os.close(nowhere)


def _quiet_data(data: Any) -> None:
    context = data.DataContext.get_current()
    context.enable_progress_bars = False
    context.print_on_execution_start = False
    for name in ("ray", "ray.data"):
        logger = logging.getLogger(name)
        logger.setLevel(logging.CRITICAL)
        for handler in list(logger.handlers):
            if isinstance(handler, logging.StreamHandler) and not isinstance(handler, logging.FileHandler):
                logger.removeHandler(handler)


@contextmanager
def _terminable() -> Iterator[None]:
    """SIGTERM ends the block as Ctrl-C does, so that what was answered is written; with its own exit code."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def end(number: int, _: Any) -> None:
        raise SystemExit(128 + number)

    before = {signal.SIGTERM: signal.signal(signal.SIGTERM, end)}
    if signal.getsignal(signal.SIGINT) is not signal.SIG_IGN:
        before[signal.SIGINT] = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        yield
    finally:
        for which, handler in before.items():
            signal.signal(which, handler)


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
