"""Trackers are told what ``metrics.jsonl`` holds, each step once, whatever becomes of a run."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, ClassVar

import accelerate.accelerator
import accelerate.tracking
import pytest
from accelerate.tracking import GeneralTracker
from accelerate.utils import LoggerType
from training_samples import Points, Small, same, settings

from quickmerge.errors import QuickmergeError
from quickmerge.training import TrainingConfig, trackers, train


class Recorder(GeneralTracker):
    """Notes what it is told, as another service would."""

    name = "trackio"
    requires_logging_directory = False
    told: ClassVar[list[tuple[str, int, dict[str, Any]]]] = []
    settings: ClassVar[list[dict[str, Any]]] = []
    ends: ClassVar[list[str]] = []
    fails_at: ClassVar[int | None] = None

    def __init__(self, run_name: str, **more: Any) -> None:
        super().__init__()
        assert run_name == "quickmerge" and more["resume"] == "allow"
        self.run = more["name"]

    @property
    def tracker(self) -> Any:
        return self

    def store_init_configuration(self, values: dict[str, Any]) -> None:
        self.settings.append(values)

    def log(self, values: dict[str, Any], step: int | None = None, **_: Any) -> None:
        assert step is not None
        if step == self.fails_at:
            raise ConnectionError("the network is gone")
        self.told.append((self.run, step, values))

    def finish(self) -> None:
        self.ends.append(self.run)


class Other(Recorder):
    name = "wandb"
    told: ClassVar[list[tuple[str, int, dict[str, Any]]]] = []


@pytest.fixture(autouse=True)
def installed(monkeypatch: pytest.MonkeyPatch) -> None:
    """As if both were there, and nobody had used them yet."""
    monkeypatch.setattr("quickmerge.training.config.find_spec", lambda name: object())
    monkeypatch.setattr(accelerate.tracking, "_available_trackers", [LoggerType.TRACKIO, LoggerType.WANDB])
    for cls in (Recorder, Other):
        monkeypatch.setitem(accelerate.accelerator.LOGGER_TYPE_TO_CLASS, cls.name, cls)
        monkeypatch.setattr(cls, "told", [])
    monkeypatch.setattr(Recorder, "settings", [])
    monkeypatch.setattr(Recorder, "ends", [])


def config(**changes: Any) -> TrainingConfig:
    return settings(log_every=1, log_with="trackio", **changes)


def steps(cls: type[Recorder] = Recorder) -> list[int]:
    return [step for _, step, _ in cls.told]


def written(out: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


def test_they_are_told_what_is_written_and_the_settings_once(tmp_path: Path) -> None:
    plain, shown = Small(), Small()
    train(plain, Points(), settings(log_every=1), tmp_path / "plain")
    assert not Recorder.told and not (tmp_path / "plain" / "trackers.json").exists()
    train(shown, Points(), config(), tmp_path / "shown")
    assert same(plain, shown), "who looks on changes nothing"
    assert [{"step": step, **values} for _, step, values in Recorder.told] == written(tmp_path / "shown")
    assert len({run for run, _, _ in Recorder.told}) == 1 and Recorder.told[0][0].startswith("shown-")
    (told,) = Recorder.settings
    assert told["betas"] == "[0.9, 0.999]" and told["steps"] == 12 and "max_minutes" not in told
    assert Recorder.ends == [Recorder.told[0][0]]


def test_a_resumed_run_is_the_same_run_and_tells_no_step_twice(tmp_path: Path) -> None:
    def die(done: int, _: Any) -> None:
        if done == 8:
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        train(Small(), Points(), config(), tmp_path, on_step=die)
    assert steps() == list(range(1, 9)) and len(Recorder.ends) == 1
    train(Small(), Points(), config(), tmp_path, resume=True)  # from step 5
    assert steps() == list(range(1, 13)) and [line["step"] for line in written(tmp_path)] == list(range(1, 13))
    assert len({run for run, _, _ in Recorder.told}) == 1 and len(Recorder.settings) == 1
    train(Small(), Points(), config(), tmp_path, resume=True)  # it is done
    assert steps() == list(range(1, 13))


def test_a_kill_after_the_note_loses_a_step_rather_than_telling_it_twice(tmp_path: Path, monkeypatch: Any) -> None:
    def killed(self: Recorder, values: dict[str, Any], step: int | None = None, **_: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Recorder, "log", killed)
        with pytest.raises(KeyboardInterrupt):
            train(Small(), Points(), config(save_every=1), tmp_path)
    assert json.loads((tmp_path / "trackers.json").read_text())["told"] == {"trackio": 1}
    with pytest.raises(QuickmergeError, match="nothing to resume"):
        train(Small(), Points(), config(), tmp_path, resume=True)
    train(Small(), Points(), config(), tmp_path)  # begun anew, it is another run
    assert steps() == list(range(1, 13))


def test_one_that_is_added_later_is_told_what_it_has_missed(tmp_path: Path) -> None:
    train(Small(), Points(), config(max_minutes=1e-9), tmp_path)
    more = settings(log_every=1, log_with="trackio, wandb")
    train(Small(), Points(), more, tmp_path, resume=True)
    assert steps() == steps(Other) == list(range(1, 13))
    assert [values for *_, values in Recorder.told] == [values for *_, values in Other.told]


def test_a_failing_one_is_left_and_the_training_goes_on(tmp_path: Path, monkeypatch: Any, capsys: Any) -> None:
    monkeypatch.setattr(Recorder, "fails_at", 4)
    assert train(Small(), Points(), config(), tmp_path).finished
    assert steps() == [1, 2, 3] and len(written(tmp_path)) == 12
    err = " ".join(capsys.readouterr().err.split())
    assert err.count("trackio is told no more (the network is gone); metrics.jsonl goes on") == 1


def test_one_that_cannot_begin_is_one_sentence(tmp_path: Path, monkeypatch: Any) -> None:
    def start(self: Recorder) -> None:
        raise RuntimeError("not logged in. Run login\nfirst")

    monkeypatch.setattr(Recorder, "start", start)
    with pytest.raises(QuickmergeError, match=r"log_with trackio can't begin \(not logged in\)"):
        train(Small(), Points(), config(), tmp_path)


def test_values_that_never_were_are_left_out(tmp_path: Path) -> None:
    made = trackers.Trackers(accelerate.Accelerator(log_with=["trackio"]), config(), tmp_path)
    (tmp_path / "metrics.jsonl").touch()
    made.begin(False)
    made.tell({"step": 3, "loss": None, "items": 2})
    assert [(step, values) for _, step, values in Recorder.told] == [(3, {"items": 2})]


def test_a_damaged_note_is_told(tmp_path: Path) -> None:
    train(Small(), Points(), config(max_minutes=1e-9), tmp_path)
    (tmp_path / "trackers.json").write_text('{"run": 3}')
    with pytest.raises(QuickmergeError, match=r"trackers\.json is damaged: remove it"):
        train(Small(), Points(), config(), tmp_path, resume=True)


def test_what_is_not_installed_is_said_with_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("quickmerge.training.config.find_spec", lambda name: None)
    with pytest.raises(QuickmergeError, match="log_with trackio needs the package trackio: pip install trackio"):
        train(Small(), Points(), config(), tmp_path)
    with pytest.raises(ValueError, match=r"log_with must be of .* got 'wand' \(did you mean 'wandb'\?\)"):
        settings(log_with="wand")
    with pytest.raises(ValueError, match="log_with must be of"):
        settings(log_with=3)
