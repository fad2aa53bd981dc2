"""Train an autoencoder of chunks of SmolLM2's 49,152 tokens on little text: runs/calm/ae-smollm2.

    python benchmarks/training_text.py
    python benchmarks/calm_autoencoder_smollm2.py --out runs/calm/ae-smollm2

A third of a large vocabulary never comes in a few million tokens, and an autoencoder can't write what it never saw. So
three things are done here that `quickmerge train calm` does not do:

- The embeddings are SmolLM2's, brought to the width, and stay as they are: what is learnt of one token holds for all.
- A share of the tokens is any token of the vocabulary, evenly. Else the decoder learns to say frequent ones.
- The maps begin as a linear code and its mirror image (orthogonal rows, and the same transposed), with nothing in the
  gated layers, so that nearly half of the tokens are found again before any training.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import torch
from documents import SAY
from torch import Tensor, nn

from quickmerge.calm import CalmAutoencoder
from quickmerge.calm.texts import CalmTexts
from quickmerge.calm.train import new_autoencoder, train_calm_autoencoder
from quickmerge.console.options import load_model, one_sentence, progress, quiet
from quickmerge.datasets import find_data
from quickmerge.errors import QuickmergeError
from quickmerge.models import cache_folder
from quickmerge.training import TrainingConfig

SHAPE = {"width": 256, "latent": 128, "token_dropout": 0.05, "latent_dropout": 0.05}
LOG_STD = -1.5
"""Where the encoder's deviations begin, as a logarithm."""


class MixedTexts(CalmTexts):
    """Windows of texts in which a share of the tokens is any token, evenly; pads stay."""

    share: float = 0.0

    def __getitem__(self, index: int) -> Tensor:
        """One window, ``(T * K,)``, its random tokens from the global generator as its pads in front are."""
        window = super().__getitem__(index)
        change = (torch.rand(window.shape) < self.share) & (window != self.pad)
        return torch.where(change, torch.randint(self.pad, window.shape), window)

    def fingerprint(self) -> str:
        """As `CalmTexts.fingerprint`; another share is another training."""
        return f"{super().fingerprint()} {self.share}"


@torch.no_grad()
def mirror(model: CalmAutoencoder) -> None:
    """Let the decoder begin as the mirror image of the encoder, both linear."""
    encoder, decoder, latent = model.encoder, model.decoder, model.config.latent
    for layer in (encoder.tokens, encoder.chunk, decoder.chunk, decoder.tokens):
        nn.init.zeros_(layer.down.weight)
    nn.init.orthogonal_(encoder.squeeze.weight)
    decoder.expand.weight.copy_(encoder.squeeze.weight.T)
    nn.init.orthogonal_(encoder.out.weight[:latent])
    decoder.into.weight.copy_(encoder.out.weight[:latent].T)
    nn.init.zeros_(encoder.out.weight[latent:])
    nn.init.constant_(encoder.out.bias[latent:], LOG_STD)


def main() -> int:
    """Train; 2 where something that is needed is missing."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--data", type=Path, help="folder of texts (default: that of training_text.py in the cache)")
    parser.add_argument("--share", type=float, default=0.4, help="of the tokens that is any token")
    parser.add_argument("--steps", type=int, default=2500)
    parser.add_argument("--sampled", type=int, default=1024, help="words that each step holds against the right ones")
    parser.add_argument("--resume", action="store_true")
    args = parser.parse_args()
    quiet()
    try:
        with one_sentence():
            train(args)
    except QuickmergeError as error:
        SAY.print(str(error), markup=False)
        return 2
    return 0


def train(args: argparse.Namespace) -> None:
    """Settings but the share, the steps and the sampled words are fixed."""
    if not 0 <= args.share < 1:
        raise QuickmergeError(f"--share must be in [0, 1), got {args.share}")
    model, tokenizer = load_model("smollm2-135m")
    files = find_data([args.data or cache_folder() / "training" / "train"]).files
    with progress() as bar:
        task = bar.add_task("reading the texts", total=len(files))
        texts = MixedTexts(tokenizer, files, 4, 16, progress=lambda done, _: bar.update(task, completed=done))
        texts.share = args.share
        weight = model.get_input_embeddings().weight
        autoencoder = new_autoencoder(texts, embeddings=weight, **SHAPE)
    mirror(autoencoder)
    autoencoder.embed.weight.requires_grad_(False)
    config = TrainingConfig(
        steps=args.steps, batch=16, learning_rate=2e-3, warmup=min(50, args.steps), final=0.05, weight_decay=0.1,
        betas=(0.9, 0.95), precision="bf16", save_every=250,
    )  # fmt: skip
    train_calm_autoencoder(
        autoencoder, texts, config, args.out, sampled=args.sampled, tokenizer=tokenizer, resume=args.resume
    )
    print(f"wrote {args.out}")


if __name__ == "__main__":
    sys.exit(main())
