"""The autoregressive prior over merged tokens: network, heads, losses, aligner."""

from quickmerge.prior.budget import Surprise, calibrate_surprise
from quickmerge.prior.config import PriorConfig
from quickmerge.prior.identity import model_hash
from quickmerge.prior.losses import CollapseError
from quickmerge.prior.model import Prior
from quickmerge.prior.reducer import QuickMergePrior

__all__ = ["CollapseError", "Prior", "PriorConfig", "QuickMergePrior", "Surprise", "calibrate_surprise", "model_hash"]
