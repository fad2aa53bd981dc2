"""Modules of version 0.1 are found under the names that they had then, and tell what they are called now."""

from __future__ import annotations

import json
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import pytest

import quickmerge
from quickmerge import data

TABLE = json.loads((Path(data.__file__).parent / "moved.json").read_text(encoding="utf-8"))


def test_a_module_by_its_old_name_is_the_module_by_its_new_one() -> None:
    with pytest.warns(DeprecationWarning, match="quickmerge.decoding.tree is quickmerge.speculative.tree since"):
        old = import_module("quickmerge.decoding.tree")
    assert old is import_module("quickmerge.speculative.tree")


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_nothing_is_loaded_a_second_time_by_way_of_an_old_package() -> None:
    import_module("quickmerge.decoding")
    with pytest.raises(ModuleNotFoundError, match=r"quickmerge\.decoding\.lookup"):
        import_module("quickmerge.decoding.lookup")


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_package_whose_names_have_parted_has_them_all() -> None:
    hosts = import_module("quickmerge.hosts")
    assert hosts.reduce is quickmerge.reduce
    for name in ("Decoder", "VisionRun", "detach", "find_encoder", "find_vlm", "observe"):
        assert hasattr(hosts, name), name
    with pytest.raises(AttributeError, match="has no attribute 'never'"):
        hosts.never  # noqa: B018


def test_no_old_name_is_taken_and_every_new_one_is_there() -> None:
    folder = Path(quickmerge.__file__).parents[1]

    def is_there(name: str) -> bool:
        place = folder.joinpath(*name.split("."))
        return place.with_suffix(".py").exists() or (place / "__init__.py").exists()

    assert not [old for old in TABLE if is_there(old)]
    assert not [new for new in TABLE.values() if not is_there(new)]


def test_every_old_name_is_imported_in_a_process_of_its_own() -> None:
    script = (
        "import importlib, json, sys, warnings\n"
        "warnings.simplefilter('ignore')\n"
        "import quickmerge\n"
        "bad = [old for old in json.load(open(sys.argv[1])) if 'triton_kernels' not in old "
        "and importlib.import_module(old) is None]\n"
        "sys.exit(', '.join(bad) or 0)"
    )
    place = Path(data.__file__).parent / "moved.json"
    done = subprocess.run([sys.executable, "-c", script, str(place)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
