"""Methods that read a prompt twice: some blocks look at all of it and choose, then all blocks read what was chosen."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from quickmerge.errors import QuickmergeError, whole_number
from quickmerge.merge.reducers.base import ScoreReducer

__all__ = ["Reread"]


@dataclass(frozen=True)
class Reread(ScoreReducer):
    """Base of methods whose scout, the lower blocks of the model itself, says which tokens the whole model reads.

    The prompt's tokens pass the blocks below ``block`` and the projections of its attention; the layers that the method
    `needs` are those up to this one. What is kept is then read again from the first block on, as if nothing else had
    been there. A subclass says by ``positions`` at which places: ``"consecutive"``, side by side, or ``"kept"``, where
    each token stood.

    Args:
        keep: share of the tokens kept, or a budget.
        block: at whose attention the scout ends; None is the method's usual share of the model's depth.
    """

    block: int | None = None
    positions: ClassVar[str]
    depth: ClassVar[float]
    """Where the scout usually ends, as a share of the blocks."""
    places: ClassVar[tuple[str, ...]] = ("text",)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.block is not None:
            object.__setattr__(self, "block", whole_number("block", self.block, 0))

    def scout(self, depth: int) -> int:
        """The block at whose attention the scout ends in a model of ``depth`` blocks: as many are passed as a whole."""
        return min(depth - 1, int(self.depth * depth)) if self.block is None else self.block

    def check(self, model: Any, layers: tuple[int, ...], mode: str) -> None:
        """Raise QuickmergeError unless a model has the block, and the layers that are asked about."""
        depth = model.config.get_text_config().num_hidden_layers
        if self.block is not None and not self.needs.layers - 1 <= self.block < depth:
            raise QuickmergeError(f"block must be in {self.needs.layers - 1}..{depth - 1} for {self.name} in "
                                  f"{type(model).__name__}, got {self.block}")  # fmt: skip
