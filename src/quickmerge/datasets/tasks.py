"""Small synthetic tasks: documents in which something stands that is then asked for, each task in a way of its own.

Text that goes on hardly needs its own middle, so how well a model continues a document says little of what it still
knows of it. A task says so: a code in running prose, one of several, a table, a list, a sentence to be written again,
a state that changes, a mapping learnt from examples. Everything is drawn from a seed, and only a tokenizer is needed.
What lies around the facts is any text; see `TaskMaker`.
"""

from __future__ import annotations

import hashlib
import inspect
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from quickmerge.data import demo_document
from quickmerge.errors import QuickmergeError, near_match, whole_number

__all__ = ["ROOM", "TASKS", "Query", "Sample", "TaskMaker", "own_texts"]

VERSION = 1
"""Raised when a seed gives another sample, so that nobody takes results of one for those of the other."""
ROOM = 64
"""Tokens of a prompt that are left for the question and a chat template; the document has all others."""
DEPTHS = (0.1, 0.3, 0.5, 0.7)
"""Where facts stand, as shares of the document; a single one takes the next with each seed."""
PIECE = 12_000
"""Characters of a long text that are one document of filler."""


def _words(text: str) -> tuple[str, ...]:
    return tuple(text.split())


NAMES = _words("""
    Anna Bruno Clara David Emma Felix Greta Henry Irene Jacob Karen Lewis Maria Nathan Olivia Peter Quentin
    Rachel Simon Teresa Victor Wendy Xavier Yvonne Zachary Alice Brian Carol Derek Elena Frank Gloria Harold
    Isabel Julian Laura Marcus Nancy Oscar Paula
""")  # fmt: skip
PLACES = _words("Sellay Brannick Tormund Avella Corrin Haldane Pellworm Marrow Dunmore Ystad Lindow Farrow")
COLOURS = _words("red blue green yellow black white orange purple brown pink")
NOUNS = _words("""
    apple chair river window bottle engine garden hammer island jacket kettle ladder mirror needle orange pencil
    rabbit saddle table umbrella violin wagon bridge candle dragon eagle forest guitar helmet iron jungle knife
    lemon monkey nest ocean piano queen ring spoon tower valley wheel yard zebra anchor basket camera desk
    elephant flag glove horse insect jewel king lamp market notebook oven
""")  # fmt: skip
ADJECTIVES = _words("""
    old silver quiet broken golden narrow hidden bitter gentle purple frozen hollow bright crooked wooden
""")  # fmt: skip
VERBS = _words("carried painted buried followed stole repaired measured forgot admired sold")
FRUITS = _words("apple lemon orange grape peach")
KINDS = {
    "animal": _words("dog cat horse cow pig sheep goat lion tiger bear wolf fox deer rabbit mouse snake frog eagle"),
    "food": _words(
        "bread rice soup cheese pasta cake pizza salad butter honey sugar bacon toast jam beef corn pie milk"
    ),
    "tool": _words(
        "hammer saw drill wrench axe shovel knife chisel ladder pliers rake scissors brush nail screw rope file lever"
    ),
    "cloth": _words(
        "shirt coat hat shoe sock glove dress scarf belt jacket skirt boot tie vest jeans sweater cap robe"
    ),
}


@dataclass(frozen=True)
class Query:
    """One question about a document.

    Attributes:
        question: a sentence with a small first letter, such as ``"what is the access code?"``.
        begun: behind a document, the question and the beginning of its answer in the fact's own words.
        lead: how a model begins a whole sentence that answers, up to the answer.
        answer: what is looked for, a space in front; it stands in the document.
        depth: where in the document it stands, as a share.
        hint: the beginning of an answer that doesn't tell what was asked; empty where there is none.
    """

    question: str
    begun: str
    lead: str
    answer: str
    depth: float
    hint: str = ""


@dataclass(frozen=True)
class Sample:
    """A document as token ids, and the questions about it; ``seed`` and the maker's settings make it again."""

    task: str
    seed: int
    document: tuple[int, ...]
    queries: tuple[Query, ...]


Made = tuple[list[int], list[Query]]


@dataclass
class TaskMaker:
    """Draws samples whose prompts have about ``tokens`` tokens.

    The filler is ``texts``; without any it is the shipped handbook and the reference of the language that comes with
    Python, and for code modules of its library. These differ between versions of Python: `fingerprint` tells them
    apart.

    Args:
        tokenizer: a tokenizer of transformers.
        tokens: of a prompt; the document has `ROOM` fewer.
        texts: documents of prose.
        code: documents of source code.
        queries: how many questions a document has at most.

    Raises:
        ValueError: ``tokens`` or ``queries`` is no whole number of at least 1.
        QuickmergeError: a text has no tokens.
    """

    tokenizer: Any
    tokens: int = 1024
    texts: Sequence[str] = ()
    code: Sequence[str] = ()
    queries: int = 4
    _ids: dict[str, list[int]] = field(default_factory=dict, repr=False)

    def __post_init__(self) -> None:
        self.tokens = whole_number("tokens", self.tokens)
        self.queries = whole_number("queries", self.queries)
        self.texts = tuple(self.texts) or tuple(own_texts())
        self.code = tuple(self.code) or tuple(_own_code())
        for name in ("texts", "code"):
            if not all(self._known(text) for text in getattr(self, name)):
                raise QuickmergeError(f"{name} must be texts with some tokens, got one without any")

    def make(self, task: str, seed: int) -> Sample:
        """The sample of a task and a seed; the same settings give the same sample.

        Raises:
            QuickmergeError: there is no such task, or ``tokens`` leaves it no room.
        """
        if task not in TASKS:
            raise QuickmergeError(f"task must be one of {', '.join(TASKS)}, got {task!r}{near_match(task, TASKS)}")
        document, queries = TASKS[task](self, random.Random(f"{task} {seed}"), seed)
        return Sample(task, seed, tuple(document), tuple(queries[: self.queries]))

    @property
    def fingerprint(self) -> str:
        """The first 16 digits of a sha256 over what samples are made of, all but the tokenizer."""
        told = [VERSION, self.tokens, self.queries, self.texts, self.code]
        return hashlib.sha256(repr(told).encode("utf-8", "surrogatepass")).hexdigest()[:16]

    def ids(self, text: str) -> list[int]:
        """The token ids of a text, no special ones added."""
        return [int(i) for i in self.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]]

    # What tasks are made with ---------------------------------------------------------------------------------------

    @property
    def length(self) -> int:
        """Tokens of a document."""
        return self.tokens - ROOM

    def compose(self, draw: random.Random, facts: Sequence[tuple[float, str]], texts: Sequence[str] = ()) -> list[int]:
        """Filler of ``texts`` (default: prose) with each fact at its depth, `length` tokens in all."""
        made = [(depth, self.ids(text)) for depth, text in sorted(facts)]
        # Half of a document may be facts, so that there is something between them.
        self.check(2 * sum(len(part) for _, part in made))
        free = self.length - sum(len(part) for _, part in made)
        filler, out, at = self._filler(draw, texts or self.texts, free), list[int](), 0
        for depth, part in made:
            end = int(depth * free)
            out += filler[at:end] + part
            at = end
        return out + filler[at:]

    def lines(self, head: str, lines: Iterator[str], least: int) -> tuple[list[int], int]:
        """A document of as many lines as there is room for, at least so many: its ids, and how many lines it has."""
        out, count = self.ids(head), 0
        for line in lines:
            new = self.ids(line)
            if len(out) + len(new) > self.length and count >= least:
                break
            out, count = out + new, count + 1
        self.check(len(out))
        return out, count

    def check(self, needed: int) -> None:
        """Raise QuickmergeError unless a document may have as many tokens as a task needs."""
        if needed > self.length:
            raise QuickmergeError(
                f"tokens must be at least {needed + ROOM} for this sample of the task, got {self.tokens}"
            )

    def _filler(self, draw: random.Random, texts: Sequence[str], count: int) -> list[int]:
        found = self._known(draw.choice(texts))
        start = draw.randrange(max(1, len(found) - count + 1))
        found = found[start : start + count]
        while len(found) < count:
            found = found + self.ids("\n") + self._known(draw.choice(texts))
        return found[:count]

    def _known(self, text: str) -> list[int]:
        if text not in self._ids:
            self._ids[text] = self.ids(text)
        return self._ids[text]


def own_texts() -> Iterator[str]:
    """Documents that are always there: the shipped handbook, and the language reference that comes with Python."""
    from pydoc_data.topics import topics

    whole = "\n\n".join(topics[name] for name in sorted(topics))
    yield demo_document()
    for start in range(0, len(whole) - PIECE, PIECE):
        yield whole[start : start + PIECE]


def _own_code() -> Iterator[str]:
    import argparse
    import ast
    import configparser
    import tarfile
    import zipfile

    for module in (argparse, ast, configparser, tarfile, zipfile):
        yield inspect.getsource(module)


# The tasks. Each draws a document and its questions.


def _number(draw: random.Random) -> str:
    return str(draw.randrange(10_000, 100_000))


def _asked(question: str, lead: str, answer: str, depth: float, hint: str) -> Query:
    """A question whose answer is begun in the words of the fact."""
    return Query(question, f"\n\nQuestion: {question}\nAnswer: {lead}", lead, answer, depth, hint)


def _access(place: str, code: str, depth: float) -> Query:
    fact = f"the access code of the {place} office is"
    return _asked(f"what is the access code of the {place} office?", fact, f" {code}", depth, "the access code is")


def _needles(maker: TaskMaker, draw: random.Random, depths: Sequence[float]) -> Made:
    facts, queries = [], []
    for place, depth in zip(draw.sample(PLACES, len(depths)), depths, strict=True):
        code = _number(draw)
        facts.append((depth, f"\nNote: the access code of the {place} office is {code}.\n"))
        queries.append(_access(place, code, depth))
    draw.shuffle(queries)
    return maker.compose(draw, facts), queries


def needle(maker: TaskMaker, draw: random.Random, seed: int) -> Made:
    """One code in running prose."""
    return _needles(maker, draw, [DEPTHS[seed % len(DEPTHS)]])


def needles4(maker: TaskMaker, draw: random.Random, seed: int) -> Made:
    """Four codes in running prose, one of which is asked for."""
    return _needles(maker, draw, DEPTHS)


def nearby(maker: TaskMaker, draw: random.Random, seed: int) -> Made:
    """A code close to the end: the control that whoever keeps the most recent tokens must solve."""
    return _needles(maker, draw, [0.93])


def pairs12(maker: TaskMaker, draw: random.Random, seed: int) -> Made:
    """A list of twelve keys and numbers inside prose."""
    pairs, depth = [(place, _number(draw)) for place in PLACES], draw.choice([0.2, 0.4, 0.6])
    draw.shuffle(pairs)
    lines = "".join(f"The access code of the {place} office is {code}.\n" for place, code in pairs)
    queries = [_access(place, code, depth) for place, code in draw.sample(pairs, min(maker.queries, len(pairs)))]
    return maker.compose(draw, [(depth, f"\n\nAccess codes:\n{lines}\n")]), queries


def _phone(name: str, number: str, depth: float) -> Query:
    lead = f"the phone number of {name} is"
    return _asked(f"what is the phone number of {name}?", lead, f" {number}", depth, "the phone number is")


def pairs_all(maker: TaskMaker, draw: random.Random, seed: int) -> Made:
    """Nothing but keys and numbers, so that every line looks alike."""
    names = draw.sample(NAMES, len(NAMES))
    keys = [*names, *(f"{name} {place}" for place in PLACES for name in names)]
    keys += [
        f"{name} {letter}. {place}" for letter in "ABCDEFGHIJKLMNOPQRSTUVWXYZ" for place in PLACES for name in names
    ]
    pairs = [(key, _number(draw)) for key in keys]
    lines = (f"The phone number of {key} is {number}.\n" for key, number in pairs)
    out, count = maker.lines("Phone numbers of all members.\n", lines, maker.queries)
    picked = draw.sample(range(count), maker.queries)
    return out, [_phone(*pairs[i], i / count) for i in picked]


def people(maker: TaskMaker, draw: random.Random, seed: int) -> Made:
    """Eight facts about people, scattered."""
    facts = [(name, _number(draw), (i + 0.5) / 10) for i, name in enumerate(draw.sample(NAMES, 8))]
    parts = [(depth, f"\nNote: the phone number of {name} is {number}.\n") for name, number, depth in facts]
    return maker.compose(draw, parts), [_phone(*fact) for fact in draw.sample(facts, min(maker.queries, 8))]


def follows(maker: TaskMaker, draw: random.Random, seed: int) -> Made:
    """Which word comes behind another one in a list of forty inside prose."""
    words, depth = draw.sample(NOUNS, 40), draw.choice([0.2, 0.4, 0.6])
    queries = []
    for i in draw.sample(range(2, 38), min(maker.queries, 36)):
        before = f"{words[i - 2]}, {words[i - 1]}, {words[i]},"
        question = f"which word comes right after {words[i]} in the word list?"
        queries.append(Query(question, f"\n\nWord list: ..., {before}", f"the word list goes on: {before}",
                             f" {words[i + 1]}", depth))  # fmt: skip
    return maker.compose(draw, [(depth, f"\n\nWord list: {', '.join(words)}.\n\n")]), queries


def copy(maker: TaskMaker, draw: random.Random, seed: int) -> Made:
    """A sentence out of the middle, to be written again word by word."""
    parts, queries = [], []
    for name, depth in zip(draw.sample(NAMES, 4), [0.15, 0.35, 0.55, 0.75], strict=True):
        (first, second), (thing, other) = draw.sample(ADJECTIVES, 2), draw.sample(NOUNS, 2)
        start, rest = f"{name} {draw.choice(VERBS)} the {first}", f" {thing} and the {second} {other}"
        parts.append((depth, f"\n{start}{rest}.\n"))
        question = f'which sentence of the text begins with "{start}"?'
        queries.append(Query(question, f"\n\nOnce more, word by word:\n{start}", start, rest, depth))
    draw.shuffle(queries)
    return maker.compose(draw, parts), queries


def title(maker: TaskMaker, draw: random.Random, seed: int) -> Made:
    """The first lines: title and author."""
    name = f"{draw.choice(ADJECTIVES).title()} {draw.choice(NOUNS).title()} of {draw.choice(PLACES)}"
    author = f"{draw.choice(NAMES)} {draw.choice(PLACES)}"
    queries = [
        Query(
            f"what is the {what} of the text?",
            f"\n\nThe {what} of the text above is:",
            f"the {what} is",
            f" {told}",
            0.0,
        )
        for what, told in (("title", name), ("author", author))
    ]
    return maker.compose(draw, [(0.0, f"Title: {name}\nAuthor: {author}\n\n")]), queries


def latest(maker: TaskMaker, draw: random.Random, seed: int) -> Made:
    """A state that changes four times: the last report counts."""
    place, colours = draw.choice(PLACES), draw.sample(COLOURS, 4)
    reports = zip(DEPTHS, colours, strict=True)
    parts = [(depth, f"\nReport: the light at {place} is now {colour}.\n") for depth, colour in reports]
    question, lead = f"what colour is the light at {place} now?", f"the light at {place} is now"
    return maker.compose(draw, parts), [_asked(question, lead, f" {colours[-1]}", DEPTHS[-1], "it is now")]


def steps(maker: TaskMaker, draw: random.Random, seed: int) -> Made:
    """Five numbered lines, scattered: what stands under a number."""
    words = draw.sample(NOUNS, 15)
    boxes = [(i + 1, " " + ", ".join(words[3 * i : 3 * i + 3]), 0.1 + 0.15 * i) for i in range(5)]
    parts = [(depth, f"\n\nBox {number}:{held}.\n\n") for number, held, depth in boxes]
    queries = [Query(f"what is in box {number}?", f"\n\nBox {number}:", f"Box {number}:", held, depth)
               for number, held, depth in draw.sample(boxes, min(maker.queries, 5))]  # fmt: skip
    return maker.compose(draw, parts), queries


def majority(maker: TaskMaker, draw: random.Random, seed: int) -> Made:
    """The most frequent of five words in a list that fills the prompt: an aggregate, of which its end is one too."""
    most, *others = draw.sample(FRUITS, len(FRUITS))
    chosen = [most if draw.random() < 0.5 else draw.choice(others) for _ in range(maker.tokens)]
    chosen[0] = most
    lines = (f"Vote {i}: {word}\n" for i, word in enumerate(chosen, 1))
    out, count = maker.lines("Votes of all members.\n", lines, 10)
    votes = [chosen[:count].count(word) for word in (most, *others)]
    if votes[0] <= max(votes[1:]):  # rare, and only of few votes
        return majority(maker, draw, seed)
    question, lead = "which word has most votes?", "the word with most votes is"
    return out, [_asked(question, lead, f" {most}", 0.5, lead)]


def labels(maker: TaskMaker, draw: random.Random, seed: int) -> Made:
    """A mapping of two kinds of words to colours, to be learnt from examples that fill the prompt."""
    kinds, colours = draw.sample(sorted(KINDS), 2), draw.sample(COLOURS, 2)
    words = {kind: KINDS[kind] for kind in kinds}
    label = dict(zip(kinds, colours, strict=True))
    held = {kind: draw.sample(words[kind], 2) for kind in kinds}
    shown = {kind: [word for word in words[kind] if word not in held[kind]] for kind in kinds}

    def examples() -> Iterator[str]:
        for kind in kinds:  # so that every label is there
            yield f"{shown[kind][0]} is {label[kind]}.\n"
        while True:
            kind = draw.choice(kinds)
            yield f"{draw.choice(shown[kind])} is {label[kind]}.\n"

    out, _ = maker.lines("", examples(), 8)
    queries = [Query(f"what colour is {word}?", f"{word} is", f"{word} is", f" {label[kind]}", 0.5)
               for kind in kinds for word in held[kind]]  # fmt: skip
    draw.shuffle(queries)
    return out, queries


def constant(maker: TaskMaker, draw: random.Random, seed: int) -> Made:
    """A constant that is set in source code and used at its end."""
    name, value, depth = f"MAX_{draw.choice(NOUNS).upper()}", _number(draw), DEPTHS[seed % len(DEPTHS)]
    query = Query(f"what is the value of {name}?", f"\n\nassert {name} ==", f"{name} =", f" {value}", depth)
    return maker.compose(draw, [(depth, f"\n\n{name} = {value}\n\n")], maker.code), [query]


TASKS: dict[str, Callable[[TaskMaker, random.Random, int], Made]] = {
    made.__name__: made
    for made in (needle, needles4, nearby, pairs12, pairs_all, people, follows, copy, title, latest, steps, majority,
                 labels, constant)
}  # fmt: skip
"""Every task by its name."""
