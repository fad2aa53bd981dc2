"""What a request about a text does: both answers, the token map, and how much of the text's worth is left."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch

from quickmerge.bench.quality import continuation_nll, document_nll, first_tokens
from quickmerge.console.ending import Alone, one_sentence
from quickmerge.console.options import check_share, check_text
from quickmerge.datasets.text import Document, start_of
from quickmerge.errors import QuickmergeError, as_index
from quickmerge.merge.collect import plan_cells
from quickmerge.recipe import Recipe, apply
from quickmerge.recipe.answer import RecipeAnswer, Watch, answer
from quickmerge.serve.studio.ways import Told, told_text, way_called, ways_of
from quickmerge.viz.tokenmap import TokenCell

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

    from quickmerge.serve.studio.jobs import Teller
    from quickmerge.serve.studio.sessions import Session
    from quickmerge.serve.studio.shelf import Shelf
    from quickmerge.serve.studio.ways import Way

__all__ = ["LONGEST", "MOST_LETTERS", "NAMES", "Side", "TextRun", "answer_text", "following", "side_of"]

MOST_LETTERS = 2_000_000
"""Characters of a text that is read at all; what a model has no positions for it refuses itself."""
LONGEST = 512
"""Tokens of an answer."""
LEAST, TARGET = 200, 192
"""Tokens that a text must have for its recovery to be measured, and most tokens at its end that are predicted."""


@dataclass(frozen=True)
class Side:
    """One of the two answers, and what it took.

    Attributes:
        text: the answer.
        tokens: that it has.
        ttft_seconds: to the first of them.
        seconds: to the last of them.
        read: tokens that each block read of the prompt; empty where nobody counted.
        cache_bytes: after the prompt; None where nobody measured.
    """

    text: str
    tokens: int
    ttft_seconds: float
    seconds: float
    read: tuple[float, ...] = ()
    cache_bytes: int | None = None


@dataclass(frozen=True)
class TextRun:
    """All that a page shows of one run on a text.

    Attributes:
        model: its label.
        way: the label of the recipe.
        keep: the share that was asked for, None for a recipe without one.
        tokens: of the prompt.
        reduced: by the recipe.
        plain: by the model alone.
        same: whether both wrote the same tokens.
        cells: the tokens of the prompt and what became of them; empty where none were merged.
        recovery: share of the text's worth for predicting its end that is left; None where it was not measured.
        remark: why not, or what else is to be said.
        told: the recipe to take along.
    """

    model: str
    way: str
    keep: float | None
    tokens: int
    reduced: Side
    plain: Side
    same: bool
    cells: Sequence[TokenCell]
    recovery: float | None
    remark: str
    told: Told


def answer_text(
    shelf: Shelf, session: Session, tell: Teller, *, model: str, document: str, question: str, way: str, keep: float,
    literals: bool = False, longest: int = 48, recovery: bool = True, further: Sequence[Way] = (),
) -> TextRun:  # fmt: skip
    """Answer a question about a text by a recipe and by the model alone.

    On the way ``tell`` is shown ``cells`` as soon as the first token is there, and ``reduced`` and ``plain``, the
    answers as far as they are.

    Args:
        shelf: the models on offer.
        session: of the user; what the plain model does with a text is done once.
        tell: hears how far it is.
        model: the label of one that reads text.
        document: the text, which is merged.
        question: about it, which is not.
        way: the label of a recipe.
        keep: the share of tokens, in (0, 1].
        literals: leave numbers, names and paths whole.
        longest: tokens of an answer, 1 to `LONGEST`.
        recovery: measure that too; it takes about as long again.
        further: ways besides the usual ones.

    Raises:
        QuickmergeError: naming what was given and what is allowed.
        StoppedError: the user stopped it.
    """
    longest = _checked(document, question, keep, longest)
    wanted = shelf.called(model)
    if wanted.kind != "text":
        raise QuickmergeError(f"the model must be one that reads text alone, got {wanted.label}")
    chosen = way_called(way, ways_of(wanted.name, further))
    made = chosen.made(keep, literals)
    with (
        shelf.using(model, tell) as (_, lm, tokenizer),
        tell.inside(lm),
        one_sentence(Alone.writing(lm, tokenizer)),
    ):
        return _run(session, tell, wanted.label, wanted.name, lm, tokenizer, document, question, chosen, made,
                    keep, literals, longest, recovery)  # fmt: skip


def _checked(document: str, question: str, keep: float, longest: int) -> int:
    if not isinstance(document, str) or not isinstance(question, str):
        raise QuickmergeError("the text and the question must be texts")
    check_text("the question", question)
    if document:
        check_text("the text", document)
    for name, text in (("text", document), ("question", question)):
        if len(text) > MOST_LETTERS:
            raise QuickmergeError(f"the {name} must have at most {MOST_LETTERS:,} characters, got {len(text):,}")
    if isinstance(keep, bool) or not isinstance(keep, (int, float)):
        raise QuickmergeError(f"keep must be a number in (0, 1], got {keep!r:.80}")
    check_share("keep", keep)
    given: Any = longest  # a slider gives 32.0 as it likes
    number = as_index(int(given) if isinstance(given, float) and given.is_integer() else given)
    if number is None or not 1 <= number <= LONGEST:
        raise QuickmergeError(f"the longest answer must be a whole number from 1 to {LONGEST}, got {longest!r:.80}")
    return number


def _run(
    session: Session, tell: Teller, label: str, name: str, lm: Any, tokenizer: Any, document: str, question: str,
    chosen: Way, made: Recipe, keep: float, literals: bool, longest: int, recovery: bool,
) -> TextRun:  # fmt: skip
    found: dict[str, Any] = {"cells": [], "tokens": 0}

    def begun(run: Any, ids: Tensor) -> None:
        _look_at_plan(run, tokenizer, ids, found, tell)

    def ask(recipe: Recipe | None, part: str, first: float, last: float) -> RecipeAnswer:
        tell.say(f"reading, {NAMES[part]}", first)
        watch = following(tell, tokenizer, part, longest, first + 0.6 * (last - first), last, begun)
        return answer(lm, tokenizer, document, question, recipe, max_new_tokens=longest, watch=watch)

    asked = (name, document, question, longest)
    # The first pass of a process pays for allocation and threads; neither side is to pay for it.
    session.once(("warm", name), lambda: _warm(lm, tokenizer, tell))
    reduced = ask(made, "reduced", 0.05, 0.4)
    plain = session.once(("plain", *asked), lambda: ask(None, "plain", 0.4, 0.75))
    rest, remark = None, ""
    if recovery:
        rest, remark = _recovery(session, tell, name, lm, tokenizer, document, made)
    tell.say("done", 1.0)
    plain_side = side_of(plain)
    return TextRun(
        label, chosen.label, keep if chosen.shares else None, round(plain.stats.tokens_in),
        side_of(reduced, plain_side), plain_side, reduced.ids.tolist() == plain.ids.tolist(), found["cells"], rest,
        remark, told_text(chosen, made, name, question, keep, literals, longest),
    )  # fmt: skip


NAMES = {"reduced": "by the recipe", "plain": "with all tokens"}


def following(
    tell: Teller, tokenizer: Any, part: str, longest: int, first: float, last: float,
    begun: Callable[[Any, Tensor], None] = lambda run, ids: None,
) -> Watch:  # fmt: skip
    """What shows an answer while it is written.

    Args:
        tell: is shown the text so far by the name of the part, and how far that is from ``first`` to ``last``.
        tokenizer: of the model.
        part: one of `NAMES`.
        longest: tokens of the answer.
        first: the share of all work that is done when the answer begins.
        last: the share that is done at its end.
        begun: gets the run and the ids ``(1, N)`` once, when the first token is there.
    """
    prompt: list[int] = []

    def watch(run: Any, ids: Tensor) -> bool:
        if not prompt:
            prompt.append(ids.shape[1] - 1)  # drafts may have added several at once
            begun(run, ids)
        wrote = ids.shape[1] - prompt[0]
        tell.show(**{part: tokenizer.decode(ids[0, prompt[0] :], skip_special_tokens=True).strip()})
        tell.say(f"answering, {NAMES[part]}: {wrote} of at most {longest} tokens",
                 first + (last - first) * wrote / longest)  # fmt: skip
        return False

    return watch


def _warm(lm: Any, tokenizer: Any, tell: Teller) -> bool:
    tell.say("warming up", 0.03)
    answer(lm, tokenizer, "", "The sea is calm.", None, max_new_tokens=2)
    return True


def _look_at_plan(run: Any, tokenizer: Any, ids: Tensor, found: dict[str, Any], tell: Teller) -> None:
    """Show what became of every token of the prompt, if some were merged."""
    for part in getattr(run, "parts", {}).values():
        plan = getattr(part, "main_plan", None)
        if plan is not None:
            prompt = ids[0, : plan.slot.shape[1]].cpu()
            found["cells"] = plan_cells(tokenizer, prompt, plan, part.protected)
            tell.show(cells=found["cells"])


def side_of(found: RecipeAnswer, like: Side | None = None) -> Side:
    """What an answer took; where a recipe counts neither tokens nor bytes, all were read, as in ``like``."""
    stats, counted = found.stats, None
    if hasattr(stats, "of"):  # of a recipe: what makes tokens fewer, or entries of the cache, counts both
        counted = next((each for each in stats.of.values() if hasattr(each, "prompt_cache_bytes")), None)
    else:
        counted = stats
    text, took = found.text, (found.tokens, found.ttft_seconds, found.seconds)
    if counted is not None:
        return Side(text, *took, tuple(counted.tokens_per_layer), counted.prompt_cache_bytes)
    own = getattr(next(iter(stats.of.values()), None), "cache_bytes", None)
    return Side(text, *took, () if like is None else like.read, own or (None if like is None else like.cache_bytes))


# How much of the text's worth is left ---------------------------------------------------------------------------------


def _recovery(
    session: Session, tell: Teller, name: str, lm: Any, tokenizer: Any, document: str, recipe: Recipe
) -> tuple[float | None, str]:
    """Recovery of a text, whose end is predicted from what comes before it; or None, and why."""
    limit = getattr(lm.config.get_text_config(), "max_position_embeddings", None)
    ids = first_tokens(tokenizer, document, limit - 8 if isinstance(limit, int) else 2**20) if document else []
    if len(ids) < LEAST:
        return None, f"Recovery needs a text of at least {LEAST} tokens, and this one has {len(ids)}."
    lossy = replace(recipe, decoding=None)
    if lossy.empty:
        return 1.0, "Drafted tokens are checked by the model: nothing is lost."
    start, length = start_of(tokenizer), len(ids) - min(TARGET, len(ids) // 4)
    row = torch.tensor([start + ids])
    length += len(start)
    piece = Document("the text", row[:, :length], row[:, length:], None, len(start))

    def without() -> tuple[float, float]:
        tell.say("measuring recovery: with all tokens", 0.76)
        full = float(document_nll(lm, piece).mean())
        none = float(continuation_nll(lm, piece.nothing, piece.target, apply(lm, Recipe())).mean())
        return full, none

    full, none = session.once(("worth", name, document), without)
    tell.say("measuring recovery: by the recipe", 0.9)
    reduced = float(document_nll(lm, piece, apply(lm, lossy)).mean())
    if none - full < 0.02:
        return None, "Reading this text hardly helps to predict its end, so that recovery says nothing here."
    return (none - reduced) / (none - full), ""
