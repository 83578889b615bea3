"""Shape sets: the named cases of the layers of real networks, as data (shapes/SET.json), one file a network.

A file holds the network's configuration and inputs, from which `python -m bench.census` counts its layers, and for each
operator that occurs there its cases: name, arguments of the operator's case maker, options.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

from hypersd.kernels._op import Case

SETS = ("emoji", "sd15", "sdxl", "sd3", "flux")
FOLDER = Path(__file__).parent / "shapes"


@cache
def read(name: str) -> dict[str, Any]:
    """The content of a set: "network", and "cases" by operator."""
    return json.loads((FOLDER / f"{name}.json").read_text("utf-8"))


def cases(op: str, make: Callable[..., Case]) -> tuple[Case, ...]:
    """The cases of `op` in all sets, named SET_NAME; `make` is its case maker."""
    return tuple(
        make(f"{name}_{row['name']}", *row["sizes"], **row.get("options", {}))
        for name in SETS
        for row in read(name)["cases"].get(op, ())
    )
