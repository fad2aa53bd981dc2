"""Small videos, written with PyAV, which several test modules read back."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np


def write_frames(
    path: Path,
    frames: Iterable[np.ndarray],
    *,
    fps: int = 10,
    codec: str = "libx264",
    pix_fmt: str = "yuv444p",
    times: Sequence[int] | None = None,
    options: dict[str, str] | None = None,
    container: dict[str, str] | None = None,
) -> Path:
    """Write frames ``(H, W, 3)`` uint8 as a video.

    Args:
        path: what to write; its ending says which container.
        frames: the frames, all of one size.
        fps: frames a second.
        codec: the encoder.
        pix_fmt: what it stores; yuv444p keeps the colour of every pixel.
        times: when each frame is shown, in frames of ``fps``; None means one after the other.
        options: of the encoder; None asks libx264 for good quality.
        container: options of the container.
    """
    import av

    options = {"crf": "1"} if options is None and codec == "libx264" else options or {}
    with av.open(str(path), "w", options=container or {}) as file:
        stream: Any = None
        for at, pixels in enumerate(frames):
            if stream is None:
                stream = file.add_stream(codec, rate=fps, options=options)
                stream.height, stream.width, stream.pix_fmt = *pixels.shape[:2], pix_fmt
                stream.codec_context.time_base = Fraction(1, fps)
            frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(pixels), format="rgb24")
            frame.pts, frame.time_base = at if times is None else times[at], Fraction(1, fps)
            file.mux(stream.encode(frame))
        file.mux(stream.encode(None))
    return path


def turned(path: Path, matrix: Sequence[int]) -> bytes:
    """An mp4 whose track has another display matrix, ``a b c d`` in whole numbers, as cameras write it."""
    data = bytearray(path.read_bytes())
    assert data.count(b"tkhd") == 1
    # version, flags, 5 numbers of 4 bytes, 8 bytes left free, layer, group, volume and 2 bytes left free
    at = data.index(b"tkhd") + 4 + 4 + 20 + 8 + 8
    a, b, c, d = (number << 16 for number in matrix)
    numbers = (a, b, 0, c, d, 0, 0, 0, 1 << 30)
    data[at : at + 36] = b"".join(number.to_bytes(4, "big", signed=True) for number in numbers)
    return bytes(data)
