"""Tokens a second of a whole model with multipole attention (benchmarks/results/multipole_generate.json).

    python benchmarks/documents.py && python benchmarks/multipole_generate.py [--tokens 2048 4096 8064]

One prompt is read once; then the same number of tokens is generated after it in turns: with the model's attention on
transformers' cache, which copies the past at every step, with it on a cache that grows in place, and with multipole
attention on the latter. Each turn holds one update of the clusters.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import multipole_tables
import torch
from multipole_texts import pieces
from rich.console import Console
from torch import Tensor
from transformers import DynamicCache

import quickmerge as qm
from quickmerge.bench.harness import environment, interleave, now
from quickmerge.bench.stats import spread
from quickmerge.console.options import progress, quiet, write_json
from quickmerge.errors import QuickmergeError
from quickmerge.merge.run import cache_bytes
from quickmerge.models import cache_folder
from quickmerge.models.compat import cache_argument
from quickmerge.models.decoder import find_decoder, watch

HERE = Path(__file__).parent


@dataclass
class Way:
    """One way to generate: its cache, filled with the prompt, and what its turns took."""

    name: str
    cache: Any
    settings: qm.Multipole | None = None
    seconds: list[float] = field(default_factory=list)
    attention: list[float] = field(default_factory=list)
    update: list[float] = field(default_factory=list)


class Timed:
    """Seconds in the attention function of a model that is otherwise left alone."""

    def __init__(self) -> None:
        self.seconds = 0.0

    def attend(self, layer: int, call: Any, module: Any, args: tuple[Any, ...], kwargs: Any) -> Any:
        """See `quickmerge.models.decoder.Watcher`."""
        began = time.perf_counter()
        out = call(module, *args, **kwargs)
        self.seconds += time.perf_counter() - began
        return out


@contextmanager
def timing(model: Any) -> Iterator[Timed]:
    """Inside this the seconds of the model's own attention are counted."""
    timed = Timed()
    undo = watch(find_decoder(model), timed)
    try:
        yield timed
    finally:
        undo()


def ways_of(model: Any, ids: Tensor, budget: int) -> list[Way]:
    """The three ways, each with a cache that holds all but the last of ``ids (1, N)``."""
    plain = DynamicCache(config=model.config)
    with torch.inference_mode():
        model(ids[:, :-1], **cache_argument(model, plain), use_cache=True, logits_to_keep=1)
    grown = []
    for _ in range(2):
        cache = qm.MultipoleCache(model.config)
        for index, layer in enumerate(plain.layers):
            with torch.inference_mode():
                cache.update(layer.keys, layer.values, index)
        grown.append(cache)
    return [
        Way("dense", plain),
        Way("dense, cache in place", grown[0]),
        Way("multipole", grown[1], qm.Multipole(budget=budget)),
    ]


def turn(model: Any, way: Way, ids: Tensor, new: int, note: bool) -> Tensor:
    """Generate ``new`` tokens greedily, note the seconds, and take the tokens back from the cache; returns them."""
    kept = [getattr(layer, "clusters", None) for layer in way.cache.layers]
    began = now(model.device)
    context = timing(model) if way.settings is None else qm.multipole(model, way.settings)
    with torch.inference_mode(), context as inside:
        whole = model.generate(
            ids, attention_mask=torch.ones_like(ids), do_sample=False, min_new_tokens=new, max_new_tokens=new,
            pad_token_id=0, **cache_argument(model.generate, way.cache),
        )  # fmt: skip
    seconds = now(model.device) - began
    if way.settings is None:
        attention, update = inside.seconds, 0.0
    else:
        stats = inside.summary()
        attention, update = stats.attention_seconds, stats.update_seconds + stats.clustering_seconds
    way.cache.crop(ids.shape[1] - 1 - way.cache.get_seq_length())
    for layer, clusters in zip(way.cache.layers, kept, strict=True):
        if clusters is not None:  # those of the prompt, so that every turn starts from the same
            layer.clusters, layer.stale = clusters, False
    if note:
        way.seconds.append(seconds)
        way.attention.append(attention)
        way.update.append(update)
    return whole[0, ids.shape[1] :]


def measure(model: Any, ids: Tensor, args: argparse.Namespace, advance: Any) -> list[dict[str, Any]]:
    """All ways at one length."""
    ways = ways_of(model, ids, args.budget)
    turn(model, ways[-1], ids, 1, note=True)  # clusters the prompt
    clustering = ways[-1].update.pop()
    ways[-1].seconds.clear(), ways[-1].attention.clear()

    def written(way: Way, ids: Tensor, number: int, note: bool = True) -> Tensor:
        advance()
        return turn(model, way, ids, args.new, note=note)

    texts = interleave(ways, [ids], written, rounds=args.rounds, warm_up=partial(written, note=False))
    said = {way.name: own[-1] for way, own in zip(ways, texts, strict=True)}
    rows = []
    for way in ways:
        shares = [(a + u) / s for a, u, s in zip(way.attention, way.update, way.seconds, strict=True)]
        gain = [a / b for a, b in zip(ways[0].seconds, way.seconds, strict=True)]
        inside = [a / b for a, b in zip(ways[1].seconds, way.seconds, strict=True)]
        rows.append({
            "tokens": ids.shape[1], "new": args.new, "name": way.name,
            "tokens_per_second": args.new / statistics.median(way.seconds),
            **spread("speedup", gain), "speedup_in_place": statistics.median(inside),
            "attention_share": statistics.median(shares),
            "attention_seconds_per_step": statistics.median(way.attention) / args.new,
            "update_seconds_per_step": statistics.median(way.update) / args.new,
            "clustering_seconds": clustering if way.settings is not None else 0.0,
            "same_tokens": float((said[way.name] == said["dense"]).float().mean()),
            "cache_bytes": cache_bytes(way.cache),
            "cluster_bytes": sum(layer.clusters.bytes for layer in way.cache.layers if way.settings is not None),
        })  # fmt: skip
    return rows


def main() -> int:
    """Measure and write; 2 where something that is needed is missing."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--documents", type=Path, help="folder that documents.py filled")
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--tokens", type=int, nargs="+", default=[2048, 4096, 8064], help="of the prompt")
    parser.add_argument("--new", type=int, default=128, help="tokens that are generated in a turn")
    parser.add_argument("--budget", type=int, default=512)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, help="default: torch's own choice")
    parser.add_argument("--out", type=Path, default=HERE / "results" / "multipole_generate.json")
    args = parser.parse_args()
    if args.rounds < 2:
        parser.error(f"--rounds must be at least 2, got {args.rounds}")
    if args.threads:
        torch.set_num_threads(args.threads)
    quiet()
    rows: list[dict[str, Any]] = []
    try:
        model, tokenizer = qm.load(args.model)
        folder = (args.documents or cache_folder() / "documents") / "test"
        with progress() as bar:
            task = bar.add_task("generating", total=len(args.tokens) * 3 * (args.rounds + 1))
            for tokens in args.tokens:
                bar.update(task, description=f"after {tokens} tokens")
                ids = pieces(tokenizer, folder, tokens, 1)[0].ids
                rows += measure(model, ids, args, lambda: bar.update(task, advance=1))
    except QuickmergeError as error:
        Console(stderr=True).print(str(error), markup=False)
        return 2
    meta = {"model": args.model, "settings": asdict(qm.Multipole(budget=args.budget)), "rounds": args.rounds}
    write_json(args.out, {"rows": rows, "meta": meta, "environment": environment()})
    multipole_tables.generate(rows).print(Console())
    return 0


if __name__ == "__main__":
    sys.exit(main())
