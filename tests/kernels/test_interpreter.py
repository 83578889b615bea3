"""Runs the tests of the Triton kernels on the CPU, each file in a process with TRITON_INTERPRET=1."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from hypersd.kernels import _tune
from hypersd.kernels._op import OPS

ROOT = Path(__file__).resolve().parents[2]
FILES = {"interpreted.py": 20, "interpreted_mutations.py": 4, "interpreted_offsets.py": 1}  # tests of an operator


def release(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in version.split(".")[:2])


@pytest.mark.skipif(_tune.triton is None, reason=_tune.triton_missing())
@pytest.mark.skipif(
    _tune.triton is not None and release(_tune.triton.__version__) < (3, 7) and release(np.__version__) >= (2, 5),
    reason="the interpreter of Triton 3.6 takes int() of arrays, which NumPy 2.5 refuses",
)
@pytest.mark.parametrize(("file", "least"), FILES.items())
def test_triton_kernels_under_the_interpreter(file, least):
    file = Path(__file__).with_name(file)
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(file)],
        cwd=ROOT,
        env=os.environ | {"TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
    passed = re.search(r"(\d+) passed", done.stdout)
    assert passed and int(passed[1]) >= least * sum(op.triton is not None for op in OPS.values())
    assert "skipped" not in done.stdout
