from __future__ import annotations

import hashlib

import numpy as np
import pytest
from PIL import Image

from hypersd.emoji import scenes, tokens
from hypersd.emoji.atlas import SPRITE, names, sprites
from hypersd.emoji.scenes import BACKGROUNDS, SIZE, caption, is_heldout, render, render_caption


def test_the_atlas_has_a_hundred_distinct_sprites_with_alpha() -> None:
    assert len(names()) == len(set(names())) == 100
    assert sprites().shape == (100, SPRITE, SPRITE, 4)
    cover = (sprites()[..., 3] > 127).mean((1, 2))
    assert cover.min() > 0.1 and cover.max() < 1.0
    flat = sprites().reshape(100, -1).astype(np.float32)
    distance = np.linalg.norm(flat[:, None, ::7] - flat[None, :, ::7], axis=-1)
    assert distance[~np.eye(100, dtype=bool)].min() > 500


def test_scenes_are_a_function_of_seed_and_index() -> None:
    whole, tail = render(5, 6), render(5, 3, start=3)
    assert np.array_equal(whole.images[3:], tail.images) and whole.captions[3:] == tail.captions
    assert not np.array_equal(render(6, 1).images, whole.images[:1])
    assert np.array_equal(render(5, 6).images, whole.images)


def test_what_a_scene_shows_does_not_change_between_versions() -> None:
    """The committed weights and tables were made with these scenes."""
    text = "\n".join(render(0, 200).captions + render(0, 200, "heldout").captions)
    assert hashlib.sha256(text.encode()).hexdigest()[:16] == "35947720968a2af6"


@pytest.mark.parametrize("split", ["train", "heldout"])
def test_splits_share_no_scene(split: str) -> None:
    scenes = render(1, 300, split)
    for objects, background in zip(scenes.objects, scenes.background, strict=True):
        assert is_heldout(objects, int(background)) == (split == "heldout")
        assert is_heldout(objects[::-1], int(background)) == (split == "heldout")
    share = np.mean([len(objects) == 1 for objects in scenes.objects])
    assert 0.1 < share < 0.6


def test_an_unknown_split_is_refused() -> None:
    with pytest.raises(ValueError, match="split is 'test'"):
        render(0, 1, "test")


def test_captions_name_what_is_drawn() -> None:
    fox, apple = names().index("fox"), names().index("red apple")
    assert caption((fox, apple), 4) == "a fox and a red apple on a blue background"
    assert caption((names().index("owl"),), 1) == "an owl on an orange background"
    assert caption((names().index("unicorn"),), 9) == "a unicorn on a white background"


def test_masks_cover_what_differs_from_the_background() -> None:
    scenes = render(2, 40)
    for image, masks, background, objects in zip(
        scenes.images, scenes.masks, scenes.background, scenes.objects, strict=True
    ):
        assert not (masks[0] & masks[1]).any()
        assert masks[: len(objects)].any((1, 2)).all() and not masks[len(objects) :].any()
        colour = np.array(list(BACKGROUNDS.values())[background], dtype=np.float32)
        corner = image[~masks.any(0)].astype(np.float32)
        assert np.abs(np.median(corner, 0) - colour).max() < 0.35 * colour.max()


def test_a_mask_is_where_its_sprite_covers_more_than_half(monkeypatch: pytest.MonkeyPatch) -> None:
    """A white sprite on black shows how much it covers."""

    def silhouette(item: int) -> Image.Image:
        return Image.fromarray(
            np.concatenate([np.full((SPRITE, SPRITE, 3), 255, np.uint8), sprites()[item][..., 3:]], 2)
        )

    monkeypatch.setattr(scenes, "_sprite", silhouette)
    monkeypatch.setattr(scenes, "BACKGROUNDS", dict.fromkeys(BACKGROUNDS, (0, 0, 0)))
    for item in range(10):
        image, masks = scenes.draw((item,), 0, np.random.default_rng(item))
        assert np.array_equal(masks[0], image[..., 0] > 127) and not masks[1].any()


class Fixed:
    """Random numbers that are known: background, then size, tilt and flip; every place in the middle."""

    def __init__(self, *numbers: tuple[float, float, float]) -> None:
        self.numbers = iter(numbers)

    def random(self, shape: int | tuple[int, int]) -> np.ndarray:
        return np.array(next(self.numbers)) if shape == 3 else np.full(shape, 0.5)


def test_half_of_the_sprites_are_mirrored() -> None:
    def draw(flip: float) -> tuple[np.ndarray, np.ndarray]:
        return scenes.draw((0,), 3, Fixed((0.9, 0.0, 0.0), (0.375, 0.5, flip)))  # type: ignore[arg-type]  # 40 pixels

    (plain, mask), (mirrored, other) = draw(0.5), draw(0.49)
    assert not np.array_equal(plain, mirrored)
    assert np.array_equal(plain[:, ::-1], mirrored) and np.array_equal(mask[..., ::-1], other)


def test_one_caption_has_many_pictures() -> None:
    pictures = render_caption((0, 25), 3, seed=0, count=4)
    assert pictures.shape == (4, SIZE, SIZE, 3)
    assert min(np.abs(pictures[i].astype(int) - pictures[j]).mean() for i in range(4) for j in range(i)) > 5


def test_every_caption_is_in_the_vocabulary() -> None:
    tokenizer = tokens.build()
    everything = [caption((i, (i + 37) % 100), i % 10) for i in range(100)]
    ids = tokens.encode(tokenizer, [*everything, ""])
    assert ids.shape == (101, tokens.LENGTH)
    assert not (ids == tokenizer.unk_token_id).any()
    assert (ids[:, 0] == tokenizer.bos_token_id).all() and (ids[:, -1] == tokenizer.eos_token_id).all()
    assert (ids[-1, 1:] == tokenizer.eos_token_id).all()
    assert len(tokenizer) - 1 == tokenizer.eos_token_id  # CLIPTextModel pools at the highest id
