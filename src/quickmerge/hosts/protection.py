"""Which tokens of a prompt stay alone, and which of these a budget pays for."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from quickmerge.errors import QuickmergeError

MARKS = 4
"""Special tokens of a row, the last ones, that stay alone: as many as a chat template puts around the last turn."""


@dataclass(frozen=True)
class Protection:
    """``protected (B, N)`` bool, the tokens that stay alone; ``exempt (B, N)``, those of them that come on top."""

    protected: Tensor
    exempt: Tensor


def protection(
    valid: Tensor,
    ids: Tensor | None,
    special: list[int],
    *,
    sinks: int,
    recent: int,
    protect: Callable[[Tensor], Tensor] | None = None,
) -> Protection:
    """The structural tokens, for which a budget pays, and what the user asked for besides, which is exempt.

    Structural are the first ``sinks`` valid tokens of a row, the last ``recent`` ones, and the last `MARKS` special
    ones. Where BOS and EOS are turn marks, as ``<|im_start|>`` and ``<|im_end|>`` are, that is the template around the
    last turn; the marks of earlier turns compete with all other tokens, or a long chat would be kept for its marks.

    Args:
        valid: ``(B, N)`` bool.
        ids: ``(B, N)``, or None where the model was given embeddings.
        special: ids of BOS and EOS.
        sinks: see above.
        recent: see above.
        protect: from ``ids`` to a bool mask ``(B, N)``.

    Raises:
        QuickmergeError: if there are no ids for ``protect``, or it returns anything but such a mask.
    """
    structural = (_rank(valid) <= sinks) | (_rank(valid.flip(-1)).flip(-1) <= recent)
    if ids is None:
        if protect is not None:
            raise QuickmergeError("protect needs input_ids, and the model was called with inputs_embeds")
        return Protection(structural & valid, torch.zeros_like(valid))
    marks = torch.isin(ids, torch.tensor(special, dtype=ids.dtype, device=ids.device)) & valid
    structural = (structural | (marks & (_rank(marks.flip(-1)).flip(-1) <= MARKS))) & valid
    if protect is None:
        return Protection(structural, torch.zeros_like(valid))
    asked = protect(ids)
    if not isinstance(asked, Tensor) or asked.shape != ids.shape or asked.dtype != torch.bool:
        raise QuickmergeError(f"protect must return a bool mask of shape {tuple(ids.shape)}")
    asked = asked.to(valid.device) & valid
    return Protection(structural | asked, asked & ~structural)


def special_tokens(config: object) -> list[int]:
    """Ids of BOS and EOS of a model's config, of which there may be several or none."""
    found: list[int] = []
    for name in ("bos_token_id", "eos_token_id"):
        given = getattr(config, name, None)
        found += [] if given is None else [int(i) for i in given] if isinstance(given, (list, tuple)) else [int(given)]
    return found


def _rank(mask: Tensor) -> Tensor:
    """``(B, N)`` long: how many marked tokens a row has up to each."""
    return mask.long().cumsum(-1)
