"""Training CALM's autoencoder: the first of its two stages."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from quickmerge.calm.autoencoder import CalmAutoencoder, Negatives
from quickmerge.calm.chunks import real_chunks
from quickmerge.calm.config import CalmAutoencoderConfig, CalmConfig
from quickmerge.calm.model import CalmForCausalLM
from quickmerge.calm.texts import CalmTexts
from quickmerge.errors import QuickmergeError, UnsupportedModelError, near_match
from quickmerge.models.compat import CONFIG_NOTES, causal_lm_names
from quickmerge.models.identity import model_hash
from quickmerge.models.part import save_model
from quickmerge.training.config import TrainingConfig
from quickmerge.training.loop import TrainingResult, train
from quickmerge.training.objective import Objective

__all__ = [
    "CalmAutoencoderTexts",
    "CalmText",
    "DiscreteTexts",
    "check_causal",
    "energy_range",
    "llama_shape",
    "new_autoencoder",
    "new_calm",
    "new_discrete",
    "train_calm",
    "train_calm_autoencoder",
    "train_discrete",
]


class CalmAutoencoderTexts(Objective):
    """The loss of an autoencoder on windows ``(B, T K)`` of token ids; see `CalmAutoencoder.forward`.

    Args:
        model: what is trained.
        negatives: for a sampled cross-entropy; None for the exact one.
    """

    def __init__(self, model: CalmAutoencoder, negatives: Negatives | None = None) -> None:
        super().__init__()
        self.model, self.negatives = model, negatives

    def forward(self, batch: Tensor, progress: float) -> dict[str, Tensor]:
        """Losses of a batch; ``accuracy`` is that of training, with hidden tokens and dropped features."""
        told = self.model(batch, negatives=self.negatives)
        return {name: value for name, value in told.items() if value is not None}


def new_autoencoder(
    texts: CalmTexts, *, embeddings: Tensor | None = None, seed: int = 0, **shape: Any
) -> CalmAutoencoder:
    """An untrained autoencoder for some texts.

    Args:
        texts: they give the vocabulary, the size of a chunk and the ids of the end token and the pad.
        embeddings: ``(V', D)`` of a language model with the same tokenizer, to begin from.
        seed: of the weights.
        **shape: further fields of `CalmAutoencoderConfig`.

    Raises:
        ValueError: naming a setting that is out of range.
    """
    torch.manual_seed(seed)
    model = CalmAutoencoder(
        CalmAutoencoderConfig(
            vocab_size=texts.vocabulary, patch=texts.patch, pad_token_id=texts.pad, eos_token_id=texts.eos, **shape
        )
    )
    if embeddings is not None:
        model.load_pretrained_embeddings(embeddings, seed)
    return model


def train_calm_autoencoder(
    model: CalmAutoencoder,
    texts: CalmTexts,
    config: TrainingConfig,
    out: Path | str,
    *,
    sampled: int | None = None,
    tokenizer: Any = None,
    resume: bool = False,
) -> TrainingResult:
    """Train an autoencoder and save it in ``out``.

    Args:
        model: trained in place; `new_autoencoder` makes one.
        texts: windows of chunks.
        config: settings of the loop.
        out: folder for config.json, model.safetensors, checkpoints and metrics.
        sampled: hold so many sampled words against the right one in each step, instead of the whole vocabulary.
        tokenizer: is saved beside the model.
        resume: go on from the newest checkpoint.

    Raises:
        QuickmergeError, ValueError: for anything that does not fit; see `quickmerge.training.train`.
    """
    wanted = {"vocab_size": texts.vocabulary, "patch": texts.patch, "pad_token_id": texts.pad,
              "eos_token_id": texts.eos}  # fmt: skip
    for name, value in wanted.items():
        if (given := getattr(model.config, name)) != value:
            raise QuickmergeError(f"{name} of the autoencoder must be that of the texts, {value}, got {given}")
    negatives = None if sampled is None else Negatives(texts.counts(), sampled)
    settings = {
        key: value for key, value in model.config.to_dict().items() if key in CalmAutoencoderConfig.__annotations__
    }
    # The hash is of the untrained weights, so that beginning from other embeddings is another run.
    fingerprint = {"autoencoder": settings, "weights": model_hash(model), "sampled": sampled,
                   "data": texts.fingerprint()}  # fmt: skip
    return train(
        CalmAutoencoderTexts(model, negatives), texts, config, out, resume=resume, fingerprint=fingerprint,
        finish=lambda folder: save_model(folder, model.eval(), tokenizer),
    )  # fmt: skip


# Training CALM's language model on a frozen autoencoder: the second of its two stages.


class CalmText(Objective):
    """The loss of a CALM on windows ``(B, T K)`` of token ids; whole pad chunks and a row's first are no targets.

    Args:
        model: what is trained, all but its autoencoder.
    """

    def __init__(self, model: CalmForCausalLM) -> None:
        super().__init__()
        self.model = model

    def forward(self, batch: Tensor, progress: float) -> dict[str, Tensor]:
        """The loss, and ``chunks``: how many of an item's chunks it is of."""
        told = self.model(batch, labels=batch)
        return {"loss": told.loss, "chunks": told.chunks / len(batch)}


def llama_shape(width: int, layers: int, heads: int, *, positions: int = 2048) -> dict[str, Any]:
    """A Llama's config: feed-forward networks of 8/3 of the width, rounded up to a multiple of 32.

    Args:
        width: features.
        layers: blocks.
        heads: attention heads, of an even number of features each.
        positions: chunks that a text may have.

    Raises:
        ValueError: the width is no multiple of twice the heads.
    """
    if width % (2 * heads):
        raise ValueError(f"width must be a multiple of twice heads ({2 * heads}), got {width}")
    return {
        "model_type": "llama", "hidden_size": width, "intermediate_size": -(-8 * width // 96) * 32,
        "num_hidden_layers": layers, "num_attention_heads": heads, "num_key_value_heads": heads,
        "max_position_embeddings": positions, "bos_token_id": None, "eos_token_id": None, "pad_token_id": None,
    }  # fmt: skip


def new_calm(
    autoencoder: CalmAutoencoder, *, backbone: dict[str, Any] | None = None, seed: int = 0, **settings: Any
) -> CalmForCausalLM:
    """An untrained CALM on a trained autoencoder, of which it holds a copy.

    Args:
        autoencoder: what turns chunks into vectors and back.
        backbone: config of the language model, as `CalmConfig` takes it; default a Llama of 4 layers, 256 wide, with 4
            heads.
        seed: of the weights.
        **settings: further fields of `CalmConfig`: ``head``, ``head_settings``, ``samples``, ``targets``, ``alpha``.

    Raises:
        ValueError: naming a setting that is out of range.
        UnsupportedModelError: the backbone looks ahead.
    """
    torch.manual_seed(seed)
    config = CalmConfig(
        backbone=backbone or llama_shape(256, 4, 4), autoencoder=autoencoder.config.to_dict(), **settings
    )
    model = CalmForCausalLM(config)
    model.autoencoder.load_state_dict(autoencoder.state_dict())
    check_causal(model)
    return model


@torch.no_grad()
def check_causal(model: CalmForCausalLM) -> None:
    """See that the backbone does not look ahead: transformers opens encoders as language models too.

    Raises:
        UnsupportedModelError: what it says of a chunk changes with the chunk after it.
    """
    training = model.training
    model.eval()
    patch, last = model.config.patch, model.config.pad_token_id
    ids = torch.arange(3 * patch, device=model.device).remainder(last)[None].repeat(2, 1)
    ids[1, 2 * patch :] = (ids[1, 2 * patch :] + 1) % last
    changed = model.hidden(ids, torch.ones_like(ids))[0].float().diff(dim=0)[0].abs().amax(-1)
    model.train(training)
    # What is new may not be seen before it: rounding is allowed, a weak attention of fresh weights is not.
    if float(changed[:2].max()) > 1e-5 * float(changed[2]):
        raise UnsupportedModelError(
            f"backbone must be a causal language model, got {type(model.backbone).__name__}, which looks ahead"
        )


@torch.no_grad()
def energy_range(model: CalmForCausalLM, texts: CalmTexts, *, chunks: int = 2048) -> tuple[float, float]:
    """Between what two numbers the energy score of a CALM moves.

    With y and y' drawn of the autoencoder's distribution for two chunks of the texts, a head that draws as often as the
    texts whatever was read scores ``E |y - y'|^alpha``, and one that knows the next chunk the same with y and y' of one
    chunk. If all chunks were equally far from one another, the score would fall by as large a share of the way as the
    Brier score of a chunk is: where hardly any chunk is likely, there is hardly anything to learn from. Chunks that
    have tokens in common are nearer, so it falls further.

    Args:
        model: with an energy head.
        texts: windows, of which some are read, spread evenly.
        chunks: about how many of them.

    Returns:
        The score of knowing nothing of what was read, and that of knowing all. The global generator stays as it was.
    """
    step = max(1, len(texts) * texts.chunks // chunks)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        ids = torch.cat([texts[at].view(-1, texts.patch) for at in range(0, len(texts), step)])
        ids = ids[real_chunks(ids, texts.pad)].to(model.device)
        y, other = model.draw_targets(ids, 2).float()
    apart = torch.cdist(y, other).pow(model.config.alpha)
    same = apart.diagonal()
    return float((apart.sum() - same.sum()) / (len(ids) * (len(ids) - 1))), float(same.mean())


def train_calm(
    model: CalmForCausalLM,
    texts: CalmTexts,
    config: TrainingConfig,
    out: Path | str,
    *,
    tokenizer: Any = None,
    resume: bool = False,
) -> TrainingResult:
    """Train a CALM and save it in ``out``, its autoencoder and all.

    Args:
        model: trained in place, all but the autoencoder; `new_calm` makes one.
        texts: windows of at least two chunks, cut as for the autoencoder.
        config: settings of the loop.
        out: folder for config.json, model.safetensors, checkpoints and metrics.
        tokenizer: is saved beside the model, so that ``quickmerge generate calm`` can use it.
        resume: go on from the newest checkpoint.

    Raises:
        QuickmergeError, ValueError: for anything that does not fit; see `quickmerge.training.train`.
    """
    wanted = {"vocab_size": texts.vocabulary, "patch": texts.patch, "pad_token_id": texts.pad,
              "eos_token_id": texts.eos}  # fmt: skip
    for name, value in wanted.items():
        if (given := getattr(model.config, name)) != value:
            raise QuickmergeError(f"{name} of the model must be that of the texts, {value}, got {given}")
    if texts.chunks < 2:
        raise QuickmergeError(
            f"texts must have windows of at least 2 chunks, or nothing is predicted, got {texts.chunks}"
        )
    settings = json.loads(json.dumps(model.config.to_dict(), default=str))
    for part in (settings, settings["backbone"], settings["autoencoder"]):
        for name in CONFIG_NOTES:
            part.pop(name, None)  # where it was made does not change what is learnt
    # The hash is of the weights before training, the autoencoder's too: those of another one make another run.
    fingerprint = {"calm": settings, "weights": model_hash(model), "data": texts.fingerprint()}
    return train(
        CalmText(model), texts, config, out, resume=resume, fingerprint=fingerprint,
        finish=lambda folder: save_model(folder, model.eval(), tokenizer),
    )  # fmt: skip


# Training an ordinary language model on the texts of a CALM: what the CALM is set beside.


class DiscreteTexts(Objective):
    """The cross-entropy of the next token on windows ``(B, L)`` of token ids, in nats; pads are no tokens.

    Args:
        model: a causal LM of transformers, which is trained.
        pad: id of the pad, which may stand before a text, and behind its end.
    """

    def __init__(self, model: PreTrainedModel, pad: int) -> None:
        super().__init__()
        self.model, self.pad = model, pad

    def forward(self, batch: Tensor, progress: float) -> dict[str, Tensor]:
        """Mean over all tokens of a batch that another stands before."""
        there = batch != self.pad
        # Pads behind a text are where no token of it looks; those in front have to be hidden.
        mask = None if bool(there[:, 0].all()) else there.long()
        logits = self.model(input_ids=batch, attention_mask=mask, use_cache=False).logits[:, :-1]
        counts = there[:, 1:] & there[:, :-1]
        nats = F.cross_entropy(logits[counts].float(), batch[:, 1:][counts], reduction="sum")
        # A batch without such a token has the loss 0, and a gradient.
        return {"loss": nats / counts.sum().clamp_min(1)}


def new_discrete(texts: CalmTexts, backbone: dict[str, Any], seed: int = 0) -> PreTrainedModel:
    """An untrained causal LM for some texts.

    Args:
        texts: they give the vocabulary, the pad's id included, and the ids of the end token and the pad.
        backbone: config of a causal LM of transformers as a dict with ``model_type``.
        seed: of the weights.

    Raises:
        QuickmergeError: there is no such kind of model, or it has another vocabulary.
    """
    settings = dict(backbone)
    kind = settings.pop("model_type", None)
    if kind not in causal_lm_names():
        raise QuickmergeError(
            "backbone must have a model_type that transformers has a causal language model of, such as 'llama', "
            f"got {kind!r}{near_match(str(kind), causal_lm_names())}"
        )
    given = settings.pop("vocab_size", texts.vocabulary)
    if given != texts.vocabulary:
        raise QuickmergeError(f"vocab_size of backbone must be that of the texts, {texts.vocabulary}, got {given}")
    ends = {"pad_token_id": texts.pad, "eos_token_id": texts.eos, "bos_token_id": None}
    torch.manual_seed(seed)
    config = AutoConfig.for_model(kind, **{**ends, **settings, "vocab_size": given})
    model: PreTrainedModel = AutoModelForCausalLM.from_config(config, trust_remote_code=False)
    return model


def train_discrete(
    model: PreTrainedModel,
    texts: CalmTexts,
    config: TrainingConfig,
    out: Path | str,
    *,
    tokenizer: Any = None,
    resume: bool = False,
) -> TrainingResult:
    """Train an ordinary language model on the texts of a CALM and save it in ``out``.

    Args:
        model: trained in place; `new_discrete` makes one.
        texts: windows, of single tokens or of a CALM's chunks, which are read token by token.
        config: settings of the loop.
        out: folder for config.json, model.safetensors, checkpoints and metrics.
        tokenizer: is saved beside the model.
        resume: go on from the newest checkpoint.

    Raises:
        QuickmergeError, ValueError: for anything that does not fit; see `quickmerge.training.train`.
    """
    if model.config.vocab_size != texts.vocabulary:
        raise QuickmergeError(
            f"vocab_size of the model must be that of the texts, {texts.vocabulary}, got {model.config.vocab_size}"
        )
    # The hash is of the untrained weights: another size or seed is another run.
    fingerprint = {"model": type(model).__name__, "weights": model_hash(model), "data": texts.fingerprint()}
    return train(
        DiscreteTexts(model, texts.pad), texts, config, out, resume=resume, fingerprint=fingerprint,
        finish=lambda folder: save_model(folder, model.eval(), tokenizer),
    )  # fmt: skip
