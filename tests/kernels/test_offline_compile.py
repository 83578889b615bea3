"""Every shipped Triton configuration compiled for sm_80, sm_90 and gfx942 without a GPU, and its code judged.

Registers, spills, shared memory, 128-bit memory operations of streaming kernels, wgmma of dot kernels on sm_90.
"""

from __future__ import annotations

import re
from typing import Any

import pytest

from hypersd.kernels import _tune
from hypersd.kernels._op import OPS
from hypersd.kernels._tune import Program

if _tune.triton is None:
    pytest.skip(_tune.triton_missing(), allow_module_level=True)

import triton

from bench import offline

SHARED_LIMIT = {"sm_80": 166_912, "sm_90": 232_448, "gfx942": 65_536}
PROGRAMS = [
    pytest.param(program, id=f"{op.name}-{program.name}".replace(" ", "_"))
    for op in OPS.values()
    if op.programs
    for program in op.programs()
]
# the registers of a configuration are those of the compiler that it was chosen with: Triton 3.6 takes a few more
REGISTERS = tuple(map(int, triton.__version__.split(".")[:2])) >= (3, 7)


def nvidia_findings(compiled: Any, program: Program, target: str) -> list[str]:
    found = offline.counters(compiled)
    wrong = []
    if REGISTERS and target == "sm_90" and found.registers > program.max_registers:  # for what they were chosen
        wrong.append(f"{found.registers} registers, at most {program.max_registers} declared")
    if REGISTERS and found.spills:
        wrong.append(f"spills ({found.spills} bytes of stack and instructions)")
    if program.streaming and not (found.wide_loads and found.wide_stores):
        wrong.append(f"no 128-bit loads and stores: {found}")
    if program.dot and target == "sm_90" and (not found.wgmma or found.mma):
        wrong.append("no wgmma (HGMMA)")
    if program.dot and target == "sm_80" and not found.mma:
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


def findings(program: Program, target: str) -> list[str]:
    compiled = offline.build(program, target)
    shared = compiled.metadata.shared
    wrong = [f"{shared} bytes of shared memory, limit {SHARED_LIMIT[target]}"] if shared > SHARED_LIMIT[target] else []
    if target == "gfx942":
        return wrong + amd_findings(compiled, program)
    return wrong + nvidia_findings(compiled, program, target)


@pytest.mark.slow
@pytest.mark.parametrize("target", offline.TARGETS)
@pytest.mark.parametrize("program", PROGRAMS)
def test_shipped_configuration(program, target):
    assert findings(program, target) == []


def test_the_gate_sees_a_lost_vectorisation():
    """Without the promise that sizes and pointers divide by 16, the same kernel moves one element at a time."""
    program = next(p.values[0] for p in PROGRAMS if p.values[0].streaming)
    careless = Program(**(vars(program) | {"divisible": ()}))
    assert findings(program, "sm_90") == []
    assert any("no 128-bit" in wrong for wrong in findings(careless, "sm_90"))


@pytest.mark.skipif(not REGISTERS, reason="registers are not judged with Triton 3.6")
def test_the_gate_sees_too_many_registers():
    program = next(p.values[0] for p in PROGRAMS)
    tight = Program(**(vars(program) | {"max_registers": 8}))
    assert any("registers, at most 8 declared" in wrong for wrong in findings(tight, "sm_90"))
