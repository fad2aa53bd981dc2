"""The stages of ``quickmerge train calm``."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from quickmerge.cli.common import load_model, progress, read_text
from quickmerge.cli.train_calm import STEPS
from quickmerge.errors import QuickmergeError
from quickmerge.printable import clean_name
from quickmerge.training import TrainingConfig
from quickmerge.training.progress import say

if TYPE_CHECKING:
    from quickmerge.continuous import CalmAutoencoder
    from quickmerge.training import TrainingResult
    from quickmerge.training.calm_texts import CalmTexts

KIND = "quickmerge-calm-autoencoder"
AE_CHUNKS = 16
"""Chunks of a window of the autoencoder's: they have nothing to do with each other, so this is only a unit."""
LARGE, SAMPLED = 16384, 8192
"""Above so many tokens so many of them are sampled for the loss, unless the user says how many."""


@dataclass(frozen=True)
class Texts:
    """What is trained on, and texts that are not."""

    documents: Any
    held_out: list[str]


def read_texts(paths: Sequence[Path], held_out: Sequence[Path], column: str | None) -> Texts:
    """The texts that were named."""
    from quickmerge.training.data import find_data, from_disk

    found = find_data(paths)
    documents: Any = from_disk(found.files, column) if found.kind == "dataset" else found.files
    kind = documents.kind if found.kind == "dataset" else found.kind
    if kind != "text":
        raise QuickmergeError(f"--data must name texts, got {kind}")
    return Texts(documents, [read_text(path) for path in held_out])


def calm_config(config: Path | None, *, usual: Mapping[str, Any] | None = None, **options: Any) -> TrainingConfig:
    """Settings from a file, if there is one, with the options that were given before it."""
    given = {name: value for name, value in options.items() if value is not None}
    if config is not None:
        return replace(TrainingConfig.from_file(config), **given)
    steps = given.get("steps", STEPS)
    standard = {"steps": steps, "batch": 16, "learning_rate": 1e-3, "warmup": min(50, steps), "final": 0.05,
                "weight_decay": 0.1, "betas": (0.9, 0.95), "save_every": 200}  # fmt: skip
    return TrainingConfig(**{**standard, **(usual or {}), **given})


class Sources:
    """Where the tokenizer, the size of a chunk and the autoencoder come from.

    Args:
        out: the output folder.
        autoencoder: the folder of one, if it was named.
        tokenizer: name of a tokenizer, if there is one.
        vocabulary: tokens of one that is made of the texts, if it is.
        patch: K, if it was given.
    """

    def __init__(
        self, out: Path, autoencoder: Path | None, tokenizer: str | None, vocabulary: int | None, patch: int | None
    ) -> None:
        self.folder = autoencoder or out / "autoencoder"
        self.named = autoencoder is not None
        self.tokenizer, self.vocabulary, self.patch = tokenizer, vocabulary, patch
        self._tokens: Any = None

    @property
    def chunk(self) -> int:
        """K for an autoencoder that is yet to be trained."""
        return 4 if self.patch is None else self.patch

    def tokens(self, texts: Texts) -> Any:
        """The tokenizer, as it was asked for; made or read once."""
        from quickmerge.training.calm_tokenizer import read_tokenizer, train_tokenizer

        if self._tokens is None:
            if self.vocabulary is not None:
                self._tokens = train_tokenizer(texts.documents, self.vocabulary)
            else:
                self._tokens = read_tokenizer("smollm2-135m" if self.tokenizer is None else self.tokenizer)
        return self._tokens

    def model(self) -> tuple[CalmAutoencoder, Any]:
        """The trained autoencoder and its tokenizer."""
        from quickmerge.continuous import CalmAutoencoder
        from quickmerge.models.folder import check_model_folder
        from quickmerge.models.read import damaged, read_config, read_weights
        from quickmerge.training.calm_tokenizer import read_tokenizer

        if not self.folder.is_dir():
            raise QuickmergeError(
                f"there is no autoencoder in {self.folder}: train one with --stage autoencoder, or name its folder "
                "with --autoencoder"
            )
        check_model_folder(self.folder)
        kind = json.loads((self.folder / "config.json").read_text(encoding="utf-8")).get("model_type")
        if kind != KIND:
            raise QuickmergeError(f"--autoencoder must be the folder of a CALM autoencoder, got {self.folder} ({kind})")
        model, lacking = read_weights(CalmAutoencoder, str(self.folder), read_config(str(self.folder)), {})
        if lacking:
            raise damaged(str(self.folder), f"{len(lacking)} tensors are missing, {lacking[0]} first")
        for name, value in (("tokenizer", self.tokenizer), ("vocabulary", self.vocabulary)):
            if value is not None and self._tokens is None:
                raise QuickmergeError(f"--{name} is that of the autoencoder in {self.folder}: leave it out")
        if self.patch not in (None, model.config.patch):
            raise QuickmergeError(f"--patch is that of the autoencoder, {model.config.patch}, got {self.patch}")
        assert isinstance(model, CalmAutoencoder)
        return model, read_tokenizer(str(self.folder))


def windows(texts: Texts, tokenizer: Any, patch: int, chunks: int) -> CalmTexts:
    """The texts as windows of chunks, with a bar while they are read."""
    from quickmerge.training.calm_texts import CalmTexts

    held_out = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in texts.held_out]
    with progress() as bar:
        task = bar.add_task("reading the texts", total=len(texts.documents))
        made = CalmTexts(
            tokenizer, texts.documents, patch, chunks, held_out=held_out,
            progress=lambda done, _: bar.update(task, completed=done),
        )  # fmt: skip
        count = len(made)
    left = f"; {made.overlapping} share a passage with a held-out text" if made.overlapping else ""
    say(f"{made.tokens} tokens, {count} windows of {chunks} chunks of {patch} tokens{left}")
    return made


def train_autoencoder(
    texts: Texts,
    tokenizer: Any,
    out: Path,
    config: TrainingConfig,
    *,
    patch: int,
    shape: dict[str, Any],
    sampled: int | None,
    embeddings: str | None,
    resume: bool,
) -> bool:
    """Train the autoencoder and say how good it is; True if it is done."""
    from quickmerge.evaluation.calm_autoencoder import autoencoder_scores
    from quickmerge.training.calm_autoencoder import new_autoencoder, train_calm_autoencoder
    from quickmerge.training.calm_texts import document_chunks

    dataset = windows(texts, tokenizer, patch, AE_CHUNKS)
    if sampled is None and dataset.vocabulary > LARGE:
        sampled = SAMPLED
        say(f"of {dataset.vocabulary} tokens {sampled} are sampled for the loss of each step; --sampled 0 takes all")
    weight = None if embeddings is None else _embeddings(embeddings, tokenizer)
    model = new_autoencoder(dataset, embeddings=weight, seed=config.seed, **shape)
    result = train_calm_autoencoder(
        model, dataset, config, out, sampled=sampled or None, tokenizer=tokenizer, resume=resume
    )
    tell(result, out)
    if result.finished and texts.held_out:
        chunks = document_chunks(tokenizer, texts.held_out, patch)
        found = autoencoder_scores(model, chunks)
        shares = ", ".join(f"{100 * share:.2f} % with noise of {sigma:g}" for sigma, share in found.accuracy.items())
        print(f"{found.tokens} held-out tokens found again: {shares}")
        print(f"dimensions in use: {found.active} of {found.latent}; {found.kl:.0f} nats a chunk")
    return result.finished


def _embeddings(name: str, tokenizer: Any) -> Any:
    model, own = load_model(name)
    if own.get_vocab() != tokenizer.get_vocab():
        raise QuickmergeError(
            f"--embeddings must name a model with the tokenizer that is used, got {name}, whose tokens are others"
        )
    return model.get_input_embeddings().weight


def check_speaking(drawing: dict[str, Any], reading: dict[str, Any], chunks: int) -> None:
    """Find out what is wrong with a CALM's settings before anything is trained."""
    from quickmerge.continuous.config import CalmConfig

    if chunks < 2:
        raise QuickmergeError(f"--chunks must be at least 2, or nothing is predicted, got {chunks}")
    CalmConfig(backbone=_backbone(reading, 1), autoencoder=None, **_head(drawing))


def _head(drawing: dict[str, Any]) -> dict[str, Any]:
    """Settings of `CalmConfig` from the options."""
    settings = dict(drawing)
    if "blocks" in settings:
        settings["head_settings"] = {"blocks": settings.pop("blocks")}
    return settings


def _backbone(reading: dict[str, Any], patch: int) -> dict[str, Any]:
    """Config of the language model; ``patch`` times as many positions for one that reads tokens."""
    from quickmerge.models import MODELS, cache_folder, find_model
    from quickmerge.models.embedded import prepare_embedded
    from quickmerge.models.read import read_config
    from quickmerge.training.calm import llama_shape

    if "backbone" in reading:
        name = reading["backbone"]
        folder = prepare_embedded(name, cache_folder(None), progress=True) if name in MODELS else find_model(name)
        shape: dict[str, Any] = read_config(str(folder)).to_dict()
        for own in ("vocab_size", "bos_token_id", "eos_token_id", "pad_token_id"):
            shape.pop(own, None)  # the tokens are others
        return shape
    return llama_shape(
        reading.get("width", 256), reading.get("layers", 4), reading.get("heads", 4), positions=2048 * patch
    )


def _goes_on(out: Path, resume: bool, whole: bool) -> bool:
    """Whether the second stage is resumed: where both are, it may not have begun yet."""
    from quickmerge.training.checkpoint import folders

    return resume and (not whole or bool(folders(out)))


def train_model(
    texts: Texts,
    found: Sources,
    out: Path,
    config: TrainingConfig,
    *,
    chunks: int,
    reading: dict[str, Any],
    drawing: dict[str, Any],
    resume: bool,
    whole: bool,
) -> None:
    """Train a CALM on the autoencoder."""
    from quickmerge.training.calm import energy_range, new_calm, train_calm

    autoencoder, tokenizer = found.model()
    dataset = windows(texts, tokenizer, autoencoder.config.patch, chunks)
    model = new_calm(autoencoder, backbone=_backbone(reading, 1), seed=config.seed, **_head(drawing))
    if model.config.head == "energy":
        nothing, everything = energy_range(model, dataset)
        print(f"energy score: {nothing:.3f} where nothing is known of what comes next, {everything:.3f} where all is")
    resume = _goes_on(out, resume, whole)
    tell(train_calm(model, dataset, config, out, tokenizer=tokenizer, resume=resume), out)


def train_discrete(
    texts: Texts,
    found: Sources,
    out: Path,
    config: TrainingConfig,
    *,
    chunks: int,
    reading: dict[str, Any],
    resume: bool,
) -> None:
    """Train an ordinary language model on the same windows."""
    from quickmerge.training.calm_discrete import new_discrete, train_discrete

    if found.named:
        autoencoder, tokenizer = found.model()
        patch = autoencoder.config.patch
    else:
        tokenizer, patch = found.tokens(texts), found.chunk
    dataset = windows(texts, tokenizer, patch, chunks)
    model = new_discrete(dataset, _backbone(reading, patch), config.seed)
    tell(train_discrete(model, dataset, config, out, tokenizer=tokenizer, resume=resume), out)


def tell(result: TrainingResult, out: Path) -> None:
    """Say how a stage ended."""
    told = "wrote" if result.finished else f"stopped after step {result.steps}; go on with --resume:"
    print(f"{told} {clean_name(out)}")
