"""QuickMerge++ with its prior: the training-free method, a learned term in the saliency, and corrected slots."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any, ClassVar, Unpack

import torch
from torch import Tensor

from quickmerge.errors import QuickmergeError
from quickmerge.merge.prior.model import Prior
from quickmerge.merge.reducers.base import moved
from quickmerge.merge.reducers.quickmerge import QuickMerge
from quickmerge.merge.tokens.plan import MergePlan
from quickmerge.merge.tokens.saliency import lift
from quickmerge.merge.tokens.view import TokenView
from quickmerge.models.identity import check_model
from quickmerge.models.share import HubOptions


@dataclass(frozen=True)
class QuickMergePrior(QuickMerge):
    """QuickMerge++ with a trained prior; see `Prior` and `quickmerge.QuickMerge`.

    Use `from_prior`, which takes over the settings that the prior was trained with. Where these say nothing, they are
    those that priors were once trained with: many voters, a large share for recent tokens, and no spans.

    Args:
        prior: the trained prior.
    """

    window: int | None = 64
    recency: float = 0.85
    spans: str = "none"
    prior: Prior = field(default=None, repr=False)  # type: ignore[assignment]
    name: ClassVar[str] = "quickmerge+prior"
    source: ClassVar[str] = "arXiv 2508.13204"

    def __post_init__(self) -> None:
        super().__post_init__()
        if not isinstance(self.prior, Prior):
            raise ValueError(f"prior must be a quickmerge Prior, got {self.prior!r}")

    @classmethod
    def from_prior(cls, prior: Prior, keep: Any = 0.4, **settings: Any) -> QuickMergePrior:
        """The method as it was trained, at the budget ``keep``.

        Args:
            prior: a prior that was trained for a language model.
            keep: share of the tokens kept, or a budget.
            **settings: replace those that the prior was trained with.
        """
        return cls(keep=keep, prior=prior, **{**prior.config.trained_for.get("reducer", {}), **settings})

    @classmethod
    def from_pretrained(
        cls,
        folder: Path | str,
        keep: Any = 0.4,
        *,
        settings: Mapping[str, Any] | None = None,
        **hub: Unpack[HubOptions],
    ) -> QuickMergePrior:
        """As `from_prior`, with the prior in a folder or on the hub.

        Args:
            folder: see `Prior.from_pretrained`, as is ``hub``.
            keep: share of the tokens kept, or a budget.
            settings: replace those that the prior was trained with.
            **hub: how it is taken from the hub.

        Raises:
            QuickmergeError: as `Prior.from_pretrained`.
        """
        return cls.from_prior(Prior.from_pretrained(folder, **hub), keep, **(settings or {}))

    def push_to_hub(self, repo_id: str, **options: Any) -> str:
        """Save the prior on the hub, see `Prior.push_to_hub`; settings of your own belong into a `Recipe`."""
        return self.prior.push_to_hub(repo_id, **options)

    @property
    def label(self) -> str:
        """The name and every setting that differs from what the prior was trained with."""
        own = {**{f.name: f.default for f in fields(self)}, **self.prior.config.trained_for.get("reducer", {})}
        now = {f.name: getattr(self, f.name) for f in fields(self) if f.name not in ("keep", "prior")}
        return ":".join([self.name, *(f"{name}={value}" for name, value in now.items() if value != own[name])])

    @property
    def weights_bytes(self) -> int:
        """Memory of the prior."""
        return self.prior.bytes

    def check(self, model: Any, layers: tuple[int, ...], mode: str) -> None:
        """Refuse any model, merge layers or mode but those that the prior was trained for."""
        check_model(model, self.prior.config.trained_for, "prior")
        if mode != "prefix":
            raise QuickmergeError(f"mode must be prefix for slots that a prior corrects, got {mode!r}")
        trained = tuple(self.prior.config.trained_for.get("layers", ()))
        if layers != trained:
            raise QuickmergeError(
                f"layer must be {','.join(map(str, trained))} for this prior, which was trained there, "
                f"got {','.join(map(str, layers))}"
            )

    def on(self, device: torch.device) -> QuickMergePrior:
        """With the prior on ``device``."""
        prior = moved(self.prior, device)
        return self if prior is self.prior else replace(self, prior=prior)

    def saliency(self, view: TokenView) -> Tensor:
        """``(B, N)`` attention norm times ``exp h(x)``, with the learned term h at the merge it was trained for."""
        with torch.no_grad():
            return self.learned(view, super().saliency(view))

    def learned(self, view: TokenView, plain: Tensor) -> Tensor:
        """`saliency`, with its gradient: ``s_j exp h(x_j)``, and where spans are known the largest in each."""
        if self.prior.saliency is None or not self.first(view):
            return plain
        product: Tensor = plain * self.prior.saliency(view.hidden).to(plain.dtype).exp()
        spans = self.whole(view)
        return product if spans is None else lift(product, spans, view.valid)

    def whole(self, view: TokenView) -> Tensor | None:
        """``(B, N)``, the spans of the text that are kept or merged as a whole; None where there are none."""
        return None if self.spans == "none" else view.group

    def first(self, view: TokenView) -> bool:
        """Whether the tokens stand at the first merge, the one that the prior was trained for."""
        return bool(view.evidence.layer == self.prior.config.trained_for["layers"][0])

    def align(self, view: TokenView, plan: MergePlan) -> Mapping[int, Tensor]:
        """Corrections of the slots, by block."""
        with torch.no_grad():
            return self.prior.align(view, plan)

    def align_flops(self, tokens: float, slots: float) -> float:
        """FLOPs of saliency head, learned merge, transformer and corrections."""
        c = self.prior.config
        per_token = c.features * (c.width + c.pool) + (64 * (c.features + 1) if self.prior.saliency is not None else 0)
        blocks = c.layers * 12 * c.width**2
        per_slot = c.features * c.width * (1 + len(c.depths)) + blocks
        return 2 * (tokens * per_token + slots * per_slot) + c.layers * 2 * slots**2 * c.width
