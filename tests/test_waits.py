"""How often the host waits for a device: counted, on a device that has no hardware (`samples/waits.py`)."""

from __future__ import annotations

import pytest
import torch
from wait_cases import CASES, QUICK, TOME, generate, model_of, text
from waits import DEVICE, Held, counting, on_device

import quickmerge as qm
from quickmerge.bench.harness import PENDING, Lapse, mark, settled
from quickmerge.merge.tokens import view as views

BOUNDS = {
    # One look at the prompt's mask, ids and positions tells everything that follows from them.
    "prompt, QuickMerge, 1 row": 1,
    "prompt, QuickMerge, 4 padded rows": 1,
    "prompt, ToMe, 4 padded rows": 1,
    "prompt, QuickMerge, sliding windows, 4 padded rows": 1,
    # How many tokens are kept depends on what is in them, and is the width of what is read from there on.
    "prompt, QuickMerge by entropy, 4 padded rows": 2,
    # How many entries each layer has, and then how many stay in its heads, is the shape of what it holds.
    "prompt, QuickMerge and eviction, 4 padded rows": 3,
    "step, QuickMerge": 0,
    "step, QuickMerge, sliding windows": 0,
    "step, QuickMerge and eviction, sliding windows": 0,
    "prompt, chunks, 1 row": 1,
    "step, chunks": 0,
    "step, Multipole": 0,
    "images, ViT with ToMe, 1": 0,
    "images, ViT with ToMe, 8": 0,
    "images, ViT with QuickMerge, 8": 0,
    # Mask and ids; whether the features stand where they should; and the grids, or whether what was measured is lawful.
    "images, LLaVA with SCOPE, 1": 4,
    "images, LLaVA with SCOPE, 4 in 2 rows": 4,
    "images, Qwen2.5-VL with ToMe, 1": 4,
    "images, Qwen2.5-VL with ToMe, 4": 4,
}
"""Waits beyond those of the plain model."""

PASSES = {
    "pass, lookup, 4 rows": 1,
    "pass, lookup, 4 rows, sampled": 1,
    # What the heads say of the next tokens is read too, which nobody knows until these tokens are.
    "pass, heads, 4 rows": 2,
}
"""Waits of a pass of speculation, all told."""

OPERATIONS = {"pass, lookup, 4 rows": 100, "pass, lookup, 4 rows, sampled": 120}
"""Operations of a pass outside of the model, of twelve blocks. Two for each block cut off what wasn't accepted of its
keys and values; the rest doesn't grow with the blocks."""

QUICKLY = (
    "QuickMerge, 1 row",
    "step, QuickMerge, sliding",
    "ViT with ToMe, 8",
    "LLaVA with SCOPE, 4",
    "lookup, 4 rows",
)


@pytest.fixture(autouse=True)
def unchecked(monkeypatch: pytest.MonkeyPatch) -> None:
    """As users have it: methods of our own are taken at their word."""
    monkeypatch.setattr(views, "CHECKS", False)


def _marked(names: dict[str, int]) -> list[object]:
    """The quickest of each kind in every run of the tests, the others in the long one."""
    quick = [any(part in name for part in QUICKLY) for name in names]
    return [name if now else pytest.param(name, marks=pytest.mark.slow) for name, now in zip(names, quick, strict=True)]


@pytest.mark.parametrize("name", _marked(BOUNDS))
def test_no_more_is_waited_for_than_has_to_be(name: str) -> None:
    found = CASES[name]()
    assert 0 <= found.more <= BOUNDS[name]


@pytest.mark.parametrize("name", _marked(PASSES))
def test_a_pass_of_speculation_waits_once(name: str) -> None:
    found = CASES[name]()
    assert 0 < found.waits <= PASSES[name]
    assert found.operations <= OPERATIONS.get(name, float("inf"))


# The device itself ------------------------------------------------------------------------------------------------


def test_the_device_counts_what_a_gpu_waits_for() -> None:
    x = Held(torch.arange(6.0).view(2, 3))
    waits = {
        "bool": lambda: bool((x > 1).any()),
        "int": lambda: int(x.sum()),
        "list": lambda: x.tolist(),
        "host": lambda: x.cpu(),
        "copied": lambda: x.to("cpu"),
        "nonzero": lambda: x.nonzero(),
        "mask": lambda: x[x > 2],
        "equal": lambda: torch.equal(x, x),
        "tensor": lambda: torch.tensor([1, 2], device=x.device),
        "moved": lambda: torch.arange(3).to(x.device),
        "synchronize": lambda: torch.cuda.synchronize(),
        "index": lambda: x[:, torch.tensor([0, 1])],
    }
    free = {
        "add": lambda: x + 1,
        "zeros": lambda: torch.zeros(3, device=x.device),
        "index": lambda: x[:, torch.zeros(2, dtype=torch.long, device=x.device)],
        "moved": lambda: torch.arange(3).to(x.device, non_blocking=True),
        "where": lambda: torch.where(x > 1, x, 0.0),
    }
    for call in waits.values():
        with counting() as count:
            call()
        assert count.waits == 1
    for call in free.values():
        with counting() as count:
            call()
        assert count.waits == 0 and count.operations > 0
    with counting(), pytest.raises(RuntimeError, match="one device"):
        x + torch.ones(3)


@pytest.mark.parametrize("reducer", [QUICK, TOME], ids=lambda each: each.name)
def test_what_is_written_on_the_device_is_what_is_written_on_the_host(reducer: qm.Reducer) -> None:
    on_it, steps = model_of("gemma3"), 5
    host = type(on_it)(on_it.config).eval()
    host.load_state_dict({name: x.held for name, x in on_it.state_dict().items()})
    given = {name: x.held for name, x in text(4).items()}
    with torch.no_grad(), qm.reduce(host, reducer, min_tokens=1):
        wanted = host.generate(**given, max_new_tokens=steps, min_new_tokens=steps, do_sample=False)
    with torch.no_grad(), counting(), qm.reduce(on_it, reducer, min_tokens=1) as run:
        found = generate("gemma3", 4, steps)
        assert found.device == DEVICE and torch.equal(found.cpu(), wanted)
    assert run.summary().decode_steps == steps - 1


# The clock --------------------------------------------------------------------------------------------------------


class Event:
    """An event at a time; ``passed`` says whether the GPU has come by."""

    waited = 0

    def __init__(self, at: float, passed: bool = False) -> None:
        self.at, self.passed = at, passed

    def query(self) -> bool:
        return self.passed

    def synchronize(self) -> None:
        Event.waited += not self.passed
        self.passed = True

    def elapsed_time(self, other: Event) -> float:
        assert self.passed or other.passed
        return 1e3 * (other.at - self.at)


def test_seconds_between_marks_add_up_and_wait_for_nothing_until_they_are_asked_for() -> None:
    Event.waited, total = 0, 0.0
    for step in range(PENDING + 8):
        total += Lapse(((Event(step), Event(step + 0.5, passed=step < 4)),))
    assert isinstance(total, Lapse) and Event.waited == 0
    assert len(total._pairs) == PENDING + 4  # those that had ended were read off
    assert float(1.0 + total) == pytest.approx(1.0 + (PENDING + 8) / 2)
    assert Event.waited == PENDING + 4


def test_statistics_are_settled_by_a_summary_alone() -> None:
    model = on_device(type(model_of("llama"))(model_of("llama").config).eval())
    with torch.no_grad(), counting() as count, qm.reduce(model, QUICK, min_tokens=1) as run:
        model.generate(**text(1), max_new_tokens=3, do_sample=False)
        before = count.copy()
        assert not any("synchronize" in where for where in before.reads)
        assert isinstance(run.stats.prefill_seconds, Lapse)
        seconds = run.summary().prefill_seconds
        assert isinstance(seconds, float) and seconds > 0
        assert any("synchronize" in where for where in count.since(before).reads)
    assert isinstance(mark("cpu"), float) and isinstance(mark(), float)


def test_to_settle_changes_nothing_but_what_is_pending() -> None:
    class Stats:
        def __init__(self) -> None:
            self.seconds, self.name = Lapse(((Event(1.0, True), Event(3.0, True)),)), "x"

    stats = settled(Stats())
    assert vars(stats) == {"seconds": 2.0, "name": "x"}


# What the host is told is looked at by the tests ------------------------------------------------------------------


def test_a_wrong_promise_is_found_where_it_is_looked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(views, "CHECKS", True)
    view = qm.TokenView(torch.randn(2, 5, 3))
    anchor = torch.tensor([[True, False, True, False, True]]).expand(2, -1)
    assert qm.MergePlan.from_anchors(view, anchor, kept=[3, 3]).counts == (3, 3)
    with pytest.raises(ValueError, match="kept must be"):
        qm.MergePlan.from_anchors(view, anchor, kept=[3, 2])
    known = views.Known((5, 4), (0, 0), (0, 0), (5, 4), (True, True))
    with pytest.raises(ValueError, match="known must be"):
        qm.TokenView(torch.randn(2, 5, 3), known=known)
