"""Output heads for autoregressive models over continuous vectors: one distribution a file."""

from inspect import Parameter, signature
from typing import Any

from quickmerge.calm.heads.base import VectorHead
from quickmerge.calm.heads.energy import EnergyHead, energy_score
from quickmerge.calm.heads.flow import DiffusionHead, FlowHead
from quickmerge.calm.heads.gaussian import GaussianHead, MixtureHead
from quickmerge.calm.heads.sampled import SamplingHead
from quickmerge.errors import QuickmergeError, near_match

HEADS: dict[str, type[VectorHead]] = {
    cls.name: cls for cls in (GaussianHead, MixtureHead, EnergyHead, FlowHead, DiffusionHead)
}
"""Every head by the name that `make_head` knows it by."""


def make_head(name: str, context: int, width: int, **settings: Any) -> VectorHead:
    """A head by name, from contexts ``(..., context)`` to vectors ``(..., width)``, with its settings.

    Raises:
        QuickmergeError: for a name that is not in `HEADS` or a setting that the head does not have, with the nearest
            that is there.
        ValueError: for a setting out of range.
    """
    if name not in HEADS:
        raise QuickmergeError(f"head must be one of {', '.join(HEADS)}, got {name!r}{near_match(str(name), HEADS)}")
    cls = HEADS[name]
    allowed = [p.name for p in signature(cls).parameters.values() if p.kind is Parameter.KEYWORD_ONLY]
    for key in settings:
        if key not in allowed:
            raise QuickmergeError(
                f"settings of the {name} head must be of {', '.join(allowed)}, got {key!r}{near_match(key, allowed)}"
            )
    return cls(context, width, **settings)


__all__ = [
    "HEADS",
    "DiffusionHead",
    "EnergyHead",
    "FlowHead",
    "GaussianHead",
    "MixtureHead",
    "SamplingHead",
    "VectorHead",
    "energy_score",
    "make_head",
]
