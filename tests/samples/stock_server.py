"""transformers' own server, started and stopped by tests; and a tiny model that talks, as a folder."""

from __future__ import annotations

import os
import random
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import openai
import torch
import transformers as hf
from tokenizers import Tokenizer, models, pre_tokenizers

import quickmerge

PATIENCE = 180
"""Seconds that a server may take to start on a busy machine."""
WORDS = 300
MARKS = ("<unk>", "</s>", "<user>", "<assistant>", "abcdef")
"""The last is what transformers looks for to learn how words are put together where a request names stop strings."""
TEMPLATE = (
    "{% for m in messages %}<{{ m.role }}> {{ m.content }} </s> {% endfor %}"
    "{% if add_generation_prompt %}<assistant> {% endif %}"
)


def talker(folder: Path, seed: int = 0) -> Path:
    """A Llama of six layers with large random weights, so that it says something else about each prompt."""
    torch.manual_seed(seed)
    known = {word: number for number, word in enumerate((*MARKS, *(f"w{i}" for i in range(WORDS))))}
    words = Tokenizer(models.WordLevel(known, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = hf.PreTrainedTokenizerFast(
        tokenizer_object=words, unk_token="<unk>", eos_token="</s>", pad_token="</s>", chat_template=TEMPLATE
    )
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 6, "max_position_embeddings": 2048}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "bos_token_id": 0, "eos_token_id": 1}
    config = hf.LlamaConfig(vocab_size=len(known), initializer_range=0.3, **sizes, **heads)
    model = hf.LlamaForCausalLM(config).eval()
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def text(words: int, seed: int = 0) -> str:
    """Some words that the model knows."""
    draw = random.Random(seed)
    return " ".join(f"w{draw.randrange(WORDS)}" for _ in range(words))


def said(text: str) -> list[dict[str, str]]:
    """A conversation of one turn."""
    return [{"role": "user", "content": text}]


@cache
def opened(folder: Path) -> tuple[Any, Any]:
    """The plain model in a folder, and its tokenizer."""
    return hf.AutoModelForCausalLM.from_pretrained(folder), hf.AutoTokenizer.from_pretrained(folder)


def by_itself(folder: Path, messages: Any, recipe: quickmerge.Recipe | None = None, new: int = 12, **more: Any) -> str:
    """What the model in a folder answers in this process, greedily, by a recipe or alone: no door is in between."""
    model, tokenizer = opened(folder)
    if isinstance(messages, str):
        inputs = tokenizer(messages, return_tensors="pt")
    else:
        inputs = tokenizer.apply_chat_template(
            messages, add_generation_prompt=True, return_tensors="pt", return_dict=True
        )
    with quickmerge.apply(model, recipe or quickmerge.Recipe()):
        out = model.generate(**inputs, max_new_tokens=new, do_sample=False, **more)
    return str(tokenizer.decode(out[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True))


@dataclass
class Stock:
    """A running ``transformers serve``."""

    process: subprocess.Popen[bytes]
    port: int
    output: Path

    @property
    def client(self) -> openai.OpenAI:
        """One that asks once, and waits for a bounded time."""
        return openai.OpenAI(base_url=f"http://127.0.0.1:{self.port}/v1", api_key="none", max_retries=0, timeout=120)

    def lines(self) -> list[str]:
        """What quickmerge has logged so far, a line for each request."""
        logged = self.output.read_text(encoding="utf-8", errors="replace").splitlines()
        return [line.split("quickmerge ", 1)[1] for line in logged if ": " in line and " quickmerge request " in line]

    def after(self, count: int) -> str:
        """The line behind the first ``count``: it is written after the answer was sent."""
        end = time.monotonic() + 30
        while len(self.lines()) <= count and time.monotonic() < end:
            time.sleep(0.05)
        return self.lines()[count]


def free_port() -> int:
    """A port of the loopback device that nobody listens on."""
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


def command(*words: object, port: int) -> list[str]:
    """The command line of a server."""
    program = Path(sys.executable).with_name("transformers")
    fixed = ("--device", "cpu", "--host", "127.0.0.1", "--port", port)
    return [str(word) for word in (program, "serve", *words, *fixed)]


def environment() -> dict[str, str]:
    """That of this process, in which children find the quickmerge that is tested, and no hub."""
    source = str(Path(quickmerge.__file__).parents[1])
    found = [source, *filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep))]
    return os.environ | {"PYTHONPATH": os.pathsep.join(found), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}


@contextmanager
def serving(output: Path, *words: object, port: int | None = None, **more: str) -> Iterator[Stock]:
    """A server that answers, until the block is left; its output goes to a file."""
    port = free_port() if port is None else port
    with output.open("wb") as file:
        process = subprocess.Popen(
            command(*words, port=port), stdout=file, stderr=subprocess.STDOUT, env=environment() | more
        )
        try:
            wait(process, port, output)
            yield Stock(process, port, output)
        finally:
            process.terminate()
            try:
                process.wait(20)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait(20)


def wait(process: subprocess.Popen[bytes], port: int, output: Path) -> None:
    """Wait until the server answers; an AssertionError with what it said if it does not."""
    end = time.monotonic() + PATIENCE
    while time.monotonic() < end:
        assert process.poll() is None, output.read_text(encoding="utf-8", errors="replace")[-3000:]
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5):
                return
        except OSError:
            time.sleep(0.2)
    raise AssertionError(output.read_text(encoding="utf-8", errors="replace")[-3000:])


def run(words: Sequence[object], port: int) -> subprocess.CompletedProcess[str]:
    """A server that is expected to end by itself."""
    return subprocess.run(
        command(*words, port=port), env=environment(), capture_output=True, text=True, timeout=PATIENCE, check=False
    )
