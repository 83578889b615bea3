"""The sprites: 100 Noto Color Emoji with alpha, packed in one PNG, named by Unicode.

`atlas.png` is a sheet of SPRITE x SPRITE tiles in the order of `NAMES`; `build()` made it from the font and the Unicode
emoji list (Debian packages fonts-noto-color-emoji and unicode-data):  python -m hypersd.emoji.atlas
"""

from __future__ import annotations

from functools import cache
from pathlib import Path

import numpy as np
from PIL import Image

SPRITE = 72
COLUMNS = 10
SHEET = Path(__file__).with_name("atlas.png")

GROUPS: dict[str, str] = {
    "animals": "🦊🐼🐸🐷🐵🦁🐯🐨🐰🐮🐔🐧🦉🦋🐝🐞🐢🐙🐠🐬🐳🦀🐌🦄🐘",
    "food": "🍎🍌🍇🍓🍉🍍🍋🍑🥑🥕🌽🍄🍔🍕🍩🍪🎂🍦🍿🥚🍞🧀🍣🥐",
    "faces": "😀😍😎😡😭🤖👻🎃💀👽🤡🤠",
    "people": "👮👷🎅👸🥷🧙",
    "objects": "🎈🎁🔑💡📷🎸🎺🥁📕⏰🔔🔨☂️👑💎⚽🏀🎩👟",
    "vehicles": "🚗🚌🚒🚜🚲🚀✈️⛵🚁🚂",
    "nature": "🌻🌹🌵🌲",
}
# Unicode names that read badly in a caption
RENAMED = {
    "smiling face with heart-eyes": "heart-eyed face",
    "smiling face with sunglasses": "face with sunglasses",
    "enraged face": "angry face",
    "pouting face": "angry face",
    "loudly crying face": "crying face",
    "cowboy hat face": "cowboy face",
    "clown face": "clown",
    "jack-o-lantern": "pumpkin",
    "rabbit face": "rabbit",
    "pig face": "pig",
    "cow face": "cow",
    "tiger face": "tiger",
    "monkey face": "monkey",
    "lady beetle": "ladybug",
    "honeybee": "bee",
    "spouting whale": "whale",
    "soft ice cream": "ice cream",
    "birthday cake": "cake",
    "ear of corn": "corn",
    "wrapped gift": "gift",
    "closed book": "red book",
    "running shoe": "shoe",
    "gem stone": "gem",
    "soccer ball": "football",
    "evergreen tree": "tree",
    "Santa Claus": "santa",
    "cheese wedge": "cheese",
    "oncoming bus": "bus",
}


@cache
def names() -> tuple[str, ...]:
    """The caption name of every sprite, in sheet order."""
    return tuple(SHEET.with_suffix(".txt").read_text(encoding="utf-8").split("\n"))


@cache
def sprites() -> np.ndarray:
    """(count, SPRITE, SPRITE, 4) uint8, straight alpha."""
    with Image.open(SHEET) as sheet:
        pixels = np.asarray(sheet.convert("RGBA"))
    tiles = pixels.reshape(pixels.shape[0] // SPRITE, SPRITE, COLUMNS, SPRITE, 4).swapaxes(1, 2)
    return np.ascontiguousarray(tiles.reshape(-1, SPRITE, SPRITE, 4)[: len(names())])


def _characters() -> list[str]:
    joined = "".join(GROUPS.values())
    out: list[str] = []
    for character in joined:
        if character == "\ufe0f":
            out[-1] += character
        else:
            out.append(character)
    return out


def build(
    font: str = "/usr/share/fonts/truetype/noto/NotoColorEmoji.ttf",
    table: str = "/usr/share/unicode/emoji/emoji-test.txt",
) -> None:
    """Render the sheet and its names. Needs the two Debian packages and Pillow with raqm."""
    from PIL import ImageDraw, ImageFont

    unicode_name: dict[str, str] = {}
    for line in Path(table).read_text(encoding="utf-8").splitlines():
        if "; fully-qualified" in line:
            points, rest = line.split(";", 1)
            name = rest.split("#", 1)[1].strip().split(" ", 2)[2]
            unicode_name["".join(chr(int(p, 16)) for p in points.split())] = name
    face = ImageFont.truetype(font, 109)
    characters = _characters()
    sheet = Image.new("RGBA", (COLUMNS * SPRITE, -(-len(characters) // COLUMNS) * SPRITE))
    labels = []
    for index, character in enumerate(characters):
        tile = Image.new("RGBA", (160, 160))
        ImageDraw.Draw(tile).text((12, 12), character, font=face, embedded_color=True)
        tile = tile.crop(tile.getbbox())
        side = max(tile.size)
        square = Image.new("RGBA", (side, side))
        square.paste(tile, ((side - tile.width) // 2, (side - tile.height) // 2))
        square = square.resize((SPRITE, SPRITE), Image.Resampling.LANCZOS)
        sheet.paste(square, ((index % COLUMNS) * SPRITE, (index // COLUMNS) * SPRITE))
        name = unicode_name[character]
        labels.append(RENAMED.get(name, name).lower())
    if len(set(labels)) != len(labels):
        raise ValueError(f"names repeat: {sorted(n for n in labels if labels.count(n) > 1)}")
    sheet.save(SHEET, optimize=True)
    SHEET.with_suffix(".txt").write_text("\n".join(labels), encoding="utf-8")


if __name__ == "__main__":
    build()
    print(len(names()), "sprites:", ", ".join(names()))
