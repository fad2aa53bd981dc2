"""What a recognizer is trained with: the probability of an image's labels."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from quickmerge.errors import QuickmergeError, near_match
from quickmerge.recognition.labels import Packed
from quickmerge.recognition.language import read
from quickmerge.recognition.model import Prefix, Recognizer
from quickmerge.tokens.packing import packed_mask, packed_positions
from quickmerge.training.objective import Objective

__all__ = ["OBJECTIVES", "LabelLoss"]

OBJECTIVES = ("paper", "reference")


class LabelLoss(Objective):
    """Negative log-likelihood of the labels of a batch of images, in nats per predicted token.

    ``"paper"`` is Eq. 6 of arXiv 2312.02142, ``-sum_k sum_t log p(w_t^k | w_<t^k, X)`` with every label closed by the
    separator. The first tokens of all labels are predicted by the row behind the prompt, the one that one-shot
    sampling reads; every label stands where it stands at inference; no row predicts across labels.

    ``"reference"`` is what the public code trains: labels at the places that they have in the packed sequence, the
    separator's row predicts the next label's first token, the last label has no separator, and with the mask
    ``independent`` its tokens, which no separator opens, see the prefix alone. The loss over BOS and prompt tokens that
    the public code adds is left out: their text is always the same.

    A batch is a mapping with ``pixels (B, 3, H, W)`` or ``features (B, M, D_v)`` (with ``valid (B, M)`` if need be),
    and ``labels``, a list of labels for each image, in the order in which they shall stand.

    Args:
        recognizer: trained in place.
        objective: ``"paper"`` or ``"reference"``.

    Raises:
        ValueError: for another objective, or ``"paper"`` for a recognizer whose labels see one another.
    """

    def __init__(self, recognizer: Recognizer, objective: str = "paper") -> None:
        super().__init__()
        if objective not in OBJECTIVES:
            hint = near_match(str(objective), OBJECTIVES)
            raise ValueError(f"objective must be one of {', '.join(OBJECTIVES)}, got {objective!r}{hint}")
        if objective == "paper" and not recognizer.config.independent:
            raise ValueError(
                f"objective must be 'reference' for a recognizer with mask={recognizer.config.mask!r}, whose labels "
                "see one another: got 'paper'"
            )
        self.recognizer = recognizer
        self.objective = objective

    def forward(self, batch: Mapping[str, Any], progress: float) -> dict[str, Tensor]:
        """The loss, and the parts of it on first tokens (``first``) and on all others (``rest``)."""
        nats, first, _ = self.nats(batch)
        started = nats[first].mean()
        rest = nats[~first].mean() if bool((~first).any()) else torch.zeros_like(started)
        return {"loss": nats.mean(), "first": started.detach(), "rest": rest.detach()}

    def nats(self, batch: Mapping[str, Any]) -> tuple[Tensor, Tensor, Tensor]:
        """``-log p (T,)`` of every predicted token, whether it begins a label ``(T,)``, and its image ``(T,)``."""
        recognizer = self.recognizer
        packed = recognizer.labels.encode(batch["labels"]).to(recognizer.device)
        prefix = self._prefix(batch)
        if len(prefix.embeds) != len(packed.ids):
            raise QuickmergeError(
                f"labels must be given for each of the {len(prefix.embeds)} images, got {len(packed.ids)}"
            )
        paper = self.objective == "paper"
        if not paper:
            packed = _open_ended(packed)
        embeds = recognizer.language.get_input_embeddings()(packed.ids)
        embeds = torch.cat([prefix.embeds, embeds.to(prefix.embeds.dtype)], 1)
        group = torch.cat([torch.zeros_like(prefix.valid, dtype=torch.long), packed.group], 1)
        valid = torch.cat([prefix.valid, packed.valid], 1)
        image = torch.cat([prefix.image, torch.zeros_like(packed.valid)], 1)
        config = recognizer.config
        see = packed_mask(group, image, valid, independent=config.independent, bidirectional=config.bidirectional)
        if not paper and config.independent:
            see = see & ~_unopened(group, packed)[:, None, None, :]
        position = packed_positions(group if config.independent and paper else torch.zeros_like(group), valid)
        rows, source, target, first, image_of = _plan(prefix, packed, paper=paper)
        log_p = F.log_softmax(read(recognizer.language, embeds, see, position, rows=rows), -1)
        return -log_p[source, target], first, image_of

    def _prefix(self, batch: Mapping[str, Any]) -> Prefix:
        features, valid = batch.get("features"), batch.get("valid")
        if features is None:
            if "pixels" not in batch:
                raise QuickmergeError(f"batch must hold pixels or features, got {', '.join(batch) or 'nothing'}")
            features, valid = self.recognizer.look(batch["pixels"])
        return self.recognizer.prefix(features, valid)


def _plan(prefix: Prefix, packed: Packed, *, paper: bool) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Which rows predict, and what.

    Returns:
        ``rows (B, P + N)`` bool, the R rows whose logits are needed; and for each of the T predicted tokens the number
        of its row among these, the token, whether it begins a label, and its image, ``(T,)`` each.
    """
    length = prefix.valid.shape[1]
    batch, at = packed.valid.nonzero(as_tuple=True)
    first = packed.first[batch, at]
    # the row before, but for first tokens in the paper's objective the last one of the prefix
    before = length + at - 1
    if paper:
        before = torch.where(first, length - 1, before)
    rows = torch.zeros(len(packed.ids), length + packed.ids.shape[1], dtype=torch.bool, device=at.device)
    rows[batch, before] = True
    number = (rows.flatten().long().cumsum(0) - 1).view(rows.shape)
    return rows, number[batch, before], packed.ids[batch, at], first, batch


def _open_ended(packed: Packed) -> Packed:
    """Labels without the separator behind the last one."""
    end = packed.valid.sum(-1, keepdim=True) - 1
    index = torch.arange(packed.ids.shape[1], device=end.device)
    valid = index < end
    return Packed(packed.ids, torch.where(valid, packed.group, 0), valid, packed.first, packed.count)


def _unopened(group: Tensor, packed: Packed) -> Tensor:
    """``(B, P + N)`` bool: the tokens of the last label, which the public code hides from everything."""
    return group == packed.count[:, None]
