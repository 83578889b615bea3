"""Every shipped Triton configuration compiled for sm_80, sm_90 and gfx942 without a GPU, and its code judged.

Registers, spills, shared memory, 128-bit memory operations of streaming kernels, wgmma of dot kernels on sm_90.
"""

from __future__ import annotations

import re
import subprocess
from pathlib import Path
from typing import Any

import pytest

from hypersd.kernels import _tune
from hypersd.kernels._op import OPS
from hypersd.kernels._tune import Program

if _tune.triton is None:
    pytest.skip(_tune.triton_missing(), allow_module_level=True)

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
SHARED_LIMIT = {"sm_80": 166_912, "sm_90": 232_448, "gfx942": 65_536}
PROGRAMS = [
    pytest.param(program, id=f"{op.name}-{program.name}".replace(" ", "_"))
    for op in OPS.values()
    if op.programs
    for program in op.programs()
]
# the registers of a configuration are those of the compiler that it was chosen with: Triton 3.6 takes a few more
REGISTERS = tuple(map(int, triton.__version__.split(".")[:2])) >= (3, 7)
CUOBJDUMP = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"


def build(program: Program, target: str) -> Any:
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
    options = {"num_warps": warps, "num_stages": config.num_stages, **program.options}
    return triton.compile(source, target=TARGETS[target], options=options)


def dump(cubin: bytes, folder: Path, *options: str) -> str:
    path = folder / "kernel.cubin"
    path.write_bytes(cubin)
    return subprocess.run([CUOBJDUMP, *options, path], capture_output=True, text=True, check=True).stdout


def nvidia_findings(compiled: Any, program: Program, target: str, folder: Path) -> list[str]:
    usage, sass = dump(compiled.asm["cubin"], folder, "-res-usage"), dump(compiled.asm["cubin"], folder, "-sass")
    registers, stack = (int(re.search(rf"{key}:(\d+)", usage)[1]) for key in ("REG", "STACK"))
    wrong = []
    if REGISTERS and target == "sm_90" and registers > program.max_registers:  # what the configurations were chosen for
        wrong.append(f"{registers} registers, at most {program.max_registers} declared")
    if REGISTERS and (stack or re.search(r"\b(STL|LDL)\b", sass)):
        wrong.append(f"spills ({stack} bytes of stack)")
    loads, stores = re.findall(r"\bLDG\.E\S*", sass), re.findall(r"\bSTG\.E\S*", sass)
    if program.streaming and not (any(".128" in load for load in loads) and any(".128" in store for store in stores)):
        wrong.append(f"no 128-bit loads and stores: {sorted(set(loads + stores))}")
    if program.dot and target == "sm_90" and ("HGMMA" not in sass or re.search(r"\bHMMA\b", sass)):
        wrong.append("no wgmma (HGMMA)")
    if program.dot and target == "sm_80" and "HMMA" not in sass:
        wrong.append("no tensor cores (HMMA)")
    return wrong


def amd_findings(compiled: Any, program: Program) -> list[str]:
    code = compiled.asm["amdgcn"]
    wrong = []
    spilled = [int(n) for n in re.findall(r"\.[sv]gpr_spill_count:\s*(\d+)", code)]
    if REGISTERS and (any(spilled) or re.search(r"scratch_(load|store)", code)):
        wrong.append(f"spills {spilled}")
    if program.streaming and not re.search(r"(global|buffer)_load_dwordx4", code):
        wrong.append("no 128-bit loads")
    if program.dot and "v_mfma" not in code:
        wrong.append("no matrix cores (mfma)")
    return wrong


def findings(program: Program, target: str, folder: Path) -> list[str]:
    compiled = build(program, target)
    shared = compiled.metadata.shared
    wrong = [f"{shared} bytes of shared memory, limit {SHARED_LIMIT[target]}"] if shared > SHARED_LIMIT[target] else []
    if target == "gfx942":
        return wrong + amd_findings(compiled, program)
    return wrong + nvidia_findings(compiled, program, target, folder)


@pytest.mark.slow
@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("program", PROGRAMS)
def test_shipped_configuration(program, target, tmp_path):
    assert findings(program, target, tmp_path) == []


def test_the_gate_sees_a_lost_vectorisation(tmp_path):
    """Without the promise that sizes and pointers divide by 16, the same kernel moves one element at a time."""
    program = next(p.values[0] for p in PROGRAMS if p.values[0].streaming)
    careless = Program(**(vars(program) | {"divisible": ()}))
    assert findings(program, "sm_90", tmp_path) == []
    assert any("no 128-bit" in wrong for wrong in findings(careless, "sm_90", tmp_path))


@pytest.mark.skipif(not REGISTERS, reason="registers are not judged with Triton 3.6")
def test_the_gate_sees_too_many_registers(tmp_path):
    program = next(p.values[0] for p in PROGRAMS)
    tight = Program(**(vars(program) | {"max_registers": 8}))
    assert any("registers, at most 8 declared" in wrong for wrong in findings(tight, "sm_90", tmp_path))
