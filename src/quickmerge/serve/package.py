"""A model folder that other programs run with a recipe: ``package`` writes it.

It is the model's own folder, with its weights linked or copied, the recipe in ``recipe/``, a card, and a few lines in
``custom_generate/generate.py`` by which transformers generates with it. ``transformers serve FOLDER
--trust-remote-code`` then serves the model with the recipe, and ``from_pretrained(FOLDER, trust_remote_code=True)``
opens it so. Without ``trust_remote_code`` the folder is that of the plain model.
"""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

from quickmerge._version import __version__
from quickmerge.errors import QuickmergeError, UnsupportedModelError, near_match
from quickmerge.files import told, write_bytes, write_folder, write_json
from quickmerge.models import load, load_vlm
from quickmerge.models.compat import image_text_names, served_names
from quickmerge.models.folder import READ, weight_files
from quickmerge.models.load import model_folder
from quickmerge.models.read import read_config, saying, transformers_silenced
from quickmerge.models.weights import local_path, read_json
from quickmerge.recipe import Recipe
from quickmerge.serve.card import card
from quickmerge.serve.custom_generate import FOLDER

__all__ = ["Link", "Packaged", "package"]

Link = Literal["auto", "hard", "symbolic", "copy"]
"""How weights come into the folder; ``"auto"`` is hard where a file system can do that, and symbolic elsewhere."""
LINKS = get_args(Link)
NO_LINK = (errno.EXDEV, errno.EPERM, errno.EACCES, errno.EMLINK, errno.ENOTSUP)
"""What a system says where it can make no hard link."""

GENERATE = f'''"""Generation by the recipe in {FOLDER}/. It needs quickmerge: pip install quickmerge"""

from quickmerge.serve.custom_generate import custom_generate

generate = custom_generate()
'''
REQUIREMENTS = f"quickmerge>={__version__}\n"

WEIGHTS = ".safetensors"
TEXTS = ("LICENSE", "NOTICE")
"""Beginnings of names of files that go where weights go."""
OWN = ("manifest.json",)
"""Files of an embedded model about itself, as it lies in the cache."""
CODE = "auto_map"
"""Names programs that lie beside a model. None is taken along: the recipe was checked on transformers' own class."""


@dataclass(frozen=True)
class Packaged:
    """What `package` wrote.

    Attributes:
        folder: that it wrote.
        model: class of the model.
        weights: bytes of its weights.
        linked: how they came there: ``"hard"``, ``"symbolic"`` or ``"copy"``.
    """

    folder: Path
    model: str
    weights: int
    linked: str


def package(
    model: str | os.PathLike[str],
    recipe: Recipe,
    out: str | os.PathLike[str],
    *,
    link: Link = "auto",
    progress: bool = True,
) -> Packaged:
    """Write a folder of ``model`` that transformers, and ``transformers serve``, run by ``recipe``.

    Args:
        model: an embedded language model, a folder of a language or vision-language model, or a hub id.
        recipe: what is done to it. It is tried on the loaded model first.
        out: where the folder shall be: nothing yet, or an empty folder.
        link: whether weights are linked, and how, or copied. A hard link shares the disk's bytes with the model's own
            folder, and stays when that goes; a symbolic one goes with it. Other files are copied.
        progress: whether to show on stderr what goes on.

    Raises:
        UnknownModelError: there is no such model.
        UnsupportedModelError: it writes no text, or ``transformers serve`` would open it as another class.
        QuickmergeError: the recipe does not fit the model, does nothing or can't be written; or ``out`` holds
            something, can't be written, or the disk is full. Nothing is then left there.
    """
    if not isinstance(recipe, Recipe):
        raise QuickmergeError(f"recipe must be a Recipe such as Recipe(merge=QuickMerge(keep=0.4)), got {recipe!r:.80}")
    if recipe.empty:
        raise QuickmergeError("recipe must do something to be packaged, got an empty one")
    if link not in get_args(Link):
        raise QuickmergeError(
            f"link must be one of {', '.join(get_args(Link))}, got {link!r}{near_match(link, get_args(Link))}"
        )
    target = _check_out(local_path("out", out))
    recipe.as_dict()  # what can't be written is told before minutes of loading
    source = model_folder(os.fspath(model), progress=progress)
    if (source / "custom_generate").exists():
        raise QuickmergeError(f"model must have no way to generate of its own, and {source} holds custom_generate/")
    with transformers_silenced():
        config = read_config(str(source))
    reads_images = config.model_type in image_text_names()
    loaded = (load_vlm if reads_images else load)(source, progress=progress)[0]
    _check_class(loaded, config.model_type)
    recipe.check(loaded)
    name, kind = os.fspath(model), type(loaded).__name__
    page = card(name, source, recipe, loaded, out=target.name)
    used: list[str] = []
    weights = [path for path in sorted(source.iterdir()) if path.suffix == WEIGHTS]
    assert set(weight_files(source)) <= set(weights)  # it was loaded from these

    def fill(work: Path) -> None:
        for path in weights:
            used.append(_place(path, work / path.name, link))
        for path in sorted(source.iterdir()):
            if _taken_along(path):
                _copy(path, work / path.name, kind)
        recipe.save_pretrained(work / FOLDER)
        (work / "custom_generate").mkdir()
        write_bytes(work / "custom_generate" / "generate.py", GENERATE.encode())
        write_bytes(work / "custom_generate" / "requirements.txt", REQUIREMENTS.encode())
        write_bytes(work / "README.md", page.encode("utf-8", "backslashreplace"))

    with saying(f"writing {target}", progress=progress, only_on_terminal=True):
        write_folder(target, fill)
    return Packaged(target, kind, sum(path.stat().st_size for path in weights), used[-1])


def _check_out(target: Path) -> Path:
    """Where the folder goes, once nothing of a user's lies there and a file can be written beside it."""
    with told(target, kept=False):
        if target.exists() and not target.is_dir():
            raise QuickmergeError(f"out must be a folder that is new or empty, got {target}, which is a file")
        if target.is_dir() and any(target.iterdir()):
            raise QuickmergeError(f"out must be a folder that is new or empty, and there are files in {target}")
        there = target.absolute().parent
        while not there.exists():
            there = there.parent
        if not os.access(there, os.W_OK | os.X_OK):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
    return target


def _check_class(model: Any, family: str) -> None:
    """Raise UnsupportedModelError if the server would open the folder as another class than the one that was tried."""
    own, served = type(model).__name__, served_names().get(family)
    if served is not None and served != own:
        raise UnsupportedModelError(
            f"model must be opened by transformers serve as what the recipe is for, and a {family} is opened as "
            f"{served}, which is no {own}"
        )


def _taken_along(path: Path) -> bool:
    if path.name in OWN or path.name.startswith("."):
        return False
    if path.is_dir():
        return path.name == "additional_chat_templates"
    return (path.suffix in READ and path.suffix != WEIGHTS) or path.name.startswith(TEXTS)


def _copy(path: Path, target: Path, kind: str) -> None:
    """Copy a small file; settings without programs of others, and with the class that the recipe was tried on."""
    if path.is_dir():
        shutil.copytree(path, target)
        return
    if path.suffix == ".json" and (path.name == "config.json" or path.name.endswith("_config.json")):
        data: Mapping[str, Any] = read_json(path, path.stat().st_size + 1)
        changed = {name: value for name, value in data.items() if name != CODE}
        if path.name == "config.json":
            changed["architectures"] = [kind]
        if changed != data:
            write_json(target, changed)
            return
    shutil.copyfile(path, target)


def _place(path: Path, target: Path, link: Link) -> str:
    """Bring a file of weights to ``target``; returns how."""
    real = Path(os.path.realpath(path))
    if link in ("auto", "hard"):
        try:
            os.link(real, target)
            return "hard"
        except OSError as error:
            if error.errno not in NO_LINK:
                raise
            if link == "hard":
                raise QuickmergeError(
                    f"link must be symbolic or copy for {path}, to which there can't be a hard link ({error.strerror})"
                ) from error
    if link == "copy":
        shutil.copyfile(real, target)
        return "copy"
    os.symlink(real, target)
    return "symbolic"
