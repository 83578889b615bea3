"""Triton kernels compiled for GPUs that are not here, and what their machine code holds and does.

The tests judge it (tests/kernels/test_offline_compile.py); `hypersd bench counters` prints it, and `bench compare`
holds two states of the code against each other by it: the same source and compiler give the same counts every time.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from hypersd.kernels._tune import Program

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
NVIDIA = ("sm_80", "sm_90")
CUOBJDUMP = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"


def build(program: Program, target: str) -> Any:
    """The kernel compiled for one of TARGETS, as the launcher would for such arguments."""
    names = [parameter.name for parameter in program.kernel.params]
    signature = {name: program.signature.get(name, "constexpr") for name in names}
    assert {name for name in names if signature[name] == "constexpr"} == program.constexprs.keys()
    attributes = {(names.index(name),): [["tt.divisibility", 16]] for name in program.divisible}
    config = program.configs.get(target, program.config)
    constants = {**program.constexprs, **(config.blocks if target in program.configs else {})}
    source = ASTSource(fn=program.kernel, signature=signature, constexprs=constants, attrs=attributes)
    warps = config.num_warps
    if program.streaming:  # as the launcher does: as many threads, whatever a warp holds
        warps = max(1, warps * 32 // TARGETS[target].warp_size)
    options = {"num_warps": warps, "num_stages": config.num_stages, "enable_fp_fusion": True, **program.options}
    return triton.compile(source, target=TARGETS[target], options=options)


@dataclass(frozen=True)
class Counters:
    """One kernel for one NVIDIA target. Instructions are counted where they stand, not as often as they run."""

    registers: int  # of a thread
    spills: int  # bytes of a thread's stack, and instructions that go there
    shared: int  # bytes
    loads: int
    wide_loads: int  # 128 bits each
    stores: int
    wide_stores: int
    async_copies: int  # from global to shared memory, past the registers
    wgmma: int  # matrix products of a warp group (HGMMA, sm_90)
    mma: int  # matrix products of a warp (HMMA)
    instructions: int


def counters(compiled: Any) -> Counters:
    """Read from the machine code of a kernel that was built for an NVIDIA target."""
    usage, sass = _dump(compiled.asm["cubin"], "-res-usage"), _dump(compiled.asm["cubin"], "-sass")
    registers, stack = (int(re.search(rf"{key}:(\d+)", usage)[1]) for key in ("REG", "STACK"))  # type: ignore[index]

    def count(pattern: str) -> int:
        return len(re.findall(rf"\b{pattern}", sass))

    return Counters(
        registers=registers,
        spills=stack + count(r"(?:STL|LDL)\b"),
        shared=compiled.metadata.shared,
        loads=count(r"LDG\.E"),
        wide_loads=count(r"LDG\.E\S*\.128"),
        stores=count(r"STG\.E"),
        wide_stores=count(r"STG\.E\S*\.128"),
        async_copies=count(r"(?:LDGSTS|UTMALDG|UBLKCP)\b"),
        wgmma=count("HGMMA"),
        mma=count("HMMA"),
        instructions=len(re.findall(r"^\s+/\*[0-9a-f]{4,}\*/", sass, flags=re.M)),
    )


def _dump(cubin: bytes, option: str) -> str:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.cubin"
        path.write_bytes(cubin)
        return subprocess.run([CUOBJDUMP, option, path], capture_output=True, text=True, check=True).stdout
