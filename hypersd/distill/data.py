"""Training data: latents and prompt conditions, encoded once into safetensors shards and read by memory map.

Which samples a step sees depends on (seed, step) alone, so a resumed run goes on with exactly the samples it would have
seen.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from hypersd.distill.captions import pairs, read_picture
from hypersd.errors import HypersdError
from hypersd.files import atomic_write
from hypersd.models.load import Components, stamps
from hypersd.models.prompts import encode_images, encode_null, encode_prompts

Progress = Callable[[int, int | None], None]  # pictures encoded, pictures in all


@dataclass(frozen=True)
class Batch:
    """latents (B, C, H, W); cond: what the network takes beside x_t, each (B, ...). Floating tensors are float32
    (float64 where the dataset is). captions, and indices: the samples' numbers in the data set, int64 (B,)."""

    latents: Tensor
    cond: dict[str, Tensor]
    captions: list[str] = field(default_factory=list)
    indices: np.ndarray = field(default_factory=lambda: np.empty(0, np.int64))


class LatentDataset:
    """`shards`: dictionaries with "latents" (n, C, H, W) and one entry (n, ...) per condition; `captions`: one per
    sample;
    `uncond`: the conditions of the empty prompt, each (1, ...), without those that do not depend on the prompt."""

    def __init__(self, shards: list[dict[str, Tensor]], captions: list[str], uncond: dict[str, Tensor]) -> None:
        self.shards, self.captions, self.uncond = shards, captions, {k: _widen(v) for k, v in uncond.items()}
        self._starts = np.cumsum([0] + [len(shard["latents"]) for shard in shards])
        self._orders: dict[tuple[int, int], np.ndarray] = {}
        if len(self) == 0:
            raise HypersdError("the data set is empty; it needs at least one picture")
        if len(captions) != len(self):
            raise HypersdError(f"{len(captions)} captions for {len(self)} latents")

    def __len__(self) -> int:
        return int(self._starts[-1])

    @property
    def latent_size(self) -> tuple[int, int]:
        """(height, width) of the latents."""
        height, width = self.shards[0]["latents"].shape[-2:]
        return int(height), int(width)

    @property
    def fingerprint(self) -> str:
        """Equal for data sets of the same captions and latent shapes in the same order."""
        counts = [min(4096, len(self) - start) for start in range(0, len(self), 4096)]  # however the cache is cut
        each = {name: list(tensor.shape[1:]) for name, tensor in sorted(self.shards[0].items())}
        shapes = [{name: [count, *shape] for name, shape in each.items()} for count in counts]
        return hashlib.sha256(json.dumps([self.captions, shapes]).encode()).hexdigest()

    def rows(self, indices: np.ndarray) -> Batch:
        """The samples at `indices`, in that order."""
        shard_of = np.searchsorted(self._starts, indices, side="right") - 1
        parts: list[dict[str, Tensor]] = []
        for shard in np.unique(shard_of):
            local = torch.from_numpy(indices[shard_of == shard] - self._starts[shard])
            parts.append({name: _widen(tensor[local]) for name, tensor in self.shards[shard].items()})
        if len(parts) == 1:
            row = parts[0]
        else:  # back from shard order to the order asked for
            back = torch.from_numpy(np.argsort(np.argsort(shard_of, kind="stable")))
            row = {name: torch.cat([part[name] for part in parts])[back] for name in parts[0]}
        return Batch(row.pop("latents"), row, [self.captions[i] for i in indices], indices)

    def indices(self, step: int, batch_size: int, seed: int) -> np.ndarray:
        """Which samples batch number `step` holds: every epoch is a fresh permutation, drawn from (seed, epoch)."""
        where = np.arange(step * batch_size, (step + 1) * batch_size)
        epoch, offset = np.divmod(where, len(self))
        return np.concatenate([self._order(seed, int(e))[offset[epoch == e]] for e in np.unique(epoch)])

    def batch(self, step: int, batch_size: int, *, seed: int = 0, caption_dropout: float = 0.0) -> Batch:
        """Batch number `step`; a share `caption_dropout` of its samples has the empty prompt."""
        batch = self.rows(self.indices(step, batch_size, seed))
        if caption_dropout > 0:
            drop = np.random.default_rng((seed, step, 1)).random(batch_size) < caption_dropout
            mask = torch.from_numpy(drop)
            for name, empty in self.uncond.items():
                batch.cond[name][mask] = empty.to(batch.cond[name].dtype)
        return batch

    def _order(self, seed: int, epoch: int) -> np.ndarray:
        if (seed, epoch) not in self._orders:
            while len(self._orders) >= 8:  # whoever is trained in a stage goes through the data in its own order
                self._orders.pop(next(iter(self._orders)))
            self._orders[seed, epoch] = np.random.default_rng((seed, epoch, 0)).permutation(len(self))
        return self._orders[seed, epoch]

    @classmethod
    def open(cls, folder: str | Path, *, key: str | None = None) -> LatentDataset:
        """Open a cache. With `key`, the cache must have been made under that key. Raises HypersdError when there is no
        cache, or a file of it is damaged or missing."""
        folder = Path(folder)
        try:
            index = json.loads((folder / "index.json").read_text("utf-8"))
            if key is not None and index["key"] != key:
                raise HypersdError(
                    f"{folder} was made from other data, settings or weights of VAE or text encoders, or by an earlier "
                    "version; remove it to encode again"
                )
            shards, captions = [], []
            for entry in index["shards"]:
                tensors, metadata = _read(folder / entry["file"])
                names = json.loads(metadata["captions"])
                if not len(names) == entry["count"] == len(tensors["latents"]):
                    raise HypersdError(
                        f"{folder / entry['file']} is not the shard that index.json describes; remove {folder}"
                    )
                shards.append(tensors)
                captions += names
            return cls(shards, captions, _read(folder / "uncond.safetensors")[0])
        except FileNotFoundError as error:
            raise HypersdError(
                f"no data cache in {folder}: {Path(error.filename or 'a file').name} is missing"
            ) from None
        except (KeyError, TypeError, ValueError) as error:
            raise HypersdError(f"{folder}/index.json is damaged ({error}); remove {folder} to encode again") from None

    @classmethod
    def cached(cls, folder: str | Path, key: str) -> LatentDataset | None:
        """The cache that was made under `key`; None where there is none, or, as a line says then, no use of it."""
        try:
            return cls.open(folder, key=key)
        except HypersdError as error:
            if (Path(folder) / "index.json").exists():
                logging.getLogger("hypersd").warning("encoding again: %s", str(error).partition(";")[0])
            return None

    @classmethod
    def from_source(
        cls,
        source: Iterable[tuple[Any, list[str]]],
        components: Components,
        folder: str | Path,
        *,
        key: str = "",
        dtype: torch.dtype = torch.float16,
        shard_size: int = 4096,
        shard_bytes: int = 2**30,
        seed: int = 0,
        total: int | None = None,
        progress: Progress | None = None,
        device: str | torch.device | None = None,
    ) -> LatentDataset:
        """Encode (images, captions) batches with the model's VAE and text encoders into a cache under `folder`.

        images: uint8 (B, H, W, 3), or float (B, 3, H, W) in [-1, 1]. Nothing counts as written until the last file is:
        an interrupted encoding leaves no cache. `key` names what the cache was made from, see `open`. A shard ends
        with `shard_size` pictures or with `shard_bytes`, whichever comes first. VAE and text encoders are brought to
        `device` first (None: they are where they shall be), and text encoders loaded where there are none.
        """
        folder = Path(folder)
        (folder / "index.json").unlink(missing_ok=True)
        entries: list[dict[str, Any]] = []
        pending: list[dict[str, Tensor]] = []
        names: list[str] = []
        held = done = 0
        if not components.text_encoders:
            components.load_text_encoders()
        if device is not None:
            components.to(device, network=False)

        def flush() -> None:
            nonlocal held
            if not names:
                return
            tensors = {k: torch.cat([p[k] for p in pending]).contiguous() for k in pending[0]}
            file = f"shard-{len(entries):05d}.safetensors"
            metadata = {"captions": json.dumps(names)}
            atomic_write(folder / file, lambda path: save_file(tensors, path, metadata))
            entries.append({"file": file, "count": len(names)})
            pending.clear()
            names.clear()
            held = 0

        with torch.no_grad():
            for number, (images, captions) in enumerate(source):
                pixels = _pixels(images)
                if len(pixels) != len(captions):
                    raise HypersdError(
                        f"batch {number} of the source has {len(pixels)} images and {len(captions)} captions"
                    )
                generator = torch.Generator().manual_seed(_mix(seed, number))
                row = {
                    "latents": encode_images(components, pixels, generator),
                    **encode_prompts(components, list(captions)),
                }
                if "time_ids" in row:  # SDXL is told sizes: original, crop, target; integers, which 16 bits would round
                    height, width = pixels.shape[2:]
                    row["time_ids"] = torch.tensor([[height, width, 0, 0, height, width]]).repeat(len(captions), 1)
                pending.append({k: _narrow(v, dtype) for k, v in row.items()})
                names.extend(captions)
                done += len(captions)
                held += sum(v.nbytes for v in pending[-1].values())
                if len(names) >= shard_size or held >= shard_bytes:
                    flush()
                if progress is not None:
                    progress(done, total)
            flush()
            if not entries:
                raise HypersdError("the data source gave no picture")
            uncond = {k: _narrow(v, dtype) for k, v in encode_null(components).items() if k != "time_ids"}
        atomic_write(folder / "uncond.safetensors", lambda path: save_file(uncond, path))
        index = json.dumps({"key": key, "shards": entries}, indent=1)
        atomic_write(folder / "index.json", lambda path: _write_text(path, index))
        return cls.open(folder)

    @classmethod
    def from_folder(
        cls,
        pictures: str | Path,
        components: Components,
        folder: str | Path,
        *,
        captions: str | Path | None = None,
        resolution: int | None = None,
        dtype: torch.dtype = torch.float16,
        batch_size: int = 16,
        seed: int = 0,
        progress: Progress | None = None,
        device: str | torch.device | None = None,
    ) -> LatentDataset:
        """Encode the pictures under `pictures` with their captions (see `captions.pairs`) into a cache under `folder`;
        a cache that was made from the same files with the same model is opened instead."""
        found = pairs(pictures, captions)
        size = resolution or model_resolution(components)
        files = [(str(p), p.stat().st_size, p.stat().st_mtime_ns, text) for p, text in found]
        encoders = stamps(components.folder, "vae/*", "text_encoder*/*", "tokenizer*/*")
        identity = json.dumps([files, size, str(dtype), seed, str(components.folder), encoders])
        key = hashlib.sha256(identity.encode()).hexdigest()
        cached = cls.cached(folder, key)
        if cached is not None:
            return cached

        def batches() -> Iterator[tuple[np.ndarray, list[str]]]:
            for start in range(0, len(found), batch_size):
                chunk = found[start : start + batch_size]
                yield np.stack([read_picture(path, size) for path, _ in chunk]), [text for _, text in chunk]

        return cls.from_source(
            batches(), components, folder, key=key, dtype=dtype, seed=seed, total=len(found), progress=progress,
            device=device,
        )  # fmt: skip


def model_resolution(components: Components) -> int:
    """Pixels along a side of the pictures that the model was made for."""
    return components.latent_shape[1] * components.vae_scale_factor


def _pixels(images: Any) -> Tensor:
    tensor = torch.as_tensor(np.asarray(images) if not isinstance(images, Tensor) else images)
    if tensor.dtype == torch.uint8:
        return tensor.permute(0, 3, 1, 2).float() / 127.5 - 1.0
    return tensor.float()


def _read(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    try:
        with safe_open(path, "pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}, file.metadata() or {}
    except (SafetensorError, RuntimeError) as error:
        raise HypersdError(f"{path} is damaged ({error}); remove {path.parent} to encode again") from None


def _write_text(path: Path, text: str) -> None:
    path.write_text(text, "utf-8")


def _narrow(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """For the cache: on the CPU, floating tensors in the cache's dtype."""
    return tensor.detach().to("cpu", dtype if tensor.is_floating_point() else tensor.dtype).contiguous()


def _widen(tensor: Tensor) -> Tensor:
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32)) if tensor.is_floating_point() else tensor


def _mix(*values: int) -> int:
    """One 63-bit seed out of several numbers."""
    return int(np.random.SeedSequence(values).generate_state(1, np.uint64)[0] >> 1)
