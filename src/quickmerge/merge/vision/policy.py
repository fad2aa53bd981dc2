"""Vision transformers that read with a policy: every token is there, and those that are dropped are not attended to.

This is how a method that prunes is trained (DynamicViT, arXiv 2106.02034): numbers of tokens may differ from image to
image, and a gradient reaches what decides. Used with the decisions that a reducer takes, a policy gives the same
output as taking the tokens out does, to the rounding.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from quickmerge.errors import QuickmergeError, UnsupportedModelError
from quickmerge.merge.tokens.removal import fill_dropped, key_bias, masked_softmax
from quickmerge.merge.vision.run import as_bias
from quickmerge.models.attachment import Attachment, refuse_tracing
from quickmerge.models.decoder import AttentionFunction, watch_modules
from quickmerge.models.encoder import Encoder, find_encoder, pixels_of, prefix_of

Decide = Callable[[int, Tensor, Tensor], Tensor]
"""``(stage, patches (B, N, C), mask (B, N)) -> (B, N)``: 1 for the patches to keep and 0 for the others."""


def policy_vit(model: PreTrainedModel, layers: Sequence[int], decide: Decide) -> PolicyRun:
    """Let ``decide`` say in front of some blocks which patches are still attended to.

    Tokens in front of the patches (class, distillation, registers) always are. From the first stage on attention is
    `masked_softmax` where the mask carries a gradient, and the model's own function with a mask where it carries none.
    What pools the patches of the last block, inside the model or in a classifier around it, reads the kept ones.

    Args:
        model: a vision transformer, see `quickmerge.models.encoder.find_encoder`, or a model around one.
        layers: the blocks in front of which it decides, rising.
        decide: called at each stage with the patches that enter the block and the mask of the stage before. Masks
            only shrink: what it gives is multiplied with that mask.

    Raises:
        UnsupportedModelError: for a model that can't be served.
        ValueError: for blocks that don't exist or don't rise.
    """
    encoder = find_encoder(model)
    blocks = tuple(layers)
    if not encoder.has_rising(blocks):
        raise ValueError(f"layers must be rising blocks in 0..{len(encoder) - 1}, got {layers!r}")
    return PolicyRun(encoder, blocks, decide)


@dataclass
class Forward:
    """The state of one forward. By stage: the mask of the patches, and of all tokens, ``(B, N)`` and ``(B, T)``."""

    grid: tuple[int, int, int]
    prefix: int = 0
    masks: list[Tensor] = field(default_factory=list)
    policies: list[Tensor] = field(default_factory=list)
    stage_of: list[int] = field(default_factory=list)
    features: Tensor | None = None


class PolicyRun(Attachment):
    """One attachment of a policy to a vision transformer.

    After a forward it holds ``masks``, ``(B, N)`` float for each stage, with a gradient where the decision has one;
    ``features``, what the last block's patches became behind the last norm, ``(B, N, C)``, dropped ones included; and
    ``prefix``, how many tokens stand in front of the patches. They are of the last forward, also once it is left.
    """

    def __init__(self, encoder: Encoder, layers: tuple[int, ...], decide: Decide) -> None:
        super().__init__(encoder.model)
        self.encoder = encoder
        self.layers = layers
        self.decide = decide
        self._state: Forward | None = None

    @property
    def masks(self) -> list[Tensor]:
        """Masks of the patches by stage, ``(B, N)``."""
        return self._current().masks

    @property
    def prefix(self) -> int:
        """How many tokens stand in front of the patches."""
        return self._current().prefix

    @property
    def features(self) -> Tensor:
        """Last features of all patches, ``(B, N, C)``."""
        found = self._current().features
        if found is None:
            raise QuickmergeError("the model's forward did not come to its end, so there are no features")
        return found

    def _attach(self) -> None:
        encoder = self.encoder
        if any(getattr(block.module, "gradient_checkpointing", False) for block in encoder.blocks):
            raise UnsupportedModelError(
                f"{self._name} must not recompute its blocks under a policy: "
                "call activation_checkpointing_disable() first"
            )
        self._undo.append(watch_modules(encoder.base, [block.attention for block in encoder.blocks], self))
        self._note(encoder.base.register_forward_pre_hook(self._before_model, with_kwargs=True))
        self._note(encoder.base.register_forward_hook(self._after_model))
        for index, block in enumerate(encoder.blocks):
            before = self._before_block(index)
            self._note(block.module.register_forward_pre_hook(before, with_kwargs=True, prepend=True))
        if encoder.pooler is not None:
            self._note(encoder.pooler.register_forward_pre_hook(self._before_pooler))
            for module in encoder.pooler.modules():
                if isinstance(module, nn.MultiheadAttention):
                    self._note(module.register_forward_pre_hook(self._before_probe, with_kwargs=True))

    def _current(self) -> Forward:
        if self._state is None:
            raise QuickmergeError("a policy run must see a forward of its model first")
        return self._state

    # One forward ------------------------------------------------------------------------------------------------

    def _before_model(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        refuse_tracing(self._name)
        self._state = Forward(self.encoder.grid(pixels_of(args, kwargs)))

    def _before_block(self, index: int) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            state, hidden = self._current(), args[0] if args else kwargs["hidden_states"]
            if index == 0:
                state.prefix = prefix_of(hidden.shape[1], state.grid, type(self.encoder.model).__name__)
            if index in self.layers:
                self._advance(state, hidden)
            state.stage_of.append(len(state.masks) - 1)

        return hook

    def _advance(self, state: Forward, hidden: Tensor) -> None:
        """Decide the next stage from the tokens ``(B, T, C)`` that are about to enter its block."""
        patches, stage = hidden[:, state.prefix :], len(state.masks)
        shape = patches.shape[:2]
        before = state.masks[-1] if stage else torch.ones(shape, device=hidden.device)
        decision = self.decide(stage, patches, before)
        if decision.shape != shape:
            raise ValueError(f"decide must give (batch, patches) {tuple(shape)}, got {tuple(decision.shape)}")
        mask = decision.to(before.dtype) * before
        state.masks.append(mask)
        state.policies.append(torch.cat([mask.new_ones(shape[0], state.prefix), mask], 1))

    def attend(self, layer: int, call: AttentionFunction, module: nn.Module, args: tuple[Any, ...], kwargs: Any) -> Any:
        """Called for every attention: lets keys count as the policy of their stage says."""
        state = self._current()
        stage = state.stage_of[layer]
        if stage < 0:
            return call(module, *args, **kwargs)
        policy = state.policies[stage]
        query, key, value = args[:3]
        mask = args[3] if len(args) > 3 else kwargs.pop("attention_mask", None)
        if policy.requires_grad and torch.is_grad_enabled():
            scaling = kwargs.get("scaling") or query.shape[-1] ** -0.5
            dropout = kwargs.get("dropout", 0.0) if module.training else 0.0
            return masked_attention(query, key, value, mask, policy, scaling, dropout)
        bias = key_bias(policy, query.dtype)
        if mask is not None:
            bias = bias + as_bias(mask, query.dtype)
        return call(module, query, key, value, bias, *args[4:], **kwargs)

    # Handing out ------------------------------------------------------------------------------------------------

    def _filled(self, tokens: Tensor) -> Tensor:
        state = self._current()
        return torch.cat([tokens[:, : state.prefix], fill_dropped(tokens[:, state.prefix :], state.masks[-1])], 1)

    def _before_pooler(self, module: nn.Module, args: tuple[Any, ...]) -> Any:
        return (self._filled(args[0]), *args[1:])

    def _before_probe(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Attention that pools must not see what was dropped; an image that keeps nothing shows everything."""
        kept = self._current().policies[-1] > 0
        return args, {**kwargs, "key_padding_mask": ~kept & kept.any(-1, keepdim=True)}

    def _after_model(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        state = self._current()
        state.features = output.last_hidden_state[:, state.prefix :]
        if self.encoder.model is not self.encoder.base:
            output.last_hidden_state = self._filled(output.last_hidden_state)
        return output


def masked_attention(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, policy: Tensor, scaling: float, dropout: float
) -> tuple[Tensor, Tensor]:
    """Attention by `masked_softmax`, as transformers' attention functions give it.

    Args:
        query: ``(B, H, T, d)``, as ``key`` and ``value``.
        key: the keys.
        value: the values.
        mask: added to the scores first, ``(B or 1, H or 1, T, T)``; None for nothing.
        policy: ``(B, T)``.
        scaling: of the products.
        dropout: share of the weights that is dropped.

    Returns:
        ``(B, T, H, d)`` and the weights ``(B, H, T, T)``.
    """
    scores = query @ key.transpose(2, 3) * scaling
    weights = masked_softmax(scores if mask is None else scores + as_bias(mask, scores.dtype), policy).to(value.dtype)
    if dropout:
        weights = nn.functional.dropout(weights, dropout)
    return (weights @ value).transpose(1, 2).contiguous(), weights
