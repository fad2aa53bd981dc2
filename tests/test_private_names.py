"""Nothing but ``models/compat.py`` names what is private or unsettled in transformers and timm."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

SOURCE = Path(__file__).parents[1] / "src" / "quickmerge"
HOME = SOURCE / "models" / "compat.py"

UNSETTLED = {"apply_rotary_pos_emb", "eager_attention_forward"}
"""Functions that files of models share by custom."""

CACHE = {"cache_params", "cache_position", "layer_past", "past_key_values"}
"""What the cache and its place have been called."""

ALIAS = SOURCE / "calm" / "model.py"
"""Takes the cache by its older name too, as every model of transformers does; there it may name an argument."""


@cache
def public() -> dict[str, Any]:
    """What ``import transformers`` offers by name, modules left out."""
    import transformers

    names = set(dir(transformers)) - {n for n in dir(transformers) if n.startswith("_")}
    return {name: name for name in names}


@cache
def private() -> set[str]:
    """Names with an underscore of the classes that the package is given, and of their instances."""
    import torch
    import transformers as hf
    from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

    sizes: dict[str, Any] = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "vocab_size": 8}
    config = hf.LlamaConfig(num_attention_heads=2, **sizes)
    things = [
        hf.Cache, hf.DynamicCache, DynamicLayer, DynamicSlidingWindowLayer, hf.GenerationMixin, hf.LogitsProcessor,
        hf.PretrainedConfig, hf.PreTrainedModel, hf.PreTrainedTokenizerFast, hf.ProcessorMixin,
        hf.AttentionInterface, config, hf.GenerationConfig(), hf.LlamaForCausalLM(config),
    ]  # fmt: skip
    names = {name for thing in things for name in (*dir(thing), *getattr(thing, "__dict__", ()))}
    of_torch = set(dir(torch.nn.Module)) | set(vars(torch.nn.Module()))
    # What a tokenizer holds inside, under a name that anybody would give to it.
    names -= of_torch | {"_tokenizer"}
    # What ``generate`` notes on a cache.
    names |= {"_is_user_defined"}
    return {name for name in names if name.startswith("_") and not name.startswith("__")}


def faults(code: str, *, alias: bool = False) -> Iterator[str]:
    """What a file names that it must not, with the line."""
    import transformers

    for node in ast.walk(ast.parse(code)):
        where = f"line {getattr(node, 'lineno', 0)}: "
        if isinstance(node, ast.Import):
            yield from (where + a.name for a in node.names if a.name.startswith(("transformers.", "timm")))
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            if node.module.startswith(("transformers.", "timm")):
                yield where + node.module
            elif node.module == "transformers":
                for a in node.names:
                    known = isinstance(getattr(transformers, a.name, None), ModuleType) or a.name not in public()
                    if known or "_MAPPING" in a.name:
                        yield where + f"transformers.{a.name}"
        elif isinstance(node, ast.Attribute):
            if node.attr in private() | UNSETTLED | CACHE:
                yield where + f".{node.attr}"
        elif isinstance(node, ast.Name | ast.FunctionDef):
            name = node.id if isinstance(node, ast.Name) else node.name
            wrong = private() | UNSETTLED | (set() if alias else CACHE)
            if name in wrong:
                yield where + name
        elif isinstance(node, ast.keyword | ast.arg):
            if node.arg in CACHE and not alias:
                yield where + f"argument {node.arg}"
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            text = node.value
            if text in private() | UNSETTLED | CACHE or text.startswith(("transformers.models", "timm.models")):
                yield where + repr(text)


FILES = sorted(path for path in SOURCE.rglob("*.py") if path != HOME)


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.relative_to(SOURCE).as_posix())
def test_no_file_but_one_leans_on_what_may_change(path: Path) -> None:
    found = list(faults(path.read_text(encoding="utf-8"), alias=path == ALIAS))
    assert not found, f"{path}: {'; '.join(found)}: let models/compat.py name them"


@pytest.mark.parametrize(
    "code",
    [
        "from transformers.cache_utils import DynamicLayer",
        "import transformers.masking_utils",
        "from transformers import modeling_utils",
        "from transformers import MODEL_MAPPING",
        "def f(config): return config._attn_implementation",
        "def f(cache): return getattr(cache, '_is_user_defined', False)",
        "def f(model, cache): return model(past_key_values=cache)",
        "def f(model, cache): return model(**{'past_key_values': cache})",
        "def f(out): return out.past_key_values",
        "class A:\n    _supports_sdpa = True",
        "class A:\n    def _init_weights(self, module): ...",
        "import sys\ndef f(m): return getattr(sys.modules[m], 'eager_attention_forward')",
        "from timm.models.vision_transformer import Attention",
        "import timm",
        "NAME = 'transformers.models.llama.modeling_llama'",
    ],
)
def test_the_rule_sees(code: str) -> None:
    assert list(faults(code))


def test_what_is_public_may_be_named() -> None:
    assert not list(faults("from transformers import Cache, DynamicCache, PreTrainedModel\nimport transformers\n"))
