"""Gumiho: draft heads on the target's last hidden state, the first tokens serial and the others parallel."""

from __future__ import annotations

from quickmerge.decoding.gumiho.config import GumihoConfig
from quickmerge.decoding.gumiho.drafter import Gumiho
from quickmerge.decoding.gumiho.losses import LossWeights, gumiho_losses
from quickmerge.decoding.gumiho.network import GumihoNetwork

__all__ = ["Gumiho", "GumihoConfig", "GumihoNetwork", "LossWeights", "gumiho_losses"]
