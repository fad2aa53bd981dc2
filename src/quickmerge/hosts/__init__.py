"""Where a reducer acts in a real model. A host knows models and no method."""

from quickmerge.hosts.causal_lm import Run, reduce
from quickmerge.hosts.observe import observe
from quickmerge.hosts.structure import FAMILIES, Decoder, find_decoder

__all__ = ["FAMILIES", "Decoder", "Run", "find_decoder", "observe", "reduce"]
