"""Logits processors, asked about one row of a batch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import (
    EosTokenCriteria,
    EpsilonLogitsWarper,
    EtaLogitsWarper,
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    MaxLengthCriteria,
    MinPLogitsWarper,
    StoppingCriteriaList,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
    TypicalLogitsWarper,
)

from quickmerge.models.compat import (
    EncoderNoRepeatNGramLogitsProcessor,
    EncoderRepetitionPenaltyLogitsProcessor,
    PrefixConstrainedLogitsProcessor,
)
from quickmerge.models.moved import onto, read
from quickmerge.speculative.tree import Tree

__all__ = ["Batch", "Ends", "Row", "choices", "for_row", "walk"]


TEXTLESS = (
    EpsilonLogitsWarper, EtaLogitsWarper, MinPLogitsWarper, TemperatureLogitsWarper, TopKLogitsWarper,
    TopPLogitsWarper, TypicalLogitsWarper,
)  # fmt: skip
"""Processors of transformers that look at the logits alone, and so can be asked about all nodes of all rows at once."""


BY_NUMBER = (
    EncoderNoRepeatNGramLogitsProcessor,
    EncoderRepetitionPenaltyLogitsProcessor,
    PrefixConstrainedLogitsProcessor,
)
"""Processors of transformers that treat rows by their number."""


def for_row(processors: LogitsProcessorList, row: int, rows: int) -> LogitsProcessorList:
    """The processors of a batch, for one row alone: they take ids ``(1, L)`` and scores ``(1, V)``.

    Rows are written at different speeds, so no two of them can be asked about at once. Most processors look at a row
    and nothing else. Those that may know the rows by number, all that are not transformers' own among them, are given
    the row as often as there are rows, and answer for its number.
    """
    if rows == 1:
        return processors
    return LogitsProcessorList([_Numbered(p, row, rows) if _by_number(p) else p for p in processors])


def _by_number(processor: LogitsProcessor) -> bool:
    # A repetition penalty on left-padded prompts has as many lengths of padding as there are rows.
    lengths = isinstance(getattr(processor, "prompt_ignore_length", None), torch.Tensor)
    return isinstance(processor, BY_NUMBER) or lengths or not type(processor).__module__.startswith("transformers.")


class _Numbered(LogitsProcessor):  # type: ignore[misc]
    def __init__(self, processor: LogitsProcessor, row: int, rows: int) -> None:
        self.processor, self.row, self.rows = processor, row, rows

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        found: Tensor = self.processor(input_ids.repeat(self.rows, 1), scores.repeat(self.rows, 1))
        return found[self.row : self.row + 1]


# The walk: which drafted tokens are accepted.
#
# At a node the next token is drawn from what the target says there, after all processors, as if there were no draft. If
# it is a child of the node the walk goes on from that child; if not, it stands behind the accepted ones and the walk
# ends. So every token is drawn from the target's own distribution given its text, and the draft decides nothing but
# how many are drawn in one step. No probabilities of the drafter are needed, and none can do harm.


class Ends:
    """What ends a text: asked after every token, on the host.

    The ends that nearly every text has, its length and certain tokens, are compared as plain numbers. transformers' own
    other criteria are given the text on the host; those of others where ``generate`` would give it to them.

    Args:
        criteria: of ``generate``.
        device: where ``generate`` has its text.
    """

    def __init__(self, criteria: StoppingCriteriaList, device: torch.device | str = "cpu") -> None:
        lengths = [each.max_length for each in criteria if type(each) is MaxLengthCriteria]
        ends = [each.eos_token_id for each in criteria if type(each) is EosTokenCriteria]
        known = [each for each in criteria if type(each) not in (MaxLengthCriteria, EosTokenCriteria)]
        self.longest = min(lengths, default=None)
        tokens = read(*map(torch.as_tensor, ends))
        self.tokens = [token for some in tokens if some is not None for token in some.flatten().tolist()]
        """Tokens that end a text, those of the first criterion in front."""
        own = [type(each).__module__.startswith("transformers.") for each in known]
        self.others = StoppingCriteriaList([each for each, ours in zip(known, own, strict=True) if ours])
        self.users = StoppingCriteriaList([each for each, ours in zip(known, own, strict=True) if not ours])
        self.device = torch.device(device)

    def __call__(self, row: Row) -> bool:
        """Whether the text of a row is done."""
        done = row.last in self.tokens or (self.longest is not None and row.length >= self.longest)
        if self.others:
            done |= bool(self.others(row.text[None], None))
        if self.users:
            done |= bool(self.users(onto(row.text, self.device)[None], None))
        return done


class Row:
    """The text of one row, and what is asked for every token of it. The text is on the host.

    Args:
        prompt: ``(n,)`` ids, padding included, as ``generate`` was given them.
        processors: what changes the logits; they see this row alone.
        criteria: what ends the text; asked after every token.
        sample: whether to draw tokens or to take the best.
        streamer: gets every token; None for nobody.
        generator: that this row alone draws from, once a token, so that its text is the same however many tokens it
            and others get in a step; None for torch's global one.
        device: where ``generate`` has its text, and processors theirs; None for that of the prompt.
    """

    def __init__(
        self,
        prompt: Tensor,
        processors: LogitsProcessorList,
        criteria: StoppingCriteriaList | Ends,
        sample: bool,
        streamer: Any = None,
        generator: torch.Generator | None = None,
        device: torch.device | None = None,
    ) -> None:
        self.device = prompt.device if device is None else device
        prompt = prompt.cpu()
        self._text = torch.cat([prompt, prompt.new_zeros(max(64, len(prompt)))])
        self._filled = len(prompt)
        self.ids: list[int] = prompt.tolist()
        self.processors = processors
        self.criteria = criteria if isinstance(criteria, Ends) else Ends(criteria, self.device)
        self.sample = sample
        self.streamer = streamer
        self.generator = generator
        self.stop: int | None = None
        """How long the text was when the criteria first said that it is done; None before."""

    @property
    def length(self) -> int:
        """How many tokens there are."""
        return len(self.ids)

    @property
    def last(self) -> int:
        """The newest token."""
        return self.ids[-1]

    @property
    def text(self) -> Tensor:
        """``(L,)`` ids so far, on the host."""
        length = len(self.ids)
        while length > len(self._text):
            self._text = torch.cat([self._text, torch.zeros_like(self._text)])
        if self._filled < length:
            self._text[self._filled : length] = torch.tensor(self.ids[self._filled :], dtype=self._text.dtype)
            self._filled = length
        return self._text[:length]

    @property
    def plain(self) -> bool:
        """Whether the next token is simply that of the largest logit."""
        return not self.sample and not self.processors

    @property
    def textless(self) -> bool:
        """Whether the next token is drawn from what the logits alone say, and by a generator of the row's own."""
        return self.sample and self.generator is not None and all(type(each) in TEXTLESS for each in self.processors)

    def choose(self, logits: Tensor) -> int:
        """The token that follows the text, by the target's logits ``(V,)``."""
        scores = logits[None].to(self.device, torch.float32, copy=True)
        scores = self.processors(onto(self.text, self.device)[None], scores)
        if self.sample:
            return int(torch.multinomial(scores.softmax(-1), 1, generator=self.generator))
        return int(scores.argmax(-1))

    def take(self, token: int) -> bool:
        """Add a token to the text; whether the text is done now, for the first time."""
        self.ids.append(token)
        if self.streamer is not None:
            self.streamer.put(torch.tensor([token], dtype=self._text.dtype))
        if self.stop is None and self.criteria(self):
            self.stop = self.length
            return True
        return False


def choices(rows: Sequence[Row], trees: Sequence[Tree], logits: Tensor) -> list[Choice] | None:
    """What each row would go on with at each node of its tree, of all rows at once; None where the texts have a say.

    Args:
        rows: of one ``generate``.
        trees: their drafts.
        logits: ``(R, T or more, V)`` of the target at the nodes.
    """
    if not rows:
        return []
    if rows[0].plain:
        return [Choice(best) for best in _best(logits)]
    if not all(row.textless for row in rows):
        return None
    (count, wide, vocabulary), device = logits.shape, rows[0].device
    scores = logits.to(device, torch.float32, copy=True).flatten(0, 1)
    nothing = torch.zeros(len(scores), 1, dtype=torch.long, device=device)
    prob = rows[0].processors(nothing, scores).softmax(-1).view(count, wide, vocabulary)
    # As `torch.multinomial` draws one of many: the largest of p / e with e exponential. One draw for each depth, in the
    # order in which they would be made one by one; those that are not made after all are taken back.
    deep = [max(tree.depth) + 1 for tree in trees]
    drawn = torch.empty(sum(deep), vocabulary, dtype=prob.dtype, device=device)
    each, states = iter(drawn.unbind(0)), []
    for row, steps in zip(rows, deep, strict=True):
        assert row.generator is not None
        mine = []
        for _ in range(steps):
            mine.append(row.generator.get_state())
            next(each).exponential_(generator=row.generator)
        states.append(mine)
    first = [sum(deep[:i]) for i in range(len(deep))]
    place = [
        [at + depth for depth in tree.depth] + [at] * (wide - len(tree)) for at, tree in zip(first, trees, strict=True)
    ]
    lost = ~((prob.amax(-1) < torch.inf) & (prob.amin(-1) >= 0))
    found = (prob / drawn[onto(torch.tensor(place), device)]).argmax(-1)
    tokens, wrong = torch.stack([found, lost.long()]).tolist()
    return [Choice(*each) for each in zip(tokens, states, wrong, strict=True)]


def _best(logits: Tensor) -> Any:
    """The token of the largest logit ``(..., V)`` in the precision in which ``generate`` compares them."""
    return (logits.float() if logits.dtype == torch.float64 else logits).argmax(-1).tolist()


@dataclass(frozen=True)
class Choice:
    """The ``tokens`` that a row would go on with at each node of its tree.

    ``states`` are those of its generator in front of the draw for each depth, where tokens are drawn; ``lost`` says of
    each node whether its probabilities are no numbers.
    """

    tokens: Sequence[int]
    states: Sequence[Tensor] = ()
    lost: Sequence[int] = ()

    def at(self, node: int, row: Row, logits: Tensor) -> int:
        """The token at one node, of the row's ``logits (T, V)``."""
        if self.lost and self.lost[node]:
            return row.choose(logits[node])  # which says what is wrong
        return self.tokens[node]

    def end(self, row: Row, used: int) -> None:
        """So many draws were made."""
        if used < len(self.states) and row.generator is not None:
            row.generator.set_state(self.states[used])


def walk(tree: Tree, row: Row, logits: Tensor, choice: Choice | Sequence[int] | None = None) -> list[int]:
    """Take tokens from the root on for as long as they were drafted, and one more.

    Args:
        tree: the draft.
        row: gets the tokens.
        logits: ``(T or more, V)`` of the target at the nodes.
        choice: what the row goes on with at each node, where that was found out beforehand (`choices`), or the tokens.

    Returns:
        The nodes whose tokens are in the text, from the root on. The last token that was taken is not among them: the
        target has not read it, or the text ends with it.
    """
    children, node, path = tree.children(), 0, [0]
    choice = choice if choice is None or isinstance(choice, Choice) else Choice(choice)
    while True:
        token = choice.at(node, row, logits) if choice is not None else row.choose(logits[node])
        if row.take(token) or token not in children[node]:
            if choice is not None:
                choice.end(row, len(path))
            return path
        node = children[node][token]
        path.append(node)


# The rows of a batch: which are done, and what ``generate`` would return for them.


class Batch:
    """Rows that are written at different speeds and returned as if they had been written in step.

    ``generate`` gives every row a token in each step until all are done. With an end-of-sequence token rows that are
    done get padding; without one they are simply written on until the last row is done, and so they are here.

    Args:
        rows: all of them.
        config: of ``generate``.
        criteria: what ends a row.
    """

    def __init__(self, rows: Sequence[Row], config: GenerationConfig, criteria: StoppingCriteriaList) -> None:
        self.rows = list(rows)
        self.max_length: int | None = criteria.max_length
        ends = [c.eos_token_id for c in criteria if hasattr(c, "eos_token_id")]
        self.pad: int | None = None
        if ends:
            known = rows[0].criteria.tokens if rows else []
            first = known[0] if known else int(torch.as_tensor(ends[0]).flatten()[0])
            self.pad = first if config.pad_token_id is None else int(config.pad_token_id)

    def done(self, row: Row) -> bool:
        """Whether a row needs no more tokens."""
        if self.pad is not None or len(self.rows) == 1:
            return row.stop is not None
        if row.stop is None:
            return False
        if self.max_length is not None and row.length >= self.max_length:
            return True
        stops = [each.stop for each in self.rows]
        return all(stop is not None and row.length >= stop for stop in stops)

    def left(self, row: Row) -> int:
        """How many more tokens a row may get."""
        return 1 << 30 if self.max_length is None else self.max_length - row.length

    def sequences(self) -> Tensor:
        """``(B, L)`` ids once all rows are done: as long as the row that was done last."""
        length = max(row.stop or row.length for row in self.rows)
        device = self.rows[0].device
        out = self.rows[0].text.new_full((len(self.rows), length), 0 if self.pad is None else self.pad)
        for i, row in enumerate(self.rows):
            mine = row.text[: length if self.pad is None else row.stop]
            out[i, : len(mine)] = mine
        return onto(out, device)
