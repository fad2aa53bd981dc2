"""``quickmerge train gumiho``: draft heads, with which a language model writes several tokens a step."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from quickmerge.console.options import MODEL, load_writer, one_sentence, progress, quiet, read_text
from quickmerge.console.training import OUT, Training, reads_once, tell, text_documents, trains
from quickmerge.errors import QuickmergeError
from quickmerge.terminal import say

if TYPE_CHECKING:
    from quickmerge.speculative.gumiho.texts import DraftTexts
    from quickmerge.training import TrainingConfig

EXAMPLE = (
    "Example: quickmerge train gumiho --model smollm2-135m --data texts/ --generate 2000 --draft-vocab 8192 "
    "--out runs/gumiho"
)


@trains(
    steps=2000, batch=8, learning_rate=1e-3, warmup=100, weight_decay=0.0, betas=(0.9, 0.95), clip=0.5, save_every=200
)
def gumiho(
    out: OUT,
    data: Annotated[
        list[Path] | None, typer.Option("--data", help="Texts, folders of them, or a dataset on disk.")
    ] = None,
    model: MODEL = "smollm2-135m",
    generate: Annotated[
        int, typer.Option("--generate", min=0, help="Prompts made of the texts that the model answers.")
    ] = 0,
    answers: Annotated[
        Path | None,
        typer.Option("--answers", help="The answers: written with --generate, else read."),
    ] = None,
    windows: Annotated[
        int | None, typer.Option("--windows", min=0, help="Windows of the texts to train on too. Default: all.")
    ] = None,
    length: Annotated[int, typer.Option("--length", help="Tokens of a text.")] = 256,
    serial: Annotated[int, typer.Option("--serial", help="Tokens drafted one after the other.")] = 2,
    serial_layers: Annotated[
        int, typer.Option("--serial-layers", help="Transformer layers that draft one after the other.", hidden=True)
    ] = 2,
    inner: Annotated[
        int | None, typer.Option("--inner", help="Width inside such a layer. Default: as in the model.", hidden=True)
    ] = None,
    heads: Annotated[int, typer.Option("--heads", help="Further tokens, each by a parallel head.")] = 5,
    mlp_depth: Annotated[int, typer.Option("--mlp-depth", help="Linear layers of a parallel head.", hidden=True)] = 6,
    mlp_width: Annotated[
        int | None, typer.Option("--mlp-width", help="Their width. Default: the model's.", hidden=True)
    ] = None,
    activation: Annotated[
        str, typer.Option("--activation", help="silu or relu, of parallel heads.", hidden=True)
    ] = "silu",
    draft_vocab: Annotated[
        int | None, typer.Option("--draft-vocab", help="Draft only the so many most frequent tokens.")
    ] = None,
    share: Annotated[
        float,
        typer.Option(
            "--share", help="Share of the tokens that the more expensive losses are taken at, in (0, 1].", hidden=True
        ),
    ] = 1.0,
    noise: Annotated[
        float, typer.Option("--noise", help="Noise on the features that the heads read.", hidden=True)
    ] = 0.2,
    token_loss: Annotated[
        float, typer.Option("--token-loss", help="Weight of the cross-entropies.", hidden=True)
    ] = 0.1,
    heads_loss: Annotated[
        float, typer.Option("--heads-loss", help="Weight of all parallel heads together.", hidden=True)
    ] = 0.1111,
    wait: Annotated[
        float,
        typer.Option("--wait", help="Share of the training in which parallel heads learn features.", hidden=True),
    ] = 0.2,
    keep_features: Annotated[
        bool | None,
        typer.Option(
            "--keep-features/--read-again",
            help="Read the texts once, or in every step. Default: once, where that fits.",
            hidden=True,
        ),
    ] = None,
    features: Annotated[
        Path | None, typer.Option("--features", help="Folder where what was read is kept.", hidden=True)
    ] = None,
    passage: Annotated[
        int, typer.Option("--passage", help="--generate: tokens of a text in a prompt.", hidden=True)
    ] = 96,
    answer_tokens: Annotated[
        int, typer.Option("--answer-tokens", help="--generate: of an answer at most.", hidden=True)
    ] = 160,
    temperature: Annotated[
        float, typer.Option("--temperature", help="--generate: of sampling; 0 is greedy.", hidden=True)
    ] = 0.7,
    at_once: Annotated[
        int, typer.Option("--at-once", help="--generate: prompts that are answered together.", hidden=True)
    ] = 64,
    held_out: Annotated[
        list[Path] | None, typer.Option("--held-out", help="Texts that training must share no passage with.")
    ] = None,
    column: Annotated[str | None, typer.Option("--column", help="Column of a dataset on disk.", hidden=True)] = None,
    half: Annotated[bool, typer.Option("--half", help="Store the heads in float16.", hidden=True)] = False,
    *,
    training: Training,
) -> None:
    """Train draft heads (Gumiho) for speculative decoding: on texts, and on the model's own answers."""
    quiet()
    from quickmerge.speculative.gumiho import LossWeights
    from quickmerge.speculative.gumiho.self_answers import Asking
    from quickmerge.speculative.gumiho.train import train_gumiho

    settings = training.config
    shape: dict[str, Any] = {"serial": serial, "serial_layers": serial_layers, "heads": heads, "mlp_depth": mlp_depth,
                             "activation": activation}  # fmt: skip
    shape |= {name: value for name, value in (("inner", inner), ("mlp_width", mlp_width)) if value is not None}
    with one_sentence():
        weights = LossWeights(token=token_loss, heads=heads_loss, wait=wait)
        asking = Asking(passage, answer_tokens, temperature, at_once, settings.seed)
        lm, tokenizer = load_writer(model)
        documents = text_documents(data, column) if data else []
        held = [read_text(path) for path in held_out or []]
        texts = _texts(
            lm, tokenizer, documents, held, generate=generate, asking=asking, windows=windows, length=length,
            answers=answers or (out / "answers.jsonl" if generate else None),
        )  # fmt: skip
        if draft_vocab is not None:
            drafted, covered = texts.frequent(draft_vocab)
            say(f"{len(drafted)} tokens can be drafted: {100 * covered:.1f} % of those in the texts")
        _keep(lm, texts, settings, keep_features, features)
        result = train_gumiho(
            lm, texts, settings, out, name=model, draft_vocabulary=draft_vocab, weights=weights, share=share,
            noise=noise, resume=training.resume, half=half, **shape,
        )  # fmt: skip
    tell(result, out)


def _texts(
    lm: Any,
    tokenizer: Any,
    documents: Any,
    held_out: list[str],
    *,
    generate: int,
    asking: Any,
    windows: int | None,
    length: int,
    answers: Path | None,
) -> DraftTexts:
    """What is trained on: windows of the texts, and the answers, which are written first if they have to be."""
    from quickmerge.datasets import TextWindows
    from quickmerge.speculative.gumiho.self_answers import read_answers, write_answers
    from quickmerge.speculative.gumiho.texts import DraftTexts

    if not len(documents) and answers is None:
        raise QuickmergeError("give texts with --data, the model's answers with --answers, or both")
    ids = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in held_out]
    told = []
    if generate:
        if not len(documents):
            raise QuickmergeError("--generate makes prompts of texts: name some with --data")
        assert answers is not None
        with progress() as bar:
            task = bar.add_task("answering prompts", total=generate)
            write_answers(
                lm, tokenizer, documents, answers, generate, asking, held_out=ids,
                progress=lambda done, _: bar.update(task, completed=done),
            )  # fmt: skip
    answered = [] if answers is None else read_answers(answers, lm, generate or None)
    if answered:
        told.append(f"{len(answered)} answers of {sum(len(one.answer) for one in answered)} tokens")
    plain = None
    if len(documents) and windows != 0:
        plain = TextWindows(tokenizer, documents, length, held_out=ids)
        told.append(f"{min(len(plain), windows or len(plain))} windows of {length} tokens")
    texts = DraftTexts(plain, answered, length=length, most=windows, seed=asking.seed)
    say(f"{' and '.join(told)}: {texts.tokens} tokens to read")
    return texts


def _keep(lm: Any, texts: DraftTexts, settings: TrainingConfig, wanted: bool | None, folder: Path | None) -> None:
    """Let the model read all texts once, where that is asked for, or fits and saves something."""
    import torch

    from quickmerge.models.identity import model_hash
    from quickmerge.speculative.gumiho.texts import keep_features

    if wanted is False and folder is not None:
        raise QuickmergeError("--features keeps what was read, and --read-again does not: give one of them")
    width = lm.get_output_embeddings().weight.shape[1]
    looks = settings.steps * settings.batch * settings.accumulate
    if not reads_once(wanted, "texts", len(texts), lambda: 2 * texts.tokens * width, looks=looks, folder=folder):
        return
    known = {"model": model_hash(lm), "precision": settings.precision}
    if settings.precision == "bf16":
        lm.to(torch.bfloat16)
    with progress() as bar:
        task = bar.add_task("reading the texts", total=len(texts))
        keep_features(lm, texts, known, folder=folder, advance=lambda count: bar.update(task, advance=count))
