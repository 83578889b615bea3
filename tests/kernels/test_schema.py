"""Schemas are a contract: a change must be made here too, and in the note beside the C++ registration."""

from __future__ import annotations

import re
from pathlib import Path

import torch

from hypersd.kernels._op import LIBRARY, OPS

ROOT = Path(__file__).resolve().parents[2]
SNAPSHOT = Path(__file__).with_name("schemas.txt")


def schemas() -> list[str]:
    names = sorted(name.removeprefix("hypersd::") for name in LIBRARY._op_defs)
    return [str(getattr(torch.ops.hypersd, name).default._schema) for name in names]


def test_schemas_are_those_of_the_snapshot():
    """Programs exported with the old schema break when it changes."""
    assert schemas() == SNAPSHOT.read_text().splitlines()


def test_the_name_without_autograd_has_the_same_schema():
    for op in (op for op in OPS.values() if op.differentiable):
        public, private = (str(getattr(torch.ops.hypersd, n).default._schema) for n in (op.name, f"_{op.name}"))
        assert public.split("(", 1)[1] == private.split("(", 1)[1]


def test_cuda_launches_are_defined_and_registered_once():
    text = (ROOT / "csrc/cuda/ops.cpp").read_text()
    defined, registered = re.findall(r'm\.def\("(\w+)\(', text), re.findall(r'm\.impl\("(\w+)"', text)
    assert defined == registered
    launchers = "".join(path.read_text() for path in (ROOT / "hypersd/kernels").glob("*.py"))
    assert set(re.findall(r"torch\.ops\.hypersd\.(\w*_cuda\w*)\(", launchers)) == set(defined)


def test_cpp_registrations_repeat_the_schemas():
    text = (ROOT / "csrc/ops.cpp").read_text()
    noted = {match[1]: match[0] for match in re.findall(r"// ((\w+)\(.*\) -> .*)\n  m\.impl", text)}
    helpers = {"_native_isa", "_native_hash", "_lora_rows", "_lora_rows_backward", "_lora_rows_dtypes"}
    registered = set(re.findall(r'm\.impl\("(\w+)"', text)) - helpers
    named = {name for public in noted for name in (public, f"_{public}")}
    assert registered == {name for name in named if f"hypersd::{name}" in LIBRARY._op_defs}
    for name, schema in noted.items():
        assert str(getattr(torch.ops.hypersd, name).default._schema) == f"hypersd::{schema}"
    assert {op.name for op in OPS.values() if op.cpp} <= noted.keys()
