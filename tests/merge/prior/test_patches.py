"""Images to patches and back, to the bit; waves that keep lengths."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from strategies import generator, prop, seeds

from quickmerge.merge.prior.train_patches import images_of, patchify, pixels, unpatchify, view_of, waves

small = st.integers(1, 4)


@prop(40)
@given(small, small, small, small, small, small, st.none() | small, seeds)
def test_there_and_back(b: int, c: int, rows: int, columns: int, h: int, w: int, frames: int | None, seed: int) -> None:
    middle = () if frames is None else (frames,)
    x = torch.rand(b, *middle, c, rows * h, columns * w, generator=generator(seed))
    patches = patchify(x, (h, w))
    assert patches.shape == (b, (frames or 1) * rows * columns, c * h * w)
    assert torch.equal(unpatchify(patches, (h, w), (rows * h, columns * w), frames), x)
    for t in range(frames or 1):
        for r in range(rows):
            for col in range(columns):
                picture = x if frames is None else x[:, t]
                want = picture[:, :, r * h : (r + 1) * h, col * w : (col + 1) * w].flatten(1)
                assert torch.equal(patches[:, (t * rows + r) * columns + col], want)


@prop(30)
@given(small, small, small, seeds)
def test_waves_are_a_rotation(c: int, h: int, w: int, seed: int) -> None:
    x = torch.randn(2, 5, c * h * w, generator=generator(seed), dtype=torch.float64)
    turned = waves(x, (h, w))
    torch.testing.assert_close(pixels(turned, (h, w)), x, atol=1e-12, rtol=0)
    torch.testing.assert_close(turned @ turned.transpose(1, 2), x @ x.transpose(1, 2), atol=1e-10, rtol=0)
    # the first wave is the mean, and one of the others is a cosine along a row
    torch.testing.assert_close(turned[..., 0], x.mean(-1) * math.sqrt(c * h * w), atol=1e-12, rtol=0)
    k = w - 1
    wave = torch.cos(math.pi / w * k * (torch.arange(w, dtype=torch.float64) + 0.5))
    want = (x.view(2, 5, c * h, w).mean(2) * wave).sum(-1) * math.sqrt(c * h * (2 if k else 1) / w)
    torch.testing.assert_close(turned[..., k], want, atol=1e-10, rtol=0)


def test_colours_become_grey_and_two_differences() -> None:
    red, grey = torch.tensor([1.0, 0, -1]), torch.ones(3)
    assert waves(grey, 1).tolist() == pytest.approx([math.sqrt(3), 0, 0], abs=1e-6)
    assert waves(red, 1).tolist() == pytest.approx([0, math.sqrt(2), 0], abs=1e-6)


def test_a_view_has_a_grid_and_half_grey_is_zero() -> None:
    clip = torch.rand(2, 3, 3, 8, 12, generator=generator(0))
    view = view_of(clip, 4)
    assert view.grid == (3, 2, 3) and view.hidden.shape == (2, 18, 48)
    torch.testing.assert_close(images_of(view.hidden, 4, (8, 12), 3), clip)
    assert not bool(view_of(torch.full((1, 3, 8, 8), 0.5), (4, 8)).hidden.any())


@pytest.mark.parametrize(
    ("shape", "patch", "message"),
    [
        ((1, 3, 9, 8), 4, "patch must divide the sides of the image, 9 x 8, got 4 x 4"),
        ((1, 3, 8, 10), (8, 4), "patch must divide the sides of the image, 8 x 10, got 8 x 4"),
        ((3, 8, 8), 4, r"x must be images \(B, C, H, W\) or clips"),
        ((1, 3, 8, 8), 0, "patch must be a whole number of at least 1, got 0"),
    ],
)
def test_what_patches_do_not_fill_is_refused(shape, patch, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        patchify(torch.zeros(shape), patch)


@pytest.mark.parametrize(("n", "length"), [(3, 48), (4, 47)])
def test_other_patches_are_not_put_together(n: int, length: int) -> None:
    with pytest.raises(ValueError, match=f"patches must be 4 a row, of a multiple of 16 values.* got {n} of {length}"):
        unpatchify(torch.zeros(1, n, length), 4, (8, 8))
