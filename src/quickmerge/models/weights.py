"""Paths as a caller gives them, and what may be read from there."""

from __future__ import annotations

import json
import math
import os
import re
import stat
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from quickmerge.errors import DamagedWeightsError, QuickmergeError, UnsupportedModelError, first_sentence

if TYPE_CHECKING:
    from torch import Tensor, nn

__all__ = [
    "CONFIG_BYTES",
    "DEEPEST",
    "FLOATS",
    "HEADER_BYTES",
    "REMEDY",
    "Held",
    "StoredTensor",
    "check_build",
    "check_finite",
    "check_floats",
    "check_integers",
    "check_regular",
    "check_safetensors",
    "local_path",
    "read_header",
    "read_json",
    "shown",
]


CONFIG_BYTES = 1 << 20
"""No config that was ever published comes near."""
DEEPEST = 64
"""Objects and lists within one another in a file of JSON."""


def local_path(what: str, given: str | os.PathLike[str], kind: type[QuickmergeError] = QuickmergeError) -> Path:
    """The path that was given, with ``~`` resolved; nothing need be there.

    Args:
        what: the argument that it was given for.
        given: as the caller wrote it.
        kind: the error to raise.

    Raises:
        QuickmergeError: of that ``kind``, for an empty name or one that no file can have.
    """
    text = os.fspath(given)
    if isinstance(text, bytes):
        text = os.fsdecode(text)
    # Path("") is the current folder, which nobody means by an empty name
    if not text.strip() or (isinstance(given, Path) and not given.parts):
        raise kind(f"{what} must name something, got {text!r}")
    try:
        path = Path(text).expanduser()
        os.stat(path)
    except FileNotFoundError:
        pass
    except RuntimeError:
        raise kind(f"{what} is {shown(text)}, but this machine knows no such user") from None
    except ValueError as error:  # a zero byte, or half of a surrogate pair
        raise kind(f"{what} is {shown(text)}, which no file can be called ({error})") from None
    except OSError as error:
        raise kind(f"{what} is {shown(text)}, which can't be opened ({error.strerror})") from None
    return path


def shown(text: str) -> str:
    """A name in quotation marks, cut in the middle where it is very long."""
    return repr(text if len(text) <= 200 else f"{text[:100]}...{text[-60:]}")


def check_regular(path: Path, most: int | None = None) -> None:
    """See that what is there is a regular file, or a link to one, of at most ``most`` bytes; nothing is read.

    Raises:
        DamagedWeightsError: it is a folder, a device or a pipe, is too large, or is not there.
    """
    try:
        found = path.stat()
    except OSError as error:
        raise DamagedWeightsError(f"{path} can't be read ({error.strerror})") from None
    if not stat.S_ISREG(found.st_mode):
        raise DamagedWeightsError(f"{path} must be a regular file, got a folder, a device or a pipe")
    if most is not None and found.st_size > most:
        raise DamagedWeightsError(f"{path} must have at most {most:,} bytes, got {found.st_size:,}")


def read_json(path: Path, most: int = CONFIG_BYTES, remedy: str = "copy or download it again") -> dict[str, Any]:
    """The object that a small file of JSON holds.

    Args:
        path: the file.
        most: bytes that it may have.
        remedy: what would help if it is damaged.

    Raises:
        DamagedWeightsError: it is no regular file or too large, no JSON, no object, or is nested too deeply.
    """
    check_regular(path, most)
    try:
        data = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        raise DamagedWeightsError(f"{path} is damaged (it must be JSON: {first_sentence(error)}): {remedy}") from None
    if not isinstance(data, dict):
        raise DamagedWeightsError(f"{path} is damaged (it must hold an object, got {type(data).__name__}): {remedy}")
    level: list[Any] = [data]
    for _ in range(DEEPEST):
        level = [inner for each in level for inner in (each.values() if isinstance(each, dict) else each)
                 if isinstance(inner, (dict, list))]  # fmt: skip
        if not level:
            return data
    raise DamagedWeightsError(f"{path} is damaged (it is nested more than {DEEPEST} deep): {remedy}")


# The header of a safetensors file: what it holds, read and checked without its tensors.
#
# A file begins with the length of its header, eight bytes with the lowest first; the header is JSON that gives dtype,
# shape and place of each tensor (source: the description of the format by its authors, github.com/huggingface/
# safetensors). All of it may be a stranger's, so nothing is taken at its word.


REMEDY = "delete it and copy or download it again"
HEADER_BYTES = 100_000_000
"""safetensors itself reads no longer header."""
BITS = {
    "BOOL": 8, "U8": 8, "I8": 8, "F8_E5M2": 8, "F8_E4M3": 8, "F8_E8M0": 8, "F8_E5M2FNUZ": 8, "F8_E4M3FNUZ": 8,
    "I16": 16, "U16": 16, "F16": 16, "BF16": 16, "I32": 32, "U32": 32, "F32": 32, "I64": 64, "U64": 64, "F64": 64,
    "C64": 64, "F4": 4, "F6_E2M3": 6, "F6_E3M2": 6,
}  # fmt: skip
"""Bits of a number, by the name of its dtype."""
FLOATS = ("F64", "F32", "F16", "BF16")
"""What weights may be stored in."""


@dataclass(frozen=True)
class StoredTensor:
    """What a header says about one tensor.

    Attributes:
        dtype: as safetensors writes it, such as ``"F32"``.
        shape: its sizes.
        start: offset of its first byte, from the start of the file.
        end: offset behind its last byte.
    """

    dtype: str
    shape: tuple[int, ...]
    start: int
    end: int


@dataclass(frozen=True)
class Held:
    """How much some weights hold, which bounds what a config may ask for.

    Attributes:
        tensors: how many.
        elements: numbers in all of them; for packed ones, the most that they can stand for.
        largest: the longest side of any.
    """

    tensors: int
    elements: int
    largest: int

    @classmethod
    def of(cls, headers: Iterable[Mapping[str, StoredTensor]], packed: bool = False) -> Held:
        """Of some files; ``packed`` where several numbers may lie in one element."""
        each = [tensor for header in headers for tensor in header.values()]
        elements = sum(math.prod(tensor.shape) for tensor in each) * (8 if packed else 1)
        return cls(len(each), elements, max((size for tensor in each for size in tensor.shape), default=0))


def check_safetensors(path: Path, remedy: str = REMEDY) -> None:
    """See that a safetensors file has a sound header and exactly the bytes that the header promises.

    Raises:
        DamagedWeightsError: it does not.
    """
    read_header(path, remedy)


def read_header(path: Path, remedy: str = REMEDY) -> dict[str, StoredTensor]:
    """The tensors that a safetensors file holds, by name; none of them is read.

    Raises:
        DamagedWeightsError: it is no regular file; the header is cut off, garbled or longer than safetensors allows;
            or dtypes, shapes, places and the size of the file don't fit each other.
    """
    check_regular(path)
    size = path.stat().st_size
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if size < 8 or length > size - 8:
            raise DamagedWeightsError(f"{path} is damaged (its header is cut off or garbled): {remedy}")
        if length > HEADER_BYTES:
            raise DamagedWeightsError(
                f"{path} is damaged (its header has {length:,} bytes, at most {HEADER_BYTES:,} are read): {remedy}"
            )
        try:
            entries = json.loads(file.read(length))
            entries.pop("__metadata__", None)
            tensors = {name: _tensor(entry, 8 + length) for name, entry in entries.items()}
        except (ValueError, KeyError, TypeError, AttributeError, IndexError, RecursionError) as error:
            raise DamagedWeightsError(f"{path} is damaged (its header is garbled): {remedy}") from error
    at = 8 + length
    for name, tensor in sorted(tensors.items(), key=lambda item: (item[1].start, item[1].end)):
        bits = BITS.get(tensor.dtype)
        if bits is None:
            raise DamagedWeightsError(f"{path} holds {name!r} in the unknown dtype {tensor.dtype!r}: {remedy}")
        if tensor.start != at:
            raise DamagedWeightsError(f"{path} is damaged (its header leaves a gap in front of {name!r}): {remedy}")
        if (tensor.end - tensor.start) * 8 != math.prod(tensor.shape) * bits:
            raise DamagedWeightsError(
                f"{path} is damaged ({name!r} has {tensor.end - tensor.start} bytes, which is not what {tensor.dtype} "
                f"of shape {list(tensor.shape)} takes): {remedy}"
            )
        at = tensor.end
    if size != at:
        raise DamagedWeightsError(f"{path} is damaged ({size} bytes instead of {at}): {remedy}")
    return tensors


def _tensor(entry: dict[str, Any], origin: int) -> StoredTensor:
    dtype, shape, (start, end) = entry["dtype"], entry["shape"], entry["data_offsets"]
    numbers = [*shape, start, end]
    if not isinstance(dtype, str) or len(shape) > 32 or not isinstance(shape, list):
        raise TypeError("not the description of a tensor")
    if any(type(number) is not int or not 0 <= number < 2**63 for number in numbers) or end < start:
        raise ValueError("not a size")
    return StoredTensor(dtype, tuple(shape), origin + start, origin + end)


def check_floats(path: Path, tensors: Mapping[str, StoredTensor], *, packed: bool = False) -> None:
    """See that weights are floating point numbers, which is what every model computes with.

    Counters and indices that some models save beside their weights, such as ``position_ids``, may be integers.

    Args:
        path: the file, for the message.
        tensors: its header.
        packed: whether the config says that the weights are quantised; then integers and 8-bit floats are let pass,
            and it is for transformers to say whether it can use them.

    Raises:
        DamagedWeightsError: a weight is not.
    """
    for name, tensor in tensors.items():
        if tensor.dtype in FLOATS:
            continue
        counter = tensor.dtype[0] in "IUB" and not name.rsplit(".", 1)[-1].endswith(("weight", "weights"))
        if counter or (packed and tensor.dtype != "BOOL" and tensor.dtype != "C64"):
            continue
        raise DamagedWeightsError(
            f"{path} holds {name!r} as {tensor.dtype}, but weights must be one of {', '.join(FLOATS)}"
            + ("" if packed else "; quantised ones need a quantization_config in config.json")
        )


# Sizes that a config asks for, held against what the weights hold before anything is built.


LOOPS = re.compile(r"layer|block|depth|stage|expert", re.IGNORECASE)
SIDES = re.compile(r"size|dim|width|length|window|token|inner|features|units", re.IGNORECASE)
"""Settings that say how often something is built, unless they say how large each is: ``expert_size``."""
COUNTS = re.compile(r"(^|_)(num|n)_", re.IGNORECASE)
"""Settings that count something; lists of that length are made of a few."""
MOST_LOOPS, MOST_COUNTS, MOST = 1024, 1 << 16, 1 << 53
"""What is allowed even for weights that hold less: defaults of settings that a model doesn't use."""
FACTOR, SLACK, BUFFERS = 4, 1 << 20, 1 << 29
"""Parameters may be so many times those of the weights (tied matrices are counted twice, a head may be left out) and so
many more; tables that are computed may take so many bytes."""
CALLS_EACH, CALLS = 300, 30_000
"""Of torch while a model is built: for each tensor of the weights, and for each model."""


def check_integers(what: str, config: Any, held: Held | None) -> None:
    """Refuse a config whose numbers ask for more loops than the weights can be from.

    It comes before the config is opened: some make a list with an entry for each layer when they are.

    Args:
        what: the file, for the message.
        config: its content.
        held: what the weights hold; None where there are none, as when only shapes are asked for.

    Raises:
        UnsupportedModelError: naming the setting.
    """
    tensors, largest = (0, 0) if held is None else (held.tensors, held.largest)
    for name, value in _integers(config):
        most = MOST
        if LOOPS.search(name) and not SIDES.search(name):
            most = max(MOST_LOOPS, tensors)
        elif isinstance(value, float):
            continue  # infinity is a limit that some state
        elif COUNTS.search(name):
            most = max(MOST_COUNTS, tensors, largest)
        if value > most:
            held_by = f", of which the weights hold at most {most}" if most < MOST else ""
            raise UnsupportedModelError(f"{what} asks for {name} {value:.6g}{held_by}: it can't be right")


def _integers(config: Any) -> Iterator[tuple[str, int | float]]:
    if isinstance(config, dict):
        for name, value in config.items():
            for each in value if isinstance(value, list) else [value]:
                if isinstance(each, (int, float)) and not isinstance(each, bool):
                    yield str(name), each
                elif isinstance(each, (dict, list)):
                    yield from _integers(each)
    elif isinstance(config, list):
        for value in config:
            yield from _integers(value)


def check_build(what: str, build: Callable[[], nn.Module], held: Held | None) -> None:
    """Build a model without memory, and refuse one that would be much larger than its weights.

    An error within ``build`` is no business of this function: the same one comes when the model is built in earnest.

    Args:
        what: the file that says how it is built, for the message.
        build: makes the model, on whatever device is the default.
        held: what the weights hold; None bounds the time alone.

    Raises:
        UnsupportedModelError: it would be larger, or takes far too many steps to build.
    """
    import torch
    from torch.overrides import TorchFunctionMode

    allowed = CALLS if held is None else CALLS + CALLS_EACH * held.tensors

    class Counting(TorchFunctionMode):
        calls = 0

        def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            self.calls += 1
            if self.calls > (allowed if held is not None else 20 * allowed):
                raise _TooMuch
            return func(*args, **(kwargs or {}))

    try:
        with torch.device("meta"), Counting():
            model = build()
    except _TooMuch:
        raise UnsupportedModelError(f"{what} asks for a model of far more parts than its weights hold") from None
    except Exception:
        return
    if held is None:
        return
    parameters = sum(parameter.numel() for parameter in model.parameters())
    if parameters > FACTOR * held.elements + SLACK:
        raise UnsupportedModelError(
            f"{what} asks for {parameters:,} parameters, but the weights hold {held.elements:,}: they don't belong "
            "together"
        )
    tables = sum(buffer.numel() * buffer.element_size() for buffer in model.buffers())
    if tables > BUFFERS + 8 * held.elements:
        raise UnsupportedModelError(f"{what} asks for tables of {tables / 2**30:.3g} GiB: a size in it can't be right")


class _TooMuch(BaseException):
    """Too many calls; no Exception, lest whoever builds takes it for one of his own."""


# Weights that are numbers: what a damaged or hostile file may hold instead is found before anything is computed.


def check_finite(what: str, tensors: Iterable[tuple[str, Tensor]], remedy: str = "copy or download it again") -> None:
    """See that every floating point tensor holds finite numbers alone; those without values pass.

    One pass over the memory, nothing is copied, and a device is waited for once.

    Raises:
        DamagedWeightsError: naming the first that doesn't.
    """
    import torch

    names, ends = [], []
    for name, tensor in tensors:
        if not tensor.is_floating_point() or tensor.is_meta or not tensor.numel():
            continue
        numbers = tensor.detach()
        if numbers.element_size() == 1:  # 8-bit floats have no order in torch
            numbers = numbers.to(torch.bfloat16)
        least, most = torch.aminmax(numbers)  # NaN if there is one
        names.append(name)
        ends.append(torch.stack([least, most]).double().cpu() if numbers.device.type == "mps"
                    else torch.stack([least, most]).double())  # fmt: skip
    if not ends:
        return
    bad = torch.stack([end.to(ends[0].device) for end in ends]).isfinite().all(-1).logical_not()
    if bool(bad.any()):
        found = names[int(bad.nonzero()[0])]
        raise DamagedWeightsError(f"{what} is damaged: {found} holds values that are not finite: {remedy}")
