"""Small networks that look at scenes, each standing for one that users have for real pictures:

- an image-text dual encoder (for CLIP), `alignment`;
- a preference head trained on clean against degraded pictures (for an aesthetic predictor), `preference`;
- a SOLO instance segmenter (Wang et al. 2020), `segment` and `structure_loss`; the best cell of a class says
  whether that object is there, `objects`;
- pooled features for distances between sets of pictures, `features`.

There are two sets, "reward" and "judge", of different width, seed and training scenes: what is optimised as a reward
never judges. Both load from float16 safetensors.
"""

from __future__ import annotations

from functools import cache

import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor, nn

from hypersd.emoji import tokens
from hypersd.emoji.atlas import names
from hypersd.emoji.scenes import BACKGROUNDS, SIZE
from hypersd.emoji.weights import FOLDER
from hypersd.models.solo import dice_loss, focal_loss, positive_cells

GRID = 8  # SOLO's cells a side
HIDDEN = 20  # an object with fewer visible pixels is not asked for
EMBEDDING = 64
SETS = {"reward": {"wide": 96, "seed": 11, "stream": 101}, "judge": {"wide": 128, "seed": 12, "stream": 102}}


def _conv(inputs: int, outputs: int, stride: int = 1) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False), nn.GroupNorm(8, outputs), nn.SiLU())


class Residual(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.body = nn.Sequential(_conv(width, width), _conv(width, width))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.body(x)


class Evaluator(nn.Module):
    """Images are (N, 3, 64, 64) in [-1, 1] throughout; every method is differentiable in them."""

    def __init__(self, wide: int, width: int = 32) -> None:
        super().__init__()
        self.tokenizer = tokens.build()
        self.stem = nn.Sequential(_conv(3, width, 2), Residual(width))  # 32 x 32
        self.middle = nn.Sequential(_conv(width, 2 * width, 2), Residual(2 * width))  # 16 x 16
        self.top = nn.Sequential(_conv(2 * width, wide, 2), Residual(wide), Residual(wide))  # 8 x 8
        cells = nn.Conv2d(wide, len(names()), 1)
        nn.init.constant_(cells.bias, -4.6)  # type: ignore[arg-type]  # an empty cell's prior, as focal loss wants it
        self.category = nn.Sequential(_conv(wide, wide), cells)
        self.mask_top, self.mask_middle = nn.Conv2d(wide, 2 * width, 1), nn.Conv2d(2 * width, 2 * width, 1)
        self.mask = nn.Sequential(_conv(2 * width + 2, 2 * width), nn.Conv2d(2 * width, GRID * GRID, 1))
        self.ground = nn.Linear(2 * wide, len(BACKGROUNDS))
        self.image_embedding = nn.Linear(2 * wide, EMBEDDING)
        self.words = nn.Embedding(len(self.tokenizer), EMBEDDING)
        self.word_mix = nn.Sequential(
            nn.Linear(EMBEDDING, 2 * EMBEDDING), nn.SiLU(), nn.Linear(2 * EMBEDDING, EMBEDDING)
        )
        self.log_temperature = nn.Parameter(torch.tensor(2.0))
        self.taste = nn.Sequential(nn.Linear(2 * (2 * width + wide), 64), nn.SiLU(), nn.Linear(64, 1))

    def maps(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """The 16 x 16 and the 8 x 8 feature maps."""
        middle = self.middle(self.stem(images))
        return middle, self.top(middle)

    @staticmethod
    def pooled(x: Tensor) -> Tensor:
        """(N, 2 C): mean and deviation over places."""
        x = x.flatten(2).float()
        return torch.cat([x.mean(2), x.var(2, correction=0).add(1e-6).sqrt()], 1)

    def features(self, images: Tensor) -> Tensor:
        """(N, 2 wide): mean and deviation of the last feature map."""
        return self.pooled(self.maps(images)[1])

    def objects(self, images: Tensor) -> Tensor:
        """(N, 100) logits that each object is in the picture: the best cell of SOLO's category branch."""
        return self.category(self.maps(images)[1]).flatten(2).amax(2)

    def background(self, images: Tensor) -> Tensor:
        """(N, 10) logits of the background's colour."""
        return self.ground(self.features(images))

    def embed_images(self, features: Tensor) -> Tensor:
        return F.normalize(self.image_embedding(features), dim=-1)

    def embed_captions(self, captions: list[str]) -> Tensor:
        """(N, 64) unit vectors: the mean over words of each word's vector, then a small mixer."""
        ids = tokens.encode(self.tokenizer, captions).to(self.words.weight.device)
        real = (ids != self.tokenizer.eos_token_id)[..., None].to(self.words.weight.dtype)
        mean = (self.words(ids) * real).sum(1) / real.sum(1).clamp(min=1)
        return F.normalize(mean + self.word_mix(mean), dim=-1)

    def alignment(self, images: Tensor, captions: list[str]) -> Tensor:
        """(N,) cosine of picture and caption."""
        return (self.embed_images(self.features(images)) * self.embed_captions(captions)).sum(-1)

    def preference(self, images: Tensor) -> Tensor:
        """(N,) higher for clean, well-formed pictures."""
        middle, top = self.maps(images)
        return self.taste(torch.cat([self.pooled(middle), self.pooled(top)], 1))[:, 0]

    def segment_maps(self, middle: Tensor, top: Tensor) -> tuple[Tensor, Tensor]:
        """(N, 100, 8, 8) category logits and (N, 64, 32, 32) mask logits, one mask a cell."""
        joint = self.mask_middle(middle) + F.interpolate(self.mask_top(top), scale_factor=2, mode="nearest")
        axis = torch.linspace(-1, 1, joint.shape[-1], device=joint.device, dtype=joint.dtype)
        place = torch.stack(torch.meshgrid(axis, axis, indexing="ij")).expand(len(joint), -1, -1, -1)
        masks = self.mask(torch.cat([joint, place], 1))
        return self.category(top), F.interpolate(masks, scale_factor=2, mode="bilinear", align_corners=False)

    def segment(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Category and mask logits: see `segment_maps`."""
        return self.segment_maps(*self.maps(images))

    def structure_loss(self, images: Tensor, objects: list[tuple[int, ...]], masks: Tensor) -> Tensor:
        """SOLO's training loss against the scene's own instances; masks (N, 2, 64, 64) bool."""
        return solo_loss(*self.segment(images), objects, masks)


def solo_loss(category: Tensor, mask: Tensor, objects: list[tuple[int, ...]], masks: Tensor) -> Tensor:
    """Focal loss on the cells (gamma 2, alpha 0.25) and three times the dice loss on the masks of positive cells.

    A cell is positive for the instance whose mask has its centre of mass within one fifth of the box around it.
    """
    target, rows, cells, wanted = solo_targets(objects, masks, category.shape[1])
    focal = focal_loss(category, target.to(category), len(rows))
    return focal + 3 * dice_loss(mask[rows, cells].float(), wanted).mean() if len(rows) else focal


def solo_targets(objects: list[tuple[int, ...]], masks: Tensor, classes: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Category targets (N, classes, 8, 8); and of each positive cell its row, its number and its mask (32, 32)."""
    target = torch.zeros(len(objects), classes, GRID, GRID, device=masks.device)
    small = F.avg_pool2d(masks.float(), 2)
    visible = masks.sum((2, 3)).tolist()
    asked = [
        (row, slot) for row, items in enumerate(objects) for slot in range(len(items)) if visible[row][slot] >= HIDDEN
    ]
    rows, cells, slots = [], [], []
    found = positive_cells(masks[tuple(zip(*asked, strict=True))], GRID, (SIZE, SIZE)) if asked else []
    for (row, slot), (top, bottom, left, right) in zip(asked, found, strict=True):
        for v in range(top, bottom + 1):
            for u in range(left, right + 1):
                target[row, objects[row][slot], v, u] = 1
                rows.append(row)
                cells.append(v * GRID + u)
                slots.append(slot)
    index = torch.tensor([rows, cells, slots], dtype=torch.long, device=masks.device)
    return target, index[0], index[1], small[index[0], index[2]]


@cache
def load(name: str, device: str | torch.device = "cpu") -> Evaluator:
    """The shipped set "reward" or "judge", frozen, float32, on `device`; the same object for the same device."""
    if name not in SETS:
        raise ValueError(f"evaluator set is {name!r}; it must be one of {', '.join(SETS)}")
    model = Evaluator(SETS[name]["wide"])
    model.load_state_dict(load_file(FOLDER / "evaluators" / f"{name}.safetensors"))
    return model.float().eval().requires_grad_(False).to(device)
