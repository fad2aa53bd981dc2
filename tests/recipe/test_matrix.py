"""What works together: pairs and triples of ingredients, in every way to generate, against the table in matrix.json.

``QUICKMERGE_WRITE_MATRIX=1 pytest -n 0 tests/recipe/test_matrix.py`` writes the table anew, and ``python
benchmarks/tables.py`` puts it into docs/methods/recipes.md.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from recipe_cells import Cell, cells, check

TABLE = Path(__file__).parent / "matrix.json"
WRITE = os.environ.get("QUICKMERGE_WRITE_MATRIX") == "1"
CELLS = list(cells())


@pytest.fixture(scope="module")
def table() -> Iterator[dict[str, dict[str, str]]]:
    if not WRITE:
        yield json.loads(TABLE.read_text(encoding="utf-8"))
        return
    written: dict[str, dict[str, str]] = {}
    yield written
    TABLE.write_text(json.dumps(written, indent=1, sort_keys=True) + "\n", encoding="utf-8")


def test_the_table_has_these_cells_and_no_others(table: dict[str, dict[str, str]]) -> None:
    if WRITE:
        pytest.skip("the table is being written")
    assert sorted(table) == sorted(map(str, CELLS))
    assert all(told == "works" or told.startswith("refused: ") for cell in table.values() for told in cell.values())


@pytest.mark.parametrize("cell", CELLS, ids=str)
def test_cell(cell: Cell, table: dict[str, dict[str, str]]) -> None:
    found = {family: check(cell, family) for family in cell.families}
    if WRITE:
        table[str(cell)] = found
    assert table[str(cell)] == found
