"""What a packaged model folder runs: ``generate`` by the recipe that lies in it, one call at a time.

transformers puts ``functools.partial(generate, model=model)`` in the place of a model's own ``generate`` when a folder
with ``custom_generate/generate.py`` is loaded with ``trust_remote_code=True``. A server looks that up for one request
while another is being answered, so it must never be replaced: a recipe is applied to a twin of the model, of which
all parts are the model's own, and the model keeps what it was given.
"""

from __future__ import annotations

import copy
import functools
import inspect
import itertools
import logging
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary

import torch

from quickmerge.errors import QuickmergeError, first_sentence
from quickmerge.models.attachment import setting
from quickmerge.models.compat import bad_request, cached_commit, serves_models, watch_continuous_batching
from quickmerge.recipe import Recipe, RecipeRun, apply
from quickmerge.serve.counts import Wrote, told
from quickmerge.serve.shares import keeping

__all__ = ["FOLDER", "custom_generate", "generate"]

FOLDER = "recipe"
"""Where the recipe lies in a packaged folder."""

RUNS = 8
"""Settings of requests that a model is kept ready for."""

PAGED = (
    "continuous batching reads prompts without generate, so that nothing of the recipe of this folder would be done: "
    "leave --continuous-batching out, or serve the plain model"
)

log = logging.getLogger("quickmerge")
_numbers = itertools.count(1)


def custom_generate() -> Callable[..., Any]:
    """Get this process ready for a packaged folder; returns what transformers puts in the place of ``generate``.

    In ``transformers serve`` a line for each request is logged to stderr, unless the logger ``quickmerge`` was given a
    handler or a level of its own.

    Raises:
        QuickmergeError: the server was started with continuous batching, which never calls ``generate``.
    """
    watch_continuous_batching(_refuse_paged)
    if serves_models():
        if _asked_for_paged(sys.argv):
            raise QuickmergeError(PAGED)
        _log_to_stderr()
    return generate


def generate(
    inputs: Any = None, generation_config: Any = None, *args: Any, model: Any, keep: float | None = None, **kwargs: Any
) -> Any:
    """Generate as ``model.generate`` does, by the recipe in the model's folder. Calls of several threads take turns.

    Args:
        inputs: as the rest, what ``generate`` of the model takes and gives back.
        generation_config: may hold ``keep`` too, which is how a request to a server says it.
        *args: further arguments by place.
        model: that was loaded from a packaged folder.
        keep: the share, in (0, 1], that is kept in this call where the recipe makes tokens or a cache fewer; 1 is the
            model alone, token by token. None leaves it to the recipe.
        **kwargs: further arguments by name.

    Raises:
        QuickmergeError: ``keep`` is out of range or the recipe keeps all anyway, the folder has no recipe, or the
            recipe refuses an argument.
    """
    number = next(_numbers)
    given = _by_name(model, (inputs, generation_config, *args), kwargs)
    try:
        given, keep = _settings(given, keep)
        if setting(model, given, "cache_implementation") == "paged":
            raise QuickmergeError(PAGED)
        state = _state_of(model)
        # The parts of a model are hooked for one call at a time; whoever comes meanwhile waits.
        with state.lock:
            began = time.perf_counter()
            twin = state.fresh(model)
            if keep == 1:
                out, stats = twin.generate(**given), None
            else:
                with state.run(keep) as run:
                    out, stats = twin.generate(**given), run.summary()
            seconds = time.perf_counter() - began
    except QuickmergeError as error:
        log.error("request %d: %s", number, first_sentence(error))
        if serves_models():
            raise bad_request(first_sentence(error)) from error
        raise
    except BaseException as error:
        log.warning("request %d: ended early (%s)", number, type(error).__name__)
        raise
    log.info("request %d: %s", number, told(stats, _wrote(given, out, seconds)))
    return out


# The model, and what is kept of it from call to call ------------------------------------------------------------------


@dataclass
class _State:
    """A model's recipe, its twin, and the runs of it that were asked for last."""

    recipe: Recipe
    twin: Any
    lock: threading.Lock = field(default_factory=threading.Lock)
    runs: dict[Any, RecipeRun] = field(default_factory=dict)

    def fresh(self, model: Any) -> Any:
        """The twin, with all that the model has by now but its ``generate``, which leads here."""
        vars(self.twin).clear()
        vars(self.twin).update({name: value for name, value in vars(model).items() if name != "generate"})
        return self.twin

    def run(self, keep: float | None) -> RecipeRun:
        """The run of the recipe at this share. Making one takes a tenth of a second, so the last few are kept."""
        key = (keep, self.twin.device, self.twin.dtype)
        run = self.runs.pop(key, None)
        if run is None:
            run = apply(self.twin, self.recipe if keep is None else keeping(self.recipe, keep))
        self.runs[key] = run
        while len(self.runs) > RUNS:
            del self.runs[next(iter(self.runs))]
        return run


_STATES: WeakKeyDictionary[Any, _State] = WeakKeyDictionary()
_MAKING = threading.Lock()


def _state_of(model: Any) -> _State:
    with _MAKING:
        state = _STATES.get(model)
        if state is None:
            recipe = Recipe.from_pretrained(_recipe_folder(model))
            twin = copy.copy(model)
            vars(twin).pop("generate", None)
            state = _STATES[model] = _State(recipe, twin)
    return state


def _recipe_folder(model: Any) -> Path:
    """Where the recipe of a model lies: in its folder, or in the hub's cache."""
    name = str(getattr(model, "name_or_path", "") or "")
    folder = Path(name)
    if name and not folder.is_dir() and "/" in name:
        from huggingface_hub import snapshot_download

        try:
            folder = Path(snapshot_download(name, revision=cached_commit(model), allow_patterns=[f"{FOLDER}/*"]))
        except (OSError, ValueError) as error:
            raise QuickmergeError(
                f"the recipe of {name} can't be had from the hub ({first_sentence(error)})"
            ) from error
    if not name or not (folder / FOLDER).is_dir():
        raise QuickmergeError(
            f"model must be loaded from a folder that quickmerge package wrote, and {name or type(model).__name__} has "
            f"no folder {FOLDER}/ with its recipe"
        )
    return folder / FOLDER


# What a call says -----------------------------------------------------------------------------------------------------


def _by_name(model: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """The arguments of a call by the names that the model's own ``generate`` has for them."""
    names = list(inspect.signature(type(model).generate).parameters)[1:]
    given = {name: value for name, value in zip(names, args, strict=False) if value is not None} | kwargs
    if isinstance(given.get("custom_generate"), str):
        del given["custom_generate"]  # by which this function was found
    return given


def _settings(given: dict[str, Any], keep: float | None) -> tuple[dict[str, Any], float | None]:
    """The arguments without what is ours, and the share that was asked for: of the call, or of its config."""
    config: Any = given.get("generation_config")
    told = getattr(config, "keep", None)
    if told is not None:
        config = copy.copy(config)
        del config.keep
        given = {**given, "generation_config": config}
    keep = told if keep is None else keep
    if keep is not None and (isinstance(keep, bool) or not isinstance(keep, (int, float)) or not 0 < keep <= 1):
        raise QuickmergeError(f"keep must be a number in (0, 1], got {keep!r:.80}")
    return given, keep


def _wrote(given: dict[str, Any], out: Any, seconds: float) -> Wrote:
    sequences = getattr(out, "sequences", out)
    ids = next((given[name] for name in ("input_ids", "inputs") if isinstance(given.get(name), torch.Tensor)), None)
    read = ids.shape[-1] if ids is not None and not ids.is_floating_point() else 0
    return Wrote(len(sequences), read, sequences.shape[-1] - read, seconds)


# The server -----------------------------------------------------------------------------------------------------------


def _asked_for_paged(words: list[str]) -> bool:
    said = [word for word in words if word in ("--continuous-batching", "--no-continuous-batching")]
    return bool(said) and said[-1] == "--continuous-batching"


def _refuse_paged(model: Any) -> None:
    """Raise QuickmergeError for a model of a packaged folder that is about to be batched continuously."""
    own = vars(model).get("generate")
    if isinstance(own, functools.partial) and own.func is generate:
        log.error("%s", PAGED)
        raise QuickmergeError(PAGED)


def _log_to_stderr() -> None:
    if not log.handlers:
        handler = logging.StreamHandler()
        handler.setFormatter(logging.Formatter("%(levelname)s:     quickmerge %(message)s"))
        log.addHandler(handler)
        log.propagate = False
    if log.level == logging.NOTSET:
        log.setLevel(logging.INFO)
