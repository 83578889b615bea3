"""The C++ library: its instruction sets, what happens without it, and its build."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest
import torch

from hypersd import doctor
from hypersd.kernels import _native, _op, affine_step, explain
from hypersd.kernels._op import OPS
from tests.kernels import checks

ROOT = Path(__file__).resolve().parents[2]
native = pytest.mark.skipif(not _native.available(), reason=_native.status())


def run(code: str, **environment: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=ROOT,
        env=os.environ | environment,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def library_file() -> Path:
    folder = Path(os.environ.get("HYPERSD_NATIVE_FOLDER") or _native.PACKAGE)
    return next(folder.glob("_C.*so"))


EXPLAIN = """
import torch
from hypersd.kernels import affine_step, explain
x = torch.arange(4.).reshape(1, 4)
print(affine_step(x, x, torch.tensor([1., 2, 0, 0, 0]).double()).tolist())
print(explain(affine_step, x, x, torch.zeros(5).double()).implementation)
print(explain(affine_step, x, x, torch.zeros(5).double()).why)
"""


@pytest.mark.skipif(shutil.which(os.environ.get("CXX", "c++")) is None, reason="no C++ compiler")
def test_is_built_where_a_compiler_is():
    assert _native.available(), _native.status()


@pytest.mark.skipif(shutil.which(os.environ.get("CXX", "c++")) is None, reason="no C++ compiler")
def test_a_library_of_other_sources_is_named_and_not_loaded(tmp_path, monkeypatch):
    library = library_file()
    assert _native.status() == f"loaded ({_native.isa()})"
    (tmp_path / "csrc/cuda").mkdir(parents=True)
    monkeypatch.setattr(_native, "PACKAGE", tmp_path / "hypersd")
    shutil.copytree(ROOT / "csrc", tmp_path / "csrc", dirs_exist_ok=True)
    assert _native._stale(library, "csrc", "build") == ""
    (tmp_path / "csrc/cuda/ops.cpp").write_text("// of the other library\n")
    assert _native._stale(library, "csrc", "build") == ""
    (tmp_path / "csrc/ops.cpp").write_text("// one more operator\n")
    assert _native._stale(library, "csrc", "build") == ""  # a folder of that name beside an installed copy
    (tmp_path / "setup.py").touch()
    (tmp_path / "hypersd").mkdir()
    shutil.copy(library, tmp_path / "hypersd")
    reason = _native._load.__wrapped__()
    assert reason == (
        "_C.abi3.so was built from other sources than csrc/ has now; "
        "rebuild it with `python setup.py build_ext --inplace --force`"
    )
    # nothing of such a file reaches torch, not even one that could not be loaded
    monkeypatch.setattr(torch.ops, "load_library", lambda path: pytest.fail("loaded"))
    (tmp_path / "hypersd/_CUDA.abi3.so").write_bytes(b"not a library")
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert "than csrc/cuda/ has now; rebuild it with `HYPERSD_BUILD_CUDA=1 python" in _native._load_cuda.__wrapped__()
    assert _native._load.__wrapped__() == reason


@native
def test_instruction_sets_agree_to_rounding():
    inputs = {name: checks.smallest(OPS[name]).inputs() for name in ("affine_step", "consistency_loss")}
    widest, found = _native.isa(), {}
    for level in _native.ISA_LEVELS[: _native.ISA_LEVELS.index(widest) + 1]:
        assert _native.isa(level) == level == _native.isa()
        found[level] = {name: checks.evaluate(OPS[name], value) for name, value in inputs.items()}
    assert _native.isa("auto") == widest
    for level, outputs in found.items():
        for name, values in outputs.items():
            for key, value in values.items():
                expected = found["baseline"][name][key]
                torch.testing.assert_close(value, expected, rtol=2e-6, atol=1e-6, msg=f"{level} {key}")


@native
def test_instruction_set_from_the_environment():
    assert run("from hypersd.kernels import _native; print(_native.isa())", HYPERSD_ISA="baseline") == "baseline"


@native
def test_refuses_an_unknown_instruction_set():
    with pytest.raises(ValueError, match="got 'mmx', expected one of"):
        _native.isa("mmx")


def test_an_unknown_instruction_set_in_the_environment_is_said_and_nothing_is_loaded(monkeypatch):
    monkeypatch.setattr(torch.ops, "load_library", lambda path: pytest.fail("loaded"))
    monkeypatch.setenv("HYPERSD_ISA", "AVX2")
    reason = _native._load.__wrapped__()
    assert reason == "HYPERSD_ISA: got 'AVX2', expected one of ('baseline', 'avx2', 'avx512', 'amx')"
    monkeypatch.setattr(_native, "_load", lambda: reason)
    x = torch.zeros(1, 4)
    assert explain(affine_step, x, x, torch.zeros(5).double()).why == doctor.native() == reason


def test_without_the_library_the_reference_runs_and_says_why():
    values, implementation, why = run(EXPLAIN, HYPERSD_NATIVE="0").splitlines()
    assert values == "[[0.0, 3.0, 6.0, 9.0]]"
    assert (implementation, why) == ("reference", "switched off by HYPERSD_NATIVE=0")


INSTALL = "`pip install --no-build-isolation --force-reinstall --no-deps PATH_OF_THE_CHECKOUT`"


@pytest.mark.parametrize("checkout", [True, False])
@pytest.mark.parametrize("content", [None, b"not a library"])
def test_a_missing_or_broken_library_is_one_line(tmp_path, monkeypatch, content, checkout):
    monkeypatch.setattr(_native, "PACKAGE", tmp_path / "hypersd")
    monkeypatch.delenv("HYPERSD_NATIVE_FOLDER", raising=False)
    _native.PACKAGE.mkdir()
    if checkout:
        (tmp_path / "csrc").mkdir()
        (tmp_path / "setup.py").touch()
    if content:
        known = _native.fingerprint(tmp_path / "csrc").encode() if checkout else b""
        (_native.PACKAGE / "_C.abi3.so").write_bytes(content + known)
    reason = _native._load.__wrapped__()
    assert "\n" not in reason and ("`python setup.py build_ext --inplace`" if checkout else INSTALL) in reason
    assert ("does not load" if content else "no C++ kernels") in reason


@native
def test_needs_nothing_of_torch_but_the_stable_abi():
    """No symbol of libtorch's C++ interface: that is what lets one build serve many versions of torch."""
    nm = shutil.which("nm")
    if nm is None:
        pytest.skip("no nm")
    library = next(_native.PACKAGE.glob("_C.*so"))
    listed = subprocess.run([nm, "-D", "--undefined-only", str(library)], capture_output=True, text=True, check=True)
    names = [line.split()[-1].split("@")[0] for line in listed.stdout.splitlines()]
    mangled = [name for name in names if re.match(r"_ZN?K?\d*(2at|3c10|5torch)", name)]
    assert mangled == [] and any(name.startswith("aoti_torch_") for name in names)
    assert not any(name.startswith("Py") for name in names)


def test_cuda_kernels_say_in_one_line_why_they_are_absent(tmp_path, monkeypatch):
    device = torch.device("cuda", 0)
    monkeypatch.setattr(torch.version, "cuda", None)
    assert _native._load_cuda.__wrapped__() == "this torch is built without CUDA"
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert _native._load_cuda.__wrapped__() == "torch sees no GPU"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(_native, "PACKAGE", tmp_path)
    reason = _native._load_cuda.__wrapped__()
    assert f"`HYPERSD_BUILD_CUDA=1 {INSTALL[1:]}" in reason and "\n" not in reason
    (tmp_path / "_CUDA.abi3.so").write_bytes(b"not a library")
    assert "_CUDA.abi3.so does not load" in _native._load_cuda.__wrapped__()
    assert "no C++ kernels" in _native._load.__wrapped__()  # the one is not taken for the other
    monkeypatch.setattr(_native, "_load_cuda", lambda: "")
    for capability, missing in (((8, 6), False), ((9, 0), False), ((10, 0), True), ((7, 5), True)):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda d, value=capability: value)
        assert bool(_native.cuda_missing.__wrapped__(device)) is missing


def test_without_triton_a_gpu_runs_the_cuda_kernels_or_says_why_not(monkeypatch):
    op, gpu = OPS["affine_step"], torch.device("cuda", 0)
    monkeypatch.setattr(_op, "triton_missing", lambda: "Triton is not installed")
    monkeypatch.setattr(_native, "cuda_missing", lambda device: "")
    assert op.choose(gpu) == ("cuda", "the kernel for cuda tensors")
    args = checks.smallest(op).inputs()
    args = (args["x"], args["eps_cond"], args["coef"], None, None, None)
    monkeypatch.setattr(op, "cuda", lambda *given: "the CUDA kernel")
    assert op._without_triton(*args) == "the CUDA kernel"
    monkeypatch.setattr(_native, "cuda_missing", lambda device: "no CUDA kernels")
    assert op.choose(gpu) == ("reference", "no CUDA kernels")
    assert torch.equal(op._without_triton(*args), op.reference(*args))


def test_a_build_without_a_compiler_is_one_line_and_no_failure(tmp_path):
    done = subprocess.run(
        [sys.executable, "setup.py", "-q", "build_ext", "--build-lib", str(tmp_path), "--build-temp", str(tmp_path)],
        cwd=ROOT, env=os.environ | {"CXX": "no-such-compiler"}, capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    said = [line for line in done.stderr.splitlines() if line.startswith("hypersd:")]
    assert done.returncode == 0
    assert len(said) == 1
    assert said[0].startswith("hypersd: no C++ kernels are built: no C++ compiler (no-such-compiler) is on PATH;")
    assert not list(tmp_path.rglob("*.so"))


def stand_in(path: Path, script: str) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(0o755)
    return str(path)


def build(folder: Path, python: list[str], **environment: str) -> list[str]:
    """What is said as `python` runs setup.py in a copy of the checkout in `folder`, by a compiler that only makes the
    files it is asked for."""
    for path in [ROOT / name for name in ("setup.py", "pyproject.toml", "README.md", "hypersd/__init__.py")] + [
        *(ROOT / "csrc").rglob("*.*"), ROOT / "hypersd/kernels/_native.py"
    ]:  # fmt: skip
        copy = folder / path.relative_to(ROOT)
        copy.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(path, copy)
    compiler = stand_in(folder / "bin/c++", 'while [ $# -gt 0 ]; do [ "$1" != -o ] || : > "$2"; shift; done')
    done = subprocess.run(
        [sys.executable, *python], cwd=folder, env=os.environ | {"CXX": compiler, "CC": compiler} | environment,
        capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stderr.splitlines()


@pytest.mark.skipif(sys.platform != "linux", reason="CUDA kernels are built on Linux")
def test_a_failing_nvcc_costs_the_cuda_kernels_alone(tmp_path):
    stand_in(tmp_path / "cuda/bin/nvcc", "exit 1")
    (tmp_path / "cuda/include").mkdir()
    (tmp_path / "cuda/include/cuda_runtime_api.h").touch()
    toolkit = {"HYPERSD_BUILD_CUDA": "1", "CUDA_HOME": str(tmp_path / "cuda")}
    said = build(tmp_path / "copy", ["setup.py", "-q", "build_ext", "--inplace"], **toolkit)
    assert [path.name for path in (tmp_path / "copy/hypersd").glob("*.so")] == ["_C.abi3.so"]
    assert sum("nvcc failed on adamw_ema.cu: the CUDA kernels are left out" in line for line in said) == 1


ISOLATED = """
import runpy, setuptools, sys, sysconfig
packages = sysconfig.get_path("platlib")
sys.path = [path for path in sys.path if path not in (packages, sysconfig.get_path("purelib"))]
if sys.argv.pop() == "without torch":
    sysconfig.get_path = lambda name: "/nowhere"
sys.argv[0] = "setup.py"
runpy.run_path("setup.py", run_name="__main__")
"""


@pytest.mark.skipif(not Path(torch.__file__).is_relative_to(sysconfig.get_path("platlib")), reason="torch is elsewhere")
@pytest.mark.parametrize("torch_is", ["there", "without torch"])
def test_an_isolated_build_takes_the_torch_beside_its_interpreter(tmp_path, torch_is):
    said = build(tmp_path, ["-c", ISOLATED, "-q", "build_ext", "--inplace", torch_is], PYTHONPATH="")
    found = [path.name for path in (tmp_path / "hypersd").glob("*.so")]
    reasons = [line for line in said if line.startswith("hypersd: no C++ kernels are built: there is no torch >= 2.10")]
    assert (found, len(reasons)) == ((["_C.abi3.so"], 0) if torch_is == "there" else ([], 1))


POOL = """
#include <cstdint>
#include <stdexcept>
namespace torch::stable {
inline int64_t get_num_threads() { return 2; }
template <class F>
void parallel_for(int64_t begin, int64_t end, int64_t, const F& f) {  // as torch's: a code in place of the error
  try { f(begin, end); } catch (...) { throw std::runtime_error("the call failed"); }
}
}
"""
FAILING = """
#include "cpu/parallel.h"
#include <cstdio>
int main() {
  try {
    hypersd::on_threads(2, [](int64_t worker) { if (worker) throw std::runtime_error("the reason"); });
  } catch (const std::exception& error) { std::puts(error.what()); }
}
"""


@pytest.mark.skipif(shutil.which(os.environ.get("CXX", "c++")) is None, reason="no C++ compiler")
def test_an_error_of_a_thread_keeps_its_words(tmp_path):
    own = [path.name for path in (ROOT / "csrc/cpu").iterdir() if "stable::parallel_for(" in path.read_text()]
    assert own == ["parallel.h"]  # every kernel takes the form that is tested here
    header = tmp_path / "torch/csrc/stable/ops.h"
    header.parent.mkdir(parents=True)
    header.write_text(POOL)
    (tmp_path / "failing.cpp").write_text(FAILING)
    compiler = os.environ.get("CXX", "c++").split()[0]
    folders = ["-I", str(tmp_path), "-I", str(ROOT / "csrc")]
    command = [compiler, "-std=c++17", *folders, str(tmp_path / "failing.cpp"), "-o", str(tmp_path / "failing")]
    subprocess.run(command, check=True, timeout=120)
    assert subprocess.check_output([tmp_path / "failing"], text=True) == "the reason\n"


def test_explain_shows_the_choice():
    inputs = OPS["affine_step"].cases[0].inputs()
    said = str(explain(affine_step, **inputs))
    assert said.startswith("affine_step on cpu: ")
    assert "bytes   16,384" in said and "flops   6,144" in said and "no ceiling known for cpu" in said
