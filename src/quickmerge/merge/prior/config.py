"""What a prior is made of and what it was trained for; stored as config.json beside its weights."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from quickmerge.calm.heads import HEADS
from quickmerge.errors import QuickmergeError, first_sentence, near_match, whole_number
from quickmerge.models.part import read_settings

KIND = "quickmerge-prior"
DIRECTIONS = ("forward", "both")


@dataclass(frozen=True)
class PriorConfig:
    """Shape of a prior and the place it was trained for.

    Args:
        features: width D of the features that are merged.
        width: features per slot inside the prior.
        layers: transformer blocks.
        heads: attention heads; ``width`` is a multiple of twice their number.
        pool: heads of the learned merge, each with its own merge weights; divides ``width``. 0 for a prior that can
            generate: of a slot it reads only what is known once the slot is generated, see `generates`.
        head: what predicts the next slot: ``gaussian`` or ``mixture``, which have a density, or ``energy``, ``flow`` or
            ``diffusion``, which are known by their draws alone: temperature 1 only, and a score with noise in it.
        head_settings: further arguments of that head.
        directions: ``forward``, or ``both``, in which the loss also predicts each slot from those after it.
        depths: blocks of the language model in front of which slots are corrected; none: no alignment.
        saliency: whether a learned term is added to the saliency.
        axes: coordinates of a position: 1 for text, 2 for images, 3 for video.
        trained_for: the model (name and hash), merge layers and reducer it was trained with.

    Raises:
        ValueError: naming the argument that is out of range.
    """

    features: int
    width: int = 256
    layers: int = 2
    heads: int = 4
    pool: int = 4
    head: str = "gaussian"
    head_settings: dict[str, Any] = field(default_factory=dict)
    directions: str = "both"
    depths: tuple[int, ...] = ()
    saliency: bool = True
    axes: int = 1
    trained_for: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name in ("features", "width", "layers", "heads"):
            object.__setattr__(self, name, whole_number(name, getattr(self, name)))
        object.__setattr__(self, "pool", whole_number("pool", self.pool, 0))
        if self.width % (2 * self.heads) or (self.pool and self.width % self.pool):
            raise ValueError(
                f"width must be a multiple of pool and of twice heads, got width={self.width}, pool={self.pool} "
                f"and heads={self.heads}"
            )
        if self.head not in HEADS:
            raise ValueError(f"head must be one of {', '.join(HEADS)}, got {self.head!r}{near_match(self.head, HEADS)}")
        if self.directions not in DIRECTIONS:
            raise ValueError(f"directions must be one of {', '.join(DIRECTIONS)}, got {self.directions!r}")
        if self.axes not in (1, 2, 3):
            raise ValueError(f"axes must be 1 (text), 2 (images) or 3 (video), got {self.axes!r}")
        if self.axes > 1 and self.pool:
            raise ValueError(
                f"pool must be 0 for axes={self.axes}: priors of images and video generate, got {self.pool}"
            )
        if list(self.depths) != sorted(set(self.depths)) or any(depth < 1 for depth in self.depths):
            raise ValueError(f"depths must be rising whole numbers of at least 1, got {list(self.depths)}")

    @property
    def generates(self) -> bool:
        """Whether contents of slots can be generated, given where slots stand and how many tokens each is of.

        Such a prior reads merged contents and no members, in the scale of the features rather than brought to one
        length, and each slot together with where the next one stands.
        """
        return self.pool == 0

    @property
    def copies(self) -> bool:
        """Whether a slot is predicted as a copy of the nearest slots before it and a difference: in video."""
        return self.generates and self.axes == 3

    def to_json(self) -> str:
        """As text for config.json."""
        return json.dumps({"kind": KIND, **asdict(self)}, indent=1) + "\n"

    @classmethod
    def read(cls, path: Path) -> PriorConfig:
        """Read a config.json.

        Raises:
            QuickmergeError: if the file is not there, or is not a prior's.
        """
        return cls.from_data(read_settings(path), path)

    @classmethod
    def from_data(cls, data: dict[str, Any], path: Path) -> PriorConfig:
        """From the content of a config.json; ``path`` is named in errors, which are those of `read`."""
        data = dict(data)
        if data.pop("kind", None) != KIND:
            raise QuickmergeError(f'{path} must belong to a prior ("kind": "{KIND}"), got the config of something else')
        known = {f.name for f in fields(cls)}
        if not isinstance(data.get("trained_for", {}), dict):
            raise QuickmergeError(f"{path}: trained_for must be an object, got {data['trained_for']!r}")
        if unknown := sorted(set(data) - known):
            raise QuickmergeError(f"{path} has the unknown entry {unknown[0]!r}{near_match(unknown[0], known)}")
        try:
            data["depths"] = tuple(data.get("depths", ()))
            return cls(**data)
        except Exception as error:  # a value of the wrong kind leads to errors of any kind
            raise QuickmergeError(f"{path}: {first_sentence(error)}") from error
