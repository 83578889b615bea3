"""Finds and loads the C++ kernels, `hypersd/_C.*so`, and the CUDA C++ ones, `hypersd/_CUDA.*so` (libtorch stable ABI).

Without the first every op runs its reference on a CPU; without the second GPUs run Triton.

`HYPERSD_NATIVE=0` leaves them out; `HYPERSD_ISA=baseline|avx2|avx512|amx` caps the instruction set they use;
`HYPERSD_NATIVE_FOLDER` names another folder to take them from, such as a build with sanitizers.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any, TypeVar, cast

import torch

F = TypeVar("F", bound=Callable[..., Any])

PACKAGE = Path(__file__).resolve().parent.parent
ISA_LEVELS = ("baseline", "avx2", "avx512", "amx")


def _is_checkout() -> bool:
    """Whether the sources of the libraries lie beside the package: a folder csrc alone could be anybody's."""
    return (PACKAGE.parent / "setup.py").is_file() and (PACKAGE.parent / "csrc").is_dir()


def _build_command() -> str:
    if _is_checkout():
        return "python setup.py build_ext --inplace"
    return "pip install --no-build-isolation --force-reinstall --no-deps PATH_OF_THE_CHECKOUT"


def fingerprint(folder: Path) -> str:
    """Of the C++ sources; the build puts it into the library, so that a stale one is noticed.

    csrc/ is that of the CPU library; csrc/cuda/, which has one of its own, does not count there.
    """
    digest = hashlib.sha256()
    for path in sorted(folder.rglob("*")):
        if path.suffix in {".cpp", ".cu", ".h"} and "cuda" not in path.relative_to(folder).parts:
            digest.update(path.relative_to(folder).as_posix().encode() + b"\0" + path.read_bytes())
    return f"hypersd sources {digest.hexdigest()[:16]}"


def _stale(library: Path, folder: str, command: str) -> str:
    """Why a library must not be loaded that was built from other sources than those beside it: its operators may take
    other arguments. Empty where there are no sources, as in a wheel."""
    if not _is_checkout() or fingerprint(PACKAGE.parent / folder).encode() in library.read_bytes():
        return ""
    return f"{library.name} was built from other sources than {folder}/ has now; rebuild it with `{command} --force`"


@cache
def _load() -> str:
    """Load the library once; return why there is none, or the empty string."""
    if os.environ.get("HYPERSD_NATIVE") == "0":
        return "switched off by HYPERSD_NATIVE=0"
    cap = os.environ.get("HYPERSD_ISA")
    if cap and cap not in ISA_LEVELS:
        return f"HYPERSD_ISA: got {cap!r}, expected one of {ISA_LEVELS}"
    folder = Path(os.environ.get("HYPERSD_NATIVE_FOLDER") or PACKAGE)
    found, command = sorted([*folder.glob("_C.*so"), *folder.glob("_C.*pyd")]), _build_command()
    if not found:
        return f"no C++ kernels beside {folder.name}/; build them with `{command}` (needs a C++17 compiler)"
    stale = _stale(found[0], "csrc", command)
    if stale:
        return stale
    try:
        torch.ops.load_library(str(found[0]))
    except OSError as error:
        reason = str(error.__cause__ or error).splitlines()[0]
        return f"{found[0].name} does not load ({reason}); rebuild it with `{command}`"
    _set_isa(-2)
    return ""


def available() -> bool:
    """Whether the C++ kernels are loaded (loads them on the first call)."""
    return not _load()


def status() -> str:
    """One line for `explain` and `hypersd doctor`: which C++ kernels run, or why none do."""
    reason = _load()
    return reason or f"loaded ({isa()})"


_BY_ISA: list[Any] = []
_isa = ""  # in use, once the library is loaded; plain, as torch.compile reads it


def cache_by_isa(function: F) -> F:
    """functools.cache for what depends on the instruction set in use: forgotten when `isa` switches it."""
    cached = cache(function)
    _BY_ISA.append(cached)
    return cast(F, cached)


def isa(force: str | None = None) -> str:
    """The instruction set in use. `force` switches it (for tests); what the CPU lacks raises ValueError."""
    if not available():
        raise RuntimeError(f"no C++ kernels: {_load()}")
    if force is not None and force not in (*ISA_LEVELS, "auto"):
        raise ValueError(f"isa: got {force!r}, expected one of {(*ISA_LEVELS, 'auto')}")
    if force is not None:
        _set_isa(-1 if force == "auto" else ISA_LEVELS.index(force))
        for cached in _BY_ISA:
            cached.cache_clear()
    if force not in (None, "auto", _isa):
        raise ValueError(f"isa: this CPU has no {force}; the widest it has is {_isa}")
    return _isa


def _set_isa(level: int) -> None:
    """Use that of `level`, at most; -1: the widest, -2: the one in use."""
    global _isa
    _isa = ISA_LEVELS[int(torch.ops.hypersd._native_isa(level))]


@cache
def _load_cuda() -> str:
    """Load the CUDA library once; return why there is none, or the empty string."""
    if os.environ.get("HYPERSD_NATIVE") == "0":
        return "switched off by HYPERSD_NATIVE=0"
    if torch.version.cuda is None:
        return "this torch is built without CUDA"
    if not torch.cuda.is_available():
        return "torch sees no GPU"
    found, command = sorted(PACKAGE.glob("_CUDA.*so")), f"HYPERSD_BUILD_CUDA=1 {_build_command()}"
    if not found:
        return f"no CUDA kernels beside {PACKAGE.name}/; build them with `{command}` (needs nvcc)"
    stale = _stale(found[0], "csrc/cuda", command)
    if stale:
        return stale
    try:
        torch.ops.load_library(str(found[0]))
    except OSError as error:
        reason = str(error.__cause__ or error).splitlines()[0]
        return f"{found[0].name} does not load ({reason}); rebuild it with `{command}`"
    return ""


@cache
def cuda_missing(device: torch.device) -> str:
    """Why the CUDA C++ kernels cannot run on `device`; empty when they can (loads them on the first call)."""
    if device.type != "cuda":
        return "CUDA kernels run on a GPU"
    reason = _load_cuda()
    if reason:
        return reason
    major, minor = torch.cuda.get_device_capability(device)
    built = major == 8 or (major, minor) == (9, 0)  # machine code for sm_80 runs on 8.x, that for sm_90a on 9.0 alone
    return "" if built else f"the CUDA kernels are built for compute capability 8.x and 9.0, not {major}.{minor}"


def cuda_status() -> str:
    """One line for `hypersd doctor`: whether the CUDA C++ kernels can run, or why not."""
    reason = _load_cuda() or cuda_missing(torch.device("cuda", torch.cuda.current_device()))
    return reason or "loaded"


@cache_by_isa
def lora_dtypes() -> tuple[torch.dtype, ...]:
    """What the C++ kernel of LoRA layers computes with the instructions in use: float32, bfloat16, or nothing."""
    known = int(torch.ops.hypersd._lora_rows_dtypes()) if available() else 0
    return tuple(dtype for bit, dtype in enumerate((torch.float32, torch.bfloat16)) if known >> bit & 1)


def cpu_kind() -> str:
    """Folder of kernels/configs for CPUs like this: cpu_amx where the C++ kernels use a tile unit, else cpu."""
    return "cpu_amx" if _isa == "amx" else "cpu"
