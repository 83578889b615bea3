"""How the process gets its memory on a CPU."""

from __future__ import annotations

import ctypes
import os

_TRIM_THRESHOLD, _TOP_PAD, _MMAP_MAX = -1, -2, -4  # mallopt(3)


def keep_freed_memory() -> bool:
    """Let freed memory serve the next request; True where that was done, which takes glibc.

    By default glibc maps every large tensor anew and gives it back when it dies, so that each step of a training or a
    decoder touches all of its pages for the first time: faults that cost more than many an operator. From here on the
    heap only grows, and is used again. It belongs to a process of one's own, such as the commands; whoever has chosen
    otherwise by MALLOC_* or GLIBC_TUNABLES keeps what was chosen.
    """
    chosen = any(name.startswith("MALLOC_") for name in os.environ) or "malloc" in os.environ.get("GLIBC_TUNABLES", "")
    mallopt = None if chosen or os.name != "posix" else getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None:
        return False
    return all([mallopt(_MMAP_MAX, 0), mallopt(_TRIM_THRESHOLD, -1), mallopt(_TOP_PAD, 64 << 20)])
