"""quickmerge makes transformers predict with fewer tokens, and tells you what it cost.

Public names are loaded on first use, so that importing the package stays cheap.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from quickmerge import _moved
from quickmerge._lazy import lazy
from quickmerge._version import __version__ as __version__
from quickmerge.calm.auto import watch

if TYPE_CHECKING:
    from quickmerge.calm import CalmForCausalLM as CalmForCausalLM
    from quickmerge.data import shipped_gumiho as shipped_gumiho
    from quickmerge.data import shipped_prior as shipped_prior
    from quickmerge.errors import QuickmergeError as QuickmergeError
    from quickmerge.merge.attach import reduce as reduce
    from quickmerge.merge.cache import AttentionNorm as AttentionNorm
    from quickmerge.merge.cache import Evictor as Evictor
    from quickmerge.merge.cache import ExpectedAttention as ExpectedAttention
    from quickmerge.merge.cache import KeyDiff as KeyDiff
    from quickmerge.merge.cache import KVzip as KVzip
    from quickmerge.merge.cache import LagKV as LagKV
    from quickmerge.merge.cache import ObservedAttention as ObservedAttention
    from quickmerge.merge.cache import SnapKV as SnapKV
    from quickmerge.merge.cache import StreamingLLM as StreamingLLM
    from quickmerge.merge.place import Merge as Merge
    from quickmerge.merge.prior import Prior as Prior
    from quickmerge.merge.prior import QuickMergePrior as QuickMergePrior
    from quickmerge.merge.reducers import SCOPE as SCOPE
    from quickmerge.merge.reducers import Attention as Attention
    from quickmerge.merge.reducers import DynamicViT as DynamicViT
    from quickmerge.merge.reducers import GemFilter as GemFilter
    from quickmerge.merge.reducers import Pool as Pool
    from quickmerge.merge.reducers import QuickMerge as QuickMerge
    from quickmerge.merge.reducers import QuickMergeVision as QuickMergeVision
    from quickmerge.merge.reducers import Random as Random
    from quickmerge.merge.reducers import Reducer as Reducer
    from quickmerge.merge.reducers import SpecPrefill as SpecPrefill
    from quickmerge.merge.reducers import ToFu as ToFu
    from quickmerge.merge.reducers import ToMe as ToMe
    from quickmerge.merge.reducers import TopNorm as TopNorm
    from quickmerge.merge.reducers import TrimTokenator as TrimTokenator
    from quickmerge.merge.reducers import Truncate as Truncate
    from quickmerge.merge.reducers import Uniform as Uniform
    from quickmerge.merge.reducers import select_visual_tokens as select_visual_tokens
    from quickmerge.merge.run import Run as Run
    from quickmerge.merge.text.modes import BlockCausal as BlockCausal
    from quickmerge.merge.text.modes import Prefix as Prefix
    from quickmerge.merge.tokens import Count as Count
    from quickmerge.merge.tokens import Entropy as Entropy
    from quickmerge.merge.tokens import Mass as Mass
    from quickmerge.merge.tokens import MergePlan as MergePlan
    from quickmerge.merge.tokens import Ratio as Ratio
    from quickmerge.merge.tokens import Removal as Removal
    from quickmerge.merge.tokens import Schedule as Schedule
    from quickmerge.merge.tokens import TokenView as TokenView
    from quickmerge.merge.vision.vit import VisionRun as VisionRun
    from quickmerge.merge.visual.vlm import VlmRun as VlmRun
    from quickmerge.models import load as load
    from quickmerge.models import load_vision as load_vision
    from quickmerge.models import load_vlm as load_vlm
    from quickmerge.models.attachment import detach as detach
    from quickmerge.multipole import Multipole as Multipole
    from quickmerge.multipole import MultipoleCache as MultipoleCache
    from quickmerge.multipole import multipole as multipole
    from quickmerge.recipe import Calibration as Calibration
    from quickmerge.recipe import Reading as Reading
    from quickmerge.recipe import Recipe as Recipe
    from quickmerge.recipe import Speculation as Speculation
    from quickmerge.recipe import apply as apply
    from quickmerge.recipe import break_even as break_even
    from quickmerge.recipe import calibrate as calibrate
    from quickmerge.recipe import read as read
    from quickmerge.recognition import Recognizer as Recognizer
    from quickmerge.speculative import BestOf as BestOf
    from quickmerge.speculative import PromptLookup as PromptLookup
    from quickmerge.speculative import SpeculativeDecoding as SpeculativeDecoding
    from quickmerge.speculative import SuffixDecoding as SuffixDecoding
    from quickmerge.speculative.gumiho import Gumiho as Gumiho

__getattr__, __dir__, __all__ = lazy(
    __name__,
    {
        "calm": ("CalmForCausalLM",),
        "data": ("shipped_gumiho", "shipped_prior"),
        "errors": ("QuickmergeError",),
        "merge.attach": ("reduce",),
        "merge.cache": (
            "AttentionNorm",
            "Evictor",
            "ExpectedAttention",
            "KVzip",
            "KeyDiff",
            "LagKV",
            "ObservedAttention",
            "SnapKV",
            "StreamingLLM",
        ),
        "merge.place": ("Merge",),
        "merge.prior": ("Prior", "QuickMergePrior"),
        "merge.reducers": (
            "SCOPE",
            "Attention",
            "DynamicViT",
            "GemFilter",
            "Pool",
            "QuickMerge",
            "QuickMergeVision",
            "Random",
            "Reducer",
            "SpecPrefill",
            "ToFu",
            "ToMe",
            "TopNorm",
            "TrimTokenator",
            "Truncate",
            "Uniform",
            "select_visual_tokens",
        ),
        "merge.text.modes": ("BlockCausal", "Prefix"),
        "merge.run": ("Run",),
        "merge.tokens": ("Count", "Entropy", "Mass", "MergePlan", "Ratio", "Removal", "Schedule", "TokenView"),
        "merge.vision.vit": ("VisionRun",),
        "merge.visual.vlm": ("VlmRun",),
        "models": ("load", "load_vision", "load_vlm"),
        "models.attachment": ("detach",),
        "multipole": ("Multipole", "MultipoleCache", "multipole"),
        "recipe": ("Calibration", "Reading", "Recipe", "Speculation", "apply", "break_even", "calibrate", "read"),
        "recognition": ("Recognizer",),
        "speculative": ("BestOf", "PromptLookup", "SpeculativeDecoding", "SuffixDecoding"),
        "speculative.gumiho": ("Gumiho",),
    },
    "__version__",
)

watch()
_moved.watch()
