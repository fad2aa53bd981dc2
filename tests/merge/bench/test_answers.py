"""Exact answers by one forward: the same as decoding, under every reducer, and nothing of the answer leaks."""

from __future__ import annotations

import io
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import vlm_zoo
from answer_samples import tiny_vlm
from PIL import Image
from rich.console import Console

import quickmerge as qm
from quickmerge.bench import harness
from quickmerge.datasets.annotated import Annotated, Question
from quickmerge.errors import QuickmergeError
from quickmerge.merge.bench.answers import RESIZE, AskedQuestion, answer_arms, ask, exact_answers
from quickmerge.merge.bench.vlm import answer_records, answer_rows, answers_report, bench_answers, time_answers
from quickmerge.merge.reducers import VISUAL_TOKEN_REDUCERS, make_reducer
from quickmerge.models.chat import prompt_ids

QUESTIONS = tuple(
    Question(kind, question, answer)
    for kind, question, answer in (
        ("what", "what is at the left ?", "star"),
        ("where", "where is the red star ?", "top left"),
        ("count", "how many star ?", "2"),
        ("what", "what is at the right ?", "red star"),
    )
)


@pytest.fixture(scope="module")
def vlm() -> tuple[Any, Any]:
    return tiny_vlm()


@pytest.fixture
def pictures(tmp_path) -> list[Annotated]:
    draws = np.random.default_rng(0)
    made = []
    for number in range(3):
        path = tmp_path / f"{number}.png"
        Image.fromarray(draws.integers(0, 256, (60, 48, 3), dtype=np.uint8)).save(path)
        made.append(Annotated(path, (), QUESTIONS[: 4 - number % 2]))
    return made


def picture(seed: int = 0) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (48, 48, 3), dtype=np.uint8))


def greedy(model: Any, one: AskedQuestion, run: Any, count: int) -> tuple[int, ...]:
    """What the model itself decodes, up to its end."""
    with run:
        out = model.generate(**one.inputs, max_new_tokens=count, do_sample=False)
    return tuple(out[0, one.ids.shape[1] :].tolist())


def method(name: str, keep: float = 0.3) -> Any:
    return make_reducer(name, place="visual", keep=keep)


@pytest.mark.parametrize("name", ["full", *VISUAL_TOKEN_REDUCERS])
def test_an_answer_is_right_if_and_only_if_decoding_gives_it(vlm, name: str) -> None:
    model, processor = vlm

    def run() -> Any:
        return nullcontext() if name == "full" else qm.reduce(model, method(name), layer=0)

    asked = ask(model, processor, picture(), QUESTIONS)
    decoded = [greedy(model, one, run(), 3) for one in asked]
    assert len(set(decoded)) > 1 or name != "full"  # the model is not blind to what it is asked
    shared = "text" not in ({} if name == "full" else method(name).needs.visual)
    for wrong_at in (None, 0, 1, 2):
        gold = [list(each) for each in decoded]
        if wrong_at is not None:
            for each in gold[::2]:
                at = min(wrong_at, len(each) - 1)
                each[at] = (each[at] + 1) % 20
        told = [AskedQuestion(one.inputs, tuple(each)) for one, each in zip(asked, gold, strict=True)]
        answered = exact_answers(model, told, run(), shared=shared)
        assert answered.right == ((True,) * 4 if wrong_at is None else (False, True, False, True))
        assert answered.visual_in == 36
        assert answered.visual_kept == (36 if name == "full" else pytest.approx(36 * 0.3, abs=1))
    # one question alone, and an answer of one token
    short = AskedQuestion(asked[2].inputs, decoded[2][:1])
    assert exact_answers(model, [short], run(), shared=shared).right == (True,)


@pytest.mark.parametrize("name", [n for n in VISUAL_TOKEN_REDUCERS if "text" not in method(n).needs.visual])
def test_reading_the_image_once_changes_nothing(vlm, name: str) -> None:
    model, processor = vlm
    asked = ask(model, processor, picture(3), QUESTIONS)
    alone = [greedy(model, one, qm.reduce(model, method(name), layer=0), 2) for one in asked]
    told = [AskedQuestion(one.inputs, each) for one, each in zip(asked, alone, strict=True)]
    for shared in (True, False):
        answered = exact_answers(model, told, qm.reduce(model, method(name), layer=0), shared=shared)
        assert all(answered.right), (name, shared)


def test_a_method_that_looks_at_the_text_sees_each_question_and_no_answer(vlm, monkeypatch) -> None:
    model, processor = vlm
    asked = ask(model, processor, picture(), QUESTIONS)
    seen: list[int] = []
    plan = qm.TrimTokenator.plan

    def watched(self: Any, view: Any) -> Any:
        there = view.evidence.text.shape[1] if view.evidence.text_valid is None else int(view.evidence.text_valid.sum())
        seen.append(there)
        return plan(self, view)

    monkeypatch.setattr(qm.TrimTokenator, "plan", watched)
    exact_answers(model, asked, qm.reduce(model, method("trimtokenator"), layer=0), shared=False)
    with torch.no_grad():
        want = []
        for one in asked:
            with qm.reduce(model, method("trimtokenator"), layer=0):
                model(**one.inputs)
            want.append(seen.pop())
    assert seen == want and len(set(want)) > 1


def test_the_tower_looks_at_an_image_once(vlm) -> None:
    model, processor = vlm
    asked = ask(model, processor, picture(), QUESTIONS)
    looks: list[Any] = []
    handle = model.model.vision_tower.register_forward_hook(lambda *_: looks.append(1))
    try:
        for name in ("scope", "trimtokenator"):
            exact_answers(model, asked, qm.reduce(model, method(name), layer=0), shared=name == "scope")
    finally:
        handle.remove()
    assert len(looks) == 2


def test_arms_ask_for_the_share_of_tokens(vlm, pictures) -> None:
    model, processor = vlm
    arms = answer_arms(model, processor, [qm.Random(), qm.TrimTokenator()], [0.5, 0.25])
    assert [(arm.name, arm.keep, arm.settings.get("shared", True)) for arm in arms] == [
        ("random", 0.5, True), ("trimtokenator", 0.5, False), (RESIZE, 0.5, True),
        ("random", 0.25, True), ("trimtokenator", 0.25, False), (RESIZE, 0.25, True),
    ]  # fmt: skip
    before = {name: value.clone() for name, value in model.state_dict().items()}
    found = bench_answers(model, processor, pictures, arms, rounds=2)
    rows, records = found.rows, found.records
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert [(row["method"], row["keep"]) for row in rows] == [("full", 1.0), *((arm.name, arm.keep) for arm in arms)]
    assert [row["visual_kept"] for row in rows] == [36, 18, 18, 16, 9, 9, 9]
    assert len(records) == 3 * 7 and all(row["visual_in"] == 36 for row in rows)
    for row in rows:
        assert row["questions"] == 11 and row["images"] == 3
        assert {kind: each["questions"] for kind, each in row["kinds"].items()} == {"what": 5, "where": 3, "count": 3}
        assert 0 < row["tower_seconds"] < row["seconds"] and 0 < row["prefill_seconds"] < row["seconds"]
        assert row["rounds"] == 2 and row["speedup_low"] <= row["speedup"] <= row["speedup_high"]
    assert rows[0]["speedup"] == 1 and rows[0]["change"] == 0 and rows[0]["reducer_seconds"] == 0
    assert rows[1]["reducer_seconds"] > 0
    # caches hold what is left of the image and the text
    per_token = rows[0]["cache_bytes"] - rows[1]["cache_bytes"]
    assert per_token == 18 * 2 * 2 * 2 * 8 * 4
    assert rows[3]["cache_bytes"] == rows[0]["cache_bytes"] - 20 * per_token // 18


def test_rows_count_questions_and_changes() -> None:
    def record(image: str, method: str, keep: float, right: list[bool], kinds: list[str]) -> dict[str, Any]:
        return {"image": image, "method": method, "keep": keep, "right": right, "kinds": kinds,
                "visual_in": 100, "visual_kept": 100 * keep}  # fmt: skip

    rows = answer_rows([
        record("a", "full", 1.0, [True, True, False], ["x", "y", "y"]),
        record("a", "tome", 0.5, [True, False, False], ["x", "y", "y"]),
        record("b", "full", 1.0, [True], ["y"]),
        record("b", "tome", 0.5, [False], ["y"]),
    ])  # fmt: skip
    full, tome = rows
    assert full["exact"] == 3 / 4 and full["kinds"] == {
        "x": {"questions": 1, "exact": 1.0}, "y": {"questions": 3, "exact": pytest.approx(2 / 3)}
    }  # fmt: skip
    assert tome["exact"] == 1 / 4 and tome["change"] == -2 / 4 and tome["visual_kept"] == 50
    assert tome["change_low"] == -1 and tome["change_high"] == pytest.approx(-1 / 3)
    assert full["change"] == full["change_low"] == full["change_high"] == 0
    with pytest.raises(QuickmergeError, match="at least one"):
        answer_rows([])


def test_times_are_taken_in_turns_and_the_first_round_only_warms_up(vlm, pictures, monkeypatch) -> None:
    model, processor = vlm
    arms = answer_arms(model, processor, [qm.Random()], [0.5], smaller=False)
    order: list[str] = []
    rows = time_answers(model, processor, pictures, arms, 2, order.append)
    assert order == ["full", "random 0.5", "full", "random 0.5", "random 0.5", "full"] and len(rows) == 2
    clock = iter(range(1000))
    monkeypatch.setattr(harness, "now", lambda _: float(next(clock) ** 2))
    full, half = time_answers(model, processor, pictures, arms, 1)
    # read before and after each of two in the round that warms up, and in the one that counts
    assert full["seconds"] == 5**2 - 4**2 and half["seconds"] == 7**2 - 6**2
    assert half["speedup"] == full["seconds"] / half["seconds"]


def test_bad_input_is_told_in_one_sentence(vlm, pictures) -> None:
    model, processor = vlm
    with pytest.raises(QuickmergeError, match="questions must be at least one"):
        exact_answers(model, [], nullcontext())
    (one,) = ask(model, processor, picture(), QUESTIONS[:1])
    bare = AskedQuestion({**one.inputs, "input_ids": one.ids.clamp(max=5)}, one.answer)
    with pytest.raises(QuickmergeError, match="must hold an image"):
        exact_answers(model, [bare], nullcontext())
    broken = Annotated(Path("gone.png"), (), QUESTIONS)
    with pytest.raises(QuickmergeError, match=r"gone\.png"):
        answer_records(model, processor, broken, [])


def test_half_precision_asks_in_half_precision(vlm) -> None:
    model, processor = vlm
    try:
        half = model.to(torch.bfloat16)
        asked = ask(half, processor, picture(), QUESTIONS)
        assert asked[0].inputs["pixel_values"].dtype == torch.bfloat16
        decoded = [greedy(half, one, qm.reduce(half, qm.Random(keep=0.5), layer=0), 2) for one in asked]
        told = [AskedQuestion(one.inputs, each) for one, each in zip(asked, decoded, strict=True)]
        answered = exact_answers(half, told, qm.reduce(half, qm.Random(keep=0.5), layer=0))
        assert sum(answered.right) >= 3  # sums in another order may turn a near tie
    finally:
        model.float()


def test_questions_are_asked_as_they_were_trained(vlm) -> None:
    model, processor = vlm
    for one, question in zip(ask(model, processor, picture(), QUESTIONS), QUESTIONS, strict=True):
        assert one.ids[0].tolist() == prompt_ids(processor.tokenizer, question.question, 36)
        assert processor.tokenizer.decode(one.answer) == f"{question.answer} <end>"


def test_the_table_has_a_line_for_each_method_and_a_column_for_each_kind(vlm, pictures) -> None:
    model, processor = vlm
    arms = answer_arms(model, processor, [qm.SCOPE()], [0.5, 0.25])
    rows = bench_answers(model, processor, pictures, arms, rounds=0).rows
    printed = io.StringIO()
    answers_report(rows, {"model": "m", "images": 3}).print(Console(file=printed, width=200))
    lines = printed.getvalue().partition("──\n")[2].splitlines()
    assert lines[0].startswith("full ")
    assert sorted(line[:14].strip() for line in lines[1:5]) == sorted(["scope", RESIZE] * 2)
    assert all(name in printed.getvalue() for name in ("count", "what", "where", "visual"))
    assert "ms" not in printed.getvalue()


@pytest.mark.parametrize("family", vlm_zoo.FAMILIES)
@pytest.mark.parametrize("name", ["full", "random", "tome", "trimtokenator"])
def test_every_family_is_asked_as_it_decodes(family: str, name: str) -> None:
    """Positions in a grid, tiles and features of several depths: an image read once answers as each prompt alone."""
    model = vlm_zoo.model_of(family)
    first = vlm_zoo.prompt(model, [[0]])
    end = int((first["input_ids"][0] == vlm_zoo.IMAGE).nonzero()[-1]) + 2
    inputs = []
    for words in ([5, 6, 7, 8], [5, 9], [20, 21, 22]):
        ids = torch.cat([first["input_ids"][:, :end], torch.tensor([words])], 1)
        own = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        if "mm_token_type_ids" in first:
            own["mm_token_type_ids"] = (ids == vlm_zoo.IMAGE).int()
        inputs.append({**first, **own})

    def run() -> Any:
        return nullcontext() if name == "full" else qm.reduce(model, method(name, 0.5), layer=0)

    told = []
    for each in inputs:
        with run():
            out = model.generate(**each, max_new_tokens=3, do_sample=False)
        told.append(AskedQuestion(each, tuple(out[0, each["input_ids"].shape[1] :].tolist())))
    assert len({one.answer for one in told}) > 1
    shared = name != "trimtokenator"
    assert exact_answers(model, told, run(), shared=shared).right == (True,) * 3
    wrong = AskedQuestion(told[1].inputs, (*told[1].answer[:-1], 60))
    assert exact_answers(model, [told[0], wrong, told[2]], run(), shared=shared).right == (True, False, True)
