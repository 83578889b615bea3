from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from hypersd.distill.captions import pairs, read_picture
from hypersd.errors import HypersdError


def picture(path: Path, size: tuple[int, int] = (8, 8), color: tuple[int, ...] = (255, 0, 0)) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB" if len(color) == 3 else "RGBA", size, color).save(path)
    return path


def problem(*args: object) -> str:
    with pytest.raises(HypersdError) as caught:
        pairs(*args)  # type: ignore[arg-type]
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_three_kinds_of_captions(tmp_path: Path) -> None:
    a, b = picture(tmp_path / "a.png"), picture(tmp_path / "sub" / "b.JPG")
    (tmp_path / "a.txt").write_text("\ufeffa fox\n", "utf-8")
    b.with_suffix(".txt").write_text("a hen")
    expected = [(a, "a fox"), (b, "a hen")]
    assert pairs(tmp_path) == expected
    (tmp_path / "captions.csv").write_text('caption,image\n"a fox",a.png\na hen,sub/b.JPG\n')
    assert pairs(tmp_path) == expected
    other = tmp_path / "sub" / "other.jsonl"
    other.write_text('{"file_name": "sub/b.JPG", "text": "a hen"}\n\n{"file_name": "a.png", "text": "a fox"}\n')
    assert pairs(tmp_path, other) == expected


def test_csv_with_line_breaks_and_several_captions(tmp_path: Path) -> None:
    a = picture(tmp_path / "a.png")
    (tmp_path / "x.csv").write_text('\ufefffile_name,text,extra\na.png,"a fox,\nred",1\na.png,a dog,2\n', "utf-8")
    assert pairs(tmp_path) == [(a, "a dog"), (a, "a fox,\nred")]


def test_mismatches_name_file_and_line(tmp_path: Path) -> None:
    assert "holds no pictures" in problem(tmp_path)
    assert "is not a folder" in problem(tmp_path / "nowhere")
    picture(tmp_path / "a.png")
    assert "a.png has no caption: neither a CSV or JSONL file in the folder nor a.txt" in problem(tmp_path)
    (tmp_path / "a.txt").write_text(" \n")
    assert "a.txt: the caption is empty" in problem(tmp_path)
    table = tmp_path / "c.csv"
    table.write_text("name,words\na.png,x\n")
    assert "c.csv line 1: no 'file_name' among ['name', 'words']" in problem(tmp_path)
    table.write_text("file_name,words\na.png,x\n")
    assert "c.csv line 1: no 'text' among" in problem(tmp_path)
    table.write_text("file_name,text\na.png,x\nb.png,y\n")
    assert "c.csv line 3: no picture 'b.png'" in problem(tmp_path)
    table.write_text("file_name,text\na.png\n")
    assert "c.csv line 2: needs a picture's file name and its caption, found 'a.png' and None" in problem(tmp_path)
    table.write_text("file_name,text\na.png,a fox, red\n")
    assert "c.csv line 2: more fields than columns; put captions with commas in quotes" in problem(tmp_path)
    table.write_text("file_name,text\na.png,  \n")
    assert "c.csv line 2: the caption of 'a.png' is empty" in problem(tmp_path)
    table.write_text("file_name,text\na.png,x\n")
    picture(tmp_path / "b.png")
    assert "b.png has no caption" in problem(tmp_path) and "c.csv does not name it" in problem(tmp_path)
    (tmp_path / "d.jsonl").write_text('{"file_name": "a.png", "text": "x"}\n{"file_name": "b.png", text}\n')
    assert "holds c.csv and d.jsonl" in problem(tmp_path)
    assert "d.jsonl line 2: not valid JSON" in problem(tmp_path, tmp_path / "d.jsonl")
    (tmp_path / "d.jsonl").write_text("[1]\n")
    assert "d.jsonl line 1: not an object" in problem(tmp_path, tmp_path / "d.jsonl")
    (tmp_path / "d.jsonl").write_text('{"file_name": "a.png", "label": "x"}\n')
    assert "d.jsonl line 1: no 'text' among" in problem(tmp_path, tmp_path / "d.jsonl")
    (tmp_path / "d.jsonl").write_bytes(b"\xff\xfe\n")
    assert "cannot read" in problem(tmp_path, tmp_path / "d.jsonl")
    assert "no caption file" in problem(tmp_path, tmp_path / "e.csv")
    assert "captions come from a .csv or .jsonl" in problem(tmp_path, tmp_path / "a.txt")


def test_read_picture(tmp_path: Path) -> None:
    wide = np.zeros((10, 30, 3), np.uint8)
    wide[:, 10:20] = 200
    Image.fromarray(wide).save(tmp_path / "wide.png")
    assert np.all(read_picture(tmp_path / "wide.png", 10) == 200)  # the middle, not a squeeze
    clear = picture(tmp_path / "clear.png", color=(10, 20, 30, 0))
    assert np.all(read_picture(clear, 4) == 255) and read_picture(clear, 4).shape == (4, 4, 3)
    exif = Image.Exif()
    exif[0x0112] = 6  # lies on its side
    upright = np.zeros((16, 8, 3), np.uint8)
    upright[8:] = 255
    Image.fromarray(np.rot90(upright).copy()).save(tmp_path / "side.png", exif=exif)
    square = read_picture(tmp_path / "side.png", 8)
    assert square[0].mean() < 5 and square[-1].mean() > 250
    deep = np.linspace(0, 65535, 64).astype(np.uint16).reshape(8, 8)
    for name in ("deep.png", "deep.tif"):
        Image.fromarray(deep).save(tmp_path / name)
        assert np.array_equal(read_picture(tmp_path / name, 8), np.repeat(deep[:, :, None] >> 8, 3, axis=2))
    for mode in ("I", "F"):
        Image.new(mode, (8, 8), 300).save(tmp_path / "wide.tif")
        with pytest.raises(HypersdError, match=rf"wide.tif has pixels without a known range \(mode {mode}\)"):
            read_picture(tmp_path / "wide.tif", 8)
    (tmp_path / "broken.png").write_bytes((tmp_path / "wide.png").read_bytes()[:60])
    with pytest.raises(HypersdError, match="broken.png cannot be read as a picture"):
        read_picture(tmp_path / "broken.png", 8)
