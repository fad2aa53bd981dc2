import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from quickmerge.errors import QuickmergeError
from quickmerge.training.data import VideoClips

imageio_ffmpeg = pytest.importorskip("imageio_ffmpeg")


def write_video(path: Path, frames: int, size: tuple[int, int] = (32, 16), fps: int = 10) -> Path:
    """A video that grows brighter: frame i is grey of 8 i."""
    writer = imageio_ffmpeg.write_frames(str(path), size, fps=fps, macro_block_size=1, quality=10)
    writer.send(None)
    for at in range(frames):
        writer.send(np.full((size[1], size[0], 3), 8 * at, np.uint8).tobytes())
    writer.close()
    return path


@pytest.fixture(scope="module")
def video(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_video(tmp_path_factory.mktemp("video") / "dawn.mp4", 11)


def numbers(clip: torch.Tensor) -> list[int]:
    return (clip.mean(dim=(1, 2, 3)) * 255 / 8).round().int().tolist()


def test_clips_follow_one_another(video: Path) -> None:
    clips = VideoClips([video], 8, 4)
    assert len(clips) == 2
    assert clips[0].shape == (4, 3, 8, 8)
    assert clips[0].dtype == torch.float32
    assert clips[0].is_contiguous()
    assert [numbers(clip) for clip in clips] == [[0, 1, 2, 3], [4, 5, 6, 7]]
    assert clips.describe(1) == "dawn.mp4, frames 4-8"
    assert clips.describe(-1) == clips.describe(1)


def test_stride_takes_every_so_many_frames(video: Path) -> None:
    clips = VideoClips([video], (4, 6), 2, stride=2)
    assert [numbers(clip) for clip in clips] == [[0, 2], [4, 6]]
    assert clips[0].shape == (2, 3, 4, 6)
    assert clips.describe(1) == "dawn.mp4, frames 4-8"
    # the 11 frames hold one run of 2 x 5 frames, though a sixth kept frame would follow
    assert [numbers(clip) for clip in VideoClips([video], 4, 2, stride=5)] == [[0, 5]]


def test_fps_drops_frames(video: Path) -> None:
    clips = VideoClips([video], 4, 5, fps=5)
    assert len(clips) == 1
    steps = np.diff(numbers(clips[0]))
    assert steps.tolist() == [2, 2, 2, 2]


def test_frames_that_last_differently_long_are_neither_dropped_nor_repeated(video: Path, tmp_path: Path) -> None:
    uneven = tmp_path / "uneven.mkv"
    times = ["-vf", "setpts=if(lt(N\\,5)\\,N\\,5+4*(N-5))/10/TB", "-fps_mode", "vfr"]
    ffmpeg = imageio_ffmpeg.get_ffmpeg_exe()
    subprocess.run([ffmpeg, "-v", "error", "-i", str(video), *times, "-q:v", "1", str(uneven)], check=True)
    assert [numbers(clip) for clip in VideoClips([uneven], 8, 11)] == [list(range(11))]


def test_the_centre_is_kept_upright(tmp_path: Path) -> None:
    frame = np.zeros((16, 64, 3), np.uint8)
    frame[:8, 24:40] = [255, 0, 0]
    frame[8:, 24:40] = [0, 0, 255]
    writer = imageio_ffmpeg.write_frames(
        str(tmp_path / "a.mp4"), (64, 16), macro_block_size=1, quality=10, pix_fmt_out="yuv444p"
    )
    writer.send(None)
    for _ in range(3):
        writer.send(frame.tobytes())
    writer.close()
    clip = VideoClips([tmp_path / "a.mp4"], 16, 3)[0]
    assert (clip[:, 0, :6].mean() > 0.8) and (clip[:, 2, :6].mean() < 0.2)
    assert (clip[:, 2, 10:].mean() > 0.8) and (clip[:, 0, 10:].mean() < 0.2)


def test_a_video_is_decoded_once(video: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    clips = VideoClips([video], 8, 2)
    assert len(clips) == 5
    runs = []
    run = subprocess.run
    monkeypatch.setattr(subprocess, "run", lambda *given, **settings: runs.append(given) or run(*given, **settings))
    first = [clips[at] for at in range(5)]
    assert len(runs) == 1
    assert all(map(torch.equal, first, clips))
    assert len(runs) == 1


def test_a_small_cache_lets_go_of_the_video_used_longest_ago(video: Path, tmp_path: Path) -> None:
    other = write_video(tmp_path / "other.mp4", 3)
    clips = VideoClips([video, other], 8, 3, cache_bytes=1)
    assert [numbers(clip) for clip in clips][-2:] == [[6, 7, 8], [0, 1, 2]]
    assert list(clips._cache) == [1]


def test_short_videos_are_skipped_and_counted(video: Path, tmp_path: Path) -> None:
    short = write_video(tmp_path / "short.mp4", 3)
    clips = VideoClips([short, video], 8, 5)
    assert (len(clips), clips.skipped) == (2, 1)
    assert clips.describe(0) == "dawn.mp4, frames 0-5"
    with pytest.raises(QuickmergeError, match="of at least 24 frames, and the longest of 2 has 11"):
        len(VideoClips([short, video], 8, 12, stride=2))


def test_the_fingerprint_tells_other_data(video: Path, tmp_path: Path) -> None:
    other = write_video(tmp_path / "dawn.mp4", 9)
    same = VideoClips([video], 8, 2).fingerprint()
    assert same == VideoClips([video], 8, 2).fingerprint()
    others = [VideoClips([other], 8, 2), VideoClips([video], 4, 2), VideoClips([video], 8, 2, stride=2)]
    assert len({same, *(clips.fingerprint() for clips in others)}) == 4


def test_what_is_no_video_is_named(tmp_path: Path) -> None:
    (tmp_path / "a.mp4").write_bytes(b"The sea, the sea.")
    for name in ("a.mp4", "gone.mp4"):
        with pytest.raises(QuickmergeError, match=f"{name} can't be read as a video: .") as told:
            len(VideoClips([tmp_path / name], 8, 2))
        assert "\n" not in str(told.value)


def test_names_with_a_colon(video: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "http: -a.mp4").write_bytes(video.read_bytes())
    monkeypatch.chdir(tmp_path)
    assert len(VideoClips([Path("http: -a.mp4")], 8, 4)) == 2


@pytest.mark.parametrize("settings", [{"frames": 0}, {"frames": 2, "stride": 0}, {"frames": 2, "size": 0}])
def test_numbers_are_checked_at_once(video: Path, settings: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="must be a whole number of at least 1"):
        VideoClips([video], **{"size": 8, **settings})
    with pytest.raises(ValueError, match="fps must be between"):
        VideoClips([video], 8, 2, fps=0)


def test_no_videos() -> None:
    with pytest.raises(QuickmergeError, match="no videos"):
        VideoClips([], 8, 2)


def test_without_the_extra_the_error_says_how_to_get_it(video: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "imageio_ffmpeg", None)
    with pytest.raises(
        QuickmergeError, match=r"imageio-ffmpeg, which is not installed: pip install quickmerge\[video\]"
    ):
        VideoClips([video], 8, 2)
