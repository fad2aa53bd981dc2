import io
import os
import struct
import warnings
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
import vlm_samples
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from PIL import ExifTags, Image, ImageOps, PngImagePlugin

from quickmerge.datasets import ImageFolder
from quickmerge.errors import QuickmergeError
from quickmerge.images import FORMATS, as_rgb, open_image, upright, upright_size
from quickmerge.models import ask_inputs

SHAPE = (3, 5)


def grey(values: np.ndarray) -> np.ndarray:
    return np.repeat(np.rint(values)[..., None], 3, -1)


def over_white(colour: np.ndarray, alpha: np.ndarray) -> np.ndarray:
    return colour * alpha / 255 + 255 - alpha


def drawn(channels: int, high: int = 256, kind: type = np.uint8) -> np.ndarray:
    shape = SHAPE if channels == 1 else (*SHAPE, channels)
    return np.random.default_rng(channels).integers(0, high, shape).astype(kind)


def raw(mode: str, values: np.ndarray) -> Image.Image:
    return Image.frombytes(mode, SHAPE[::-1], np.ascontiguousarray(values).tobytes())


def of_mode(mode: str) -> tuple[Image.Image, np.ndarray]:
    """An image of a mode, and in float64 what is right: 0 to 255 in RGB."""
    wide = drawn(1, 65536, np.int64)
    if mode.startswith("I;16"):
        return raw(mode, wide.astype(">u2" if mode == "I;16B" else "<u2")), grey(wide / 65535 * 255)
    if mode == "I":
        return raw(mode, wide.astype(np.int32)), grey(wide / 65535 * 255)
    if mode == "F":
        part = drawn(1, 256, np.float64) / 255
        return raw(mode, part.astype(np.float32)), grey(part.astype(np.float32).astype(np.float64) * 255)
    if mode == "1":
        bits = drawn(1, 2, bool)
        return Image.fromarray(bits), grey(bits * 255.0)
    if mode == "L":
        return raw(mode, drawn(1)), grey(drawn(1).astype(float))
    two, three, four = drawn(2), drawn(3), drawn(4)
    palette = np.random.default_rng(7).integers(0, 256, (256, 3)).astype(np.uint8)
    if mode == "P":
        image = raw(mode, drawn(1))
        image.putpalette(palette.tobytes())
        return image, palette[drawn(1)].astype(float)
    if mode == "PA":
        image = Image.frombytes("PA", SHAPE[::-1], two.tobytes())
        image.putpalette(palette.tobytes())
        return image, over_white(palette[two[..., 0]], two[..., 1:].astype(float))
    if mode == "LA":
        return raw(mode, two), grey(over_white(two[..., 0].astype(float), two[..., 1]))
    if mode == "La":
        two[..., 0] = two[..., 0] * (two[..., 1] / 255)
        return raw(mode, two), grey(two[..., 0] + 255.0 - two[..., 1])
    if mode == "RGBa":
        four[..., :3] = four[..., :3] * (four[..., 3:] / 255)
        return raw(mode, four), four[..., :3] + 255.0 - four[..., 3:]
    if mode == "RGBA":
        return raw(mode, four), over_white(four[..., :3].astype(float), four[..., 3:])
    if mode == "RGBX":
        return raw(mode, four), four[..., :3].astype(float)
    if mode == "CMYK":
        return raw(mode, four), (255.0 - four[..., :3]) * (255.0 - four[..., 3:]) / 255
    if mode == "RGB":
        return raw(mode, three), three.astype(float)
    if mode == "LAB":
        three[..., 1:] = 112 + three[..., 1:] // 8  # colours that sRGB has
    x = three.astype(float)
    if mode == "YCbCr":  # ITU-R BT.601, full range
        y, b, r = x[..., 0], x[..., 1] - 128, x[..., 2] - 128
        return raw(mode, three), np.stack([y + 1.402 * r, y - 0.344136 * b - 0.714136 * r, y + 1.772 * b], -1)
    if mode == "HSV":
        h, s, v = x[..., :1] / 255 * 6, x[..., 1:2] / 255, x[..., 2:]
        k = (np.array([5.0, 3.0, 1.0]) + h) % 6
        return raw(mode, three), v - v * s * np.clip(np.minimum(k, 4 - k), 0, 1)
    assert mode == "LAB"
    # CIE 1976, white of D50, to sRGB (IEC 61966-2-1) with Bradford's adaptation to D65
    light, a, b = x[..., 0] / 2.55, x[..., 1] - 128, x[..., 2] - 128
    f = np.stack([(light + 16) / 116 + a / 500, (light + 16) / 116, (light + 16) / 116 - b / 200], -1)
    xyz = np.where(f > 6 / 29, f**3, 3 * (6 / 29) ** 2 * (f - 4 / 29)) * [0.9642, 1.0, 0.8249]
    linear = xyz @ np.array([[3.1338561, -0.9787684, 0.0719453], [-1.6168667, 1.9161415, -0.2289914],
                             [-0.4906146, 0.0334540, 1.4052427]])  # fmt: skip
    linear = linear.clip(0, 1)
    three[..., 1:] ^= 128  # files have signed numbers
    return raw(mode, three), 255 * np.where(linear <= 0.0031308, 12.92 * linear, 1.055 * linear ** (1 / 2.4) - 0.055)


@pytest.mark.parametrize("mode", Image.MODES)
def test_every_mode_of_pillow_is_seen_as_it_is_meant(mode: str) -> None:
    image, right = of_mode(mode)
    assert image.mode == mode
    seen = as_rgb(image)
    assert seen.mode == "RGB" and seen.size == image.size
    # integer arithmetic and the steps of hue are Pillow's own
    off = {"HSV": 3, "LAB": 4}.get(mode, 1)
    assert np.abs(np.asarray(seen).astype(float) - right.clip(0, 255)).max() <= off
    assert np.array_equal(np.asarray(upright(image)), np.asarray(seen))


@given(arrays.arrays(np.int64, arrays.array_shapes(min_dims=2, max_dims=2, max_side=6), elements=st.integers(0, 65535)))
def test_sixteen_bits_come_to_the_nearest_of_eight(values: np.ndarray) -> None:
    right = np.rint(values * (255 / 65535))
    assert np.array_equal(np.asarray(as_rgb(Image.fromarray(values.astype(np.uint16))))[..., 0], right)


@given(
    arrays.arrays(np.float32, (2, 3), elements=st.floats(-1e6, 1e6, width=32)),
    st.sampled_from(["F", "I"]), st.sampled_from([1.0, 255.0, 65535.0, None]),
)  # fmt: skip
def test_wide_numbers_fill_the_range_that_holds_them(values: np.ndarray, mode: str, white: float | None) -> None:
    if white is not None and not (mode == "I" and white == 1):
        values = np.abs(values) / 1e6 * white
        values[0, 0] = white  # so that it is the least range that holds all
    else:
        values[0, 0] = 1e6
    values = values.astype(np.float32 if mode == "F" else np.int32)
    low, high = min(0, float(values.min())), float(values.max())
    right = (values.astype(np.float64) - low) / (high - low) * 255
    seen = np.asarray(as_rgb(Image.fromarray(values)))[..., 0]
    assert np.abs(seen - right).max() <= 0.5 + 1e-6
    order = values.flatten().argsort()
    assert (np.diff(seen.flatten()[order].astype(int)) >= 0).all()


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_fractions_must_be_finite(bad: float, tmp_path: Path) -> None:
    values = np.full((4, 4), 0.5, np.float32)
    values[1, 1] = bad
    Image.fromarray(values).save(tmp_path / "a.tif")
    with pytest.raises(
        QuickmergeError, match=r"a\.tif can't be read as an image: it holds numbers that are not finite"
    ):
        open_image(tmp_path / "a.tif")


@pytest.mark.parametrize("value", [0, 200, 70_000, 2**31 + 5, 2**32 - 1])
def test_a_tiff_of_unsigned_numbers(value: int, tmp_path: Path) -> None:
    values = np.full((4, 4), value, np.uint32)
    values[0, 0] = 2**32 - 1
    path = tmp_path / "a.tif"
    Image.fromarray(values.view(np.int32)).save(path)
    data = bytearray(path.read_bytes())
    tag = data.index(struct.pack("<HHI", 339, 3, 1)) + 8
    assert data[tag] == 2  # signed, as Pillow writes it
    data[tag] = 1
    path.write_bytes(data)
    seen = np.asarray(open_image(path))
    assert seen[0, 0, 0] == 255 and seen[1, 1, 0] == round(value / (2**32 - 1) * 255)


def test_a_dark_pgm_of_sixteen_bits_stays_dark(tmp_path: Path) -> None:
    (tmp_path / "a.pgm").write_bytes(b"P5 2 1 65535\n" + struct.pack(">HH", 200, 257))
    assert np.asarray(open_image(tmp_path / "a.pgm"))[0, :, 0].tolist() == [1, 1]


def test_the_number_that_a_png_calls_transparent_is_white(tmp_path: Path) -> None:
    values = np.array([[1000, 30000]], np.uint16)
    Image.fromarray(values).save(tmp_path / "a.png")
    whole = (tmp_path / "a.png").read_bytes()
    clear = b"tRNS" + struct.pack(">H", 1000)
    chunk = struct.pack(">I", 2) + clear + struct.pack(">I", zlib.crc32(clear))
    at = whole.index(b"IDAT") - 4
    (tmp_path / "a.png").write_bytes(whole[:at] + chunk + whole[at:])
    assert np.asarray(open_image(tmp_path / "a.png"))[0, :, 0].tolist() == [255, 117]


# One image at every door ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["I;16", "I", "F", "RGBA", "LA", "P", "1", "CMYK"])
def test_a_file_and_an_open_image_are_the_same_to_every_reader(mode: str, tmp_path: Path) -> None:
    image = of_mode(mode)[0].resize((40, 40), Image.Resampling.NEAREST)
    path = tmp_path / "a.tif"
    image.save(path)
    want = np.asarray(open_image(path))
    assert np.array_equal(np.asarray(upright(image)), want)
    folder = ImageFolder([path, image], 40)
    assert torch.equal(folder[0], folder[1])
    assert torch.equal(folder[0], torch.from_numpy(want.copy()).permute(2, 0, 1) / 255)
    _, processor = vlm_samples.tiny_vlm()
    asked = [ask_inputs(processor, [one], "what is it ?")["pixel_values"] for one in (image, Image.fromarray(want))]
    assert torch.equal(*asked)


@pytest.mark.parametrize("given", ["photo.png", np.zeros((4, 4, 3), np.uint8), None])
def test_what_is_no_image_is_refused(given: object) -> None:
    _, processor = vlm_samples.tiny_vlm()
    with pytest.raises(QuickmergeError, match=r"^images\[0\] must be a Pillow image, got \w+$"):
        ask_inputs(processor, [given], "what is it ?")  # type: ignore[list-item]


@pytest.mark.parametrize("kind", [name for name in FORMATS if name not in ("BMP", "GIF", "PPM")])
@pytest.mark.parametrize("turn", range(1, 9))
def test_the_size_is_that_of_what_is_opened_in_every_format(kind: str, turn: int, tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = turn
    path = tmp_path / "a"
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (16, 48, 3), dtype=np.uint8))
    try:
        image.save(path, kind, exif=exif)
    except (OSError, KeyError):
        pytest.skip(f"this Pillow does not write {kind}")
    with Image.open(path) as file:
        right = ImageOps.exif_transpose(file).size
    assert upright_size(path) == open_image(path).size == right == ((48, 16) if turn < 5 else (16, 48))


# Strangers' files -----------------------------------------------------------------------------------------------


def test_only_the_formats_of_the_list_are_opened(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """PostScript would be run by Ghostscript, and others by programs and decoders that few ever look at."""
    tools = tmp_path / "bin"
    tools.mkdir()
    called = tmp_path / "called"
    for name in ("gs", "gswin64c"):
        (tools / name).write_text(f"#!/bin/sh\necho $0 >> {called}\n")
        (tools / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{tools}:{os.environ['PATH']}")
    Image.init()
    others = {
        "eps": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 100 100\n%%EndComments\nshowpage\n",
        "xpm": b'/* XPM */\nstatic char * x[] = {\n"1 1 1 1",\n"a c #000000",\n"a"};',
        "svg": b"<svg xmlns='http://www.w3.org/2000/svg'/>",
    }
    for kind in ("ICO", "PCX", "TGA", "DDS", "SGI", "JPEG2000"):
        if kind in Image.SAVE:
            made = io.BytesIO()
            Image.new("RGB", (16, 16)).save(made, kind)
            others[kind] = made.getvalue()
    assert len(others) > 5
    for kind, data in others.items():
        path = tmp_path / f"{kind}.png"
        path.write_bytes(data)
        with pytest.raises(QuickmergeError, match=r"can't be read as an image: its content is of none of the formats"):
            open_image(path)
    assert not called.exists()


def test_what_is_no_regular_file_is_not_read(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "a.png")
    for path in (tmp_path / "a.png", Path("/dev/zero")):
        for read in (open_image, upright_size, lambda file: ImageFolder([file], 8)[0]):
            with pytest.raises(QuickmergeError, match=r"can't be read as an image: it is no regular file$"):
                read(path)


@pytest.mark.parametrize(
    "error", [KeyError("a"), TypeError("b"), zlib.error("c"), RuntimeError("d"), ZeroDivisionError(), MemoryError()]
)
def test_whatever_a_decoder_raises_is_one_sentence(
    error: Exception, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")

    def load(self: object) -> None:
        raise error

    monkeypatch.setattr(PngImagePlugin.PngImageFile, "load", load)
    for read in (open_image, lambda path: upright(Image.open(path), str(path))):
        with pytest.raises(QuickmergeError, match=r"a\.png can't be read as an image: \w") as told:
            read(tmp_path / "a.png")
        assert "\n" not in str(told.value)


@given(st.sampled_from(["PNG", "JPEG", "GIF", "BMP", "TIFF", "WEBP", "PPM"]), st.data())
def test_a_garbled_image_is_read_or_told(kind: str, data: st.DataObject) -> None:
    made = io.BytesIO()
    noise = np.random.default_rng(0).integers(0, 256, (12, 12, 3), dtype=np.uint8)
    Image.fromarray(noise).save(made, kind)
    whole = bytearray(made.getvalue())
    for _ in range(data.draw(st.integers(1, 4))):
        whole[data.draw(st.integers(0, len(whole) - 1))] = data.draw(st.integers(0, 255))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            assert open_image(io.BytesIO(bytes(whole)), "it").mode == "RGB"
        except QuickmergeError as error:
            assert str(error).startswith("it can't be read as an image: ") and "\n" not in str(error)


def test_half_a_character_in_a_question_is_told() -> None:
    _, processor = vlm_samples.tiny_vlm()
    with pytest.raises(QuickmergeError, match="question must be a text of whole characters, got half of one"):
        ask_inputs(processor, [Image.new("RGB", (8, 8))], "what is \ud800 ?")
