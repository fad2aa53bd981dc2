"""From the tokens of a chunk to the one vector that the language model reads for them."""

from __future__ import annotations

from torch import Tensor, nn

__all__ = ["ChunkEmbedding"]


class ChunkEmbedding(nn.Module):
    """Presses the embeddings of K tokens into one vector: ``norm(W2 silu W1 [e_1; ...; e_K])`` (arXiv 2510.27688).

    The language model reads the tokens themselves, not the latent vector that they were drawn as: the paper found
    latents, which are made to be fragile to nothing but their decoder, much harder to read.

    Args:
        patch: K, tokens of a chunk.
        token_width: features of a token's embedding.
        width: D, features of the language model; there are 2 D between the two layers.
    """

    def __init__(self, patch: int, token_width: int, width: int) -> None:
        super().__init__()
        self.patch = patch
        self.up = nn.Linear(patch * token_width, 2 * width)
        self.down = nn.Linear(2 * width, width)
        self.norm = nn.LayerNorm(width, eps=1e-6)

    def forward(self, tokens: Tensor) -> Tensor:
        """Token embeddings ``(B, T * K, E)`` to chunk embeddings ``(B, T, D)``."""
        together = tokens.reshape(tokens.shape[0], -1, self.patch * tokens.shape[-1])
        out: Tensor = self.norm(self.down(nn.functional.silu(self.up(together))))
        return out
