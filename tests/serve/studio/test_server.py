"""Where the studio listens, what it sends with everything, and how it ends."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import urllib.request
from pathlib import Path

import pytest
from batch_samples import save_tiny
from typer.testing import CliRunner

import quickmerge as qm
from quickmerge.cli import app
from quickmerge.serve.studio.server import socket_at

pytest.importorskip("gradio", reason="the studio needs gradio: pip install quickmerge[studio]")


def test_a_port_in_use_is_one_sentence() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(qm.QuickmergeError, match=f"--port {port} of 127.0.0.1 can't be used .*give another, or 0"):
            socket_at("127.0.0.1", port)
        done = CliRunner().invoke(app, ["studio", "--port", str(port)])
        assert isinstance(done.exception, qm.QuickmergeError) and "--port" in str(done.exception)


@pytest.mark.parametrize("host", ["no such host", "203.0.113.7", "\ud800"])
def test_an_address_of_nobody_is_one_sentence(host: str) -> None:
    with pytest.raises(qm.QuickmergeError, match=r"--host must be an address|can't be used"):
        socket_at(host, 0)


@pytest.mark.parametrize("port", ["-1", "65536"])
def test_a_port_is_in_range(port: str) -> None:
    done = CliRunner().invoke(app, ["studio", "--port", port])
    assert "--port must be a whole number from 0 to 65535" in str(done.exception)


def test_without_gradio_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "gradio", None)
    done = CliRunner().invoke(app, ["studio", "--port", "0"])
    assert "pip install quickmerge[studio]" in str(done.exception)


def test_it_begins_at_loopback_and_ends_by_an_interruption(tmp_path: Path) -> None:
    model = save_tiny(tmp_path / "writer")
    process = subprocess.Popen(
        [sys.executable, "-m", "quickmerge", "studio", "--model", str(model), "--port", "0"],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "TMPDIR": str(tmp_path)},
    )  # fmt: skip
    try:
        assert process.stdout is not None
        line = process.stdout.readline()
        assert line.startswith("quickmerge studio: http://127.0.0.1:") and "Ctrl-C" in line, process.stderr
        with urllib.request.urlopen(line.split()[2], timeout=60) as page:
            policy = page.headers["Content-Security-Policy"]
            assert "default-src 'self'" in policy and "http" not in policy
            assert page.headers["Referrer-Policy"] == "no-referrer"
        process.send_signal(signal.SIGINT)
        out, _ = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == 0 and out == "quickmerge studio: ended\n"
    assert not list(tmp_path.glob("quickmerge-studio-*"))
