"""Fixtures of the kernel tests."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from hypersd.kernels import _native


@pytest.fixture
def poisoned() -> Iterator[None]:
    """torch.empty hands out NaN, so that an element which a kernel forgets cannot pass."""
    fill = torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    assert torch.empty(3).isnan().all()
    yield
    torch.utils.deterministic.fill_uninitialized_memory = fill
    torch.use_deterministic_algorithms(False)


@pytest.fixture
def implementation(request: pytest.FixtureRequest) -> Iterator[str]:
    """An instruction set, forced upon the C++ kernels for one test, or "fallback", which the test arranges."""
    name = request.param
    if name == "fallback":
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
