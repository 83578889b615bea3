"""Fixtures of the kernel tests."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from hypersd.kernels import _native, use
from hypersd.kernels._op import OPS, Op
from tests.kernels import checks


@pytest.fixture(autouse=True)
def full_float32(monkeypatch: pytest.MonkeyPatch) -> None:
    """Convolutions of a GPU in float32, not TF32: no yardstick that is a thousand times as long."""
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)


@pytest.fixture(params=checks.DEVICES)
def device(request: pytest.FixtureRequest) -> Iterator[str]:
    """The test runs once on the CPU and once on the GPU: new tensors are made there."""
    with torch.device(request.param):
        yield request.param


@pytest.fixture
def poisoned() -> Iterator[None]:
    """torch.empty hands out NaN, so that an element which a kernel forgets cannot pass."""
    fill = torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    assert torch.empty(3, device="cuda" if torch.cuda.is_available() else "cpu").isnan().all()
    yield
    torch.utils.deterministic.fill_uninitialized_memory = fill
    torch.use_deterministic_algorithms(False)


@pytest.fixture
def implementation(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """What runs for one test: "auto"; "triton" or "cuda", forced; "fallback", what a machine without our kernels
    runs; or an instruction set, forced upon the C++ kernels."""
    name = request.param
    if name == "cuda" and (reason := _native.cuda_missing(torch.device("cuda", torch.cuda.current_device()))):
        pytest.skip(reason)
    if name in ("auto", "triton", "cuda"):
        with use(name):
            yield name
        return
    if name == "fallback":
        monkeypatch.setattr(Op, "run", lambda op, *args: op.fallback(*args))
        for op in OPS.values():
            monkeypatch.setattr(op, "raw", op.fallback)
        yield name
        return
    if not _native.available():
        pytest.skip(_native.status())
    try:
        _native.isa(name)
    except ValueError as error:
        pytest.skip(str(error))
    yield name
    _native.isa("auto")
