"""Builds csrc/cpu with the address and undefined-behaviour sanitizers, then runs the operator tests on that build.

    python -m tests.kernels.sanitized [pytest options]        (`make sanitize`)

The build lies in build/sanitize. Each instruction set runs forward and backward of every small case in three dtypes,
then odd memory orders, random views and bad input. Before that two calls that must be caught show that it is armed.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
BUILD = ROOT / "build/sanitize"
TESTS = (
    "test_error_at_most_twice_eagers and cpu and (baseline or avx or amx)",
    "test_any_memory_order or test_strided_and_expanded or test_random_views or test_bad_arguments or test_lora_rows",
)
FILES = ("test_ops.py", "test_random_inputs.py", "test_bad_input.py", "test_lora_rows.py")
# a tensor that says it is longer than its memory, and one between two addresses that a float may have
ARMED = {
    "heap-buffer-overflow": "lying(block.data_ptr(), 4100)",
    "misaligned address": "lying(block.data_ptr() + 2, 4000)",
}
LIE = """
import torch
from hypersd.kernels import _native, clip_coefficient
assert _native.available(), _native.status()
block = torch.zeros(4096)
def lying(address, count):
    storage = torch._C._construct_storage_from_data_pointer(address, torch.device("cpu"), 4 * count)
    return torch.empty(0).set_(storage, 0, (count,), (1,))
clip_coefficient({tensor}, 1.0)
"""


def libraries() -> list[str]:
    """What must be in the process before anything else: the compiler's runtimes; empty where it has none."""
    compiler = os.environ.get("CXX", "c++").split()[0]
    found = []
    for name in ("libasan.so", "libubsan.so", "libstdc++.so"):
        try:
            said = subprocess.run([compiler, f"-print-file-name={name}"], capture_output=True, text=True, check=True)
        except (OSError, subprocess.CalledProcessError):
            return []
        found.append(said.stdout.strip())
    return found if all(os.path.isabs(path) for path in found) else []


def main(options: list[str]) -> int:
    preloaded = libraries()
    if not preloaded:
        print(f"sanitizers: skipped, {os.environ.get('CXX', 'c++')} is not there or has no libasan and libubsan")
        return 0
    folders = ["--build-lib", str(BUILD), "--build-temp", str(BUILD / "objects")]
    build = [sys.executable, "setup.py", "-q", "build_ext", *folders]
    subprocess.run(build, cwd=ROOT, env=os.environ | {"HYPERSD_SANITIZE": "address,undefined"}, check=True)
    environment = os.environ | {
        "LD_PRELOAD": " ".join(preloaded),
        "ASAN_OPTIONS": "detect_leaks=0",
        "UBSAN_OPTIONS": "print_stacktrace=1",
        "HYPERSD_NATIVE_FOLDER": str(BUILD / "hypersd"),
    }
    for said, tensor in ARMED.items():
        code = LIE.format(tensor=tensor)
        caught = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=environment, capture_output=True, text=True)
        if caught.returncode == 0 or said not in caught.stderr:
            print(f"sanitizers: {said} was not caught:\n{caught.stderr}")
            return 1
    for selection in TESTS:
        files = [str(ROOT / "tests/kernels" / name) for name in FILES]
        pytest = [sys.executable, "-m", "pytest", "-q", "-s", "-p", "no:cacheprovider"]
        command = [*pytest, *files, "-k", selection, *options]
        code = subprocess.run(command, cwd=ROOT, env=environment).returncode
        if code:
            return code
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
