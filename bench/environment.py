"""Where a figure was taken: machine, versions, commit, date."""

from __future__ import annotations

import datetime
import importlib.metadata
import platform
import subprocess
from pathlib import Path

import torch


def _cpu_name() -> str:
    info = Path("/proc/cpuinfo")
    if info.is_file():
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "absent"


def _commit() -> str:
    command = ["git", "-C", str(Path(__file__).resolve().parent), "describe", "--always", "--dirty"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def _gpu_state() -> dict[str, str]:
    """Driver and clocks, as nvidia-smi says them; nothing where it is not there."""
    asked = {
        "driver": "driver_version",
        "sm_clock": "clocks.sm",
        "memory_clock": "clocks.mem",
        "sm_clock_max": "clocks.max.sm",
    }
    command = ["nvidia-smi", f"--query-gpu={','.join(asked.values())}", "--format=csv,noheader", "--id=0"]
    try:
        said = subprocess.run(command, capture_output=True, text=True, check=True, timeout=20).stdout
    except (OSError, subprocess.SubprocessError):
        return {}
    return dict(zip(asked, (value.strip() for value in said.split(",")), strict=False))


def environment(device: str = "cpu") -> dict[str, str | int]:
    """The stamp of a benchmark row."""
    gpu = torch.cuda.get_device_name() if device == "cuda" and torch.cuda.is_available() else ""
    capability = getattr(torch.backends.cpu, "get_cpu_capability", lambda: "")()
    return {
        "device": gpu or device,
        "cpu": f"{_cpu_name()} ({capability})",
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": str(torch.__version__),
        **{name: _version(name) for name in ("triton", "diffusers", "peft", "liger-kernel")},
        **(_gpu_state() if gpu else {}),
        "commit": _commit(),
        "date": datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%dT%H:%M:%SZ"),
    }
