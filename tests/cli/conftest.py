from __future__ import annotations

import sys

import pytest


@pytest.fixture
def run(capsys, monkeypatch):
    """Call the command line in this process: (exit code, stdout, stderr)."""
    from quickmerge.cli import main

    def call(*args: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["quickmerge", *map(str, args)])
        try:
            main()
            code = 0
        except SystemExit as stop:
            code = int(stop.code or 0)
        out, err = capsys.readouterr()
        return code, out, err

    return call
