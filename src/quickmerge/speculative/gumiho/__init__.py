"""Gumiho: draft heads on the target's last hidden state, the first tokens serial and the others parallel."""

from __future__ import annotations

from typing import TYPE_CHECKING

from quickmerge._lazy import lazy

if TYPE_CHECKING:
    from quickmerge.speculative.gumiho.config import GumihoConfig as GumihoConfig
    from quickmerge.speculative.gumiho.drafter import Gumiho as Gumiho
    from quickmerge.speculative.gumiho.eagle import write_eagle as write_eagle
    from quickmerge.speculative.gumiho.losses import LossWeights as LossWeights
    from quickmerge.speculative.gumiho.losses import gumiho_losses as gumiho_losses
    from quickmerge.speculative.gumiho.network import GumihoNetwork as GumihoNetwork
    from quickmerge.speculative.gumiho.published import read_published as read_published
    from quickmerge.speculative.gumiho.published import write_published as write_published

__getattr__, __dir__, __all__ = lazy(
    __name__,
    {
        "config": ("GumihoConfig",),
        "drafter": ("Gumiho",),
        "eagle": ("write_eagle",),
        "losses": (
            "LossWeights",
            "gumiho_losses",
        ),
        "network": ("GumihoNetwork",),
        "published": (
            "read_published",
            "write_published",
        ),
    },
)
