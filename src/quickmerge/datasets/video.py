"""Videos as clips of frames.

Frames are decoded by ffmpeg, a program of its own, and a video is a stranger's file: it is opened as one of `KINDS`, by
what it begins with, so that no playlist or list of further files is followed; no protocol but that of this file is
allowed; frames, pixels of a frame and seconds are bounded.
"""

from __future__ import annotations

import hashlib
import stat
import subprocess
from collections import OrderedDict
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from quickmerge.datasets.images import Size, height_and_width
from quickmerge.errors import QuickmergeError, clean_name, need, whole_number

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
        seconds: how long ffmpeg may read one video; None allows 20 and 4 more for every megabyte of it.

    Raises:
        ValueError: a number is out of range.
        QuickmergeError: `imageio-ffmpeg` is not installed; from whatever needs the frames first, a video is none of
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
        self._ffmpeg = _ffmpeg()
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
        enough = [] if most is None else ["-frames:v", str(most)]
        report = self._run(file, self._rate(), [*enough, "-f", "null", "-progress", "pipe:1", "-"])
        return int(report.rpartition(b"frame=")[2].split()[0])

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
        span = self.frames * self.stride
        steps = [
            *self._rate(),
            *([f"trim=start_frame={first * span}"] if first else []),
            f"framestep={self.stride}",
            f"scale={self.width}:{self.height}:force_original_aspect_ratio=increase:flags=bicubic",
            f"crop={self.width}:{self.height}",
        ]
        enough = ["-frames:v", str(clips * self.frames)]
        raw = self._run(file, steps, [*enough, "-f", "rawvideo", "-pix_fmt", "rgb24", "-"])
        pixels = np.frombuffer(bytearray(raw), np.uint8).reshape(-1, self.height, self.width, 3)
        return torch.from_numpy(pixels).permute(0, 3, 1, 2)

    def _rate(self) -> list[str]:
        return [] if self.fps is None else [f"fps={self.fps}"]

    def _run(self, file: Path, steps: list[str], output: list[str]) -> bytes:
        kind, size = _kind_of(file)
        seconds = SECONDS + SECONDS_PER_MB * size / 1e6 if self._seconds is None else self._seconds
        limits = ["-protocol_whitelist", "file", "-max_pixels", str(MOST_PIXELS), "-threads", str(THREADS)]
        # "file:" keeps a name with a colon in it from being taken for the address of something else
        given = ["-nostdin", "-v", "error", *limits, "-f", kind, "-i", f"file:{file.absolute()}", "-map", "0:v:0"]
        # every frame as it is: without this, ffmpeg repeats and drops frames to even out their times
        steady = ["-fps_mode", "passthrough", "-vf", ",".join(steps or ["null"])]
        command = [self._ffmpeg, *given, *steady, *output]
        try:
            done = subprocess.run(command, capture_output=True, check=False, stdin=subprocess.DEVNULL, timeout=seconds)
        except subprocess.TimeoutExpired:
            raise QuickmergeError(
                f"{file} can't be read as a video: it takes longer than {seconds:.3g} seconds, give a shorter one"
            ) from None
        except OSError as error:
            raise QuickmergeError(f"{self._ffmpeg}, which reads videos, does not run: {error.strerror}") from None
        if done.returncode:
            said = done.stderr.decode(errors="replace").strip().splitlines() or [f"exit status {done.returncode}"]
            raise QuickmergeError(f"{file} can't be read as a video: {clean_name(said[-1])}")
        return done.stdout


def _kind_of(file: Path) -> tuple[str, int]:
    """What ffmpeg calls the kind of a video, by what the file begins with; and its size in bytes.

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
"""The first bytes of kinds, and ffmpeg's names of what reads them."""


def _ffmpeg() -> str:
    try:
        return str(need("imageio_ffmpeg", "video", "videos").get_ffmpeg_exe())
    except RuntimeError as error:
        raise QuickmergeError(f"imageio-ffmpeg brings no ffmpeg for this machine: {error}") from None
