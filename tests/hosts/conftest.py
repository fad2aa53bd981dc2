from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

# The test modules share hosts_zoo.py, which is no package of its own.
sys.path.insert(0, str(Path(__file__).parent))


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
