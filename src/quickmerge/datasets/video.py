"""Videos as clips of frames.

A video is a stranger's file. FFmpeg's libraries, by way of PyAV, are handed one open file and nothing else: it is read
as one of `KINDS`, by what it begins with, so that no playlist or list of further files is followed, and no protocol is
allowed; frames, pixels of a frame and seconds are bounded.
"""

from __future__ import annotations

import hashlib
import stat
import time
from collections import OrderedDict
from collections.abc import Generator, Iterator, Sequence
from contextlib import closing
from itertools import islice
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import Dataset

from quickmerge.datasets.images import Size, height_and_width
from quickmerge.errors import QuickmergeError, clean_name, first_sentence, need, whole_number

__all__ = ["KINDS", "VideoClips", "read_frames"]

KINDS = ("AVI", "FLV", "GIF", "Matroska", "MP4", "MPEG", "Ogg")
"""What is opened; WebM is Matroska, and MOV is MP4."""
MOST_PIXELS = 2**24
"""Of a frame; 4K has half of it."""
SECONDS, SECONDS_PER_MB = 20.0, 4.0
"""How long one reading of a video may take: so much, and so much for every megabyte of it."""
THREADS = 4


class VideoClips(Dataset[Tensor]):
    """Clips of ``frames`` frames, one after the other without overlap; what is left over at a video's end is dropped.

    Frames are scaled to cover ``size`` and cut to it around their centre. All frames are counted when the number of
    clips is asked for, or another clip than the first. A video is then decoded when one of its clips is asked for, and
    kept in memory as far as ``cache_bytes`` go; the first clip alone is decoded where nothing else was asked for.

    Args:
        files: video files.
        size: pixels of both sides, or height and width.
        frames: frames of a clip.
        stride: take every so many frames; a clip spans ``frames * stride`` frames of the video.
        fps: frames a second that the video is brought to first, by dropping or repeating; None leaves it alone.
        cache_bytes: memory for decoded frames. The videos not used for longest are let go beyond it, and of a video
            that takes more only some clips are held at once.
        seconds: how long one video may be read; None allows 20 and 4 more for every megabyte of it.

    Raises:
        ValueError: a number is out of range.
        QuickmergeError: PyAV is not installed; from whatever needs the frames first, a video is none of
            `KINDS`, can't be read in time, has frames of more than 16 million pixels, or none is long enough for one
            clip.
    """

    def __init__(
        self,
        files: Sequence[Path],
        size: Size,
        frames: int,
        stride: int = 1,
        fps: float | None = None,
        *,
        cache_bytes: int = 1 << 30,
        seconds: float | None = None,
    ) -> None:
        frames = whole_number("frames", frames)
        stride = whole_number("stride", stride)
        if fps is not None and not 0 < fps < 1000:
            raise ValueError(f"fps must be between 0 and 1000 frames a second, got {fps!r}")
        self.height, self.width = height_and_width(size)
        self.frames, self.stride, self.fps = frames, stride, fps
        self._files = files
        if not files:
            raise QuickmergeError("there are no videos to train on")
        need("av", "video", "videos")
        self._cache_bytes, self._seconds = cache_bytes, seconds
        self._cache: OrderedDict[int, tuple[int, Tensor]] = OrderedDict()  # the first clip that is held, and frames
        self._clips: list[tuple[int, int]] | None = None
        self._skipped = 0

    @property
    def skipped(self) -> int:
        """Videos too short for one clip."""
        self._count()
        return self._skipped

    def __len__(self) -> int:
        return len(self._count())

    def __getitem__(self, index: int) -> Tensor:
        """One clip, ``(T, 3, H, W)`` float32 in [0, 1]."""
        video, clip = self._clip(index)
        pixels = self._decoded(video, clip)
        if len(pixels) < self.frames:
            raise QuickmergeError(f"{self._files[video]} is damaged: it has fewer frames than were counted")
        return pixels.contiguous() / 255

    def describe(self, index: int) -> str:
        """Where a clip stands, like ``"sea.mp4, frames 32-48"``: its first frame, and the first behind it."""
        video, clip = self._clip(index)
        span = self.frames * self.stride
        return f"{self._files[video].name}, frames {clip * span}-{(clip + 1) * span}"

    def fingerprint(self) -> str:
        """A sha256 over the settings and each video's name, bytes and clips, in hexadecimal."""
        settings = (self.height, self.width, self.frames, self.stride, self.fps)
        digest = hashlib.sha256(repr(settings).encode())
        for video, file in enumerate(self._files):
            clips = sum(at == video for at, _ in self._count())
            digest.update(f"\n{file.name}\0{file.stat().st_size}\0{clips}".encode())
        return digest.hexdigest()

    def _clip(self, index: int) -> tuple[int, int]:
        if self._clips is None and index == 0 and (first := self._first()) is not None:
            return first, 0
        clips = self._count()
        if not -len(clips) <= index < len(clips):
            raise IndexError(f"clip {index} of {len(clips)}")
        return clips[index]

    def _first(self) -> int | None:
        """The first video that is long enough for a clip; nothing behind that clip is read."""
        span = self.frames * self.stride
        return next((at for at, file in enumerate(self._files) if self._frames_of(file, span) == span), None)

    def _count(self) -> list[tuple[int, int]]:
        if self._clips is not None:
            return self._clips
        span = self.frames * self.stride
        counts = [self._frames_of(file) for file in self._files]
        clips = [(video, clip) for video, count in enumerate(counts) for clip in range(count // span)]
        if not clips:
            raise QuickmergeError(
                f"a clip needs a video of at least {span} frames, and the longest of {len(counts)} has "
                f"{max(counts)}: give longer videos, or fewer frames or a smaller stride"
            )
        self._skipped = sum(count < span for count in counts)
        self._clips = clips
        return clips

    def _frames_of(self, file: Path, most: int | None = None) -> int:
        # The same way as the frames will be read, for the header of a file need not tell the truth. Nothing is scaled.
        with closing(read_frames(file, fps=self.fps, seconds=self._seconds)) as frames:
            return sum(1 for _ in islice(frames, most))

    def _decoded(self, video: int, clip: int) -> Tensor:
        """The frames of a clip, ``(frames, 3, H, W)`` uint8; fewer where the video ends too early."""
        first, held = self._cache.get(video, (0, torch.empty(0)))
        if not first <= clip < first + len(held) // self.frames:
            first, many = self._window(video, clip)
            held = self._read(self._files[video], first, many)
            self._cache[video] = first, held
        self._cache.move_to_end(video)
        while len(self._cache) > 1 and sum(kept.numel() for _, kept in self._cache.values()) > self._cache_bytes:
            self._cache.popitem(last=False)
        return held[(clip - first) * self.frames : (clip - first + 1) * self.frames]

    def _window(self, video: int, clip: int) -> tuple[int, int]:
        """Which clips to decode for the sake of one: the first, and how many."""
        if self._clips is None:
            return clip, 1
        there = sum(at == video for at, _ in self._clips)
        room = max(1, self._cache_bytes // (3 * self.height * self.width * self.frames))
        return (0, there) if there <= room else (clip, min(room, there - clip))

    def _read(self, file: Path, first: int, clips: int) -> Tensor:
        """So many clips from the ``first`` on, ``(T, 3, H, W)`` uint8."""
        start, cover = first * self.frames * self.stride, _Cover(self.height, self.width)
        found = np.empty((clips * self.frames, self.height, self.width, 3), np.uint8)
        at = 0
        with closing(read_frames(file, fps=self.fps, seconds=self._seconds)) as frames:
            for frame in islice(frames, start, start + (len(found) - 1) * self.stride + 1, self.stride):
                try:
                    found[at] = cover(frame)
                except Exception as error:  # no way to scale what it is made of, say
                    raise _unreadable(file, error) from error
                at += 1
        return torch.from_numpy(found[:at]).permute(0, 3, 1, 2)


def read_frames(file: Path, *, fps: float | None = None, seconds: float | None = None) -> Generator[Any, None, None]:
    """The frames of a video one after the other, upright or not, as PyAV's `VideoFrame`; close what this returns.

    No frame is decoded before it is asked for, but for the few that the decoder's threads work at ahead. A damaged
    part of a video is left out, as players do.

    Args:
        file: the video.
        fps: frames a second that it is brought to, by dropping or repeating; None gives every frame as it is.
        seconds: how long reading may take in all; None allows 20 and 4 more for every megabyte of the file.

    Raises:
        QuickmergeError: PyAV is not installed; the file is none of `KINDS`, can't be read or takes too long, or a
            frame has more than 16 million pixels.
    """
    av = need("av", "video", "videos")
    kind, size = _kind_of(file)
    seconds = SECONDS + SECONDS_PER_MB * size / 1e6 if seconds is None else seconds
    clock = _Clock(seconds)
    # The limit of pixels is for the decoders that find out what the streams are. What a container names besides itself
    # would be opened by a protocol, and of those none is allowed.
    options = {"max_pixels": str(MOST_PIXELS), "protocol_whitelist": "none"}
    try:
        with (
            file.open("rb") as content,
            av.open(_Timed(content, clock), format=kind, options=options, metadata_errors="replace") as container,
        ):
            if not container.streams.video:
                raise QuickmergeError(f"{file} can't be read as a video: there is none in it")
            stream = container.streams.video[0]
            if stream.codec_context is None:
                raise QuickmergeError(
                    f"{file} can't be read as a video: it is coded in a way that nothing here decodes"
                )
            stream.codec_context.options = {"max_pixels": str(MOST_PIXELS)}
            stream.codec_context.thread_count, stream.thread_type = THREADS, "AUTO"
            frames = _decoded(av, container.demux(stream))
            for frame in frames if fps is None else _at_rate(av, stream, frames, fps):
                clock.check()
                yield frame
            clock.check()  # a file that was not read in time may be taken for one that ends early
    except QuickmergeError:
        raise
    except _LateError:
        pass
    except Exception as error:  # PyAV raises FFmpeg's errors, and whatever of Python a file leads it to
        if not clock.late:
            raise _unreadable(file, error) from error
    if clock.late:
        raise QuickmergeError(
            f"{file} can't be read as a video: it takes longer than {seconds:.3g} seconds, give a shorter one"
        )


def _unreadable(file: Path, error: Exception) -> QuickmergeError:
    said = getattr(error, "strerror", None) or first_sentence(error)
    return QuickmergeError(f"{file} can't be read as a video: {clean_name(said)}")


class _LateError(Exception):
    pass


class _Clock:
    """Says when time is up; once it has, it stays so."""

    def __init__(self, seconds: float) -> None:
        self._end = time.monotonic() + seconds
        self.late = False

    def check(self) -> None:
        self.late = self.late or time.monotonic() > self._end
        if self.late:
            raise _LateError


class _Timed:
    """A file that is read no longer than the clock allows; it is all that FFmpeg is given."""

    def __init__(self, content: BinaryIO, clock: _Clock) -> None:
        self._check, self._read = clock.check, content.read
        self.seek, self.tell = content.seek, content.tell

    def read(self, size: int) -> bytes:
        self._check()
        return self._read(size)


def _decoded(av: Any, packets: Iterator[Any]) -> Iterator[Any]:
    error, any_came = None, False
    while True:
        try:
            frames = next(packets).decode()
        except StopIteration:
            break
        except av.FFmpegError as fault:
            error = fault
            continue
        for frame in frames:
            any_came = True
            yield frame
    if error is not None and not any_came:
        raise error


def _at_rate(av: Any, stream: Any, frames: Iterator[Any], fps: float) -> Iterator[Any]:
    """Frames dropped and repeated so that so many stand for a second; which, their times say."""
    graph = av.filter.Graph()
    graph.link_nodes(graph.add_buffer(template=stream), graph.add("fps", f"fps={fps}"), graph.add("buffersink"))
    graph.configure()
    lasts = max(1, round(1 / (stream.average_rate or 25) / stream.time_base))

    def pulled() -> Iterator[Any]:
        while True:
            try:
                yield graph.pull()
            except (av.BlockingIOError, av.EOFError):
                return

    start, behind = stream.start_time or 0, None
    for frame in frames:
        frame.duration = frame.duration or lasts
        if frame.pts is None:
            frame.pts = behind or 0
        else:  # from 0 on; where videos were put together, and times go back by more than a second, they go on
            frame.pts -= start
            if behind is not None and (behind - frame.pts) * stream.time_base > 1:
                start, frame.pts = start + frame.pts - behind, behind
        behind = frame.pts + frame.duration
        graph.push(frame)
        yield from pulled()
    graph.push(None)
    yield from pulled()


class _Cover:
    """Turns frames upright, scales them to cover a size and cuts them to it around their centre."""

    def __init__(self, height: int, width: int) -> None:
        self.height, self.width = height, width
        self._graph: Any = None
        self._for: tuple[Any, ...] = ()

    def __call__(self, frame: Any) -> NDArray[np.uint8]:
        """``(H, W, 3)`` uint8."""
        turned = _turns(frame)
        given = frame.width, frame.height, frame.format.name, turned
        if given != self._for:  # also in the midst of a video
            av = need("av", "video", "videos")
            graph = av.filter.Graph()
            nodes = [
                graph.add_buffer(
                    width=frame.width, height=frame.height, format=frame.format, time_base=frame.time_base
                ),
                *(graph.add(name, settings) for name, settings in turned),
                graph.add("scale", f"{self.width}:{self.height}:force_original_aspect_ratio=increase:flags=bicubic"),
                graph.add("crop", f"{self.width}:{self.height}"),
                graph.add("format", "rgb24"),
                graph.add("buffersink"),
            ]
            graph.link_nodes(*nodes).configure()
            self._graph, self._for = graph, given
        self._graph.push(frame)
        pixels: NDArray[np.uint8] = self._graph.pull().to_ndarray()
        return pixels


def _turns(frame: Any) -> tuple[tuple[str, str], ...]:
    """The filters that turn a frame the way it was filmed, by the matrix that may come with it.

    It takes a pixel of the frame at ``(x, y)`` to ``(a x + c y, b x + d y)`` and stands there as ``a b u c d v x y w``.
    Only quarter turns and mirrors are followed.
    """
    told = frame.side_data.get("DISPLAYMATRIX")
    if told is None or len(bytes(told)) != 36:
        return ()
    a, b, _, c, d, *_ = np.frombuffer(bytes(told), np.int32).tolist()
    across, down = (a, d) if abs(a) >= abs(b) else (c, b)
    swapped = () if abs(a) >= abs(b) else (("transpose", "cclock_flip"),)
    return (*swapped, *((("hflip", ""),) if across < 0 else ()), *((("vflip", ""),) if down < 0 else ()))


def _kind_of(file: Path) -> tuple[str, int]:
    """What FFmpeg calls the kind of a video, by what the file begins with; and its size in bytes.

    Raises:
        QuickmergeError: it can't be read, is no regular file, or of no kind of `KINDS`.
    """
    try:
        if not stat.S_ISREG(file.stat().st_mode):
            raise QuickmergeError(f"{file} can't be read as a video: it is no regular file")
        with file.open("rb") as content:
            start, size = content.read(512), file.stat().st_size
    except (OSError, ValueError) as error:
        if isinstance(error, QuickmergeError):
            raise
        raise QuickmergeError(f"{file} can't be read as a video: {getattr(error, 'strerror', None) or error}") from None
    if start[4:8] in (b"ftyp", b"moov", b"mdat", b"free", b"skip", b"wide", b"pnot"):
        return "mov", size
    if start[:4] == b"RIFF" and start[8:12] == b"AVI ":
        return "avi", size
    if start[:1] == b"G" == start[188:189] == start[376:377]:
        return "mpegts", size
    for magic, kind in BEGINNINGS.items():
        if start.startswith(magic):
            return kind, size
    raise QuickmergeError(f"{file} can't be read as a video: its content is of none of the kinds {', '.join(KINDS)}")


BEGINNINGS = {
    b"\x1aE\xdf\xa3": "matroska",
    b"OggS": "ogg",
    b"FLV\x01": "flv",
    b"GIF87a": "gif",
    b"GIF89a": "gif",
    b"\x00\x00\x01\xba": "mpeg",
    b"\x00\x00\x01\xb3": "mpegvideo",
}
"""The first bytes of kinds, and FFmpeg's names of what reads them."""
