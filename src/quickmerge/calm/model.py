"""From the tokens of a chunk to the one vector that the language model reads for them."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn
from transformers import AutoModel, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from quickmerge.calm.autoencoder import CalmAutoencoder, nothing_of
from quickmerge.calm.chunks import real_chunks
from quickmerge.calm.config import CalmConfig
from quickmerge.calm.generation import Generators, generate_chunks
from quickmerge.calm.heads import SamplingHead, make_head
from quickmerge.errors import QuickmergeError, UnsupportedModelError, door
from quickmerge.models.compat import ModelOutput, cache_argument, either_cache, own_model, returned_cache
from quickmerge.models.folder import check_model_folder
from quickmerge.models.kinds import KINDS
from quickmerge.models.part import Signed
from quickmerge.models.read import damaged, read_config, read_weights, transformers_silenced, tried
from quickmerge.models.share import HubModel, HubOptions, fetched

if TYPE_CHECKING:
    from quickmerge.models.compat import BaseStreamer

__all__ = ["CalmForCausalLM", "CalmOutput", "ChunkEmbedding", "Generators", "load_calm"]


class ChunkEmbedding(nn.Module):
    """Presses the embeddings of K tokens into one vector: ``norm(W2 silu W1 [e_1; ...; e_K])`` (arXiv 2510.27688).

    The language model reads the tokens themselves, not the latent vector that they were drawn as: the paper found
    latents, which are made to be fragile to nothing but their decoder, much harder to read.

    Args:
        patch: K, tokens of a chunk.
        token_width: features of a token's embedding.
        width: D, features of the language model; there are 2 D between the two layers.
    """

    def __init__(self, patch: int, token_width: int, width: int) -> None:
        super().__init__()
        self.patch = patch
        self.up = nn.Linear(patch * token_width, 2 * width)
        self.down = nn.Linear(2 * width, width)
        self.norm = nn.LayerNorm(width, eps=1e-6)

    def forward(self, tokens: Tensor) -> Tensor:
        """Token embeddings ``(B, T * K, E)`` to chunk embeddings ``(B, T, D)``."""
        together = tokens.reshape(tokens.shape[0], -1, self.patch * tokens.shape[-1])
        out: Tensor = self.norm(self.down(nn.functional.silu(self.up(together))))
        return out


# CALM: a language model whose next step is one vector, which stands for several tokens.


LOGITS = 2**24
"""Most logits made at once where chunks are sampled: 64 MiB in float32."""


@dataclass
class CalmOutput(ModelOutput):  # type: ignore[misc]
    """What `CalmForCausalLM` gives.

    Attributes:
        loss: mean over the chunks that count; no likelihood, so that its exponential is no perplexity.
        chunks: how many those are, ``()``.
        last_hidden_state: ``(B, T, D)``, position i for what comes after chunk i.
        cache: the backbone's cache, if one was asked for; also called ``past_key_values``, as before transformers 5.24.
    """

    loss: Tensor | None = None
    chunks: Tensor | None = None
    last_hidden_state: Tensor | None = None
    cache: Any = None

    @property
    def past_key_values(self) -> Any:
        """The cache, by its older name."""
        return self.cache


# The embedding and the head stay as they make themselves; backbone and autoencoder have their own rules.
@own_model(attention=True)
class CalmForCausalLM(HubModel, Signed, PreTrainedModel):  # type: ignore[misc]
    """Continuous autoregressive language model (arXiv 2510.27688).

    A causal transformer reads one vector for every K tokens. Of its output at chunk i a head draws, from noise, the
    latent vector of chunk i + 1, which a frozen autoencoder turns into K tokens, which are read next. There is no
    likelihood anywhere: the model is trained by draws, and known by draws.

    A text is cut into chunks as in training: padding fills up its first chunk in front, and its last behind the end.
    Padding is a token that the autoencoder knows. A chunk of nothing else is not there for the transformer.

    Args:
        config: its settings. The autoencoder is made anew, untrained: give its weights to ``model.autoencoder``.
    """

    hub_kind = KINDS["calm"]
    config_class = CalmConfig
    config: CalmConfig
    base_model_prefix = "calm"
    main_input_name = "input_ids"

    def __init__(self, config: CalmConfig) -> None:
        super().__init__(config)
        self.autoencoder = CalmAutoencoder(config.autoencoder)
        self.backbone = AutoModel.from_config(config.backbone, trust_remote_code=False)
        table = self.backbone.get_input_embeddings()
        self.embedding = ChunkEmbedding(config.patch, table.embedding_dim, config.hidden_size)
        self.head = cast(
            SamplingHead, make_head(config.head, config.hidden_size, config.latent, **config.all_head_settings())
        )
        self._positions = "position_ids" in inspect.signature(self.backbone.forward).parameters
        self.post_init()
        self.train(self.training)

    def train(self, mode: bool = True) -> CalmForCausalLM:
        """Set the mode of what is trained; the autoencoder stays as for inference, and frozen."""
        super().train(mode)
        # Here and not in the constructor: loading puts new parameters in the place of those that it froze.
        self.autoencoder.eval().requires_grad_(False)
        return self

    def get_input_embeddings(self) -> torch.nn.Module:
        """The table of token embeddings, which is the backbone's."""
        table: torch.nn.Module = self.backbone.get_input_embeddings()
        return table

    # Reading ----------------------------------------------------------------------------------------------------

    def hidden(
        self,
        ids: Tensor,
        attention_mask: Tensor | None = None,
        cache: Any = None,
        use_cache: bool = False,
        *,
        past_key_values: Any = None,
    ) -> tuple[Tensor, Any]:
        """Read chunks.

        Args:
            ids: ``(B, T * K)`` token ids, whole chunks.
            attention_mask: ``(B, (P + T) * K)``, 0 for padding, of the P chunks in the cache too. Default: what is
                not the padding token; it must be given with a cache that holds something.
            cache: the cache of the chunks before these.
            use_cache: give back a cache.
            past_key_values: the cache, by its older name.

        Returns:
            ``(B, T, D)``, position i for what comes after chunk i; and the cache or None.

        Raises:
            QuickmergeError: the ids or the mask have another shape, ids are not of the vocabulary, or there are two
                caches.
        """
        cache = either_cache(cache, past_key_values)
        ids, there = self._checked(ids, attention_mask, cache)
        embeds = self.embedding(self.get_input_embeddings()(ids))
        given: dict[str, Any] = {"attention_mask": there.long()}
        if self._positions:
            given["position_ids"] = (there.long().cumsum(1) - 1).clamp_min(0)[:, -embeds.shape[1] :]
        given |= cache_argument(self.backbone, cache)
        out = self.backbone(inputs_embeds=embeds, use_cache=use_cache, **given)
        return out.last_hidden_state, returned_cache(out) if use_cache else None

    def _checked(self, ids: Tensor, mask: Tensor | None, past: Any) -> tuple[Tensor, Tensor]:
        """The ids with padding where the mask is 0, and which chunks are there ``(B, P + T)`` bool."""
        config = self.config
        if ids.ndim != 2 or ids.shape[1] == 0 or ids.shape[1] % config.patch:
            raise QuickmergeError(
                f"input_ids must be (batch, chunks * {config.patch}) token ids, got shape {tuple(ids.shape)}"
            )
        if not 0 <= int(ids.min()) <= int(ids.max()) < config.vocab_size:
            raise QuickmergeError(
                f"input_ids must be of the {config.vocab_size} tokens of the vocabulary, "
                f"got {int(ids.min())} to {int(ids.max())}"
            )
        before = 0 if past is None else int(past.get_seq_length())
        if mask is None:
            if before:
                raise QuickmergeError("attention_mask must be given with a cache: it says what that holds")
            return ids, real_chunks(self._pieces(ids), config.pad_token_id)
        wanted = (ids.shape[0], before * config.patch + ids.shape[1])
        if tuple(mask.shape) != wanted:
            raise QuickmergeError(f"attention_mask must have shape {wanted}, got {tuple(mask.shape)}")
        mask = mask.to(ids.device).bool()
        ids = ids.masked_fill(~mask[:, -ids.shape[1] :], config.pad_token_id)
        new = mask.clone()
        new[:, -ids.shape[1] :] &= ids != config.pad_token_id
        return ids, self._pieces(new).any(-1)

    def _pieces(self, tokens: Tensor) -> Tensor:
        """``(B, T * K)`` as chunks ``(B, T, K)``."""
        return tokens.reshape(len(tokens), -1, self.config.patch)

    # Drawing ----------------------------------------------------------------------------------------------------

    def sample(self, hidden: Tensor, count: int = 1, *, generator: Generators = None) -> Tensor:
        """Independent draws of the next latent vector, ``(..., D)`` to ``(count, ..., l)``.

        Args:
            hidden: what `hidden` gave, at any positions.
            count: draws for each.
            generator: of the noise; with one for each row of ``hidden (B, ..., D)`` a row's draws are the same
                whatever the other rows are.
        """
        if generator is None or isinstance(generator, torch.Generator):
            return self.head.draws(hidden, count, generator)
        if hidden.ndim < 2 or len(generator) != len(hidden):
            raise QuickmergeError(
                f"generator must be one, or one for each of {len(hidden)} rows, got a list of {len(generator)}"
            )
        rows = [self.head.draws(row[None], count, one) for row, one in zip(hidden, generator, strict=True)]
        return torch.cat(rows, 1)

    @torch.no_grad()
    def sample_chunks(self, hidden: Tensor, count: int = 1, *, generator: Generators = None) -> Tensor:
        """Independent draws of the next chunk, ``(..., D)`` to token ids ``(count, ..., K)``.

        Each is the likeliest chunk of a drawn latent vector. Which of them come how often is all that is known of the
        model's distribution.

        Args:
            hidden: as for `sample`, as are ``count`` and ``generator``.
            count: see there.
            generator: see there.
        """
        return self.decode(self.sample(hidden, count, generator=generator))

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        """The likeliest tokens of latent vectors, ``(..., l)`` to ``(..., K)``, some at a time to spare memory."""
        config = self.config
        flat = latents.reshape(-1, config.latent)
        step = max(1, LOGITS // (config.patch * config.vocab_size))
        parts = [self.autoencoder.decode(part).argmax(-1) for part in torch.split(flat, step)]
        return torch.cat(parts).view(*latents.shape[:-1], config.patch)

    # Learning ---------------------------------------------------------------------------------------------------

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        labels: Tensor | None = None,
        cache: Any = None,
        use_cache: bool = False,
        return_dict: bool = True,
        *,
        past_key_values: Any = None,
    ) -> CalmOutput:
        """Read chunks and, with labels, score what the head would draw after each against what came.

        Args:
            input_ids: ``(B, T * K)`` token ids, whole chunks.
            attention_mask: as for `hidden`, as are ``cache``, ``use_cache`` and ``past_key_values``.
            labels: ``input_ids``, or -100 for tokens that nothing is to be learnt of. A chunk counts if it is not the
                first, is there, and any of its labels is not -100.
            cache: see `hidden`.
            use_cache: see `hidden`.
            return_dict: for callers that give it; must be True.
            past_key_values: see `hidden`.

        Returns:
            A loss only with labels. Its noise comes from torch's global generator, and so differs from call to call.

        Raises:
            QuickmergeError: anything has another shape, ids are not of the vocabulary, labels are other tokens than
                the ids, or ``return_dict`` is False.
        """
        if not return_dict:
            raise QuickmergeError("return_dict must be True: the model gives no tuples, got False")
        given = either_cache(cache, past_key_values)
        states, left = self.hidden(input_ids, attention_mask, given, use_cache)
        loss = chunks = None
        if labels is not None:
            if given is not None:
                raise QuickmergeError("labels must be given with whole texts: leave the cache out")
            loss, chunks = self._score(states, input_ids, attention_mask, labels)
        return CalmOutput(loss=loss, chunks=chunks, last_hidden_state=states, cache=left)

    def _score(self, states: Tensor, ids: Tensor, mask: Tensor | None, labels: Tensor) -> tuple[Tensor, Tensor]:
        if labels.shape != ids.shape or bool(((labels != ids) & (labels != -100)).any()):
            raise QuickmergeError(
                "labels must be input_ids, with -100 in the place of tokens that do not count, got other tokens or "
                f"shape {tuple(labels.shape)} for {tuple(ids.shape)}"
            )
        ids, there = self._checked(ids, mask, None)
        told = self._pieces(labels != -100).any(-1)
        # What comes after chunk i is chunk i + 1, if both are there.
        counts = (there & told)[:, 1:] & there[:, :-1]
        chunks = self._pieces(ids)[:, 1:][counts]
        context = states[:, :-1][counts]
        if not len(chunks):
            return nothing_of(self).to(states.dtype), counts.sum()
        targets = self.draw_targets(chunks, self.config.targets)
        return self.head.loss(context, targets, many_targets=True).mean(), counts.sum()

    @torch.no_grad()
    def draw_targets(self, chunks: Tensor, count: int) -> Tensor:
        """Draws of the autoencoder's posterior of chunks ``(P, K)``, ``(count, P, l)``, with the global generator."""
        return self.autoencoder.draw(*self.autoencoder.encode(chunks), count)

    # Writing ----------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def generate(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        max_new_tokens: int = 128,
        *,
        temperature: float = 1.0,
        temperature_method: str = "exact",
        batch_samples: int = 200,
        most_draws: int = 100_000,
        eos_token_id: int | Sequence[int] | None = None,
        pad_token_id: int | None = None,
        streamer: BaseStreamer | None = None,
        generator: Generators = None,
        seed: int | None = None,
        use_cache: bool = True,
    ) -> Tensor:
        """Go on with texts, K tokens a step.

        Args:
            input_ids: ``(B, n)`` token ids; any n. They are cut into chunks as in training.
            attention_mask: ``(B, n)``, 0 for padding, wherever it stands. Default: what is not the padding token.
            max_new_tokens: so many new tokens; what the last chunk has beyond is cut off.
            temperature: in (0, 1]; there is no greedy decoding, as nobody knows which chunk is likeliest.
            temperature_method: ``"exact"``: by rejection, any temperature; ``"batch"``: 1/n for a whole n, nearly so.
                See `quickmerge.calm.temperature`. At temperature 1 both are one draw.
            batch_samples: draws a step of the batch method.
            most_draws: for a row and step of the exact method; beyond that it is an error.
            eos_token_id: what ends a text, several allowed; default the model's. ``[]``: nothing does.
            pad_token_id: what follows in rows that have ended; default the first ``eos_token_id``.
            streamer: is given the prompt and then each chunk; for one row only.
            generator: of all that is random; with one for each row, a row's text is that which it would be alone.
            seed: makes a generator for this call, in place of ``generator``.
            use_cache: keep keys and values of earlier chunks; False reads everything anew at each step.

        Returns:
            ``(B, n + new)``: the given ids, and at most ``max_new_tokens`` new ones. What follows the end of a text is
            cut, also inside its chunk. A padding token ends a text too: in training none stands elsewhere.

        Raises:
            QuickmergeError, ValueError: naming the argument that can't be used.
        """
        return generate_chunks(
            self, input_ids, attention_mask, max_new_tokens, temperature=temperature, method=temperature_method,
            batch_samples=batch_samples, most_draws=most_draws, eos=eos_token_id, pad=pad_token_id, streamer=streamer,
            generator=generator, seed=seed, use_cache=use_cache,
        )  # fmt: skip


AutoModelForCausalLM.register(CalmConfig, CalmForCausalLM)


# A CALM as a folder: config.json, model.safetensors with the autoencoder inside, and the tokenizer's files.


def load_calm(folder: Path | str, **options: Any) -> tuple[CalmForCausalLM, Any]:
    """Open a CALM and its tokenizer, ready to generate.

    Args:
        folder: where `quickmerge train calm` saved it, or an id of the hub such as ``"owner/name"``.
        **options: of transformers' ``from_pretrained``, such as ``dtype``, by default float32; and how it is taken from
            the hub, see `quickmerge.models.share.HubOptions`.

    Returns:
        The model in evaluation mode, and its tokenizer, which pads on the left.

    Raises:
        QuickmergeError: there is none, it is another model, or its files are damaged or incomplete.
    """
    hub = {name: options.pop(name) for name in HubOptions.__annotations__ if name in options}
    folder = Path(fetched(folder, CalmForCausalLM.hub_kind, **hub)).expanduser()
    if not folder.is_dir():
        raise QuickmergeError(f"model must be a folder that holds a CALM, but there is no folder {folder}")
    check_model_folder(folder)
    with transformers_silenced():
        config = read_config(str(folder))
        if not isinstance(config, CalmConfig):
            raise UnsupportedModelError(
                f"model must be a folder that holds a CALM, but {folder} holds a {config.model_type}: "
                "`quickmerge train calm` makes one"
            )
        with door(f"{folder} has no usable tokenizer", UnsupportedModelError):
            tokenizer = tried(AutoTokenizer.from_pretrained(folder, trust_remote_code=False))
        model, lacking = read_weights(CalmForCausalLM, str(folder), config, {"dtype": "float32", **options})
    if lacking:
        raise damaged(str(folder), f"{len(lacking)} tensors are missing, {lacking[0]} first")
    if len(tokenizer) > config.pad_token_id:
        raise QuickmergeError(
            f"the tokenizer in {folder} must have the {config.pad_token_id} tokens that the model was trained with, "
            f"got {len(tokenizer)}"
        )
    tokenizer.padding_side = "left"
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return model.eval(), tokenizer
