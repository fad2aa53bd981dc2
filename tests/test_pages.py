"""The pages of README and docs: their code runs, their links lead somewhere, and none is long."""

from __future__ import annotations

import re
import shlex
from pathlib import Path
from typing import Any

import pytest
from page_samples import (
    DOCS,
    README,
    ROOT,
    SETUP,
    SETUPS,
    Block,
    blocks,
    name,
    pages,
    prepare,
    prose,
    run_python,
    run_shell,
)

UNRUN = {
    "measured": "makes a committed result again, or what it needs: minutes to hours",
    "training": "trains for many minutes",
    "fetches": "installs or fetches packages",
    "door": "starts or asks another program: tests/serve, tests/models/test_share.py and tests/training do",
    "yours": "needs a folder, a file or a GPU that only a reader has",
}
"""Why a block is not run by the tests. What it calls is looked at all the same."""

WITH_PYTHON = [page for page in pages() if any(b.language == "python" for b in blocks(page))]
WITH_CODE = [page for page in pages() if any(b.language in ("python", "bash") and not b.unrun for b in blocks(page))]


def all_blocks() -> list[Block]:
    return [block for page in pages() for block in blocks(page)]


def run(page: Path, folder: Path, languages: tuple[str, ...], *, slow: bool) -> None:
    """Run what a page holds, in order, as a reader would who begins with it."""
    prepare(page, folder)
    names: dict[str, Any] = {"__name__": "__main__"}
    for block in blocks(page):
        if block.language not in languages or block.unrun or (block.slow and not slow):
            continue
        print(f"=== {block}")
        if block.language == "python":
            run_python(block, names)
        else:
            print(run_shell(block, folder))


@pytest.fixture
def reader(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> Path:
    """A folder to run a page in; all pages share one SmolLM2, which every page leaves as it was."""
    import quickmerge as qm

    load = qm.load

    def shared(model: str, **options: Any) -> Any:
        if model != "smollm2-135m" or options:
            return load(model, **options)
        return request.getfixturevalue("smollm2")

    monkeypatch.setattr(qm, "load", shared)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize("page", WITH_PYTHON, ids=name)
def test_the_python_of_a_page_runs(page: Path, reader: Path) -> None:
    run(page, reader, ("python",), slow=False)


@pytest.mark.slow
@pytest.mark.parametrize("page", WITH_CODE, ids=name)
def test_all_code_of_a_page_runs(page: Path, reader: Path) -> None:
    """Commands in processes of their own, and what fetches a model."""
    run(page, reader, ("python", "bash"), slow=True)


def test_what_is_not_run_says_why() -> None:
    for block in all_blocks():
        assert not block.unrun or block.unrun in UNRUN, f"{block}: {block.unrun}"
        assert block.unrun != "measured" or block.language == "bash", f"{block} is no command"
        assert not (block.unrun and block.language == "python") or block.unrun in ("yours", "door"), block
    for block in all_blocks():
        assert block.unrun or "pip install" not in block.code, f"{block} would install into the tests' environment"
    unrun = [block for block in all_blocks() if block.unrun and block.unrun not in ("measured", "door", "fetches")]
    assert len(unrun) <= 25, [str(block) for block in unrun]
    asked = {each.strip() for page in pages() for group in SETUP.findall(page.read_text()) for each in group.split(",")}
    assert asked <= set(SETUPS)


def test_blocks_say_what_they_are_written_in() -> None:
    known = {"python", "bash", "text", "json", "yaml", "bibtex", "toml"}
    for block in all_blocks():
        assert block.language in known, f"{block}: {block.language!r}"


def test_no_block_is_only_indented() -> None:
    for page in pages():
        text = re.sub(r"^```.*?^```", "", page.read_text(encoding="utf-8"), flags=re.M | re.S)
        found = re.search(r"(?:\A|\n)\n {4}(?! *[-*\d|])\S[^\n]*", text)
        assert not found, f"{name(page)}: {found[0].strip()!r}"


PROGRAMS = (
    "pip", "python", "cat", "cd", "git", "head", "docker", "curl", "accelerate", "transformers", "lmms-eval",
    "lmms_eval", "ray", "vllm", "export", "echo", "printf",
)  # fmt: skip
"""Of others, that blocks call."""


def commands(code: str) -> list[list[str]]:
    """The commands of a block, as words."""
    code = re.sub(r"'[^']*'", lambda found: found[0].replace("\n", " "), re.sub(r"\\\n", " ", code))
    lines = [re.sub(r"\$\([^)]*\)", "", line) for line in code.splitlines()]
    return [
        words for line in lines for part in line.split("&&") if (words := shlex.split(part, comments=True))
    ]  # fmt: skip


def options_of(words: list[str]) -> set[str]:
    return {word.split("=")[0] for word in words if re.fullmatch(r"--[a-z][\w-]*(=.*)?", word)}


def test_commands_and_their_options_exist() -> None:
    from typer.main import get_command

    from quickmerge.cli import app

    makefile, seen = (ROOT / "Makefile").read_text(encoding="utf-8"), 0
    for block in all_blocks():
        for words in commands(block.code) if block.language == "bash" else ():
            seen += 1
            if words[0] == "quickmerge":
                found, rest = get_command(app), words[1:]
                while rest and getattr(found, "commands", None) and rest[0] in found.commands:
                    found, rest = found.commands[rest[0]], rest[1:]
                if getattr(found, "commands", None) and rest and not rest[0].startswith("-"):
                    # `generate report.txt` means text; its options are looked for in every sub-command
                    known = {
                        o for sub in found.commands.values() for p in sub.params for o in (*p.opts, *p.secondary_opts)
                    }
                else:
                    known = {o for param in found.params for o in (*param.opts, *param.secondary_opts)} | {"--help"}
                assert options_of(rest) <= known, f"{block}: {' '.join(words)}"
            elif words[0] == "python" and words[1].startswith("benchmarks/"):
                source = (ROOT / words[1]).read_text(encoding="utf-8")
                missing = [option for option in options_of(words[2:]) if f'"{option}"' not in source]
                assert not set(missing) - {"--help"}, f"{block}: {missing}"
            elif words[0] == "make":
                assert f"\n{words[1]}:" in makefile, f"{block}: {words}"
            else:
                assert words[0] in PROGRAMS, f"{block}: {words}"
    assert seen > 60


def slug(heading: str) -> str:
    """The anchor of a heading, as Python-Markdown and GitHub make it."""
    heading = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", heading)
    return re.sub(r"[\s]+", "-", re.sub(r"[^\w\s-]", "", heading.lower()).strip())


def anchors(page: Path) -> set[str]:
    text = re.sub(r"^```.*?^```", "", page.read_text(encoding="utf-8"), flags=re.M | re.S)
    return {slug(heading) for heading in re.findall(r"^#+ (.+)$", text, flags=re.M)}


LINKED = [*pages(), *(ROOT / other for other in ("CONTRIBUTING.md", "SECURITY.md", "CHANGELOG.md"))]


@pytest.mark.parametrize("page", LINKED, ids=name)
def test_links_lead_somewhere(page: Path) -> None:
    text = re.sub(r"^```.*?^```", "", page.read_text(encoding="utf-8"), flags=re.M | re.S)
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if re.match(r"(https?|mailto):", target):
            continue
        path, _, anchor = target.partition("#")
        there = (page.parent / path).resolve() if path else page
        assert there.exists(), f"{name(page)} -> {target}"
        if page.is_relative_to(DOCS):
            assert there.is_relative_to(DOCS), f"{name(page)} -> {target} is no part of the site"
        if anchor:
            assert anchor in anchors(there), f"{name(page)} -> {target}"


def test_pages_that_the_code_names_exist() -> None:
    for folder, ending in (("src", "py"), ("benchmarks", "py"), ("benchmarks", "toml"), ("tests", "py")):
        for file in (ROOT / folder).rglob(f"*.{ending}"):
            for found in re.findall(r"\bdocs/[\w/-]+\.(?:md|png)", file.read_text(encoding="utf-8")):
                assert (ROOT / found).is_file(), f"{file.relative_to(ROOT)} names {found}"


@pytest.mark.parametrize("page", [page for page in pages() if page != README], ids=name)
def test_no_page_is_long(page: Path) -> None:
    most = 800 if page.parent.name == "how-to" else 1200
    count = len(prose(page.read_text(encoding="utf-8")))
    assert count <= most, f"{name(page)}: {count} words of prose, {most} at most"


def test_every_page_is_in_the_menu() -> None:
    menu = (ROOT / "mkdocs.yml").read_text(encoding="utf-8")
    for page in DOCS.rglob("*.md"):
        assert f" {page.relative_to(DOCS).as_posix()}\n" in menu, f"{name(page)} has no entry in mkdocs.yml"


def test_names_in_the_text_exist() -> None:
    """Dotted names of the package in the pages' text, and the public ones that are said as ``qm.name``."""
    import quickmerge as qm

    for page in pages():
        text = page.read_text(encoding="utf-8")
        for dotted in set(re.findall(r"(?:`|^::: )(quickmerge(?:\.\w+)+)", text, flags=re.M)):
            assert resolves(dotted), f"{name(page)} names {dotted}"
        for public in set(re.findall(r"\bqm\.(\w+)", text)):
            assert hasattr(qm, public), f"{name(page)} names qm.{public}"


def resolves(dotted: str) -> bool:
    """Whether a dotted name is a module, or what a module holds."""
    import importlib

    parts = dotted.split(".")
    for length in range(len(parts), 0, -1):
        try:
            found: Any = importlib.import_module(".".join(parts[:length]))
        except ModuleNotFoundError:
            continue
        for part in parts[length:]:
            if not hasattr(found, part):
                return False
            found = getattr(found, part)
        return True
    return False
