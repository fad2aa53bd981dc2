from __future__ import annotations

import signal
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

# The test modules share training_samples.py, which is no package of its own.
sys.path.insert(0, str(Path(__file__).parent))


@pytest.fixture
def heard() -> Iterator[None]:
    """Python's own handlers, whoever started the tests: a shell's background jobs ignore Ctrl-C."""
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    yield
    for number, handler in before.items():
        signal.signal(number, handler)
