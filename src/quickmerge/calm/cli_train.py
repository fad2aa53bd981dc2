"""The stages of ``quickmerge train calm``."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from quickmerge.console.options import load_model, one_sentence, progress, quiet, read_text
from quickmerge.console.training import OUT, Training, make_config, tell, text_documents, trains
from quickmerge.errors import QuickmergeError, near_match
from quickmerge.files import read_settings
from quickmerge.terminal import say
from quickmerge.training.config import TrainingConfig

if TYPE_CHECKING:
    from quickmerge.calm import CalmAutoencoder
    from quickmerge.calm.texts import CalmTexts

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
        from quickmerge.calm.texts import read_tokenizer, train_tokenizer

        if self._tokens is None:
            if self.vocabulary is not None:
                self._tokens = train_tokenizer(texts.documents, self.vocabulary)
            else:
                self._tokens = read_tokenizer("smollm2-135m" if self.tokenizer is None else self.tokenizer)
        return self._tokens

    def model(self) -> tuple[CalmAutoencoder, Any]:
        """The trained autoencoder and its tokenizer."""
        from quickmerge.calm import CalmAutoencoder
        from quickmerge.calm.texts import read_tokenizer
        from quickmerge.models.folder import check_model_folder
        from quickmerge.models.read import damaged, read_config, read_weights

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
    from quickmerge.calm.texts import CalmTexts

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
    from quickmerge.calm.evaluate import autoencoder_scores
    from quickmerge.calm.texts import document_chunks
    from quickmerge.calm.train import new_autoencoder, train_calm_autoencoder

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
    from quickmerge.calm.config import CalmConfig

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
    from quickmerge.calm.train import llama_shape
    from quickmerge.models import MODELS, cache_folder, find_model
    from quickmerge.models.embedded import EMBEDDED
    from quickmerge.models.read import read_config

    if "backbone" in reading:
        name = reading["backbone"]
        folder = EMBEDDED[name].prepare(cache_folder(None)) if name in MODELS else find_model(name)
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
    from quickmerge.calm.train import energy_range, new_calm, train_calm

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
    from quickmerge.calm.train import new_discrete, train_discrete

    if found.named:
        autoencoder, tokenizer = found.model()
        patch = autoencoder.config.patch
    else:
        tokenizer, patch = found.tokens(texts), found.chunk
    dataset = windows(texts, tokenizer, patch, chunks)
    model = new_discrete(dataset, _backbone(reading, patch), config.seed)
    tell(train_discrete(model, dataset, config, out, tokenizer=tokenizer, resume=resume), out)


# ``quickmerge train calm``: a language model that writes several tokens at a time as one vector.


EXAMPLE = "Example: quickmerge train calm --data texts/ --vocabulary 512 --latent 64 --ae-width 128 --out runs/calm"
STAGES = ("both", "autoencoder", "model", "discrete")
ENCODES = ("both", "autoencoder")  # stages in which an autoencoder is trained
SPEAKS = ("both", "model")  # stages in which a CALM is
READS = ("both", "model", "discrete")  # stages in which a backbone is
SHARED = ("precision", "seed", "save_every", "max_minutes", "log_with")
"""Options of the training that both stages have in common."""


@trains(
    steps=3000, batch=16, learning_rate=1e-3, warmup=50, final=0.05, weight_decay=0.1, betas=(0.9, 0.95), save_every=200
)
def calm(
    data: Annotated[list[Path], typer.Option("--data", help="Texts, folders of them, or a dataset on disk.")],
    out: OUT,
    stage: Annotated[
        str,
        typer.Option("--stage", help="autoencoder, model, both, or discrete (ordinary)."),
    ] = "both",
    autoencoder: Annotated[
        str | None,
        typer.Option("--autoencoder", help="A folder, a hub id. Default: OUT/autoencoder."),
    ] = None,
    tokenizer: Annotated[
        str | None,
        typer.Option("--tokenizer", help="A model or tokenizer.json. Default: smollm2-135m's."),
    ] = None,
    vocabulary: Annotated[
        int | None, typer.Option("--vocabulary", help="Make a tokenizer of so many tokens instead.")
    ] = None,
    patch: Annotated[int | None, typer.Option("--patch", help="Tokens of a chunk, K. Default: 4.")] = None,
    chunks: Annotated[int, typer.Option("--chunks", help="Chunks that the language model reads.")] = 64,
    latent: Annotated[int | None, typer.Option("--latent", help="Features of a vector. Default: 128.")] = None,
    ae_width: Annotated[
        int | None, typer.Option("--ae-width", help="Features inside the autoencoder. Default: 512.", hidden=True)
    ] = None,
    token_dropout: Annotated[
        float | None,
        typer.Option("--token-dropout", help="Share of tokens hidden from the encoder. Default: 0.15.", hidden=True),
    ] = None,
    latent_dropout: Annotated[
        float | None,
        typer.Option("--latent-dropout", help="Share of the vector's features dropped. Default: 0.15.", hidden=True),
    ] = None,
    kl_weight: Annotated[
        float | None,
        typer.Option("--kl-weight", help="Price of what a vector says, per nat. Default: 0.001.", hidden=True),
    ] = None,
    kl_floor: Annotated[
        float | None, typer.Option("--kl-floor", help="Nats that are free in each feature. Default: 0.5.", hidden=True)
    ] = None,
    sampled: Annotated[
        int | None,
        typer.Option(
            "--sampled", min=0, help="Tokens that each is compared with; 0: all. Default: 8192, or all.", hidden=True
        ),
    ] = None,
    embeddings: Annotated[
        str | None,
        typer.Option("--embeddings", help="Begin from this model's token embeddings; same tokenizer.", hidden=True),
    ] = None,
    ae_config: Annotated[
        Path | None, typer.Option("--ae-config", help="both: settings of the autoencoder's training, a file.")
    ] = None,
    ae_steps: Annotated[int | None, typer.Option("--ae-steps", help="both: the autoencoder's steps.")] = None,
    ae_batch: Annotated[
        int | None, typer.Option("--ae-batch", help="both: its batch, of 16 chunks each.", hidden=True)
    ] = None,
    ae_learning_rate: Annotated[
        float | None, typer.Option("--ae-learning-rate", help="both: its learning rate.", hidden=True)
    ] = None,
    backbone: Annotated[
        str | None, typer.Option("--backbone", help="Model whose architecture is used. Default: a Llama.")
    ] = None,
    layers: Annotated[int | None, typer.Option("--layers", help="Its blocks. Default: 4.")] = None,
    width: Annotated[int | None, typer.Option("--width", help="Its features. Default: 256.")] = None,
    heads: Annotated[int | None, typer.Option("--heads", help="Its attention heads. Default: 4.", hidden=True)] = None,
    head: Annotated[str | None, typer.Option("--head", help="energy, flow or diffusion: draws vectors.")] = None,
    blocks: Annotated[
        int | None, typer.Option("--blocks", help="Blocks of that head. Default: a quarter of the layers.", hidden=True)
    ] = None,
    samples: Annotated[
        int | None,
        typer.Option("--samples", help="Vectors drawn at each position in training. Default: 8.", hidden=True),
    ] = None,
    targets: Annotated[
        int | None,
        typer.Option("--targets", help="Draws of the true vector they are held against. Default: 100.", hidden=True),
    ] = None,
    alpha: Annotated[
        float | None, typer.Option("--alpha", help="Exponent of the energy score. Default: 1.", hidden=True)
    ] = None,
    held_out: Annotated[
        list[Path] | None,
        typer.Option("--held-out", help="Texts that training must share no passage with."),
    ] = None,
    column: Annotated[str | None, typer.Option("--column", help="Column of a dataset on disk.", hidden=True)] = None,
    *,
    training: Training,
) -> None:
    """Train a CALM: an autoencoder of chunks of tokens, and a language model on its vectors."""
    if stage not in STAGES:
        raise QuickmergeError(f"--stage must be one of {', '.join(STAGES)}, got {stage!r}{near_match(stage, STAGES)}")
    shape = {"latent": latent, "width": ae_width, "token_dropout": token_dropout, "latent_dropout": latent_dropout,
             "kl_weight": kl_weight, "kl_floor": kl_floor}  # fmt: skip
    own: dict[str, Any] = {"steps": ae_steps, "batch": ae_batch, "learning_rate": ae_learning_rate}
    drawing = {"head": head, "blocks": blocks, "samples": samples, "targets": targets, "alpha": alpha}
    reading = {"backbone": backbone, "layers": layers, "width": width, "heads": heads}
    for places, options in (
        (ENCODES, {"latent": latent, "ae-width": ae_width, "token-dropout": token_dropout, "kl-weight": kl_weight,
                   "latent-dropout": latent_dropout, "kl-floor": kl_floor, "sampled": sampled,
                   "embeddings": embeddings}),
        (("both",), {f"ae-{name.replace('_', '-')}": value for name, value in {"config": ae_config, **own}.items()}),
        (SPEAKS, drawing),
        (READS, reading),
        (("model", "discrete"), {"autoencoder": autoencoder}),
    ):  # fmt: skip
        _refuse(stage, places, options)
    if backbone is not None:
        for name, value in (("layers", layers), ("width", width), ("heads", heads)):
            if value is not None:
                raise QuickmergeError(f"--backbone has its own shape: give it or --{name}, not both")
    if tokenizer is not None and vocabulary is not None:
        raise QuickmergeError(f"give either --tokenizer or --vocabulary, got {tokenizer} and {vocabulary}")
    quiet()
    with one_sentence():
        # Settings first: what is wrong with them should not be told after an hour of the first stage.
        last = None if stage == "autoencoder" else training.config
        first = None
        if stage in ENCODES:
            first = _first_config(training, ae_config, _given(own) if stage == "both" else None)
        texts = Texts(text_documents(data, column), [read_text(path) for path in held_out or []])
        found = Sources(out, _fetched(autoencoder), tokenizer, vocabulary, patch)
        if stage in SPEAKS:
            check_speaking(_given(drawing), _given(reading), chunks)
        if first is not None:
            into = out / "autoencoder" if stage == "both" else out
            done = train_autoencoder(
                texts, found.tokens(texts), into, first, patch=found.chunk, shape=_given(shape), sampled=sampled,
                embeddings=embeddings, resume=training.resume,
            )  # fmt: skip
            if not done or last is None:
                return
        assert last is not None
        if stage == "discrete":
            train_discrete(texts, found, out, last, chunks=chunks, reading=_given(reading), resume=training.resume)
        else:
            train_model(
                texts, found, out, last, chunks=chunks, reading=_given(reading), drawing=_given(drawing),
                resume=training.resume, whole=stage == "both",
            )  # fmt: skip


def _first_config(training: Training, file: Path | None, own: dict[str, Any] | None) -> TrainingConfig:
    """Settings of the autoencoder's training.

    Args:
        training: what was said of the command's training.
        file: ``--ae-config``.
        own: where a model is trained after it, the autoencoder's own options; else all that was said is about it.
    """
    usual = {**training.usual, "learning_rate": 3e-3}
    if own is None:
        return make_config(usual, training.given)
    shared, typed = ({name: said[name] for name in SHARED if name in said} for said in (training.given, training.typed))
    if file is not None:
        said = TrainingConfig.from_file(file).to_dict()
        left = set(SHARED) - set(read_settings(file))
        shared |= {name: value for name, value in said.items() if name not in left}
    return make_config(usual, {**shared, **typed, **own})


def _given(options: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in options.items() if value is not None}


def _refuse(stage: str, stages: tuple[str, ...], options: dict[str, Any]) -> None:
    """An option that has no meaning in this stage is an error, not nothing."""
    for name in _given(options):
        if stage not in stages:
            raise QuickmergeError(f"--{name} has no meaning with --stage {stage}: it belongs to {' and '.join(stages)}")


def _fetched(autoencoder: str | None) -> Path | None:
    """The folder that ``--autoencoder`` names, fetched if it is an id of the hub."""
    if autoencoder is None:
        return None
    from quickmerge.models.kinds import KINDS
    from quickmerge.models.share import fetched

    return Path(fetched(autoencoder, KINDS["calm_autoencoder"])).expanduser()
