from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import BitImageProcessorPil, ViTImageProcessorPil

from quickmerge.datasets.labelled import LabelledImage, load_batch, read_labelled
from quickmerge.errors import QuickmergeError

MEAN, DEVIATION = (0.5, 0.25, 0.125), (0.5, 0.25, 0.2)


def processor(**options: Any) -> BitImageProcessorPil:
    settings = {"size": {"shortest_edge": 8}, "crop_size": {"height": 8, "width": 8}}
    return BitImageProcessorPil(**{**settings, "image_mean": list(MEAN), "image_std": list(DEVIATION), **options})


def normalised(pixels: np.ndarray) -> torch.Tensor:
    """``(H, W, 3)`` of 0 to 255 as the processor should give it, ``(3, H, W)``."""
    return torch.tensor((pixels / 255 - np.array(MEAN)) / np.array(DEVIATION)).permute(2, 0, 1).float()


def picture(path: Path, mode: str = "RGB", colour: Any = None, size: tuple[int, int] = (8, 8)) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new(mode, size, colour if colour is not None else 0).save(path)
    return path


def test_classes_are_folders_and_everything_is_sorted(tmp_path: Path) -> None:
    for name in ("pear/10.png", "pear/2.jpg", "apple/b.PNG", "apple/a.bmp", "apple/.hidden.png"):
        picture(tmp_path / name)
    (tmp_path / "manifest.json").write_text("{}")
    (tmp_path / "pear" / "notes.txt").write_text("ripe")
    picture(tmp_path / ".cache" / "a.png")
    found = read_labelled(tmp_path)
    assert found == sorted(found)
    assert [(one.path.relative_to(tmp_path).as_posix(), one.label) for one in found] == [
        ("apple/a.bmp", "apple"),
        ("apple/b.PNG", "apple"),
        ("pear/10.png", "pear"),
        ("pear/2.jpg", "pear"),
    ]
    assert found[0] == LabelledImage(tmp_path / "apple" / "a.bmp", "apple")


def test_no_folder_no_class_one_class_and_an_empty_class_are_told_apart(tmp_path: Path) -> None:
    with pytest.raises(QuickmergeError, match=r"there is no folder .*absent: give one that holds a folder for each"):
        read_labelled(tmp_path / "absent")
    with pytest.raises(QuickmergeError, match="at least 2 classes, got no folder"):
        read_labelled(tmp_path)
    picture(tmp_path / "apple" / "a.png")
    with pytest.raises(QuickmergeError, match="at least 2 classes, got only the class 'apple'"):
        read_labelled(tmp_path)
    (tmp_path / "pear").mkdir()
    with pytest.raises(QuickmergeError, match=r"pear of the class 'pear' holds no image \(\.bmp"):
        read_labelled(tmp_path)


@pytest.mark.parametrize("content", [b"", b"not an image", b"\x89PNG\r\n\x1a\n", None])
def test_a_file_that_is_no_image_is_named(tmp_path: Path, content: bytes | None) -> None:
    picture(tmp_path / "apple" / "a.png")
    broken = picture(tmp_path / "pear" / "b.png")
    whole = broken.read_bytes()
    # None: a byte of the pixels is another one, which the header alone does not tell
    broken.write_bytes(whole[:-20] + bytes([whole[-20] ^ 255]) + whole[-19:] if content is None else content)
    with pytest.raises(QuickmergeError, match=r"pear/b\.png can't be read as an image") as caught:
        read_labelled(tmp_path)
    assert "\n" not in str(caught.value)


def test_a_batch_is_its_images_one_by_one(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    paths = []
    for i, (width, height) in enumerate([(8, 8), (20, 9), (9, 30)]):
        Image.fromarray(rng.integers(0, 256, (height, width, 3), np.uint8)).save(tmp_path / f"{i}.png")
        paths.append(tmp_path / f"{i}.png")
    batch = load_batch(paths, processor())
    assert batch.shape == (3, 3, 8, 8) and batch.dtype == torch.float32
    for row, path in zip(batch, paths, strict=True):
        assert torch.equal(load_batch([path], processor())[0], row)
    with Image.open(paths[0]) as exact:
        assert torch.allclose(batch[0], normalised(np.asarray(exact)), atol=1e-5)


@pytest.mark.parametrize(
    ("mode", "given", "seen"),
    [
        ("L", 100, (100, 100, 100)),
        ("RGBA", (10, 20, 30, 0), (255, 255, 255)),
        ("RGBA", (10, 20, 30, 255), (10, 20, 30)),
        ("1", 1, (255, 255, 255)),
        ("I;16", 51400, (200, 200, 200)),
    ],
)
@pytest.mark.parametrize("kind", [processor, lambda: ViTImageProcessorPil(image_mean=MEAN, image_std=DEVIATION)])
def test_every_kind_of_image_becomes_rgb(
    tmp_path: Path, mode: str, given: Any, seen: tuple[int, int, int], kind: Any
) -> None:
    batch = load_batch([picture(tmp_path / "a.png", mode, given)], kind())
    expected = normalised(np.array(seen)[None, None]).expand_as(batch[0])
    assert torch.allclose(batch[0], expected, atol=1e-5)


def test_an_image_is_read_upright(tmp_path: Path) -> None:
    pixels = np.zeros((8, 8, 3), np.uint8)
    pixels[0] = 255  # a white top row
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned right by a quarter
    Image.fromarray(pixels).save(tmp_path / "a.png", exif=exif)
    batch = load_batch([tmp_path / "a.png"], processor())
    assert torch.allclose(batch[0], normalised(np.rot90(pixels, -1).copy()), atol=1e-5)


def test_a_batch_that_can_not_be_made_says_why(tmp_path: Path) -> None:
    with pytest.raises(QuickmergeError, match="at least one image, got none"):
        load_batch([], processor())
    with pytest.raises(QuickmergeError, match=r"absent\.png can't be read as an image: No such file"):
        load_batch([tmp_path / "absent.png"], processor())
    cut = picture(tmp_path / "cut.png", size=(64, 64))
    cut.write_bytes(cut.read_bytes()[:-40])
    with pytest.raises(QuickmergeError, match=r"cut\.png can't be read as an image"):
        load_batch([cut], processor())
    wide, high = picture(tmp_path / "wide.png", size=(16, 8)), picture(tmp_path / "high.png", size=(8, 16))
    with pytest.raises(QuickmergeError, match="one size, but the processor made 8 x 16 and 16 x 8"):
        load_batch([wide, high], processor(do_center_crop=False))
