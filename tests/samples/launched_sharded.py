"""Run by test_sharding.py, alone and under launchers: trains on frozen bases without noise, and says how they lie.

Arguments: the folder for the runs, the items of a step in this process, and what else is to be done: ``stop`` stops
each run in its middle and goes on, ``reduce`` merges a prompt by the sharded model in the end.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch
from launched_prior import Windows
from torch.distributed.tensor import DTensor
from transformers import LlamaConfig, LlamaForCausalLM
from vision_samples import make

import quickmerge as qm
from quickmerge.merge.prior.train_text import train_prior_text
from quickmerge.merge.train.dynamicvit import DynamicViTObjective, DynamicViTSettings
from quickmerge.speculative.gumiho.self_answers import Answered
from quickmerge.speculative.gumiho.texts import DraftTexts
from quickmerge.speculative.gumiho.train import train_gumiho
from quickmerge.training import TrainingConfig, train


class Still(DynamicViTObjective):
    """Keeps what the predictors hold for likely, so that two processes draw what one does."""

    def decide(self, stage: int, patches: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        shares = self.predictors[stage](patches, mask)[..., 0].exp()
        return (shares > 0.5).to(shares) + shares - shares.detach()


class Images:
    def __len__(self) -> int:
        return 24

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        draw = torch.Generator().manual_seed(index)
        return torch.randn(3, 32, 32, generator=draw), index % 3


def language_model() -> Any:
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    return LlamaForCausalLM(LlamaConfig(vocab_size=64, initializer_range=0.3, **sizes)).eval()


def train_prior(out: Path, config: TrainingConfig, resume: bool) -> Any:
    model = language_model()
    train_prior_text(
        model, Windows(), config, out, name="tiny", keeps=[0.3, 0.4, 0.6], layer=1, context=90,
        reducer={"layers": 1, "window": 8, "pool": 1}, temperature=(0.0, 0.0), width=16, heads=2, resume=resume,
        memory={},
    )  # fmt: skip
    return model


def train_heads(out: Path, config: TrainingConfig, resume: bool) -> Any:
    model = language_model()
    ids = torch.randint(2, 64, (24, 20), generator=torch.Generator().manual_seed(1)).tolist()
    texts = DraftTexts(None, [Answered(tuple(row[:3]), tuple(row[3:])) for row in ids], length=20)
    train_gumiho(model, texts, config, out, name="tiny", noise=0.0, resume=resume)
    return model


def train_predictors(out: Path, config: TrainingConfig, resume: bool) -> Any:
    torch.manual_seed(0)
    objective = Still(make("vit")[0], keep=0.6, layers=(1,), settings=DynamicViTSettings(backbone_rate=0.0))
    train(objective, Images(), config, out, resume=resume)
    return objective.frozen()[0][0]


if __name__ == "__main__":
    folder, batch, wanted = Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3:]
    told: dict[str, Any] = {}
    for name, run in (("prior", train_prior), ("heads", train_heads), ("predictors", train_predictors)):
        config = {"steps": 6, "batch": batch, "learning_rate": 1e-3, "save_every": 2, "log_every": 1}
        if "stop" in wanted:
            run(folder / name, TrainingConfig(**config, max_minutes=1e-9), False)
        model = run(folder / name, TrainingConfig(**config), "stop" in wanted)
        split = [p for p in model.parameters() if isinstance(p, DTensor)]
        told[name] = {
            "held": sum(p.to_local().numel() if isinstance(p, DTensor) else p.numel() for p in model.parameters()),
            "all": sum(p.numel() for p in model.parameters()), "split": sum(p.numel() for p in split),
        }  # fmt: skip
        if "reduce" in wanted and name == "prior":
            ids = Windows().ids[:1, :90]
            whole = language_model()
            texts = []
            for each in (model, whole):
                with torch.no_grad(), qm.reduce(each, qm.QuickMerge(keep=0.4), 1, mode=qm.Prefix(min_tokens=0)):
                    out = each.generate(
                        input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=8, do_sample=False
                    )
                texts.append(out[0, 90:].tolist())
            told["reduced"] = texts
    rank = torch.distributed.get_rank() if torch.distributed.is_initialized() else 0
    (folder / f"told-{rank}.json").write_text(json.dumps(told))
