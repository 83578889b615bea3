"""What the names in a request stand for: "embedded" and "scenes" are known here and in hypersd.emoji, nowhere below."""

from __future__ import annotations

import hashlib
import json
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from filelock import AcquireReturnProxy, FileLock, Timeout

from hypersd import __version__
from hypersd.distill.captions import pairs, read_picture
from hypersd.distill.checkpoint import read_state
from hypersd.distill.competitor_stages import LinearReward
from hypersd.distill.data import LatentDataset, model_resolution
from hypersd.distill.health import good_name
from hypersd.distill.instances import CocoInstances
from hypersd.distill.method import StructureLoss, asked_for
from hypersd.distill.methods import check_run
from hypersd.distill.recipe import Recipe
from hypersd.distill.resume import check_recipe
from hypersd.distill.stages import RewardTerm, StructureTerm
from hypersd.errors import HypersdError
from hypersd.evaluate.run import Reference
from hypersd.models.backbone import Backbone
from hypersd.models.formats import is_lora
from hypersd.models.full import FullBackbone
from hypersd.models.fused import fuse
from hypersd.models.load import Components, load_components, read_scheduler, skeletons, stamps
from hypersd.models.lora import LoraSpec
from hypersd.models.networks import DEFAULT_GUIDANCE, default_targets, embeds_guidance, kind
from hypersd.models.noise_process import NoiseProcess
from hypersd.models.rewards import check_reward, check_segmenter, load_reward, load_segmenter

EMBEDDED, EMBEDDED_FLOW = "embedded", "embedded-flow"
ENCODE_BATCH = 64


def pick_device(name: str = "auto") -> torch.device:
    """ "auto" is the GPU where there is one."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        device = None
    if device is None or device.type not in ("cpu", "cuda"):
        raise HypersdError(f"device {name!r} is unknown; use auto, cpu or cuda", exit_code=2)
    if device.type == "cuda" and not torch.cuda.is_available():
        raise HypersdError("device cuda was asked for, but torch sees no GPU; `hypersd doctor` says more", exit_code=2)
    return device


def has_bfloat16(device: torch.device) -> bool:
    """Whether bfloat16 is worth using there: a CPU without it would be slower than in float32."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    try:
        return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
    except (AttributeError, RuntimeError):
        return False


def model_folder(path: str) -> Path:
    """The folder of a model; "embedded" and its twin "embedded-flow" come with the package."""
    if not is_embedded(path):
        return Path(path)
    from hypersd import emoji

    return emoji.model_folder() if path == EMBEDDED else emoji.flow_model_folder()


def is_embedded(path: str) -> bool:
    """Whether this model knows emoji scenes: they are its data, and their judge is its judge."""
    return path in (EMBEDDED, EMBEDDED_FLOW)


def load_model(path: str, device: str = "auto", network_dtype: torch.dtype | None = None) -> Components:
    """The frozen parts of a model on `device`, in float32; its network in another dtype if told. On a CPU its
    autoencoder runs on the fused operators."""
    target = pick_device(device)
    return _fused(load_components(model_folder(path), device=target, network_dtype=network_dtype), target)


def load_run(
    recipe: Recipe, folder: Path, device: str = "auto", progress: Callable[[int, int | None], None] | None = None
) -> tuple[Components, LatentDataset]:
    """The model of a training and its data, see `load_dataset`. The device only ever holds what is at work there: the
    VAE and the text encoders while pictures and captions are encoded, afterwards the VAE and the network. Text encoders
    are not loaded where the data is cached already, and are let go before the training."""
    target, dtype = pick_device(device), getattr(torch, recipe.train.dtype)
    components = load_components(model_folder(recipe.model.path), network_dtype=dtype, text_encoders=False)
    dataset = load_dataset(recipe, _fused(components, target), folder, progress, device=target)
    components.drop_text_encoders()
    return components.to(target), dataset


def _fused(components: Components, target: torch.device) -> Components:
    if target.type == "cpu":
        fuse(components.vae).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    return components


def writable(folder: str | Path) -> Path:
    """The folder, made if need be and proved writable before any work is done."""
    folder = Path(folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            return folder
    except OSError as error:
        raise HypersdError(f"cannot write into {folder}: {error.strerror or error}; choose another --out") from None


def alone(folder: Path) -> AcquireReturnProxy:
    """With this, no other process trains in the folder: each would write over the other's checkpoints and log. Set free
    by the system should the process die."""
    try:
        return FileLock(folder / ".lock").acquire(timeout=0)
    except Timeout:
        raise HypersdError(f"another process is at work in {folder}; wait for it or choose another --out") from None


def load_dataset(
    recipe: Recipe,
    components: Components,
    folder: Path,
    progress: Callable[[int, int | None], None] | None = None,
    device: torch.device | None = None,
) -> LatentDataset:
    """The recipe's data as latents, cached under `folder` or the recipe's own cache and opened from there next time.
    `device`: see LatentDataset.from_source."""
    data, folder = recipe.data, Path(recipe.data.cache or folder)
    dtype = getattr(torch, data.dtype)
    if data.kind == "folder":
        assert data.path is not None
        return LatentDataset.from_folder(
            data.path, components, folder, captions=data.captions, resolution=data.resolution, dtype=dtype,
            seed=recipe.train.seed, progress=progress, device=device,
        )  # fmt: skip
    if not is_embedded(recipe.model.path):
        raise HypersdError(
            'data.kind = "scenes" belongs to the embedded model; give data.kind = "folder" and data.path', exit_code=2
        )
    from hypersd.emoji import scenes

    seed, count = recipe.train.seed, data.count
    identity = json.dumps([__version__, seed, count, data.dtype, stamps(components.folder, "**/*.safetensors")])
    key = hashlib.sha256(identity.encode()).hexdigest()
    cached = LatentDataset.cached(folder, key)
    if cached is not None:
        return cached

    def batches() -> Iterator[tuple[np.ndarray, list[str]]]:
        for start in range(0, count, ENCODE_BATCH):
            part = scenes.render(seed, min(ENCODE_BATCH, count - start), "train", start)
            yield part.images, part.captions

    return LatentDataset.from_source(
        batches(), components, folder, key=key, dtype=dtype, seed=seed, total=count, progress=progress, device=device
    )


def check(recipe: Recipe, out: Path, *, resume: bool = False, from_good: bool = False) -> None:
    """Find what a training would only find after its pictures are encoded, which may take hours. Raises HypersdError
    where the checkpoint to go on from is missing or of another recipe, for a resolution that the model cannot have, for
    LoRA targets without a layer, for a stage that the model cannot serve, for several processes that do not fit the
    recipe, and for `train.init`,
    rewards and structure that are not there, cannot be read, or do not fit the model."""
    if resume or from_good:
        checkpoint = out / "checkpoint.safetensors"
        path = good_name(checkpoint) if from_good else checkpoint
        check_recipe(read_state(path), recipe, path, from_good=from_good)
    folder, lora = model_folder(recipe.model.path), recipe.lora
    # mu: the shift of a flow model may be that of the pictures' size, on which nothing here depends
    check_run(recipe, NoiseProcess.from_config(read_scheduler(folder), mu=1.0))
    parts = skeletons(folder, only_network=recipe.data.resolution is None)
    network = parts["network"]
    if recipe.data.resolution is not None:
        multiple = Components(network, parts["vae"], [], [], {}, folder).pixel_multiple
        if recipe.data.resolution % multiple:
            raise HypersdError(
                f"data.resolution = {recipe.data.resolution} is not possible with this model; take a multiple of "
                f"{multiple}",
                exit_code=2,
            )
    backbone: Backbone | FullBackbone
    if recipe.train.full:
        backbone = FullBackbone(network)
    else:
        backbone = Backbone(network, LoraSpec(lora.rank, lora.alpha, lora.targets or default_targets(network)))
    if recipe.train.init is not None:
        try:
            state, metadata = read_lora(Path(recipe.train.init))
            _check_base(backbone, metadata, recipe.model.path, "take one of its own")
            role = "before" if recipe.stages[0].is_separate else "student"  # which has the recipe's rank and layers
            backbone.load_lora_state_dict(state, role, scale=float(metadata.get("lora_scale", 1.0)))
        except HypersdError as error:
            raise HypersdError(f"train.init: {error}", exit_code=error.exit_code) from None
    for stage in recipe.stages:
        for term in getattr(stage, "rewards", []):
            _check_reward(term, recipe)
        term = getattr(stage, "structure", None)
        if term is not None:
            _check_structure(term, recipe)
            if term.kind != "scenes":
                check_segmenter(term.kind, term.path)
                _instances(term, recipe, 1)


def load_rewards(recipe: Recipe, components: Components) -> dict[str, Any]:
    """What the recipe's feedback stages name, as keyword arguments of Trainer."""
    found: dict[str, Any] = {}
    structure: dict[str, StructureLoss] = {}
    for stage in recipe.stages:
        for term in getattr(stage, "rewards", []):
            name = asked_for(term)
            if term.path is None:
                from hypersd.emoji import rewards

                _check_reward(term, recipe)
                found[name] = rewards.load(term.kind, term.weight, components.device)
            elif name not in found:
                found[name] = load_reward(term.kind, term.path, components.device)
        term = getattr(stage, "structure", None)
        if term is not None and asked_for(term) not in structure:
            structure[asked_for(term)] = load_structure(term, recipe, components)
    return {"rewards": found, "structure": structure}


def load_structure(term: StructureTerm, recipe: Recipe, components: Components) -> StructureLoss:
    """The structure loss of a feedback stage: (pictures, numbers of the data set's samples) -> scalar."""
    _check_structure(term, recipe)
    if term.kind == "scenes":
        from hypersd.emoji import rewards

        return rewards.structure(recipe.train.seed, components.device)
    instances = _instances(term, recipe, recipe.data.resolution or model_resolution(components))
    assert term.path is not None
    segmenter = load_segmenter(term.kind, term.path, components.device)
    return lambda images, indices: segmenter(images, [instances[int(index)] for index in indices])


def _check_reward(term: RewardTerm | LinearReward, recipe: Recipe) -> None:
    if term.path is not None:
        check_reward(term.kind, term.path)
    elif is_embedded(recipe.model.path):
        from hypersd.emoji import rewards

        rewards.check(term.kind, term.weight)
    else:
        raise HypersdError(f"reward {term.kind} needs path, the folder of its weights", exit_code=2)


def _check_structure(term: StructureTerm, recipe: Recipe) -> None:
    if term.kind == "scenes":
        if recipe.data.kind != "scenes":
            raise HypersdError('structure.kind = "scenes" belongs to data.kind = "scenes"', exit_code=2)
    elif recipe.data.kind != "folder" or term.path is None or term.annotations is None:
        raise HypersdError(
            f'structure.kind = "{term.kind}" needs path, annotations (COCO JSON) and data.kind = "folder"',
            exit_code=2,
        )


def _instances(term: StructureTerm, recipe: Recipe, resolution: int) -> CocoInstances:
    assert recipe.data.path is not None and term.annotations is not None
    pictures = [picture for picture, _ in pairs(recipe.data.path, recipe.data.captions)]
    return CocoInstances(term.annotations, pictures, resolution)


def scene_references(samples: int, seed: int, variety: tuple[int, int]) -> tuple[Reference, Reference]:
    """Held-out scenes to compare with, and a second draw of other held-out scenes as the zero line."""
    from hypersd.emoji import scenes

    first, second = (scenes.render(seed + offset, samples, "heldout") for offset in (1_000_000, 2_000_000))
    captions, each = min(variety[0], samples), variety[1]
    varied = np.stack(
        [scenes.render_caption(first.objects[i], int(first.background[i]), seed + i, each) for i in range(captions)]
    )
    return (
        Reference(first.images, first.captions, first.objects, varied),
        Reference(second.images, second.captions, second.objects),
    )


def folder_reference(path: Path, captions: Path | None, components: Components, samples: int) -> Reference:
    """The first `samples` captioned pictures of a folder at the model's own size."""
    found = pairs(path, captions)[:samples]
    size = model_resolution(components)
    return Reference(np.stack([read_picture(picture, size) for picture, _ in found]), [text for _, text in found])


def captions(prompts: list[str], file: Path | None) -> list[str]:
    """Captions from the command line and from a text file with one a line."""
    lines = list(prompts)
    if file is not None:
        try:
            lines += [line.strip() for line in file.read_text("utf-8-sig").splitlines() if line.strip()]
        except (OSError, UnicodeDecodeError) as error:
            raise HypersdError(
                f"cannot read prompts from {file}: {getattr(error, 'strerror', None) or error}", exit_code=2
            ) from None
    if not lines:
        raise HypersdError("no prompts; give captions, or a file with --prompt-file", exit_code=2)
    return lines


def read_lora(path: Path) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    """(state, metadata) of a LoRA file; a published one that says nothing gets its rules from hypersd.sampling.presets.
    Reading it comes before any model is loaded."""
    state, metadata = read_weights(path)
    if not is_lora(state):
        raise HypersdError(f"{path} holds no LoRA; whole networks are for `sample --weights` and `evaluate`")
    return state, metadata


def read_weights(path: Path) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    """As `read_lora`, of a LoRA file or of a whole network's."""
    from hypersd.models.export import load_lora
    from hypersd.sampling.presets import rules_for

    state, metadata = load_lora(path)
    if not state:
        raise HypersdError(f"{path} holds no tensors; export it again")
    return state, rules_for(str(path), metadata)


def load_with_lora(
    model: str,
    state: Mapping[str, torch.Tensor],
    metadata: Mapping[str, str],
    device: str = "auto",
    *,
    resolution: int | None = None,
    dtype: str = "float32",
) -> tuple[Any, Components, NoiseProcess]:
    """A model as Backbone with the LoRA as role "lora" (none where `state` is empty), or as FullBackbone with the whole
    network that `state` is as that role; and its noise process, for pictures of `resolution` pixels a side: unless told
    those that the file was trained on, or else the model's own. `dtype` is the network's."""
    components = load_model(model, device, getattr(torch, dtype))
    said = metadata.get("resolution", "")
    side = resolution or (int(said) if said.isdigit() else 0)
    if side:
        components.resolution = (side, side)
    whole = bool(state) and not is_lora(state)
    backbone: Any = FullBackbone(components.network, roles=()) if whole else Backbone(components.network, roles=())
    if components.device.type == "cpu":
        backbone.fuse()
    if whole:
        backbone.load_network_state_dict(state, "lora")
    elif state:
        _check_base(backbone, metadata, model)
        backbone.load_lora_state_dict(state, "lora", scale=float(metadata.get("lora_scale", 1.0)))
    return backbone, components, components.noise_process()


def told_guidance(
    metadata: Mapping[str, str], network: Any, guidance_scale: float | None, usual: float
) -> dict[str, str]:
    """`metadata` with the guidance that was asked for; where neither says it, `usual`, of two passes (none for FLUX,
    which was made to go without), or what a network that is told its guidance usually is told."""
    found, key = dict(metadata), "guidance_scale"
    if embeds_guidance(network):
        key, usual = "embedded_guidance", DEFAULT_GUIDANCE
    elif kind(network) == "flux":
        usual = 1.0
    if guidance_scale is not None:
        found[key] = str(guidance_scale)
    return {key: str(usual)} | found


def _check_base(
    backbone: Backbone | FullBackbone,
    metadata: Mapping[str, str],
    model: str,
    remedy: str = "name its own with --model",
) -> None:
    base = metadata.get("base_model")
    if base is not None and base != backbone.fingerprint:
        raise HypersdError(f"the LoRA belongs to another model ({base}; {model} is {backbone.fingerprint}); {remedy}")


def convert(source: Path, target: Path, format: str, model: str) -> None:
    """Rewrite a LoRA file in another key layout; the model's config says which layers its keys mean."""
    merge([source], [1.0], target, model, format=format)


def merge(
    sources: Sequence[Path],
    weights: Sequence[float],
    target: Path,
    model: str,
    *,
    rank: int | None = None,
    format: str = "peft",
) -> float:
    """Write the weighted sum of LoRA files, exact or cut to `rank`; returns the share of energy that was dropped.

    How to sample is said by the first file; one file with weight 1 is only rewritten.
    """
    from hypersd.models.export import save_lora
    from hypersd.models.merge import concatenate, truncate

    # memory that is never touched is never taken: only names and shapes of the network matter here
    backbone = Backbone(skeletons(model_folder(model), only_network=True)["network"].to_empty(device="cpu"), roles=())
    loras, headers = [], []
    for source in sources:
        state, metadata = read_lora(source)
        _check_base(backbone, metadata, model)
        backbone.load_lora_state_dict(state, "checked", scale=float(metadata.get("lora_scale", 1.0)))
        loras.append(backbone.lora_layers("checked"))
        backbone.drop_role("checked")
        headers.append(metadata)
    kinds = {header["prediction_type"] for header in headers if "prediction_type" in header}
    if len(kinds) > 1:
        raise HypersdError(f"the LoRAs were made for different predictions: {', '.join(sorted(kinds))}")
    kept = {key: value for key, value in headers[0].items() if key not in ("lora_adapter_metadata", "lora_scale")}
    merged, dropped = dict(loras[0]), 0.0
    if len(sources) > 1 or list(weights) != [1.0]:
        merged = concatenate(loras, weights)
        kept["merged"] = json.dumps([[p.name, weight] for p, weight in zip(sources, weights, strict=True)])
    if rank is not None:
        merged, dropped, _ = truncate(merged, rank)
    backbone.load_lora_layers(merged, "merged")
    save_lora(target, backbone, "merged", kept, format)
    return dropped
