"""A packaged model behind ``transformers serve`` beside the plain one: writes benchmarks/results/server.json.

    python benchmarks/server.py [--clients 4] [--requests 200] [--plain 60] [--prompts 20]

Two servers run on two ports. First each prompt is asked of both alone, one after the other, in an order that turns;
what comes is the text that the same prompt must get later. Then the clients ask at once, in turns of one server and of
the other, so that both see the same machine: a turn is a share of the requests, each client taking the next prompt
that nobody has taken. All is greedy, streamed by the openai client, and timed by it. Prompts are documents in which a
code stands that is asked for, each another one, so that a text that went to the wrong client would be known by it.
"""

from __future__ import annotations

import argparse
import os
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import openai
from rich.console import Console

import quickmerge as qm
from quickmerge.bench.harness import environment, interleave
from quickmerge.console.options import progress, quiet, write_json
from quickmerge.datasets.tasks import TaskMaker
from quickmerge.errors import QuickmergeError
from quickmerge.models.load import model_folder
from quickmerge.serve.package import package

HERE = Path(__file__).parent
PATIENCE = 180
"""Seconds that a server may take to start."""
TURN = 8
"""Requests of a turn of one server, the same for both: a turn begins and ends with less to wait for."""
Row = dict[str, Any]


def main() -> int:
    """Start both servers, ask, and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--keep", type=float, default=0.4)
    parser.add_argument("--clients", type=int, default=4)
    parser.add_argument("--requests", type=int, default=200, help="to the packaged server")
    parser.add_argument("--plain", type=int, default=60, help="requests to the plain server")
    parser.add_argument("--prompts", type=int, default=20, help="different ones")
    parser.add_argument("--tokens", type=int, default=1536, help="of a prompt")
    parser.add_argument("--max-new-tokens", type=int, default=4)
    parser.add_argument("--threads", type=int, default=1, help="of each server")
    parser.add_argument("--out", type=Path, default=HERE / "results" / "server.json")
    args = parser.parse_args()
    quiet()
    prompts = documents(args.model, args.prompts, args.tokens)
    recipe = qm.Recipe(merge=qm.QuickMerge(keep=args.keep))
    with tempfile.TemporaryDirectory() as folder:
        packaged = package(args.model, recipe, Path(folder) / "packaged", link="symbolic").folder
        with (
            serving(packaged, args.threads, "--trust-remote-code") as quick,
            serving(model_folder(args.model), args.threads) as plain,
            progress() as bar,
        ):
            arms = [Asked("packaged", *quick, args.max_new_tokens), Asked("plain", *plain, args.max_new_tokens)]
            total = 2 * len(prompts) + args.requests + args.plain
            task = bar.add_task("asking", total=total)
            records = ask(arms, prompts, args, lambda: bar.update(task, advance=1))
    rows = [row for load in (1, args.clients) for arm in arms if (row := row_of(records, arm.name, load))]
    meta = {
        "model": args.model, "recipe": recipe.as_dict(), "dtype": "float32", "threads": args.threads,
        "max_new_tokens": args.max_new_tokens, "prompts": len(prompts), "environment": environment(),
    }  # fmt: skip
    write_json(args.out, {"rows": rows, "records": records, "meta": meta})
    for row in rows:
        Console().print({key: round(v, 3) if isinstance(v, float) else v for key, v in row.items()})
    return 0


def documents(model: str, count: int, tokens: int) -> list[str]:
    """Prompts of about so many tokens, each with a code of its own."""
    tokenizer = qm.load(model)[1]
    maker = TaskMaker(tokenizer, tokens)
    found = []
    for seed in range(count):
        sample = maker.make("needle", seed)
        question = sample.queries[0].question
        found.append(f"{tokenizer.decode(sample.document)}\n\n{question[0].upper()}{question[1:]}")
    return found


@contextmanager
def serving(folder: Path, threads: int, *options: str) -> Iterator[tuple[str, str]]:
    """A stock server of a folder on a free port: its address and the name of the model; stopped in the end."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [Path(sys.executable).with_name("transformers"), "serve", folder, "--device", "cpu", "--dtype", "float32"]
    command += ["--host", "127.0.0.1", "--port", port, *options]
    with tempfile.TemporaryFile() as said:
        server = subprocess.Popen(
            [str(word) for word in command],
            stdout=said,
            stderr=said,
            env=os.environ | {"OMP_NUM_THREADS": str(threads)},
        )
        try:
            end = time.monotonic() + PATIENCE
            while not healthy(port):
                if server.poll() is not None or time.monotonic() > end:
                    said.seek(0)
                    raise QuickmergeError(f"the server has not started: {said.read().decode()[-2000:]}")
                time.sleep(0.5)
            yield f"http://127.0.0.1:{port}/v1", str(folder)
        finally:
            server.terminate()
            server.wait(30)


def healthy(port: int) -> bool:
    """Whether the server answers."""
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5) as answer:
            return bool(answer.status == 200)
    except OSError:
        return False


class Asked:
    """One server, as its clients see it."""

    def __init__(self, name: str, address: str, model: str, most: int) -> None:
        self.name, self._model, self._most = name, model, most
        self._client = openai.OpenAI(base_url=address, api_key="none", max_retries=0, timeout=600)

    def __call__(self, prompt: str) -> Row:
        """The text, seconds to its first token and to its end; an error in its place where there was one."""
        began, first, text, ended, tokens = time.perf_counter(), None, "", None, 0
        try:
            stream = self._client.chat.completions.create(
                model=self._model, messages=[{"role": "user", "content": prompt}], temperature=0,
                max_tokens=self._most, stream=True,
            )  # fmt: skip
            for chunk in stream:
                choice = chunk.choices[0]
                if choice.delta.content:
                    first = first or time.perf_counter() - began
                    text += choice.delta.content
                ended = choice.finish_reason or ended
                tokens = chunk.usage.prompt_tokens if chunk.usage else tokens
        except openai.OpenAIError as error:
            return {"server": self.name, "error": str(error)}
        seconds = time.perf_counter() - began
        return {"server": self.name, "text": text, "ended": ended, "read": tokens, "first_seconds": first,
                "seconds": seconds}  # fmt: skip


def ask(arms: Sequence[Asked], prompts: Sequence[str], args: Any, advance: Callable[[], None]) -> list[Row]:
    """Everything that is asked, alone and at once; each record with whether its text is that of the prompt alone."""

    def alone(arm: Asked, prompt: str, number: int) -> Row:
        row = arm(prompt)
        advance()
        return {**row, "clients": 1, "prompt": number}

    found = interleave(arms, prompts, alone, warm_up=lambda arm, prompt, number: arm(prompt))
    texts = {arm.name: {row["prompt"]: row.get("text") for row in rows} for arm, rows in zip(arms, found, strict=True)}
    records = [row for rows in found for row in rows]
    with ThreadPoolExecutor(args.clients) as clients:
        for arm, numbers in turns(arms, {"packaged": args.requests, "plain": args.plain}):
            chosen = [number % len(prompts) for number in numbers]

            def one(number: int, arm: Asked = arm) -> Row:
                row = arm(prompts[number])
                advance()
                return {**row, "clients": args.clients, "prompt": number}

            records += clients.map(one, chosen)
    for row in records:
        own = texts[row["server"]]
        row["same"] = row.get("text") == own[row["prompt"]]
        row["of_another"] = not row["same"] and row.get("text") in own.values()
    return records


def turns(arms: Sequence[Asked], counts: dict[str, int]) -> list[tuple[Asked, range]]:
    """Turns of `TURN` requests, those of both servers spread evenly over the whole time."""
    found = [
        ((first + TURN / 2) / counts[arm.name], arm, range(first, min(first + TURN, counts[arm.name])))
        for arm in arms
        for first in range(0, counts[arm.name], TURN)
    ]
    return [(arm, numbers) for _, arm, numbers in sorted(found, key=lambda each: each[0])]


def row_of(records: Sequence[Row], server: str, clients: int) -> Row | None:
    """What one server did for so many clients: what was lost or mixed, and seconds."""
    mine = [row for row in records if row["server"] == server and row["clients"] == clients]
    if not mine:
        return None
    whole = [row for row in mine if row.get("ended")]
    out: Row = {
        "server": server, "clients": clients, "requests": len(mine), "lost": len(mine) - len(whole),
        "mixed": sum(row["of_another"] for row in mine), "same": sum(row["same"] for row in mine),
        "texts": len({row["text"] for row in whole}), "read": float(np.mean([row["read"] for row in whole])),
    }  # fmt: skip
    for name in ("first_seconds", "seconds"):
        values = [row[name] for row in whole if row[name] is not None]
        out |= {name: float(np.median(values)), f"{name}_p95": float(np.percentile(values, 95))}
    return out


if __name__ == "__main__":
    sys.exit(main())
