from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from hypersd.distill.instances import CocoInstances
from hypersd.errors import HypersdError


def packed(counts: list[int]) -> str:
    """COCO's compressed counts, written from its description on its own: differences from the fourth on, five bits a
    character, least first, 32 where more follow, until what is left is the sign alone."""
    text = ""
    for i, count in enumerate(counts):
        value = count - counts[i - 2] if i > 2 else count
        while True:
            bits, value = value & 31, value >> 5
            more = value != (-1 if bits & 16 else 0)
            text += chr(bits + 48 + (32 if more else 0))
            if not more:
                break
    return text


def runs(mask: np.ndarray) -> list[int]:
    """Lengths of 0 and 1 in turn, column by column."""
    flat = mask.T.flatten()
    edges = np.flatnonzero(np.diff(flat.astype(int))) + 1
    lengths = np.diff(np.concatenate([[0], edges, [len(flat)]])).tolist()
    return ([0] if flat[0] else []) + lengths


def document(**changes: Any) -> dict[str, Any]:
    blob = np.zeros((40, 60), bool)
    blob[5:30, 12:50] = True
    blob[10:12, 20:22] = False
    square = [20.0, 8.0, 39.0, 8.0, 39.0, 27.0, 20.0, 27.0]
    annotations = [
        {"id": 1, "image_id": 7, "category_id": 18, "segmentation": [square]},
        {"id": 2, "image_id": 7, "category_id": 1, "segmentation": {"size": [40, 60], "counts": runs(blob)}},
        {"id": 3, "image_id": 7, "category_id": 90, "segmentation": {"size": [40, 60], "counts": packed(runs(blob))}},
        {"id": 4, "image_id": 7, "category_id": 1, "iscrowd": 1, "segmentation": [square]},
        {"id": 5, "image_id": 7, "category_id": 1, "segmentation": [[0.0, 0.0, 4.0, 0.0, 4.0, 30.0, 0.0, 30.0]]},
    ]
    images = [{"id": 7, "file_name": "a.jpg", "width": 60, "height": 40}, {"id": 8, "file_name": "b.jpg"}]
    return {"images": images, "annotations": annotations, "categories": [{"id": i} for i in (90, 1, 18)]} | changes


def write(folder: Path, content: Any) -> Path:
    path = folder / "instances.json"
    path.write_text(json.dumps(content))
    return path


def test_instances_are_cut_as_the_pictures_are(tmp_path: Path) -> None:
    """60 x 40 cut to its middle 40 x 40: columns 10 to 50. The object at the left edge is cut away, crowds are left
    out, labels are places in the ascending order of ids."""
    found = CocoInstances(write(tmp_path, document()), [Path("x/a.jpg"), Path("y/a.jpg")], 40)[1]
    assert found.labels.tolist() == [1, 0, 2] and found.masks.shape == (3, 40, 40)
    square = torch.zeros(40, 40, dtype=torch.bool)
    square[8:28, 10:30] = True
    assert torch.equal(found.masks[0], square)
    blob = torch.zeros(40, 40, dtype=torch.bool)
    blob[5:30, 2:40] = True
    blob[10:12, 10:12] = False
    assert torch.equal(found.masks[1], blob) and torch.equal(found.masks[2], blob)
    small = CocoInstances(write(tmp_path, document()), [Path("a.jpg")], 20)[0]
    assert torch.equal(small.masks[0], square[::2, ::2])


def test_a_picture_without_instances(tmp_path: Path) -> None:
    content = document()
    content["images"][1] |= {"width": 30, "height": 30}
    found = CocoInstances(write(tmp_path, content), [Path("b.jpg")], 16)[0]
    assert found.labels.shape == (0,) and found.masks.shape == (0, 16, 16) and found.masks.dtype == torch.bool


def test_what_is_wrong_is_said(tmp_path: Path) -> None:
    with pytest.raises(HypersdError, match="does not name c.jpg"):
        CocoInstances(write(tmp_path, document()), [Path("c.jpg")], 16)
    with pytest.raises(HypersdError, match="is not COCO's JSON of instances: 'categories' is missing"):
        CocoInstances(write(tmp_path, {"images": []}), [], 16)
    with pytest.raises(HypersdError, match="cannot read"):
        CocoInstances(tmp_path / "none.json", [], 16)
    bad = document(annotations=[{"id": 9, "image_id": 7, "category_id": 1, "segmentation": {"size": [40, 60]}}])
    with pytest.raises(HypersdError, match="annotation 9 cannot be drawn"):
        CocoInstances(write(tmp_path, bad), [Path("a.jpg")], 16)[0]
