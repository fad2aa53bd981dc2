"""Which columns of a prompt are visual tokens, and of which picture or video."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from quickmerge.errors import QuickmergeError
from quickmerge.hosts.features import FeatureWatch, tensors_of
from quickmerge.hosts.tower_tokens import Grid, Seen
from quickmerge.hosts.vlm_structure import Vlm
from quickmerge.tokens.plan import MergePlan
from quickmerge.tokens.view import TokenView

KINDS = ("image", "video")


@dataclass
class Image:
    """The visual tokens of one picture (of one tile, where a model cuts pictures up in front of it) or video.

    ``row`` of the batch and ``columns (n,)`` of the prompt as it was given; ``kind``, ``"image"`` or ``"video"``;
    ``grid`` (T, H, W) of the tokens where they form one. ``plan``, once it was made, a plan of one row for the n
    tokens, and ``view`` what the reducer saw when it first decided.
    """

    row: int
    columns: Tensor
    kind: str
    grid: Grid | None
    seen: Seen | None = None
    plan: MergePlan | None = None
    view: TokenView | None = None
    now: Tensor | None = None
    """``(k,)`` columns of the tokens that are left, in the sequence as it is by now."""

    @property
    def count(self) -> int:
        """How many tokens there were."""
        return len(self.columns)

    @property
    def left(self) -> int:
        """How many are left."""
        return self.count if self.plan is None else self.plan.slots


def read_images(vlm: Vlm, inputs: dict[str, Any], features: FeatureWatch) -> list[Image]:
    """Every picture and video of a prompt, in the order in which their features fill the placeholders.

    Args:
        vlm: the model.
        inputs: what its base was called with, by name.
        features: knows what the features were made from.

    Raises:
        QuickmergeError: if there are no ids to find placeholders by, or what is given does not fit together.
    """
    ids, given = inputs.get("input_ids"), inputs.get("mm_encoder_outputs") or {}
    if isinstance(given, Tensor):
        raise QuickmergeError("mm_encoder_outputs must be a dict inside a quickmerge run, got a tensor")
    images: list[Image] = []
    for kind in KINDS:
        output = given.get(kind) or features.outputs.get(kind)
        if output is None:
            continue
        if ids is None:
            raise QuickmergeError("input_ids must be given with pictures inside a quickmerge run, to find them by")
        rows, columns = (ids == vlm.token(kind)).nonzero(as_tuple=True)
        pieces = [piece for each in tensors_of(output) for piece in features.pieces(each)]
        sizes = [piece.tokens for piece in pieces]
        if sum(sizes) != len(rows):
            raise QuickmergeError(
                f"input_ids must hold {sum(sizes)} {kind} placeholders, one for each feature, got {len(rows)}"
            )
        for piece, mine, places in zip(pieces, rows.split(sizes), columns.split(sizes), strict=True):
            if bool((mine != mine[0]).any()):
                raise QuickmergeError(f"input_ids must hold the {kind} placeholders of a picture in one row, got two")
            places = places if piece.apart is None else places[~piece.apart.to(places.device)]
            images.append(Image(int(mine[0]), places, kind, piece.grid, piece.seen, now=places))
    return images


def special_ids(vlm: Vlm) -> set[int]:
    """Every id that the model's configurations name: beginnings, ends, padding, placeholders."""
    found: set[int] = set()
    for config in (vlm.config, vlm.decoder.config, vlm.model.generation_config):
        for name, value in (config.to_dict() if config is not None else {}).items():
            if name.endswith(("token_id", "token_index")):
                found.update(v for v in (value if isinstance(value, list) else [value]) if isinstance(v, int))
    return found


def instruction(ids: Tensor, valid: Tensor, special: set[int], images: list[Image]) -> list[Tensor]:
    """The columns of each row that hold the user's instruction, as far as a model can tell without its tokenizer.

    Tokens that no configuration names as special: those behind the last picture, or all where there are none behind.

    Args:
        ids: ``(B, N)``; placeholders are special.
        valid: ``(B, N)``.
        special: the special ids.
        images: of the prompt.
    """
    plain = valid & ~torch.isin(ids, torch.tensor(sorted(special), dtype=ids.dtype, device=ids.device))
    last = {image.row: int(image.columns[-1]) for image in images}
    found = []
    for row, there in enumerate(plain):
        columns = there.nonzero().flatten()
        behind = columns[columns > last.get(row, -1)]
        found.append(behind if len(behind) else columns)
    return found
