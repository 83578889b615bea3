"""Builds csrc/cuda for the CPU, with checks for undefined behaviour, and runs emulated.py: no GPU, no CUDA toolkit."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from hypersd.kernels._op import OPS

ROOT = Path(__file__).resolve().parents[2]
TORCH = Path(torch.__file__).parent
COMPILER = shutil.which(os.environ.get("CXX", "c++"))
FLAGS = "-x c++ -c -O1 -std=c++17 -fPIC -fvisibility=hidden -Wno-unknown-pragmas -DHYPERSD_EMULATED".split()
CHECKED = "-fsanitize=undefined -fno-sanitize-recover=all".split()


def build(folder: Path) -> Path:
    include = ["-Itests/kernels", f"-I{TORCH}/include", "-DTORCH_TARGET_VERSION=0x020a000000000000"]
    sources = [ROOT / "csrc/cuda/ops.cpp", *sorted((ROOT / "csrc/cuda").glob("*.cu"))]
    objects = [folder / f"{source.stem}.o" for source in sources]
    for source, made in zip(sources, objects, strict=True):
        command = [COMPILER, *FLAGS, *CHECKED, *include, source, "-o", made]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr[-4000:]
    library = folder / "emulated.so"
    link = [COMPILER, "-shared", *CHECKED, *objects, "-o", library, f"-L{TORCH}/lib", "-ltorch_cpu"]
    done = subprocess.run(link, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-4000:]
    return library


@pytest.mark.slow
@pytest.mark.skipif(COMPILER is None, reason="no C++ compiler")
@pytest.mark.skipif(sys.platform != "linux", reason="written for Linux")
def test_cuda_kernels_on_the_cpu(tmp_path):
    file = Path(__file__).with_name("emulated.py")
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(file)],
        cwd=ROOT,
        env=os.environ | {"HYPERSD_EMULATED": str(build(tmp_path))},
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
    passed = re.search(r"(\d+) passed", done.stdout)
    assert passed and int(passed[1]) >= 20 * sum(bool(op.cuda and op.cases) for op in OPS.values())
    assert "skipped" not in done.stdout
