"""``quickmerge train calm``: a language model that writes several tokens at a time as one vector."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from quickmerge.cli.common import one_sentence, quiet
from quickmerge.errors import QuickmergeError, near_match

EXAMPLE = "Example: quickmerge train calm --data texts/ --vocabulary 512 --latent 64 --ae-width 128 --out runs/calm"
STAGES = ("both", "autoencoder", "model", "discrete")
ENCODES = ("both", "autoencoder")  # stages in which an autoencoder is trained
SPEAKS = ("both", "model")  # stages in which a CALM is
READS = ("both", "model", "discrete")  # stages in which a backbone is

STEPS = 3000


def calm(
    data: Annotated[
        list[Path], typer.Option("--data", help="Text files, folders of them, or a dataset on disk; several.")
    ],
    out: Annotated[Path, typer.Option("--out", help="Folder for the model, its checkpoints and metrics.")],
    stage: Annotated[
        str,
        typer.Option(
            "--stage",
            help="autoencoder; model, on an autoencoder; both, into OUT/autoencoder and OUT; or discrete: an ordinary "
            "language model on the same tokens, to compare with.",
        ),
    ] = "both",
    autoencoder: Annotated[
        Path | None,
        typer.Option(
            "--autoencoder",
            help="model, discrete: folder of one, which gives the tokenizer and the chunks "
            "too. Default of model: OUT/autoencoder.",
        ),
    ] = None,
    tokenizer: Annotated[
        str | None,
        typer.Option("--tokenizer", help="A model's name or folder, or tokenizer.json. Default: smollm2-135m's."),
    ] = None,
    vocabulary: Annotated[
        int | None, typer.Option("--vocabulary", help="Make a tokenizer of so many tokens of the texts instead.")
    ] = None,
    patch: Annotated[int | None, typer.Option("--patch", help="Tokens of a chunk, K. Default: 4.")] = None,
    chunks: Annotated[int, typer.Option("--chunks", help="Chunks that the language model reads at once.")] = 64,
    latent: Annotated[
        int | None, typer.Option("--latent", help="Features of the vector of a chunk. Default: 128.")
    ] = None,
    ae_width: Annotated[
        int | None, typer.Option("--ae-width", help="Features inside the autoencoder. Default: 512.")
    ] = None,
    token_dropout: Annotated[
        float | None, typer.Option("--token-dropout", help="Share of tokens hidden from the encoder. Default: 0.15.")
    ] = None,
    latent_dropout: Annotated[
        float | None, typer.Option("--latent-dropout", help="Share of the vector's features dropped. Default: 0.15.")
    ] = None,
    kl_weight: Annotated[
        float | None, typer.Option("--kl-weight", help="Price of what a vector says, per nat. Default: 0.001.")
    ] = None,
    kl_floor: Annotated[
        float | None, typer.Option("--kl-floor", help="Nats that are free in each feature. Default: 0.5.")
    ] = None,
    sampled: Annotated[
        int | None,
        typer.Option(
            "--sampled",
            min=0,
            help="Compare with so many sampled tokens; 0: with all. Default: 8192 of a "
            "vocabulary above 16384, else all.",
        ),
    ] = None,
    embeddings: Annotated[
        str | None, typer.Option("--embeddings", help="Begin from this model's token embeddings; same tokenizer.")
    ] = None,
    ae_config: Annotated[
        Path | None, typer.Option("--ae-config", help="both: training settings of the autoencoder, .toml or .json.")
    ] = None,
    ae_steps: Annotated[int | None, typer.Option("--ae-steps", help="both: the autoencoder's steps.")] = None,
    ae_batch: Annotated[int | None, typer.Option("--ae-batch", help="both: its batch, of 16 chunks each.")] = None,
    ae_learning_rate: Annotated[
        float | None, typer.Option("--ae-learning-rate", help="both: its learning rate.")
    ] = None,
    backbone: Annotated[
        str | None, typer.Option("--backbone", help="Model whose architecture is used, untrained. Default: a Llama.")
    ] = None,
    layers: Annotated[int | None, typer.Option("--layers", help="Its blocks. Default: 4.")] = None,
    width: Annotated[int | None, typer.Option("--width", help="Its features. Default: 256.")] = None,
    heads: Annotated[int | None, typer.Option("--heads", help="Its attention heads. Default: 4.")] = None,
    head: Annotated[
        str | None, typer.Option("--head", help="What draws the next vector: energy, flow or diffusion.")
    ] = None,
    blocks: Annotated[
        int | None, typer.Option("--blocks", help="Blocks of that head. Default: a quarter of the layers.")
    ] = None,
    samples: Annotated[
        int | None, typer.Option("--samples", help="Vectors drawn at each position in training. Default: 8.")
    ] = None,
    targets: Annotated[
        int | None, typer.Option("--targets", help="Draws of the true vector they are held against. Default: 100.")
    ] = None,
    alpha: Annotated[float | None, typer.Option("--alpha", help="Exponent of the energy score. Default: 1.")] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on from the newest checkpoint in --out.")] = False,
    config: Annotated[
        Path | None, typer.Option("--config", help="Training settings, .toml or .json; options go before it.")
    ] = None,
    steps: Annotated[int | None, typer.Option("--steps", help=f"Optimizer steps. Default: {STEPS}.")] = None,
    batch: Annotated[int | None, typer.Option("--batch", help="Windows per step and process. Default: 16.")] = None,
    learning_rate: Annotated[
        float | None, typer.Option("--learning-rate", help="Default: 0.003 for the autoencoder, else 0.001.")
    ] = None,
    precision: Annotated[str | None, typer.Option("--precision", help="no, bf16 or fp16. Default: no.")] = None,
    seed: Annotated[int | None, typer.Option("--seed", help="Default: 0.")] = None,
    save_every: Annotated[int | None, typer.Option("--save-every", help="Steps between checkpoints.")] = None,
    max_minutes: Annotated[
        float | None, typer.Option("--max-minutes", help="Stop each stage cleanly after so long.")
    ] = None,
    held_out: Annotated[
        list[Path] | None,
        typer.Option("--held-out", help="Texts to measure the autoencoder on; training shares no passage with them."),
    ] = None,
    column: Annotated[str | None, typer.Option("--column", help="Column of a dataset on disk.")] = None,
) -> None:
    """Train a CALM: an autoencoder of chunks of tokens, and a language model on its vectors."""
    if stage not in STAGES:
        raise QuickmergeError(f"--stage must be one of {', '.join(STAGES)}, got {stage!r}{near_match(stage, STAGES)}")
    shape = {"latent": latent, "width": ae_width, "token_dropout": token_dropout, "latent_dropout": latent_dropout,
             "kl_weight": kl_weight, "kl_floor": kl_floor}  # fmt: skip
    own: dict[str, Any] = {"config": ae_config, "steps": ae_steps, "batch": ae_batch, "learning_rate": ae_learning_rate}
    drawing = {"head": head, "blocks": blocks, "samples": samples, "targets": targets, "alpha": alpha}
    reading = {"backbone": backbone, "layers": layers, "width": width, "heads": heads}
    for places, options in (
        (ENCODES, {"latent": latent, "ae-width": ae_width, "token-dropout": token_dropout, "kl-weight": kl_weight,
                   "latent-dropout": latent_dropout, "kl-floor": kl_floor, "sampled": sampled,
                   "embeddings": embeddings}),
        (("both",), {f"ae-{name.replace('_', '-')}": value for name, value in own.items()}),
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
    from quickmerge.cli import train_calm_stages as work

    shared: dict[str, Any] = {
        "precision": precision,
        "seed": seed,
        "save_every": save_every,
        "max_minutes": max_minutes,
    }
    settings: dict[str, Any] = {"config": config, "steps": steps, "batch": batch, "learning_rate": learning_rate}
    with one_sentence():
        # Settings first: what is wrong with them should not be told after an hour of the first stage.
        last = None if stage == "autoencoder" else work.calm_config(**settings, **shared)
        first = None
        if stage in ENCODES:
            chosen = settings if stage == "autoencoder" else own
            first = work.calm_config(**chosen, **shared, usual={"learning_rate": 3e-3})
        texts = work.read_texts(data, held_out or [], column)
        found = work.Sources(out, autoencoder, tokenizer, vocabulary, patch)
        if stage in SPEAKS:
            work.check_speaking(_given(drawing), _given(reading), chunks)
        if first is not None:
            into = out / "autoencoder" if stage == "both" else out
            done = work.train_autoencoder(
                texts, found.tokens(texts), into, first, patch=found.chunk, shape=_given(shape), sampled=sampled,
                embeddings=embeddings, resume=resume,
            )  # fmt: skip
            if not done or last is None:
                return
        assert last is not None
        if stage == "discrete":
            work.train_discrete(texts, found, out, last, chunks=chunks, reading=_given(reading), resume=resume)
        else:
            work.train_model(
                texts, found, out, last, chunks=chunks, reading=_given(reading), drawing=_given(drawing),
                resume=resume, whole=stage == "both",
            )  # fmt: skip


def _given(options: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in options.items() if value is not None}


def _refuse(stage: str, stages: tuple[str, ...], options: dict[str, Any]) -> None:
    """An option that has no meaning in this stage is an error, not nothing."""
    for name in _given(options):
        if stage not in stages:
            raise QuickmergeError(f"--{name} has no meaning with --stage {stage}: it belongs to {' and '.join(stages)}")
