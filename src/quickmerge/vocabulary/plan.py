"""Where every row of the new matrices comes from."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from quickmerge.errors import QuickmergeError, whole_number

if TYPE_CHECKING:
    from quickmerge.vocabulary.matching import Matching
    from quickmerge.vocabulary.tokens import Vocabulary

__all__ = ["KINDS", "Plan", "make_plan", "new_size", "return_plan", "same_vocabulary"]

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
        origin: ``(V,)``, for each row of the model as it is the id that it had before, or -1.
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
