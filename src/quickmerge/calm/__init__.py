"""CALM: continuous autoregressive language models, which write K tokens at a time as one vector (arXiv 2510.27688).

Names are loaded on first use: transformers is taught to open what is saved here while it is being loaded itself (see
`quickmerge.calm.auto`), and can't be asked for its models then.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from quickmerge._lazy import lazy

if TYPE_CHECKING:
    from quickmerge.calm.autoencoder import CalmAutoencoder as CalmAutoencoder
    from quickmerge.calm.autoencoder import CalmAutoencoderOutput as CalmAutoencoderOutput
    from quickmerge.calm.chunks import chunk_document as chunk_document
    from quickmerge.calm.chunks import chunk_prompts as chunk_prompts
    from quickmerge.calm.chunks import real_chunks as real_chunks
    from quickmerge.calm.config import CalmAutoencoderConfig as CalmAutoencoderConfig
    from quickmerge.calm.config import CalmConfig as CalmConfig
    from quickmerge.calm.model import CalmForCausalLM as CalmForCausalLM
    from quickmerge.calm.model import CalmOutput as CalmOutput
    from quickmerge.calm.model import load_calm as load_calm

__getattr__, __dir__, __all__ = lazy(
    __name__,
    {
        "autoencoder": ("CalmAutoencoder", "CalmAutoencoderOutput"),
        "chunks": ("chunk_document", "chunk_prompts", "real_chunks"),
        "config": ("CalmAutoencoderConfig", "CalmConfig"),
        "model": ("CalmForCausalLM", "CalmOutput", "load_calm"),
    },
)
