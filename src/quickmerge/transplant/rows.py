"""Where every row of the new matrices comes from."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import numpy as np
from numpy.typing import NDArray

from quickmerge.errors import QuickmergeError, whole_number

if TYPE_CHECKING:
    from torch import Tensor

    from quickmerge.transplant.matching import Matching
    from quickmerge.transplant.tokens import Vocabulary

__all__ = ["KINDS", "Plan", "Side", "assemble", "make_plan", "new_size", "return_plan", "same_vocabulary", "usual_bias"]


KINDS = ("copied", "special", "rebuilt", "restored", "alias", "unmapped", "padding")
"""What a row can be; a manifest writes the place in this list."""


@dataclass(frozen=True)
class Plan:
    """Every id below ``size`` is in exactly one of the seven kinds."""

    size: int
    """Rows of the new matrices."""
    copied: NDArray[np.int64]
    """``(N, 2)``: new id, base id; the row is taken over bit for bit."""
    special: Mapping[int, tuple[int, ...]]
    """New id -> base ids: the first token's row in the output matrix, the mean of all in the input matrix."""
    rebuilt: NDArray[np.int64]
    """New ids whose rows are approximated."""
    restored: NDArray[np.int64]
    """New ids whose rows an earlier transplant had put aside."""
    aliases: NDArray[np.int64]
    """Ids that the tokenizer never gives, since another stands for the same bytes: they get the mean row, because a
    second copy of a row would take half of the first one's probability."""
    rivals: tuple[int, ...]
    """Special tokens whose base row another special token predicts already (a pad that the base has not apart from its
    eos): copies tie with it, and which of two wins is chance, so that in an output matrix they get the mean row."""
    unmapped: tuple[int, ...]
    """Special tokens that have no counterpart: they get the mean row."""
    padding: NDArray[np.int64]
    """Ids that no token has: they get the mean row, or keep the base's where the vocabulary stays."""
    dropped: NDArray[np.int64]
    """Base ids whose row nobody takes over."""
    identical: bool
    """The new vocabulary is the base's own."""

    def kinds(self) -> NDArray[np.uint8]:
        """``(size,)``: for each id its place in ``KINDS``."""
        kinds = np.full(self.size, KINDS.index("padding"), np.uint8)
        for name, ids in (
            ("copied", self.copied[:, 0]), ("special", list(self.special)), ("rebuilt", self.rebuilt),
            ("restored", self.restored), ("alias", self.aliases), ("unmapped", list(self.unmapped)),
        ):  # fmt: skip
            kinds[np.asarray(ids, np.int64)] = KINDS.index(name)
        return kinds

    def counts(self) -> dict[str, int]:
        """How many rows of each kind."""
        return dict(zip(KINDS, np.bincount(self.kinds(), minlength=len(KINDS)).tolist(), strict=True))


def same_vocabulary(one: Vocabulary, other: Vocabulary) -> bool:
    """Whether both write the same tokens under the same ids."""
    return [(t.id, t.text, t.data, t.special) for t in one.tokens] == [
        (t.id, t.text, t.data, t.special) for t in other.tokens
    ]


def new_size(
    tokens: int, *, vocab_size: int | None = None, pad_to_multiple_of: int | None = None, usual: int = 0
) -> int:
    """How many rows the new matrices get.

    Args:
        tokens: the largest id of the tokenizer, plus one.
        vocab_size: that many, whatever the tokenizer has.
        pad_to_multiple_of: round up to a multiple of this.
        usual: without either, at least so many (what the donor's own matrix has: frameworks compare the sizes that
            two configs name, not those of their tokenizers).

    Raises:
        QuickmergeError: both are given, or ``vocab_size`` has no room for the tokenizer.
    """
    try:
        vocab_size = None if vocab_size is None else whole_number("vocab_size", vocab_size)
        if pad_to_multiple_of is not None:
            pad_to_multiple_of = whole_number("pad_to_multiple_of", pad_to_multiple_of)
    except ValueError as error:
        raise QuickmergeError(str(error)) from None
    if vocab_size is not None and pad_to_multiple_of is not None:
        raise QuickmergeError(
            f"give either vocab_size or pad_to_multiple_of, got {vocab_size} and {pad_to_multiple_of}"
        )
    if vocab_size is not None:
        if vocab_size < tokens:
            raise QuickmergeError(f"vocab_size must be at least {tokens}, the tokenizer's own size, got {vocab_size}")
        return vocab_size
    size = tokens if pad_to_multiple_of is not None else max(tokens, usual)
    step = pad_to_multiple_of or 1
    return -(-size // step) * step


def make_plan(
    matching: Matching, donor: Vocabulary, base: Vocabulary, *, size: int, base_rows: int, identical: bool = False
) -> Plan:
    """Say for every new id where its row comes from.

    Args:
        matching: which tokens are shared.
        donor: the vocabulary that is wanted.
        base: the vocabulary of the model.
        size: rows of the new matrices.
        base_rows: rows of the base's matrices, which may have more than its vocabulary.
        identical: both vocabularies are one: every row stays where it is.

    Raises:
        QuickmergeError: no ordinary token is shared, or the base has tokens that its matrix has no row for.
    """
    if base.size > base_rows:
        raise QuickmergeError(
            f"the base's matrix must have a row for each token of its tokenizer ({base.size}), got {base_rows}"
        )
    none = np.zeros(0, np.int64)
    if identical:
        ids = np.arange(min(size, base_rows), dtype=np.int64)
        lost = np.arange(size, base_rows, dtype=np.int64)
        more = np.arange(base_rows, size, dtype=np.int64)
        return Plan(size, np.stack([ids, ids], 1), {}, none, none, none, (), (), more, lost, True)
    shared = np.asarray(matching.shared, np.int64).reshape(-1, 2)
    special = {new: tuple(ids) for new, ids in matching.special.items()}
    shared = shared[~np.isin(shared[:, 0], _ids(special))]
    if not len(shared):
        raise QuickmergeError(
            "tokenizer must share tokens with the base's, got one that shares none: nothing can be carried over"
        )
    rebuilt, unmapped = np.asarray(matching.new, np.int64), _ids(matching.unmapped)
    twice = _ids(matching.aliases)
    first = shared[~np.isin(shared[:, 0], twice)]
    # An alias that has a row of its own in the base stays what it is there.
    second = np.isin(shared[:, 0], twice) & np.isin(shared[:, 1], first[:, 1])
    _, place = np.unique(shared[:, 1], return_index=True)
    repeated = np.ones(len(shared), bool)
    repeated[place] = False
    idle = second | (np.isin(shared[:, 0], twice) & repeated)
    aliases = np.concatenate([shared[idle, 0], rebuilt[np.isin(rebuilt, twice)]])
    shared, rebuilt = shared[~idle], rebuilt[~np.isin(rebuilt, twice)]
    # A token that no list names, because it stands for no bytes, can't be left without a row.
    named = np.concatenate([shared[:, 0], _ids(special), rebuilt, unmapped, aliases])
    unmapped = np.concatenate([unmapped, np.setdiff1d(_ids(token.id for token in donor.tokens), named)])
    padding = np.setdiff1d(np.arange(size, dtype=np.int64), np.concatenate([named, unmapped]))
    rivals = _rivals(special, donor)
    single = _ids(ids[0] for own, ids in special.items() if len(ids) == 1 and own not in rivals)
    kept = np.concatenate([shared[:, 1], single])
    dropped = np.setdiff1d(np.arange(base_rows, dtype=np.int64), kept)
    return Plan(
        size, shared, special, rebuilt, none, aliases, rivals, tuple(unmapped.tolist()), padding, dropped, False
    )


def return_plan(origin: NDArray[np.int64], put_aside: NDArray[np.int64], *, size: int) -> Plan:
    """The way back from an earlier transplant to the vocabulary that the model had before it; nothing is approximated.

    Args:
        origin: ``(V,)``, for each row of the unmodified model the id that it had before, or -1.
        put_aside: former ids whose rows were put aside.
        size: rows of the matrices that are wanted; below the former number the last ones are left out.
    """
    none = np.zeros(0, np.int64)
    here = np.flatnonzero(origin >= 0)
    former, first = np.unique(origin[here], return_index=True)  # several tokens may have come from one
    inside = former < size
    copied = np.stack([former[inside], here[first][inside]], 1).astype(np.int64)
    restored = put_aside[(put_aside < size) & ~np.isin(put_aside, former)].astype(np.int64)
    padding = np.setdiff1d(np.arange(size, dtype=np.int64), np.concatenate([copied[:, 0], restored]))
    dropped = np.setdiff1d(np.arange(len(origin), dtype=np.int64), copied[:, 1])
    return Plan(size, copied, {}, none, restored, none, (), (), padding, dropped, False)


def _rivals(special: Mapping[int, tuple[int, ...]], donor: Vocabulary) -> tuple[int, ...]:
    # the end of a text first: it is the one that generation must be able to choose
    order = [donor.roles[role] for role in ("eos", "bos") if role in donor.roles]
    ranked = sorted(special, key=lambda own: (order.index(own) if own in order else len(order), own))
    seen: set[int] = set()
    rivals = []
    for own in ranked:
        if special[own][0] in seen:
            rivals.append(own)
        seen.add(special[own][0])
    return tuple(sorted(rivals))


def _ids(ids: Iterable[int]) -> NDArray[np.int64]:
    return np.asarray(list(ids), np.int64)


# The new matrices, put together row by row from what the plan says.


Side = Literal["input", "output", "bias"]
PART = 8192


def assemble(plan: Plan, base: Tensor, made: Tensor, side: Side, *, put_aside: Tensor | None = None) -> Tensor:
    """One new matrix.

    A special token that stands for several of the base is read as the mean of their rows, brought to the length that
    they have on average (a mean is shorter than what it is of), and predicted as the first of them. A row that is for
    nobody is the mean row: its logit is the mean of the logits of the tokens in use, so greedy decoding never takes it
    and sampling takes it with a probability of at most one in as many (the mean of logits is below the logarithm of
    their mean exponential). A row of zeros promises neither: its logit is 0, which wins where all others are negative.

    Args:
        plan: where each row comes from.
        base: ``(V, d)``, the base's matrix, or ``(V,)``, its bias.
        made: ``(T, d)``, what ``plan.rebuilt`` gets, in that order.
        side: which of the three it is. A tied matrix counts as input.
        put_aside: ``(R, d)``, what ``plan.restored`` gets, in that order.

    Returns:
        ``(plan.size, d)`` in the dtype of ``base``; rows that are copied have the same bits.
    """
    import torch

    flat = base.dim() == 1
    matrix = base[:, None] if flat else base
    new = torch.zeros(plan.size, matrix.shape[1], dtype=matrix.dtype)
    copied = torch.from_numpy(plan.copied)
    new[copied[:, 0]] = matrix[copied[:, 1]]
    if len(plan.rebuilt):
        new[torch.from_numpy(plan.rebuilt)] = made.reshape(len(plan.rebuilt), -1).to(matrix.dtype)
    if len(plan.restored):
        assert put_aside is not None
        new[torch.from_numpy(plan.restored)] = put_aside.reshape(len(plan.restored), -1).to(matrix.dtype)
    special = {own: ids for own, ids in plan.special.items() if side == "input" or own not in plan.rivals}
    for own, ids in special.items():
        new[own] = matrix[ids[0]] if len(ids) == 1 or side != "input" else _joined(matrix[list(ids)]).to(matrix.dtype)
    used = np.concatenate([plan.copied[:, 0], np.asarray(list(special), np.int64), plan.rebuilt, plan.restored])
    empty = np.setdiff1d(np.arange(plan.size), used)
    if len(empty):
        new[torch.from_numpy(empty)] = _mean(new, torch.from_numpy(used)).to(matrix.dtype)
    return new[:, 0] if flat else new


def usual_bias(plan: Plan, base: Tensor) -> Tensor:
    """``(T,)``, what ``plan.rebuilt`` gets of a bias ``(V,)``: the mean of shared tokens, since nothing predicts it."""
    import torch

    known = base[torch.from_numpy(np.unique(plan.copied[:, 1]))].double().mean()
    return known.expand(len(plan.rebuilt))


def _mean(rows: Tensor, used: Tensor) -> Tensor:
    import torch

    # in parts: a whole matrix in float64 would be four times a large vocabulary's own
    total = rows.new_zeros(rows.shape[1], dtype=torch.float64)
    for start in range(0, len(used), PART):
        total += rows[used[start : start + PART]].double().sum(0)
    return total / len(used)


def _joined(rows: Tensor) -> Tensor:
    wide = rows.double()
    mean = wide.mean(0)
    length = mean.norm()
    return mean if not length else mean * (wide.norm(dim=-1).mean() / length)
