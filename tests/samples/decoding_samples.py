"""Tiny models of several families, drafters whose drafts are known, and plain texts to compare with."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from random import Random
from typing import Any

import torch
from caches import past
from hosts_zoo import ZOO, build, pad
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor
from transformers import DynamicCache, PreTrainedTokenizerFast

from quickmerge.speculative import Drafter, Tree
from quickmerge.speculative.target import Columns, Target

FAMILIES = tuple(ZOO)
VOCABULARY = 97
MIXED = ["sliding_attention", "full_attention"]


@cache
def tiny(family: str = "llama", seed: int = 0, **more: Any) -> Any:
    """A model of two blocks in float64 that says something else at every place."""
    if family == "gemma3_text":
        more = {"layer_types": MIXED, "sliding_window": 6, **more}
    if family == "mistral":
        more = {"sliding_window": 6, **more}
    return build(family, dtype=torch.float64, seed=seed, num_hidden_layers=2, hidden_size=16, **more)


def prompts(lengths: Sequence[int], seed: int = 0, vocabulary: int = VOCABULARY) -> dict[str, Tensor]:
    """Random prompts, padded on the left."""
    rng = torch.Generator().manual_seed(seed)
    rows = [torch.randint(3, vocabulary, (n,), generator=rng) for n in lengths]
    ids, mask, _ = pad(rows, "left")
    return {"input_ids": ids, "attention_mask": mask}


def greedy(model: Any, inputs: dict[str, Tensor], new: int, **more: Any) -> Any:
    """What the model writes by itself."""
    return model.generate(**inputs, max_new_tokens=new, **{"do_sample": False, **more})


def endless(model: Any, inputs: dict[str, Tensor], new: int, **more: Any) -> Any:
    """What the model writes by itself where nothing ends a text."""
    kept, model.generation_config.eos_token_id = model.generation_config.eos_token_id, None
    try:
        return greedy(model, inputs, new, **more)
    finally:
        model.generation_config.eos_token_id = kept


@cache
def tokenizer() -> PreTrainedTokenizerFast:
    """Words w0 to w95, and one that `StopStringCriteria` looks for to learn how words are put together."""
    known = {f"w{i}": i for i in range(VOCABULARY - 1)} | {"abcdef": VOCABULARY - 1}
    words = Tokenizer(models.WordLevel(known, unk_token="w0"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=words, unk_token="w0", eos_token="w2", pad_token="w0")


def random_shape(nodes: int, rng: Random) -> list[int]:
    """Parents of a random tree: a chain, a star and everything in between."""
    reach = rng.choice([1, 2, nodes])
    return [0] + [max(0, i - 1 - rng.randrange(min(reach, i))) for i in range(1, nodes)]


class Scripted(Drafter):
    """Drafts random trees in which the right token is drafted now and then.

    Args:
        script: ``(B, L)`` how the rows go on, prompts and padding included.
        right: how often a node that may have the right token gets it.
        seed: of shapes and tokens; the global generator is left alone.
        binding: whether what is accepted has to follow the script.
    """

    def __init__(self, script: Tensor, right: float = 0.7, seed: int = 0, binding: bool = True) -> None:
        self.binding = binding
        self.script = script.tolist()
        self.right = right
        self.rng = Random(seed)

    def begin(self, model: Any, ids: Tensor, valid: Tensor, features: Any, positions: Tensor) -> None:
        self.length = [ids.shape[1]] * len(ids)
        self.going = list(range(len(ids)))
        assert len(self.script) == len(ids)

    def draft(self, last: Tensor, nodes: int) -> list[Tree]:
        assert len(last) == len(self.going)
        return [self._tree(row, token, nodes) for row, token in zip(self.going, last.tolist(), strict=True)]

    def _tree(self, row: int, last: int, nodes: int) -> Tree:
        nodes = self.rng.randint(1, nodes)
        parent = random_shape(nodes, self.rng)
        follows = self.script[row][self.length[row] + 1 :]
        tokens, on_track, depth = [last], [True], [0]
        for above in parent[1:]:
            here = on_track[above] and depth[above] < len(follows) and self.rng.random() < self.right
            tokens.append(follows[depth[above]] if here else self.rng.randrange(3, VOCABULARY))
            on_track.append(here)
            depth.append(depth[above] + 1)
        return Tree(tokens, parent, [0.9**d for d in depth])

    def accept(self, tokens: list[Tensor], features: Any) -> None:
        assert features is None
        for row, taken in zip(self.going, tokens, strict=True):
            here = self.length[row]
            assert not self.binding or taken.tolist() == self.script[row][here : here + len(taken)]
            self.length[row] += len(taken)

    def rows(self, index: Tensor) -> None:
        self.going = [self.going[i] for i in index.tolist()]


class Features(Drafter):
    """Drafts nothing, and keeps what it is told."""

    needs_features = True

    def begin(self, model: Any, ids: Tensor, valid: Tensor, features: Tensor | None, positions: Tensor) -> None:
        assert features is not None
        self.prompt: Any = ids, valid, features, positions
        self.seen: list[Tensor] = []

    def draft(self, last: Tensor, nodes: int) -> list[Tree]:
        return [Tree.chain([token]) for token in last.tolist()]

    def accept(self, tokens: list[Tensor], features: list[Tensor] | None) -> None:
        assert features is not None
        self.seen.append(features[0])

    def rows(self, index: Tensor) -> None:
        raise AssertionError("one row")


class Oracle(Drafter):
    """Asks the target itself: a chain of what it would write, ``depth`` tokens, from its features where they are known.

    It keeps the text from what ``begin`` and ``accept`` tell, and checks the features against it.
    """

    needs_features = True

    def __init__(self, depth: int) -> None:
        self.depth = depth

    def begin(self, model: Any, ids: Tensor, valid: Tensor, features: Tensor | None, positions: Tensor) -> None:
        assert features is not None and features.shape[:2] == ids.shape == positions.shape == valid.shape
        self.model = model
        self.text = [row[keep] for row, keep in zip(ids, valid, strict=True)]
        for row, keep, where in zip(features, valid, positions, strict=True):
            assert where[keep].tolist() == list(range(int(keep.sum())))
            assert row.shape[-1] == model.config.get_text_config().hidden_size
        self.features = [row[keep] for row, keep in zip(features, valid, strict=True)]

    def draft(self, last: Tensor, nodes: int) -> list[Tree]:
        return [self._chain(text, token) for text, token in zip(self.text, last, strict=True)]

    def _chain(self, text: Tensor, last: Tensor) -> Tree:
        ids = torch.cat([text, last[None]])
        for _ in range(self.depth):
            ids = torch.cat([ids, self.model(input_ids=ids[None]).logits[0, -1].argmax()[None]])
        return Tree.chain(ids[len(text) :].tolist())

    def accept(self, tokens: list[Tensor], features: list[Tensor] | None) -> None:
        assert features is not None
        self.text = [torch.cat([a, b]) for a, b in zip(self.text, tokens, strict=True)]
        self.features = [torch.cat([a, b]) for a, b in zip(self.features, features, strict=True)]
        for text, found in zip(self.text, self.features, strict=True):
            wanted = self.model.base_model(input_ids=text[None]).last_hidden_state[0]
            assert torch.allclose(found, wanted, atol=1e-9)

    def rows(self, index: Tensor) -> None:
        self.text = [self.text[i] for i in index.tolist()]
        self.features = [self.features[i] for i in index.tolist()]


class Adversary(Oracle):
    """Drafts with full confidence what the target would not write."""

    def _chain(self, text: Tensor, last: Tensor) -> Tree:
        tokens = super()._chain(text, last).tokens
        return Tree.chain([tokens[0], *((token + 1) % VOCABULARY for token in tokens[1:])])


class EveryWord(Drafter):
    """Drafts all or some of a few words, on two levels."""

    def __init__(self, vocabulary: int, seed: int = 0) -> None:
        self.vocabulary = vocabulary
        self.rng = Random(seed)

    def begin(self, model: Any, ids: Tensor, valid: Tensor, features: Any, positions: Tensor) -> None:
        pass

    def draft(self, last: Tensor, nodes: int) -> list[Tree]:
        trees = []
        for token in last.tolist():
            first = self.rng.sample(range(self.vocabulary), self.rng.randint(0, self.vocabulary))
            tokens, parent = [token, *first], [0] * (1 + len(first))
            for above in range(1, len(first) + 1):
                more = self.rng.sample(range(self.vocabulary), self.rng.randint(0, 2))
                tokens, parent = tokens + more, parent + [above] * len(more)
            trees.append(Tree(tokens, parent, [1.0] * len(tokens)))
        return trees

    def accept(self, tokens: list[Tensor], features: Any) -> None:
        pass

    def rows(self, index: Tensor) -> None:
        pass


def read_rows(model: Any, inputs: dict[str, Tensor]) -> Target:
    """A target that has read left-padded prompts."""
    ids, valid = inputs["input_ids"], inputs["attention_mask"].bool()
    place = torch.arange(ids.shape[1]).expand(len(ids), -1)
    offset = valid.sum(1) - ids.shape[1]
    filled = DynamicCache()
    with torch.no_grad():
        model(
            input_ids=ids, attention_mask=valid.long(), **past(filled), use_cache=True,
            position_ids=(place + offset[:, None]).clamp_min(0),
        )  # fmt: skip
    columns = Columns(valid, place, torch.full_like(offset, ids.shape[1]), offset, not bool(valid.all()))
    return Target(model, filled, columns)
