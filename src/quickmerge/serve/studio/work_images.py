"""What a request about images or a video does: the patch map, and both answers where a model can be asked."""

from __future__ import annotations

import base64
import io
import tempfile
from collections.abc import Hashable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from PIL import Image

from quickmerge.console.ending import Alone, one_sentence
from quickmerge.console.options import check_share, check_text
from quickmerge.datasets.labelled import PixelFormat
from quickmerge.errors import QuickmergeError, near_match
from quickmerge.images import open_image
from quickmerge.merge.cli.options import parse_reducer
from quickmerge.merge.cli.vlm import check_needs_no_question
from quickmerge.merge.collect import as_image, frame_stage, patch_stages, visual_stage
from quickmerge.merge.reducers import VISION_REDUCERS, VISUAL_TOKEN_REDUCERS
from quickmerge.merge.reducers.pooling import GridMerge
from quickmerge.models.encoder import find_encoder
from quickmerge.recipe.answer import RecipeAnswer, answer_images
from quickmerge.serve.studio.ways import Told, told_image
from quickmerge.serve.studio.work import LONGEST, NAMES, Side, following, side_of
from quickmerge.viz.patchmap_sheet import merged_image
from quickmerge.viz.patchmap_video import video_animation, video_strip

if TYPE_CHECKING:
    from collections.abc import Callable

    from quickmerge.serve.studio.jobs import Teller
    from quickmerge.serve.studio.sessions import Session
    from quickmerge.serve.studio.shelf import Shelf

__all__ = ["FRAMES", "IMAGE_BYTES", "ImageRun", "Sheet", "look", "look_video", "methods_for"]

IMAGES, IMAGE_BYTES, VIDEO_BYTES = 4, 20 * 2**20, 60 * 2**20
"""Most images at once, and most bytes of one of them and of a video."""
FRAMES = 16
"""Most frames of a video."""
GRID = "grid"
"""`GridMerge` by the name of ``quickmerge show video``."""


@dataclass(frozen=True)
class Sheet:
    """A drawing, for a light page and for a dark one, as data that a page holds; ``label`` says it in words."""

    light: str
    dark: str
    label: str


@dataclass(frozen=True)
class ImageRun:
    """All that a page shows of one run on images or a video.

    Attributes:
        model: its label.
        method: the name of the reducer.
        keep: the share that was asked for.
        sheets: the patch maps.
        tokens: of all images, at first.
        kept: how many are left at the end of the encoder, or in front of the language model.
        reduced: the answer by the recipe, where the model can be asked.
        plain: the answer with all tokens.
        same: whether both wrote the same tokens.
        remark: what else is to be said.
        told: the recipe to take along; None for a video.
    """

    model: str
    method: str
    keep: float
    sheets: tuple[Sheet, ...]
    tokens: int
    kept: int
    reduced: Side | None = None
    plain: Side | None = None
    same: bool = False
    remark: str = ""
    told: Told | None = None


def methods_for(kind: str) -> list[str]:
    """The names of the methods for images in a model of that kind, or of a ``"video"``; the usual one first."""
    if kind == "video":
        return [GRID, *VISION_REDUCERS]
    return ["scope", *(n for n in VISUAL_TOKEN_REDUCERS if n != "scope")] if kind == "vlm" else list(VISION_REDUCERS)


def look(
    shelf: Shelf, session: Session, tell: Teller, *, model: str, images: Sequence[bytes], method: str, keep: float,
    question: str = "", longest: int = 32,
) -> ImageRun:  # fmt: skip
    """Read images with fewer patches, and ask about them where the model can be asked.

    On the way ``tell`` is shown ``sheets``, and ``reduced`` and ``plain``, the answers as far as they are.

    Args:
        shelf: the models on offer.
        session: of the user; what the plain model says of images is asked once.
        tell: hears how far it is.
        model: the label of one that reads images.
        images: files as they came, at most four.
        method: the name of a reducer.
        keep: the share of patches, in (0, 1].
        question: for a vision-language model.
        longest: tokens of an answer.

    Raises:
        QuickmergeError: naming what was given and what is allowed.
        StoppedError: the user stopped it.
    """
    wanted = shelf.called(model)
    if wanted.kind == "text":
        raise QuickmergeError(f"the model must be one that reads images, got {wanted.label}")
    _check_method(method, methods_for(wanted.kind))
    check_share("keep", keep)
    if not 1 <= longest <= LONGEST:
        raise QuickmergeError(f"the longest answer must be a whole number from 1 to {LONGEST}, got {longest}")
    if wanted.kind == "vlm":
        check_text("the question", question)
    else:
        check_needs_no_question(method)
    photos = [_opened(data, f"image {number}") for number, data in enumerate(_counted(images), 1)]
    recipe, told = told_image(wanted.kind, wanted.name, method, keep, question, int(longest))
    with shelf.using(model, tell) as (_, net, processor), tell.inside(net):
        if wanted.kind == "vision":
            with one_sentence(Alone.seeing(net, processor, photos[0])):
                return _patches(tell, net, processor, photos, wanted.label, method, keep, told)
        with one_sentence(Alone.asked(net, processor, photos[0])):
            key = (wanted.name, tuple(images), question, longest)
            return _asked(session, tell, net, processor, photos, wanted.label, method, keep, question, int(longest),
                          recipe, told, key)  # fmt: skip


def _check_method(method: object, known: Sequence[str]) -> None:
    if method not in known:
        raise QuickmergeError(
            f"the method must be one of {', '.join(known)}, got {method!r:.80}{near_match(str(method), known)}"
        )


def _counted(images: Sequence[bytes]) -> Sequence[bytes]:
    if not images:
        raise QuickmergeError("drop an image first, or choose one")
    if len(images) > IMAGES:
        raise QuickmergeError(f"there may be at most {IMAGES} images at once, got {len(images)}")
    return images


def _opened(data: bytes, name: str) -> Image.Image:
    """An image; its file's name never comes here."""
    if len(data) > IMAGE_BYTES:
        raise QuickmergeError(f"{name} must have at most {IMAGE_BYTES >> 20} MiB, got {len(data) / 2**20:.1f} MiB")
    return open_image(io.BytesIO(data), name)


def _patches(
    tell: Teller, net: Any, processor: Any, photos: Sequence[Image.Image], label: str, method: str, keep: float,
    told: Told,
) -> ImageRun:  # fmt: skip
    """The patch maps of a vision transformer."""
    form, blocks = PixelFormat.of(processor), len(find_encoder(net))
    sheets, tokens, kept = [], 0, 0
    for number, photo in enumerate(photos, 1):
        tell.say(f"looking at image {number} of {len(photos)}", 0.1 + 0.8 * (number - 1) / len(photos))
        pixels = processor([photo], return_tensors="pt")["pixel_values"]
        reducer = parse_reducer(method, keep, "vision")
        stages, stats = patch_stages(net, pixels, reducer, max(0, blocks - 2) if reducer.once else None)
        tokens += stats.tokens_in
        kept += round(stats.tokens_per_block[-1])
        if not stages:
            continue
        seen = as_image(pixels[0], form)
        about = f"image {number}: {stages[-1].tokens} of {stats.tokens_in} tokens left by {method}"
        sheets.append(_drawn(partial(merged_image, seen, stages), about))
        tell.show(sheets=tuple(sheets))
    remark = "" if sheets else "All patches were kept: choose a smaller share to see some merge."
    return ImageRun(label, method, keep, tuple(sheets), tokens, kept, remark=remark, told=told)


def _asked(
    session: Session, tell: Teller, net: Any, processor: Any, photos: Sequence[Image.Image], label: str, method: str,
    keep: float, question: str, longest: int, recipe: Any, told: Told, key: tuple[Hashable, ...],
) -> ImageRun:  # fmt: skip
    """The visual tokens of a vision-language model, and its answers."""
    sheets, tokens, kept = [], 0, 0
    for number, photo in enumerate(photos, 1):
        tell.say(f"looking at image {number} of {len(photos)}", 0.05 + 0.3 * (number - 1) / len(photos))
        reducer = parse_reducer(method, keep, "visual")
        seen, stage, stats = visual_stage(net, processor, photo, question, reducer)
        tokens += round(stats.visual_in)
        kept += round(stats.visual_kept)
        if stage is not None:
            about = f"image {number}: {stage.tokens} of {stats.visual_in:g} visual tokens left by {method}"
            sheets.append(_drawn(partial(merged_image, seen, stage), about))
            tell.show(sheets=tuple(sheets))

    def ask(way: Any, part: str, first: float) -> RecipeAnswer:
        tell.say(f"reading, {NAMES[part]}", first)
        watch = following(tell, processor.tokenizer, part, longest, first, first + 0.3)
        return answer_images(net, processor, photos, question, way, max_new_tokens=longest, watch=watch)

    reduced = ask(recipe, "reduced", 0.35)
    plain = session.once(("plain image", *key), lambda: ask(None, "plain", 0.65))
    side = side_of(plain)
    remark = "" if sheets else "All visual tokens were kept: choose a smaller share to see some merge."
    return ImageRun(
        label, method, keep, tuple(sheets), tokens, kept, side_of(reduced, side), side,
        reduced.ids.tolist() == plain.ids.tolist(), remark, told,
    )  # fmt: skip


# A video ------------------------------------------------------------------------------------------------------------


def look_video(
    shelf: Shelf, session: Session, tell: Teller, *, model: str, video: bytes, method: str, keep: float,
    frames: int = 8, stride: int = 4,
) -> ImageRun:  # fmt: skip
    """Read frames of a video with fewer patches, merged across time.

    Args:
        shelf: the models on offer.
        session: of the user.
        tell: hears how far it is.
        model: the label of a vision transformer.
        video: a file as it came.
        method: the name of a reducer, or ``"grid"``.
        keep: the share of patches of all frames, in (0, 1].
        frames: how many, 2 to `FRAMES`.
        stride: take every so many.

    Raises:
        QuickmergeError: naming what was given and what is allowed.
        StoppedError: the user stopped it.
    """
    from quickmerge.datasets.video import VideoClips

    wanted = shelf.called(model)
    if wanted.kind != "vision":
        raise QuickmergeError(f"the model must be one that reads images alone, got {wanted.label}")
    _check_method(method, methods_for("video"))
    check_needs_no_question(method)
    check_share("keep", keep)
    if not 2 <= frames <= FRAMES:
        raise QuickmergeError(f"the frames must be a whole number from 2 to {FRAMES}, got {frames}")
    if not video:
        raise QuickmergeError("drop a video first, or choose one")
    if len(video) > VIDEO_BYTES:
        raise QuickmergeError(f"the video must have at most {VIDEO_BYTES >> 20} MiB, got {len(video) / 2**20:.1f} MiB")
    across = GridMerge(keep=keep) if method == GRID else parse_reducer(method, keep, "vision")
    with tempfile.TemporaryDirectory(prefix="quickmerge-") as folder:
        # What reads videos opens files by their names: this one has a name of ours.
        path = Path(folder) / "video"
        path.write_bytes(video)
        with shelf.using(model, tell) as (_, net, processor), tell.inside(net):
            tell.say("decoding", 0.1)
            form = PixelFormat.of(processor)
            with _unnamed(path):
                clip = VideoClips([path], (form.height, form.width), int(frames), int(stride))[0]
            pixels = form.standardised(clip)[None]
            tell.say(f"looking at {len(clip)} frames", 0.3)
            with one_sentence(Alone.seeing(net, processor, as_image(pixels[0, 0], form))):
                stage = frame_stage(net, pixels, across)
            seen = [as_image(frame, form) for frame in pixels[0]]
            about = f"{stage.tokens} of {stage.groups.size} tokens left of {len(seen)} frames by {method}"
            sheets = [_drawn(partial(video_strip, seen, stage, width=1600), about)]
            tell.say("drawing", 0.7)
            sheets.append(_moving(seen, stage, Path(folder), f"the same, moving: {about}"))
    return ImageRun(wanted.label, method, keep, tuple(sheets), int(stage.groups.size), stage.tokens)


@contextmanager
def _unnamed(path: Path) -> Iterator[None]:
    """Take the path of a file of ours out of messages."""
    try:
        yield
    except QuickmergeError as error:
        raise QuickmergeError(str(error).replace(str(path), "the video")) from None


# Drawings -----------------------------------------------------------------------------------------------------------


def _drawn(draw: Callable[..., Image.Image], label: str) -> Sheet:
    return Sheet(_data(draw(dark=False)), _data(draw(dark=True)), label)


def _data(picture: Image.Image) -> str:
    stream = io.BytesIO()
    picture.save(stream, "webp", quality=86, method=2)
    return _as_url(stream.getvalue())


def _moving(seen: Sequence[Image.Image], stage: Any, folder: Path, label: str) -> Sheet:
    made = []
    for dark in (False, True):
        path = video_animation(seen, stage, folder / f"moving-{dark}.webp", 0.25, dark=dark, max_bytes=2_000_000)
        made.append(_as_url(path.read_bytes()))
    light, dim = made
    return Sheet(light, dim, label)


def _as_url(data: bytes) -> str:
    return "data:image/webp;base64," + base64.b64encode(data).decode()
