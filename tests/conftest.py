"""What the tests share: the real embedded model, and a tiny random one."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

# Methods of our own are taken at their word where looking would make a device wait; here it is looked.
os.environ.setdefault("QUICKMERGE_CHECKS", "1")

if TYPE_CHECKING:
    from transformers import LlamaForCausalLM


def pytest_configure(config: pytest.Config) -> None:
    # Tiny models gain nothing from threads, and threads that wait for one another on a busy machine take all its time.
    import torch

    workers = max(2, int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "2")))
    torch.set_num_threads(max(1, (os.cpu_count() or 1) // workers))


QUICK = bool(os.environ.get("QUICKMERGE_QUICK"))
"""`make quick`: fewer examples of each law, and nothing that starts processes, trains, or reads a real model."""

PASSED_OVER = (
    "benchmarks", "cli", "fuzz", "kills", "merge/test_leaves_nothing.py", "merge/test_matrix.py", "merge/train",
    "models/test_attachment.py", "models/test_hostile.py", "models/test_share.py", "multipole/test_triton.py", "serve",
    "smoke", "speculative/gumiho",
    "speculative/test_walk.py", "test_auto.py", "test_moved.py", "test_together.py",
    "training/test_kill.py", "training/test_processes.py", "training/test_sharding.py",
    "transplant/test_api.py", "transplant/test_templates.py", "viz/test_figures.py",
)  # fmt: skip
"""Tests that take long and guard what is seldom worked on; `make test` runs them."""
LONG_WORDS = ("compile", "distribut", "export", "learn", "python_of_a_page", "train")
"""The same by their names."""


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if not QUICK:
        return
    here = Path(__file__).parent

    def is_long(item: pytest.Item) -> bool:
        place = item.path.relative_to(here).as_posix()
        real = "smollm2" in getattr(item, "fixturenames", ())
        if real or any(word in item.name for word in LONG_WORDS):
            return True
        return any(place == name or place.startswith(name + "/") for name in PASSED_OVER)

    long = [item for item in items if is_long(item)]
    items[:] = [item for item in items if not is_long(item)]
    config.hook.pytest_deselected(items=long)


@pytest.fixture(scope="session")
def smollm2() -> tuple[Any, Any]:
    """SmolLM2-135M-Instruct and its tokenizer; skips where its weights are neither cached nor to be had."""
    from quickmerge.errors import FetchError
    from quickmerge.models import load

    try:
        return load("smollm2-135m", progress=False)
    except FetchError as error:
        pytest.skip(f"the weights of smollm2-135m cannot be fetched: {error}")


@pytest.fixture
def tiny_llama() -> LlamaForCausalLM:
    """A Llama of two layers with random weights."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "max_position_embeddings": 128}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2}
    config = LlamaConfig(vocab_size=64, tie_word_embeddings=False, bos_token_id=0, eos_token_id=1, **sizes, **heads)
    return LlamaForCausalLM(config).eval()


@pytest.fixture
def tiny_folder(tiny_llama: LlamaForCausalLM, tmp_path: Path) -> Path:
    """A folder that holds the tiny Llama and a tokenizer of words."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = Tokenizer(models.WordLevel({"<unk>": 0, "</s>": 1, "the": 2, "sea": 3}, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    folder = tmp_path / "tiny"
    tiny_llama.save_pretrained(folder)
    PreTrainedTokenizerFast(tokenizer_object=words, unk_token="<unk>", eos_token="</s>").save_pretrained(folder)
    return folder


@pytest.fixture
def untouched() -> Iterator[Callable[[Any], Any]]:
    """Models handed to it are checked after the test: no hook, no watcher, the attention they were built with."""
    from hosts_zoo import assert_detached

    seen: list[tuple[Any, str]] = []

    def note(model: Any) -> Any:
        seen.append((model, model.config._attn_implementation))
        return model

    yield note
    for model, implementation in seen:
        assert_detached(model, implementation)


@pytest.fixture
def heard() -> Iterator[None]:
    """Python's own handlers, whoever started the tests: a shell's background jobs ignore Ctrl-C."""
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    yield
    for number, handler in before.items():
        signal.signal(number, handler)
