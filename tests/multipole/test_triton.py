from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from attend_samples import random_case
from torch._subclasses.fake_tensor import FakeTensorMode

from quickmerge.multipole import Multipole, attend, triton_decode
from quickmerge.multipole.clusters import Clusters
from quickmerge.multipole.triton_decode import GROUPED, SWITCH, WIDEST, attend_triton, triton_serves

triton = pytest.importorskip("triton", reason="Triton is not installed (pip install quickmerge[triton])")


def test_the_kernels_in_the_interpreter() -> None:
    """In another process, as Triton has to know from its import on that it is to interpret."""
    file = Path(__file__).with_name("triton_interpreted.py")
    env = {k: v for k, v in os.environ.items() if not k.startswith("PYTEST_")}
    run = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(file)],
        cwd=file.parents[2],
        env=env | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stdout + run.stderr
    assert " passed" in run.stdout and "skipped" not in run.stdout


# Compiling for a GPU that isn't there --------------------------------------------------------------------------------


SHARED = {75: 64 << 10, 80: 163 << 10, 86: 99 << 10, 90: 227 << 10}
"""Bytes of shared memory that a program may have, by the compute capability of the GPU (CUDA programming guide)."""

KERNELS = {"lookup", "rank", "read", "replace", "combine"}


@pytest.fixture
def compiled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., dict[str, Any]]:
    """Launches compile for a GPU and go no further: returns what they compiled, by the name of the kernel."""
    from triton.backends.compiler import GPUTarget
    from triton.runtime.jit import JITFunction

    kernels: dict[str, Any] = {}
    run = JITFunction.run

    def compile_only(self: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> Any:
        self.device_caches.clear()
        kernels[self.fn.__name__] = kernel = run(self, *args, grid=grid, warmup=True, **kwargs)
        return kernel

    def launch(capability: int, **options: Any) -> dict[str, Any]:
        target = GPUTarget("cuda", capability, 32)
        there = {"get_current_device": lambda: 0, "get_current_stream": lambda device: 0}
        driver = SimpleNamespace(get_current_target=lambda: target, **there)
        monkeypatch.setattr(triton.runtime.driver, "_active", driver)
        kernels.clear()
        attend_triton(**uniform(**options))
        assert set(kernels) == KERNELS
        assert all(kernel.metadata.shared <= SHARED[capability] for kernel in kernels.values())
        return kernels

    monkeypatch.setattr(JITFunction, "run", compile_only)
    monkeypatch.setattr(triton.knobs.cache, "dir", str(tmp_path))
    return launch


def uniform(dtype: torch.dtype, group: int = 4, d: int = 128, sized: bool = True, variance: bool = True) -> Any:
    """Arguments of a step whose result nobody computes: four clusters of five keys each, of which three are chosen."""
    query, keys = torch.zeros(1, 2 * group, 1, d, dtype=dtype), torch.zeros(1, 2, 30, d, dtype=dtype)
    labels = (torch.arange(20) % 4).expand(1, 2, 20)
    clusters = Clusters.from_labels(keys, keys, labels, torch.tensor([3]), 4, spread=variance)
    settings = Multipole(sink=3, budget=15, variance=variance)
    size = torch.ones(1, 30) if sized else None
    return {"query": query, "keys": keys, "values": keys, "size": size, "clusters": clusters, "settings": settings}


def test_the_kernels_compile_to_matrix_units(compiled: Callable[..., dict[str, Any]]) -> None:
    kernels = compiled(80, dtype=torch.bfloat16)
    multiply = {name for name, kernel in kernels.items() if "mma.sync" in kernel.asm["ptx"]}
    assert multiply == {"lookup", "read", "replace"}


@pytest.mark.slow
@pytest.mark.parametrize("capability", SHARED)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_the_kernels_compile_for_any_gpu(
    capability: int, dtype: torch.dtype, compiled: Callable[..., dict[str, Any]]
) -> None:
    compiled(capability, dtype=dtype, group=GROUPED, d=WIDEST)
    compiled(capability, dtype=dtype, group=1, d=80, sized=False, variance=False)


# Who is served -------------------------------------------------------------------------------------------------------


def call(
    device: str = "cuda", q: int = 1, n: int = 50, d: int = 8, heads: int = 6, dtype: torch.dtype = torch.bfloat16
) -> dict[str, Any]:
    """Arguments of `attend`, on a device that need not be there."""
    made = random_case(1, dtype=torch.float32, rows=(2,), heads=(2,)).clusters
    with FakeTensorMode():
        keys = torch.empty(2, 2, n, d, device=device, dtype=dtype)
        centroids = torch.empty(2, 2, len(made), d, device=device, dtype=dtype)
        query = torch.empty(2, heads, q, d, device=device, dtype=dtype)
    clusters = replace(made, key=centroids, value=centroids)
    return {"query": query, "keys": keys, "values": keys, "clusters": clusters}


def test_one_token_on_a_gpu_is_served() -> None:
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        assert triton_serves(**call(dtype=dtype))


def test_it_can_be_switched_off(monkeypatch: pytest.MonkeyPatch) -> None:
    given = call()
    monkeypatch.setenv(SWITCH, "0")
    assert not triton_serves(**given)
    monkeypatch.setenv(SWITCH, "1")
    assert triton_serves(**given)


def test_others_are_left_to_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    assert not triton_serves(**call("cpu"))
    assert not triton_serves(**call(q=2))
    assert not triton_serves(**call(dtype=torch.float64))
    assert not triton_serves(**call(d=257))
    assert not triton_serves(**call(heads=66))
    assert triton_serves(**call(d=256, heads=64))
    given = call()
    assert not triton_serves(**given, coarse=given["clusters"])
    with FakeTensorMode():
        turned = torch.empty(2, 2, 8, 50, device="cuda", dtype=torch.bfloat16).transpose(2, 3)
        learnt = torch.empty(2, 6, 1, 8, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    assert not triton_serves(**given | {"keys": turned})
    assert not triton_serves(**given | {"query": learnt})
    with torch.no_grad():
        assert triton_serves(**given | {"query": learnt})
    monkeypatch.setattr(triton_decode, "_installed", lambda: False)
    assert not triton_serves(**given)


def test_what_is_served_goes_there(monkeypatch: pytest.MonkeyPatch) -> None:
    """`attend` asks nobody for the device's bounds on the way: a fake device has none to tell."""
    answer, seen = (object(), object()), []
    monkeypatch.setattr(attend, "attend_triton", lambda *args, **more: seen.append((args, more)) or answer)
    given = call()
    settings = Multipole(budget=3)
    args = (given["query"], given["keys"], given["values"], None, given["clusters"], settings)
    assert attend.attend_and_count(*args, scaling=0.3) is answer
    assert seen == [(args, {"scaling": 0.3, "query_for_centroids": None})]
    wrong = call(n=49)["values"]
    with pytest.raises(ValueError, match="values must match keys"):
        attend.attend_and_count(given["query"], given["keys"], wrong, None, given["clusters"], settings)
