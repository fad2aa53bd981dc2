"""What a recognizer is made of; stored as config.json beside its weights."""

from __future__ import annotations

from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from quickmerge.errors import QuickmergeError, near_match, whole_number
from quickmerge.models.part import read_settings

__all__ = ["KIND", "MASKS", "RecognizerConfig"]

KIND = "quickmerge-recognizer"
MASKS = ("independent", "prefix", "causal")
PROMPT = "The objects in the image are"
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
"""Of ImageNet, as most encoders want their pixels standardised."""


@dataclass(frozen=True)
class RecognizerConfig:
    """Settings of a recognizer.

    Args:
        prompt: the text between the image and the labels.
        separator: what closes a label.
        image_size: height and width of the images, in pixels.
        layers: the encoder's hidden states that are looked at, None for its output.
        mask: ``independent``: labels see the image and themselves, and image tokens see one another. ``prefix``:
            labels see those before them too. ``causal``: image tokens do not see later ones either.
        mean: of the pixels, by channel.
        std: of the pixels, by channel.
        skip: class and register tokens in front of the patches.

    Raises:
        ValueError: naming the setting that is out of range.
    """

    prompt: str = PROMPT
    separator: str = ","
    image_size: int = 224
    layers: tuple[int, ...] | None = None
    mask: str = "independent"
    mean: tuple[float, ...] = MEAN
    std: tuple[float, ...] = STD
    skip: int = 0

    def __post_init__(self) -> None:
        for name in ("prompt", "separator"):
            if not isinstance(getattr(self, name), str) or not getattr(self, name):
                raise ValueError(f"{name} must be some text, got {getattr(self, name)!r}")
        object.__setattr__(self, "image_size", whole_number("image_size", self.image_size))
        object.__setattr__(self, "skip", whole_number("skip", self.skip, 0))
        if self.mask not in MASKS:
            raise ValueError(
                f"mask must be one of {', '.join(MASKS)}, got {self.mask!r}{near_match(str(self.mask), MASKS)}"
            )
        for name in ("mean", "std"):
            value = getattr(self, name)
            object.__setattr__(self, name, tuple(float(each) for each in value))
            if len(value) != 3 or (name == "std" and min(value) <= 0):
                raise ValueError(f"{name} must be three numbers, one a channel, got {list(value)}")
        if self.layers is not None:
            object.__setattr__(self, "layers", tuple(self.layers))

    @property
    def independent(self) -> bool:
        """Whether labels see the image and themselves alone."""
        return self.mask == "independent"

    @property
    def bidirectional(self) -> bool:
        """Whether image tokens see one another."""
        return self.mask != "causal"

    def to_json(self) -> dict[str, Any]:
        """As config.json holds it."""
        return {"kind": KIND, **asdict(self)}

    @classmethod
    def read(cls, path: Path) -> RecognizerConfig:
        """Read a config.json.

        Raises:
            QuickmergeError: if the file is not there, or is not a recognizer's.
        """
        if not path.exists():
            raise QuickmergeError(f"model must be a folder that holds a recognizer, but there is no {path}")
        data = read_settings(path)
        if data.get("kind") != KIND:
            found = data.get("kind") or data.get("model_type")
            raise QuickmergeError(
                f"model must be a folder that holds a recognizer, but {path} is of {found or 'something else'}: "
                "`quickmerge train recognizer` makes one"
            )
        known = {field.name for field in fields(cls)}
        settings = {key: value for key, value in data.items() if key != "kind"}
        if set(settings) != known:
            odd = sorted(set(settings) ^ known)[0]
            side = "lacks" if odd in known else "has the unknown entry"
            raise QuickmergeError(f"{path} is of another release of quickmerge or damaged: it {side} {odd}")
        try:
            return cls(**settings)
        except (TypeError, ValueError) as error:
            raise QuickmergeError(f"{path} is damaged: {error}") from None
