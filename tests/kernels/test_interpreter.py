"""Runs interpreted.py, the tests of the Triton kernels on the CPU, in a process with TRITON_INTERPRET=1."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from hypersd.kernels import _tune
from hypersd.kernels._op import OPS

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.skipif(_tune.triton is None, reason=_tune.triton_missing())
def test_triton_kernels_under_the_interpreter():
    file = Path(__file__).with_name("interpreted.py")
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
    assert passed and int(passed[1]) >= 20 * sum(op.triton is not None for op in OPS.values())
    assert "skipped" not in done.stdout
