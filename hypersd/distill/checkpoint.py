"""Checkpoints: one safetensors file whose metadata holds the rest of the state as JSON and a checksum of the tensors.

One file, renamed into place, is either the old checkpoint or the new one; there is no in-between to clean up.
"""

from __future__ import annotations

import json
import os
import shutil
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
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


def keep_as(path: Path, other: Path) -> None:
    """Give the file a second name. It is only ever renamed over, never written into, so that a link will do; a
    copy where the file system has none."""
    if other.exists() and other.samefile(path):
        return
    link = other.with_name(f".{os.getpid()}-{other.name}")
    try:
        os.link(path, link)
    except OSError:
        atomic_write(other, lambda temporary: shutil.copyfile(path, temporary))
    else:
        os.replace(link, other)


def set_aside(path: Path) -> Path:
    """Rename a file to a name that nothing has yet (x.old.safetensors, x.old-2.safetensors, ...), and return that."""
    number, other = 1, path.with_suffix(f".old{path.suffix}")
    while other.exists():
        number += 1
        other = path.with_suffix(f".old-{number}{path.suffix}")
    return path.replace(other)


def load_checkpoint(path: str | Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """(tensors, state). Raises HypersdError for a file that is missing, truncated, altered, or not a checkpoint."""
    path = Path(path)
    with _opened(path) as file:
        metadata = file.metadata() or {}
        state = _state(path, metadata)
        tensors = {name: file.get_tensor(name).clone() for name in file.keys()}
    if metadata["crc32"] != str(_checksum(tensors)):
        raise HypersdError(f"checkpoint {path} is damaged: its checksum does not fit; remove it and start again")
    return tensors, state


def read_state(path: Path) -> dict[str, Any]:
    """The state alone, without the tensors. HypersdError as by load_checkpoint."""
    with _opened(path) as file:
        return _state(path, file.metadata() or {})


@contextmanager
def _opened(path: Path) -> Iterator[Any]:
    try:
        with safe_open(path, "pt") as file:
            yield file
    except FileNotFoundError:
        raise HypersdError(f"no checkpoint {path}; start without resume") from None
    except (SafetensorError, RuntimeError, OSError) as error:
        raise HypersdError(f"checkpoint {path} is damaged or cut short: {error}; remove it and start again") from None


def _state(path: Path, metadata: dict[str, str]) -> dict[str, Any]:
    try:
        if int(metadata["format"]) != FORMAT:
            raise HypersdError(f"checkpoint {path} has format {metadata['format']}, this version reads {FORMAT}")
        int(metadata["crc32"])
        return json.loads(metadata["state"])
    except (KeyError, ValueError):
        raise HypersdError(f"{path} is not a checkpoint of a distillation run") from None


def _checksum(tensors: dict[str, Tensor]) -> int:
    value = 0
    for name in sorted(tensors):
        data = tensors[name].flatten().view(torch.uint8).numpy().data
        value = zlib.crc32(data, zlib.crc32(name.encode(), value))
    return value
