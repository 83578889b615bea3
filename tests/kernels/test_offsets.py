"""C++ kernels past 2^31 elements: no offset is narrowed to 32 bits, and the last numbers are read where they are.

The same for Triton is interpreted_offsets.py.
"""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest
import torch

from hypersd.kernels import _native, affine_step, attention, clip_coefficient, consistency_loss, geglu
from tests.kernels.guards import sparse

ROOT = Path(__file__).resolve().parents[2]
COMPILER = os.environ.get("CXX", "c++").split()[0]
LARGE = 2**31
native = pytest.mark.skipif(not _native.available(), reason=_native.status())


def narrowings(source: Path) -> list[str]:
    """Where a 64-bit integer becomes a 32-bit one without a cast that says so."""
    headers = Path(torch.__file__).parent / "include"
    options = ["-std=c++17", "-fsyntax-only", "-Wconversion", "-isystem", str(headers)]
    command = [COMPILER, *options, "-DTORCH_TARGET_VERSION=0x020a000000000000", str(source)]
    said = subprocess.run(command, capture_output=True, text=True)
    assert said.returncode == 0, said.stderr[-2000:]
    narrow = ("to ‘int’", "to ‘int32_t’", "to ‘unsigned int’", "to 'int'", "to 'int32_t'", "to 'unsigned int'", "short")
    return [line for line in said.stderr.splitlines() if "-W" in line and any(word in line for word in narrow)]


compiler = pytest.mark.skipif(shutil.which(COMPILER) is None, reason="no C++ compiler")


@compiler
@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(path.name for path in (ROOT / "csrc/cpu").glob("*.cpp")))
def test_no_offset_is_narrowed(name):
    assert narrowings(ROOT / "csrc/cpu" / name) == []


@compiler
def test_a_narrowed_offset_is_seen(tmp_path):
    source = tmp_path / "wrong.cpp"
    source.write_text("long at(const long* p, long i, long stride) { int offset = i * stride; return p[offset]; }\n")
    assert len(narrowings(source)) == 1


@native
def test_strides_past_2_31():
    def far(shape: tuple[int, ...], strides: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        reach = sum((n - 1) * stride for n, stride in zip(shape, strides, strict=True)) + 1
        return sparse((reach,), dtype).as_strided(shape, strides).copy_(torch.randn(shape))

    q, k, v = (far((2, 2, 70, 40), (LARGE // 2 + 8, LARGE + 16, 40, 1), torch.bfloat16) for _ in range(3))
    plain = [t.contiguous().requires_grad_() for t in (q, k, v)]
    out, expected = attention(q.requires_grad_(), k.requires_grad_(), v.requires_grad_()), attention(*plain)
    assert torch.equal(out, expected)
    for found, grad in zip(
        torch.autograd.grad(out.sum(), (q, k, v)), torch.autograd.grad(expected.sum(), plain), strict=True
    ):
        assert torch.equal(found, grad)
    coef = far((3, 5), (LARGE + 3, LARGE // 8), torch.float64)
    x = torch.randn(3, 7)
    assert torch.equal(affine_step(x, 2 * x, coef), affine_step(x, 2 * x, coef.contiguous()))


@native
@pytest.mark.slow
def test_the_last_of_2_31_numbers_count():
    x = sparse((2, LARGE // 2 + 5), torch.bfloat16)
    y = sparse((2, LARGE // 2 + 5), torch.bfloat16)
    x[1, -3:] = torch.tensor([2.0, -3.0, 6.0])
    norm, factor = clip_coefficient(x, 3.5)
    assert norm == 7 and factor == pytest.approx(0.5)
    coef = torch.tensor([[1.0, 0, 1, 0]] * 2, dtype=torch.float64)
    each = consistency_loss(y, x, y, y, coef, kind="l1", reduction="none")
    torch.testing.assert_close(each * x.shape[1], torch.tensor([0.0, 11.0]))


@native
@pytest.mark.slow
def test_geglu_of_2_31_numbers():
    x = sparse((3, 2 * (LARGE // 6 + 3)), torch.bfloat16)
    half = x.shape[1] // 2
    x[2, half - 3 : half], x[2, -3:] = torch.tensor([1.0, 2, 3]), torch.tensor([10.0, 20, 40])
    y = geglu(x)
    assert y[2, -3:].tolist() == [10.0, 40.0, 120.0] and not y[:, : half - 3].any() and not y[:2].any()
