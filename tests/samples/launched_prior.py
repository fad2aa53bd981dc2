"""Run by test_prior_text.py, alone and under a launcher: trains a tiny prior without noise."""

import sys
from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from quickmerge.merge.prior.train_text import train_prior_text
from quickmerge.training import TrainingConfig


class Windows:
    """Random texts that repeat themselves."""

    def __init__(self) -> None:
        piece = torch.randint(2, 64, (16, 13), generator=torch.Generator().manual_seed(0))
        self.ids = piece.repeat(1, 8)[:, :102]

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, index: int) -> torch.Tensor:
        return self.ids[index]


if __name__ == "__main__":
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=64, initializer_range=0.3, **sizes)).eval()
    train_prior_text(
        model, Windows(), TrainingConfig(steps=10, batch=int(sys.argv[2]), learning_rate=1e-3), Path(sys.argv[1]),
        name="tiny", keeps=[0.3, 0.4, 0.6], layer=1, context=90, reducer={"layers": 1, "window": 8, "pool": 1},
        temperature=(0.0, 0.0), width=16, heads=2,
    )  # fmt: skip
