"""Where a reducer acts in a real model. A host knows models and no method."""

from quickmerge.hosts.attach import reduce
from quickmerge.hosts.causal_lm import Run
from quickmerge.hosts.encoder import VISION_FAMILIES, Encoder, find_encoder
from quickmerge.hosts.observe import observe
from quickmerge.hosts.structure import FAMILIES, Decoder, find_decoder
from quickmerge.hosts.vit import VisionRun

__all__ = [
    "FAMILIES",
    "VISION_FAMILIES",
    "Decoder",
    "Encoder",
    "Run",
    "VisionRun",
    "find_decoder",
    "find_encoder",
    "observe",
    "reduce",
]
