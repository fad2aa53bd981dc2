"""Our tasks for lm-eval: facts hidden in documents that quickmerge ships, and asked for behind them.

RULER hides its needles in essays that have to be downloaded. These five tasks ask for the same kinds of things, in
other words and out of other documents, so they are not RULER and are not called so: one number, one UUID, one number
among four keys, four numbers under one key, the numbers of four keys.
"""

from __future__ import annotations

import random
import re
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from quickmerge.datasets.tasks import PLACES, own_texts
from quickmerge.errors import QuickmergeError, whole_number

__all__ = ["KINDS", "dataset", "process_results", "samples"]

ROOM = 24
"""Tokens of a prompt that are left free, since pieces that are cut into tokens apart may have a few more together."""
SAMPLES = 100
"""For each length, where ``--metadata samples=...`` does not say."""
LENGTHS = (1024,)

_SENTENCES = re.compile(r"(?<=[.!?])\s+|\s*\n\s*")

KINDS: dict[str, tuple[str, int, int, int]] = {
    "number": ("number", 1, 1, 1),
    "uuid": ("uuid", 1, 1, 1),
    "keys": ("number", 4, 1, 1),
    "values": ("number", 1, 4, 1),
    "queries": ("number", 4, 1, 4),
}
"""What each task hides: the kind of its values, how many keys, values of each, and keys that are asked for."""

Doc = dict[str, Any]


def samples(kind: str, tokenizer: Any, length: int, count: int) -> Iterator[Doc]:
    """Prompts of about ``length`` tokens; the same settings give the same ones.

    Args:
        kind: one of `KINDS`.
        tokenizer: with which prompts are measured.
        length: tokens of a prompt, its question and the beginning of its answer inside.
        count: how many.

    Yields:
        ``input``, ``gen_prefix`` (how the answer begins), ``outputs`` (all that must stand in it), ``length`` (tokens
        of input and beginning), ``max_length``.

    Raises:
        QuickmergeError: so long a prompt has no room for the facts.
    """
    texts = [[s for s in _SENTENCES.split(text) if s.strip()] for text in own_texts()]
    size: dict[str, int] = {}

    def measured(text: str) -> int:
        if text not in size:
            size[text] = len(tokenizer(text, add_special_tokens=False)["input_ids"])
        return size[text]

    for index in range(count):
        draw = random.Random(f"{kind} {length} {index}")
        facts, question, begun, outputs = _facts(kind, draw)
        asks = f"\n\nQuestion: {question}\nAnswer:"
        free = length - ROOM - sum(measured(" " + each) for each in (*facts, asks, begun))
        if free < length // 4:
            raise QuickmergeError(f"max_seq_lengths must leave a quarter of a prompt to its filler: {length} tokens "
                                  f"are too few for quickmerge_needle_{kind}")  # fmt: skip
        filler = _filler(draw, texts, free, measured)
        at = sorted(draw.sample(range(1, len(filler) + 1), min(len(facts), len(filler))))
        while len(at) < len(facts):
            at.append(at[-1])
        for place, fact in zip(reversed(at), facts, strict=True):
            filler.insert(place, fact)
        text = " ".join(filler) + asks
        yield {"index": index, "input": text, "gen_prefix": begun, "outputs": outputs,
               "length": measured(f"{text} {begun}"), "max_length": length}  # fmt: skip


def _filler(
    draw: random.Random, texts: Sequence[list[str]], free: int, measured: Callable[[str], int]
) -> list[str]:  # fmt: skip
    """Sentences one behind the other, from anywhere in a document on, as many as there is room for."""
    found: list[str] = []
    while True:
        text = draw.choice(texts)
        for sentence in text[draw.randrange(len(text)) :]:
            needed = measured(" " + sentence)
            if needed > free:
                return found or [sentence]
            found.append(sentence)
            free -= needed


def _facts(kind: str, draw: random.Random) -> tuple[list[str], str, str, list[str]]:
    """The facts, the question, how its answer begins, and all that must stand there."""
    what, keys, each, asked = KINDS[kind]
    places = draw.sample(PLACES, keys)
    code = {"number": "access code", "uuid": "device id"}[what]
    values = {
        place: [
            str(draw.randrange(1_000_000, 10_000_000)) if what == "number"
            else str(uuid.UUID(int=draw.getrandbits(128), version=4))
            for _ in range(each)
        ]
        for place in places
    }  # fmt: skip
    one = f"The {code} of the {{}} office is {{}}." if each == 1 else f"One {code} of the {{}} office is {{}}."
    facts = [one.format(place, value) for place in places for value in values[place]]
    draw.shuffle(facts)
    wanted = draw.sample(places, asked)
    named = f"the {wanted[0]} office" if asked == 1 else f"the {', '.join(wanted[:-1])} and {wanted[-1]} offices"
    many = asked * each > 1
    question = f"What {'are all the' if many else 'is the'} {code}{'s' if many else ''} of {named}?"
    begun = f"The {code}{'s' if many else ''} of {named} {'are' if many else 'is'}"
    return facts, question, begun, [value for place in wanted for value in values[place]]


# What lm-eval's YAML names.


def dataset(kind: str, **given: Any) -> dict[str, Any]:
    """The split ``test`` of a task, for lm-eval's ``custom_dataset``.

    Args:
        kind: one of `KINDS`.
        **given: what ``--metadata`` and ``--model_args`` say: ``tokenizer`` (or ``pretrained``), ``max_seq_lengths``
            (a list, default 1024), ``samples`` (for each length, default 100).

    Raises:
        QuickmergeError: no tokenizer is named or can be loaded, or a number is none.
    """
    import datasets  # type: ignore[import-untyped]
    from lm_eval.tasks.ruler.common_utils import get_tokenizer, resolve_tokenizer_name  # type: ignore[import-untyped]

    from quickmerge.models.load import MODELS
    from quickmerge.serve.lm_eval import model_folder

    name = resolve_tokenizer_name(dict(given))
    if name is None:
        raise QuickmergeError(f"quickmerge_needle_{kind} needs a tokenizer: give --metadata tokenizer=FOLDER")
    tokenizer = get_tokenizer(model_folder(name) if name in MODELS else name)
    lengths = given.get("max_seq_lengths", LENGTHS)
    if not isinstance(lengths, (list, tuple)) or not lengths:
        raise QuickmergeError(f"max_seq_lengths must be a list of numbers such as [1024,2048], got {lengths!r:.80}")
    try:
        sizes = [whole_number("max_seq_lengths", each) for each in lengths]
        count = whole_number("samples", given.get("samples", SAMPLES))
    except ValueError as error:
        raise QuickmergeError(str(error)) from error
    rows = [row for size in sizes for row in samples(kind, tokenizer, size, count)]
    return {"test": datasets.Dataset.from_list(rows, split=datasets.Split.TEST)}


def process_results(doc: Mapping[str, Any], results: Sequence[str]) -> dict[str, float]:
    """Which share of what was asked for stands in an answer, as ``found``; ``all_found`` is 1 if everything does."""
    hits = [value in results[0] for value in doc["outputs"]]
    return {"found": sum(hits) / len(hits), "all_found": float(all(hits))}
