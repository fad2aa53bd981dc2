"""A recipe as a folder: recipe.json with every setting, and trained parts beside it, each in a folder of its own.

A trained part that ships with quickmerge is named and not copied. Of all of them recipe.json holds the sha256 of both
files, so that a part that was swapped or altered is refused. What is read is a stranger's: types come from a fixed
list, folders are names below the recipe's own, and nothing of a file is ever run.
"""

from __future__ import annotations

import os
import re
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from quickmerge._version import __version__
from quickmerge.data import GUMIHOS, PRIORS, shipped_gumiho, shipped_prior
from quickmerge.errors import QuickmergeError, as_index, clean_name, near_match
from quickmerge.files import SETTINGS, read_settings, write_json
from quickmerge.merge.prior import Prior
from quickmerge.merge.reducers import DynamicViT
from quickmerge.models.part import CONFIG, WEIGHTS, file_hash
from quickmerge.models.part import read_settings as read_config
from quickmerge.models.weights import local_path
from quickmerge.recipe.ingredients import NAMES
from quickmerge.recipe.measured import Measured, PaysFrom, Record
from quickmerge.recipe.plain import Held, UnknownEntryError, decode, encode, state_of
from quickmerge.speculative.gumiho import Gumiho, GumihoNetwork
from quickmerge.together import complete, write_together

__all__ = ["RECIPE", "as_data", "from_data", "read", "write"]

RECIPE = "recipe.json"
TYPE = "quickmerge.recipe"
VERSION = 1
"""Of the format. It rises when what an older quickmerge would read would be wrong."""

RECORDS: dict[str, type[Record]] = {kind.entry: kind for kind in (Measured, PaysFrom)}
"""What was measured of the ingredients, see `quickmerge.recipe.measured`."""

MOST = 10_000
"""Values that a recipe may hold."""

FILES = (CONFIG, WEIGHTS)
_FOLDER = re.compile(r"[a-z]+(-[a-z]+)*")
_STALE = re.compile(r"(merge|visual|tower|decoding)(-[a-z]+)+/(config\.json|model\.safetensors)")
"""Parts that an earlier recipe in the same folder has had and this one has not."""


# Writing ------------------------------------------------------------------------------------------------------------


def as_data(ingredients: Mapping[str, Any], records: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """What recipe.json would hold of these ingredients; nothing is written.

    Args:
        ingredients: by the argument that names them; None for those that there aren't.
        records: what was measured of them, by the names of `RECORDS`; None for what was not.

    Raises:
        QuickmergeError: one holds what can't be written, such as a function.
    """
    with tempfile.TemporaryDirectory(prefix="quickmerge-") as folder:
        return _lay_out(ingredients, Path(folder), records or {})


def write(ingredients: Mapping[str, Any], folder: Path | str, records: Mapping[str, Any] | None = None) -> None:
    """Write recipe.json and the trained parts, all of them or none; other files of the folder stay.

    Raises:
        QuickmergeError: one holds what can't be written, the disk is full, or the folder is not writable.
    """

    def fill(work: Path) -> None:
        write_json(work / RECIPE, _lay_out(ingredients, work, records or {}))

    write_together(local_path("recipe", folder), fill, _STALE)


def _lay_out(ingredients: Mapping[str, Any], work: Path, records: Mapping[str, Any]) -> dict[str, Any]:
    """Write the parts into ``work`` and say what recipe.json has to hold."""

    def part(where: str, held: Held) -> dict[str, Any]:
        ships = _shipped(held)
        if ships is not None:
            name, folder = ships
            return {"shipped": name, "sha256": _hashes(folder)}
        name = where.replace("reducer.", "").replace("drafter.", "").replace(".", "-")
        _save(held, work / name)
        return {"folder": name, "sha256": _hashes(work / name)}

    told = {
        name: encode(_short(given), name, part, _refuse) for name, given in ingredients.items() if given is not None
    }
    measured = {name: record.as_dict() for name, record in records.items() if record is not None}
    return {"type": TYPE, "version": VERSION, "quickmerge": __version__, **told, **measured}


def _short(given: Any) -> Any:
    """A `Merge` or a `Speculation` that says nothing more as what it holds."""
    inner = getattr(given, "reducer", None) or getattr(given, "drafter", None)
    return given if inner is None or given != type(given)(inner) else inner


def _refuse(where: str, value: Any) -> Any:
    if callable(value) and not hasattr(value, "plan"):
        raise QuickmergeError(
            f"{where} must be None to be saved, since a function can't be written, got {value!r:.100}"
        )
    raise QuickmergeError(f"{where} must be one of quickmerge's own to be saved, got a {type(value).__name__}")


def _save(held: Held, folder: Path) -> None:
    if isinstance(held, DynamicViT):
        # the share stands in recipe.json, where it may be a budget
        replace(held, keep=0.5).save_pretrained(folder)
    elif isinstance(held, GumihoNetwork):
        Gumiho(held).save_pretrained(folder)
    else:
        held.save_pretrained(folder)


def _shipped(held: Held) -> tuple[str, Path] | None:
    """The name and the folder of a part that ships, if this is one."""
    if isinstance(held, DynamicViT):
        return None
    names, find = (PRIORS, shipped_prior) if isinstance(held, Prior) else (GUMIHOS, shipped_gumiho)
    for name in names:
        folder = find(name)
        if folder is not None and held.config == _config(held, folder) and _same(held, _load(type(held), folder)):
            return name, folder
    return None


def _config(held: Prior | GumihoNetwork, folder: Path) -> Any:
    read: Callable[..., Any] = type(held.config).from_data
    return read(read_config(folder / CONFIG), folder / CONFIG)


def _same(one: Held, other: Held) -> bool:
    (a, config), (b, other_config) = state_of(one), state_of(other)
    return config == other_config and a.keys() == b.keys() and all(torch.equal(a[name].cpu(), b[name]) for name in a)


def _hashes(folder: Path) -> dict[str, str]:
    return {name: file_hash(folder / name) for name in FILES}


# Reading ------------------------------------------------------------------------------------------------------------


def read(given: Path | str, home: Path | None = None) -> dict[str, Any]:
    """The ingredients that a folder, or a file of settings, holds, by name.

    Args:
        given: a folder with recipe.json, or a .json, .yaml, .yml or .toml file; parts lie beside it.
        home: a folder to which links of the recipe's may lead too: where a cache keeps the files of its repository.

    Raises:
        QuickmergeError: there is none, it is damaged or of a newer version, or a part is missing or altered.
    """
    path = local_path("recipe", given)
    if path.is_dir():
        complete(path)
        path = path / RECIPE
        if not path.exists():
            raise QuickmergeError(f"recipe must be a folder with {RECIPE}, or such a file, {path} is missing")
    elif not path.exists():
        raise QuickmergeError(f"recipe must be a folder with {RECIPE}, or a .json or .yaml file, got {path}, which is "
                              "none")  # fmt: skip
    elif path.suffix.lower() not in SETTINGS:
        raise QuickmergeError(f"recipe must be a folder with {RECIPE}, or a .json or .yaml file, got {path}")
    return from_data(read_settings(path), path, home)


def from_data(data: Mapping[str, Any], file: Path | None, home: Path | None = None) -> dict[str, Any]:
    """The ingredients that the content of a recipe.json says, by name; raises as `read`.

    Args:
        data: the content.
        file: the file that it is of, which messages name and beside which the parts lie; None for no file.
        home: as for `read`.
    """
    path = "recipe" if file is None else file
    parent = None if file is None else file.parent
    _check_size(data, path)
    data = dict(data)
    kind, version, writer = data.pop("type", None), data.pop("version", VERSION), data.pop("quickmerge", __version__)
    if kind != TYPE:
        raise QuickmergeError(f'{path} must hold a recipe ("type": "{TYPE}"), got {kind!r:.80}')
    number = as_index(version)
    if number is None or number < 1:
        raise QuickmergeError(f"{path}: version must be a whole number of at least 1, got {version!r:.80}")
    by = f"it was written by quickmerge {clean_name(str(writer))[:40]}, and this is {__version__}"
    if number > VERSION:
        raise QuickmergeError(
            f"{path} is of version {number!r:.20} of the format, and {VERSION} is the newest that is known: {by}"
        )
    other = "" if writer == __version__ else f": {by}"
    out: dict[str, Any] = {}
    for name, value in data.items():
        if name in RECORDS:
            try:
                out[name] = RECORDS[name].from_data(value)
            except QuickmergeError as error:
                raise QuickmergeError(f"{path}: {error}{other}") from error
            continue
        if name not in NAMES:
            hint = near_match(name, (*NAMES, *RECORDS))
            raise QuickmergeError(f"{path} has the unknown entry {clean_name(name)[:80]!r}{hint}{other}")
        try:
            out[name] = decode(value, name, lambda where, kind, spec: _load_part(where, kind, spec, parent, home))
        except UnknownEntryError as error:
            raise QuickmergeError(f"{path}: {error}{other}") from error
        except QuickmergeError as error:
            raise QuickmergeError(f"{path}: {error}") from error
    return out


def _check_size(data: Any, path: Path | str) -> None:
    """Refuse what no recipe is as large as: a short file of YAML can hold a list of lists without end."""
    waiting, count = [data], 0
    while waiting:
        value = waiting.pop()
        if isinstance(value, (list, dict)):
            count += len(value)
            if count > MOST:
                raise QuickmergeError(f"{path} must hold a recipe, got more than {MOST} values")
            waiting.extend(value.values() if isinstance(value, dict) else value)


def _load_part(where: str, kind: type, spec: Any, parent: Path | None, home: Path | None) -> Any:
    """Load what has weights, having seen that it lies where it may and is what it was."""
    held: type[Held] = DynamicViT if kind is DynamicViT else GumihoNetwork if kind is Gumiho else Prior
    if not isinstance(spec, dict) or len({"folder", "shipped"} & set(spec)) != 1 or set(spec) - {
        "folder", "shipped", "sha256"
    }:  # fmt: skip
        raise QuickmergeError(
            f'{where} must name a trained part, {{"folder": ...}} or {{"shipped": ...}}, got {spec!r:.80}'
        )
    if "shipped" in spec:
        folder = _find_shipped(where, held, spec["shipped"])
    elif parent is None:
        raise QuickmergeError(f"{where} must ship with quickmerge in a recipe of no file, got a folder: save the "
                              "recipe, and give the folder that it is in")  # fmt: skip
    else:
        folder = _find_folder(where, spec["folder"], parent, home)
    _check_hashes(where, folder, spec.get("sha256"), "shipped" in spec)
    return _load(held, folder)


def _load(held: type[Held], folder: Path) -> Held:
    if held is DynamicViT:
        return DynamicViT.from_pretrained(folder)
    if held is GumihoNetwork:
        return Gumiho.from_pretrained(folder).network
    return Prior.from_pretrained(folder)


def _find_shipped(where: str, held: type[Held], name: Any) -> Path:
    names: tuple[str, ...] = () if held is DynamicViT else PRIORS if held is Prior else GUMIHOS
    found = None
    if isinstance(name, str) and name in names:
        found = shipped_prior(name) if held is Prior else shipped_gumiho(name)
    if found is None:
        hint = near_match(name, names) if isinstance(name, str) else ""
        raise QuickmergeError(
            f"{where} names a part that does not ship with quickmerge {__version__}, {name!r:.80}: "
            f"{', '.join(names) or 'none of its kind'} {'does' if names else 'do'}{hint}"
        )
    return found


def _find_folder(where: str, name: Any, parent: Path, home: Path | None) -> Path:
    """A folder below the recipe's own; a name that leads anywhere else is refused."""
    if not isinstance(name, str) or len(name) > 200 or not _FOLDER.fullmatch(name):
        raise QuickmergeError(f"{where} must lie in a folder beside the recipe, named by small letters and hyphens, "
                              f"got {name!r:.80}")  # fmt: skip
    folder = parent / name
    if not folder.is_dir():
        raise QuickmergeError(f"{where} is missing: there is no folder {folder}")
    inside = {Path(os.path.realpath(place)) for place in (parent, home) if place is not None}
    for path in (folder, *(folder / file for file in FILES)):
        if inside.isdisjoint(Path(os.path.realpath(path)).parents):
            raise QuickmergeError(f"{where} must lie beside the recipe, but {path} is a link to elsewhere")
    complete(folder)
    for file in FILES:
        if not (folder / file).is_file():
            raise QuickmergeError(f"{where} is missing: there is no file {folder / file}")
    return folder


def _check_hashes(where: str, folder: Path, hashes: Any, ships: bool) -> None:
    """See that the files of a part are those that the recipe was written with; a recipe by hand names no hashes."""
    if hashes is None:
        return
    if not isinstance(hashes, dict) or set(hashes) != set(FILES):
        raise QuickmergeError(f"{where} must hold the sha256 of {' and '.join(FILES)}, got {hashes!r:.80}")
    for name in FILES:
        if file_hash(folder / name) != hashes[name]:
            why = (
                f"quickmerge {__version__} ships another one" if ships else "copy the whole folder of the recipe again"
            )
            raise QuickmergeError(
                f"{where} is not what the recipe was written with, {folder / name} is another file: {why}"
            )
