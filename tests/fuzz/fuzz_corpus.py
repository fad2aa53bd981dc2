"""Hostile inputs, each made of a sound one: what is listed here stays, and fields are drawn by a seed."""

# ruff: noqa: E501  (lists of inputs, one idea a line)
from __future__ import annotations

import json
import os
import random
import shutil
import struct
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from fuzz_bases import COMMANDS
from fuzz_worker import CANARY, Case

NESTED = "[" * 10**5 + "]" * 10**5
VALUES: list[Any] = [
    None, True, False, 0, 1, -1, 3, 7, 2**31, 2**63, 10**8, 10**30, 0.5, -0.5, 1e300, float("nan"), float("inf"), "",
    "x", "\x1b[31mred", "\ud800", "[red]", "gpj.\u202eexe", "../../../etc/passwd", "os.system", [], [1], [0, 0], ["x"],
    [[]], {}, {"x": 1}, {"type": "x", "rope_type": "linear", "factor": -1},
]  # fmt: skip
WHOLES: dict[str, Callable[[Path], object]] = {
    "empty": lambda path: path.write_bytes(b""),
    "null": lambda path: path.write_text("null"),
    "a list": lambda path: path.write_text("[]"),
    "an empty object": lambda path: path.write_text("{}"),
    "a number": lambda path: path.write_text("5"),
    "broken off": lambda path: path.write_bytes(path.read_bytes()[: path.stat().st_size // 2]),
    "nested": lambda path: path.write_text(NESTED),
    "nested objects": lambda path: path.write_text('{"a":' * 50_000 + "1" + "}" * 50_000),
    "UTF-16": lambda path: path.write_bytes(path.read_bytes().decode().encode("utf-16")),
    "bytes": lambda path: path.write_bytes(bytes(range(256)) * 16),
    "zeros": lambda path: path.write_bytes(bytes(4096)),
    "huge": lambda path: path.write_text('{"a": "' + "x" * (80 << 20) + '"}'),
    "a folder": lambda path: (path.unlink(), path.mkdir()),
    "a pipe": lambda path: (path.unlink(), os.mkfifo(path)),
    "/dev/zero": lambda path: (path.unlink(), path.symlink_to("/dev/zero")),
    "a link to nothing": lambda path: (path.unlink(), path.symlink_to("nowhere")),
    "a link to itself": lambda path: (path.unlink(), path.symlink_to(path.name)),
    "gone": lambda path: path.unlink(),
}  # fmt: skip
PICKLE = b"cos\nsystem\n(S'touch " + CANARY.encode() + b"'\ntR."
TEMPLATES = [
    "{{ raise_exception('\x1b[31mno') }}", "{{ ''.__class__.__mro__ }}", "{% for i in range(99999999) %}x{% endfor %}",
    "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}", "{{ 'x' * 10**10 }}", "{% if",
    "{{ messages[7].content }}", "{{ 1 / 0 }}", "", "nothing", "{{ messages }}" * 999, "{{ 2 ** 2 ** 30 }}",
    "{{ messages[0].content.format.__globals__ }}", "{% include '/etc/passwd' %}", "{{ lipsum() }}", "{{ cycler }}",
    "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "\x1b[31m{{ messages[0].content }}\x1b[0m", "{{ '%1000000000s' % 'x' }}",
    "{% set x = namespace(a='x' * 99999) %}{% for i in range(99999) %}{% set x.a = x.a + x.a %}{% endfor %}",
]  # fmt: skip


def folder_case(
    base: Path, kind: str, name: str, change: Callable[[Path], object], command: int = 0, refused: bool = False
) -> Case:
    """A sound folder of a kind with one change, opened by one of the commands for it."""

    def build(work: Path) -> list[str | bytes]:
        it = work / "it"
        shutil.copytree(base / kind, it)
        change(it)
        words = {"it": it, "base": base, "out": work.parent / "out"}
        return [part.format(**words) for part in COMMANDS[kind][command]]

    return Case(f"{kind}, {COMMANDS[kind][command][0]}: {name}", build, refused)


def json_files(folder: Path) -> list[Path]:
    """The small JSON files of a folder and those below it, as paths within it."""
    return sorted(p.relative_to(folder) for p in folder.rglob("*.json") if p.stat().st_size < 2**20)


def places(data: Any, at: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Where in some JSON a value stands, at most four levels deep and ten entries of a list or of a long object."""
    entries: list[tuple[Any, Any]] = []
    if isinstance(data, dict):
        entries = list(data.items()) if len(data) < 80 else list(data.items())[:10]
    elif isinstance(data, list):
        entries = list(enumerate(data[:10]))
    for key, value in entries:
        yield (*at, key)
        if len(at) < 3:
            yield from places(value, (*at, key))


def with_value(path: Path, at: tuple[Any, ...], value: Any) -> None:
    """Put a value in a place of a JSON file."""
    data = json.loads(path.read_text())
    inside = data
    for key in at[:-1]:
        inside = inside[key]
    inside[at[-1]] = value
    path.write_text(json.dumps(data))


def fields(base: Path, seed: int, each: int) -> list[Case]:
    """For every JSON file of every kind of folder, ``each`` draws of a field, a value and a command."""
    cases = []
    for kind in COMMANDS:
        for file in json_files(base / kind):
            draws = random.Random(f"{seed} {kind} {file}")
            found = list(places(json.loads((base / kind / file).read_text())))
            for _ in range(each if found else 0):
                at, value = draws.choice(found), draws.choice(VALUES)
                command = draws.randrange(len(COMMANDS[kind]))
                name = f"{file} {'.'.join(map(str, at))} = {ascii(value)[:40]}"
                cases.append(folder_case(
                    base, kind, name, lambda it, file=file, at=at, value=value: with_value(it / file, at, value), command
                ))  # fmt: skip
    return cases


def wholes(base: Path) -> list[Case]:
    """Every JSON file of every kind of folder as something that is no such file at all."""
    return [
        folder_case(base, kind, f"{file} is {what}", lambda it, file=file, spoil=spoil: spoil(it / file))
        for kind in COMMANDS for file in json_files(base / kind) for what, spoil in WHOLES.items()
        if what != "huge" or file.name == "config.json"
    ]  # fmt: skip


# Weights ----------------------------------------------------------------------------------------------------------


def _tensors(change: Callable[[dict[str, Any]], object]) -> Callable[[Path], object]:
    def spoil(it: Path) -> None:
        from safetensors.torch import load_file, save_file

        path = next(iter(sorted(it.rglob("*.safetensors"))))
        held = load_file(path)
        change(held)
        save_file(held, path, {"format": "pt"})

    return spoil


def _first(change: Callable[[Any], Any]) -> Callable[[dict[str, Any]], object]:
    def spoil(held: dict[str, Any]) -> None:
        name = max(held, key=lambda one: held[one].numel())
        held[name] = change(held[name].clone()).contiguous()

    return spoil


def _header(change: Callable[[dict[str, Any]], object]) -> Callable[[Path], object]:
    def spoil(it: Path) -> None:
        path = next(iter(sorted(it.rglob("*.safetensors"))))
        data = path.read_bytes()
        size = int.from_bytes(data[:8], "little")
        header = json.loads(data[8 : 8 + size])
        change(header)
        text = json.dumps(header).encode()
        path.write_bytes(struct.pack("<Q", len(text)) + text + data[8 + size :])

    return spoil


def _one(header: dict[str, Any]) -> dict[str, Any]:
    entry: dict[str, Any] = next(value for name, value in sorted(header.items()) if name != "__metadata__")
    return entry


def _raw(change: Callable[[bytes], bytes]) -> Callable[[Path], object]:
    def spoil(it: Path) -> None:
        path = next(iter(sorted(it.rglob("*.safetensors"))))
        path.write_bytes(change(path.read_bytes()))

    return spoil


def _into(x: Any, value: float) -> Any:
    x.view(-1)[x.numel() // 2] = value
    return x


def _as(dtype: str) -> Callable[[dict[str, Any]], object]:
    import torch

    return _first(lambda x: x.to(getattr(torch, dtype)))


WEIGHTS: dict[str, tuple[Callable[[Path], object], bool]] = {
    "a NaN": (_tensors(_first(lambda x: _into(x, float("nan")))), True),
    "an infinity": (_tensors(_first(lambda x: _into(x, float("inf")))), True),
    "all NaN": (_tensors(_first(lambda x: x * float("nan"))), True),
    "integers": (lambda it: _tensors(_as("int64"))(it), True),
    "booleans": (lambda it: _tensors(_as("bool"))(it), True),
    "complex numbers": (lambda it: _tensors(_as("complex64"))(it), True),
    "float64": (lambda it: _tensors(_as("float64"))(it), False),
    "another shape": (_tensors(_first(lambda x: x.reshape(-1)[:-1])), True),
    "a tensor less": (_tensors(lambda held: held.pop(sorted(held)[0])), False),
    "another name": (_tensors(lambda held: held.update({"\x1b[31mx": held.pop(sorted(held)[0])})), False),
    "a tensor more": (_tensors(lambda held: held.update({"more": next(iter(held.values())).clone()})), False),
    "no tensors": (_tensors(lambda held: held.clear()), True),
    "I32 for F32": (_header(lambda h: _one(h).update(dtype="I32")), True),
    "an unknown type": (_header(lambda h: _one(h).update(dtype="\x1b[31m")), True),
    "a negative shape": (_header(lambda h: _one(h).update(shape=[-1])), True),
    "a huge shape": (_header(lambda h: _one(h).update(shape=[2**40, 2**20])), True),
    "offsets backwards": (_header(lambda h: _one(h).update(data_offsets=[8, 0])), True),
    "offsets of text": (_header(lambda h: _one(h).update(data_offsets=["0", "8"])), True),
    "an entry of a number": (_header(lambda h: h.update(x=5)), True),
    "a header without end": (_raw(lambda data: b"\xff" * 8 + data[8:]), True),
    "a header of nothing": (_raw(lambda data: bytes(8) + data[8:]), True),
    "a header too long": (_raw(lambda data: struct.pack("<Q", len(data) * 2) + data[8:]), True),
    "a header of 2 GB": (_raw(lambda data: struct.pack("<Q", 2**31) + data[8:]), True),
    "a nested header": (_raw(lambda data: struct.pack("<Q", 200_014) + b'{"a":' + NESTED.encode() + b"}" + b" " * 8), True),
    "broken off": (_raw(lambda data: data[:-7]), True),
    "more behind": (_raw(lambda data: data + b"x" * 99), True),
    "seven bytes": (_raw(lambda data: data[:7]), True),
    "zeros": (_raw(lambda data: bytes(len(data))), True),
    **{f"{what} for a file": (lambda it, what=what: WHOLES[what](next(iter(sorted(it.rglob("*.safetensors"))))), True)
       for what in ("empty", "a folder", "a pipe", "/dev/zero", "a link to nothing", "a link to itself", "gone")},
}  # fmt: skip


def _index(weight_map: Any) -> Callable[[Path], object]:
    def spoil(it: Path) -> None:
        (it / "model.safetensors").rename(it / "a.safetensors")
        (it / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))

    return spoil


def _pickled(it: Path) -> None:
    (it / "model.safetensors").unlink()
    for name in ("pytorch_model.bin", "model.bin", "training_args.bin", "optimizer.pt"):
        (it / name).write_bytes(PICKLE)


def _code(it: Path) -> None:
    with_value(it / "config.json", ("auto_map",), {"AutoConfig": "evil.C", "AutoModelForCausalLM": "evil.M"})
    with_value(it / "config.json", ("model_type",), "evil")
    for name in ("evil.py", "modeling_evil.py", "configuration_evil.py", "__init__.py"):
        (it / name).write_text(f"open({CANARY!r}, 'w')\n")


MODELS: dict[str, tuple[Callable[[Path], object], bool]] = {
    "an index of numbers": (_index({"a": 5}), True),
    "an index of a list": (_index([1]), True),
    "an index that leads elsewhere": (_index({"a": "../model/model.safetensors"}), True),
    "an index of /etc/passwd": (_index({"a": "/etc/passwd"}), True),
    "an index of a missing file": (_index({"a": "b.safetensors"}), True),
    "an index with a zero byte": (_index({"a": "a\0.safetensors"}), True),
    "an index of nothing": (_index({}), True),
    "a pickle": (_pickled, True),
    "code of its own": (_code, True),
    **{f"chat template {ascii(text)[:50]}": (lambda it, text=text: (it / "chat_template.jinja").write_text(text), False)
       for text in TEMPLATES},
    "a chat template of 64 MB": (lambda it: (it / "chat_template.jinja").write_text("x" * (64 << 20)), False),
    "a chat template that is a pipe": (lambda it: os.mkfifo(it / "chat_template.jinja"), True),
    "tokens that are commands": (
        lambda it: (it / "tokenizer.json").write_text(
            (it / "tokenizer.json").read_text().replace("<|endoftext|>", "\\u001b[31m\\u202e[red]")
        ), False,
    ),
}  # fmt: skip


def weights(base: Path) -> list[Case]:
    """Damaged, mislabelled and wrong weights of every kind, and what only models have."""
    cases = [
        folder_case(base, kind, f"weights with {name}" if " for a file" not in name else name, spoil, refused=refused)
        for kind in COMMANDS for name, (spoil, refused) in WEIGHTS.items()
    ]  # fmt: skip
    return cases + [
        folder_case(base, "model", name, spoil, command, refused)
        for name, (spoil, refused) in MODELS.items() for command in ((0, 1) if "template" not in name else (1,))
    ]  # fmt: skip


def tokenizers(base: Path, seed: int, count: int) -> list[Case]:
    """Fields of a model's tokenizer.json, and bytes of it."""
    draws = random.Random(f"{seed} tokenizer")
    found = list(places(json.loads((base / "model" / "tokenizer.json").read_text())))
    cases = []
    for _ in range(count):
        at, value, command = draws.choice(found), draws.choice(VALUES), draws.randrange(2)
        cases.append(folder_case(
            base, "model", f"tokenizer.json {'.'.join(map(str, at))} = {ascii(value)[:40]}",
            lambda it, at=at, value=value: with_value(it / "tokenizer.json", at, value), command,
        ))  # fmt: skip
    return cases + [
        folder_case(base, "model", f"tokenizer.json is {what}", lambda it, spoil=spoil: spoil(it / "tokenizer.json"))
        for what, spoil in WHOLES.items()
    ]  # fmt: skip
