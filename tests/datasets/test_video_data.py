"""Videos as clips: which frames they are, how few are decoded, and what strangers' files can't do."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from video_samples import turned, write_frames

from quickmerge.datasets import VideoClips, video
from quickmerge.errors import QuickmergeError

av = pytest.importorskip("av")


def write_dawn(path: Path, frames: int, size: tuple[int, int] = (32, 16), **settings: Any) -> Path:
    """A video that grows brighter: frame i is grey of 8 i."""
    return write_frames(path, (np.full((size[1], size[0], 3), 8 * at, np.uint8) for at in range(frames)), **settings)


@pytest.fixture
def taken(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many frames each reading of a video has taken so far."""
    counts: list[int] = []
    read = video.read_frames

    def counted(*given: Any, **settings: Any) -> Iterator[Any]:
        counts.append(0)
        which = len(counts) - 1
        for frame in read(*given, **settings):
            counts[which] += 1
            yield frame

    monkeypatch.setattr(video, "read_frames", counted)
    return counts


@pytest.fixture(scope="module")
def dawn(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_dawn(tmp_path_factory.mktemp("video") / "dawn.mp4", 11)


def numbers(clip: torch.Tensor) -> list[int]:
    return (clip.mean(dim=(1, 2, 3)) * 255 / 8).round().int().tolist()


def test_clips_follow_one_another(dawn: Path) -> None:
    clips = VideoClips([dawn], 8, 4)
    assert len(clips) == 2
    assert clips[0].shape == (4, 3, 8, 8)
    assert clips[0].dtype == torch.float32
    assert clips[0].is_contiguous()
    assert [numbers(clip) for clip in clips] == [[0, 1, 2, 3], [4, 5, 6, 7]]
    assert clips.describe(1) == "dawn.mp4, frames 4-8"
    assert clips.describe(-1) == clips.describe(1)


def test_stride_takes_every_so_many_frames(dawn: Path) -> None:
    clips = VideoClips([dawn], (4, 6), 2, stride=2)
    assert [numbers(clip) for clip in clips] == [[0, 2], [4, 6]]
    assert clips[0].shape == (2, 3, 4, 6)
    assert clips.describe(1) == "dawn.mp4, frames 4-8"
    # the 11 frames hold one run of 2 x 5 frames, though a sixth kept frame would follow
    assert [numbers(clip) for clip in VideoClips([dawn], 4, 2, stride=5)] == [[0, 5]]


def test_fps_drops_frames(dawn: Path) -> None:
    clips = VideoClips([dawn], 4, 5, fps=5)
    assert len(clips) == 1
    steps = np.diff(numbers(clips[0]))
    assert steps.tolist() == [2, 2, 2, 2]


def test_frames_that_last_differently_long_are_neither_dropped_nor_repeated(tmp_path: Path) -> None:
    times = [at if at < 5 else 5 + 4 * (at - 5) for at in range(11)]
    uneven = write_dawn(tmp_path / "uneven.mkv", 11, times=times)
    assert [numbers(clip) for clip in VideoClips([uneven], 8, 11)] == [list(range(11))]


def test_the_centre_is_kept_upright(tmp_path: Path) -> None:
    frame = np.zeros((16, 64, 3), np.uint8)
    frame[:8, 24:40] = [255, 0, 0]
    frame[8:, 24:40] = [0, 0, 255]
    clip = VideoClips([write_frames(tmp_path / "a.mp4", [frame] * 3)], 16, 3)[0]
    assert (clip[:, 0, :6].mean() > 0.8) and (clip[:, 2, :6].mean() < 0.2)
    assert (clip[:, 2, 10:].mean() > 0.8) and (clip[:, 0, 10:].mean() < 0.2)


def corners(pixels: torch.Tensor) -> list[str]:
    """The colours of the four corners of a frame, row by row."""
    height, width = pixels.shape[-2:]
    found = []
    for y in (height // 4, 3 * height // 4):
        for x in (width // 4, 3 * width // 4):
            red, green, blue = pixels[:, y, x].tolist()
            found.append({(1, 0, 0): "red", (0, 1, 0): "green", (0, 0, 1): "blue", (1, 1, 1): "white"}[
                round(red), round(green), round(blue)
            ])  # fmt: skip
    return found


@pytest.mark.parametrize("matrix", [(a, 0, 0, d) for a in (1, -1) for d in (1, -1)] + [
    (0, b, c, 0) for b in (1, -1) for c in (1, -1)
])  # fmt: skip
def test_frames_are_turned_the_way_they_were_filmed(matrix: tuple[int, int, int, int], tmp_path: Path) -> None:
    """A camera that was held upright or upside down stores frames as they lie, and how a player is to turn them."""
    frame = np.zeros((16, 32, 3), np.uint8)
    colours = {(0, 0): "red", (1, 0): "green", (0, 1): "blue", (1, 1): "white"}
    for (x, y), name in colours.items():
        rgb = {"red": (255, 0, 0), "green": (0, 255, 0), "blue": (0, 0, 255), "white": (255, 255, 255)}[name]
        frame[8 * y : 8 * y + 8, 16 * x : 16 * x + 16] = rgb
    path = tmp_path / "a.mp4"
    path.write_bytes(turned(write_frames(path, [frame] * 2), matrix))
    a, b, c, d = matrix
    where = {}
    for (x, y), name in colours.items():  # the matrix tells where each corner comes to lie
        u, v = 2 * x - 1, 2 * y - 1
        where[(a * u + c * v + 1) // 2, (b * u + d * v + 1) // 2] = name
    size = (16, 32) if a else (32, 16)
    clip = VideoClips([path], size, 2)[0]
    assert corners(clip[0]) == [where[x, y] for y in (0, 1) for x in (0, 1)]


def test_a_size_that_changes_in_the_midst_is_followed(tmp_path: Path) -> None:
    made = {"codec": "mpeg2video", "pix_fmt": "yuv420p", "fps": 25, "options": {"qmin": "1"}}
    first = write_dawn(tmp_path / "1.ts", 5, **made)
    second = write_dawn(tmp_path / "2.ts", 4, (16, 32), **made)
    both = tmp_path / "both.ts"
    both.write_bytes(first.read_bytes() + second.read_bytes())
    # the last of the first part has no end that a reader could know, and is left out
    assert [numbers(clip) for clip in VideoClips([both], 8, 8)] == [[0, 1, 2, 3, 0, 1, 2, 3]]


def test_times_that_begin_anew_go_on(tmp_path: Path) -> None:
    black = np.zeros((16, 16, 3), np.uint8)
    one = write_frames(tmp_path / "1.ts", [black] * 50, fps=25, codec="mpeg2video", pix_fmt="yuv420p")
    (tmp_path / "two.ts").write_bytes(one.read_bytes() * 2)
    assert len(VideoClips([one], 8, 1, fps=50)) == 100
    assert 196 <= len(VideoClips([tmp_path / "two.ts"], 8, 1, fps=50)) <= 200


def test_a_video_is_decoded_once(dawn: Path, taken: list[int]) -> None:
    clips = VideoClips([dawn], 8, 2)
    assert len(clips) == 5
    assert taken == [11]
    first = [clips[at] for at in range(5)]
    assert taken == [11, 10]
    assert all(map(torch.equal, first, clips))
    assert taken == [11, 10]


def test_a_small_cache_lets_go_of_the_video_used_longest_ago(dawn: Path, tmp_path: Path) -> None:
    other = write_dawn(tmp_path / "other.mp4", 3)
    clips = VideoClips([dawn, other], 8, 3, cache_bytes=1)
    assert [numbers(clip) for clip in clips][-2:] == [[6, 7, 8], [0, 1, 2]]
    assert list(clips._cache) == [1]


def test_of_a_video_larger_than_the_cache_a_part_is_held(dawn: Path) -> None:
    room = 3 * 8 * 8 * 2 * 2  # two clips of two frames
    clips = VideoClips([dawn], 8, 2, cache_bytes=room)
    whole = VideoClips([dawn], 8, 2)
    assert len(clips) == 5
    for at in (3, 4, 0, 1, 4, 2):
        assert torch.equal(clips[at], whole[at])
        assert sum(held.numel() for _, held in clips._cache.values()) <= room


def test_no_more_is_decoded_than_was_asked_for(dawn: Path, taken: list[int]) -> None:
    want = VideoClips([dawn], 8, 2, stride=2)[0]
    assert taken == [4, 3]  # whether there are enough, and up to the last of the clip
    clips = VideoClips([dawn], 8, 2, stride=2)
    assert torch.equal(clips[0], want)
    assert taken == [4, 3, 4, 3]


def test_of_a_long_video_only_the_beginning_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(0)
    noise = rng.integers(0, 256, (120, 64, 64, 3), np.uint8)
    path = write_frames(tmp_path / "long.mkv", noise, codec="mjpeg", pix_fmt="yuvj444p", options={"qmax": "2"})
    size, read = path.stat().st_size, 0
    opened = Path.open

    class Counted:
        def __init__(self, file: Any) -> None:
            self.file, self.seek, self.tell = file, file.seek, file.tell

        def __enter__(self) -> Counted:
            return self

        def __exit__(self, *_: object) -> None:
            self.file.close()

        def read(self, count: int = -1) -> bytes:
            nonlocal read
            data = self.file.read(count)
            read += len(data)
            return data

    monkeypatch.setattr(Path, "open", lambda self, *given: Counted(opened(self, *given)))
    assert next(video.read_frames(path)).width == 64
    assert size > 300_000 and read < size / 2


def test_what_would_read_other_files_or_never_end_is_not_opened(dawn: Path, tmp_path: Path) -> None:
    """Playlists and the like name further files; ffmpeg would find out by content what a file is, whatever its name."""
    lists = {
        "hls": f"#EXTM3U\n#EXT-X-TARGETDURATION:9\n#EXTINF:9,\n{dawn}\n#EXT-X-ENDLIST\n",
        "concat": f"ffconcat version 1.0\nfile {dawn}\n",
        "dash": f"<?xml version='1.0'?><MPD xmlns='urn:mpeg:dash:schema:mpd:2011'><BaseURL>{dawn}</BaseURL></MPD>",
        "sdp": "v=0\nc=IN IP4 127.0.0.1\nm=video 5004 RTP/AVP 96\n",
        "image": "P6 2 2 255\n............",
        "lavfi": "color=red",
    }
    for name, text in lists.items():
        path = tmp_path / f"{name}.mp4"
        path.write_text(text)
        with pytest.raises(QuickmergeError, match="its content is of none of the kinds AVI, FLV, GIF, Matroska"):
            VideoClips([path], 8, 2)[0]
    os.mkfifo(tmp_path / "pipe.mp4")
    for path in (tmp_path / "pipe.mp4", Path("/dev/zero")):
        with pytest.raises(QuickmergeError, match="can't be read as a video: it is no regular file"):
            VideoClips([path], 8, 2)[0]


def test_a_container_that_names_another_file_does_not_get_it(dawn: Path, tmp_path: Path) -> None:
    """A playlist inside of a file that begins like a video."""
    path = tmp_path / "a.avi"
    path.write_bytes(b"RIFF\0\0\0\0AVI #EXTM3U\n#EXTINF:9,\n" + str(dawn).encode() + b"\n#EXT-X-ENDLIST\n")
    with pytest.raises(QuickmergeError, match=r"a\.avi can't be read as a video: ."):
        VideoClips([path], 8, 2)[0]


def test_frames_of_too_many_pixels_are_refused(tmp_path: Path) -> None:
    black = np.zeros((4096, 8192, 3), np.uint8)
    path = write_frames(tmp_path / "wide.avi", [black] * 2, codec="mjpeg", pix_fmt="yuvj420p")
    with pytest.raises(QuickmergeError, match=r"wide\.avi can't be read as a video: ."):
        VideoClips([path], 8, 2)[0]


def test_a_video_that_takes_too_long_is_given_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_dawn(tmp_path / "a.mkv", 20, (320, 320))
    with pytest.raises(
        QuickmergeError, match=r"a\.mkv can't be .*: it takes longer than 0 seconds, give a shorter one"
    ):
        VideoClips([path], 8, 2, seconds=0)[0]
    # a disk that is slow, and a decoder that is
    opened, content = Path.open, path.read_bytes()

    class Slow:
        def __init__(self) -> None:
            self.file = opened(path, "rb")
            self.seek, self.tell = self.file.seek, self.file.tell

        def __enter__(self) -> Slow:
            return self

        def __exit__(self, *_: object) -> None:
            self.file.close()

        def read(self, count: int) -> bytes:
            time.sleep(0.02)
            return self.file.read(min(count, len(content) // 100))

    with monkeypatch.context() as patch:
        patch.setattr(Path, "open", lambda *_: Slow())
        with pytest.raises(QuickmergeError, match=r"it takes longer than 0\.2 seconds"):
            list(video.read_frames(path, seconds=0.2))
    start, taken = time.monotonic(), 0
    with pytest.raises(QuickmergeError, match=r"it takes longer than 0\.3 seconds"):
        for _ in video.read_frames(path, fps=999, seconds=0.3):  # 2,000 frames
            taken += 1
            time.sleep(0.01)
    assert time.monotonic() - start < 5 and taken < 100


def test_times_that_lie_end_with_the_seconds(tmp_path: Path) -> None:
    """Brought to a rate, a frame that is shown for years would be repeated without end."""
    path = write_dawn(tmp_path / "a.mkv", 3, times=[0, 1, 10**9])
    with pytest.raises(QuickmergeError, match=r"it takes longer than 0\.5 seconds"):
        VideoClips([path], 8, 2, fps=25, seconds=0.5)[1]


def test_a_small_file_of_many_frames_takes_little_memory(tmp_path: Path) -> None:
    """Hours of one colour are some kilobytes; only the frames of a clip are ever held."""
    still = np.full((32, 32, 3), (255, 0, 0), np.uint8)
    path = write_frames(
        tmp_path / "still.mp4", (still for _ in range(10_000)), fps=25, options={"g": "10000", "preset": "ultrafast"}
    )
    assert path.stat().st_size < 600_000
    clips = VideoClips([path], 64, 4, cache_bytes=1 << 20)
    assert clips[0].shape == (4, 3, 64, 64)
    assert sum(held.numel() for _, held in clips._cache.values()) == 4 * 3 * 64 * 64


def test_damaged_parts_are_left_out_as_players_do(tmp_path: Path) -> None:
    path = write_dawn(tmp_path / "a.avi", 12, codec="mjpeg", pix_fmt="yuvj444p")
    data = bytearray(path.read_bytes())
    frames = [at for at in range(len(data)) if data[at : at + 3] == b"\xff\xd8\xff"]
    assert len(frames) == 12
    data[frames[5] : frames[6] - 8] = bytes(frames[6] - 8 - frames[5])
    (tmp_path / "b.avi").write_bytes(data)
    assert numbers(VideoClips([tmp_path / "b.avi"], 8, 11)[0]) == [0, 1, 2, 3, 4, 6, 7, 8, 9, 10, 11]
    for begin, end in zip(frames, [*frames[1:], data.index(b"idx1")], strict=True):
        data[begin : end - 8] = bytes(end - 8 - begin)
    (tmp_path / "c.avi").write_bytes(data)
    with pytest.raises(QuickmergeError, match=r"c\.avi can't be read as a video: ."):
        len(VideoClips([tmp_path / "c.avi"], 8, 2))


def test_what_nothing_decodes_is_told(dawn: Path, tmp_path: Path) -> None:
    data = dawn.read_bytes()
    assert data.count(b"avc1") == 2  # among the kinds of file, and the kind of track
    (tmp_path / "a.mp4").write_bytes(data.replace(b"avc1", b"zzzz"))
    with pytest.raises(QuickmergeError, match=r"a\.mp4 can't be read as a video: it is coded in a way that nothing"):
        len(VideoClips([tmp_path / "a.mp4"], 8, 2))


def test_names_in_a_file_need_not_be_utf_8(tmp_path: Path) -> None:
    path = write_dawn(tmp_path / "a.mkv", 4)
    data = path.read_bytes()
    assert b"Lavf" in data
    path.write_bytes(data.replace(b"Lavf", b"\xff\xfe\x80\x81"))
    assert numbers(VideoClips([path], 8, 4)[0]) == [0, 1, 2, 3]


def test_sound_alone_is_no_video(tmp_path: Path) -> None:
    with av.open(str(tmp_path / "a.mkv"), "w") as file:
        stream = file.add_stream("pcm_s16le", rate=8000)
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 800), np.int16), format="s16", layout="mono")
        frame.sample_rate = 8000
        file.mux(stream.encode(frame))
    with pytest.raises(QuickmergeError, match=r"a\.mkv can't be read as a video: there is none in it"):
        len(VideoClips([tmp_path / "a.mkv"], 8, 2))


def test_short_videos_are_skipped_and_counted(dawn: Path, tmp_path: Path) -> None:
    short = write_dawn(tmp_path / "short.mp4", 3)
    clips = VideoClips([short, dawn], 8, 5)
    assert (len(clips), clips.skipped) == (2, 1)
    assert clips.describe(0) == "dawn.mp4, frames 0-5"
    with pytest.raises(QuickmergeError, match="of at least 24 frames, and the longest of 2 has 11"):
        len(VideoClips([short, dawn], 8, 12, stride=2))


def test_the_fingerprint_tells_other_data(dawn: Path, tmp_path: Path) -> None:
    other = write_dawn(tmp_path / "dawn.mp4", 9)
    same = VideoClips([dawn], 8, 2).fingerprint()
    assert same == VideoClips([dawn], 8, 2).fingerprint()
    others = [VideoClips([other], 8, 2), VideoClips([dawn], 4, 2), VideoClips([dawn], 8, 2, stride=2)]
    assert len({same, *(clips.fingerprint() for clips in others)}) == 4


def test_what_is_no_video_is_named(tmp_path: Path) -> None:
    (tmp_path / "a.mp4").write_bytes(b"The sea, the sea.")
    for name in ("a.mp4", "gone.mp4"):
        with pytest.raises(QuickmergeError, match=f"{name} can't be read as a video: .") as told:
            len(VideoClips([tmp_path / name], 8, 2))
        assert "\n" not in str(told.value)


def test_names_with_a_colon(dawn: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "http: -a.mp4").write_bytes(dawn.read_bytes())
    monkeypatch.chdir(tmp_path)
    assert len(VideoClips([Path("http: -a.mp4")], 8, 4)) == 2


@pytest.mark.parametrize("settings", [{"frames": 0}, {"frames": 2, "stride": 0}, {"frames": 2, "size": 0}])
def test_numbers_are_checked_at_once(dawn: Path, settings: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="must be a whole number of at least 1"):
        VideoClips([dawn], **{"size": 8, **settings})
    with pytest.raises(ValueError, match="fps must be between"):
        VideoClips([dawn], 8, 2, fps=0)


def test_no_videos() -> None:
    with pytest.raises(QuickmergeError, match="no videos"):
        VideoClips([], 8, 2)


def test_without_the_extra_the_error_says_how_to_get_it(dawn: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "av", None)
    with pytest.raises(QuickmergeError, match=r"package av, which is not installed: pip install quickmerge\[video\]"):
        VideoClips([dawn], 8, 2)
