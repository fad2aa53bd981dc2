"""What a language model is handed for each token of a prompt, after some of its visual tokens have gone.

Beside embeddings and positions there may be masks that let the tokens of an image see one another both ways, the kind
of each token, features of lower blocks of the tower for the visual ones, or vectors for every block. What goes with a
token stays with it, and goes with it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from quickmerge.errors import UnsupportedModelError
from quickmerge.merge.tokens.plan import MergePlan
from quickmerge.models.compat import CACHE_NAMES

OWN = ("input_ids", "inputs_embeds", "position_ids", "attention_mask", *CACHE_NAMES)
"""Arguments that are looked after elsewhere."""


def both_ways(mask: Any) -> bool:
    """Whether masks that a language model is given let some token see a later one."""
    masks = mask.values() if isinstance(mask, Mapping) else [mask]
    return any(bool(_sees(each).triu(1 + each.shape[-1] - each.shape[-2]).any()) for each in masks if each is not None)


def _sees(mask: Tensor) -> Tensor:
    """``(B, 1, q, k)`` bool, what a mask lets through, which is bool itself or added to scores."""
    return mask if mask.dtype == torch.bool else mask > torch.finfo(mask.dtype).min / 2


def _as(sees: Tensor, like: Tensor | None) -> Tensor:
    if like is None or like.dtype == torch.bool:
        return sees
    return torch.zeros(sees.shape, dtype=like.dtype, device=sees.device).masked_fill(~sees, torch.finfo(like.dtype).min)


def shorter_masks(name: str, mask: Any, seat: Tensor, valid: Tensor, windows: Mapping[str, int | None]) -> Any:
    """Masks over a whole prompt, of the tokens alone that are left of it.

    They see of one another what they saw. Windows count the tokens that are left, as in a prompt that had been shorter
    from the first; tokens that see one another both ways do so whatever the window.

    Args:
        name: of the model, for what is refused.
        mask: ``(B, 1, N, N)``, or one for each type of block; None is causal order.
        seat: ``(B, K)``, the columns of the tokens that are left.
        valid: ``(B, K)``, those of them that are no padding.
        windows: of each type of block.
    """
    b, k = seat.shape
    order = torch.ones(k, k, dtype=torch.bool, device=seat.device)
    itself = torch.eye(k, dtype=torch.bool, device=seat.device)

    def left(each: Tensor | None) -> Tensor:
        if each is None:
            sees = order.tril().expand(b, 1, k, k)
        else:
            rows = _sees(each).expand(b, 1, -1, -1).gather(2, seat[:, None, :, None].expand(b, 1, k, each.shape[-1]))
            sees = rows.gather(3, seat[:, None, None].expand(b, 1, k, k))
        # A padding slot sees itself, so that no line of the softmax is empty.
        return (sees & valid[:, None, None]) | itself

    if not isinstance(mask, Mapping):
        return _as(left(mask), mask)
    full = next((kind for kind in mask if windows.get(kind) is None), None)
    if full is None:
        raise UnsupportedModelError(
            f"{name} is given masks of windows alone ({', '.join(mask)}), and what is left of a prompt needs one "
            "that tells all that its tokens see of one another"
        )
    sees, made = left(mask[full]), {}
    later = sees & order.triu(1)
    for kind, each in mask.items():
        window = windows.get(kind)
        near = order if window is None else order.tril() & order.triu(1 - window)
        own = sees if window is None else sees & (near | later | later.mT | itself)
        made[kind] = _as(own, next((m for m in mask.values() if m is not None), each))
    return made


def shorter_arguments(name: str, inputs: Mapping[str, Any], plan: MergePlan, seat: Tensor) -> dict[str, Any]:
    """Every further argument that goes with the tokens of a prompt, for those alone that are left of it.

    ``(B, N, ...)``: of the token at whose place a slot stands. Vectors of visual tokens alone, ``(n, D)``, beside the
    mask that tells which tokens these are: merged like the tokens themselves.

    Args:
        name: of the model, for what is refused.
        inputs: of the language model, by name.
        plan: from the ``N`` tokens to ``K`` slots.
        seat: ``(B, K)``, the columns at which these stand.

    Raises:
        UnsupportedModelError: for a tensor that is of neither kind.
    """
    shape = plan.slot.shape
    marks = {
        key: value
        for key, value in inputs.items()
        if key not in OWN and isinstance(value, Tensor) and value.dtype == torch.bool and value.shape[:2] == shape
    }
    changed: dict[str, Any] = {}
    for key, value in inputs.items():
        if key in OWN or value is None or isinstance(value, (bool, int, float, str)):
            continue
        if isinstance(value, Tensor) and value.shape[:2] == shape:
            index = seat.view(*seat.shape, *[1] * (value.ndim - 2)).expand(*seat.shape, *value.shape[2:])
            changed[key] = value.gather(1, index)
            if key in marks:
                changed[key] &= plan.valid.view(*plan.valid.shape, *[1] * (value.ndim - 2))
        elif (vectors := _vectors(value)) is not None:
            visual = next((m.flatten(2)[..., 0] if m.ndim > 2 else m for m in marks.values()), None)
            counts = {len(each) for each in vectors}
            if visual is None or counts - {int(visual.sum())}:
                raise _untold(name, key, f"vectors of {sorted(counts)} tokens")
            merged = [_merged(plan, visual, each) for each in vectors]
            changed[key] = dict(zip(value, merged, strict=True)) if isinstance(value, Mapping) else merged
        elif isinstance(value, Tensor) and value.ndim:
            raise _untold(name, key, f"a tensor {tuple(value.shape)}")
    return changed


def lowest_block(inputs: Mapping[str, Any]) -> int:
    """The first block above all that are given vectors of visual tokens, of the arguments of a language model."""
    lowest = 0
    for key, value in inputs.items():
        if key not in OWN and _vectors(value) is not None:
            blocks = [key for key in value if isinstance(key, int)] if isinstance(value, Mapping) else [len(value) - 1]
            lowest = max([lowest, *(block + 1 for block in blocks)])
    return lowest


def further_arguments(inputs: Mapping[str, Any]) -> list[str]:
    """Names of what a language model is given of every token of a prompt for its blocks, masks left out."""
    shape = next(inputs[key].shape[:2] for key in ("inputs_embeds", "input_ids") if inputs.get(key) is not None)
    return [
        key for key, value in inputs.items()
        if key not in OWN and isinstance(value, Tensor) and value.shape[:2] == shape and value.dtype != torch.bool
    ]  # fmt: skip


def _vectors(value: Any) -> list[Tensor] | None:
    each = list(value.values()) if isinstance(value, Mapping) else value
    if isinstance(each, Sequence) and each and all(isinstance(x, Tensor) and x.ndim == 2 for x in each):
        return list(each)
    return None


def _merged(plan: MergePlan, visual: Tensor, vectors: Tensor) -> Tensor:
    whole = vectors.new_zeros(*visual.shape, vectors.shape[-1])
    whole[visual] = vectors
    return plan.merge(whole)[plan.carry(visual)]


def _untold(name: str, key: str, got: str) -> UnsupportedModelError:
    return UnsupportedModelError(
        f"{name} hands its language model {key} beside the embeddings, which must be of every token of the prompt, or "
        f"of every visual one, to be taken out with them; got {got}"
    )
