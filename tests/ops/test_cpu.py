"""The CPU kernels on every instruction set this machine has: near the exact product, and a row's result is its own."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch

from qwenlet.errors import ConfigError
from qwenlet.ops import cpu

needs_kernels = pytest.mark.skipif(not cpu.available(), reason="the package was built without a compiler")
ISAS = cpu.available() or ["none"]


@pytest.fixture
def isa(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setenv("QWENLET_ISA", request.param)
    return str(request.param)


def case(rows: int, k: int, n: int = 83) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(rows * 10_000 + k)
    shapes = ((rows, k), (n, k), (n,))
    x, w, b = (torch.randn(shape, generator=generator).bfloat16() for shape in shapes)
    return x, w, b


@needs_kernels
@pytest.mark.parametrize("isa", ISAS, indirect=True)
@pytest.mark.parametrize("k", [1, 7, 31, 33, 64, 100, 576, 2048, 5504])
@pytest.mark.parametrize("rows", [1, 2, 3, 5, 8, 16, 17])
@torch.no_grad()
def test_the_sum_is_within_its_bound(isa: str, rows: int, k: int) -> None:
    """float32 sums of K products are off by at most K eps sum|x w|, in practice far less; then one rounding."""
    x, w, b = case(rows, k)
    exact = x.double() @ w.double().T + b.double()
    size = x.double().abs() @ w.double().abs().T + b.double().abs()
    bound = size * (k + 2) * 2.0**-24 * 2 + exact.abs() * 2.0**-8
    found = cpu.linear_bf16(x, w, b).double()
    assert bool(((found - exact).abs() <= bound).all()), float(((found - exact).abs() / bound).max())
    without = cpu.linear_bf16(x, w, None).double()
    assert bool(((without - (exact - b.double())).abs() <= bound + without.abs() * 2.0**-8).all())


@needs_kernels
@pytest.mark.parametrize("isa", ISAS, indirect=True)
@pytest.mark.parametrize("threads", [1, 2, 3])
@torch.no_grad()
def test_a_row_is_the_same_bits_in_any_company(isa: str, threads: int) -> None:
    x, w, b = case(8, 2048, 700)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        together = cpu.linear_bf16(x, w, b)
    finally:
        torch.set_num_threads(before)
    for rows in range(1, 9):
        some = cpu.linear_bf16(x[8 - rows :], w, b)
        assert torch.equal(some, together[8 - rows :]), rows


@needs_kernels
@torch.no_grad()
def test_views_and_special_values() -> None:
    x, w, _ = case(4, 64)
    wide = torch.zeros(4, 128, dtype=torch.bfloat16)
    wide[:, ::2] = x
    assert torch.equal(cpu.linear_bf16(wide[:, ::2], w, None), cpu.linear_bf16(x, w, None))
    x[1, 3] = torch.nan
    x[2, 3] = torch.inf
    out = cpu.linear_bf16(x, w, None)
    assert bool(out[1].isnan().all())
    assert not bool(out[2].isfinite().any())
    assert bool(out[[0, 3]].isfinite().all())


def test_gradients_flow_through_torch() -> None:
    x, w, _ = case(2, 32)
    x.requires_grad_()
    cpu.linear_bf16(x, w, None).float().sum().backward()
    assert x.grad is not None
    assert torch.allclose(x.grad[0].float(), w.float().sum(0), rtol=0.02, atol=0.1)


def test_a_kernel_path_can_be_forced_or_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("QWENLET_ISA", "torch")
    assert cpu.status() == cpu.Status(None, "QWENLET_ISA=torch")
    monkeypatch.setenv("QWENLET_ISA", "avx9000")
    with pytest.raises(ConfigError, match="avx9000"):
        cpu.status()
    monkeypatch.delenv("QWENLET_ISA")
    assert cpu.status().isa == (cpu.available() or [None])[0]


@needs_kernels
def test_the_pool_of_its_own_works_where_torch_brings_no_openmp() -> None:
    """Without torch in the process there is no OpenMP to borrow threads from: ours start, sleep, survive a fork."""
    code = """
import array
assert "torch" not in sys.modules
one = 0x3F80  # 1.0 in bfloat16
x, w = array.array("H", [one] * 256), array.array("H", [one] * 256 * 4096)
def run():
    y = array.array("H", [0] * 4096)
    address = lambda a: a.buffer_info()[0]
    kernels.linear_bf16("portable", 3, address(x), 1, address(w), 4096, 256, 0, address(y))
    assert set(y) == {0x4380}, set(y)  # 256.0
for _ in range(300):
    run()
child = os.fork()
if child == 0:
    run()
    os._exit(7)
assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7
run()
"""
    done = subprocess.run(
        [sys.executable, "-c", _IMPORT + code],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
        env=os.environ | {"KERNELS": kernels_file()},
    )
    assert done.returncode == 0, done.stderr


# loads the extension alone, without the package around it, which imports torch
_IMPORT = """
import importlib.machinery, importlib.util, os, sys
loader = importlib.machinery.ExtensionFileLoader("qwenlet.ops.cpu._kernels", os.environ["KERNELS"])
spec = importlib.util.spec_from_loader(loader.name, loader)
kernels = importlib.util.module_from_spec(spec)
loader.exec_module(kernels)
"""


def kernels_file() -> str:
    from qwenlet.ops.cpu import _kernels

    return str(_kernels.__file__)
