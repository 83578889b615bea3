"""One trainer for every method: stages, optimizer, EMA, log, checkpoints.

Whatever is random is drawn from (seed, stage, pass); so the state of a run is what it trains, the optimizers and two
numbers, and a resumed run on the CPU ends with the bits of an unbroken one.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from hypersd.distill import parallel
from hypersd.distill.checkpoint import keep_as, load_checkpoint, save_checkpoint, set_aside
from hypersd.distill.data import Batch, LatentDataset
from hypersd.distill.flat import FlatAdamW
from hypersd.distill.health import Guard, Health, good_name
from hypersd.distill.interrupt import Interrupt
from hypersd.distill.log import Log
from hypersd.distill.method import EMA, PREVIOUS, STUDENT, Auxiliary, Context, Denoiser, Draw, Method, StructureLoss
from hypersd.distill.methods import METHODS, check_run
from hypersd.distill.parts import embedded_guidance, guidances, model_metadata
from hypersd.distill.probe import Probe, alarms
from hypersd.distill.recipe import Recipe
from hypersd.distill.resume import check_recipe
from hypersd.distill.stages import BaseStage
from hypersd.errors import HypersdError
from hypersd.models.backbone import Backbone
from hypersd.models.export import load_lora, save_lora
from hypersd.models.full import FullBackbone, save_network
from hypersd.models.lora import LoraSpec
from hypersd.models.networks import default_targets
from hypersd.models.noise_process import NoiseProcess
from hypersd.models.prompts import decode_latents
from hypersd.models.rewards import Reward
from hypersd.sampling.presets import rules_for


class Progress(Protocol):
    def __call__(self, stage: str, step: int, total: int, loss: float) -> None:
        """`step` of `total` optimizer steps of this stage, one of Recipe.names, are done; `loss` is the newest that is
        known."""


class Trainer:
    """Runs the stages of a recipe on one network.

    components: network and scheduler_config are used (hypersd.models' Components). `backbone` replaces the Backbone
    that is otherwise put around the network (FullBackbone where the recipe says train.full): any `Denoiser` without
    roles yet. rewards, structure: what a feedback stage names (see method.Context). Under out_dir:
    `checkpoint.safetensors`, `metrics.jsonl`, `lora-<steps>step.safetensors` of each stage
    (`lora-<steps>step-stage<i>`, i from 0, where an earlier one has that name) and `lora.safetensors` of the last,
    whole networks as `unet...` or `transformer...` instead; while a run lasts, and after one that warned,
    `checkpoint.good.safetensors` too, the newest checkpoint from before the trouble (health.Guard). In a group of
    processes (parallel.py) each makes a trainer and calls run(); the measures in the log, and what watches over them,
    are then those of the first one's passes.
    """

    def __init__(
        self,
        recipe: Recipe,
        components: Any,
        dataset: LatentDataset,
        out_dir: str | Path,
        *,
        progress: Progress | None = None,
        backbone: Denoiser | None = None,
        rewards: Mapping[str, Reward] | None = None,
        structure: StructureLoss | None = None,
    ) -> None:
        self.recipe, self.dataset, self.out_dir = recipe, dataset, Path(out_dir)
        self.progress, self.components = progress, components
        self.rewards, self.structure = rewards or {}, structure
        self.process = NoiseProcess.from_config(components.scheduler_config, latent_size=dataset.latent_size)
        if parallel.started() != parallel.size():
            raise HypersdError(
                f"{parallel.started()} processes were started, and each would train the whole: `hypersd distill` joins "
                "them, as hypersd.distill.parallel.joined() does; other commands run in one process",
                exit_code=2,
            )
        check_run(recipe, self.process)
        self.backbone: Any = backbone if backbone is not None else self._wrap(components.network)
        self._add_student()
        self.device = next(iter(self.backbone.role_parameters(STUDENT).values())).device
        self.uncond = {k: v.to(self.device) for k, v in dataset.uncond.items()}
        self.stage, self.step = 0, 0
        self.has_previous = False
        self.own_roles: tuple[str, ...] = ()  # further ones, of the stage
        self.auxiliaries: list[tuple[Auxiliary, FlatAdamW]] = []
        self.probe: Probe | None = None
        self.loaded: dict[str, Tensor] = {}
        self.init: Mapping[str, str] = {}  # metadata
        if recipe.train.init is not None:
            self._start_from(recipe.train.init)

    @property
    def checkpoint(self) -> Path:
        return self.out_dir / "checkpoint.safetensors"

    def run(self, resume: bool = False, *, from_good: bool = False) -> Any:
        """Train all stages, or those that are left (`resume`); returns the backbone with roles "student" and "ema".

        `from_good` resumes from the last good checkpoint instead of the newest; the recipe may then differ from there
        on, in [train] and in the stages that are not yet over, so that it can be set right. Raises HypersdError when
        the loss is no longer finite, the disk fills, a checkpoint cannot be used, or on Ctrl-C (after saving); the
        newest checkpoint is intact in each case.
        """
        threads = torch.get_num_threads()
        if self.recipe.train.threads is not None:
            torch.set_num_threads(self.recipe.train.threads)
        try:
            if resume or from_good:
                self._load(from_good)
            elif parallel.is_first():  # of an earlier run, and perhaps hours of work
                for path in (self.checkpoint, good_name(self.checkpoint), self.out_dir / "metrics.jsonl"):
                    if path.exists():
                        logging.getLogger("hypersd").warning(
                            "%s of an earlier run is now %s", path, set_aside(path).name
                        )
            keep = (self.stage, self.step) if resume or from_good else None
            self.log = Log(self.out_dir / "metrics.jsonl" if parallel.is_first() else None, keep)
            self.guard = Guard(self.checkpoint, self.log.kept, keeps=parallel.is_first())
            with Interrupt() as interrupt:
                if self.stage == len(self.recipe.stages) and not self.file.exists():
                    self._export(self.stage - 1)  # of a finished run, and removed since
                while self.stage < len(self.recipe.stages):
                    self._run_stage(interrupt)
            self.guard.end()
        finally:
            torch.set_num_threads(threads)
        return self.backbone

    def _wrap(self, network: torch.nn.Module) -> Backbone | FullBackbone:
        train, lora = self.recipe.train, self.recipe.lora
        dtype = getattr(torch, train.dtype)
        on_cpu = next(network.parameters()).device.type == "cpu"
        # not network.to(): that of diffusers warns about every cast
        torch.nn.Module.to(network, dtype=dtype, memory_format=torch.channels_last)  # type: ignore[call-overload]
        backbone: Backbone | FullBackbone
        if train.full:
            backbone = FullBackbone(network, roles=())
        else:
            targets = lora.targets or default_targets(network)
            backbone = Backbone(network, LoraSpec(lora.rank, lora.alpha, targets), roles=())
        if on_cpu:
            backbone.fuse()
        if train.gradient_checkpointing == "full":
            backbone.enable_gradient_checkpointing()
        elif train.gradient_checkpointing == "feed_forward":
            backbone.recompute_feed_forward()
        return backbone

    def _add_student(self) -> None:
        """A new adapter, or copy of the network, that changes nothing yet. It comes from the seed."""
        with _seeded(self.recipe.train.seed):
            self.backbone.add_role(STUDENT)
        self.backbone.add_role(EMA, like=STUDENT)

    def _start_from(self, path: str) -> None:
        """A LoRA file is what the first stage goes on with, or, where that trains an adapter of its own, stands on."""
        state, metadata = load_lora(path)
        self.init = metadata = rules_for(path, metadata)
        scale = float(metadata.get("lora_scale", 1.0))  # of a file without alpha
        if metadata.get("base_model", self.backbone.fingerprint) != self.backbone.fingerprint:
            raise HypersdError(f"{path} was made for {metadata['base_model']}, not for this model; see train.init")
        stage = self.recipe.stages[0]
        if not stage.is_separate:
            self.backbone.load_lora_state_dict(state, STUDENT, scale=scale)
            self.backbone.copy_role(STUDENT, EMA)
        if stage.needs_previous:
            self.backbone.load_lora_state_dict(state, PREVIOUS, scale=scale)
            self.has_previous = True

    @property
    def result(self) -> str:
        """The role, or sum of roles, that the last file holds."""
        return _averaged(self.recipe.stages[-1])

    @property
    def file(self) -> Path:
        """The last file: lora.safetensors or, of whole networks, unet.safetensors or transformer.safetensors."""
        return self._named("lora")

    def _named(self, name: str) -> Path:
        """The file of a stage with this name, or "lora" for the last."""
        if self.recipe.train.full:
            name = self.backbone.key_prefix + name.removeprefix("lora")
        return self.out_dir / f"{name}.safetensors"

    def _begin_stage(self) -> Method:
        """Hand over from the stage before (its EMA weights go on), and build this stage's method."""
        stage = self.recipe.stages[self.stage]
        previous = self.recipe.stages[self.stage - 1] if stage.needs_previous and self.stage > 0 else None
        if self.step == 0 and self.stage > 0:
            self.backbone.copy_role(EMA, STUDENT)
            if self.has_previous:
                self.backbone.drop_role(PREVIOUS)
            if previous is not None:
                self.backbone.add_role(PREVIOUS, like=EMA)
            self.has_previous = previous is not None
            if stage.is_separate:
                self.backbone.drop_role(STUDENT)
                self.backbone.drop_role(EMA)
                self._add_student()
        if self.step == 0:
            self._change_roles(stage.roles)
        decode = None if self.components.network is None else self._decode
        if self.rewards and self.recipe.train.gradient_checkpointing == "full":
            self.components.vae.enable_gradient_checkpointing()  # of one picture it keeps more than the network does
        context = Context(self.backbone, self.process, self.uncond, previous, decode, self.rewards, self.structure)
        with _seeded(self.recipe.train.seed + self.stage):
            return METHODS[type(stage)](stage, context)

    def _decode(self, latents: Tensor) -> Tensor:
        """Pictures for the rewards. Where the network runs in 16 bit so do the decoder's layers."""
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.recipe.train.dtype == "bfloat16"):
            return decode_latents(self.components, latents).float()

    def _change_roles(self, roles: tuple[str, ...]) -> None:
        for role in self.own_roles:
            self.backbone.drop_role(role)
        for role in roles:
            self.backbone.add_role(role, like=STUDENT)
        self.own_roles = roles

    def _build_optimizers(self, method: Method) -> None:
        """The student's and each auxiliary's; in the middle of a stage with the state of the checkpoint."""
        train = self.recipe.train
        common: dict[str, Any] = {"eps": train.eps, "weight_decay": train.weight_decay, "clip": train.clip}
        self.parameters, ema = (self.backbone.role_parameters(role) for role in (STUDENT, EMA))
        self.optimizer = FlatAdamW(self.parameters, ema, betas=train.betas, ema_decay=train.ema_decay, **common)
        self.auxiliaries = [
            (auxiliary, FlatAdamW(auxiliary.parameters, betas=auxiliary.betas, **common))
            for auxiliary in getattr(method, "auxiliaries", tuple)()
        ]
        for auxiliary, _ in self.auxiliaries:
            _require_grad(auxiliary.parameters, False)
        if self.step > 0:
            self._restore_optimizer("optimizer", self.optimizer, self.step)
            for auxiliary, optimizer in self.auxiliaries:
                self._restore(auxiliary.name, auxiliary.parameters)
                name = f"optimizer.{auxiliary.name}"
                self._restore_optimizer(name, optimizer, self.step * auxiliary.updates)
        self.loaded = {}

    def _run_stage(self, interrupt: Interrupt) -> None:
        train, stage = self.recipe.train, self.recipe.stages[self.stage]
        method = self._begin_stage()
        self._begin_looks(stage)
        self._build_optimizers(method)
        monitors = [Health(alarms(stage), stage.name)] if self.probe is not None else []
        self.guard.begin(self.stage, [*getattr(method, "monitors", ()), *monitors], self.step)
        loss = math.nan
        while self.step < stage.iterations:
            started = time.perf_counter()
            self.rate = rate_factor(train.lr_scheduler, self.step, stage.iterations, train.warmup)
            measured, norm = self._optimizer_step(method)
            measures = getattr(method, "measures", {}) | self._auxiliary_steps() | self._look(stage)
            self.log.add(self.stage, stage.name, self.step, measured, norm, started, measures)
            self.step += 1
            # several processes agree to stop where they wait for a GPU anyway
            asks = parallel.size() == 1 or self.device.type == "cpu" or self.step % train.log_every == 0
            stop = asks and self.step < stage.iterations and parallel.any_of(interrupt.requested)
            save = stop or self.step % train.checkpoint_every == 0 or self.step == stage.iterations
            # a GPU is asked for its numbers now and then, and always before its weights are saved
            if self.device.type == "cpu" or save or self.step % train.log_every == 0:
                loss = self.log.flush(self.guard.check)
            if self.progress is not None:
                self.progress(self.recipe.names[self.stage], self.step, stage.iterations, loss)
            if self.step == stage.iterations:
                break
            if save:
                self._save()
                self.guard.saved(self.step)
            if stop:
                raise HypersdError(
                    f"stopped in stage {stage.name} after step {self.step}; the state is saved in "
                    f"{self.checkpoint}, resume goes on from there"
                )
        self._export(self.stage)
        self.auxiliaries = []  # critics and optimizers make room for those of the next stage
        del self.optimizer
        self.stage, self.step = self.stage + 1, 0
        self._save()
        if self.stage < len(self.recipe.stages) and parallel.any_of(interrupt.requested):
            raise HypersdError(
                f"stopped after stage {stage.name}; the state is saved in {self.checkpoint}, resume goes on"
            )

    def _optimizer_step(self, method: Method) -> tuple[Tensor, Tensor]:
        """One step of optimizer and EMA; (loss, gradient norm) as tensors on the device."""
        total = self._accumulate(self.optimizer, method.loss, self.step)
        if self.device.type == "cpu" and not math.isfinite(float(total)):
            return total, total  # the log stops the run; weights that are still good stay so
        return total, self.optimizer.step(self._rate(None))

    def _auxiliary_steps(self) -> dict[str, Tensor]:
        """The steps of all that is trained beside the student; the newest loss of each."""
        losses = {}
        for who, (auxiliary, optimizer) in enumerate(self.auxiliaries, 1):
            _require_grad(self.parameters, False)
            _require_grad(auxiliary.parameters, True)
            for update in range(self.step * auxiliary.updates, (self.step + 1) * auxiliary.updates):
                losses[f"{auxiliary.name}_loss"] = self._accumulate(optimizer, auxiliary.loss, update, who)
                optimizer.step(self._rate(auxiliary.learning_rate))
            _require_grad(auxiliary.parameters, False)
            _require_grad(self.parameters, True)
        return losses

    def _begin_looks(self, stage: BaseStage) -> None:
        """The probe, with what the stage begins with; in the middle of a stage that is in the checkpoint."""
        train = self.recipe.train
        self.probe = None
        if train.watch_every == 0 or not parallel.is_first():
            return
        metadata = METHODS[type(stage)].metadata(stage, self.process)
        self.probe = Probe(
            self.backbone, self.process, self.dataset, self.uncond, metadata,
            seed=train.seed, batch_size=train.batch_size, device=self.device,
        )  # fmt: skip
        if self.step == 0:
            self.probe.begin(_averaged(stage))
        else:
            kept = {name: tensor for name, tensor in self.loaded.items() if name.startswith("probe/")}
            self.probe.start = {name.removeprefix("probe/"): tensor.to(self.device) for name, tensor in kept.items()}

    def _look(self, stage: BaseStage) -> dict[str, Tensor]:
        """What the probe says after this step, if it is asked."""
        done, every = self.step + 1, self.recipe.train.watch_every
        if self.probe is None or (done % every and done != stage.iterations):
            return {}
        return self.probe.look(_averaged(stage))

    def _rate(self, own: float | None) -> float:
        stage = self.recipe.stages[self.stage]
        return (own or stage.learning_rate or self.recipe.train.learning_rate) * self.rate

    def _accumulate(
        self, optimizer: FlatAdamW, loss: Callable[[Batch, Draw], Tensor], step: int, who: int = 0
    ) -> Tensor:
        """This process's part of the gradient of step `step`, and the step's loss. Data and draws are those of (seed,
        stage, who, pass)."""
        train = self.recipe.train
        optimizer.zero_grad()
        total = torch.zeros((), device=self.device)
        first, end = step * train.accumulation + parallel.rank(), (step + 1) * train.accumulation
        for number in range(first, end, parallel.size()):
            key = (train.seed, self.stage, number, who) if who else (train.seed, self.stage, number)
            turn = number % train.accumulation, train.accumulation
            draw = Draw(key, self.device, self.step / self.recipe.stages[self.stage].iterations, turn)
            part = loss(self._batch(number, who), draw)
            (part / train.accumulation).backward()
            total = total + part.detach() / train.accumulation
        return parallel.sum_(total)

    def _batch(self, number: int, who: int = 0) -> Batch:
        """Pass `number` of this stage; every stage, and whoever is trained in it, has its own order of the data."""
        train = self.recipe.train
        batch = self.dataset.batch(
            number,
            train.batch_size,
            seed=train.seed + 1000003 * self.stage + 7919 * who,
            caption_dropout=self.recipe.data.caption_dropout if self.recipe.stages[self.stage].drops_captions else 0.0,
        )
        if getattr(self.backbone, "embeds_guidance", False):
            key = (train.seed, self.stage, number, who, 2)
            batch.cond["guidance"] = torch.from_numpy(guidances(self._told, key, train.batch_size))
        cond = {k: self._here(v) for k, v in batch.cond.items()}
        return Batch(self._here(batch.latents), cond, batch.captions, batch.indices)

    @property
    def _told(self) -> tuple[float, float]:
        return embedded_guidance(self.recipe.stages[: self.stage + 1], self.init)

    def _here(self, t: Tensor) -> Tensor:
        """`t` on the device. To a GPU it goes through pinned memory: a plain copy would wait for all work before it."""
        return t.pin_memory().to(self.device, non_blocking=True) if self.device.type == "cuda" else t.to(self.device)

    def _roles(self) -> list[str]:
        own = self.own_roles if self.step > 0 else ()  # between two stages they are gone
        return [STUDENT, EMA, *([PREVIOUS] if self.has_previous else []), *own]

    def _save(self) -> None:
        if not parallel.is_first():
            return
        groups: dict[str, Mapping[str, Tensor]] = {role: self.backbone.role_parameters(role) for role in self._roles()}
        if self.step > 0:
            groups["optimizer"] = self.optimizer.state_dict()
            groups["probe"] = self.probe.start if self.probe is not None else {}
            for auxiliary, optimizer in self.auxiliaries:
                groups[auxiliary.name] = auxiliary.parameters
                groups[f"optimizer.{auxiliary.name}"] = optimizer.state_dict()
        tensors = {f"{group}/{name}": tensor for group, those in groups.items() for name, tensor in those.items()}
        state = {"stage": self.stage, "step": self.step, **self._identity()}
        if isinstance(self.backbone, Backbone):
            state["scales"] = {role: self.backbone.role_scales(role) for role in self._roles()}
        save_checkpoint(self.checkpoint, tensors, state)

    def _identity(self) -> dict[str, Any]:
        """What a resumed run must have in common with the one it goes on from."""
        return {"recipe": self.recipe.model_dump(mode="json"), "data": self.dataset.fingerprint}

    def _load(self, from_good: bool) -> None:
        path, own = good_name(self.checkpoint) if from_good else self.checkpoint, self._identity()
        self.loaded, state = load_checkpoint(path)
        check_recipe(state, self.recipe, path, from_good=from_good)
        if state["data"] != own["data"]:
            raise HypersdError(f"{path} was made with other training data; resume needs the same pictures")
        self.stage, self.step = state["stage"], state["step"]
        had_previous = any(name.startswith(f"{PREVIOUS}/") for name in self.loaded)
        if had_previous and not self.has_previous:
            self.backbone.add_role(PREVIOUS, like=STUDENT)
        elif self.has_previous and not had_previous:  # of train.init, and over
            self.backbone.drop_role(PREVIOUS)
        self.has_previous = had_previous
        if self.step > 0:
            self._change_roles(self.recipe.stages[self.stage].roles)
        for role in self._roles():
            self._restore(role, self.backbone.role_parameters(role))
            if role in state.get("scales", ()):  # train.init's file may have another than an adapter made since
                self.backbone.set_role_scales(role, state["scales"][role])
        if from_good and parallel.is_first():
            # the newest one now, under the recipe that is to set things right; what went wrong is set aside
            if self.checkpoint.exists():
                set_aside(self.checkpoint)
            save_checkpoint(self.checkpoint, self.loaded, state | own)

    def _restore(self, group: str, tensors: Mapping[str, Tensor]) -> None:
        for name, tensor in tensors.items():
            tensor.data.copy_(self._loaded(f"{group}/{name}", tensor))

    def _restore_optimizer(self, group: str, optimizer: FlatAdamW, steps: int) -> None:
        own = optimizer.state_dict()
        optimizer.load_state_dict({name: self._loaded(f"{group}/{name}", t) for name, t in own.items()}, steps)

    def _loaded(self, name: str, like: Tensor) -> Tensor:
        tensor = self.loaded.get(name)
        if tensor is None or tensor.shape != like.shape:
            raise HypersdError(
                f"checkpoint {self.checkpoint} is of another model: {name} is missing or has another shape"
            )
        return tensor.to(like.device, like.dtype)

    def _export(self, number: int) -> None:
        """The stage's EMA weights as a file, and as `self.file` after the last stage: there merged with what they stand
        on, where the stage trained an adapter of its own."""
        if not parallel.is_first() or not isinstance(self.backbone, Backbone | FullBackbone):
            return
        stage = self.recipe.stages[number]
        metadata = METHODS[type(stage)].metadata(stage, self.process)
        metadata |= model_metadata(self._told, self.components, self.backbone, self.dataset.latent_size)
        path, is_last = self._named(self.recipe.files[number]), number == len(self.recipe.stages) - 1
        if isinstance(self.backbone, FullBackbone):
            save_network(path, self.backbone, EMA, metadata)
            if is_last:
                keep_as(path, self.file)
            return
        save_lora(path, self.backbone, EMA, metadata)
        if is_last:
            save_lora(self.file, self.backbone, self.result, metadata)


def rate_factor(kind: str, step: int, steps: int, warmup: int) -> float:
    """What the learning rate is multiplied by at step `step` of `steps`: up linearly to 1 within `warmup` steps, then
    constant, or down so that a step after the last would have 0."""
    if step < warmup:
        return (step + 1) / warmup
    if kind == "constant":
        return 1.0
    left = (steps - step) / max(1, steps - warmup)
    return left if kind == "linear" else 0.5 - 0.5 * math.cos(math.pi * left)


def _averaged(stage: BaseStage) -> str:
    """The role, or sum of roles, that a stage's weights are sampled with."""
    return f"{PREVIOUS}+{EMA}" if stage.is_separate else EMA


@contextmanager
def _seeded(seed: int) -> Iterator[None]:
    """Initial values come from the seed, and torch's global generator is left alone."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)  # torch.manual_seed would seed every GPU's as well
        yield


def _require_grad(parameters: Mapping[str, nn.Parameter], flag: bool) -> None:
    for parameter in parameters.values():
        parameter.requires_grad_(flag)
