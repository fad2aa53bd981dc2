"""TokenView: everything a reducer may look at, and nothing else."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any

import torch
from torch import Tensor

from quickmerge.errors import whole_number
from quickmerge.merge.tokens.saliency import AttentionTrace

CHECKS = os.environ.get("QUICKMERGE_CHECKS", "0") != "0"
"""Whether it is looked whether what the host knows is so, which waits for the device; the tests do."""


def _tensors(held: Evidence | TokenView, change: Callable[[Tensor], Tensor]) -> dict[str, Any]:
    """Those fields that are tensors, each with its rows changed."""
    values = {f.name: getattr(held, f.name) for f in fields(held)}
    return {name: change(value) for name, value in values.items() if isinstance(value, Tensor)}


@dataclass(frozen=True)
class Evidence:
    """What is known beside the tokens of a view: measured by the host, where a method asks for it by its `Needs`.

    Args:
        attention: one `AttentionTrace` per probed layer, lowest layer first; empty when the reducer did not
            ask for any.
        text: ``(B, M, D)`` text features, for methods that need the question, else None.
        text_valid: ``(B, M)`` bool, False for padding of the text. Default, where there is a text: all.
        saliency: ``(B, N)`` finite and non-negative, how much each token matters, where the host has measured it
            elsewhere (the attention of a class token that is not among these tokens, say); padding may hold anything.
            Else None.
        key: ``(B, N, d)`` what tokens resemble one another by (keys of an attention layer, mean over its heads), where
            the host has measured it elsewhere; else None.
        layer: the block in which, or in front of which, the tokens stand, for methods that go by it; else None.
        depth: how many blocks the model has, for methods that go by it; else None.

    Raises:
        ValueError: if the shapes do not agree with each other or with the tokens, or a saliency is out of range.
    """

    attention: Sequence[AttentionTrace] = ()
    saliency: Tensor | None = None
    key: Tensor | None = None
    text: Tensor | None = None
    text_valid: Tensor | None = None
    layer: int | None = None
    depth: int | None = None

    def __post_init__(self) -> None:
        if self.text is None:
            if self.text_valid is not None:
                raise ValueError("text_valid must be left out where there is no text")
        elif self.text_valid is None and self.text.ndim == 3:
            there = torch.ones(self.text.shape[:2], dtype=torch.bool, device=self.text.device)
            object.__setattr__(self, "text_valid", there)

    def each_row(self, change: Callable[[Tensor], Tensor]) -> Evidence:
        """The same of other rows: ``change`` is applied to everything that has a row for each of the batch."""
        traces = tuple(
            replace(t, query=change(t.query), key=change(t.key), value=change(t.value)) for t in self.attention
        )
        return replace(self, attention=traces, **_tensors(self, change))

    def check(self, hidden: Tensor, valid: Tensor, *, look: bool) -> None:
        """Raise ValueError unless this belongs to tokens ``hidden (B, N, D)``, valid where ``valid (B, N)`` says so.

        Values are looked at where ``look`` allows it.
        """
        rows, tokens = hidden.shape[:2]
        if self.text is not None:
            if self.text.ndim != 3 or self.text.shape[0] != rows or self.text.shape[1] == 0:
                raise ValueError(
                    f"text must be ({rows}, text tokens, features) with a token at least, "
                    f"got shape {tuple(self.text.shape)}"
                )
            shape = self.text.shape[:2]
            if self.text_valid is not None and self.text_valid.shape != shape:
                raise ValueError(f"text_valid must have shape {tuple(shape)}, got {tuple(self.text_valid.shape)}")
        if self.key is not None and (self.key.ndim != 3 or self.key.shape[:2] != hidden.shape[:2]):
            raise ValueError(f"key must be ({rows}, {tokens}, features), got {tuple(self.key.shape)}")
        if self.saliency is None:
            return
        if self.saliency.shape != hidden.shape[:2]:
            raise ValueError(f"saliency must have shape {(rows, tokens)}, got {tuple(self.saliency.shape)}")
        if look:
            wrong = valid & ~(self.saliency.isfinite() & (self.saliency >= 0))
            if bool(wrong.any()):
                raise ValueError(f"saliency must be finite and not negative, got {float(self.saliency[wrong][0])}")


NOTHING = Evidence()
"""What is known where nobody has asked; one object for all, since a compiler of graphs makes none."""


@dataclass(frozen=True)
class Known:
    """What the host knows of the rows of a view, so that nobody waits for a device to tell.

    For each row: how many tokens are ``valid``, how many of these ``protected``, and how many of those ``exempt``; its
    ``length`` in original tokens; and whether it ``ends`` in a valid token. Exempt tokens stand for one original token
    each.
    """

    valid: tuple[int, ...]
    protected: tuple[int, ...]
    exempt: tuple[int, ...]
    length: tuple[int, ...]
    ends: tuple[bool, ...]

    @property
    def left(self) -> bool:
        """What `TokenView.pads_left` says."""
        return all(self.ends)

    def rows(self, rows: Sequence[int]) -> Known:
        """The same of some rows."""
        return Known(*(tuple(getattr(self, f.name)[row] for row in rows) for f in fields(self)))

    def merged(self, counts: Sequence[int]) -> Known:
        """The same of the slots of a plan that has so many of each row."""
        ends = [self.left or count == max(counts) for count in counts]
        return replace(self, valid=tuple(counts), ends=tuple(ends))

    def view(self) -> TokenView:
        """A view on the host, without features, of rows of as many tokens of each kind, in another order."""
        place = torch.arange(max(self.valid))

        def first(some: Sequence[int]) -> Tensor:
            return place < torch.tensor(some)[:, None]

        valid = first(self.valid)
        return TokenView(
            torch.zeros(*valid.shape, 0), valid, first(self.protected), length=torch.tensor(self.length),
            exempt=first(self.exempt), known=self,
        )  # fmt: skip


@dataclass(frozen=True)
class TokenView:
    """The tokens of a batch at one place of a model, as a reducer sees them.

    Args:
        hidden: ``(B, N, D)`` features of the tokens (the residual stream in a language model).
        valid: ``(B, N)`` bool, False for padding. The valid tokens of a row are contiguous. Default: all.
        protected: ``(B, N)`` bool, tokens that must stay alone in a slot of their own. Default: none.
        exempt: ``(B, N)`` bool, those of the protected tokens that budgets do not count: the other tokens are given
            what they would be given if these were not there, and these come on top. Not with a ``prefix``. None: none.
        latest: False where text follows that does not compete for the budget, as the window behind a chunk does:
            then no token that does compete is kept for being recent.
        position: ``(B, N)`` int, the place of each token in the original sequence, rising over the valid
            tokens. Default: ``0..N-1`` counted over the valid tokens of the row.
        size: ``(B, N)`` int, how many original tokens each token already stands for, at least one. Default: one each.
        length: ``(B,)`` int, how many original tokens the row had; what a ratio budget is a ratio of.
            Default: the sum of ``size`` over the valid tokens.
        grid: ``(T, H, W)`` for images and video, else None.
        group: ``(B, N)`` long, which span of the text (a line or sentence, or a word) each token belongs to: neighbours
            with the same number are of one span. Padding may hold anything. None where nobody asked, or knows.
        prefix: says, without anything having to be looked at, that every token is valid and that exactly the first
            ``prefix`` of each row are protected (class token, registers). Shapes are then known beforehand, so that a
            plan with a `Count` budget can be compiled, and nothing waits for a device. None: the masks decide.
        evidence: what is known beside the tokens, where a method asks for it.
        known: what the host knows of these rows already; masks and sizes are then taken to be lawful. None: nothing.

    Raises:
        ValueError: if the shapes do not agree or a row has no valid token, and without a ``prefix``, where values may
            be looked at, if one is out of range.
    """

    hidden: Tensor
    valid: Tensor = field(default=None)  # type: ignore[assignment]
    protected: Tensor = field(default=None)  # type: ignore[assignment]
    position: Tensor = field(default=None)  # type: ignore[assignment]
    size: Tensor = field(default=None)  # type: ignore[assignment]
    length: Tensor = field(default=None)  # type: ignore[assignment]
    grid: tuple[int, int, int] | None = None
    prefix: int | None = None
    group: Tensor | None = None
    exempt: Tensor | None = None
    latest: bool = True
    evidence: Evidence = field(default=None)  # type: ignore[assignment]
    known: Known | None = None

    def __post_init__(self) -> None:
        if self.hidden.ndim != 3:
            raise ValueError(f"hidden must be (batch, tokens, features), got shape {tuple(self.hidden.shape)}")
        shape, device = self.hidden.shape[:2], self.hidden.device

        def default(name: str, value: Tensor) -> None:
            if getattr(self, name) is None:
                object.__setattr__(self, name, value)

        if self.evidence is None:
            object.__setattr__(self, "evidence", NOTHING)
        if self.prefix is not None:
            self._fill_prefix(shape, device)
        default("valid", torch.ones(shape, dtype=torch.bool, device=device))
        default("protected", torch.zeros(shape, dtype=torch.bool, device=device))
        default("position", (self.valid.long().cumsum(-1) - 1).clamp_min(0))
        default("size", self.valid.long())
        for name in ("valid", "protected", "position", "size"):
            if getattr(self, name).shape != shape:
                raise ValueError(f"{name} must have shape {tuple(shape)}, got {tuple(getattr(self, name).shape)}")
        for name in ("exempt", "group"):
            given = getattr(self, name)
            if given is not None and given.shape != shape:
                raise ValueError(f"{name} must have shape {tuple(shape)}, got {tuple(given.shape)}")
        if self.exempt is not None and self.prefix is not None:
            raise ValueError("exempt must be left out where there is a prefix, got both")
        default("length", (self.size * self.valid).sum(-1))
        if self.length.shape != shape[:1]:
            raise ValueError(f"length must have shape {tuple(shape[:1])}, got {tuple(self.length.shape)}")
        # Whoever says what is known has looked at the evidence too.
        self.evidence.check(self.hidden, self.valid, look=self.prefix is None and (self.known is None or CHECKS))
        if self.prefix is None and (self.known is None or CHECKS):
            self._check_values()

    def _check_values(self) -> None:
        """All values at once, since a device would be waited for with each."""
        empty = "must mark at least one token in every row, got a row that is all padding"
        rules = [
            (f"valid {empty}", self.valid.any(-1).all()),
            ("size must be at least 1 for every token, got less", ((self.size >= 1) | ~self.valid).all()),
        ]
        if self.exempt is not None:
            lawful = (self.protected | ~self.exempt | ~self.valid).all()
            rules.append(("exempt must be protected tokens alone, got others among them", lawful))
        if self.evidence.text_valid is not None:
            rules.append((f"text_valid {empty}", self.evidence.text_valid.any(-1).all()))
        if self.known is not None:
            told = torch.tensor([self.known.valid, self.known.protected])
            held = torch.stack([self.valid.sum(-1), (self.valid & self.protected).sum(-1)])
            rules.append(("known must be so many tokens, got others", (told.to(held.device) == held).all()))
        if not bool(torch.stack([lawful for _, lawful in rules]).all()):
            raise ValueError(next(told for told, lawful in rules if not bool(lawful)))

    def _fill_prefix(self, shape: torch.Size, device: torch.device) -> None:
        if self.valid is not None or self.protected is not None:
            raise ValueError("valid and protected must be left out where prefix is given")
        object.__setattr__(self, "prefix", whole_number("prefix", self.prefix, 0))
        index = torch.arange(shape[1], device=device).expand(shape)
        object.__setattr__(self, "protected", index < self.prefix)
        if self.position is None:
            object.__setattr__(self, "position", index)

    def each_row(self, change: Callable[[Tensor], Tensor]) -> TokenView:
        """The view of other rows, its evidence too; see `Evidence.each_row`. Not with a ``prefix``."""
        return replace(self, known=None, evidence=self.evidence.each_row(change), **_tensors(self, change))

    def row(self, i: int) -> TokenView:
        """Row ``i``, as a view of one row."""
        known = None if self.known is None else self.known.rows([i])
        evidence = self.evidence.each_row(lambda x: x[i : i + 1])
        return replace(self, known=known, evidence=evidence, **_tensors(self, lambda x: x[i : i + 1]))

    @property
    def counted(self) -> Tensor:
        """``(B, N)`` bool: the valid tokens that budgets count, all but those that are exempt."""
        return self.valid if self.exempt is None else self.valid & ~self.exempt

    @property
    def counted_length(self) -> Tensor:
        """``(B,)``: how many original tokens a ratio is a ratio of, ``length`` without those that are exempt."""
        if self.exempt is None:
            return self.length
        return self.length - (self.size * (self.exempt & self.valid)).sum(-1)

    @property
    def free(self) -> Tensor:
        """``(B, N)`` bool: valid and not protected, so open to merging and dropping."""
        return self.valid & ~self.protected

    @property
    def pads_left(self) -> bool:
        """True when every row ends in a valid token, so that output slots are aligned to the right too.

        Not so behind a prefix, which stays in front.
        """
        if self.prefix is not None:
            return False
        if self.known is not None:
            return self.known.left
        return bool(self.valid[:, -1].all())
