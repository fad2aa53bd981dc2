"""The models that a studio offers: those that were named at its start, each loaded once, when it is first asked for.

A page is open to whoever reaches it, so nobody names a folder or a hub id there: what can be chosen was given on the
command line.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from quickmerge.errors import QuickmergeError

if TYPE_CHECKING:
    from collections.abc import Iterator

    from quickmerge.serve.studio.jobs import Teller

__all__ = ["Kind", "Offered", "Shelf", "kind_of"]

Kind = Literal["text", "vision", "vlm"]
TEXT, VISION = "smollm2-135m", "vit-small-14"
"""What is offered where nobody names one of the kind."""


@dataclass(frozen=True)
class Offered:
    """A model that can be chosen: what the page calls it, what `quickmerge.load` takes, and what it reads."""

    label: str
    name: str
    kind: Kind


def kind_of(name: str) -> Kind:
    """What a model reads, by its configuration alone.

    Raises:
        QuickmergeError: there is no such model, or it reads neither text nor images.
    """
    from quickmerge.merge.cli.vlm import is_vlm
    from quickmerge.models.compat import bare_model_class
    from quickmerge.models.embedded import MODELS, VISION_MODELS
    from quickmerge.models.load import find_model
    from quickmerge.models.read import read_config, transformers_silenced

    if name in MODELS:
        return "text"
    if name in VISION_MODELS:
        return "vision"
    if is_vlm(name):
        return "vlm"
    with transformers_silenced():
        bare = bare_model_class(read_config(find_model(name)))
    images = bare is not None and bare.input_modalities in ("image", ("image",))
    return "vision" if images and bare.main_input_name == "pixel_values" else "text"


@dataclass
class Shelf:
    """The models on offer, and who works with one of them now.

    One request runs at a time: the models are shared, and so is the clock that both sides of a comparison are held by.

    Args:
        offered: in the order of the page.
    """

    offered: Sequence[Offered]
    _held: dict[str, tuple[Any, Any]] = field(default_factory=dict)
    _turn: threading.Lock = field(default_factory=threading.Lock)

    @classmethod
    def of(cls, names: Sequence[str]) -> Shelf:
        """The models of these names, and an embedded one of each kind that none of them is: text, and images.

        Raises:
            QuickmergeError: one is no model.
        """
        kinds = {name: kind_of(name) for name in dict.fromkeys(names)}
        if "text" not in kinds.values():
            kinds = {TEXT: "text", **kinds}
        if not {"vision", "vlm"} & set(kinds.values()):
            kinds[VISION] = "vision"
        labels = [_label(name) for name in kinds]
        twice = {label for label in labels if labels.count(label) > 1}
        return cls([
            Offered(name if label in twice else label, name, kind)
            for label, (name, kind) in zip(labels, kinds.items(), strict=True)
        ])  # fmt: skip

    def among(self, *kinds: Kind) -> list[Offered]:
        """Those that read this."""
        return [each for each in self.offered if each.kind in kinds]

    def called(self, label: object) -> Offered:
        """The one of that label.

        Raises:
            QuickmergeError: there is none.
        """
        for each in self.offered:
            if each.label == label:
                return each
        known = ", ".join(each.label for each in self.offered)
        raise QuickmergeError(f"the model must be one of {known}, got {label!r:.80}")

    @contextmanager
    def using(self, label: object, tell: Teller) -> Iterator[tuple[Offered, Any, Any]]:
        """Wait for a turn, then the model of that label, loaded, with its tokenizer or processor.

        Raises:
            QuickmergeError: there is none, or it can't be loaded.
            StoppedError: the user stopped it while it waited.
        """
        wanted = self.called(label)
        while not self._turn.acquire(timeout=0.1):
            tell.say("another run has the model: waiting for it", 0.0)
        try:
            if wanted.name not in self._held:
                tell.say(f"loading {wanted.label}", 0.02)
                self._held[wanted.name] = _load(wanted)
            yield (wanted, *self._held[wanted.name])
        finally:
            self._turn.release()


def _label(name: str) -> str:
    return Path(name).name if Path(name).is_dir() and Path(name).name else name


def _load(wanted: Offered) -> tuple[Any, Any]:
    """Model and tokenizer, or processor."""
    from quickmerge.console.options import load_writer, quiet
    from quickmerge.merge.cli.vlm import load_vlm
    from quickmerge.models import load_vision

    if wanted.kind == "text":
        return load_writer(wanted.name)
    if wanted.kind == "vlm":
        return load_vlm(wanted.name)
    quiet()
    return load_vision(wanted.name, progress=False)
