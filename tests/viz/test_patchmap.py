from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from PIL import Image

from quickmerge.errors import QuickmergeError
from quickmerge.viz.drawing import DARK, LIGHT, rgb
from quickmerge.viz.patchmap import (
    HUES,
    PatchStage,
    border_coverage,
    cell_of_pixel,
    fill_of,
    group_colours,
    hues,
    mean_colours,
    spanning,
)
from quickmerge.viz.patchmap_sheet import Space, arrange, chosen, legend, merged_image
from quickmerge.viz.patchmap_video import video_animation, video_strip, write_image

FEW = settings(max_examples=30, deadline=None)


def photo(height: int, width: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


def slots(*grid: int, count: int = 9, least: int = -1, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(least, count, grid)


@st.composite
def scenes(draw: st.DrawFn) -> tuple[np.ndarray, np.ndarray]:
    """A clip ``(F, h, w, 3)`` and groups ``(T, H, W)`` for it; sides need not be multiples of the grid's."""
    t, h, w, each = (draw(st.integers(1, most)) for most in (3, 6, 6, 2))
    height, width = draw(st.integers(h, 30)), draw(st.integers(w, 30))
    seed = draw(st.integers(0, 2**20))
    clip = np.stack([photo(height, width, seed + index) for index in range(t * each)])
    return clip, slots(t, h, w, count=draw(st.integers(1, 12)), seed=seed)


# ---- groups and their colours


@given(scenes())
@FEW
def test_a_group_has_the_mean_colour_of_its_pixels(scene: tuple[np.ndarray, np.ndarray]) -> None:
    clip, groups = scene
    steps, rows, columns = groups.shape
    dense, count = PatchStage("", groups).dense()
    found = mean_colours(clip, dense, count)
    kept = sorted({int(slot) for slot in groups.ravel()} - {-1})
    assert count == len(kept)
    for order, slot in enumerate(kept):
        members = []
        for f, y, x in np.ndindex(*clip.shape[:3]):
            # The cell that the middle of the pixel lies in, in exact arithmetic.
            cell = (f // (len(clip) // steps), (2 * y + 1) * rows // (2 * clip.shape[1]))
            if groups[cell[0], cell[1], (2 * x + 1) * columns // (2 * clip.shape[2])] == slot:
                members.append(clip[f, y, x].astype(np.float64))
        np.testing.assert_allclose(found[order], np.mean(members, axis=0), rtol=1e-12)


@given(scenes(), st.sampled_from(["mean", "photo"]))
@FEW
def test_painting_away_from_lines(scene: tuple[np.ndarray, np.ndarray], alone: Any) -> None:
    clip, groups = scene
    image, groups = clip[0], groups[:1]
    out = np.asarray(group_colours(image, groups, alone=alone))
    assert out.shape == image.shape
    height, width = image.shape[:2]
    label = groups[0][np.ix_(cell_of_pixel(height, groups.shape[1]), cell_of_pixel(width, groups.shape[2]))]
    clear = border_coverage(groups[0], (height, width), 6.0) == 0
    for slot in np.unique(label[clear]):
        here = (label == slot) & clear
        if slot == -1:
            assert (np.ptp(out[here], axis=1) == 0).all()  # grey
            assert out[here].max() <= 18 + 0.32 * 255 + 30 + 1
        elif alone == "photo" and (groups == slot).sum() == 1:
            np.testing.assert_array_equal(out[here], image[here])
        else:
            mean = image[label == slot].astype(np.float64).mean(0)
            assert np.abs(out[here] - mean).max() <= 0.5 + 1e-9


@given(scenes(), st.randoms(use_true_random=False))
@FEW
def test_the_numbers_of_slots_do_not_matter(scene: tuple[np.ndarray, np.ndarray], random: Any) -> None:
    clip, groups = scene
    names = list(range(100))
    random.shuffle(names)
    renamed = np.where(groups[:1] >= 0, np.array(names)[groups[:1]], -1)
    assert group_colours(clip[0], groups[:1]).tobytes() == group_colours(clip[0], renamed).tobytes()


def test_one_patch_is_one_colour_without_lines() -> None:
    image = photo(20, 31)
    out = np.asarray(group_colours(image, np.zeros((1, 1, 1), dtype=int)))
    assert (out == out[0, 0]).all()
    assert np.abs(out[0, 0] - image.reshape(-1, 3).mean(0)).max() <= 0.5


def test_neighbours_of_one_colour_are_told_apart_on_every_grey() -> None:
    groups = np.array([[[0, 0, 1, 1]]])
    for grey in range(0, 256, 3):
        image = np.full((40, 160, 3), grey, dtype=np.uint8)
        out = np.asarray(group_colours(image, groups)).astype(int)
        assert np.abs(out[:, 72:88] - grey).max() >= 60, grey
        assert (out[:, :72] == grey).all() and (out[:, 88:] == grey).all()


def test_dropped_patches_are_hatched_even_in_black() -> None:
    out = np.asarray(group_colours(np.zeros((60, 60, 3), dtype=np.uint8), np.full((1, 3, 3), -1)))
    assert out.max() > out.min() + 20
    assert (np.ptp(out, axis=2) == 0).all()


# ---- lines


@given(st.integers(0, 2**20), st.integers(1, 5), st.integers(1, 5), st.floats(0.3, 4.0))
@FEW
def test_coverage_equals_counting_points(seed: int, rows: int, columns: int, width: float) -> None:
    height, wide, fine = 23, 17, 24
    groups = slots(rows, columns, count=3, seed=seed)
    found = border_coverage(groups, (height, wide), width)
    y = (np.arange(height * fine) + 0.5) / fine
    x = (np.arange(wide * fine) + 0.5) / fine
    tall, broad, half = height / rows, wide / columns, width / 2
    upright = np.zeros((len(y), len(x)), dtype=bool)
    level = upright.copy()
    for i, j in np.ndindex(rows, columns):
        if j + 1 < columns and groups[i, j] != groups[i, j + 1]:
            in_y = (y >= i * tall - half) & (y <= (i + 1) * tall + half)
            upright |= in_y[:, None] & (np.abs(x - (j + 1) * broad) <= half)
        if i + 1 < rows and groups[i, j] != groups[i + 1, j]:
            in_x = (x >= j * broad - half) & (x <= (j + 1) * broad + half)
            level |= (np.abs(y - (i + 1) * tall) <= half)[:, None] & in_x
    shares = [mask.reshape(height, fine, wide, fine).mean((1, 3)) for mask in (upright, level)]
    if min(tall, broad) > width + 1:  # so that no pixel is in two lines side by side
        # Two lines that each cover a part of a pixel where ends meet may overlap there: the sum is capped.
        np.testing.assert_allclose(found, np.maximum(*shares), atol=2.5 / fine + 0.02)
    assert (found >= 0).all() and (found <= 1).all()
    assert (found[np.maximum(*shares) > 0.2] > 0).all()


def test_a_straight_line_is_smooth_and_has_its_area() -> None:
    groups = np.repeat(np.array([[0, 0, 1, 1, 1]]), 7, axis=0)
    found = border_coverage(groups, (50, 33), 1.7)
    np.testing.assert_allclose(found.sum(1), 1.7, atol=1e-12)  # no dots where patches meet
    assert not border_coverage(np.zeros((4, 4), dtype=int), (9, 9), 2.0).any()


# ---- colours of groups over time


def oklab(linear: np.ndarray) -> np.ndarray:
    """Björn Ottosson's OKLab of linear sRGB ``(..., 3)``."""
    lms = (
        linear
        @ np.array(
            [
                [0.4122214708, 0.5363325363, 0.0514459929],
                [0.2119034982, 0.6806995451, 0.1073969566],
                [0.0883024619, 0.2817188376, 0.6299787005],
            ]
        ).T
    )
    return (
        np.cbrt(lms)
        @ np.array(
            [
                [0.2104542553, 0.7936177850, -0.0040720468],
                [1.9779984951, -2.4285922050, 0.4505937099],
                [0.0259040371, 0.7827717662, -0.8086757660],
            ]
        ).T
    )


# Full dichromacy in linear sRGB: Machado, Oliveira and Fernandes 2009.
SIGHTS = {
    "full": np.eye(3),
    "protanopia": np.array(
        [[0.152286, 1.052583, -0.204868], [0.114503, 0.786281, 0.099216], [-0.003882, -0.048116, 1.051998]]
    ),
    "deuteranopia": np.array(
        [[0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413], [-0.011820, 0.042940, 0.968881]]
    ),
    "tritanopia": np.array(
        [[1.255528, -0.076749, -0.178779], [-0.078411, 0.930809, 0.147602], [0.004733, 0.691367, 0.303900]]
    ),
}


@pytest.mark.parametrize("sight", SIGHTS)
def test_hues_stay_apart_for_every_reader(sight: str) -> None:
    colours = np.array([rgb(hue) for hue in HUES]) / 255
    linear = np.where(colours <= 0.04045, colours / 12.92, ((colours + 0.055) / 1.055) ** 2.4)
    seen = oklab(np.clip(linear @ SIGHTS[sight].T, 0, 1))
    assert min(np.linalg.norm(one - other) for one, other in itertools.combinations(seen, 2)) >= 0.09


@given(
    st.integers(0, 2**20), st.integers(1, 4), st.integers(1, 5), st.integers(1, 5), st.integers(1, 30), st.booleans()
)
@FEW
def test_touching_groups_get_different_hues(seed: int, t: int, h: int, w: int, count: int, small: bool) -> None:
    # Every patch a group of its own: far more groups than colours, and each touches ten at most.
    groups = np.arange(t * h * w).reshape(t, h, w) if small else slots(t, h, w, count=count, seed=seed)
    dense, count = PatchStage("", groups).dense()
    wanted = np.random.default_rng(seed).random(count) < 0.9
    found = hues(dense, count, wanted)
    assert ((found >= 0) == wanted).all() and (found < len(HUES)).all()
    near: dict[int, set[int]] = {group: set() for group in range(count)}
    for here in np.ndindex(*dense.shape):
        for there in np.ndindex(*dense.shape):
            dt, dy, dx = (abs(a - b) for a, b in zip(here, there, strict=True))
            if (dt == 0 and max(dy, dx) == 1) or (dt == 1 and dy == dx == 0):
                one, other = int(dense[here]), int(dense[there])
                if one != other and one >= 0 and other >= 0:
                    near[one].add(other)
    for group in range(count):
        around = [other for other in near[group] if wanted[other]]
        if wanted[group] and len(around) < len(HUES):
            # With fewer than twelve around, one colour was always free.
            assert all(found[other] != found[group] for other in around if len(near[other]) < len(HUES))
    if wanted.sum() <= len(HUES):
        assert len(set(found[wanted].tolist())) == wanted.sum()


def test_a_rare_colour_is_not_taken_beside_itself() -> None:
    groups = np.full((1, 2, 45), -1)
    groups[0, 0, ::2] = np.arange(23)  # apart: colours 0..11, then 0..10 again
    groups[0, 1, 22] = 23  # below group 11, which alone has colour 11
    found = hues(groups, 24, np.ones(24, dtype=bool))
    assert found.tolist() == [*range(12), *range(11), 0]


def test_spanning_means_several_steps() -> None:
    groups = np.array([[[0, 0, 1, 3]], [[2, 2, 1, 3]], [[2, 4, 4, -1]]])
    assert spanning(groups, 5).tolist() == [False, True, True, True, False]


def test_a_token_keeps_its_colour_over_the_frames() -> None:
    frames = [photo(60, 60, seed) for seed in range(4)]
    groups = np.array([[[7, 3], [3, 3]], [[7, 5], [5, 5]]])  # 7 spans both steps; 3 and 5 do not
    stage = PatchStage("block 2", groups)
    fill = fill_of(np.stack(frames), stage, "mean")
    assert fill.spans.tolist() == [False, False, True]
    assert tuple(fill.colours[2]) == rgb(HUES[0])
    sheet = np.asarray(video_strip(frames, stage, width=1600))
    # Every painted frame has the same flat area of the hue, in the same place.
    runs = np.flatnonzero((sheet == rgb(HUES[0])).all(-1).any(0))
    starts = runs[np.flatnonzero(np.diff(runs, prepend=-9) > 1)]
    assert len(starts) == 4 and len(set(np.diff(starts))) == 1


def test_a_token_is_followed_where_it_goes(tmp_path: Path) -> None:
    frames = [np.zeros((40, 80, 3), dtype=np.uint8)] * 4
    stage = PatchStage("", np.array([[[1, -1]], [[-1, 1]]]))

    def middle(picture: np.ndarray) -> float:
        return float(np.flatnonzero((picture == rgb(HUES[0])).all(-1).any(0)).mean())

    sheet = np.asarray(video_strip(frames, stage))
    quarters = [middle(part) for part in np.array_split(sheet, 4, axis=1)]
    assert max(quarters[:2]) < sheet.shape[1] / 8 - 20 < sheet.shape[1] / 8 + 20 < min(quarters[2:])
    with Image.open(video_animation(frames, stage, tmp_path / "a.gif", width=400)) as found:
        ats = []
        for index in range(found.n_frames):  # GIF joins frames that are the same
            found.seek(index)
            ats.append(middle(np.asarray(found.convert("RGB"))))
    assert len(ats) == 2 and ats[1] - ats[0] == pytest.approx(188 / 2, abs=6)


def test_untouched_frames_are_below_the_painted_ones() -> None:
    frames = [np.full((40, 40, 3), shade, dtype=np.uint8) for shade in (10, 90, 170, 250)]
    sheet = np.asarray(video_strip(frames, PatchStage("", np.zeros((4, 2, 2), dtype=int))))
    middle = sheet.shape[1] * (2 * np.arange(4) + 1) // 8
    rows = [np.flatnonzero((sheet[:, x] == frame[0, 0]).all(-1)) for x, frame in zip(middle, frames, strict=True)]
    painted = [np.flatnonzero((sheet[:, x] == rgb(HUES[0])).all(-1)) for x in middle]
    for one, other in zip(rows, painted, strict=True):
        assert len(one) > 100 and len(other) > 100
        assert other.max() < one.min()


# ---- the image


def test_stages_are_chosen_at_even_depth() -> None:
    twelve = [PatchStage(f"block {depth}", np.zeros((1, 2, 2), dtype=int)) for depth in range(1, 13)]
    assert [stage.name for stage in chosen(twelve, 4)] == ["block 3", "block 6", "block 9", "block 12"]
    assert [stage.name for stage in chosen(twelve, 1)] == ["block 12"]
    assert chosen(twelve[:2], 5) == twelve[:2]
    assert chosen(twelve[0], 3) == twelve[:1]


@given(st.integers(2, 6), st.floats(0.05, 20.0), st.integers(300, 2400))
@example(5, 16 / 9, 1200)  # the photo large, beside two rows
@example(6, 1.0, 1200)
@example(5, 3.0, 900)  # pairs
@FEW
def test_images_lie_side_by_side_and_keep_their_shape(count: int, aspect: float, width: int) -> None:
    unit = width / 1200
    space = Space(width - 56 * unit, 16 * unit, 74 * unit, unit)
    boxes, tall = arrange(count, aspect, space)
    assert len(boxes) == count and boxes[0].x == min(box.x for box in boxes) and boxes[0].y == 0
    for box in boxes:
        assert box.x >= 0 and box.x + box.width <= space.width + 1
        assert box.y >= 0 and box.y + box.height + space.caption <= tall + 2
        # One pixel at most is lost to rounding, on each side.
        assert (box.width - 1) / (box.height + 1) <= aspect <= (box.width + 1) / max(box.height - 1, 0.5)
    for one, other in itertools.combinations(boxes, 2):
        beside = one.x + one.width <= other.x or other.x + other.width <= one.x
        below = one.y + one.height + 50 * unit <= other.y or other.y + other.height + 50 * unit <= one.y
        assert beside or below


@pytest.mark.parametrize(("height", "width"), [(224, 224), (120, 480), (400, 90), (30, 900), (28, 28)])
@pytest.mark.parametrize("dark", [False, True])
def test_image_has_its_width_and_is_the_same_every_time(height: int, width: int, dark: bool) -> None:
    stages = [PatchStage(f"block {depth}", slots(1, 7, 7, count=40 // depth), 1) for depth in (1, 2, 3)]
    one, two = (merged_image(photo(height, width), stages, "A title", width=900, dark=dark) for _ in "ab")
    assert one.width == 900 and one.tobytes() == two.tobytes()
    assert one.getpixel((0, 0)) == rgb((DARK if dark else LIGHT).card)


@pytest.mark.parametrize("kept", [1, 16, 37, 64])
def test_bar_is_as_long_as_the_share_of_tokens(kept: int) -> None:
    groups = np.where(np.arange(64) < kept, np.arange(64), -1).reshape(1, 8, 8)
    image = np.zeros((200, 200, 3), dtype=np.uint8)
    sheet = np.asarray(merged_image(image, [PatchStage("last", groups)], width=1200))
    accent = (sheet == rgb(LIGHT.accent)).all(-1).sum(1)
    full = (1200 - 2 * 28 - 16) // 2
    assert accent.max() == pytest.approx(full * (1 + kept / 64), abs=2)


def test_grids_from_one_patch_to_many() -> None:
    for side in (1, 2, 64):
        stage = PatchStage("block 1", np.arange(side * side).reshape(1, side, side))
        assert stage.tokens == stage.originally == side * side
        assert merged_image(photo(64, 64), stage).width == 1200


def test_the_photo_is_first_and_untouched() -> None:
    image = np.full((50, 50, 3), (200, 30, 90), dtype=np.uint8)
    sheet = np.asarray(merged_image(image, PatchStage("", np.full((1, 5, 5), -1))))
    red = np.flatnonzero((sheet == (200, 30, 90)).all(-1).any(0))
    assert red.min() == 28 and len(red) == red.max() - 27 == (1200 - 56 - 16) // 2


def test_captions_count_tokens() -> None:
    groups = np.array([[[5, 5, 9], [-1, 5, -1]]])
    assert PatchStage("a\nb", groups, 1).facts == "3 of 7 tokens"
    assert PatchStage("a\nb", groups).heading == "a↵b"
    assert PatchStage("", np.zeros((1, 1, 1), dtype=int)).facts == "1 of 1 token"
    assert PatchStage("", np.zeros((2, 32, 32), dtype=int), 3).facts == "4 of 2,051 tokens"


def test_legend_tells_what_there_is() -> None:
    def told(groups: list[Any], alone: Any = "photo") -> str:
        stage = PatchStage("", np.array(groups))
        return " ".join(legend([fill_of(np.zeros((len(groups), 8, 8, 3), dtype=np.uint8), stage, alone)], 14.5, 600))

    assert told([[[0, 0]]]) == "Each outlined area is one token, painted in its mean colour."
    assert "Sharp" in told([[[0, 1]]]) and "mean colour" not in told([[[0, 1]]])
    assert "Sharp" not in told([[[0, 1]]], "mean")
    assert "dropped" in told([[[0, -1]]]) and "Vivid" not in told([[[0, -1]]])
    assert "Vivid" in told([[[0]], [[0]]]) and "repeat" not in told([[[0]], [[0]]])
    many = [[list(range(13))], [list(range(13))]]
    assert "repeat" in " ".join(
        legend([fill_of(np.zeros((2, 1, 13, 3), dtype=np.uint8), PatchStage("", np.array(many)), "mean")], 14.5, 600)
    )


def test_any_title_is_drawn_and_long_ones_end_early() -> None:
    stage = PatchStage("名前" * 40, slots(1, 3, 3))
    for title in ("x" * 500, "図 of 中文", "\x00\ud800 $a$", "🙂"):
        assert merged_image(photo(30, 30), stage, title, width=300).width == 300
    plain, titled = (merged_image(photo(30, 30), stage, title) for title in (None, "W" * 500))
    ink = np.flatnonzero((np.asarray(titled)[: titled.height - plain.height] < 100).all(-1).any(0))
    assert titled.height > plain.height and 1000 < ink.max() < 1200 - 28 + 2


def test_a_stage_is_what_it_was_when_it_was_made() -> None:
    groups = np.zeros((1, 2, 2), dtype=np.int32)
    stage = PatchStage("", groups)
    groups[:] = 3
    assert not stage.groups.any()
    with pytest.raises(ValueError, match="read-only"):
        stage.groups[0, 0, 0] = 1


def test_pillow_images_of_any_mode_are_taken_as_rgb() -> None:
    grey = Image.fromarray(photo(12, 12)[..., 0])
    groups = slots(1, 3, 3)
    assert group_colours(grey, groups).tobytes() == group_colours(grey.convert("RGB"), groups).tobytes()
    assert group_colours(grey.convert("RGBA"), groups).mode == "RGB"


# ---- files


@pytest.mark.parametrize("suffix", [".gif", ".WEBP"])
def test_animation_has_every_frame_and_is_the_same_every_time(tmp_path: Path, suffix: str) -> None:
    frames = np.stack([photo(32, 48, seed) for seed in range(6)])
    stages = [PatchStage("block 1", slots(3, 4, 6, count=9)), PatchStage("block 2", slots(3, 4, 6, count=4))]
    paths = [tmp_path / "new" / f"{name}{suffix}" for name in "ab"]
    for path in paths:
        assert video_animation(frames, stages, path, 0.25, title="A clip", width=300) == path
    assert paths[0].read_bytes() == paths[1].read_bytes()
    with Image.open(paths[0]) as found:
        assert (found.n_frames, found.width, found.info["loop"]) == (6, 300, 0)
        for index in range(6):
            found.seek(index)
            found.load()
            assert found.info["duration"] == 250
    assert sorted(path.name for path in (tmp_path / "new").iterdir()) == sorted(path.name for path in paths)


def test_gif_keeps_flat_colours_exactly(tmp_path: Path) -> None:
    # Shades close to white and to the hue compete for places among the 256 colours.
    near = [np.array(rgb(HUES[0])) - 2, np.array([253, 253, 253])]
    frames = np.stack([(color + photo(64, 64) % 5 - 2).astype(np.uint8) for color in near])
    groups = np.zeros((2, 2, 2), dtype=int)
    video_animation(frames, PatchStage("", groups), tmp_path / "a.gif", width=400)
    with Image.open(tmp_path / "a.gif") as found:
        colours = {tuple(color) for _, color in found.convert("RGB").getcolors(1 << 20)}
        flat = np.asarray(found.convert("RGB"))
    assert rgb(HUES[0]) in colours and rgb(LIGHT.accent) in colours
    assert tuple(flat[0, 0]) == (255, 255, 255)
    assert (flat[20:180, 210:380] == rgb(HUES[0])).all()  # one token, one colour: nothing is dithered


@pytest.mark.parametrize("suffix", [".gif", ".webp"])
def test_animation_gets_narrower_until_it_is_small_enough(tmp_path: Path, suffix: str) -> None:
    frames, stage = [photo(60, 60, seed) for seed in range(2)], PatchStage("", slots(2, 5, 5))
    free = video_animation(frames, stage, tmp_path / f"free{suffix}", width=320, max_bytes=None).stat().st_size
    path = video_animation(frames, stage, tmp_path / f"less{suffix}", width=320, max_bytes=free * 3 // 4)
    assert path.stat().st_size <= free * 3 // 4
    with Image.open(path) as found:
        assert 200 <= found.width < 320
    with pytest.raises(QuickmergeError, match=r"max_bytes must be at least .* got 100: give fewer frames"):
        video_animation(frames, stage, tmp_path / f"none{suffix}", max_bytes=100)
    assert not (tmp_path / f"none{suffix}").exists()


def test_a_failed_animation_leaves_what_was_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a.webp"
    path.write_bytes(b"before")
    frames, stage = [photo(20, 20)], PatchStage("", slots(1, 2, 2))

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.replace", full)
    with pytest.raises(QuickmergeError, match="No space left"):
        video_animation(frames, stage, path)
    assert path.read_bytes() == b"before" and list(tmp_path.iterdir()) == [path]


def test_images_are_written_whole(tmp_path: Path) -> None:
    picture = group_colours(photo(40, 40), slots(1, 4, 4))
    path = write_image(picture, tmp_path / "new" / "a.png")
    with Image.open(path) as found:
        assert found.tobytes() == picture.tobytes()
    with Image.open(write_image(picture, tmp_path / "a.webp")) as found:
        assert found.size == picture.size and found.format == "WEBP"
    with pytest.raises(QuickmergeError, match=r"path must end in \.png or \.webp, got 'a\.bmp'"):
        write_image(picture, "a.bmp")


# ---- errors

STAGE = PatchStage("block 1", np.zeros((1, 2, 2), dtype=int))
CLIP = PatchStage("block 1", np.zeros((2, 2, 2), dtype=int))


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: PatchStage("", np.zeros((2, 2), dtype=int)), r"\(T, H, W\), got shape \(2, 2\)"),
        (lambda: PatchStage("", np.zeros((1, 0, 2), dtype=int)), r"got shape \(1, 0, 2\)"),
        (lambda: PatchStage("", np.zeros((1, 2, 2))), "whole numbers, got float64"),
        (lambda: PatchStage("", np.full((1, 2, 2), -2)), "got -2"),
        (lambda: PatchStage("", np.zeros((1, 2, 2), dtype=int), -1), "unplaced must be .* at least 0, got -1"),
        (lambda: group_colours(photo(8, 8), np.zeros((2, 2), dtype=int)), "got shape"),
        (lambda: group_colours(photo(8, 8), CLIP.groups), r"image must be \(1, H, W\), got \(2, 2, 2\)"),
        (lambda: group_colours(photo(8, 8), STAGE.groups, alone="dot"), "'mean' or 'photo', got 'dot'"),  # type: ignore[arg-type]
        (lambda: group_colours(photo(1, 8), STAGE.groups), "at most a patch a pixel, 1 x 8, got 2 x 2"),
        (lambda: group_colours(photo(8, 8) / 255, STAGE.groups), "uint8 array .* got float64"),
        (lambda: group_colours("a.png", STAGE.groups), "got str"),  # type: ignore[arg-type]
        (lambda: merged_image(photo(8, 8), []), "stages must be at least one PatchStage, got none"),
        (lambda: merged_image(photo(8, 8), ["block"]), "must be PatchStages, got str"),  # type: ignore[list-item]
        (lambda: merged_image(photo(8, 8), [STAGE, CLIP]), r"must be \(1, H, W\), got \(2, 2, 2\) of 'block 1'"),
        (lambda: merged_image(photo(8, 8), [STAGE], width=100), "width must be .* at least 300, got 100"),
        (lambda: merged_image(photo(8, 8), [STAGE], max_stages=6), "max_stages must be at most 5, got 6"),
        (lambda: video_strip([], CLIP), "frames must be at least one image"),
        (lambda: video_strip([photo(8, 8)] * 3, CLIP), r"multiple of the 2 steps in time of groups .*, got 3"),
        (lambda: video_strip([photo(8, 8), photo(8, 9)], CLIP), "size of the first, 8 x 8, got 8 x 9 at 1"),
        (lambda: video_strip([photo(8, 8)] * 2, CLIP, max_frames=9), "max_frames must be at most 8, got 9"),
        (lambda: video_strip([photo(8, 8), 3], CLIP), r"frames\[1\] must be a Pillow image"),  # type: ignore[list-item]
        (lambda: video_animation([photo(8, 8)], STAGE, "a.mp4"), r"path must end in \.gif or \.webp, got 'a\.mp4'"),
        (lambda: video_animation([photo(8, 8)], STAGE, "a.gif", 0), "seconds_per_frame must be within .* got 0"),
        (lambda: video_animation([photo(8, 8)], STAGE, "a.gif", float("nan")), "seconds_per_frame .* got nan"),
        (lambda: video_animation([photo(8, 8)], STAGE, "a.gif", max_bytes=0), "max_bytes must be .* got 0"),
        (lambda: video_animation([photo(8, 8)], [], "a.gif"), "stages must be at least one"),
        (lambda: video_animation([photo(8, 8)], CLIP, "a.gif"), "multiple of the 2 steps"),
    ],
)
def test_errors_say_what_is_allowed(call: Any, words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=words):
        call()
    assert not list(tmp_path.iterdir())
