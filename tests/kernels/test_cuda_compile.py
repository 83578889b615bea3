"""csrc/cuda compiled by nvcc for sm_80 and sm_90a without a GPU, and its code judged: registers, spills, 128-bit loads
and stores in the wide paths, no atomics, cluster barriers in group norm on sm_90a."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

import pytest

from hypersd.kernels import _tune

ROOT = Path(__file__).resolve().parents[2]
SOURCES = sorted((ROOT / "csrc/cuda").glob("*.cu"))
TARGETS = ("sm_80", "sm_90a")
BUNDLED = Path(_tune.triton.__file__).parent / "backends/nvidia/bin/cuobjdump" if _tune.triton else None
# Kernels by source: the most registers of one. 64 let a multiprocessor hold 1,024 threads, 128 those of one_pass or two
# blocks of sums and dx.
REGISTERS = {
    "adamw_ema": {"adamw_ema_kernel": 56},
    "affine_step": {"affine_step_kernel": 56},
    "consistency_loss": {"loss_kernel": 56, "scale_kernel": 40, "finish_kernel": 40},
    "group_norm_silu": {
        "one_pass_kernel": 128, "moments_kernel": 96, "finish_moments_kernel": 40, "apply_kernel": 96,
    },
    "group_norm_silu_backward": {
        "sums_kernel": 124, "finish_sums_kernel": 40, "channel_sums_kernel": 40, "dx_kernel": 112,
    },
}  # fmt: skip
KNOWN = sorted((name for names in REGISTERS.values() for name in names), key=len, reverse=True)
WRITES_NOTHING_WIDE = {"moments_kernel", "sums_kernel"}  # sums by channel
ADDS = {"group_norm_silu": {"one_pass_kernel", "moments_kernel"}, "group_norm_silu_backward": {"dx_kernel"}}


def toolkit() -> Path | None:
    """nvcc where setup.py finds it."""
    named = [Path(os.environ[name]) / "bin/nvcc" for name in ("CUDA_HOME", "CUDA_PATH") if os.environ.get(name)]
    found = shutil.which("nvcc")
    named += [Path(found)] if found else []
    return next((path for path in [*named, Path("/usr/local/cuda/bin/nvcc")] if path.is_file()), None)


NVCC = toolkit()
CUOBJDUMP = next((p for p in (NVCC and NVCC.resolve().parent / "cuobjdump", BUNDLED) if p and p.is_file()), None)
if NVCC is None:
    pytest.skip("no nvcc in $CUDA_HOME, on PATH or in /usr/local/cuda", allow_module_level=True)
if CUOBJDUMP is None:
    pytest.skip("no cuobjdump in the CUDA toolkit or in Triton", allow_module_level=True)


@dataclass
class Kernel:
    """What one compiled function is made of."""

    name: str
    wide: bool
    adds: bool  # a residual, or the gradient of h
    registers: int
    stack: int
    instructions: set[str] = field(default_factory=set)


def run(*command: object) -> str:
    done = subprocess.run([str(part) for part in command], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout + done.stderr


def compile_cubin(source: Path, target: str, folder: Path, *flags: str) -> list[Kernel]:
    cubin = folder / f"{source.stem}.{target}.cubin"
    run(NVCC, "-cubin", "-O3", "-std=c++17", f"-arch={target}", *flags, source, "-o", cubin)
    kernels = {}
    usage = run(CUOBJDUMP, "-res-usage", cubin)
    for name, registers, stack in re.findall(r"Function (\w+):\s+REG:(\d+) STACK:(\d+)", usage):
        plain = next((known for known in KNOWN if known in name), name)
        wide, adds = "4WideI" in name or "ILb1E" in name, "ELb1E" in name
        kernels[name] = Kernel(plain, wide, adds, int(registers), int(stack))
    now = None
    for line in run(CUOBJDUMP, "-sass", cubin).splitlines():
        if "Function : " in line:
            now = kernels[line.split(": ")[1].strip()]
        elif now and (match := re.search(r"\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9_.]+)", line)):
            now.instructions.add(match[1])
    return list(kernels.values())


@cache
def compiled(source: Path, target: str, folder: Path) -> list[Kernel]:
    return compile_cubin(source, target, folder)


def findings(kernels: list[Kernel], limits: dict[str, int], target: str) -> list[str]:
    wrong = [f"{name} is missing" for name in limits if name not in {kernel.name for kernel in kernels}]
    for kernel in kernels:
        who = f"{kernel.name}{' wide' * kernel.wide}{' adding' * kernel.adds}"
        if kernel.registers > limits.get(kernel.name, 0):
            wrong.append(f"{who}: {kernel.registers} registers, at most {limits.get(kernel.name)} expected")
        if kernel.stack or any(re.match(r"(STL|LDL)\b", one) for one in kernel.instructions):
            wrong.append(f"{who}: spills ({kernel.stack} bytes of stack)")
        if any(re.match(r"(ATOMG?|REDG?|ATOMS)\b", one) for one in kernel.instructions):
            wrong.append(f"{who}: an atomic operation")
        if kernel.wide and not any(re.match(r"LDG\.E\.128", one) for one in kernel.instructions):
            wrong.append(f"{who}: no 128-bit load")
        stores = kernel.wide and (kernel.adds or kernel.name not in WRITES_NOTHING_WIDE)
        if stores and not any(re.match(r"STG\.E\.128", one) for one in kernel.instructions):
            wrong.append(f"{who}: no 128-bit store")
        if kernel.name == "one_pass_kernel" and (target == "sm_90a") != ("UCGABAR_ARV" in kernel.instructions):
            wrong.append(f"{who}: cluster barriers on sm_90a, and there alone, expected")
    return wrong


@pytest.mark.slow
@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("source", SOURCES, ids=lambda path: path.stem)
def test_machine_code(source, target, tmp_path_factory):
    kernels = compiled(source, target, tmp_path_factory.getbasetemp())
    assert findings(kernels, REGISTERS[source.stem], target) == []
    assert len({kernel.name for kernel in kernels}) == len(REGISTERS[source.stem])
    assert {kernel.name for kernel in kernels if kernel.adds} == ADDS.get(source.stem, set())


def changed(folder: Path, name: str, before: str, after: str, times: int) -> Path:
    """A copy of csrc/cuda in which the file `name` reads `after` for `before`."""
    shutil.copytree(ROOT / "csrc/cuda", folder)
    text = (folder / name).read_text()
    assert text.count(before) == times
    (folder / name).write_text(text.replace(before, after))
    return folder


def test_the_gate_sees_spills_and_registers(tmp_path):
    """With 32 registers a thread the backward of group norm has to spill."""
    name = "group_norm_silu_backward.cu"
    folder = changed(tmp_path / "csrc", name, "(kTileThreads, 2)", "(1024, 2)", 2)
    wrong = findings(compile_cubin(folder / name, "sm_90a", tmp_path), {"dx_kernel": 16}, "sm_90a")
    assert any("dx_kernel wide: spills" in one for one in wrong)
    assert any("dx_kernel: 32 registers, at most 16 expected" in one for one in wrong)


PIECEWISE = """
template <class T>
__device__ inline T piecewise(const T* p) {
  const volatile unsigned* words = reinterpret_cast<const unsigned*>(p);
  T value;
  for (int i = 0; i < 4; ++i) reinterpret_cast<unsigned*>(&value)[i] = words[i];
  return value;
}
"""


def test_the_gate_sees_a_lost_vectorisation(tmp_path):
    """The same kernels with 128 bits cut into fours."""
    folder = changed(tmp_path / "csrc", "device.h", "__ldg(", "piecewise(", 2)
    header = folder / "device.h"
    header.write_text(header.read_text().replace("struct Single {", PIECEWISE + "struct Single {"))
    wrong = findings(compile_cubin(folder / "affine_step.cu", "sm_90a", tmp_path), {"affine_step_kernel": 99}, "sm_90a")
    assert wrong == ["affine_step_kernel wide: no 128-bit load"] * 3
