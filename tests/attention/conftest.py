from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

# The test modules share attend_samples.py and others here, and the tiny models of the hosts' tests; none is a package.
for folder in (Path(__file__).parent.parent / "hosts", Path(__file__).parent):
    sys.path.insert(0, str(folder))


@pytest.fixture
def untouched() -> Iterator[Callable[[Any], Any]]:
    """Models handed to it are checked after the test: no hook, no watcher, the attention they were built with."""
    from hosts_zoo import assert_detached

    seen: list[tuple[Any, str]] = []

    def note(model: Any) -> Any:
        seen.append((model, model.config._attn_implementation))
        return model

    yield note
    for model, implementation in seen:
        assert_detached(model, implementation)
