"""What is trained, and on what."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor, nn

__all__ = ["Dataset", "Objective", "with_data"]


class Objective(nn.Module, ABC):
    """A loss and the parameters that it trains: all of the module's that require a gradient.

    Only these and the persistent buffers are put into checkpoints. A frozen base model must therefore stay outside
    the module tree (held in a list or a closure, not as an attribute that is a module) or have no parameter that
    requires a gradient. What stays outside does not move with the module: move it in `place`.

    Under several processes every forward must return the same names, and every trained parameter must have its part
    in the loss unless `uses_every_parameter` is False.
    """

    sharded = False
    """Whether what `frozen` gave is split among processes: then all must run it equally often in a step."""

    uses_every_parameter: ClassVar[bool] = True
    """False if a step may leave parameters without gradient. Several processes then look for them in every step."""

    @abstractmethod
    def forward(self, batch: Any, progress: float) -> dict[str, Tensor]:
        """The loss of a batch, and whatever else is worth a column in the metrics.

        All that is random must come from torch's, numpy's or Python's global generators: they are seeded anew before
        every micro-step, and so a resumed run repeats them.

        Args:
            batch: what the collate function made of some items, on the training device.
            progress: share of the training that is done, ``step / steps``, in [0, 1).

        Returns:
            Scalars by name, each a mean over the items of the batch; ``"loss"`` is the one that is minimised.
        """

    def group_of(self, name: str) -> str:
        """The group that a trained parameter is in, by its name. Default: there is one group."""
        return ""

    def rate_of(self, group: str, progress: float) -> float:
        """What the learning rate of a group's parameters is multiplied with. Nothing but the arguments may decide."""
        return 1.0

    def frozen(self) -> Sequence[tuple[nn.Module, Sequence[nn.Module]]]:
        """Frozen models outside the module tree, with their blocks, which may be sharded. Default: there are none."""
        return ()

    def place(self, device: torch.device) -> None:
        """Move what the objective holds outside its module tree. Called once, before the first step."""


class Dataset(Protocol):
    """Items by index. `describe(index) -> str` may be there too: it names an item in error messages."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> Any: ...


def with_data(fingerprint: Mapping[str, Any], dataset: Dataset) -> dict[str, Any]:
    """Add to what must stay the same in a resumed run what the dataset says of itself, if it says anything."""
    told = getattr(dataset, "fingerprint", None)
    return {**fingerprint, "data": told()} if callable(told) else dict(fingerprint)
