"""What a release of transformers must leave as it is: `make compat` runs this folder against the oldest and the newest.

A failure ends with the names that the release has changed.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest


def pytest_report_header() -> str:
    import torch
    import transformers

    import quickmerge

    here = Path(quickmerge.__file__).parent
    return f"transformers {transformers.__version__}, torch {torch.__version__}, quickmerge in {here}"


def pytest_terminal_summary(terminalreporter: Any) -> None:
    """Where something fails, name what the release has changed, if it is anything that the package leans on."""
    if not terminalreporter.stats.get("failed") and not terminalreporter.stats.get("error"):
        return
    import transformers

    from quickmerge.models.compat import NEWEST, OLDEST, changes
    from quickmerge.models.decoder import FAMILIES

    found = changes(FAMILIES)
    terminalreporter.section(f"transformers {transformers.__version__}, tested were {OLDEST} to {NEWEST}")
    for each in found or ["nothing of what models/compat.py leans on has another name: see the failures above"]:
        terminalreporter.line(each)


@pytest.fixture(autouse=True)
def _no_old_names(caplog: pytest.LogCaptureFixture) -> Any:
    """Transformers tells of old names of outputs by its log, where no filter of warnings sees them."""
    import logging

    library = logging.getLogger("transformers")
    library.addHandler(caplog.handler)
    yield
    library.removeHandler(caplog.handler)
    old = [record.getMessage() for record in caplog.records if "deprecated" in record.getMessage()]
    assert not old, f"transformers tells of old names: {old}"
