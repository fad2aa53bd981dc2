"""Where a reducer acts in a real model. A host knows models and no method."""

from quickmerge.hosts.attach import reduce
from quickmerge.hosts.attachment import detach
from quickmerge.hosts.causal_lm import Run
from quickmerge.hosts.encoder import VISION_FAMILIES, Encoder, find_encoder
from quickmerge.hosts.observe import observe
from quickmerge.hosts.structure import FAMILIES, Decoder, find_decoder
from quickmerge.hosts.vit import VisionRun
from quickmerge.hosts.vlm import VlmRun
from quickmerge.hosts.vlm_structure import VLM_FAMILIES, Vlm, find_vlm, holds_vlm

__all__ = [
    "FAMILIES",
    "VISION_FAMILIES",
    "VLM_FAMILIES",
    "Decoder",
    "Encoder",
    "Run",
    "VisionRun",
    "Vlm",
    "VlmRun",
    "detach",
    "find_decoder",
    "find_encoder",
    "find_vlm",
    "holds_vlm",
    "observe",
    "reduce",
]
