"""quickmerge makes transformers predict with fewer tokens, and tells you what it cost.

Public names are loaded on first use, so that importing the package stays cheap.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from quickmerge.auto import watch

if TYPE_CHECKING:
    from quickmerge.attention import Multipole as Multipole
    from quickmerge.attention import MultipoleCache as MultipoleCache
    from quickmerge.attention import multipole as multipole
    from quickmerge.continuous import CalmForCausalLM as CalmForCausalLM
    from quickmerge.data import shipped_gumiho as shipped_gumiho
    from quickmerge.data import shipped_prior as shipped_prior
    from quickmerge.decoding import PromptLookup as PromptLookup
    from quickmerge.decoding import SpeculativeDecoding as SpeculativeDecoding
    from quickmerge.decoding.gumiho import Gumiho as Gumiho
    from quickmerge.errors import QuickmergeError as QuickmergeError
    from quickmerge.hosts import Run as Run
    from quickmerge.hosts import VisionRun as VisionRun
    from quickmerge.hosts import VlmRun as VlmRun
    from quickmerge.hosts import detach as detach
    from quickmerge.hosts import reduce as reduce
    from quickmerge.models import load as load
    from quickmerge.models import load_vision as load_vision
    from quickmerge.models import load_vlm as load_vlm
    from quickmerge.prior import Prior as Prior
    from quickmerge.prior import QuickMergePrior as QuickMergePrior
    from quickmerge.prior import Surprise as Surprise
    from quickmerge.recognition import Recognizer as Recognizer
    from quickmerge.reducers import SCOPE as SCOPE
    from quickmerge.reducers import Attention as Attention
    from quickmerge.reducers import DynamicViT as DynamicViT
    from quickmerge.reducers import Pool as Pool
    from quickmerge.reducers import QuickMerge as QuickMerge
    from quickmerge.reducers import QuickMergeVision as QuickMergeVision
    from quickmerge.reducers import Random as Random
    from quickmerge.reducers import Reducer as Reducer
    from quickmerge.reducers import ToFu as ToFu
    from quickmerge.reducers import ToMe as ToMe
    from quickmerge.reducers import TopNorm as TopNorm
    from quickmerge.reducers import TrimTokenator as TrimTokenator
    from quickmerge.reducers import Truncate as Truncate
    from quickmerge.reducers import Uniform as Uniform
    from quickmerge.reducers import select_visual_tokens as select_visual_tokens
    from quickmerge.tokens import Count as Count
    from quickmerge.tokens import Entropy as Entropy
    from quickmerge.tokens import Mass as Mass
    from quickmerge.tokens import MergePlan as MergePlan
    from quickmerge.tokens import Ratio as Ratio
    from quickmerge.tokens import Removal as Removal
    from quickmerge.tokens import Schedule as Schedule
    from quickmerge.tokens import TokenView as TokenView

__version__ = "0.1.0"

_HOME = {
    "attention": ("Multipole", "MultipoleCache", "multipole"),
    "continuous": ("CalmForCausalLM",),
    "data": ("shipped_gumiho", "shipped_prior"),
    "decoding": ("PromptLookup", "SpeculativeDecoding"),
    "decoding.gumiho": ("Gumiho",),
    "errors": ("QuickmergeError",),
    "hosts": ("Run", "VisionRun", "VlmRun", "detach", "reduce"),
    "models": ("load", "load_vision", "load_vlm"),
    "prior": ("Prior", "QuickMergePrior", "Surprise"),
    "recognition": ("Recognizer",),
    "reducers": (
        "SCOPE",
        "Attention",
        "DynamicViT",
        "Pool",
        "QuickMerge",
        "QuickMergeVision",
        "Random",
        "Reducer",
        "ToFu",
        "ToMe",
        "TopNorm",
        "TrimTokenator",
        "Truncate",
        "Uniform",
        "select_visual_tokens",
    ),
    "tokens": ("Count", "Entropy", "Mass", "MergePlan", "Ratio", "Removal", "Schedule", "TokenView"),
}
_WHERE = {name: module for module, names in _HOME.items() for name in names}
__all__ = ["__version__", *_WHERE]

watch()


def __getattr__(name: str) -> Any:
    if name not in _WHERE:
        raise AttributeError(f"module 'quickmerge' has no attribute {name!r}")
    return getattr(import_module(f"quickmerge.{_WHERE[name]}"), name)


def __dir__() -> list[str]:
    return sorted(__all__)
