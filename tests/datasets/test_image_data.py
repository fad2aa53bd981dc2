import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, PngImagePlugin
from torch.utils.data import DataLoader

from quickmerge.datasets import ImageFolder
from quickmerge.datasets.images import open_image, opened, upright_size
from quickmerge.errors import QuickmergeError

RED, GREEN, BLUE = (255, 0, 0), (0, 255, 0), (0, 0, 255)


def halves(
    left: tuple[int, ...], right: tuple[int, ...], mode: str = "RGB", size: tuple[int, int] = (8, 8)
) -> Image.Image:
    image = Image.new(mode, size, left)
    image.paste(right, (size[0] // 2, 0, *size))
    return image


def colour(item: torch.Tensor, row: int, column: int) -> list[int]:
    return (item[:, row, column] * 255).round().int().tolist()


def test_rgb_in_zero_to_one(tmp_path: Path) -> None:
    halves(RED, BLUE).save(tmp_path / "a.png")
    item = ImageFolder([tmp_path / "a.png"], 4)[0]
    assert item.shape == (3, 4, 4)
    assert item.dtype == torch.float32
    assert item.is_contiguous()
    assert item.min() == 0 and item.max() == 1
    assert colour(item, 0, 0) == list(RED) and colour(item, 3, 3) == list(BLUE)


@pytest.mark.parametrize("size", [(4, 12), (12, 4), (7, 5)])
def test_height_and_width_are_not_mixed_up(tmp_path: Path, size: tuple[int, int]) -> None:
    halves(RED, BLUE, size=(20, 10)).save(tmp_path / "a.png")
    item = ImageFolder([tmp_path / "a.png"], size)[0]
    assert item.shape == (3, *size)
    assert colour(item, 0, 0) == list(RED) and colour(item, -1, -1) == list(BLUE)


def test_the_centre_is_kept(tmp_path: Path) -> None:
    image = Image.new("RGB", (30, 10), RED)
    image.paste(GREEN, (10, 0, 20, 10))
    image.save(tmp_path / "a.png")
    item = ImageFolder([tmp_path / "a.png"], 10)[0]
    assert torch.equal(item, torch.tensor([0.0, 1.0, 0.0])[:, None, None].expand(3, 10, 10))


def test_shrinking_averages(tmp_path: Path) -> None:
    board = np.indices((64, 64)).sum(0) % 2 * 255
    Image.fromarray(board.astype(np.uint8)).save(tmp_path / "a.png")
    item = ImageFolder([tmp_path / "a.png"], 8)[0]
    assert (item - 0.5).abs().max() < 0.02


def test_exif_orientation_is_honoured(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # the first row is the right side
    halves(RED, BLUE, size=(16, 8)).save(tmp_path / "a.png", exif=exif)
    item = ImageFolder([tmp_path / "a.png"], (16, 8))[0]
    assert colour(item, 0, 0) == colour(item, 0, 7) == list(RED)
    assert colour(item, 15, 0) == colour(item, 15, 7) == list(BLUE)


def test_palettes_grey_and_alpha(tmp_path: Path) -> None:
    halves(RED, BLUE).convert("P").save(tmp_path / "palette.gif")
    halves((51,), (204,), "L").save(tmp_path / "grey.png")
    halves((255, 0, 0, 255), (0, 0, 255, 0), "RGBA").save(tmp_path / "alpha.png")
    halves((51, 255), (51, 0), "LA").save(tmp_path / "grey-alpha.png")
    Image.fromarray(np.full((8, 8), 51 * 257, np.uint16)).save(tmp_path / "deep.png")
    palette = Image.new("P", (8, 8), 1)
    palette.putpalette([*RED, *BLUE])
    palette.save(tmp_path / "clear.png", transparency=1)
    names = ["palette.gif", "grey.png", "alpha.png", "grey-alpha.png", "deep.png", "clear.png"]
    images = ImageFolder([tmp_path / name for name in names], 8)
    ends = [(colour(item, 0, 0), colour(item, 7, 7)) for item in images]
    white = [255] * 3
    assert ends == [
        (list(RED), list(BLUE)),
        ([51] * 3, [204] * 3),
        (list(RED), white),
        ([51] * 3, white),
        ([51] * 3, [51] * 3),
        (white, white),
    ]


def test_one_channel(tmp_path: Path) -> None:
    halves((0, 0, 0), (255, 255, 255)).save(tmp_path / "a.png")
    item = ImageFolder([tmp_path / "a.png"], 8, channels=1)[0]
    assert item.shape == (1, 8, 8)
    assert (item[0, 0, 0], item[0, 0, 7]) == (0, 1)


def test_of_a_moving_image_the_first_frame_is_taken(tmp_path: Path) -> None:
    first, second = Image.new("RGB", (8, 8), RED), Image.new("RGB", (8, 8), BLUE)
    first.save(tmp_path / "a.gif", save_all=True, append_images=[second])
    assert colour(ImageFolder([tmp_path / "a.gif"], 8)[0], 0, 0) == list(RED)


@pytest.mark.parametrize("damage", ["empty", "text", "truncated", "missing"])
@pytest.mark.parametrize("suffix", ["png", "jpg", "gif", "bmp", "webp"])
def test_a_broken_image_is_named(tmp_path: Path, damage: str, suffix: str) -> None:
    path = tmp_path / f"a.{suffix}"
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    if damage == "truncated":
        Image.fromarray(noise).save(path)
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    elif damage != "missing":
        path.write_bytes(b"" if damage == "empty" else b"The sea, the sea.")
    with pytest.raises(QuickmergeError, match=rf"a\.{suffix} can't be read as an image: \w") as told:
        ImageFolder([path], 8)[0]
    assert "\n" not in str(told.value)


def bomb(path: Path, width: int, height: int) -> Path:
    """A small file that claims a size; what follows would take its memory to decode."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    pixels = zlib.compress(bytes(10_000_000))
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", pixels) + chunk(b"IEND", b""))
    return path


@pytest.mark.parametrize("side", [11_600, 13_000, 60_000])  # below, and above, what Pillow itself refuses
def test_a_bomb_is_refused_before_it_is_decoded(
    tmp_path: Path, side: int, monkeypatch: pytest.MonkeyPatch, recwarn: pytest.WarningsRecorder
) -> None:
    path = bomb(tmp_path / "a.png", side, side)
    monkeypatch.setattr(PngImagePlugin.PngImageFile, "load", lambda _: pytest.fail("decoded"))
    words = r"a\.png can't be read as an image: it has more than 134 million pixels"
    for read in (open_image, lambda file: ImageFolder([file], 8)[0]):
        with pytest.raises(QuickmergeError, match=words):
            read(path)
    assert not [warning for warning in recwarn if issubclass(warning.category, Image.DecompressionBombWarning)]


def test_a_large_photograph_is_no_bomb(tmp_path: Path, recwarn: pytest.WarningsRecorder) -> None:
    path = tmp_path / "a.png"
    Image.new("1", (12_032, 9_024)).save(path)  # 108 megapixels, as telephones have them
    with opened(path) as image:
        assert image.size == (12_032, 9_024)
    assert not recwarn.list


def test_an_image_is_opened_as_it_is_meant_to_be_seen(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # the first row is the right side
    halves((255, 0, 0, 255), (0, 0, 255, 0), "RGBA", (16, 8)).save(tmp_path / "a.png", exif=exif)
    image = open_image(tmp_path / "a.png")
    assert (image.mode, image.size) == ("RGB", (8, 16))
    assert image.getpixel((0, 0)) == RED and image.getpixel((0, 15)) == (255, 255, 255)


def test_what_goes_wrong_with_an_open_image_is_told(tmp_path: Path) -> None:
    Image.new("RGB", (4, 4)).save(tmp_path / "a.png")
    with pytest.raises(QuickmergeError, match=r"a\.png can't be read as an image: broken"), opened(tmp_path / "a.png"):
        raise ValueError("broken")
    with pytest.raises(QuickmergeError, match=r"^as it was$"), opened(tmp_path / "a.png"):
        raise QuickmergeError("as it was")
    with pytest.raises(QuickmergeError, match="can't be read as an image: Is a directory"):
        open_image(tmp_path)


def test_images_that_are_open_already() -> None:
    images = ImageFolder([Image.new("RGB", (4, 4), GREEN)], 2)
    assert colour(images[0], 1, 1) == list(GREEN)
    assert images.describe(0) == "image 1"


def test_describe_and_fingerprint(tmp_path: Path) -> None:
    for name, right in (("a", BLUE), ("b", GREEN)):
        halves(RED, right).save(tmp_path / f"{name}.png")
    files = [tmp_path / "a.png", tmp_path / "b.png"]
    images = ImageFolder(files, 8)
    assert (len(images), images.describe(1)) == (2, "b.png")
    assert images.fingerprint() == ImageFolder(files, 8).fingerprint()
    others = [ImageFolder(files[::-1], 8), ImageFolder(files[:1], 8), ImageFolder(files, 4), ImageFolder(files, 8, 1)]
    assert len({images.fingerprint(), *(other.fingerprint() for other in others)}) == 5


def test_a_loader_makes_batches_in_other_processes(tmp_path: Path) -> None:
    halves(RED, BLUE).save(tmp_path / "a.png")
    (batch,) = DataLoader(ImageFolder([tmp_path / "a.png"] * 2, (4, 6)), batch_size=2, num_workers=1)
    assert batch.shape == (2, 3, 4, 6)


def test_wrong_settings(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="channels must be 1 or 3, got 4"):
        ImageFolder([tmp_path], 8, channels=4)
    with pytest.raises(ValueError, match="size must be a whole number"):
        ImageFolder([tmp_path], (8, 0))
    with pytest.raises(QuickmergeError, match="no images"):
        ImageFolder([], 8)


def test_the_size_of_an_image_is_that_of_what_is_opened(tmp_path: Path) -> None:
    for turn in range(1, 9):
        image, exif = Image.new("RGB", (7, 4)), Image.Exif()
        exif[0x0112] = turn
        image.save(tmp_path / f"{turn}.jpg", exif=exif)
        assert upright_size(tmp_path / f"{turn}.jpg") == open_image(tmp_path / f"{turn}.jpg").size
