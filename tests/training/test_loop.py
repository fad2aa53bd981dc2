from __future__ import annotations

import os
import signal
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from training_samples import Points, Small, lines, same, saved, settings

from quickmerge.errors import QuickmergeError
from quickmerge.training import checkpoint, train
from quickmerge.training.checkpoint import MODEL, load


def test_a_run_learns_and_leaves_weights_checkpoints_and_metrics(tmp_path: Path) -> None:
    objective = Small(dropout=0).eval()
    finished: list[Path] = []
    result = train(objective, Points(), settings(steps=100), tmp_path, finish=finished.append)
    assert result.finished and result.steps == 100 and finished == [tmp_path]
    assert result.checkpoint == tmp_path / "checkpoints" / "step-000100"
    written = lines(tmp_path)
    assert [line["step"] for line in written] == list(range(3, 100, 3))
    assert list(written[0]) == ["step", "loss", "distance", "grad_norm", "learning_rate", "items"]
    assert written[-1]["loss"] < written[0]["loss"] / 4 and written[-1]["items"] == 99 * 4
    assert not objective.training and all(value.grad is None for value in objective.parameters())
    tensors = load(result.checkpoint).model
    assert all(torch.equal(tensors[name], value) for name, value in objective.state_dict().items())


def test_what_is_random_repeats_whatever_was_drawn_before(tmp_path: Path) -> None:
    one, other = Small(), Small()
    train(one, Points(), settings(), tmp_path / "one")
    torch.rand(5)
    train(other, Points(), settings(), tmp_path / "other", on_step=lambda *_: torch.rand(3))
    assert same(one, other)
    third = Small()
    train(third, Points(), settings(seed=1), tmp_path / "third")
    assert not same(one, third)


def test_time_that_runs_out_ends_a_call_and_resuming_ends_the_run(tmp_path: Path) -> None:
    whole, objective = Small(), Small()
    train(whole, Points(), settings(), tmp_path / "whole")
    out = tmp_path / "out"
    finished: list[Path] = []
    short = settings(max_minutes=1e-9)
    for call in range(1, 12):
        result = train(objective, Points(), short, out, resume=call > 1, finish=finished.append)
        assert (result.steps, result.finished) == (call, False)
        assert saved(out)[-1] == f"step-{call:06d}"
        objective = Small()  # as a new process would
    assert train(objective, Points(), short, out, resume=True, finish=finished.append).finished
    assert same(objective, whole) and lines(out) == lines(tmp_path / "whole") and finished == [out]


def test_a_finished_run_resumes_to_its_weights_and_finishes_again(tmp_path: Path) -> None:
    first, second = Small(), Small()
    finished: list[Path] = []
    before = train(first, Points(), settings(), tmp_path, finish=finished.append)
    result = train(second, Points(), settings(), tmp_path, resume=True, finish=finished.append)
    assert result.finished and result.metrics == {} and result.checkpoint == before.checkpoint
    assert same(first, second) and len(finished) == 2


def test_a_constant_schedule_can_be_trained_for_longer(tmp_path: Path) -> None:
    whole, objective = Small(), Small()
    train(whole, Points(), settings(steps=20, schedule="constant"), tmp_path / "whole")
    train(objective, Points(), settings(steps=10, schedule="constant"), tmp_path / "out")
    train(objective, Points(), settings(steps=20, schedule="constant"), tmp_path / "out", resume=True)
    assert same(whole, objective) and lines(tmp_path / "whole") == lines(tmp_path / "out")


def test_a_changed_setting_or_fingerprint_is_refused_and_changes_nothing(tmp_path: Path) -> None:
    train(Small(), Points(), settings(), tmp_path, fingerprint={"model": "a"})
    objective = Small()
    with pytest.raises(QuickmergeError, match=r"config learning_rate was 0.01 when .* is 0.02 now"):
        train(objective, Points(), settings(learning_rate=0.02), tmp_path, resume=True, fingerprint={"model": "a"})
    with pytest.raises(QuickmergeError, match=r"fingerprint model was 'a' when .* is 'b' now"):
        train(objective, Points(), settings(), tmp_path, resume=True, fingerprint={"model": "b"})
    with pytest.raises(QuickmergeError, match=r"model.safetensors does not fit the objective"):
        train(nn_wider(), Points(), settings(), tmp_path, resume=True, fingerprint={"model": "a"})
    assert same(objective, Small())


def nn_wider() -> Small:
    objective = Small()
    objective.net[3] = nn.Linear(16, 2)
    return objective


def test_resuming_nothing_and_beginning_over_something_are_refused(tmp_path: Path) -> None:
    with pytest.raises(QuickmergeError, match=r"nothing to resume: no folder .*checkpoints/step-\* was found"):
        train(Small(), Points(), settings(), tmp_path, resume=True)
    train(Small(), Points(), settings(), tmp_path)
    before = lines(tmp_path)
    with pytest.raises(QuickmergeError, match="is there already: use resume=True to go on from it, or another folder"):
        train(Small(), Points(), settings(), tmp_path)
    assert lines(tmp_path) == before


def test_a_damaged_newest_checkpoint_falls_back_with_a_warning(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    whole, objective = Small(), Small()
    train(whole, Points(), settings(), tmp_path / "whole")
    out = tmp_path / "out"
    train(Small(), Points(), settings(), out)
    damaged = out / "checkpoints" / "step-000012" / MODEL
    damaged.write_bytes(damaged.read_bytes()[:20])
    capsys.readouterr()
    train(objective, Points(), settings(), out, resume=True)
    told = capsys.readouterr().err
    assert told.startswith("warning: ") and "step-000012" in told and "going on from step 10" in told
    assert same(objective, whole) and lines(out) == lines(tmp_path / "whole")
    assert load(out / "checkpoints" / "step-000012").step == 12


def test_a_full_disk_stops_the_run_and_keeps_the_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = checkpoint.save_file

    def full_later(tensors: Any, path: Path) -> None:
        if "step-000010" in str(path):
            raise OSError(28, "No space left on device")
        real(tensors, path)

    monkeypatch.setattr(checkpoint, "save_file", full_later)
    with pytest.raises(QuickmergeError, match=r"step-000010 can't be written \(No space left on device\)"):
        train(Small(), Points(), settings(), tmp_path)
    assert saved(tmp_path) == ["step-000005"]
    monkeypatch.undo()
    whole, objective = Small(), Small()
    train(objective, Points(), settings(), tmp_path, resume=True)
    train(whole, Points(), settings(), tmp_path / "whole")
    assert same(objective, whole)


@pytest.mark.usefixtures("heard")
@pytest.mark.parametrize(("number", "raised"), [(signal.SIGINT, KeyboardInterrupt), (signal.SIGTERM, SystemExit)])
def test_a_signal_ends_the_step_saves_and_says_how_to_go_on(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], number: int, raised: type[BaseException]
) -> None:
    def on_step(done: int, _: Any) -> None:
        if done == 2:
            os.kill(os.getpid(), number)

    with pytest.raises(raised) as caught:
        train(Small(), Points(), settings(), tmp_path / "out", on_step=on_step)
    assert getattr(caught.value, "code", 143) == 143
    told = " ".join(capsys.readouterr().err.split())
    assert told == f"stopped after step 3 of 12: resume to go on from {tmp_path}/out/checkpoints/step-000003"
    whole, objective = Small(), Small()
    train(whole, Points(), settings(), tmp_path / "whole")
    train(objective, Points(), settings(), tmp_path / "out", resume=True)
    assert same(objective, whole)


def test_two_runs_at_once_into_one_folder_are_refused(tmp_path: Path) -> None:
    refused: list[str] = []

    def second() -> None:
        try:
            train(Small(), Points(), settings(), tmp_path / "out", resume=True)
        except QuickmergeError as error:
            refused.append(str(error))

    def on_step(done: int, _: Any) -> None:
        if done == 6:  # there is a checkpoint that a second run could go on from
            thread = threading.Thread(target=second)
            thread.start()
            thread.join()

    whole, objective = Small(), Small()
    train(objective, Points(), settings(), tmp_path / "out", on_step=on_step)
    train(whole, Points(), settings(), tmp_path / "whole")
    assert len(refused) == 1 and f"out must be written by one run at a time, but process {os.getpid()}" in refused[0]
    assert same(objective, whole)
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["checkpoints", "metrics.jsonl"]


@pytest.mark.parametrize("umask", [0o022, 0o077, 0o002])
def test_modes_of_checkpoints_are_what_the_umask_asks_for(tmp_path: Path, umask: int) -> None:
    before = os.umask(umask)
    try:
        train(Small(), Points(), settings(steps=2), tmp_path / "out")
    finally:
        os.umask(before)
    for path in (tmp_path / "out").rglob("*"):
        wanted = (0o777 if path.is_dir() else 0o666) & ~umask
        assert path.stat().st_mode & 0o777 == wanted, path


def test_an_empty_dataset_and_nothing_to_train_are_refused(tmp_path: Path) -> None:
    with pytest.raises(QuickmergeError, match="dataset must hold at least one item"):
        train(Small(), Points(0), settings(), tmp_path)
    with pytest.raises(QuickmergeError, match="objective must have a parameter that requires a gradient"):
        train(Small().requires_grad_(False), Points(), settings(), tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(QuickmergeError, match="file/out"):
        train(Small(), Points(), settings(), tmp_path / "file" / "out")


def test_collate_and_dataset_smaller_than_a_batch(tmp_path: Path) -> None:
    sizes = []

    def collate(items: list[Any]) -> Any:
        sizes.append(len(items))
        return [torch.stack(part) for part in zip(*items, strict=True)]

    train(Small(), Points(3), settings(batch=7), tmp_path, collate=collate)
    assert sizes == [7] * 12


class _OutsideBase(Small):
    def __init__(self) -> None:
        super().__init__()
        self.base = [nn.Linear(4, 4).requires_grad_(False)]
        self.placed: list[torch.device] = []

    def place(self, device: torch.device) -> None:
        self.placed.append(device)
        self.base[0].to(device)


def test_a_base_outside_the_tree_is_placed_and_not_saved(tmp_path: Path) -> None:
    objective = _OutsideBase()
    result = train(objective, Points(), settings(), tmp_path)
    assert len(objective.placed) == 1
    assert not any("base" in name for name in load(result.checkpoint).model)
