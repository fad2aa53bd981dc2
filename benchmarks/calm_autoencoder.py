"""What autoencoders of chunks keep of texts that they were not trained on (results/calm_autoencoder.json).

    python benchmarks/documents.py
    python benchmarks/calm_autoencoder.py --models k4=runs/calm/k4/autoencoder,l32=runs/calm/ae-l32,...

The autoencoders are those of benchmarks/calm_autoencoder.toml. Each reads the chunks of the test documents, at most so
many of each document, and gives them back with noise on their vectors. Intervals are over documents. What stands in the
result file already, of the same weights and documents, is not measured again.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from calm import unseen_documents
from calm_tables import autoencoder_noise
from documents import SAY
from rich.console import Console

from quickmerge.bench.harness import environment
from quickmerge.bench.stats import ratio_interval
from quickmerge.calm.cli import parse_models
from quickmerge.calm.cli_train import AE_CHUNKS, Sources
from quickmerge.calm.evaluate import SIGMAS, AutoencoderScores, autoencoder_scores
from quickmerge.calm.texts import document_chunks
from quickmerge.console.options import one_sentence, progress, quiet, write_json
from quickmerge.errors import QuickmergeError, whole_number

HERE = Path(__file__).parent

Row = dict[str, Any]


def main() -> int:
    """Measure and write; 2 where something that is needed is missing."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", required=True, help="name=FOLDER of an autoencoder, with commas")
    parser.add_argument("--documents", type=Path, help="folder that documents.py filled (default: in the cache folder)")
    parser.add_argument("--chunks", type=int, default=256, help="of a document, from its start, at most")
    parser.add_argument("--out", type=Path, default=HERE / "results" / "calm_autoencoder.json")
    args = parser.parse_args()
    quiet()
    try:
        whole_number("--chunks", args.chunks)
        with one_sentence():
            measure(args)
    except (QuickmergeError, ValueError) as error:
        SAY.print(str(error), markup=False)
        return 2
    return 0


def measure(args: argparse.Namespace) -> None:
    """A row for each autoencoder, into one file."""
    folders = {name: Path(folder).expanduser() for name, folder in parse_models(args.models).items()}
    models = {name: Sources(folder, folder, None, None, None).model() for name, folder in folders.items()}
    spent = {name: seen(folder, models[name][0].config.patch) for name, folder in folders.items()}
    texts = unseen_documents(args.documents)
    meta = {"documents": digest(*texts.values()), "chunks": args.chunks, "sigmas": list(SIGMAS)}
    weights = {name: digest((folder / "model.safetensors").read_bytes()) for name, folder in folders.items()}
    before = known(args.out, meta)
    rows = []
    with progress() as bar:
        task = bar.add_task("measuring", total=len(models) * len(texts))
        for name, (model, tokenizer) in models.items():
            bar.update(task, description=name)
            if weights[name] in before:
                rows.append({**before[weights[name]], "method": name})
                bar.advance(task, len(texts))
                continue
            found = {}
            for file, text in texts.items():
                chunks = document_chunks(tokenizer, [text], model.config.patch)[: args.chunks]
                found[file] = (chunks, autoencoder_scores(model, chunks, sigmas=SIGMAS))
                bar.advance(task)
            # Which features are in use is a matter of all chunks together.
            whole = autoencoder_scores(model, torch.cat([chunks for chunks, _ in found.values()]), sigmas=())
            told = {**shape(model), **spent[name], **together(found, whole)}
            rows.append({"method": name, **told, "weights": weights[name]})
    write_json(args.out, {"rows": rows, "meta": meta, "environment": environment()})
    show(rows)


def known(path: Path, meta: Row) -> dict[str, Row]:
    """Rows of an earlier run on the same documents, by the hash of their weights."""
    try:
        earlier = json.loads(path.read_text(encoding="utf-8"))
        return {row["weights"]: row for row in earlier["rows"]} if earlier["meta"] == meta else {}
    except (OSError, ValueError, KeyError, TypeError):
        return {}


def digest(*parts: str | bytes) -> str:
    """A sha256 in hexadecimal."""
    whole = hashlib.sha256()
    for part in parts:
        whole.update(hashlib.sha256(part.encode() if isinstance(part, str) else part).digest())
    return whole.hexdigest()


def shape(model: Any) -> Row:
    """Settings that the table names, and parameters: all, and without the token embeddings."""
    config = model.config
    total = sum(p.numel() for p in model.parameters())
    return {
        "vocabulary": config.vocab_size - 1, "patch": config.patch, "latent": config.latent, "width": config.width,
        "kl_weight": config.kl_weight, "kl_floor": config.kl_floor, "token_dropout": config.token_dropout,
        "latent_dropout": config.latent_dropout, "parameters": total,
        "parameters_inside": total - model.embed.weight.numel(),
    }  # fmt: skip


def together(found: Mapping[str, tuple[Any, AutoencoderScores]], whole: AutoencoderScores) -> Row:
    """One row of the scores of all documents: shares of all tokens and chunks, with intervals over documents."""
    scores = [score for _, score in found.values()]
    tokens = np.array([score.tokens for score in scores], dtype=np.float64)
    chunks = np.array([len(part) for part, _ in found.values()], dtype=np.float64)
    row: Row = {"tokens": int(tokens.sum()), "chunks": int(chunks.sum())}
    for sigma in scores[0].accuracy:
        right = tokens * [score.accuracy[sigma] for score in scores]
        whole_chunks = chunks * [score.chunk_accuracy[sigma] for score in scores]
        low, high = ratio_interval(right, tokens)
        row |= {
            f"accuracy_{sigma:g}": float(right.sum() / tokens.sum()),
            f"accuracy_{sigma:g}_low": low, f"accuracy_{sigma:g}_high": high,
            f"chunk_accuracy_{sigma:g}": float(whole_chunks.sum() / chunks.sum()),
        }  # fmt: skip
    for key in ("posterior_accuracy", "cross_entropy", "kl", "active", "above_floor", "std"):
        row[key] = getattr(whole, key)
    return row


def seen(folder: Path, patch: int) -> Row:
    """Steps, tokens and seconds of the training, by its metrics.

    Raises:
        QuickmergeError: there are no metrics.
    """
    path = folder / "metrics.jsonl"
    try:
        last = json.loads(path.read_text(encoding="utf-8").splitlines()[-1])
        tokens = int(last["items"]) * AE_CHUNKS * patch
        return {"train_steps": int(last["step"]), "train_tokens": tokens, "train_seconds": float(last["seconds"])}
    except (OSError, ValueError, IndexError, KeyError) as error:
        raise QuickmergeError(
            f"{path} must say how much an autoencoder was trained, and can't be read ({error})"
        ) from None


def show(rows: Sequence[Row]) -> None:
    """Print what matters most."""
    autoencoder_noise(rows).print(Console())


if __name__ == "__main__":
    sys.exit(main())
