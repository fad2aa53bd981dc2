"""A device that counts: whatever is on it can only be read by waiting, and every wait and operation is noted.

There is no such hardware. Tensors "on" it hold an ordinary tensor of the CPU, and tell another device; each operation
on them is carried out on what they hold. What makes the host of a GPU wait is counted: a value that is read (`item`,
`bool`, `tolist`, a copy to the host), a shape that depends on values (`nonzero`, a mask as an index), and a copy to the
device that is not ``non_blocking``. As on a GPU, an operation on tensors of both sides is an error.
"""

from __future__ import annotations

import sys
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch._dynamo  # else the first operation on a device imports it
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map, tree_unflatten

DEVICE = torch.device("cuda", 0)
"""A name that torch knows and that nothing in torch, transformers or this library asks for."""

aten = torch.ops.aten
READS = {"_local_scalar_dense", "equal", "is_nonzero"}
SHAPES = {"nonzero", "masked_select", "unique_consecutive", "_unique2", "_unique", "unique_dim", "bincount"}
_SOURCE = str(Path(__file__).resolve().parents[2] / "src")


class Held(Tensor):
    """A tensor on the device."""

    held: Tensor

    @staticmethod
    def __new__(cls, held: Tensor) -> Held:
        made = Tensor._make_wrapper_subclass(
            cls, held.size(), strides=held.stride(), storage_offset=held.storage_offset(), dtype=held.dtype,
            layout=held.layout, device="meta", requires_grad=False,
        )  # fmt: skip
        made.held = held
        return made

    def __repr__(self) -> str:  # type: ignore[override]
        return f"Held({tuple(self.shape)}, {self.dtype})"

    @property
    def device(self) -> torch.device:  # type: ignore[override]
        return DEVICE

    is_meta, is_cuda, is_cpu = False, True, False  # type: ignore[assignment]

    def new_tensor(self, data: Any, *, dtype: torch.dtype | None = None, **_: Any) -> Tensor:  # type: ignore[override]
        return torch.tensor(data, dtype=dtype or self.dtype, device=self.device)

    def tolist(self) -> Any:
        return self.cpu().tolist()

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return carry_out(func, args, kwargs or {}, None)


@dataclass
class Count:
    """What was counted: ``reads`` by where they were asked for, ``uploads`` that were waited for, ``operations``."""

    reads: Counter[str] = field(default_factory=Counter)
    uploads: Counter[str] = field(default_factory=Counter)
    operations: int = 0
    inside: int = 0

    @property
    def waits(self) -> int:
        """All of both kinds."""
        return sum(self.reads.values()) + sum(self.uploads.values())

    def copy(self) -> Count:
        """As it is now."""
        return Count(Counter(self.reads), Counter(self.uploads), self.operations)

    def since(self, before: Count) -> Count:
        """What was counted since."""
        return Count(self.reads - before.reads, self.uploads - before.uploads, self.operations - before.operations)

    def ours(self) -> Counter[str]:
        """Only what this library asked for."""
        both = self.reads + self.uploads
        return Counter({k: v for k, v in both.items() if k.startswith("quickmerge")})


def carry_out(func: Any, args: Any, kwargs: dict[str, Any], count: Count | None) -> Any:
    """Carry an operation out on what its tensors hold, and count it."""
    flat, spec = tree_flatten((args, kwargs))
    there = [x for x in flat if isinstance(x, Held)]
    name = func._schema.name.split("::")[1]
    wanted = kwargs.get("device")
    wanted = None if wanted is None else torch.device(wanted)
    onto = wanted is not None and wanted.type in (DEVICE.type, "meta")
    if not there and not onto:
        return func(*args, **kwargs)
    copies = name in ("_to_copy", "copy_")
    if count is not None:
        count.operations += not count.inside
        if name in READS or (name in SHAPES and there):
            count.reads[f"{where()} {name}"] += 1
        elif copies and there:
            back = wanted is not None and not onto if name == "_to_copy" else not isinstance(args[0], Held)
            up = name == "copy_" and isinstance(args[0], Held) and not isinstance(args[1], Held) and args[1].ndim
            empty = not there[0].numel()
            if empty:
                pass
            elif back:
                count.reads[f"{where()} to the host"] += 1
            elif up and not (len(args) > 2 and args[2]) and not kwargs.get("non_blocking"):
                count.uploads[f"{where()} upload"] += 1
        elif name == "_to_copy" and onto and args[0].numel() and not kwargs.get("non_blocking"):
            count.uploads[f"{where()} upload"] += 1
        elif name in ("index", "index_put", "index_put_", "_index_put_impl_"):
            masks = [x for x in args[1] if x is not None and x.dtype in (torch.bool, torch.uint8)]
            if masks and name == "index":
                count.reads[f"{where()} mask as an index"] += 1
            elif any(x is not None and not isinstance(x, Held) for x in args[1]):
                count.uploads[f"{where()} index upload"] += 1
        elif name == "repeat_interleave" and kwargs.get("output_size") is None:
            count.reads[f"{where()} {name}"] += 1
    if there and not copies and name not in ("index", "index_put", "index_put_", "_index_put_impl_"):
        strange = [x for x in flat if isinstance(x, Tensor) and not isinstance(x, Held) and x.ndim]
        if strange:
            raise RuntimeError(
                f"{func}: expected all tensors on one device, got one of {tuple(strange[0].shape)} on the host"
            )
    if onto:
        kwargs = {**kwargs, "device": torch.device("cpu")}
        flat, spec = tree_flatten((args, kwargs))
    out = func(*tree_unflatten([x.held if isinstance(x, Held) else x for x in flat], spec)[0],
               **tree_unflatten([x.held if isinstance(x, Held) else x for x in flat], spec)[1])  # fmt: skip
    if name == "_local_scalar_dense" or name in READS:
        return out
    if name == "copy_" or (func._schema.name.endswith("_") and not name.endswith("__")):
        return args[0]
    leaves = wanted is not None and not onto
    if leaves:
        # Never the same memory as on the device.
        return tree_map(lambda x: x.clone() if isinstance(x, Tensor) else x, out)
    return tree_map(lambda x: Held(x) if isinstance(x, Tensor) and not isinstance(x, Held) else x, out)


def where() -> str:
    """Who asked: the innermost line of this library, or, where nobody of it did, that of transformers or a test."""
    other = "elsewhere"
    frame: Any = sys._getframe(2)
    while frame is not None:
        path = frame.f_code.co_filename
        if path.startswith(_SOURCE):
            return f"{path[len(_SOURCE) + 1 :]}:{frame.f_lineno}"
        if other == "elsewhere" and "/torch/" not in path and not path.endswith("samples/waits.py"):
            other = f"{'/'.join(path.split('/')[-2:])}:{frame.f_lineno}"
        if "/transformers/" in path and not path.endswith("utils/generic.py"):
            return f"transformers {'/'.join(path.split('/')[-2:])}:{frame.f_lineno}"
        frame = frame.f_back
    return other


class Event:
    """What `torch.cuda.Event` is to the device: it has always come by, but to ask it to is a wait."""

    count: Count | None = None

    def __init__(self, **_: Any) -> None:
        self.seconds = 0.0

    def record(self, stream: Any = None) -> None:
        self.seconds = time.perf_counter()

    def query(self) -> bool:
        return True

    def synchronize(self) -> None:
        synchronize()

    def elapsed_time(self, other: Event) -> float:
        return 1e3 * (other.seconds - self.seconds)


def synchronize(*_: Any) -> None:
    """In place of `torch.cuda.synchronize`."""
    if Event.count is not None:
        Event.count.reads[f"{where()} synchronize"] += 1


STAND_INS = {
    "Event": Event, "synchronize": synchronize, "current_stream": lambda *_: None, "_lazy_init": lambda: None,
}  # fmt: skip


class Counting(TorchDispatchMode):
    """Counts what is done on the device while it is entered."""

    def __init__(self) -> None:
        super().__init__()
        self.count = Count()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return carry_out(func, args, kwargs or {}, self.count)


def on_device(x: Any) -> Any:
    """A model or a tensor on the device, by ``to(DEVICE)`` as anybody would."""
    if isinstance(x, nn.Module):
        for module in x.modules():
            for name, p in module._parameters.items():
                if p is not None:
                    module._parameters[name] = nn.Parameter(Held(p.detach()), requires_grad=False)
            for name, b in module._buffers.items():
                if b is not None:
                    module._buffers[name] = Held(b)
        return x
    return tree_map(lambda t: Held(t) if isinstance(t, Tensor) else t, x)


@contextmanager
def counting(model: nn.Module | None = None) -> Iterator[Count]:
    """Count what is done within the block; operations of ``model``'s own forwards are left out of ``operations``.

    Generators are the CPU's, whatever device they are asked for.
    """
    mode = Counting()
    hooks = []
    if model is not None:

        def enter(*_: Any) -> None:
            mode.count.inside += 1

        def leave(*_: Any) -> None:
            mode.count.inside -= 1

        hooks = [model.register_forward_pre_hook(enter, prepend=True), model.register_forward_hook(leave)]
    made = torch.Generator

    class Generator(made):  # type: ignore
        def __new__(cls, device: Any = "cpu") -> Any:
            return made()

    torch.Generator = Generator  # type: ignore
    tensor = torch.tensor

    def of_numbers(data: Any, *args: Any, **kwargs: Any) -> Tensor:
        """`torch.tensor`, which reads tensors among what it is given one by one."""
        return tensor(tree_map(lambda x: x.tolist() if isinstance(x, Held) else x, data), *args, **kwargs)

    torch.tensor = of_numbers  # type: ignore[assignment]
    was = {name: getattr(torch.cuda, name) for name in STAND_INS}
    for name, each in STAND_INS.items():
        setattr(torch.cuda, name, each)
    Event.count = mode.count
    # `torch.tensor` makes what it is given on the host, and then hands it to the device by an operation like others.
    torch._C._set_only_lift_cpu_tensors(True)
    try:
        with mode:
            yield mode.count
    finally:
        torch.Generator, torch.tensor = made, tensor  # type: ignore
        for name, each in was.items():
            setattr(torch.cuda, name, each)
        Event.count = None
        torch._C._set_only_lift_cpu_tensors(False)
        for hook in hooks:
            hook.remove()
