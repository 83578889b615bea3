"""Load a diffusers-layout folder (SD1.5, SDXL, SD3 or FLUX shaped): safetensors only, never touching the internet."""

from __future__ import annotations

import importlib
import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import diffusers
import torch
from safetensors import SafetensorError, safe_open

from hypersd.errors import HypersdError
from hypersd.models import networks
from hypersd.models.noise_process import NoiseProcess

_PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt")
# from 0.40 on diffusers says dtype, as transformers does, and warns of the old name
_OLD_DIFFUSERS = tuple(map(int, diffusers.__version__.split(".")[:2])) < (0, 40)


# of each kind of folder: what its network is called, its text encoders in the order of their tokenizers, and those of
# them that it can do without
_LAYOUTS = {
    "unet": ("unet", ("text_encoder", "text_encoder_2"), ("text_encoder_2",)),
    "sd3": ("transformer", ("text_encoder", "text_encoder_2", "text_encoder_3"), ("text_encoder_3",)),
    "flux": ("transformer", ("text_encoder", "text_encoder_2"), ()),
}
# tokens of T5, and latents along a side of a picture, where the folder does not say it: those of diffusers' pipelines
_SEQUENCE_LENGTH = {"sd3": 256, "flux": 512}
_FLUX_SIZE = 128


@dataclass
class Components:
    """The parts of one text-to-image model, frozen and in eval mode.

    `text_encoders` and `tokenizers`: SD1.5 one CLIPTextModel; SDXL that and a CLIPTextModelWithProjection; SD3 two
    CLIPTextModelWithProjection and a T5EncoderModel, which is None where the folder comes without; FLUX a CLIPTextModel
    and a T5EncoderModel. `max_sequence_length`: tokens of T5. `resolution`: (height, width) in pixels where pictures
    shall have another size than the model's own.
    """

    network: Any  # UNet2DConditionModel, SD3Transformer2DModel, FluxTransformer2DModel
    vae: Any  # AutoencoderKL
    text_encoders: list[Any]
    tokenizers: list[Any]
    scheduler_config: dict[str, Any]
    folder: Path
    force_zeros_for_empty_prompt: bool = False
    max_sequence_length: int = 0
    resolution: tuple[int, int] | None = None

    @property
    def device(self) -> torch.device:
        return next(self.network.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        return next(self.network.parameters()).dtype

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        """(C, H, W) of one latent, at `resolution` or the model's own picture size. Raises HypersdError for a
        resolution that the model cannot have."""
        channels = networks.latent_channels(self.network)
        if self.resolution is not None:
            if any(side < 1 or side % self.pixel_multiple for side in self.resolution):
                raise HypersdError(
                    f"a picture of {self.resolution[0]} x {self.resolution[1]} pixels is not possible with this model; "
                    f"take multiples of {self.pixel_multiple}"
                )
            height, width = (side // self.vae_scale_factor for side in self.resolution)
            return channels, height, width
        size = _FLUX_SIZE if networks.kind(self.network) == "flux" else self.network.config.sample_size
        height, width = (size, size) if isinstance(size, int) else size
        return channels, int(height), int(width)

    @property
    def vae_scale_factor(self) -> int:
        """Pixels per latent along one side."""
        return 2 ** (len(self.vae.config.block_out_channels) - 1)

    @property
    def pixel_multiple(self) -> int:
        """What the sides of a picture are multiples of."""
        return self.vae_scale_factor * networks.patch_size(self.network)

    def noise_process(self, latent_size: tuple[int, int] | None = None) -> NoiseProcess:
        """The noise process, for latents of this (height, width), `latent_shape` unless given: on them depends the
        shift of flow models that shift dynamically (FLUX)."""
        return NoiseProcess.from_config(self.scheduler_config, latent_size=latent_size or self.latent_shape[1:])

    def load_text_encoders(self, dtype: torch.dtype = torch.float32) -> None:
        """Load them, on the CPU, where they were left out or let go. Raises HypersdError as `load_components`."""
        self.text_encoders, self.tokenizers = _load_text_encoders(self.folder, read_index(self.folder), dtype)

    def drop_text_encoders(self) -> None:
        """Let go of what is not needed any more once the captions are encoded; T5 is as large as a network."""
        self.text_encoders, self.tokenizers = [], []

    def to(self, device: str | torch.device, *, network: bool = True) -> Components:
        """`network`: whether that goes along; pictures and captions are encoded without it."""
        for module in (self.network if network else None, self.vae, *self.text_encoders):
            if module is not None:
                module.to(device)
        return self


def load_components(
    folder: str | Path,
    *,
    dtype: torch.dtype = torch.float32,
    network_dtype: torch.dtype | None = None,
    device: str | torch.device = "cpu",
    text_encoders: bool = True,
) -> Components:
    """Load network, VAE, text encoders, tokenizers and scheduler config from `folder`.

    A folder with `unet` is SD1.5 (one text encoder) or SDXL (two); one with `transformer` is SD3 (two and, unless it is
    left out, T5) or FLUX (CLIP and T5). `dtype` applies to all but a VAE that asks for fp32 (`force_upcast`) and the
    network, if it has a `network_dtype` of its own. Without `text_encoders` these and their tokenizers are left out.
    Raises HypersdError, one line, for: no such folder, no or a wrong model_index.json, a missing part or file, weights
    that exist only as pickles, truncated safetensors, weights that do not fit the config.
    """
    folder = Path(folder)
    index = read_index(folder)
    layout = layout_of(folder, index)
    name, _, _ = _LAYOUTS[layout]
    network = _load_part(folder, index, name, network_dtype or dtype)
    upcast = _read_json(folder / "vae" / "config.json").get("force_upcast", False)
    vae = _load_part(folder, index, "vae", torch.float32 if upcast else dtype)
    encoders, tokenizers = _load_text_encoders(folder, index, dtype) if text_encoders else ([], [])
    components = Components(
        network=network,
        vae=vae,
        text_encoders=encoders,
        tokenizers=tokenizers,
        scheduler_config=read_scheduler(folder),
        folder=folder,
        force_zeros_for_empty_prompt=bool(index.get("force_zeros_for_empty_prompt", False)),
        max_sequence_length=int(index.get("max_sequence_length", _SEQUENCE_LENGTH.get(layout, 0))),
    )
    for module in (network, vae):
        module.requires_grad_(False).eval()
    return components.to(device)


def read_index(folder: Path) -> dict[str, Any]:
    """model_index.json; HypersdError where there is none or it cannot be read."""
    if not folder.is_dir():
        raise HypersdError(f"no model folder at {folder}; give a folder in the diffusers layout")
    if not (folder / "model_index.json").is_file():
        raise HypersdError(f"{folder} has no model_index.json; give a folder in the diffusers layout")
    return _read_json(folder / "model_index.json")


def layout_of(folder: Path, index: dict[str, Any]) -> str:
    """ "unet", "sd3" or "flux"; HypersdError where the index lacks a part of it, or describes something else."""
    classes = {"SD3Transformer2DModel": "sd3", "FluxTransformer2DModel": "flux"}
    layout = "unet"
    if _is_listed(index, "transformer"):
        layout = classes.get(index["transformer"][1], "")
    if not layout:
        raise HypersdError(
            f"{folder}/model_index.json has a {index['transformer'][1]} for transformer, which is not supported; "
            f"known are {', '.join(classes)}"
        )
    name, encoders, optional = _LAYOUTS[layout]
    required = [name, "vae"]
    for encoder in encoders:
        if encoder not in optional:
            required += [encoder.replace("text_encoder", "tokenizer"), encoder]
    for part in required:
        if not _is_listed(index, part):
            raise HypersdError(
                f"{folder}/model_index.json ({index.get('_class_name', 'no _class_name')}) lists no {part}; "
                "only text-to-image models (SD1.5, SDXL, SD3, FLUX) can be loaded"
            )
    return layout


def skeletons(folder: Path, *, only_network: bool = False) -> dict[str, Any]:
    """The network ("network"), the VAE and the text encoders of a model folder by name, built from their config.json on
    the meta device: names and shapes without weights. Raises HypersdError where a config is missing or wrong."""
    index = read_index(folder)
    name, encoders, _ = _LAYOUTS[layout_of(folder, index)]
    found = {}
    for part in (name,) if only_network else (name, "vae", *encoders):
        if not _is_listed(index, part):
            continue
        cls: Any = _class_of(folder, index, part)
        config = _read_json(folder / part / "config.json")
        is_diffusers = index[part][0] == "diffusers"
        try:
            with torch.device("meta"):
                model = cls.from_config(config) if is_diffusers else cls(cls.config_class.from_dict(config))
        except Exception as error:
            path = folder / part / "config.json"
            raise HypersdError(f"{path} does not describe a {cls.__name__}: {_one_line(error)}") from None
        found["network" if part == name else part] = model
    return found


def read_scheduler(folder: Path) -> dict[str, Any]:
    """The scheduler config of a model folder. Raises HypersdError where it is missing or no JSON."""
    return _read_json(folder / "scheduler" / "scheduler_config.json")


def _is_listed(index: dict[str, Any], name: str) -> bool:
    entry = index.get(name)
    return isinstance(entry, list) and len(entry) == 2 and all(isinstance(part, str) for part in entry)


def _read_json(path: Path) -> dict[str, Any]:
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise HypersdError(f"{path} is missing; the model folder is incomplete") from None
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise HypersdError(f"{path} cannot be read as JSON ({_one_line(error)}); copy the model again") from None
    if not isinstance(data, dict):
        raise HypersdError(f"{path} does not hold a JSON object; copy the model again")
    return data


def _class_of(folder: Path, index: dict[str, Any], name: str) -> type:
    library, class_name = index[name]
    cls = None
    if library in ("diffusers", "transformers"):
        cls = getattr(importlib.import_module(library), class_name, None)
    if not isinstance(cls, type) or not hasattr(cls, "from_pretrained"):
        raise HypersdError(
            f"{folder}/model_index.json wants {library}.{class_name} for {name}, which is not a class of the "
            "installed diffusers or transformers"
        )
    return cls


def _load_part(folder: Path, index: dict[str, Any], name: str, dtype: torch.dtype) -> Any:
    cls: Any = _class_of(folder, index, name)
    part = folder / name
    _read_json(part / "config.json")
    variant = check_weights(part)
    kind = {"torch_dtype" if index[name][0] == "diffusers" and _OLD_DIFFUSERS else "dtype": dtype}
    with _loading(part):
        model, info = cls.from_pretrained(
            part, variant=variant, local_files_only=True, use_safetensors=True, output_loading_info=True, **kind
        )
    for key in ("missing_keys", "mismatched_keys"):
        if info.get(key):
            first = sorted(str(item) for item in info[key])[0]
            raise HypersdError(
                f"the weights in {part} do not fit its config.json: {key[:-5]} {first}; copy the model again"
            )
    return model


def _load_text_encoders(folder: Path, index: dict[str, Any], dtype: torch.dtype) -> tuple[list[Any], list[Any]]:
    """The text encoders, frozen and in eval mode, and their tokenizers."""
    layout = layout_of(folder, index)
    _, names, optional = _LAYOUTS[layout]
    encoders: list[Any] = []
    tokenizers: list[Any] = []
    for name in names:
        if _is_listed(index, name):
            if name in optional and not (folder / name).is_dir():
                raise HypersdError(
                    f"{folder}/{name} is missing; copy it, or say {name}: [null, null] in model_index.json to do "
                    "without"
                )
            encoders.append(_load_part(folder, index, name, dtype).requires_grad_(False).eval())
            tokenizers.append(_load_tokenizer(folder, index, name.replace("text_encoder", "tokenizer")))
        elif layout == "sd3":  # T5 has a place even where it is left out
            encoders.append(None)
            tokenizers.append(None)
    return encoders, tokenizers


def _load_tokenizer(folder: Path, index: dict[str, Any], name: str) -> Any:
    if not _is_listed(index, name):
        raise HypersdError(f"{folder}/model_index.json lists no {name}")
    cls: Any = _class_of(folder, index, name)
    part = folder / name
    if not any((part / file).is_file() for file in ("tokenizer.json", "vocab.json", "spiece.model")):
        raise HypersdError(
            f"{part} has none of tokenizer.json, vocab.json and spiece.model; the model folder is incomplete"
        )
    with _loading(part):
        return cls.from_pretrained(part, local_files_only=True)


def check_weights(part: Path) -> str | None:
    """Raise unless safetensors weights are there and whole; return the variant to load ("fp16" or None)."""
    files = sorted(part.glob("*.safetensors"))
    if not files:
        pickles = [file.name for pattern in _PICKLES for file in part.glob(pattern)]
        if pickles:
            raise HypersdError(f"{part} holds its weights only as a pickle ({pickles[0]}); convert them to safetensors")
        raise HypersdError(f"{part} holds no .safetensors weights; the model folder is incomplete")
    plain = [file for file in files if ".fp16" not in file.name]
    for file in plain or files:
        check_safetensors(file)
    return None if plain else "fp16"


def stamps(folder: Path, *patterns: str) -> list[list[Any]]:
    """[name, bytes, time of the last change] of the files under `folder` that match: what tells others from them
    without reading them."""
    files = sorted({path for pattern in patterns for path in folder.glob(pattern) if path.is_file()})
    return [[str(path.relative_to(folder)), path.stat().st_size, path.stat().st_mtime_ns] for path in files]


def check_safetensors(path: Path) -> dict[str, str]:
    """The file's metadata; HypersdError when it is missing, truncated or no safetensors file at all."""
    if path.is_dir():
        raise HypersdError(f"{path} is a folder; name a file in it, such as {path / 'lora.safetensors'}")
    try:
        with safe_open(path, framework="pt") as file:
            return dict(file.metadata() or {})
    except FileNotFoundError:
        raise HypersdError(f"{path} does not exist") from None
    except PermissionError as error:
        raise HypersdError(f"{path} cannot be read: {error.strerror}") from None
    except (SafetensorError, OSError) as error:
        with open(path, "rb") as raw:
            start = raw.read(3)
        # a zip archive or a bare pickle of any protocol
        if start.startswith((b"PK", b"\x80\x02", b"\x80\x03", b"\x80\x04\x95", b"\x80\x05\x95")):
            raise HypersdError(f"{path} is a pickle, not safetensors, and is not opened; convert it first") from None
        raise HypersdError(f"{path} is truncated or damaged ({_one_line(error)}); copy it again") from None


@contextmanager
def _loading(part: Path) -> Iterator[None]:
    """Without progress bars (four files of one model need none), and with one line for whatever the loaders raise."""
    from transformers.utils import logging

    had_bars = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    except Exception as error:
        raise HypersdError(f"cannot load {part}: {_one_line(error)}") from error
    finally:
        if had_bars:
            logging.enable_progress_bar()


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split()).split(". ")[0][:200] or type(error).__name__
