"""Labelled images, cut and mirrored."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from strategies import prop

from quickmerge.datasets.labelled import LabelledImages, PixelFormat, _cut
from quickmerge.errors import QuickmergeError

FORM = PixelFormat(16, 12, (0.5, 0.4, 0.3), (0.5, 0.25, 2.0))


@dataclass(frozen=True)
class Item:
    path: Path
    label: str


@pytest.fixture
def items(tmp_path) -> list[Item]:
    draws = np.random.default_rng(0)
    made = []
    for number, label in enumerate(["cat", "dog", "cat"]):
        pixels = draws.integers(0, 256, (40, 50, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(tmp_path / f"{number}.png")
        made.append(Item(tmp_path / f"{number}.png", label))
    return made


def test_without_augmentation_the_centre_is_standardised(items) -> None:
    data = LabelledImages(items, ["cat", "dog"], FORM, augment=False)
    assert len(data) == 3 and [data[i][1] for i in range(3)] == [0, 1, 0]
    pixels, _ = data[1]
    with Image.open(items[1].path) as image:
        # 30 of the 50 columns have the shape of 16 x 12 at the height of 40.
        small = image.resize((12, 16), Image.Resampling.BICUBIC, box=(10, 0, 40, 40))
    plain = torch.from_numpy(np.array(small)).permute(2, 0, 1) / 255
    mean, std = (torch.tensor(x)[:, None, None] for x in (FORM.mean, FORM.std))
    torch.testing.assert_close(pixels, (plain - mean) / std)
    assert data.describe(1) == "1.png"


def test_random_cuts_come_from_torchs_generator_and_differ(items) -> None:
    data = LabelledImages(items, ["cat", "dog"], FORM)
    torch.manual_seed(0)
    one, two = data[0][0], data[0][0]
    torch.manual_seed(0)
    assert torch.equal(one, data[0][0]) and not torch.equal(one, two)
    assert one.shape == (3, 16, 12)


def test_half_of_the_images_are_mirrored(tmp_path) -> None:
    """An image that is dark on the left, cut whole."""
    pixels = np.zeros((16, 12, 3), dtype=np.uint8)
    pixels[:, 6:] = 255
    Image.fromarray(pixels).save(tmp_path / "a.png")
    data = LabelledImages([Item(tmp_path / "a.png", "x")], ["x"], FORM, area=(1.0, 1.0))
    torch.manual_seed(0)
    mirrored = sum(bool(x[0, 8, 0] > x[0, 8, -1]) for x in (data[0][0] for _ in range(200)))
    assert 70 < mirrored < 130


@prop(50)
@given(
    st.tuples(st.integers(8, 900), st.integers(8, 900)), st.floats(0.05, 1), st.floats(0, 1), st.floats(0, 1),
    st.floats(0, 1),
)  # fmt: skip
def test_a_cut_lies_inside_and_has_its_area(size, area: float, shape: float, x: float, y: float) -> None:
    left, top, right, bottom = _cut(size, area, shape, x, y)
    assert 0 <= left < right <= size[0] + 1e-6 and 0 <= top < bottom <= size[1] + 1e-6
    share = (right - left) * (bottom - top) / (size[0] * size[1])
    if right - left < size[0] - 1e-6 and bottom - top < size[1] - 1e-6:
        assert share == pytest.approx(area, rel=1e-6)
        assert 0.75 - 1e-6 <= (right - left) / (bottom - top) <= 4 / 3 + 1e-6
    else:
        assert share <= area + 1e-6


def test_the_fingerprint_tells_labels_and_settings_apart(items) -> None:
    prints = {
        LabelledImages(items, ["cat", "dog"], FORM).fingerprint(),
        LabelledImages(items, ["dog", "cat"], FORM).fingerprint(),
        LabelledImages(items, ["cat", "dog"], FORM, augment=False).fingerprint(),
        LabelledImages(items, ["cat", "dog"], FORM, area=(0.2, 1.0)).fingerprint(),
        LabelledImages(items[:2], ["cat", "dog"], FORM).fingerprint(),
    }
    assert len(prints) == 5
    assert LabelledImages(items, ["cat", "dog"], FORM).fingerprint() in prints


@pytest.mark.parametrize(
    ("processor", "wanted"),
    [
        ({"size": {"height": 32, "width": 24}}, (32, 24)),
        ({"size": {"shortest_edge": 40}, "crop_size": {"height": 32, "width": 28}, "do_center_crop": True}, (32, 28)),
        ({"size": {"shortest_edge": 40}, "crop_size": {"height": 8, "width": 8}, "do_center_crop": False}, (40, 40)),
    ],
)
def test_the_format_is_read_from_a_processor(processor, wanted) -> None:
    known = {"image_mean": [0.1, 0.2, 0.3], "image_std": [1.0, 2.0, 3.0], **processor}
    form = PixelFormat.of(SimpleNamespace(**known))
    assert (form.height, form.width) == wanted and form.mean == (0.1, 0.2, 0.3) and form.std == (1.0, 2.0, 3.0)
    assert PixelFormat.of(SimpleNamespace(**known, do_normalize=False)).std == (1.0, 1.0, 1.0)


def test_bad_input_is_told_in_one_sentence(items, tmp_path) -> None:
    with pytest.raises(QuickmergeError, match=r"2\.png is labelled 'cat', which is none of dog"):
        LabelledImages(items[2:], ["dog"], FORM)
    with pytest.raises(QuickmergeError, match="no images to train on"):
        LabelledImages([], ["dog"], FORM)
    for area in ((0.0, 1.0), (0.5, 1.1), (0.9, 0.5)):
        with pytest.raises(ValueError, match=r"area must be a least and a largest share in \(0, 1\]"):
            LabelledImages(items, ["cat", "dog"], FORM, area=area)
    (tmp_path / "1.png").write_bytes(b"nothing")
    with pytest.raises(QuickmergeError, match=r"1\.png can't be read as an image"):
        LabelledImages(items, ["cat", "dog"], FORM)[1]
    with pytest.raises(QuickmergeError, match="the image processor must make images of one size"):
        PixelFormat.of(SimpleNamespace(size={"longest_edge": 5}))
