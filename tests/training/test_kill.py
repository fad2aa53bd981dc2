from pathlib import Path

from training_samples import lines, run_script, saved

from quickmerge.files import settle
from quickmerge.training.checkpoint import MODEL, OPTIMIZER, load


def same_run(whole: Path, other: Path) -> None:
    """Equal to the last bit: weights, optimizer and metrics; and nothing left over."""
    assert lines(whole) == lines(other)
    assert saved(whole) == saved(other)
    for name in saved(whole):
        for file in (MODEL, OPTIMIZER):
            parts = [out / "checkpoints" / name / file for out in (whole, other)]
            assert parts[0].read_bytes() == parts[1].read_bytes(), (other.name, name, file)


def test_a_run_killed_at_three_random_moments_ends_as_if_it_had_not_been(tmp_path: Path) -> None:
    printed = run_script("killed_runs.py", "at_random_moments", tmp_path)
    assert printed.count("killed behind step") == 3
    assert load(tmp_path / "killed" / "checkpoints" / "step-000060").step == 60
    same_run(tmp_path / "whole", tmp_path / "killed")


def test_a_run_may_be_killed_before_any_write(tmp_path: Path) -> None:
    kills = int(run_script("killed_runs.py", "at_each_write", tmp_path).split()[-1])
    assert kills > 20
    for number in range(1, kills + 1):
        same_run(tmp_path / "whole", tmp_path / f"killed-{number}")


def test_a_kill_between_two_renames_loses_neither_folder(tmp_path: Path) -> None:
    run_script("killed_runs.py", "between_renames", tmp_path)
    settle(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["target"]
    assert (tmp_path / "target" / "word").read_bytes() == b"old"
