"""Hostile images, videos, texts, names, lists and places to write to."""

# ruff: noqa: E501  (lists of inputs, one idea a line)
from __future__ import annotations

import os
import random
import shutil
import struct
import zlib
from collections.abc import Callable
from pathlib import Path

from fuzz_bases import TEXT
from fuzz_corpus import NESTED, WHOLES
from fuzz_worker import CANARY, Case

POSTSCRIPT = (
    b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 32 32\n(" + CANARY.encode() + b") (w) file closefile showpage\n"
)
SVG = b'<svg xmlns="http://www.w3.org/2000/svg"><image href="file:///etc/passwd"/></svg>'
PLAYLIST = b"#EXTM3U\n#EXT-X-TARGETDURATION:9\n#EXTINF:9,\nfile:///etc/passwd\n#EXT-X-ENDLIST\n"
CONCAT = b"ffconcat version 1.0\nfile /etc/passwd\nfile clip.mp4\n"
NAMES = [
    "gpj.\u202eexe.png", "\x1b[31mred.png", "a\nb.png", "[red]x[bold].png", "[link=x]y.png", ":smile:.png", "-rf.png",
    "\udcff\udcfe.png", " .png", "<script>alert(1)<.png", "%s%n.png", "{0}.png", "a" * 250 + ".png", "\u200b.png",
    "\x07\x08.png", "\x9b31m.png", "&amp;.png", "שלום.png", "\u2028.png",
]  # fmt: skip
TEXTS: dict[str, bytes] = {
    "empty": b"", "spaces": b" \n\t\r\n", "a byte order mark": b"\xef\xbb\xbf", "two marks": b"\xef\xbb\xbf" * 2,
    "UTF-16": "the sea ".encode("utf-16") * 20, "latin": b"caf\xe9 " * 40, "zero bytes": b"the sea \0" * 30,
    "surrogates": b"\xed\xa0\x80 the sea " * 30, "cut off": "the sea é".encode()[:-1], "overlong": b"\xc0\xaf" * 40,
    "controls": bytes(range(1, 32)) * 8 + b"the sea " * 20, "escapes": b"\x1b[2J\x1b]0;title\x07\xc2\x9b31m " * 30,
    "markup": b"[red]the sea[/red] [/] [link=http://x]y[/link] :smile: " * 20, "html": b"<script>alert(1)</script> " * 30,
    "directions": "\u202ethe \u2066sea\u2069 שלום \u200f".encode() * 30, "one line": b"sea" * 300_000,
    "one letter": b"a" * 1_000_000, "spaces and a word": b" " * 1_000_000 + b"sea", "combining": "e\u0301\u0302".encode() * 5000,
    "noncharacters": "\ufffe\uffff\U0010ffff".encode() * 60, "special tokens": b"<|endoftext|><|im_start|>" * 60,
    "numbers": b"1234567890" * 300, "50 MB": b"the sea was calm " * 3_000_000,
}  # fmt: skip
LISTS: dict[str, bytes] = {
    "empty": b"", "numbers": b"5\n6\n", "null": b"null\n", "nested": NESTED.encode() + b"\n",
    "an empty object": b"{}\n", "a prompt of a number": b'{"prompt": 5}\n', "a prompt of nothing": b'{"prompt": ""}\n',
    "half a character": b'{"prompt": "\\ud800 sea"}\n', "escapes": b'{"prompt": "\\u001b[31m the sea", "kind": "\\u001b[2J"}\n',
    "markup": b'{"prompt": "the sea", "kind": "[red]"}\n', "broken": b'{"prompt": "the sea"\n', "bytes": bytes(range(256)),
    "an image elsewhere": b'{"image": "../../../etc/passwd", "questions": []}\n',
    "an image that is absolute": b'{"image": "/etc/passwd", "questions": [{"kind": "a", "question": "b", "answer": "c"}]}\n',
    "questions of numbers": b'{"image": "0.png", "questions": [5]}\n', "no questions": b'{"image": "0.png"}\n',
    "kinds that are commands": b'{"image": "0.png", "questions": [{"kind": "\\u001b[31m[red]", "question": "what ?", "answer": "red"}]}\n',
    "a zero byte": b'{"image": "0\\u0000.png", "questions": []}\n', "labels twice": b"red\nred\n", "label\x1b": b"\x1b[31mred\nblue\n",
}  # fmt: skip


def _file(name: str, ending: str, data: Callable[[Path], bytes], argv: list[str], base: Path) -> Case:
    def build(work: Path) -> list[str | bytes]:
        path = work / f"it.{ending}"
        path.write_bytes(data(base))
        words = {"it": path, "base": base, "out": work.parent / "out"}
        return [part.format(**words) for part in argv]

    return Case(name, build)


def _png(width: int, height: int, more: bytes = b"") -> bytes:
    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    head = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", head)
        + more
        + chunk(b"IDAT", zlib.compress(bytes(999)))
        + chunk(b"IEND", b"")
    )


def _flipped(data: bytes, draws: random.Random) -> bytes:
    spoilt = bytearray(data)
    for _ in range(draws.choice((1, 2, 8, 64))):
        spoilt[draws.randrange(len(spoilt))] = draws.randrange(256)
    way = draws.randrange(4)
    if way == 0:
        return bytes(spoilt[: draws.randrange(len(spoilt))])
    if way == 1:
        return bytes(spoilt) + draws.randbytes(99)
    return bytes(spoilt)


SHOW = ["show", "--image", "{it}", "--model", "{base}/vit", "--reducer", "tome", "--figure", "{out}/p.png"]
NAME = ["recognize", "{it}", "--model", "{base}/recognizer", "--top", "2"]
CLIP = [
    "show",
    "--video",
    "{it}",
    "--model",
    "{base}/vit",
    "--frames",
    "2",
    "--stride",
    "1",
    "--figure",
    "{out}/p.png",
]


def pictures(base: Path, seed: int, count: int) -> list[Case]:
    """Images with bytes changed, of claimed sizes, and what is none."""
    draws = random.Random(f"{seed} images")
    cases = []
    for number in range(count):
        ending = draws.choice(("png", "jpg", "gif", "webp", "tiff", "bmp"))
        spoilt = _flipped((base / f"photo.{ending}").read_bytes(), random.Random(f"{seed} {number}"))
        argv = draws.choice((SHOW, NAME))
        cases.append(
            _file(f"image, {argv[0]}: {ending} with bytes changed, {number}", ending, lambda _, d=spoilt: d, argv, base)
        )
    made: dict[str, bytes] = {
        "a bomb": _png(2**30, 2**30), "nothing wide": _png(0, 0), "too wide": _png(10**6, 1), "one pixel": _png(1, 1),
        "text in it of 64 MB": _png(8, 8, _ztxt()), "PostScript": POSTSCRIPT, "SVG": SVG, "empty": b"", "text": b"no image",
        "PDF": b"%PDF-1.4\n", "a playlist": PLAYLIST, "zeros": bytes(9999), "gzip": b"\x1f\x8b" + bytes(99),
    }  # fmt: skip
    for name, data in made.items():
        for argv in (SHOW, NAME):
            for ending in ("png", "eps" if name == "PostScript" else "jpg"):
                cases.append(_file(f"image, {argv[0]}: {name} as {ending}", ending, lambda _, d=data: d, argv, base))
    for what in ("a folder", "a pipe", "/dev/zero", "gone", "a link to itself"):
        cases.append(_place(f"image, show: {what}", SHOW, base, what))
    return cases


def _ztxt() -> bytes:
    data = b"k\0\0" + zlib.compress(bytes(64 << 20))
    return struct.pack(">I", len(data)) + b"zTXt" + data + struct.pack(">I", zlib.crc32(b"zTXt" + data))


def videos(base: Path, seed: int, count: int) -> list[Case]:
    """Videos with bytes changed, and playlists."""
    draws = random.Random(f"{seed} videos")
    whole = (base / "clip.mp4").read_bytes()
    cases = [
        _file(f"video, show: mp4 with bytes changed, {number}", "mp4", lambda _, d=data: d, CLIP, base)
        for number, data in enumerate(_flipped(whole, draws) for _ in range(count))
    ]  # fmt: skip
    made = {
        "a playlist": PLAYLIST,
        "a list of files": CONCAT,
        "empty": b"",
        "text": b"no video",
        "an image": _png(8, 8),
        "SVG": SVG,
    }
    for name, data in made.items():
        for ending in ("mp4", "m3u8", "avi"):
            cases.append(_file(f"video, show: {name} as {ending}", ending, lambda _, d=data: d, CLIP, base))
    return cases + [
        _place(f"video, show: {what}", CLIP, base, what) for what in ("a folder", "a pipe", "/dev/zero", "gone")
    ]


def texts(base: Path) -> list[Case]:
    """Texts as files and as arguments."""
    cases = []
    reading = {
        "show": ["show", "--file", "{it}", "--model", "{base}/model", "--limit", "64", "--html", "{out}/p.html"],
        "generate": ["generate", "--file", "{it}", "--prompt", "What?", "--model", "{base}/model", "--max-new-tokens", "2"],
        "calm": ["generate", "calm", "--file", "{it}", "--prompt", "w3", "--model", "{base}/calm", "--max-new-tokens", "3"],
        "drafter": ["generate", "--file", "{it}", "--prompt", "What?", "--model", "{base}/model", "--max-new-tokens", "2",
                    "--drafter", "lookup"],
        "bench": ["bench", "--text", "{it}", "--model", "{base}/model", "--context", "40", "--target", "8", "--keep", "0.5"],
    }  # fmt: skip
    for how, argv in reading.items():
        for name, data in TEXTS.items():
            cases.append(_file(f"text, {how}: {name}", "txt", lambda _, d=data: d, argv, base))
        for what in ("a folder", "a pipe", "/dev/zero", "gone", "a link to itself"):
            cases.append(_place(f"text, {how}: {what}", argv, base, what))
    for name, data in TEXTS.items():
        if len(data) < 10**5 and b"\0" not in data:
            given: list[str | bytes] = ["--model", str(base / "model")]
            cases.append(Case(f"typed, show: {name}", lambda _, d=data, g=given: ["show", "--text", d, *g]))
            more: list[str | bytes] = ["--max-new-tokens", "2", *given]
            cases.append(Case(f"typed, generate: {name}", lambda _, d=data, g=more: ["generate", "--prompt", d, *g]))
    return cases


def names(base: Path) -> list[Case]:
    """Sound files and folders under names that hide, command or mark up; and names of models that are none."""
    cases = []
    for name in NAMES:

        def picture(work: Path, name: str = name) -> list[str | bytes]:
            shutil.copy(base / "photo.png", work / name)
            return ["show", "--image", os.fsencode(work / name), "--model", str(base / "vit"), "--reducer", "tome"]

        def text(work: Path, name: str = name) -> list[str | bytes]:
            (work / name).write_text(TEXT)
            given = ["--model", str(base / "model"), "--limit", "40", "--html", "p.html", "--figure", "p.svg"]
            return ["show", "--file", os.fsencode(work / name), *given]

        def folder(work: Path, name: str = name) -> list[str | bytes]:
            shutil.copytree(base / "model", work / name)
            return ["generate", "--prompt", TEXT, "--model", os.fsencode(work / name), "--max-new-tokens", "2"]

        def known(work: Path, name: str = name) -> list[str | bytes]:
            shutil.copy(base / "photo.png", work / name)
            return ["recognize", os.fsencode(work / name), "--model", str(base / "recognizer"), "--top", "2"]

        for what, build in (("image", picture), ("text", text), ("folder", folder), ("recognize", known)):
            cases.append(Case(f"name of a {what}: {ascii(name)[:40]}", build))
    models: list[str | bytes] = [
        "", " ", "~nosuchuser/x", "a" * 5000, "../", "/", "/dev/null", "/dev/zero", "owner/name", "a/b/c", "https://x/y",
        b"\xff\xfe", "\x1b[31m", "smollm2-135", "[red]", "/proc/self/mem", "hf://x/y", "x\ny", "-", "~",
    ]  # fmt: skip
    for model in models:
        shown = ascii(model)[:40]
        cases.append(Case(f"name of a model: {shown}", lambda _, m=model: ["show", "--text", TEXT, "--model", m], True))
        cases.append(Case(f"name of a base: {shown}",
                          lambda _, m=model: ["transplant", "--base", m, "--tokenizer", m, "--out", "t"], True))  # fmt: skip
        photo = str(base / "photo.png")
        cases.append(Case(f"name of a vision model: {shown}",
                          lambda _, m=model, p=photo: ["show", "--image", p, "--model", m], True))  # fmt: skip
    return cases


def lists(base: Path) -> list[Case]:
    """Files of prompts, of labels, of options and of annotations, as other programs or older runs may have left them."""
    cases = []
    for name, data in LISTS.items():
        cases.append(_file(f"prompts: {name}", "jsonl", lambda _, d=data: d,
                           ["bench", "decode", "--drafter", "lookup", "--prompts", "{it}", "--model", "{base}/model",
                            "--max-new-tokens", "2", "--limit", "2"], base))  # fmt: skip
        cases.append(_file(f"labels: {name}", "txt", lambda _, d=data: d,
                           ["recognize", "{base}/photo.png", "--model", "{base}/recognizer", "--labels", "{it}"], base))  # fmt: skip

        for kind in ("yaml", "toml", "json"):
            cases.append(_file(f"options in {kind}: {name}", kind, lambda _, d=data: d,
                               ["plan", "--model", "{base}/model", "--tokens", "64", "--config", "{it}"], base))  # fmt: skip

        def annotated(work: Path, data: bytes = data) -> list[str | bytes]:
            shutil.copytree(base / "annotated", work / "them")
            (work / "them" / "annotations.jsonl").write_bytes(data)
            return ["bench", "vlm", str(work / "them"), "--model", str(base / "vlm"), "--reducer", "random",
                    "--keep", "0.5", "--rounds", "2"]  # fmt: skip

        cases.append(Case(f"annotations: {name}", annotated))
    return cases


def outputs(base: Path) -> list[Case]:
    """Places to write to that are none, and options out of range."""
    cases = []
    given = ["show", "--text", TEXT, "--model", str(base / "model"), "--limit", "40"]
    for option in ("--json", "--html", "--figure"):
        for place in (
            "/dev/full",
            "/proc/x",
            "/",
            ".",
            "",
            "a" * 300,
            "a\nb/c.png",
            "/etc/passwd/x.png",
            "no/such/x.svg",
            "pipe.png",
        ):

            def build(work: Path, option: str = option, place: str = place) -> list[str | bytes]:
                os.mkfifo(work.parent / "out" / "pipe.png")
                return [*given, option, place]

            cases.append(Case(f"output {option} {ascii(place)[:30]}", build))
    write = ["generate", "--prompt", TEXT, "--model", str(base / "model"), "--max-new-tokens", "2"]
    for more in (
        ["--temperature", "1e-40"], ["--temperature", "nan"], ["--temperature", "inf"], ["--temperature", "1e300"],
        ["--keep", "nan"], ["--keep", "1e-30"], ["--keep", "inf"], ["--layer", "-1"], ["--layer", "99999999999999999999"],
        ["--seed", "-1"], ["--seed", "99999999999999999999999"], ["--max-new-tokens", "999999999999"], ["--reducer", "\x1b[31m"],
        ["--reducer", "quickmerge:recency=nan"], ["--reducer", "quickmerge:__class__=1"], ["--attention", "multipole:ratio=0"],
        ["--budget", "5"], ["--drafter", "/dev/zero"], ["--prior", "/"], ["--tree", "-1"], ["--what"], ["\x1b[31m"],
        ["--sample", "--temperature", "1e-320"], ["--drafter", "lookup:ngram=99999999999"], ["--file", ""], ["--image", ""],
    ):  # fmt: skip
        cases.append(Case(f"option {' '.join(more)!r}", lambda _, m=more: [*write, *m]))
    return cases


def _place(name: str, argv: list[str], base: Path, what: str) -> Case:
    def build(work: Path) -> list[str | bytes]:
        path = work / f"it.{'mp4' if '--video' in argv else 'png'}"
        path.write_bytes(b"x")
        WHOLES[what](path)
        words = {"it": path, "base": base, "out": work.parent / "out"}
        return [part.format(**words) for part in argv]

    return Case(name, build, True)
