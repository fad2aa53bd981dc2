import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from quickmerge.datasets import VideoClips
from quickmerge.errors import QuickmergeError

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


def test_of_a_video_larger_than_the_cache_a_part_is_held(video: Path) -> None:
    room = 3 * 8 * 8 * 2 * 2  # two clips of two frames
    clips = VideoClips([video], 8, 2, cache_bytes=room)
    whole = VideoClips([video], 8, 2)
    assert len(clips) == 5
    for at in (3, 4, 0, 1, 4, 2):
        assert torch.equal(clips[at], whole[at])
        assert sum(held.numel() for _, held in clips._cache.values()) <= room


def test_no_more_is_decoded_than_was_asked_for(video: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    want = VideoClips([video], 8, 2, stride=2)[0]
    clips, run, frames = VideoClips([video], 8, 2, stride=2), subprocess.run, []

    def counted(command: list[str], **settings: Any) -> Any:
        frames.append(int(command[command.index("-frames:v") + 1]))
        return run(command, **settings)

    monkeypatch.setattr(subprocess, "run", counted)
    assert torch.equal(clips[0], want)
    assert frames == [4, 2]


def test_what_would_read_other_files_or_never_end_is_not_opened(video: Path, tmp_path: Path) -> None:
    """Playlists and the like name further files; ffmpeg would find out by content what a file is, whatever its name."""
    lists = {
        "hls": f"#EXTM3U\n#EXT-X-TARGETDURATION:9\n#EXTINF:9,\n{video}\n#EXT-X-ENDLIST\n",
        "concat": f"ffconcat version 1.0\nfile {video}\n",
        "dash": f"<?xml version='1.0'?><MPD xmlns='urn:mpeg:dash:schema:mpd:2011'><BaseURL>{video}</BaseURL></MPD>",
        "sdp": "v=0\nc=IN IP4 127.0.0.1\nm=video 5004 RTP/AVP 96\n",
        "picture": "P6 2 2 255\n............",
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


def test_a_container_that_names_another_file_does_not_get_it(video: Path, tmp_path: Path) -> None:
    """A playlist inside of a file that begins like a video."""
    path = tmp_path / "a.avi"
    path.write_bytes(b"RIFF\0\0\0\0AVI #EXTM3U\n#EXTINF:9,\n" + str(video).encode() + b"\n#EXT-X-ENDLIST\n")
    with pytest.raises(QuickmergeError, match=r"a\.avi can't be read as a video: ."):
        VideoClips([path], 8, 2)[0]


def test_frames_of_too_many_pixels_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "wide.avi"
    ffmpeg = imageio_ffmpeg.get_ffmpeg_exe()
    made = ["-f", "lavfi", "-i", "color=black:s=8192x4096:d=0.1:r=20", "-c:v", "mjpeg", "-q:v", "31"]
    subprocess.run([ffmpeg, "-v", "error", *made, str(path)], check=True)
    with pytest.raises(QuickmergeError, match=r"wide\.avi can't be read as a video: ."):
        VideoClips([path], 8, 2)[0]


def test_a_video_that_takes_too_long_is_given_up(video: Path, tmp_path: Path) -> None:
    slow = tmp_path / "ffmpeg"
    slow.write_text("#!/bin/sh\nexec sleep 60\n")
    slow.chmod(0o755)
    clips = VideoClips([video], 8, 2, seconds=0.2)
    clips._ffmpeg = str(slow)
    with pytest.raises(QuickmergeError, match=r"it takes longer than 0\.2 seconds, give a shorter one"):
        clips[0]


def test_a_small_file_of_many_frames_takes_little_memory(tmp_path: Path) -> None:
    """Hours of one colour are some kilobytes; only the frames of a clip are ever held."""
    path = tmp_path / "still.mp4"
    ffmpeg = imageio_ffmpeg.get_ffmpeg_exe()
    made = ["-f", "lavfi", "-i", "color=red:s=32x32:d=400:r=25", "-g", "10000"]
    subprocess.run([ffmpeg, "-v", "error", *made, str(path)], check=True)
    assert path.stat().st_size < 500_000
    clips = VideoClips([path], 64, 4, cache_bytes=1 << 20)
    assert clips[0].shape == (4, 3, 64, 64)
    assert sum(held.numel() for _, held in clips._cache.values()) == 4 * 3 * 64 * 64


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
