"""The autoregressive prior over merged tokens: network, heads, losses, aligner."""

from __future__ import annotations

from typing import TYPE_CHECKING

from quickmerge._lazy import lazy

if TYPE_CHECKING:
    from quickmerge.merge.prior.config import PriorConfig as PriorConfig
    from quickmerge.merge.prior.model import CollapseError as CollapseError
    from quickmerge.merge.prior.model import Prior as Prior
    from quickmerge.merge.prior.reducer import QuickMergePrior as QuickMergePrior
    from quickmerge.models.identity import model_hash as model_hash

__getattr__, __dir__, __all__ = lazy(
    __name__,
    {
        "config": ("PriorConfig",),
        "model": ("CollapseError", "Prior"),
        "reducer": ("QuickMergePrior",),
        "quickmerge.models.identity": ("model_hash",),
    },
)
