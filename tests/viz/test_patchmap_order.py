"""Images of what was chosen one after another."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

import quickmerge as qm
from quickmerge.errors import QuickmergeError
from quickmerge.merge.collect import patch_ranks
from quickmerge.merge.tokens import Count, Evidence, TokenView
from quickmerge.viz.patchmap import PatchStage, cell_of_pixel, dimmed
from quickmerge.viz.patchmap_sheet import last_turn, merged_image, number_size, ordered, rim, turn_colours, width_of

FEW = settings(max_examples=30, deadline=None)


def pruned(rows: int, columns: int, kept: int, seed: int = 0) -> PatchStage:
    """``kept`` patches in a random order."""
    draws = np.random.default_rng(seed)
    chosen = draws.permutation(rows * columns)[:kept]
    groups, ranks = np.full(rows * columns, -1), np.zeros(rows * columns, dtype=int)
    groups[np.sort(chosen)] = np.arange(kept)
    ranks[chosen] = np.arange(1, kept + 1)
    return PatchStage("after the projector", groups.reshape(1, rows, columns), 0, ranks.reshape(1, rows, columns))


def photo(height: int, width: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


# ---- colours


@given(st.integers(2, 400))
@FEW
def test_every_turn_is_darker_than_the_one_before(last: int) -> None:
    colours = turn_colours(np.arange(1, last + 1), last)
    linear = np.where(colours <= 10.31, colours / 255 / 12.92, ((colours / 255 + 0.055) / 1.055) ** 2.4)
    light = linear @ [0.2126, 0.7152, 0.0722]
    assert (np.diff(light) < 0).all()
    assert light[0] > 0.8 and light[-1] < 0.2


def test_a_single_turn_has_the_first_colour() -> None:
    np.testing.assert_array_equal(turn_colours(np.array([1]), 1), turn_colours(np.array([1]), 9))


# ---- the painted copy


@given(st.integers(1, 5), st.integers(1, 6), st.integers(0, 2**20), st.data())
@FEW
def test_kept_is_the_photo_framed_and_dropped_is_dim(rows: int, columns: int, seed: int, data: st.DataObject) -> None:
    kept = data.draw(st.integers(1, rows * columns))
    # Patches too small for numbers, so that all there is is frames and photo.
    height, width = data.draw(st.integers(3 * rows, 8 * rows)), data.draw(st.integers(3 * columns, 8 * columns))
    stage, image = pruned(rows, columns, kept, seed), photo(height, width, seed)
    assert number_size((height / rows, width / columns), kept) == 0
    out = np.asarray(ordered(stage, image, (height, width), kept)).astype(int)
    ranks = stage.ranks[0][np.ix_(cell_of_pixel(height, rows), cell_of_pixel(width, columns))]
    edge = rim((height, width), (rows, columns))
    np.testing.assert_array_equal(out[(ranks > 0) & ~edge], image[(ranks > 0) & ~edge])
    for turn in range(1, kept + 1):
        want = turn_colours(np.array([turn]), kept)[0]
        assert np.abs(out[(ranks == turn) & edge] - want).max() <= 0.5 + 1e-9
    assert np.abs(out[ranks == 0] - dimmed(image.astype(float))[ranks == 0]).max(initial=0) <= 0.5 + 1e-9


def test_a_rim_runs_along_every_side_of_a_patch() -> None:
    edge = rim((40, 60), (2, 3))
    cell = edge[:20, 20:40]
    assert cell[:2].all() and cell[-2:].all() and cell[:, :2].all() and cell[:, -2:].all()
    assert not cell[2:-2, 2:-2].any()
    np.testing.assert_array_equal(edge, np.tile(cell, (2, 3)))
    assert rim((7, 11), (7, 11)).all()  # a pixel a patch


def test_kept_without_a_turn_has_no_frame() -> None:
    stage = PatchStage("", np.array([[[0, 1, -1]]]), 0, np.array([[[0, 1, 0]]]))
    image = photo(5, 15)
    out = np.asarray(ordered(stage, image, (5, 15), 1))
    np.testing.assert_array_equal(out[:, :5], image[:, :5])
    assert (out[0, 5:10] != image[0, 5:10]).any()


@given(st.floats(4, 80), st.floats(4, 80), st.integers(1, 5000))
@FEW
def test_numbers_fit_their_patch_and_can_be_read_or_are_left_out(high: float, wide: float, last: int) -> None:
    font = number_size((high, wide), last)
    assert font == 0 or 8 <= font <= 13
    if font:
        # Fonts are hinted, so that a width does not grow quite evenly with the height.
        assert width_of(str(last), font, bold=True) <= 0.9 * wide and font <= high
    elif wide >= 60 and high >= 20:
        pytest.fail("there was room")


def test_numbers_are_where_their_patches_are() -> None:
    grey = np.full((120, 120, 3), 90, dtype=np.uint8)
    stage = pruned(3, 3, 4, seed=1)
    out = np.asarray(ordered(stage, grey, (120, 120), 4)).astype(int)
    white = (out >= 250).all(-1)
    for row, column in np.ndindex(3, 3):
        here = white[40 * row + 6 : 40 * row + 34, 40 * column + 6 : 40 * column + 34]
        assert here.any() == (stage.ranks[0, row, column] > 0)
        if here.any():
            y, x = np.nonzero(here)
            assert abs((y.min() + y.max()) / 2 - 13.5) <= 2 and abs((x.min() + x.max()) / 2 - 13.5) <= 2


# ---- the sheet


def test_the_sheet_explains_the_colours() -> None:
    with_order = pruned(4, 4, 6)
    without = PatchStage(with_order.name, with_order.groups)
    one, other = (merged_image(photo(64, 64), stage, "A title") for stage in (with_order, without))
    assert one.height > other.height  # a line for the key
    foot = np.asarray(one)[-60:].astype(int)
    first, last = (turn_colours(np.array([turn]), 6)[0] for turn in (1, 6))
    columns = [np.flatnonzero((np.abs(foot - want) <= 1).all(-1).any(0)) for want in (first, last)]
    assert all(len(found) for found in columns) and columns[0].min() < columns[1].min()


def test_what_is_not_chosen_in_turns_looks_as_it_did() -> None:
    mixed = [PatchStage("block 1", np.zeros((1, 4, 4), dtype=int)), pruned(4, 4, 5)]
    assert last_turn(mixed) == 5 and last_turn(mixed[:1]) == 0
    picture = np.asarray(merged_image(np.full((64, 64, 3), 200, np.uint8), mixed))
    only = np.asarray(merged_image(np.full((64, 64, 3), 200, np.uint8), [mixed[0], mixed[0]]))
    middle = slice(picture.shape[1] // 3, 2 * picture.shape[1] // 3 - 20)
    np.testing.assert_array_equal(picture[28:300, middle], only[28:300, middle])


@pytest.mark.parametrize(
    ("ranks", "words"),
    [
        (np.zeros((1, 2, 3), dtype=int), r"ranks must be a whole number for each patch, \(1, 2, 2\), got int64"),
        (np.zeros((1, 2, 2)), "ranks must be a whole number for each patch, .* got float64"),
        (np.array([[[0, 0], [-1, 0]]]), "ranks must be at least 0"),
        (np.array([[[0, 0], [0, 1]]]), "0 where a patch was dropped"),
    ],
)
def test_ranks_that_do_not_fit_are_refused(ranks: np.ndarray, words: str) -> None:
    with pytest.raises(QuickmergeError, match=words):
        PatchStage("", np.array([[[0, 1], [2, -1]]]), 0, ranks)


# ---- from plans


@given(st.integers(0, 2**20), st.integers(1, 12), st.booleans())
@FEW
def test_ranks_are_the_order_of_the_choice(seed: int, count: int, prefix: bool) -> None:
    draws = torch.Generator().manual_seed(seed)
    hidden = torch.randn(1, 13, 5, generator=draws)
    view = TokenView(
        hidden, prefix=1 if prefix else None, evidence=Evidence(saliency=torch.rand(1, 13, generator=draws))
    )
    for reducer in (qm.SCOPE(keep=Count(count)), qm.TrimTokenator(keep=Count(count), aligned=1.0)):
        plan = reducer.plan(view)
        assert plan.order is not None
        order = [token for token in plan.order[0].tolist() if token >= 0]
        ranks = patch_ranks(plan.slot[0], plan.order[0], plan.slot[0])
        assert len(order) == len(set(order)) == count - prefix
        assert ranks[order].tolist() == list(range(1, len(order) + 1))
        assert ranks.sum() == sum(range(1, len(order) + 1)) and not ranks[:prefix].any()
        # A smaller budget chooses the same tokens first: the order means something.
        if count - prefix > 1 and isinstance(reducer, qm.SCOPE):
            fewer = qm.SCOPE(keep=Count(count - 1)).plan(view)
            assert fewer.order is not None and fewer.order[0].tolist() == order[:-1]


def test_ranks_follow_slots_and_not_tokens() -> None:
    # Tokens 0 and 1 are dropped; of patches that share a slot, all get its turn.
    slot, order = torch.tensor([-1, -1, 0, 1, 2]), torch.tensor([4, 2, -1])
    groups = torch.tensor([[2, 2, -1], [0, 1, 0]])
    assert patch_ranks(slot, order, groups).tolist() == [[1, 1, 0], [2, 0, 2]]


def test_an_image_of_one_patch() -> None:
    stage = PatchStage("", np.zeros((1, 1, 1), dtype=int), 0, np.ones((1, 1, 1), dtype=int))
    assert merged_image(Image.new("RGB", (8, 8)), stage).width == 1200
