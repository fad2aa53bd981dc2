"""How commands end: one sentence for what was given, a traceback for a fault of ours, nothing for a closed pipe."""

from __future__ import annotations

import errno
import io
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from quickmerge.cli import app
from quickmerge.console.ending import Alone, end, one_sentence
from quickmerge.errors import DamagedWeightsError, QuickmergeError, UnsupportedModelError, door


def ended(command: Any, capsys: pytest.CaptureFixture[str]) -> tuple[int, str]:
    with pytest.raises(SystemExit) as stop:
        end(command)
    return int(stop.value.code or 0), capsys.readouterr().err


def raising(error: BaseException) -> Any:
    def command() -> None:
        raise error

    return command


def no_letters() -> OSError:
    return OSError(errno.ENAMETOOLONG, os.strerror(errno.ENAMETOOLONG), "a" * 5000)


@pytest.mark.parametrize(
    ("error", "told"),
    [
        (QuickmergeError("keep must be x"), "quickmerge: keep must be x\n"),
        (QuickmergeError("a\x1b[31m\nb\u202e\udcff"), "quickmerge: a\\x1b[31m\\x0ab\\u202e\\udcff\n"),
        (PermissionError(errno.EACCES, "Permission denied", "a/b"), "quickmerge: a/b: Permission denied\n"),
        (MemoryError(), "quickmerge: the memory of this machine does not suffice (out of memory)\n"),
    ],
)
def test_what_was_given_is_one_sentence(error: Exception, told: str, capsys) -> None:
    assert ended(raising(error), capsys) == (2, told)


def test_long_names_are_cut(capsys) -> None:
    code, err = ended(raising(no_letters()), capsys)
    assert code == 2 and len(err) < 400 and "5000 characters" in err and err.count("\n") == 1


def test_out_of_memory_of_torch_is_told_too(capsys) -> None:
    with pytest.raises(RuntimeError) as found:
        torch.empty(2**60)
    code, err = ended(raising(found.value), capsys)
    assert code == 2 and err.count("\n") == 1 and "memory" in err


def test_a_fault_of_ours_shows_where_it_lies_and_asks_to_report_it(capsys) -> None:
    code, err = ended(raising(ZeroDivisionError("\x1b[31mby zero")), capsys)
    lines = err.splitlines()
    assert code == 1 and lines[0].startswith("Traceback") and "report it" in lines[-1] and "\x1b" not in err


def test_debug_shows_it_always(capsys, monkeypatch) -> None:
    monkeypatch.setenv("QUICKMERGE_DEBUG", "1")
    code, err = ended(raising(QuickmergeError("no")), capsys)
    assert code == 2 and "Traceback" in err and err.endswith("quickmerge: no\n") and "report it" not in err
    monkeypatch.setenv("QUICKMERGE_DEBUG", "0")
    assert "Traceback" not in ended(raising(QuickmergeError("no")), capsys)[1]


def test_the_option_does_the_same(run) -> None:
    assert "Traceback" in run("--debug", "plan", "--model", "nothing-such")[2]
    assert "Traceback" not in run("plan", "--model", "nothing-such")[2]


def test_interruptions_and_closed_pipes_are_quiet(capsys) -> None:
    assert ended(raising(KeyboardInterrupt()), capsys) == (130, "")
    assert ended(raising(BrokenPipeError(errno.EPIPE, "Broken pipe")), capsys) == (1, "")


def test_a_full_disk_behind_standard_output_is_one_sentence(capsys, monkeypatch) -> None:
    class Full(io.StringIO):
        def flush(self) -> None:
            raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(sys, "stdout", Full())
    assert ended(lambda: print("x"), capsys) == (2, "quickmerge: No space left on device\n")


def test_what_cannot_be_understood_is_one_sentence(run) -> None:
    for given in (["generate", "--keep", "x"], ["\x1b[31m"], ["show", "--nothing"], ["generate"]):
        code, out, err = run(*given)
        assert code == 2 and not out and err.count("\n") == 1 and err.startswith("quickmerge: "), err
        assert "--help)" in err and "\x1b" not in err


def test_version_and_module(run) -> None:
    code, out, _ = run("--version")
    assert code == 0 and out.startswith("quickmerge ") and f"torch {torch.__version__}" in out and out.count("\n") == 1
    found = subprocess.run(
        [sys.executable, "-m", "quickmerge", "--version"], capture_output=True, text=True, check=True
    )
    assert found.stdout == out


def test_shells_can_complete(run, monkeypatch, tmp_path) -> None:
    monkeypatch.setenv("_QUICKMERGE_COMPLETE", "complete_bash")
    monkeypatch.setenv("COMP_WORDS", "quickmerge tr")
    monkeypatch.setenv("COMP_CWORD", "1")
    code, out, _ = run()
    assert code == 0 and sorted(out.split()) == ["train", "transplant"]
    monkeypatch.delenv("_QUICKMERGE_COMPLETE")
    assert "--install-completion" in run("--help")[1] and app.registered_callback is not None


# The door ---------------------------------------------------------------------------------------------------------


class PanicException(BaseException):  # as the tokenizers library raises it, which no `except Exception` sees
    pass


@pytest.mark.parametrize(
    ("error", "told"),
    [
        (KeyError("x"), "KeyError: 'x'"), (RecursionError("maximum"), "it is nested too deeply"),
        (MemoryError(), "out of memory"), (PanicException("no\nway. Really"), "no way"),
        (OverflowError(""), "OverflowError"),
        (RuntimeError("\x1b[31mred\x1b[0m"), "\\x1b[31mred\\x1b[0m"), (OSError(5, "Input/output error"), "[Errno 5]"),
    ],
)  # fmt: skip
def test_a_door_tells_anything_in_one_sentence(error: BaseException, told: str) -> None:
    with pytest.raises(DamagedWeightsError) as found, door("a/b can't be read", DamagedWeightsError, "copy it again"):
        raise error
    message = str(found.value)
    assert message.startswith("a/b can't be read (") and told in message and message.endswith("): copy it again")
    assert "\x1b" not in message and "\n" not in message


@pytest.mark.parametrize("error", [KeyboardInterrupt(), BrokenPipeError(), QuickmergeError("ours"), SystemExit(3)])
def test_a_door_lets_through_what_is_not_the_file_s(error: BaseException) -> None:
    with pytest.raises(type(error)) as found, door("x"):
        raise error
    assert found.value is error


def test_an_error_is_the_model_s_if_it_can_t_be_run_alone_and_ours_if_it_can() -> None:
    ours, bad = Alone(torch.nn.Identity(), lambda: None), Alone(torch.nn.Identity(), raising(KeyError("evil")))
    with pytest.raises(AttributeError), one_sentence(ours):
        raise AttributeError("a fault")
    told = r"the model Identity can't be run \(KeyError: 'evil'\)"
    with pytest.raises(UnsupportedModelError, match=told), one_sentence(bad):
        raise AttributeError("a fault")
    with pytest.raises(QuickmergeError, match="keep must be"), one_sentence(bad):
        from quickmerge.errors import number_at_least

        number_at_least("keep", -1, 0)  # a setting: the model isn't even asked


def test_a_terminal_without_letters_gets_escapes(capsys, monkeypatch) -> None:
    made = io.TextIOWrapper(io.BytesIO(), encoding="ascii", errors="strict")
    monkeypatch.setattr(sys, "stdout", made)
    assert ended(lambda: print("é→"), capsys)[0] == 0
    assert made.buffer.getvalue() == b"\\xe9\\u2192\n"  # type: ignore[attr-defined]


def test_a_folder_of_a_stranger_is_one_sentence(run, tiny_folder: Path) -> None:
    import json

    config = json.loads((tiny_folder / "config.json").read_text())
    weights = (tiny_folder / "model.safetensors").read_bytes()
    tried: list[tuple[str, Any]] = [
        ("hidden_size", "32"), ("num_attention_heads", 0), ("hidden_act", "os.system"), ("architectures", [["x"]]),
        ("pad_token_id", 10**9), ("layer_types", ["evil"] * 2), ("quantization_config", 5),
        ("num_hidden_layers", 10**8),
        ("rope_parameters", {"rope_type": "evil", "rope_theta": 1}), ("vocab_size", 2**63),
    ]  # fmt: skip
    for key, value in tried:
        (tiny_folder / "config.json").write_text(json.dumps({**config, key: value}))
        code, out, err = run("generate", "--prompt", "the sea", "--model", tiny_folder)
        assert (code, out) == (2, "") and err.count("\n") == 1 and err.startswith("quickmerge: "), (key, err)
    (tiny_folder / "config.json").write_text(json.dumps(config))
    for body in ("", "null", "[" * 10**5 + "]" * 10**5, "{", "\x00"):
        for name in ("config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json"):
            sound = (tiny_folder / name).read_bytes()
            (tiny_folder / name).write_text(body)
            code, out, err = run("show", "--text", "the sea " * 20, "--model", tiny_folder)
            if code or name == "config.json":
                assert (code, out) == (2, "") and err.count("\n") == 1 and err.startswith("quickmerge: "), (name, err)
            (tiny_folder / name).write_bytes(sound)
    (tiny_folder / "model.safetensors").write_bytes(weights[:-1])
    assert run("show", "--text", "the sea " * 20, "--model", tiny_folder)[0] == 2


def test_a_model_that_ignores_what_it_returns_is_read_all_the_same(run, tiny_folder: Path) -> None:
    import json

    config = json.loads((tiny_folder / "config.json").read_text())
    (tiny_folder / "config.json").write_text(json.dumps({**config, "return_dict": False}))
    assert run("show", "--text", "the sea " * 20, "--model", tiny_folder)[0] == 0


def test_half_characters_are_refused_wherever_json_can_bring_them(run, tiny_folder: Path, tmp_path: Path) -> None:
    (tmp_path / "p.jsonl").write_text('{"prompt": "the \\ud800 sea"}\n')
    code, _, err = run("bench", "--drafter", "lookup", "--prompts", tmp_path / "p.jsonl", "--model", tiny_folder)
    assert code == 2 and "half a character in the prompt on line 1" in err and err.count("\n") == 1
    assert run("generate", "--prompt", "the \udcff sea", "--model", tiny_folder)[2].count("\n") == 1


def test_chatter_of_libraries_stays_out(capsys) -> None:
    import logging
    import warnings

    from quickmerge.errors import QuickmergeWarning

    def command() -> None:
        logging.getLogger("PIL.somewhere").error("\x1b[31mmore samples")
        warnings.warn("theirs", UserWarning, stacklevel=1)
        warnings.warn("ours\x1b", QuickmergeWarning, stacklevel=1)

    assert ended(command, capsys) == (0, "quickmerge: ours\\x1b\n")
