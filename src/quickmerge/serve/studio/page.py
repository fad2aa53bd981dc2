"""The page: three tabs, for a text, for images and for a video; each a column of controls and one of results."""

from __future__ import annotations

import sys
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import gradio as gr

from quickmerge.data import demo_document, demo_question
from quickmerge.errors import QuickmergeError, clean, half_character
from quickmerge.serve.studio import shown
from quickmerge.serve.studio.jobs import Job, Teller
from quickmerge.serve.studio.sessions import Session
from quickmerge.serve.studio.shelf import Shelf
from quickmerge.serve.studio.ways import Told, Way, way_called, ways_of
from quickmerge.serve.studio.work import LONGEST, MOST_LETTERS, TextRun, answer_text
from quickmerge.serve.studio.work_images import FRAMES, ImageRun, look, look_video, methods_for
from quickmerge.viz.render import macro

__all__ = ["SHARES", "example", "make_page"]

SHARES = (0.1, 0.2, 0.3, 0.42, 0.6, 0.8, 1.0)
"""What *Try every share* tries."""
STEP = 1.4
"""Seconds that an animated share stays."""
OPENED = (".txt", ".md", ".rst", ".py", ".json", ".csv", ".log", ".html", "text")
PICTURES, MOVIES = ["image"], ["video"]
DESCRIBE = "Describe the image."


def example() -> tuple[str, str]:
    """A part of the shipped document, short enough for a quick run, and a question that it answers."""
    document, asked = demo_document(), demo_question()
    parts = document.split("\n\n")
    at = next(i for i, part in enumerate(parts) if asked["answer"] in part)
    return "\n\n".join(parts[at - 5 : at + 8]), asked["question"]


def make_page(shelf: Shelf, further: Sequence[Way] = ()) -> gr.Blocks:
    """The page for these models.

    Args:
        shelf: the models on offer.
        further: recipes that were loaded, besides the usual ones.
    """
    # Nothing is reported to gradio, and no event is offered as an API: the page is for people.
    with gr.Blocks(title="quickmerge studio", analytics_enabled=False, delete_cache=(600, 600)) as page:
        session = gr.State(Session(), delete_callback=lambda held: held.stop())
        gr.HTML(
            f'<div class="qs-head">{macro("mark")}<h1>quickmerge studio</h1>'
            "<p>Give a text or an image, and see what a model can do without.</p></div>", js_on_load=None,
        )  # fmt: skip
        with gr.Tabs():
            with gr.Tab("Text"):
                _text_tab(shelf, further, session)
            with gr.Tab("Images"):
                _image_tab(shelf, session)
            with gr.Tab("Video"):
                _video_tab(shelf, session)
        page.queue(default_concurrency_limit=16, api_open=False)
    return page


# What every tab shows ------------------------------------------------------------------------------------------------


@dataclass
class Results:
    """The column of results of a tab."""

    status: Any
    answers: Any
    numbers: Any
    map: Any
    replay: Any
    row: Any
    play: Any
    timer: Any
    python: Any
    command: Any
    file: Any
    save: Any

    @property
    def view(self) -> list[Any]:
        """What a run fills, in the order of `_view`."""
        return [self.status, self.answers, self.numbers, self.map, self.python, self.command, self.file, self.save]

    @property
    def all(self) -> list[Any]:
        """The same, and what begins to be there with a second run."""
        return [*self.view, self.replay, self.row]


def _results(empty: str, answers: bool = True, recipe: bool = True) -> Results:
    status = gr.HTML(shown.status("Ready."), js_on_load=None, elem_classes="qs-out")
    said = gr.HTML("", js_on_load=None, visible=answers, elem_classes="qs-out")
    with gr.Row(visible=False, equal_height=False, elem_classes="qs-replay") as row:
        replay = gr.Slider(0.05, 1.0, value=0.4, step=0.01, label="Share kept, from the runs so far", scale=4,
                           buttons=[])  # fmt: skip
        play = gr.Button("Play", scale=1, min_width=90)
    numbers = gr.HTML("", js_on_load=None, elem_classes="qs-out")
    drawn = gr.HTML(shown.nothing_yet(empty), js_on_load=None, elem_classes="qs-out")
    with gr.Accordion("Take the recipe along", open=False, visible=recipe):
        python = gr.Code("", language="python", label="Python", lines=2, interactive=False, wrap_lines=True)
        command = gr.Code("", language="shell", label="Command", lines=2, interactive=False, wrap_lines=True)
        file = gr.Code("", language="json", label="recipe.json", lines=2, interactive=False, wrap_lines=True)
        save = gr.HTML("", js_on_load=None)
    timer = gr.Timer(STEP, active=False)
    return Results(status, said, numbers, drawn, replay, row, play, timer, python, command, file, save)


def _told(told: Told | None) -> list[Any]:
    return ["", "", "", ""] if told is None else [told.python, told.command, told.file, shown.download(told.file)]


def _view(run: TextRun | ImageRun, words: str = "") -> list[Any]:
    """A run, for `Results.view`."""
    if isinstance(run, TextRun):
        drawn = shown.token_map(run.cells, run.keep)
        said = shown.answers(run.plain.text, run.reduced.text)
    else:
        drawn = shown.sheets(run.sheets) or shown.nothing_yet(run.remark or "Nothing was merged.")
        said = "" if run.plain is None or run.reduced is None else shown.answers(run.plain.text, run.reduced.text)
    return [shown.status(words or shown.verdict(run), kind="good"), said, shown.numbers(run), drawn, *_told(run.told)]


def _refused(words: str) -> list[Any]:
    return [shown.status(words, kind="error"), *[gr.skip()] * 9]


def _follow(job: Job[Any], finish: Callable[[Any], list[Any]]) -> Iterator[list[Any]]:
    """What the results show while a job is at work, and at its end."""
    drawn: Any = None
    for tell in job.watch():
        parts, out = tell.parts, [shown.status(f"{tell.words} …", tell.done), *[gr.skip()] * 9]
        if "reduced" in parts or "plain" in parts:
            out[1] = shown.answers(parts.get("plain"), parts.get("reduced"))
        found = parts.get("cells") or parts.get("sheets")
        if found and found is not drawn:  # a map is large, and sent once
            drawn = found
            out[3] = shown.token_map(found, None) if "cells" in parts else shown.sheets(found)
        yield out
    if job.fault is not None:
        print(clean("".join(traceback.format_exception(job.fault))), file=sys.stderr)
    if job.stopped:
        yield [shown.status("Stopped."), *[gr.skip()] * 9]
    elif job.error:
        yield _refused(job.error)
    else:
        yield finish(job.result)


def _work(session: Session, work: Callable[[Teller], Any], finish: Callable[[Any], list[Any]]) -> Iterator[list[Any]]:
    try:
        job = session.begin(work)
    except QuickmergeError as error:
        yield _refused(str(error))
        return
    yield from _follow(job, finish)


def _replayed(session: Session, place: str, keep: float, results: bool = True) -> list[Any]:
    """The run that is nearest to a share, for `Results.view`."""
    runs = session.shown(place)
    if not runs:
        return [shown.status("No run is done yet."), *[gr.skip()] * 7]
    nearest = min(runs, key=lambda share: abs(share - keep))
    return _view(runs[nearest], f"Shown: the run at keep {nearest:g}. {len(runs)} runs are done.")


def _wire_replay(place: str, results: Results, session: Any) -> None:
    """Let the slider show what is done, by hand and by itself."""

    def slide(held: Session, keep: float) -> list[Any]:
        return _replayed(held, place, keep)

    def play(label: str, held: Session) -> list[Any]:
        going = label == "Play" and len(held.shown(place)) > 1
        first = min(held.shown(place), default=0.4)
        return [gr.Button("Pause" if going else "Play"), gr.Timer(active=going), first if going else gr.skip(),
                *(_replayed(held, place, first) if going else [gr.skip()] * 8)]  # fmt: skip

    def tick(held: Session, keep: float) -> list[Any]:
        shares = list(held.shown(place))
        rest = [share for share in shares if share > keep + 1e-6]
        if not rest:
            return [gr.Button("Play"), gr.Timer(active=False), gr.skip(), *[gr.skip()] * 8]
        last = len(rest) == 1
        return [gr.Button("Play") if last else gr.skip(), gr.Timer(active=False) if last else gr.skip(), rest[0],
                *_replayed(held, place, rest[0])]  # fmt: skip

    quiet: dict[str, Any] = {"show_progress": "hidden", "api_visibility": "private"}
    every = [results.play, results.timer, results.replay, *results.view]
    results.replay.input(slide, [session, results.replay], results.view, trigger_mode="always_last", **quiet)
    results.play.click(play, [results.play, session], every, **quiet)
    results.timer.tick(tick, [session, results.replay], every, **quiet)


def _done(session: Session, place: str, group: Any, run: Any) -> list[Any]:
    """Remember a run and show it; with the slider, once there are several."""
    if run.keep is None:
        return [*_view(run), gr.skip(), gr.Row(visible=False)]
    session.keep_run(group, run.keep, run)
    session.look_at(place, group)
    return [*_view(run), run.keep, gr.Row(visible=len(session.shown(place)) > 1)]


def _buttons() -> tuple[Any, Any, Any]:
    with gr.Row():
        run = gr.Button("Run", variant="primary", min_width=80, scale=2)
        stop = gr.Button("Stop", variant="stop", min_width=80, scale=2)
        shares = gr.Button("Try every share", min_width=150, scale=3)
    return run, stop, shares


def _stop(session: Session) -> Any:
    # What is at work says by itself that it ends.
    return gr.skip() if session.stop() else shown.status("Nothing is at work.")


def _wire(run: Any, stop: Any, shares: Any, work: Any, inputs: list[Any], results: Results, session: Any) -> None:
    """Let the buttons work; ``work`` gets the session, the shares to try (None for the one chosen), and the inputs."""
    # A click counts although the page has not heard yet that the last run is over; the session refuses a second run.
    usual: dict[str, Any] = {"show_progress": "hidden", "api_visibility": "private", "trigger_mode": "multiple"}

    def one(held: Session, *given: Any) -> Iterator[list[Any]]:
        yield from work(held, None, *given)

    def each(held: Session, *given: Any) -> Iterator[list[Any]]:
        yield from work(held, SHARES, *given)

    run.click(one, [session, *inputs], results.all, **usual)
    shares.click(each, [session, *inputs], results.all, **usual)
    stop.click(_stop, [session], [results.status], queue=False, **usual)


# Text ---------------------------------------------------------------------------------------------------------------


def _text_tab(shelf: Shelf, further: Sequence[Way], session: Any) -> None:
    models = shelf.among("text")
    ways = ways_of(models[0].name, further)
    text, asked = example()
    with gr.Row():
        with gr.Column(scale=5, min_width=300):
            document = gr.Textbox(text, label="Text", lines=8, max_lines=8, placeholder="Paste a text here.")
            with gr.Row():
                opened = gr.UploadButton("Open a file", file_types=list(OPENED), type="binary", size="sm",
                                         min_width=90)  # fmt: skip
                short = gr.Button("Example", size="sm", min_width=90)
                long = gr.Button("Long example", size="sm", min_width=90)
            question = gr.Textbox(asked, label="Question, which is never reduced", lines=1, max_lines=4)
            with gr.Row():
                model = gr.Dropdown([m.label for m in models], value=models[0].label, label="Model", min_width=140)
                way = gr.Dropdown([w.label for w in ways], value=ways[0].label, label="Recipe", min_width=180)
            about = gr.Markdown(ways[0].about, elem_classes="qs-about")
            keep = gr.Slider(0.05, 1.0, value=0.4, step=0.01, label="Keep: share of the tokens",
                             interactive=ways[0].shares, buttons=[])  # fmt: skip
            with gr.Accordion("More settings", open=False):
                literals = gr.Checkbox(False, label="Keep numbers, names and paths whole")
                recovery = gr.Checkbox(True, label="Measure recovery", info="Takes about as long as the answers.")
                longest = gr.Slider(1, LONGEST, value=32, step=1, label="Longest answer", info="In tokens.", buttons=[])
            run, stop, shares = _buttons()
        with gr.Column(scale=7, min_width=300):
            results = _results("Run, and the text is shown here as the model read it, token by token.")

    def pick_way(label: str, name: str) -> list[Any]:
        try:
            chosen = way_called(label, ways_of(shelf.called(name).name, further))
        except QuickmergeError as error:
            return [str(error), gr.skip()]
        return [chosen.about, gr.Slider(interactive=chosen.shares)]

    def pick_model(name: str, label: str) -> Any:
        labels = [each.label for each in ways_of(shelf.called(name).name, further)]
        return gr.Dropdown(labels, value=label if label in labels else labels[0])

    def work(
        held: Session, tried: Sequence[float] | None, document: str, question: str, model: str, way: str, keep: float,
        literals: bool, recovery: bool, longest: int,
    ) -> Iterator[list[Any]]:  # fmt: skip
        group = ("text", model, document, question, way, literals, longest, recovery)

        def one(share: float) -> Callable[[Teller], TextRun]:
            return lambda tell: answer_text(
                shelf, held, tell, model=model, document=document, question=question, way=way, keep=share,
                literals=literals, longest=longest, recovery=recovery, further=further,
            )  # fmt: skip

        yield from _runs(held, "text", group, keep, tried, one)

    quiet: dict[str, Any] = {"show_progress": "hidden", "api_visibility": "private"}
    opened.upload(_open_text, [opened], [document, results.status], **quiet)
    short.click(example, None, [document, question], **quiet)
    long.click(lambda: (demo_document(), asked), None, [document, question], **quiet)
    way.change(pick_way, [way, model], [about, keep], **quiet)
    model.change(pick_model, [model, way], [way], **quiet)
    _wire(
        run, stop, shares, work, [document, question, model, way, keep, literals, recovery, longest], results, session
    )
    question.submit(lambda *given: (yield from work(given[0], None, *given[1:])),
                    [session, document, question, model, way, keep, literals, recovery, longest], results.all,
                    **quiet)  # fmt: skip
    _wire_replay("text", results, session)


def _runs(
    held: Session, place: str, group: Any, keep: float, tried: Sequence[float] | None,
    one: Callable[[float], Callable[[Teller], Any]],
) -> Iterator[list[Any]]:  # fmt: skip
    """The run of one share, or of each of several that is not done yet."""
    if tried is None:
        yield from _work(held, one(keep), lambda run: _done(held, place, group, run))
        return
    there = held.runs_of(group)
    for share in tried:
        if share in there:
            continue
        ended: list[bool] = []

        def finish(run: Any, ended: list[bool] = ended) -> list[Any]:
            ended.append(True)
            return _done(held, place, group, run)

        yield from _work(held, one(share), finish)
        if not ended:  # stopped, or refused
            return
        if held.runs_of(group) == there:  # a recipe without a share
            return


def _open_text(content: bytes | None) -> list[Any]:
    """What a file holds; its name is not looked at."""
    try:
        if not content:
            raise QuickmergeError("the file must hold some text, got an empty one")
        if len(content) > 4 * MOST_LETTERS:
            raise QuickmergeError(f"the file must have at most {4 * MOST_LETTERS >> 20} MiB, got {len(content) >> 20}")
        text = content.decode("utf-8-sig")
        if "\0" in text or half_character(text) is not None:
            raise QuickmergeError("the file must be UTF-8 text, got other bytes")
    except UnicodeDecodeError:
        return [gr.skip(), shown.status("the file must be UTF-8 text, got other bytes", kind="error")]
    except QuickmergeError as error:
        return [gr.skip(), shown.status(str(error), kind="error")]
    return [text, shown.status(f"Opened: {len(text):,} characters.")]


# Images and video -----------------------------------------------------------------------------------------------------


def _image_tab(shelf: Shelf, session: Any) -> None:
    models = shelf.among("vlm", "vision")
    first = models[0]
    asks = first.kind == "vlm"
    with gr.Row():
        with gr.Column(scale=5, min_width=300):
            files = gr.File(label="Images", file_count="multiple", file_types=PICTURES, type="binary", height=150)
            model = gr.Dropdown([m.label for m in models], value=first.label, label="Model")
            note = gr.Markdown(_says(first.kind), elem_classes="qs-about")
            question = gr.Textbox(DESCRIBE, label="Question", visible=asks)
            methods = methods_for(first.kind)
            method = gr.Dropdown(methods, value=methods[0], label="Method")
            keep = gr.Slider(0.05, 1.0, value=0.4, step=0.01, label="Keep: share of the patches", buttons=[])
            run, stop, shares = _buttons()
        with gr.Column(scale=7, min_width=300):
            results = _results("Drop an image and run: its patches are shown by the token that they became.")

    def pick(name: str) -> list[Any]:
        kind = shelf.called(name).kind
        offered = methods_for(kind)
        return [_says(kind), gr.Textbox(visible=kind == "vlm"), gr.Dropdown(offered, value=offered[0])]

    def work(
        held: Session, tried: Sequence[float] | None, files: list[bytes] | None, model: str, question: str,
        method: str, keep: float,
    ) -> Iterator[list[Any]]:  # fmt: skip
        images = tuple(files or ())
        group = ("image", model, images, question, method)

        def one(share: float) -> Callable[[Teller], ImageRun]:
            return lambda tell: look(
                shelf, held, tell, model=model, images=images, method=method, keep=share, question=question
            )

        yield from _runs(held, "image", group, keep, tried, one)

    quiet: dict[str, Any] = {"show_progress": "hidden", "api_visibility": "private"}
    model.change(pick, [model], [note, question, method], **quiet)
    _wire(run, stop, shares, work, [files, model, question, method, keep], results, session)
    _wire_replay("image", results, session)


def _says(kind: str) -> str:
    if kind == "vlm":
        return "A vision-language model: it is asked about the images with all visual tokens, and with fewer."
    return (
        "A vision transformer: it can't be asked, so its patches are shown. For answers, start the studio with a "
        "vision-language model: `quickmerge studio --model FOLDER`."
    )


def _video_tab(shelf: Shelf, session: Any) -> None:
    models = shelf.among("vision")
    if not models:
        gr.Markdown("A video is read by a vision transformer: start the studio with one, such as "
                    "`quickmerge studio --model vit-small-14`.")  # fmt: skip
        return
    with gr.Row():
        with gr.Column(scale=5, min_width=300):
            file = gr.File(label="Video", file_count="single", file_types=MOVIES, type="binary", height=150)
            model = gr.Dropdown([m.label for m in models], value=models[0].label, label="Model")
            methods = methods_for("video")
            method = gr.Dropdown(methods, value=methods[0], label="Method", info="grid merges across time.")
            keep = gr.Slider(0.05, 1.0, value=0.25, step=0.01, label="Keep: share of the patches of all frames",
                             buttons=[])  # fmt: skip
            with gr.Row():
                frames = gr.Slider(2, FRAMES, value=8, step=1, label="Frames", buttons=[], min_width=120)
                stride = gr.Slider(1, 30, value=4, step=1, label="Take every", buttons=[], min_width=120)
            run, stop, shares = _buttons()
        with gr.Column(scale=7, min_width=300):
            results = _results("Drop a video and run: patches that became one token have one colour in all frames.",
                               answers=False, recipe=False)  # fmt: skip

    def work(
        held: Session, tried: Sequence[float] | None, file: bytes | None, model: str, method: str, keep: float,
        frames: int, stride: int,
    ) -> Iterator[list[Any]]:  # fmt: skip
        group = ("video", model, file, method, frames, stride)

        def one(share: float) -> Callable[[Teller], ImageRun]:
            return lambda tell: look_video(
                shelf, held, tell, model=model, video=file or b"", method=method, keep=share, frames=int(frames),
                stride=int(stride),
            )  # fmt: skip

        yield from _runs(held, "video", group, keep, tried, one)

    _wire(run, stop, shares, work, [file, model, method, keep, frames, stride], results, session)
    _wire_replay("video", results, session)
