"""Videos as clips of frames."""

from __future__ import annotations

import hashlib
import subprocess
from collections import OrderedDict
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from quickmerge.errors import QuickmergeError, whole_number
from quickmerge.training.data.extra import need
from quickmerge.training.data.fit import Size, height_and_width


class VideoClips(Dataset[Tensor]):
    """Clips of ``frames`` frames, one after the other without overlap; what is left over at a video's end is dropped.

    Frames are scaled to cover ``size`` and cut to it around their centre. All frames are counted when the first clip or
    the number of clips is asked for. A video is decoded when its first clip is, and then kept in memory.

    Args:
        files: video files.
        size: pixels of both sides, or height and width.
        frames: frames of a clip.
        stride: take every so many frames; a clip spans ``frames * stride`` frames of the video.
        fps: frames a second that the video is brought to first, by dropping or repeating; None leaves it alone.
        cache_bytes: memory for decoded frames. The videos not used for longest are let go beyond it.

    Raises:
        ValueError: a number is out of range.
        QuickmergeError: `imageio-ffmpeg` is not installed; from whatever needs the frames first, a video can't be read
            or none is long enough for one clip.
    """

    def __init__(
        self,
        files: Sequence[Path],
        size: Size,
        frames: int,
        stride: int = 1,
        fps: float | None = None,
        *,
        cache_bytes: int = 4 << 30,
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
        self._cache_bytes = cache_bytes
        self._cache: OrderedDict[int, Tensor] = OrderedDict()
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
        pixels = self._decoded(video)[clip * self.frames : (clip + 1) * self.frames]
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
        clips = self._count()
        if not -len(clips) <= index < len(clips):
            raise IndexError(f"clip {index} of {len(clips)}")
        return clips[index]

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

    def _frames_of(self, file: Path) -> int:
        # The same way as the frames will be read, for the header of a file need not tell the truth. Nothing is scaled.
        report = self._run(file, self._rate(), ["-f", "null", "-progress", "pipe:1", "-"])
        return int(report.rpartition(b"frame=")[2].split()[0])

    def _decoded(self, video: int) -> Tensor:
        """The frames of a video that clips take, ``(frames, 3, H, W)`` uint8."""
        if video not in self._cache:
            steps = [
                *self._rate(),
                f"framestep={self.stride}",
                f"scale={self.width}:{self.height}:force_original_aspect_ratio=increase:flags=bicubic",
                f"crop={self.width}:{self.height}",
            ]
            raw = self._run(self._files[video], steps, ["-f", "rawvideo", "-pix_fmt", "rgb24", "-"])
            pixels = np.frombuffer(bytearray(raw), np.uint8).reshape(-1, self.height, self.width, 3)
            self._cache[video] = torch.from_numpy(pixels).permute(0, 3, 1, 2)
        self._cache.move_to_end(video)
        while len(self._cache) > 1 and sum(kept.numel() for kept in self._cache.values()) > self._cache_bytes:
            self._cache.popitem(last=False)
        return self._cache[video]

    def _rate(self) -> list[str]:
        return [] if self.fps is None else [f"fps={self.fps}"]

    def _run(self, file: Path, steps: list[str], output: list[str]) -> bytes:
        # "file:" keeps a name with a colon in it from being taken for the address of something else
        given = ["-nostdin", "-v", "error", "-i", f"file:{file.absolute()}", "-map", "0:v:0"]
        # every frame as it is: without this, ffmpeg repeats and drops frames to even out their times
        steady = ["-fps_mode", "passthrough", "-vf", ",".join(steps or ["null"])]
        try:
            done = subprocess.run([self._ffmpeg, *given, *steady, *output], capture_output=True, check=False)
        except OSError as error:
            raise QuickmergeError(f"{self._ffmpeg}, which reads videos, does not run: {error.strerror}") from None
        if done.returncode:
            said = done.stderr.decode(errors="replace").strip().splitlines() or [f"exit status {done.returncode}"]
            raise QuickmergeError(f"{file} can't be read as a video: {said[-1]}")
        return done.stdout


def _ffmpeg() -> str:
    try:
        return str(need("imageio_ffmpeg", "video", "videos").get_ffmpeg_exe())
    except RuntimeError as error:
        raise QuickmergeError(f"imageio-ffmpeg brings no ffmpeg for this machine: {error}") from None
