"""Freed memory serves the next request, unless the user has chosen how malloc works."""

from __future__ import annotations

import os
import platform
import subprocess
import sys

import pytest

from hypersd.memory import keep_freed_memory

PROGRAM = """
import resource, torch
from hypersd.memory import keep_freed_memory
faults = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_minflt
assert keep_freed_memory()
for _ in range(16):
    torch.ones(16 << 20)  # 64 MiB; the heap grows
before = faults()
for _ in range(8):
    torch.ones(16 << 20)
print(faults() - before)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="mallopt is glibc's")
def test_large_tensors_are_not_mapped_anew() -> None:
    clean = {name: value for name, value in os.environ.items() if "MALLOC" not in name and name != "GLIBC_TUNABLES"}
    faults = int(subprocess.check_output([sys.executable, "-c", PROGRAM], env=clean, text=True))
    assert faults < (64 << 20) / os.sysconf("SC_PAGE_SIZE")  # of eight times as many pages


@pytest.mark.parametrize(
    ("name", "value"), [("MALLOC_ARENA_MAX", "2"), ("GLIBC_TUNABLES", "glibc.malloc.mmap_max=1000")]
)
def test_the_user_s_choice_stays(name: str, value: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(name, value)
    assert not keep_freed_memory()
