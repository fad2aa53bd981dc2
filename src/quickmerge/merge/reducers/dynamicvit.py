"""The network of DynamicViT that says which patches stay."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from itertools import pairwise
from pathlib import Path
from typing import Any, ClassVar, Unpack

import torch
from torch import Tensor, nn

from quickmerge.errors import QuickmergeError, door, whole_number
from quickmerge.merge.reducers.base import Reducer, moved
from quickmerge.merge.tokens.plan import MergePlan
from quickmerge.merge.tokens.removal import kept_mean
from quickmerge.merge.tokens.selection import keep_best
from quickmerge.merge.tokens.view import TokenView
from quickmerge.models.kinds import KINDS, Kind
from quickmerge.models.part import CONFIG, WEIGHTS, open_part, save_part
from quickmerge.models.share import HubMixin, HubOptions, fetched


class Predictor(nn.Module):
    """Says of each patch, from itself and from the mean of those that are left, whether it should stay.

    ``Z = GELU(W_1 LN(X))``; each patch gets the first half of its own features and the second half of the mean over
    the kept ones (arXiv 2106.02034, eq. 1 to 4), and three linear layers make two log-probabilities of them.

    Args:
        width: features of a token, a multiple of 4.

    Raises:
        ValueError: for another width.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        width = whole_number("width", width, 4)
        if width % 4:
            raise ValueError(f"width must be a multiple of 4, got {width}")
        self.width = width
        self.norm = nn.LayerNorm(width)
        self.project = nn.Linear(width, width)
        self.decide = nn.Sequential(
            nn.Linear(width, width // 2), nn.GELU(),
            nn.Linear(width // 2, width // 4), nn.GELU(),
            nn.Linear(width // 4, 2),
        )  # fmt: skip

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        """Log-probabilities ``(B, N, 2)`` in float32 at least, channel 0 to keep.

        Args:
            x: ``(B, N, width)`` patches, no class token.
            mask: ``(B, N)``, 1 for those that are left. Where none is, the mean is zero.
        """
        z = nn.functional.gelu(self.project(self.norm(x.to(self.project.weight.dtype))))
        half = self.width // 2
        around = kept_mean(z[..., half:], mask).expand(-1, x.shape[1], -1)
        out = self.decide(torch.cat([z[..., :half], around], -1))
        told: Tensor = out.to(torch.promote_types(out.dtype, torch.float32)).log_softmax(-1)
        return told


# DynamicViT: small trained networks say in front of some blocks which patches stay.


BACKBONE = "backbone"
KIND = "quickmerge-dynamicvit"


@dataclass(frozen=True)
class DynamicViT(HubMixin, Reducer):
    """DynamicViT (arXiv 2106.02034): in front of a few blocks the patches drop out that a trained predictor gives up.

    Of N patches stage s leaves the ``int(N keep^s)``, one at least, that are kept with the highest probability, in
    raster order, so every image has the same number. Tokens in front of the patches always stay.

    Args:
        keep: the share of the patches that each stage leaves of those before it, or a budget for all stages.
        predictors: a `Predictor` for each stage. `from_pretrained` loads trained ones.
        layers: the blocks in front of which they act, rising; default: evenly over the depth (3, 6, 9 of 12).
        trained_for: the model that they were trained for: ``hash`` of its weights and its name, ``model``.

    Raises:
        ValueError: for predictors that are none, or not as many as there are layers, or a ``trained_for`` that is no
            mapping.
    """

    keep: Any = 0.7
    predictors: nn.ModuleList = field(default=None, repr=False)  # type: ignore[assignment]
    layers: tuple[int, ...] | None = None
    trained_for: Mapping[str, Any] = field(default_factory=dict, repr=False, hash=False)
    name: ClassVar[str] = "dynamicvit"
    source: ClassVar[str] = "arXiv 2106.02034"
    places: ClassVar[tuple[str, ...]] = ("vision",)
    before: ClassVar[bool] = True
    hub_kind: ClassVar[Kind] = KINDS["dynamicvit"]

    def __post_init__(self) -> None:
        super().__post_init__()
        given = self.predictors
        if not isinstance(given, nn.ModuleList) or not given or any(not isinstance(x, Predictor) for x in given):
            raise ValueError(
                f"predictors must be an nn.ModuleList of trained Predictors, as DynamicViT.from_pretrained(folder) "
                f"loads them, got {type(given).__name__}"
            )
        if not isinstance(self.trained_for, Mapping):
            raise ValueError(f"trained_for must be a mapping, got {self.trained_for!r:.200}")
        if self.layers is not None:
            object.__setattr__(self, "layers", tuple(whole_number("layers", each, 0) for each in self.layers))
            rising = all(a < b for a, b in pairwise(self.layers))
            if len(self.layers) != len(given) or not rising:
                raise ValueError(
                    f"layers must be {len(given)} rising blocks, one for each predictor, got {list(self.layers)}"
                )

    # Where and what ---------------------------------------------------------------------------------------------

    def stages(self, depth: int) -> tuple[int, ...]:
        """The blocks of a model of ``depth`` blocks in front of which patches drop out.

        Raises:
            ValueError: if the model has too few.
        """
        found = self.layers or even_stages(depth, len(self.predictors))
        if found[-1] >= depth:
            raise ValueError(f"layers must lie in 0..{depth - 1} for this model, got {list(found)}")
        return found

    def log_probs(self, view: TokenView) -> Tensor:
        """``(B, N)``: of each token, the logarithm of the probability that it should stay.

        The prefix has none, and gets 0 (certain). Tokens are seen alone and in the mean over those that are free.

        Raises:
            ValueError: at a block that no predictor was trained for, or for features of another width.
        """
        if view.evidence.layer is None or view.evidence.depth is None:
            raise ValueError("layer and depth must be known for dynamicvit, got a view without them")
        stages = self.stages(view.evidence.depth)
        if view.evidence.layer not in stages:
            raise ValueError(f"layer must be one of {_listed(stages)} for these predictors, got {view.evidence.layer}")
        predictor = self.predictors[stages.index(view.evidence.layer)]
        assert isinstance(predictor, Predictor)
        if view.hidden.shape[-1] != predictor.width:
            raise ValueError(
                f"hidden must have {predictor.width} features for these predictors, got {view.hidden.shape[-1]}"
            )
        with torch.no_grad():
            if view.prefix is None:
                score: Tensor = predictor(view.hidden, view.free)[..., 0]
                return torch.where(view.protected, 0.0, score)
            patches = view.hidden[:, view.prefix :]
            score = predictor(patches, torch.ones(patches.shape[:2], device=patches.device))[..., 0]
            return nn.functional.pad(score, (view.prefix, 0))

    def plan(self, view: TokenView) -> MergePlan:
        """Keep the tokens that are likeliest to be worth keeping, and drop the rest."""
        score = self.log_probs(view)
        return keep_best(view, self.budget, score, score.exp())

    # What it belongs to -----------------------------------------------------------------------------------------

    @property
    def label(self) -> str:
        """The name, and the blocks where they are not spread evenly."""
        return self.name if self.layers is None else f"{self.name}:layers={','.join(map(str, self.layers))}"

    @property
    def weights_bytes(self) -> int:
        """Memory of the predictors."""
        return sum(p.numel() * p.element_size() for p in self.predictors.parameters())

    def check(self, model: Any, layers: tuple[int, ...], mode: str) -> None:
        """Refuse a model with other weights than those it was trained for, and other blocks."""
        from quickmerge.models.identity import hash_like

        if mode == "visual":
            raise QuickmergeError(
                f"reducer must be one for visual tokens, got {self.name}, whose predictors were trained inside a "
                "vision transformer"
            )
        wanted = self.trained_for.get("hash")
        if wanted is not None and (given := hash_like(model, wanted)) != wanted:
            name = self.trained_for.get("model", "another model")
            raise QuickmergeError(
                f"model must be the one that the predictors were trained for, {name} (weights {str(wanted)[:12]}), "
                f"got a {type(model).__name__} with other weights ({given[:12]})"
            )
        if not layers or (self.layers is not None and layers != self.layers):
            own = "None" if self.layers is None else f"None or {_listed(self.layers)}"
            raise QuickmergeError(f"layer must be {own} for these predictors, got {_listed(layers) or 'a Removal'}")

    def on(self, device: torch.device) -> DynamicViT:
        """With the predictors on ``device``."""
        predictors = moved(self.predictors, device)
        return self if predictors is self.predictors else replace(self, predictors=predictors)

    # Files ------------------------------------------------------------------------------------------------------

    def save_pretrained(self, folder: Path | str) -> None:
        """Write model.safetensors and config.json into ``folder``, both or neither; other files stay.

        Raises:
            QuickmergeError: if the disk is full or not writable, or ``keep`` is not a number.
        """
        if not isinstance(self.keep, (int, float)):
            raise QuickmergeError(f"keep must be a number in (0, 1] to be saved, got {self.keep!r}")
        first = self.predictors[0]
        assert isinstance(first, Predictor)
        config = {
            "kind": KIND, "width": first.width, "stages": len(self.predictors), "keep": self.keep,
            "layers": None if self.layers is None else list(self.layers), "trained_for": dict(self.trained_for),
        }  # fmt: skip
        save_part(folder, config, self.predictors.state_dict())

    @classmethod
    def from_pretrained(cls, folder: Path | str, keep: Any = None, **hub: Unpack[HubOptions]) -> DynamicViT:
        """Load trained predictors, in float32 and for inference.

        The model that they belong to lies beside them in ``backbone/`` if it was trained with them; otherwise
        ``trained_for`` says which it is.

        Args:
            folder: where `save_pretrained` or ``quickmerge train dynamicvit`` wrote, or an id of the hub such as
                ``"owner/name"``.
            keep: replaces the share that they were trained at.
            **hub: how it is taken from the hub, see `quickmerge.models.share.HubOptions`.

        Raises:
            QuickmergeError: if the folder holds none, or the files are damaged or do not fit each other.
        """
        folder = fetched(folder, cls.hub_kind, **hub)
        part = open_part("dynamicvit", folder, f"dynamicvit must be a folder with {CONFIG} and {WEIGHTS}")
        config, path = part.config, part.folder / CONFIG
        if config.get("kind") != KIND:
            raise QuickmergeError(f"{path} must be of kind {KIND}, got {config.get('kind')}")
        with door(f"{part.folder} holds no predictors that can be used"):
            width, stages = whole_number("width", config["width"]), whole_number("stages", config["stages"])
            predictors = part.fill(lambda: nn.ModuleList(Predictor(width) for _ in range(stages)))
            share = config["keep"] if keep is None else keep
            layers = None if config["layers"] is None else tuple(config["layers"])
            return cls(share, predictors.requires_grad_(False), layers, config["trained_for"])


def even_stages(depth: int, stages: int) -> tuple[int, ...]:
    """Blocks that part ``depth`` blocks evenly: 3, 6, 9 of 12.

    Raises:
        ValueError: if there are fewer than ``stages + 1`` blocks.
    """
    if depth <= stages:
        raise ValueError(f"layers must be named for {stages} predictors in a model of {depth} blocks, got None")
    return tuple(depth * (stage + 1) // (stages + 1) for stage in range(stages))


def _listed(layers: tuple[int, ...]) -> str:
    return ",".join(map(str, layers))
