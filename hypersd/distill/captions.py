"""Pictures with captions on disk: a CSV or JSONL file, or a .txt beside each picture.

Every mismatch is an error that names the file and the line: training on a wrong pairing would look like training.
"""

from __future__ import annotations

import csv
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageOps

from hypersd.errors import HypersdError

PICTURES = (".png", ".jpg", ".jpeg", ".webp", ".bmp")
FILE_COLUMNS = ("file_name", "file", "filename", "image", "path")
TEXT_COLUMNS = ("text", "caption", "prompt")


def pairs(folder: str | Path, captions: str | Path | None = None) -> list[tuple[Path, str]]:
    """(picture, caption) for every picture under `folder`, sorted by path.

    `captions` is a .csv (columns file_name and text) or .jsonl (the same keys) file; without it, the only such file in
    the folder is taken, else a .txt of the same name beside each picture. A picture may have several captions.
    Raises HypersdError for a picture that is missing, a picture without a caption, an empty caption, missing columns.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise HypersdError(f"{folder} is not a folder with pictures")
    pictures = sorted(p for p in folder.rglob("*") if p.suffix.lower() in PICTURES and p.is_file())
    if not pictures:
        raise HypersdError(f"{folder} holds no pictures ({', '.join(PICTURES)})")
    if captions is None:
        found = sorted(p for p in folder.iterdir() if p.suffix.lower() in (".csv", ".jsonl"))
        if len(found) > 1:
            raise HypersdError(f"{folder} holds {found[0].name} and {found[1].name}; say which one has the captions")
        captions = found[0] if found else None
    if captions is None:
        return [(picture, _beside(picture)) for picture in pictures]
    table = Path(captions)
    result = []
    for where, name, text in _rows(table):
        picture = folder / name
        if not picture.is_file():
            raise HypersdError(f"{where}: no picture {name!r} in {folder}")
        if not text.strip():
            raise HypersdError(f"{where}: the caption of {name!r} is empty")
        result.append((picture, text.strip()))
    named = {picture.resolve() for picture, _ in result}
    for picture in pictures:
        if picture.resolve() not in named:
            raise HypersdError(f"{picture} has no caption: {table} does not name it; add a line or remove the picture")
    return sorted(result)


def read_picture(path: Path, resolution: int) -> np.ndarray:
    """uint8 (resolution, resolution, 3): the shorter side scaled to `resolution`, the middle cut out, upright as its
    EXIF says, transparency on white. Raises HypersdError when it cannot be read, or its range of values is unknown."""
    try:
        with Image.open(path) as opened:
            image: Image.Image = ImageOps.exif_transpose(opened)
            if image.mode.startswith("I;16"):  # whose values convert() would clip at 255
                image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
            if image.mode in ("I", "F"):
                raise HypersdError(f"{path} has pixels without a known range (mode {image.mode}); save it with 8 bits")
            if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
                image = image.convert("RGBA")
                image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
            image = image.convert("RGB")
            if image.size != (resolution, resolution):
                image = ImageOps.fit(image, (resolution, resolution), Image.Resampling.LANCZOS)
            return np.asarray(image)
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise HypersdError(f"{path} cannot be read as a picture: {error}") from None


def _beside(picture: Path) -> str:
    beside = picture.with_suffix(".txt")
    try:
        text = beside.read_text("utf-8-sig").strip()
    except FileNotFoundError:
        raise HypersdError(
            f"{picture} has no caption: neither a CSV or JSONL file in the folder nor {beside.name}"
        ) from None
    except (OSError, UnicodeDecodeError) as error:
        raise HypersdError(f"cannot read {beside}: {error}") from None
    if not text:
        raise HypersdError(f"{beside}: the caption is empty")
    return text


def _rows(table: Path) -> Iterator[tuple[str, str, str]]:
    """(file and line, picture name, caption) of a CSV or JSONL file."""
    if table.suffix.lower() not in (".csv", ".jsonl"):
        raise HypersdError(f"{table}: captions come from a .csv or .jsonl file, or .txt files beside the pictures")
    try:
        with open(table, encoding="utf-8-sig", newline="") as file:
            if table.suffix.lower() == ".csv":
                reader = csv.DictReader(file, strict=True)
                _column(f"{table} line 1", reader.fieldnames or [], FILE_COLUMNS)
                _column(f"{table} line 1", reader.fieldnames or [], TEXT_COLUMNS)
                for row in reader:
                    where = f"{table} line {reader.line_num}"
                    if None in row:  # where csv puts what has no column
                        raise HypersdError(f"{where}: more fields than columns; put captions with commas in quotes")
                    yield _pair(where, row)
            else:
                for number, line in enumerate(file, 1):
                    if not line.strip():
                        continue
                    where = f"{table} line {number}"
                    try:
                        row = json.loads(line)
                    except json.JSONDecodeError as error:
                        raise HypersdError(f"{where}: not valid JSON: {error.msg}") from None
                    if not isinstance(row, dict):
                        raise HypersdError(f"{where}: not an object with file_name and text")
                    yield _pair(where, row)
    except FileNotFoundError:
        raise HypersdError(f"no caption file {table}") from None
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise HypersdError(f"cannot read {table}: {error}") from None


def _pair(where: str, row: dict[str, Any]) -> tuple[str, str, str]:
    name, text = (row[_column(where, row, names)] for names in (FILE_COLUMNS, TEXT_COLUMNS))
    if not isinstance(name, str) or not isinstance(text, str):
        raise HypersdError(f"{where}: needs a picture's file name and its caption, found {name!r} and {text!r}")
    return where, name, text


def _column(where: str, columns: Any, names: tuple[str, ...]) -> str:
    for name in names:
        if name in columns:
            return name
    raise HypersdError(f"{where}: no {names[0]!r} among {list(columns)} (also allowed: {', '.join(names[1:])})")
