"""Draft trees against the best nodes of all, found by asking literal heads about every path there is."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from decoding_samples import prompts, tiny
from gumiho_samples import SHAPES, Literal, heads

from quickmerge.speculative import Tree
from quickmerge.speculative.gumiho import Gumiho
from quickmerge.speculative.target import last_hidden

DRAFTED = torch.tensor([7, 20, 41, 90])


def begun(made: Gumiho, model: Any, inputs: dict[str, torch.Tensor]) -> Gumiho:
    """Heads that have read prompts, in the way that the engine tells them."""
    mask = inputs["attention_mask"]
    positions = (mask.cumsum(1) - 1).clamp_min(0)
    with last_hidden(model) as found, torch.no_grad():
        model(**inputs, position_ids=positions)
    made.begin(model, inputs["input_ids"], mask.bool(), found[0], positions)
    return made


def texts_of(inputs: dict[str, torch.Tensor]) -> list[list[int]]:
    return [row[m.bool()].tolist() for row, m in zip(inputs["input_ids"], inputs["attention_mask"], strict=True)]


def paths_of(tree: Tree) -> dict[tuple[int, ...], float]:
    """Each node but the root by the tokens on the way to it."""
    path: list[tuple[int, ...]] = [()]
    for node in range(1, len(tree)):
        path.append((*path[tree.parent[node]], tree.tokens[node]))
    return dict(zip(path[1:], tree.prob[1:], strict=True))


def best_of_all(
    made: Gumiho, model: Any, text: list[int], nodes: int, beam: int, borrow: bool = False
) -> dict[tuple[int, ...], float]:
    """The ``nodes - 1`` likeliest paths, every path enumerated, the heads asked about ``beam`` nodes of a depth."""
    literal, config = Literal(made, model, text), made.config
    serial, known = config.serial, {}

    def says(path: tuple[int, ...]) -> dict[int, float]:
        if path not in known:
            known[path] = literal.next(list(path))
        return known[path]

    asked: list[list[tuple[int, ...]]] = [[()]]
    chance = {(): 1.0}
    for _ in range(serial - (config.heads == 0)):
        below = {(*path, token): chance[path] * p for path in asked[-1] for token, p in says(path).items()}
        asked.append(sorted(below, key=lambda path: -below[path])[:beam])
        chance |= below

    def told(path: tuple[int, ...]) -> dict[int, float]:
        """As `says`, of paths that begin with nodes that were asked about."""
        for level in range(1, min(len(path), serial) + 1):
            if level >= len(asked):
                return {}
            if path[:level] not in asked[level]:
                return told((*asked[level][0], *path[level:])) if borrow else {}
        return says(path) if len(path) < config.depth else {}

    found: dict[tuple[int, ...], float] = {}
    for depth in range(config.depth):
        for path in itertools.product(DRAFTED.tolist(), repeat=depth):
            if depth and path not in found:
                continue
            found |= {(*path, token): found.get(path, 1.0) * p for token, p in told(path).items()}
    order = sorted(found, key=lambda path: -found[path])[: nodes - 1]
    return {path: found[path] for path in order}


def check(tree: Tree, wanted: dict[tuple[int, ...], float], root: int) -> None:
    got = paths_of(tree)
    assert tree.tokens[0] == root
    assert got.keys() == wanted.keys()
    for path, p in wanted.items():
        assert got[path] == pytest.approx(p, rel=1e-6), path


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(("nodes", "beam"), [(2, 8), (6, 1), (9, 3), (30, 16)])
def test_a_draft_is_the_best_tree_of_literal_heads(shape: str, nodes: int, beam: int) -> None:
    """A batch of different lengths. Siblings see nothing of each other, and parallel heads read the true parent."""
    model = tiny()
    made = heads(model, seed=nodes, drafted=DRAFTED, **SHAPES[shape])
    made.beam = beam
    inputs = prompts([6, 3, 8], seed=beam)
    begun(made, model, inputs)
    last = [11, 12, 13]
    trees = made.draft(torch.tensor(last), nodes)
    for tree, text, root in zip(trees, texts_of(inputs), last, strict=True):
        check(tree, best_of_all(made, model, [*text, root], nodes, min(beam, nodes - 1)), root)


@pytest.mark.parametrize("shape", ["gumiho", "serial", "three serial tokens"])
def test_borrowed_tokens_get_nodes_of_their_own(shape: str) -> None:
    model = tiny()
    made = Gumiho(heads(model, seed=3, drafted=DRAFTED, **SHAPES[shape]).network, beam=2, fta="duplicate")
    inputs = prompts([5, 7])
    begun(made, model, inputs)
    trees = made.draft(torch.tensor([11, 12]), 24)
    longer = 0
    for tree, text, root in zip(trees, texts_of(inputs), [11, 12], strict=True):
        check(tree, best_of_all(made, model, [*text, root], 24, 2, borrow=True), root)
        longer += paths_of(tree).keys() != best_of_all(made, model, [*text, root], 24, 2).keys()
    assert longer


@pytest.mark.parametrize("shape", SHAPES)
def test_drafts_go_on_behind_what_was_accepted(shape: str) -> None:
    """Rows accept different numbers of tokens, one step is left without a draft, and a row leaves."""
    model = tiny()
    made = heads(model, seed=5, drafted=DRAFTED, **SHAPES[shape])
    inputs = prompts([4, 6, 3])
    begun(made, model, inputs)
    texts, going, draws = texts_of(inputs), [0, 1, 2], torch.Generator().manual_seed(1)
    last = torch.tensor([11, 12, 13])
    for step, counts in enumerate([[1, 4, 2], [3, 1, 1], [2, 2, 5], [1, 1, 1]]):
        if step != 1:
            trees = made.draft(last, 7)
            for row, tree, root in zip(going, trees, last.tolist(), strict=True):
                check(tree, best_of_all(made, model, [*texts[row], root], 7, 6), root)
        taken, features = [], []
        for row, root, count in zip(going, last.tolist(), counts, strict=False):
            more = torch.randint(3, 97, (count - 1,), generator=draws).tolist()
            texts[row] += [root, *more]
            taken.append(torch.tensor([root, *more]))
            features.append(model.base_model(torch.tensor([texts[row]])).last_hidden_state[0, -count:])
        made.accept(taken, features)
        last = torch.randint(3, 97, (len(going),), generator=draws)
        if step == 2:
            made.rows(torch.tensor([2, 0]))
            going, last = [going[2], going[0]], last[[2, 0]]
    for row, tree, root in zip(going, made.draft(last, 7), last.tolist(), strict=True):
        check(tree, best_of_all(made, model, [*texts[row], root], 7, 6), root)


def test_all_tokens_can_be_drafted_without_a_draft_vocabulary() -> None:
    model = tiny()
    made = heads(model, heads=0, serial=1, serial_layers=1)
    inputs = prompts([5])
    begun(made, model, inputs)
    tree = made.draft(torch.tensor([9]), 97)[0]
    wanted = Literal(made, model, [*texts_of(inputs)[0], 9]).next([])
    got = {path[0]: p for path, p in paths_of(tree).items()}
    assert len(got) == 96 and all(got[token] == pytest.approx(wanted[token]) for token in got)


def test_a_long_prompt_is_read_in_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    from quickmerge.speculative.gumiho import drafter

    model, trees = tiny(), []
    for chunk in (1024, 5):
        monkeypatch.setattr(drafter, "CHUNK", chunk)
        made = begun(heads(model), model, prompts([23, 9, 4]))
        trees.append([paths_of(tree) for tree in made.draft(torch.tensor([1, 2, 3]), 12)])
    for one, other in zip(*trees, strict=True):
        assert one.keys() == other.keys()
        assert all(one[path] == pytest.approx(other[path], rel=1e-9) for path in one)
