"""CALM: continuous autoregressive language models, which write K tokens at a time as one vector (arXiv 2510.27688).

Names are loaded on first use: transformers is taught to open what is saved here while it is being loaded itself (see
`quickmerge.auto`), and can't be asked for its models then.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from quickmerge.continuous.autoencoder import CalmAutoencoder as CalmAutoencoder
    from quickmerge.continuous.autoencoder import CalmAutoencoderOutput as CalmAutoencoderOutput
    from quickmerge.continuous.autoencoder_config import CalmAutoencoderConfig as CalmAutoencoderConfig
    from quickmerge.continuous.chunks import chunk_document as chunk_document
    from quickmerge.continuous.chunks import chunk_prompts as chunk_prompts
    from quickmerge.continuous.chunks import real_chunks as real_chunks
    from quickmerge.continuous.config import CalmConfig as CalmConfig
    from quickmerge.continuous.model import CalmForCausalLM as CalmForCausalLM
    from quickmerge.continuous.model import CalmOutput as CalmOutput
    from quickmerge.continuous.store import load_calm as load_calm

_HOME = {
    "autoencoder": ("CalmAutoencoder", "CalmAutoencoderOutput"),
    "autoencoder_config": ("CalmAutoencoderConfig",),
    "chunks": ("chunk_document", "chunk_prompts", "real_chunks"),
    "config": ("CalmConfig",),
    "model": ("CalmForCausalLM", "CalmOutput"),
    "store": ("load_calm",),
}
_WHERE = {name: module for module, names in _HOME.items() for name in names}
__all__ = [*_WHERE]


def __getattr__(name: str) -> Any:
    if name not in _WHERE:
        raise AttributeError(f"module 'quickmerge.continuous' has no attribute {name!r}")
    return getattr(import_module(f"quickmerge.continuous.{_WHERE[name]}"), name)


def __dir__() -> list[str]:
    return sorted(__all__)
