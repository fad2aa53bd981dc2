"""What is read, and inside of which run, where waits for a device are counted: tiny models on the device of `waits`."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass
from functools import cache, partial
from typing import Any

import torch
import vlm_zoo
from torch import Tensor
from transformers import Gemma3ForCausalLM, Gemma3TextConfig, LlamaConfig, LlamaForCausalLM, ViTConfig, ViTModel
from waits import Count, Held, counting, on_device

import quickmerge as qm

TOKENS, LONG, VOCABULARY, STEPS = 96, 288, 97, 4
SIZE: dict[str, Any] = {
    "hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4, "num_key_value_heads": 2,
    "vocab_size": VOCABULARY, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "max_position_embeddings": 512,
}  # fmt: skip


@dataclass(frozen=True)
class Figures:
    """Waits for the device, of ``plain`` and of what is done to it, and operations on it outside of the model."""

    plain: float
    waits: float
    plain_operations: float = 0.0
    operations: float = 0.0

    @property
    def more(self) -> float:
        """Waits beyond those of the plain model."""
        return self.waits - self.plain

    def as_dict(self) -> dict[str, float]:
        """For JSON; operations where they were counted."""
        told = asdict(self) if self.operations else {"plain": self.plain, "waits": self.waits}
        return {**told, "more": self.more}


@cache
def model_of(name: str) -> Any:
    """A model on the device."""
    torch.manual_seed(0)
    if name == "llama":
        model = LlamaForCausalLM(LlamaConfig(num_hidden_layers=12, **SIZE))
    elif name == "gemma3":
        kinds = ["sliding_attention", "full_attention"] * 3
        model = Gemma3ForCausalLM(
            Gemma3TextConfig(num_hidden_layers=6, head_dim=8, sliding_window=16, layer_types=kinds, **SIZE)
        )
    elif name == "vit":
        model = ViTModel(ViTConfig(hidden_size=32, intermediate_size=48, num_hidden_layers=6, num_attention_heads=4,
                                   image_size=32, patch_size=4))  # fmt: skip
    else:
        model = vlm_zoo.model_of(name).float()
    return on_device(model.eval())


def text(rows: int, tokens: int = TOKENS) -> dict[str, Tensor]:
    """A batch of prompts, padded on the left where there are several rows."""
    draws = torch.Generator().manual_seed(1)
    ids = torch.randint(3, VOCABULARY, (rows, 12), generator=draws).repeat(1, tokens // 12)
    mask = torch.ones_like(ids)
    for row in range(1, rows):
        mask[row, : 5 * row] = 0
    return {"input_ids": Held(ids * mask), "attention_mask": Held(mask)}


Attach = Callable[[Any], AbstractContextManager[Any]]


def plainly(model: Any) -> AbstractContextManager[Any]:
    """Nothing is done to it."""
    return nullcontext()


def reduced(reducer: Any, **settings: Any) -> Attach:
    """Fewer tokens."""
    return lambda model: qm.reduce(model, reducer, **settings)


def multipole(model: Any) -> AbstractContextManager[Any]:
    """Multipole attention that clusters within these few tokens."""
    return qm.multipole(model, budget=24, sink=3, interval=64, ratio=0.25, block=32)


def counted(model: Any, attach: Attach, call: Callable[[], Any]) -> Count:
    """What is waited for in a call inside a run, its second one: what is made once and kept is left out."""
    with torch.no_grad(), counting(model) as count, attach(model):
        call()
        before = count.copy()
        call()
    return count.since(before)


def generate(name: str, rows: int, steps: int, tokens: int = TOKENS, **more: Any) -> Any:
    """Some tokens behind prompts."""
    model = model_of(name)
    return model.generate(**text(rows, tokens), max_new_tokens=steps, min_new_tokens=steps, do_sample=False, **more)


def prompt(name: str, rows: int, attach: Attach, tokens: int = TOKENS) -> Figures:
    """Waits of a prompt and the first token."""
    each = [counted(model_of(name), how, lambda: generate(name, rows, 1, tokens)).waits for how in (plainly, attach)]
    return Figures(*each)


def step(name: str, rows: int, attach: Attach, tokens: int = TOKENS) -> Figures:
    """Waits of each further token."""
    out = []
    for how in (plainly, attach):
        short, long = (
            counted(model_of(name), how, partial(generate, name, rows, steps, tokens)).waits for steps in (2, 2 + STEPS)
        )
        out.append((long - short) / STEPS)
    return Figures(*out)


def speculation(drafter: str, sample: bool, rows: int = 4, tree: int = 8) -> Figures:
    """Waits and operations of a pass, against those of a step of plain generate."""
    model, given = model_of("llama"), text(rows)
    make = {"lookup": qm.PromptLookup, "heads": lambda: qm.Gumiho.new(model, serial=2, heads=2)}[drafter]()
    how = {"do_sample": True, "temperature": 0.7, "top_k": 20, "top_p": 0.9} if sample else {"do_sample": False}
    out = []
    for one in (False, True):
        found = []
        for steps in (6, 6, 30):  # the first time a model is looked at once and for all
            engine = qm.SpeculativeDecoding(make, tree=tree)
            more = {"custom_generate": engine} if one else {}
            torch.manual_seed(5)
            with torch.no_grad(), counting(model) as count:
                model.generate(**given, max_new_tokens=steps, eos_token_id=None, **how, **more)
            found.append((count.waits, count.operations, engine.stats.passes if one else steps))
        _, (waits, operations, passes), (more_waits, more_operations, more_passes) = found
        each = more_passes - passes
        out.append(((more_waits - waits) / each, (more_operations - operations) / each))
    return Figures(out[0][0], out[1][0], out[0][1], out[1][1])


def images(name: str, rows: list[list[int]], attach: Attach) -> Figures:
    """Waits of a prompt of images."""
    model, given = model_of(name), {k: Held(v) for k, v in vlm_zoo.prompt(vlm_zoo.model_of(name), rows).items()}
    given = {k: Held(v.held.float()) if v.is_floating_point() else v for k, v in given.items()}
    return Figures(*(counted(model, how, lambda: model(**given)).waits for how in (plainly, attach)))


def pictures(count: int, attach: Attach) -> Figures:
    """Waits of a batch of images in a vision transformer."""
    model, x = model_of("vit"), Held(torch.randn(count, 3, 32, 32, generator=torch.Generator().manual_seed(0)))
    return Figures(*(counted(model, how, lambda: model(x)).waits for how in (plainly, attach)))


QUICK, TOME, ENTROPY = qm.QuickMerge(keep=0.5), qm.ToMe(keep=0.5), qm.QuickMerge(keep=qm.Entropy(scale=0.5))
EVICTS = qm.QuickMerge(keep=0.5, cache=0.4)
ALL = {"min_tokens": 1}
CHUNKS = {"mode": "block_causal", "chunk": 16, "window": 8, "sinks": 2}

CASES: dict[str, Callable[[], Figures]] = {
    "prompt, QuickMerge, 1 row": lambda: prompt("llama", 1, reduced(QUICK, **ALL)),
    "prompt, QuickMerge, 4 padded rows": lambda: prompt("llama", 4, reduced(QUICK, **ALL)),
    "prompt, ToMe, 4 padded rows": lambda: prompt("llama", 4, reduced(TOME, **ALL)),
    "prompt, QuickMerge by entropy, 4 padded rows": lambda: prompt("llama", 4, reduced(ENTROPY, **ALL)),
    "prompt, QuickMerge and eviction, 4 padded rows": lambda: prompt("llama", 4, reduced(EVICTS, **ALL), LONG),
    "prompt, QuickMerge, sliding windows, 4 padded rows": lambda: prompt("gemma3", 4, reduced(QUICK, **ALL)),
    "prompt, chunks, 1 row": lambda: prompt("llama", 1, reduced(QUICK, **CHUNKS)),
    "step, QuickMerge": lambda: step("llama", 4, reduced(QUICK, **ALL)),
    "step, QuickMerge, sliding windows": lambda: step("gemma3", 4, reduced(QUICK, **ALL)),
    "step, QuickMerge and eviction, sliding windows": lambda: step("gemma3", 4, reduced(EVICTS, **ALL), LONG),
    "step, chunks": lambda: step("llama", 1, reduced(QUICK, **CHUNKS)),
    "step, Multipole": lambda: step("llama", 1, multipole),
    "pass, lookup, 4 rows": lambda: speculation("lookup", False),
    "pass, lookup, 4 rows, sampled": lambda: speculation("lookup", True),
    "pass, heads, 4 rows": lambda: speculation("heads", False),
    "images, ViT with ToMe, 1": lambda: pictures(1, reduced(qm.ToMe(keep=0.5))),
    "images, ViT with ToMe, 8": lambda: pictures(8, reduced(qm.ToMe(keep=0.5))),
    "images, ViT with QuickMerge, 8": lambda: pictures(8, reduced(qm.QuickMergeVision(keep=0.5))),
    "images, LLaVA with SCOPE, 1": lambda: images("llava", [[0]], reduced(qm.SCOPE(keep=0.5))),
    "images, LLaVA with SCOPE, 4 in 2 rows": lambda: images("llava", [[0, 1], [2, 0]], reduced(qm.SCOPE(keep=0.5))),
    "images, Qwen2.5-VL with ToMe, 1": lambda: images("qwen2_5_vl", [[0]], reduced(qm.ToMe(keep=0.5))),
    "images, Qwen2.5-VL with ToMe, 4": lambda: images("qwen2_5_vl", [[0, 1, 2, 0]], reduced(qm.ToMe(keep=0.5))),
}
