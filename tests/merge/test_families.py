"""The zoo: every causal language model that transformers registers, against the committed table of families.

``QUICKMERGE_WRITE_FAMILIES=1 pytest tests/merge/test_families.py -m ""`` writes the table anew. What a capability has
to do is said in ``samples/lm_checks.py``.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from functools import lru_cache
from typing import Any

import lm_zoo
import pytest
import transformers
from lm_checks import CHECKS
from lm_decoding import PlainError

from quickmerge.errors import UnsupportedModelError
from quickmerge.models.compat import NEWEST, cache_name
from quickmerge.models.families import CAPABILITIES, NOT_TRIED, TABLE, USAGE, WORKS, order, proven, rows

WRITE = os.environ.get("QUICKMERGE_WRITE_FAMILIES") == "1"
OFTEN = len(USAGE)
"""Families that are tried in every run of the tests; the others are slow."""

FAMILIES = sorted(lm_zoo.families(), key=order)
CELLS = [
    pytest.param(family, capability, marks=[] if i < OFTEN else [pytest.mark.slow], id=f"{family}-{capability}")
    for i, family in enumerate(FAMILIES)
    for capability in CHECKS
]
AMONG_THEM = (
    "qwen3_5_text", "qwen3_next", "gpt_oss", "gemma4_text", "glm4_moe", "glm_moe_dsa", "deepseek_v3", "llama4_text",
    "mistral", "ministral", "granitemoehybrid", "nemotron_h", "lfm2", "olmo3", "phi3",
)  # fmt: skip
"""Families without which the table would be worth little."""


@pytest.fixture(scope="module")
def table() -> Iterator[dict[str, dict[str, str]]]:
    if not WRITE:
        yield rows()
        return
    written: dict[str, dict[str, str]] = json.loads(TABLE.read_text(encoding="utf-8")) if TABLE.exists() else {}
    written = {family: cells for family, cells in written.items() if family in FAMILIES}
    yield written
    ordered = {family: dict(sorted(written[family].items())) for family in sorted(written, key=order)}
    TABLE.write_text(json.dumps(ordered, indent=1) + "\n", encoding="utf-8")


@lru_cache(maxsize=1)
def built(family: str) -> Any:
    """Of each family one model, since its cells come one behind the other."""
    return lm_zoo.build(family)


def result_of(family: str, capability: str) -> str:
    if family in lm_zoo.UNBUILT:
        return NOT_TRIED + lm_zoo.UNBUILT[family]
    try:
        CHECKS[capability](built(family), lm_zoo.layer_of(family))
    except UnsupportedModelError as error:
        # The table names the cache as the newest transformers does.
        return str(error).replace(f"{cache_name()} must", "cache must")
    except PlainError as error:
        return NOT_TRIED + str(error)
    return WORKS


@pytest.mark.parametrize(("family", "capability"), CELLS)
def test_cell(family: str, capability: str, table: dict[str, dict[str, str]]) -> None:
    if transformers.__version__ != NEWEST and family not in lm_zoo.UNBUILT:
        try:
            built(family)
        except Exception as error:  # of whatever kind: settings of the newest release need not do in another
            pytest.skip(f"no tiny {family} in transformers {transformers.__version__}: {error}")
    found = result_of(family, capability)
    if WRITE:
        table.setdefault(family, {})[capability] = found
    if transformers.__version__ == NEWEST:
        assert found == table[family][capability]
    else:
        # Another release may serve another few, but what it serves has held to every law.
        assert found == WORKS or len(found.split()) > 5


def test_every_family_of_the_installed_transformers_has_a_row(table: dict[str, dict[str, str]]) -> None:
    assert [family for family in FAMILIES if family not in table] == []
    assert set(lm_zoo.EXCEPTIONS) | set(lm_zoo.UNBUILT) | set(lm_zoo.LAYERS) <= set(table)


@pytest.mark.skipif(WRITE, reason="the table is being written")
def test_the_table_says_what_is_promised_of_it() -> None:
    cells = rows()
    assert list(cells) == sorted(cells, key=order)
    assert set(CAPABILITIES) <= set(CHECKS) and all(set(CAPABILITIES) <= set(row) for row in cells.values())
    assert set(AMONG_THEM) <= set(proven("prefix"))
    assert len(proven("prefix")) > 115 and len(proven("block_causal")) > 95
    for family, row in cells.items():
        for capability, found in row.items():
            # Whatever is refused is refused for what the model is, in a sentence that says so.
            assert found == WORKS or len(found.split()) > 5, (family, capability)
