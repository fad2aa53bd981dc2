"""The map of the house: no circle among modules, and arrows that point down only.

Imports inside functions and for type checkers count as any other.
"""

from __future__ import annotations

from graphlib import CycleError, TopologicalSorter

import grimp
import pytest

FLOORS = (
    {"_lazy", "_moved", "_version", "errors"},
    {"data", "files", "images", "locks", "sampling", "staging", "terminal", "together"},
    {"models"},
    {"datasets", "merge.tokens", "training", "viz"},
    {"bench"},
    {"console"},
    {"calm", "merge", "multipole", "recognition", "speculative", "transplant"},
    {"recipe"},
    {"serve"},
    {"cli", "lm_eval"},
)
"""From the ground up. A room imports from its own floor, if that is not one of capabilities, and from those below."""

CAPABILITIES = FLOORS[6]

STATED = {
    ("merge", "calm"): {"quickmerge.calm.heads"},
    ("recognition", "merge"): {
        "quickmerge.merge.cli.options", "quickmerge.merge.reducers.base", "quickmerge.merge.vision.vit",
    },
}  # fmt: skip
"""What a capability may use of another, as its ``__init__`` says."""


@pytest.fixture(scope="module")
def graph() -> grimp.ImportGraph:
    return grimp.build_graph("quickmerge", exclude_type_checking_imports=False, cache_dir=None)


def room(module: str) -> str:
    """The part of the house that a module stands in."""
    parts = module.split(".")[1:]
    return "merge.tokens" if parts[:2] == ["merge", "tokens"] else parts[0] if parts else ""


def arrows(graph: grimp.ImportGraph) -> list[tuple[str, str]]:
    """Every import, the package itself left out: it offers names of all floors, and is asked for its version."""
    return [
        (one, other)
        for one in sorted(graph.modules)
        for other in sorted(graph.find_modules_directly_imported_by(one))
        if room(one) and room(other) and room(one) != "__main__"
    ]


def test_every_room_has_a_floor(graph: grimp.ImportGraph) -> None:
    rooms = {room(module) for module in graph.modules} - {"", "__main__"}
    assert rooms == set().union(*FLOORS)


def test_there_is_no_circle(graph: grimp.ImportGraph) -> None:
    sorter = TopologicalSorter({one: graph.find_modules_directly_imported_by(one) for one in graph.modules})
    try:
        sorter.prepare()
    except CycleError as error:
        pytest.fail(" -> ".join(error.args[1]))


def test_arrows_point_down(graph: grimp.ImportGraph) -> None:
    floor = {name: height for height, names in enumerate(FLOORS) for name in names}
    up = [(a, b) for a, b in arrows(graph) if floor[room(b)] > floor[room(a)]]
    assert not up


def test_a_capability_uses_another_only_as_stated(graph: grimp.ImportGraph) -> None:
    def stated(one: str, other: str) -> bool:
        allowed = STATED.get((room(one), room(other)), set())
        return any(other == module or other.startswith(module + ".") for module in allowed)

    across = [
        (a, b)
        for a, b in arrows(graph)
        if room(a) != room(b) and {room(a), room(b)} <= CAPABILITIES and not stated(a, b)
    ]
    assert not across


def test_the_command_line_starts_without_what_takes_seconds_to_import() -> None:
    import subprocess
    import sys

    heavy = "torch", "transformers", "matplotlib", "numpy"
    code = f"import sys, quickmerge.cli; sys.exit(', '.join(m for m in {heavy} if m in sys.modules) or 0)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    "package",
    [
        "calm",
        "merge.prior",
        "multipole",
        "recipe",
        "recognition",
        "speculative",
        "speculative.gumiho",
        "training",
        "transplant",
    ],
)
def test_no_public_name_is_that_of_a_module_beside_it(package: str) -> None:
    """Python puts a module that is imported in the place of a name of its package that is loaded on first use."""
    import importlib
    import pkgutil

    home = importlib.import_module(f"quickmerge.{package}")
    assert not {module.name for module in pkgutil.iter_modules(home.__path__)} & set(home.__all__)
