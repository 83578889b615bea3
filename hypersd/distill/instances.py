"""The instances in a folder's pictures, from COCO's JSON, cut and scaled as the pictures are.

Segmentations may be polygons or run-length counts, as a list or as COCO's compressed text. Labels are the places of the
category ids in ascending order, which is how models of COCO's 80 classes number them.
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageOps

from hypersd.errors import HypersdError
from hypersd.models.rewards import Instances

SMALLEST = 16  # pixels; an object with fewer left after the cut is no longer asked for


class CocoInstances:
    """`instances[i]` of the i-th of `pictures`, at `resolution` pixels a side. Crowds are left out.

    Raises HypersdError for a file that cannot be read or is of another form, and for a picture it does not name.
    """

    def __init__(self, path: str | Path, pictures: Sequence[Path], resolution: int) -> None:
        self.path, self.resolution = Path(path), resolution
        try:
            document = json.loads(self.path.read_text("utf-8"))
            images = {entry["file_name"]: entry for entry in document["images"]}
            order = sorted(entry["id"] for entry in document["categories"])
            self._label = {category: place for place, category in enumerate(order)}
            self._of: dict[int, list[dict[str, Any]]] = defaultdict(list)
            for entry in document["annotations"]:
                if not entry.get("iscrowd"):
                    self._of[entry["image_id"]].append(entry)
        except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
            raise HypersdError(f"cannot read {self.path}: {error}") from None
        except (KeyError, TypeError) as error:
            raise HypersdError(f"{self.path} is not COCO's JSON of instances: {error} is missing") from None
        for picture in pictures:
            if picture.name not in images:
                raise HypersdError(
                    f"{self.path} does not name {picture.name}; structure needs every picture's instances"
                )
        self._images = [images[picture.name] for picture in pictures]

    def __getitem__(self, index: int) -> Instances:
        image = self._images[index]
        size = (int(image["width"]), int(image["height"]))
        labels, masks = [], []
        for entry in self._of[image["id"]]:
            try:
                drawn = _draw(entry["segmentation"], size)
                label = self._label[entry["category_id"]]
            except (KeyError, ValueError, TypeError, IndexError) as error:
                raise HypersdError(
                    f"{self.path}: annotation {entry.get('id')} cannot be drawn ({type(error).__name__}: {error})"
                ) from None
            target = (self.resolution, self.resolution)
            mask = np.asarray(ImageOps.fit(drawn, target, Image.Resampling.BILINEAR)) >= 128  # as read_picture cuts
            if mask.sum() >= SMALLEST:
                labels.append(label)
                masks.append(mask)
        shape = (0, self.resolution, self.resolution)
        return Instances(
            torch.tensor(labels, dtype=torch.long),
            torch.from_numpy(np.stack(masks) if masks else np.zeros(shape, bool)),
        )


def _draw(segmentation: Any, size: tuple[int, int]) -> Image.Image:
    """A picture of 0 and 255. size: (width, height)."""
    if isinstance(segmentation, Mapping):
        height, width = segmentation["size"]
        counts = segmentation["counts"]
        counts = _unpack(counts) if isinstance(counts, str) else counts
        values = np.repeat(np.arange(len(counts)) % 2, counts)  # runs of 0 and 1 in turn, column by column
        return Image.fromarray((values.reshape(width, height).T * 255).astype(np.uint8))
    canvas = Image.new("L", size)
    for polygon in segmentation:
        ImageDraw.Draw(canvas).polygon([float(value) for value in polygon], fill=255)
    return canvas


def _unpack(text: str) -> list[int]:
    """COCO's compressed counts: five bits a character from 48 on, the sixth says that more follow, least first, the
    last one's fifth bit is the sign; from the fourth on, counts are differences to the one two places before."""
    counts: list[int] = []
    value = shift = 0
    for character in text:
        bits = ord(character) - 48
        value |= (bits & 31) << shift
        shift += 5
        if not bits & 32:
            if bits & 16:
                value -= 1 << shift
            counts.append(value + (counts[-2] if len(counts) > 2 else 0))
            value = shift = 0
    return counts
