"""Checkpoints: one safetensors file whose metadata holds the rest of the state as JSON and a checksum of the tensors.

One file, renamed into place, is either the old checkpoint or the new one; there is no in-between to clean up.
"""

from __future__ import annotations

import json
import zlib
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from hypersd.errors import HypersdError
from hypersd.files import atomic_write

FORMAT = 1


def save_checkpoint(path: str | Path, tensors: dict[str, Tensor], state: dict[str, Any]) -> None:
    """Write `tensors` and the JSON-able `state`. Raises HypersdError when it cannot; the old file is then intact."""
    held = {name: tensor.detach().to("cpu").contiguous() for name, tensor in tensors.items()}
    metadata = {"format": str(FORMAT), "state": json.dumps(state), "crc32": str(_checksum(held))}
    atomic_write(path, lambda temporary: save_file(held, temporary, metadata))


def load_checkpoint(path: str | Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """(tensors, state). Raises HypersdError for a file that is missing, truncated, altered, or not a checkpoint."""
    path = Path(path)
    try:
        with safe_open(path, "pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name).clone() for name in file.keys()}
    except FileNotFoundError:
        raise HypersdError(f"no checkpoint {path}; start without resume") from None
    except (SafetensorError, RuntimeError, OSError) as error:
        raise HypersdError(f"checkpoint {path} is damaged or cut short: {error}; remove it and start again") from None
    try:
        if int(metadata["format"]) != FORMAT:
            raise HypersdError(f"checkpoint {path} has format {metadata['format']}, this version reads {FORMAT}")
        state, checksum = json.loads(metadata["state"]), int(metadata["crc32"])
    except (KeyError, ValueError):
        raise HypersdError(f"{path} is not a checkpoint of a distillation run") from None
    if checksum != _checksum(tensors):
        raise HypersdError(f"checkpoint {path} is damaged: its checksum does not fit; remove it and start again")
    return tensors, state


def _checksum(tensors: dict[str, Tensor]) -> int:
    value = 0
    for name in sorted(tensors):
        data = tensors[name].flatten().view(torch.uint8).numpy().data
        value = zlib.crc32(data, zlib.crc32(name.encode(), value))
    return value
