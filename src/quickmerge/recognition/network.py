"""What a recognizer computes: an image's tokens in front of the first blocks of a language model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Self

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from quickmerge.errors import QuickmergeError
from quickmerge.merge.reducers.base import Reducer
from quickmerge.recognition import vision as sight
from quickmerge.recognition.config import MEAN, PROMPT, STD, RecognizerConfig
from quickmerge.recognition.labels import LabelCodec
from quickmerge.recognition.language import check_reading, cut

__all__ = ["Network", "Prefix"]


@dataclass(frozen=True)
class Prefix:
    """What labels follow: ``[image][boundary][BOS][prompt]``.

    Args:
        embeds: ``(B, P, D)``.
        valid: ``(B, P)`` bool, False where a row has fewer image tokens. The last token is always valid.
        image: ``(B, P)`` bool, the image tokens.
    """

    embeds: Tensor
    valid: Tensor
    image: Tensor

    @property
    def length(self) -> Tensor:
        """``(B,)`` valid tokens: where the first token of a label stands."""
        return self.valid.sum(-1)


class Network(nn.Module):
    """The modules of a recognizer, and what they make of images; see `quickmerge.recognition.Recognizer`."""

    def __init__(
        self, vision: PreTrainedModel, language: PreTrainedModel, tokenizer: Any, config: RecognizerConfig
    ) -> None:
        super().__init__()
        self.config = config
        self.labels = LabelCodec(tokenizer, config.prompt, config.separator)
        self.vision = vision
        self.language = language
        embed = language.get_input_embeddings()
        if embed.weight is not language.get_output_embeddings().weight:
            embed.requires_grad_(False)
        like: dict[str, Any] = {"dtype": embed.weight.dtype, "device": embed.weight.device}
        features = sight.width(vision, config.layers)
        self.projector = nn.Linear(features, embed.embedding_dim, bias=False, **like)
        self.boundary = nn.Parameter(torch.empty(embed.embedding_dim, **like))
        ids = torch.arange(min(len(embed.weight), 4096), device=embed.weight.device)
        with torch.no_grad():
            # Features have variance one: what is projected begins at the scale of the embedded tokens around it.
            scale = float(embed(ids).float().square().mean().sqrt())
            nn.init.normal_(self.projector.weight, std=scale * features**-0.5)
            nn.init.normal_(self.boundary, std=scale)
        vocabulary = language.get_output_embeddings().weight.shape[0]
        self.register_buffer("starts", self.labels.starts(vocabulary), persistent=False)
        self.starts: Tensor

    @classmethod
    def new(
        cls,
        vision: PreTrainedModel,
        language: PreTrainedModel,
        tokenizer: Any,
        *,
        blocks: int = 6,
        prompt: str = PROMPT,
        separator: str = ",",
        image_size: int = 224,
        layers: int | Sequence[int] | None = None,
        mask: str = "independent",
        mean: Sequence[float] = MEAN,
        std: Sequence[float] = STD,
    ) -> Self:
        """Make an untrained recognizer of copies of two models; new weights come from the global generator.

        Args:
            vision: holds a vision transformer of one of the proven families.
            language: a causal language model.
            tokenizer: of the language model.
            blocks: how many of its first blocks are used.
            prompt: the text between the image and the labels.
            separator: what closes a label: one token.
            image_size: height and width of the images, in pixels.
            layers: the encoder's hidden states that are looked at, by number; several are put side by side. Default:
                its output.
            mask: ``"independent"``, ``"prefix"`` or ``"causal"``; see `RecognizerConfig`.
            mean: of the pixels, by channel.
            std: of the pixels, by channel.

        Raises:
            ValueError: naming the setting that is out of range.
            UnsupportedModelError: a model is of a kind that this can't be made of.
            QuickmergeError: the separator is not one token.
        """
        encoder = sight.encoder_of(vision)
        chosen = sight.check_layers(encoder, layers)
        config = RecognizerConfig(prompt, separator, image_size, chosen, mask, tuple(mean), tuple(std))
        config = replace(config, skip=sight.front(encoder, image_size))
        made = cut(language, blocks)
        check_reading(made)
        return cls(encoder, made.requires_grad_(True), tokenizer, config)

    # Reading ----------------------------------------------------------------------------------------------------

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return self.boundary.device

    def train(self, mode: bool = True) -> Self:
        """Set the mode of what is trained; the encoder stays as for inference."""
        super().train(mode)
        self.vision.eval()
        return self

    def prepare(self, images: Tensor) -> Tensor:
        """Images ``(B, 3, H, W)`` in [0, 1], scaled and cut around the centre to the image size, and standardised."""
        return sight.prepare(images, self.config.image_size, self.config.mean, self.config.std)

    def look(self, pixels: Tensor, reducer: Reducer | None = None) -> tuple[Tensor, Tensor | None]:
        """Features ``(B, M, D_v)`` of standardised pixels ``(B, 3, H, W)``, and which are valid ``(B, M)``; None: all.

        Args:
            pixels: what `prepare` gives.
            reducer: leaves fewer tokens of each image.
        """
        return sight.look(self.vision, pixels, self.config.skip, self.config.layers, reducer)

    def features(self, pixels: Tensor) -> Tensor:
        """Features ``(B, M, D_v)`` of standardised pixels ``(B, 3, H, W)``, each token of mean 0 and variance 1.

        Inside ``quickmerge.reduce(recognizer.vision, reducer)`` there are fewer; where rows may differ in length,
        `look` tells which are valid.
        """
        return self.look(pixels)[0]

    def prefix(self, features: Tensor, valid: Tensor | None = None) -> Prefix:
        """Features ``(B, M, D_v)``, valid where ``valid (B, M)`` says so, as what labels follow.

        Raises:
            QuickmergeError: if the features have another shape.
        """
        wanted = self.projector.in_features
        if features.ndim != 3 or features.shape[-1] != wanted or 0 in features.shape:
            raise QuickmergeError(f"features must be (images, tokens, {wanted}), got {tuple(features.shape)}")
        there = torch.ones(features.shape[:2], dtype=torch.bool, device=self.device)
        if valid is not None:
            if valid.shape != features.shape[:2]:
                raise QuickmergeError(f"valid must have shape {tuple(features.shape[:2])}, got {tuple(valid.shape)}")
            there = valid.to(self.device).bool()
        rows = len(features)
        seen = self.projector(features.to(self.device, self.projector.weight.dtype))
        text = torch.tensor(self.labels.start_ids + self.labels.prompt_ids, device=self.device)
        said = torch.cat([self.boundary[None], self.language.get_input_embeddings()(text)])
        after = torch.ones(rows, len(said), dtype=torch.bool, device=self.device)
        return Prefix(
            torch.cat([seen, said.to(seen.dtype).expand(rows, -1, -1)], 1),
            torch.cat([there, after], 1),
            torch.cat([there, ~after], 1),
        )
