"""What a transplant did, for a caller, for JSON and for the terminal."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from quickmerge.errors import QuickmergeError
from quickmerge.transplant.matching import DigitReport
from quickmerge.transplant.rows import KINDS

if TYPE_CHECKING:
    from quickmerge.transplant.rebuild import LogitReport

__all__ = ["Report", "TextQuality", "Texts", "compare_logits", "measure", "score_texts"]


@dataclass(frozen=True)
class Report:
    """What was done; everything but the rows themselves."""

    base: str
    donor: str | None
    tokenizer: str
    out: str | None
    """None where nothing was written."""
    base_rows: int
    rows: int
    counts: Mapping[str, int]
    """Rows of each kind."""
    kinds: NDArray[np.uint8] = field(repr=False)
    """``(rows,)``: for each id its place in ``plan.KINDS``."""
    unmapped: tuple[str, ...]
    """Special tokens of the new vocabulary that have no counterpart."""
    special: Mapping[str, tuple[str, ...]]
    """Special token -> the base's tokens that have its job."""
    matrices: Mapping[str, Mapping[str, Any]]
    """For each matrix the rule, the held-out table, what fell out of it, norms."""
    tied: bool
    identical: bool
    way_back: bool
    template: tuple[str, str]
    """Where the chat template is from, and why."""
    digits: DigitReport
    notes: tuple[str, ...]

    def rows_that_are(self, *kinds: str) -> NDArray[np.bool_]:
        """``(rows,)``: which rows are of these kinds."""
        return np.isin(self.kinds, [KINDS.index(kind) for kind in kinds])

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        digits = {name: getattr(self.digits, name) for name in ("numbers", "different", "share", "base", "donor")}
        return {
            "base": self.base, "donor": self.donor, "tokenizer": self.tokenizer, "out": self.out,
            "base_rows": self.base_rows, "rows": self.rows, "counts": dict(self.counts),
            "unmapped": list(self.unmapped), "special": {k: list(v) for k, v in self.special.items()},
            "matrices": {side: dict(made) for side, made in self.matrices.items()}, "tied": self.tied,
            "identical": self.identical, "way_back": self.way_back,
            "chat_template": {"from": self.template[0], "why": self.template[1]},
            "digits": {**digits, "examples": [list(map(list_or_same, one)) for one in self.digits.examples]},
            "notes": list(self.notes),
        }  # fmt: skip


def list_or_same(value: Any) -> Any:
    """A tuple as a list, for JSON."""
    return list(value) if isinstance(value, tuple) else value


# What a change of vocabulary costs, on a text: bits per byte, which is comparable between tokenizers.


SAMPLE = 256
"""Positions whose hidden states are looked at."""


@dataclass(frozen=True)
class Texts:
    """What a model makes of some texts."""

    bytes: int
    """Of UTF-8, of what was scored."""
    tokens: int
    bits: float
    """Sum of -log2 p over the scored tokens."""
    new_tokens: int
    """How many of them have a row that was approximated."""
    new_bytes: int
    new_bits: float

    @property
    def bits_per_byte(self) -> float:
        """Sum of nats / ln 2 / bytes."""
        return self.bits / self.bytes

    @property
    def tokens_per_byte(self) -> float:
        """Fewer are cheaper."""
        return self.tokens / self.bytes

    def as_dict(self) -> dict[str, Any]:
        """For JSON. Bits per token are None where there is none of the kind."""
        shared, new = self.tokens - self.new_tokens, self.new_tokens
        return {
            **asdict(self), "bits_per_byte": self.bits_per_byte, "tokens_per_byte": self.tokens_per_byte,
            "bits_per_shared_token": (self.bits - self.new_bits) / shared if shared else None,
            "bits_per_new_token": self.new_bits / new if new else None,
        }  # fmt: skip


@dataclass(frozen=True)
class TextQuality:
    """Before and after, on the same texts."""

    before: Texts
    after: Texts
    logits: LogitReport | None
    """None where nothing was approximated."""

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        logits = None
        if self.logits is not None:
            logits = {**vars(self.logits), "loud": len(self.logits.loud)}
        return {"before": self.before.as_dict(), "after": self.after.as_dict(), "logits": logits}


def score_texts(
    model: Any,
    tokenizer: Any,
    texts: Sequence[str],
    *,
    new: NDArray[np.bool_] | None = None,
    window: int = 1024,
    advance: Callable[[int, int], None] | None = None,
) -> Texts:
    """Bits per byte of texts.

    Each text is read behind whatever the tokenizer puts before a text. Windows overlap by a half, so that every token
    after the first window has at least half a window before it. Where nothing is put before a text its first token
    can't be predicted: neither its bits nor its bytes count.

    Args:
        model: a causal language model.
        tokenizer: its tokenizer.
        texts: what is scored; bytes are those of their UTF-8.
        new: ``(V,)``, which tokens have approximated rows.
        window: tokens that are read at once; less where the model can't read so many.
        advance: told tokens that are done and tokens in all, after each window.

    Raises:
        QuickmergeError: there is nothing to score.
    """
    import torch

    window = max(4, min(window, _longest(model)))
    prefix = _prefix(tokenizer)
    encoded = [_encode(tokenizer, text) for text in texts]
    total, done = sum(len(ids) for ids, _ in encoded), 0
    sums = {"bytes": 0, "tokens": 0, "new_tokens": 0, "new_bytes": 0}
    bits = new_bits = 0.0
    for ids, sizes in encoded:
        row = np.concatenate([np.asarray(prefix, np.int64), ids])
        weight = np.concatenate([np.zeros(len(prefix), np.int64), sizes])
        first = len(prefix) if prefix else 1  # the first token that is predicted
        start, scored = 0, first
        while scored < len(row):
            end = min(start + window, len(row))
            part = torch.from_numpy(row[start:end])[None].to(model.device)
            with torch.inference_mode():
                logits = model(part, use_cache=False).logits[0, scored - start - 1 : end - start - 1]
            target = part[0, scored - start :]
            # a vocabulary of rows times half a window is the largest thing here: in one dtype, and once
            nats = torch.nn.functional.cross_entropy(logits.float(), target, reduction="none").double().cpu().numpy()
            chosen = row[scored:end]
            fresh = np.zeros(len(chosen), bool) if new is None else new[chosen]
            sums["tokens"] += len(chosen)
            sums["bytes"] += int(weight[scored:end].sum())
            sums["new_tokens"] += int(fresh.sum())
            sums["new_bytes"] += int(weight[scored:end][fresh].sum())
            bits += float(nats.sum()) / math.log(2)
            new_bits += float(nats[fresh].sum()) / math.log(2)
            done += len(chosen)
            if advance is not None:
                advance(done, total)
            start, scored = max(0, end - window // 2), end
    if not sums["bytes"]:
        raise QuickmergeError("text must hold at least two tokens to be scored, got fewer")
    return Texts(bits=bits, new_bits=new_bits, **sums)


def compare_logits(
    model: Any, tokenizer: Any, texts: Sequence[str], new: NDArray[np.bool_], shared: NDArray[np.bool_]
) -> LogitReport:
    """Look whether approximated rows compete fairly, at the first positions of the texts.

    Args:
        model: the model after the transplant.
        tokenizer: its tokenizer.
        texts: what is read.
        new: ``(V,)``, which rows were approximated.
        shared: ``(V,)``, which were taken over.

    Returns:
        Logits of both, without a bias.
    """
    import torch

    from quickmerge.transplant.rebuild import logit_report

    ids = np.concatenate([np.asarray(_prefix(tokenizer), np.int64), *(_encode(tokenizer, text)[0] for text in texts)])
    row = torch.from_numpy(ids[: min(SAMPLE, _longest(model))])[None].to(model.device)
    layer, caught = model.get_output_embeddings(), list[Any]()
    hook = layer.register_forward_pre_hook(lambda _, args: caught.append(args[0]))
    try:
        with torch.no_grad():
            model(row, use_cache=False)
    finally:
        hook.remove()
    rows = layer.weight.detach()
    return logit_report(caught[0][0].cpu(), rows[torch.from_numpy(new)].cpu(), rows[torch.from_numpy(shared)].cpu())


def _prefix(tokenizer: Any) -> list[int]:
    """What the tokenizer puts before a text."""
    with_it = tokenizer("a")["input_ids"]
    bare = tokenizer("a", add_special_tokens=False)["input_ids"]
    return list(with_it[: max(0, with_it.index(bare[0]))]) if bare and bare[0] in with_it else []


def _encode(tokenizer: Any, text: str) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Ids, and the bytes of UTF-8 that each stands for; together they are all bytes of the text."""
    coded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    # A text longer than the model's window is what the windows are for; bytes between tokens belong to the next one.
    ends = np.asarray([end for _, end in coded["offset_mapping"]], np.int64)
    ids = np.asarray(coded["input_ids"], np.int64)
    if not len(ids):
        return ids, ids
    ends = np.maximum.accumulate(ends)
    ends[-1] = len(text)
    widths = np.fromiter((len(c.encode("utf-8", "surrogatepass")) for c in text), np.int64, len(text))
    upto = np.concatenate([[0], np.cumsum(widths)])[ends]
    return ids, np.diff(upto, prepend=0)


def _longest(model: Any) -> int:
    longest = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    return longest if isinstance(longest, int) and longest > 0 else 1024


def measure(
    base: str,
    report: Report,
    texts: Sequence[str],
    *,
    window: int = 1024,
    progress: Callable[[str, int, int], None] | None = None,
) -> TextQuality:
    """Bits per byte of texts before and after a transplant, each model with its own tokenizer, one after the other.

    Args:
        base: the model that was given.
        report: what `transplant` gave; it must have written.
        texts: what is scored.
        window: tokens that are read at once.
        progress: told what goes on.

    Raises:
        QuickmergeError: nothing was written, or there is nothing to score.
        UnknownModelError, UnsupportedModelError, DamagedWeightsError: as for `load`.
    """
    from quickmerge.models import load

    if report.out is None:
        raise QuickmergeError("report must be of a transplant that was written, got one of a dry run")

    def told(what: str) -> Callable[[int, int], None] | None:
        return None if progress is None else (lambda done, total: progress(f"scoring, {what}", done, total))

    model, tokenizer = load(base, progress=False)
    before = score_texts(model, tokenizer, texts, window=window, advance=told("before"))
    del model  # two models at once may not fit
    model, tokenizer = load(report.out, progress=False)
    new = report.rows_that_are("rebuilt", "alias", "unmapped", "padding")
    after = score_texts(model, tokenizer, texts, new=new, window=window, advance=told("after"))
    made, shared = report.rows_that_are("rebuilt"), report.rows_that_are("copied", "restored")
    logits = compare_logits(model, tokenizer, texts, made, shared) if made.any() and shared.any() else None
    return TextQuality(before, after, logits)
