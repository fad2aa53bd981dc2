"""What a request of the studio does: both answers, the maps, the numbers; what is refused, stopped and kept apart."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from studio_samples import DOCUMENT, QUESTION, image, save_models
from video_samples import write_frames

import quickmerge as qm
from quickmerge.recipe.answer import answer
from quickmerge.serve.studio import Session, Shelf, StoppedError, Teller, answer_text, look, look_video

ASKED: dict[str, Any] = {
    "model": "writer", "document": DOCUMENT, "question": QUESTION, "way": "QuickMerge", "keep": 0.4, "longest": 4
}  # fmt: skip


@pytest.fixture(scope="module")
def shelf(tmp_path_factory: pytest.TempPathFactory) -> Shelf:
    return Shelf.of(save_models(tmp_path_factory.mktemp("studio")))


def test_a_run_is_what_the_recipe_and_the_model_alone_write(shelf: Shelf) -> None:
    tell = Teller()
    run = answer_text(shelf, Session(), tell, **ASKED)
    lm, tokenizer = qm.load(shelf.called("writer").name, progress=False)
    recipe = qm.Recipe(merge=qm.Merge(qm.QuickMerge(keep=0.4), mode=qm.Prefix(min_tokens=0)))
    alone = answer(lm, tokenizer, DOCUMENT, QUESTION, None, max_new_tokens=4)
    merged = answer(lm, tokenizer, DOCUMENT, QUESTION, recipe, max_new_tokens=4)
    assert (run.plain.text, run.reduced.text) == (alone.text, merged.text)
    assert run.reduced.read == tuple(merged.stats["merge"].tokens_per_layer) and len(run.cells) == run.tokens
    assert run.reduced.cache_bytes == merged.stats["merge"].prompt_cache_bytes
    assert run.plain.cache_bytes == alone.stats.prompt_cache_bytes > run.reduced.cache_bytes
    assert run.same == (alone.ids.tolist() == merged.ids.tolist())
    assert tell.done == 1 and set(tell.parts) == {"cells", "reduced", "plain"}


def test_the_recovery_is_that_of_the_texts_end(shelf: Shelf) -> None:
    from quickmerge.bench.quality import continuation_nll

    run = answer_text(shelf, Session(), Teller(), **ASKED)
    lm, tokenizer = qm.load(shelf.called("writer").name, progress=False)
    ids = torch.tensor([tokenizer(DOCUMENT, add_special_tokens=False)["input_ids"]])
    cut = ids.shape[1] - min(192, ids.shape[1] // 4)

    def nll(context: Any, recipe: qm.Recipe) -> float:
        return float(continuation_nll(lm, context, ids[:, cut:], qm.apply(lm, recipe)).mean())

    recipe = qm.Recipe(merge=qm.Merge(qm.QuickMerge(keep=0.4), mode=qm.Prefix(min_tokens=0)))
    none, full, reduced = nll(None, qm.Recipe()), nll(ids[:, :cut], qm.Recipe()), nll(ids[:, :cut], recipe)
    if none - full < 0.02:  # random weights may learn nothing of a text
        assert run.recovery is None and "hardly helps" in run.remark
    else:
        assert run.recovery == pytest.approx((none - reduced) / (none - full), rel=1e-4)
    lossless = answer_text(shelf, Session(), Teller(), **{**ASKED, "way": "Prompt lookup: nothing lost"})
    assert lossless.recovery == 1 and lossless.same and lossless.keep is None and not lossless.cells
    short = answer_text(shelf, Session(), Teller(), **{**ASKED, "document": "A short text."})
    assert short.recovery is None and "at least 200 tokens" in short.remark


def test_the_plain_model_is_asked_once_of_a_text(shelf: Shelf) -> None:
    session = Session()
    first = answer_text(shelf, session, Teller(), **ASKED)
    tell = Teller()
    second = answer_text(shelf, session, tell, **{**ASKED, "keep": 0.2})
    assert second.plain == first.plain and "plain" not in tell.parts
    assert sum(second.reduced.read) < sum(first.reduced.read)


def test_a_cache_that_gets_smaller_is_counted(shelf: Shelf) -> None:
    run = answer_text(shelf, Session(), Teller(), **{**ASKED, "way": "SnapKV: a smaller cache"})
    assert not run.cells and run.plain.cache_bytes and run.reduced.cache_bytes
    assert run.reduced.cache_bytes < 0.6 * run.plain.cache_bytes


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"question": "  "}, "the question must hold some text"),
        ({"document": " \n "}, "the text must hold some text"),
        ({"document": "a\ud800b"}, "the text must be UTF-8"),
        ({"keep": 0.0}, r"must be a number in \(0, 1\]"),
        ({"keep": float("nan")}, r"must be a number in \(0, 1\]"),
        ({"keep": "0.4"}, "keep must be a number"),
        ({"longest": 0}, "from 1 to 512"),
        ({"longest": 10**9}, "from 1 to 512"),
        ({"way": "../../etc/passwd"}, "the recipe must be one of"),
        ({"model": "owner/name"}, "the model must be one of writer, seer, asked"),
        ({"model": "seer"}, "one that reads text"),
        ({"document": "word " * 3000}, "must fit the model's 1024 positions"),
        ({"document": "a" * 2_000_001}, "at most 2,000,000 characters"),
    ],
)
def test_what_is_refused_is_one_sentence(shelf: Shelf, given: dict[str, Any], said: str) -> None:
    with pytest.raises(qm.QuickmergeError, match=said):
        answer_text(shelf, Session(), Teller(), **{**ASKED, **given})


def test_a_run_is_stopped_in_the_middle_and_leaves_the_model_as_it_was(shelf: Shelf) -> None:
    session = Session()

    def work(tell: Teller) -> Any:
        show = tell.show

        def stopping(**parts: Any) -> None:
            show(**parts)
            if "reduced" in parts:
                assert session.stop()

        tell.show = stopping  # type: ignore[method-assign]
        return answer_text(shelf, session, tell, **ASKED)

    job = session.begin(work)
    with pytest.raises(StoppedError):
        job.finish()
    assert job.stopped and job.result is None and not session.stop()
    with shelf.using("writer", Teller()) as (_, lm, _):
        assert not any(module._forward_pre_hooks or module._forward_hooks for module in lm.modules())
    assert answer_text(shelf, session, Teller(), **ASKED).reduced.tokens


def test_a_prompt_is_stopped_between_blocks(shelf: Shelf) -> None:
    stop, seen = threading.Event(), []
    with shelf.using("writer", Teller()) as (_, lm, _):
        blocks = lm.model.layers
        hooks = [
            block.register_forward_hook(lambda *_, n=number: (seen.append(n), stop.set() if n == 1 else None)[-1])
            for number, block in enumerate(blocks)
        ]
        with pytest.raises(StoppedError), Teller(stop).inside(lm), torch.inference_mode():
            lm(torch.ones(1, 8, dtype=torch.long))
        for hook in hooks:
            hook.remove()
    assert seen == [0, 1]


def test_whoever_waits_for_the_model_can_stop(shelf: Shelf) -> None:
    session = Session()
    with shelf.using("writer", Teller()):
        job = session.begin(lambda tell: answer_text(shelf, session, tell, **ASKED))
        said = False
        for tell in job.watch():  # has something to say every tenth of a second
            said = said or "waiting" in tell.words
            if said:
                session.stop()
    assert job.stopped and said


def test_a_page_that_is_closed_stops_its_run(shelf: Shelf) -> None:
    session = Session()
    with shelf.using("writer", Teller()):  # so that it can't be done before
        job = session.begin(lambda tell: answer_text(shelf, session, tell, **ASKED))
        watching = job.watch()
        next(watching)
        watching.close()
        assert job.ended(20) and job.stopped


def test_one_user_has_one_run_at_a_time(shelf: Shelf) -> None:
    session = Session()
    with shelf.using("writer", Teller()):
        watching = session.begin(lambda tell: answer_text(shelf, session, tell, **ASKED)).watch()
        next(watching)
        with pytest.raises(qm.QuickmergeError, match="a run of yours is at work"):
            session.begin(lambda tell: None)
        watching.close()


def test_two_users_at_once_get_what_each_gets_alone(shelf: Shelf) -> None:
    asks = [
        {**ASKED, "document": " ".join(DOCUMENT.split()[first:]), "keep": keep} for first, keep in ((0, 0.3), (9, 0.6))
    ]
    alone = [answer_text(shelf, Session(), Teller(), **each) for each in asks]
    users = [Session(), Session()]
    jobs = [
        user.begin(lambda tell, user=user, each=each: answer_text(shelf, user, tell, **each))
        for user, each in zip(users, asks, strict=True)
    ]
    threads = [threading.Thread(target=job.finish) for job in jobs]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for job, wanted in zip(jobs, alone, strict=True):
        assert job.result is not None
        assert (job.result.reduced.text, job.result.plain.text) == (wanted.reduced.text, wanted.plain.text)
        assert [cell.slot for cell in job.result.cells] == [cell.slot for cell in wanted.cells]


def test_what_is_remembered_is_bounded_and_of_one_user() -> None:
    from copy import deepcopy

    first = Session()
    other = deepcopy(first)
    for number in range(60):
        first.keep_run("text", number / 100, number)
    first.look_at("text", "text")
    assert len(first.shown("text")) == 32 and list(first.shown("text").values())[-1] == 59
    assert not other.shown("text")


def test_a_fault_of_ours_is_told_apart() -> None:
    def work(_: Teller) -> None:
        raise RuntimeError("a thing")

    job = Session().begin(work)
    with pytest.raises(RuntimeError, match="a thing"):
        job.finish()
    assert job.error == "a fault of quickmerge itself: a thing"


# Images -------------------------------------------------------------------------------------------------------------


def test_patches_of_images_are_drawn_and_counted(shelf: Shelf) -> None:
    run = look(shelf, Session(), Teller(), model="seer", images=[image(0), image(1, "jpeg")], method="tome", keep=0.5)
    assert len(run.sheets) == 2 and run.tokens == 2 * 17 and run.kept < run.tokens and run.plain is None
    assert all(sheet.light.startswith("data:image/webp;base64,") for sheet in run.sheets)
    whole = look(shelf, Session(), Teller(), model="seer", images=[image()], method="tome", keep=1.0)
    assert not whole.sheets and "smaller share" in whole.remark


def test_a_model_that_can_be_asked_answers_twice(shelf: Shelf) -> None:
    given: dict[str, Any] = {"model": "asked", "images": [image()], "question": "which colour is it ?", "longest": 4}
    run = look(shelf, Session(), Teller(), method="scope", keep=0.25, **given)
    assert run.plain is not None and run.reduced is not None
    assert (run.tokens, run.kept) == (16, 4) and len(run.sheets) == 1
    assert sum(run.reduced.read) < sum(run.plain.read)
    same = look(shelf, Session(), Teller(), method="scope", keep=1.0, **given)
    assert same.same and same.tokens == same.kept


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"images": []}, "drop an image first"),
        ({"images": [b"<script>alert(1)</script>"]}, "image 1 can't be read as an image"),
        ({"images": [image()[:300]]}, "image 1 can't be read"),
        ({"images": [b"\0" * (20 * 2**20 + 1)]}, "image 1 must have at most 20 MiB"),
        ({"images": [image()] * 5}, "at most 4 images"),
        ({"method": "trimtokenator"}, "the method must be one of"),
        ({"keep": 2.0}, r"in \(0, 1\]"),
        ({"model": "writer"}, "one that reads images"),
        ({"model": "asked", "question": ""}, "the question must hold some text"),
    ],
)
def test_an_image_that_is_none_is_one_sentence(shelf: Shelf, given: dict[str, Any], said: str) -> None:
    usual: dict[str, Any] = {"model": "seer", "images": [image()], "method": "tome", "keep": 0.5}
    with pytest.raises(qm.QuickmergeError, match=said):
        look(shelf, Session(), Teller(), **{**usual, **given})


def test_a_video_is_merged_across_time(shelf: Shelf, tmp_path: Path) -> None:
    frames = np.random.default_rng(0).integers(0, 256, (6, 32, 32, 3), dtype=np.uint8)
    path = write_frames(tmp_path / "x.mp4", frames)
    given: dict[str, Any] = {"model": "seer", "method": "grid", "keep": 0.25, "frames": 4, "stride": 1}
    run = look_video(shelf, Session(), Teller(), video=path.read_bytes(), **given)
    assert run.tokens == 4 * 16 and run.kept == 16 and len(run.sheets) == 2
    with pytest.raises(qm.QuickmergeError, match="the video") as told:
        look_video(shelf, Session(), Teller(), video=b"no video at all", **given)
    assert str(tmp_path) not in str(told.value) and "quickmerge-" not in str(told.value)
    with pytest.raises(qm.QuickmergeError, match="drop a video first"):
        look_video(shelf, Session(), Teller(), video=b"", **given)
