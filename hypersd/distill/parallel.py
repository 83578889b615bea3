"""Several processes that train one student: they share out the passes of every optimizer step.

`train.accumulation` says how many passes make a step, however many processes make them: process r of n makes every
n-th. Gradients and losses are summed over all, and each process takes the same step on its own copy of the weights. So
the recipe alone says what is trained, and a run may go on with another number of processes; results differ from one
process's by the rounding of these sums. The first process alone writes: log, checkpoints, files.

A run's processes are those of torch.distributed's default group, which `joined` joins under torchrun. Without one there
is a single process, and nothing here costs anything.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor

from hypersd.errors import HypersdError

PATIENCE = timedelta(days=1)  # the first encodes the pictures while others wait; torchrun ends them if it dies


def started() -> int:
    """How many processes the run shall have: those that have joined, or, before that, that torchrun has started."""
    return size() if _is_joined() else int(os.environ.get("WORLD_SIZE", "1"))


@contextmanager
def joined(device: str = "auto") -> Iterator[None]:
    """Within, this process is one of the group of all that torchrun has started, each on a GPU of its own unless
    `device` is "cpu". A single process, or one that has joined already, is left as it is.

    Raises HypersdError (exit code 2) for more processes than GPUs on a host, for a `device` with a number, and where
    the processes do not find each other.
    """
    if _is_joined() or started() == 1:
        yield
        return
    if ":" in device:
        raise HypersdError(
            f"device {device} is one for {started()} processes; say cuda: each takes its own", exit_code=2
        )
    on_gpu = torch.cuda.is_available() and device != "cpu"
    if on_gpu:
        local, gpus = int(os.environ.get("LOCAL_RANK", "0")), torch.cuda.device_count()
        if local >= gpus:
            raise HypersdError(f"process {local + 1} of this host has no GPU left of {gpus}; start fewer", exit_code=2)
        torch.cuda.set_device(local)
    try:
        dist.init_process_group("cpu:gloo,cuda:nccl" if on_gpu else "gloo", timeout=PATIENCE)
    except (RuntimeError, ValueError) as error:
        reason = str(error).partition("\n")[0]
        raise HypersdError(
            f"{started()} processes cannot join ({reason}); start them with torchrun", exit_code=2
        ) from None
    yield
    dist.destroy_process_group()  # not after an error: others may be waiting for what will never come


def rank() -> int:
    """Which of the run's processes this one is, from 0."""
    return dist.get_rank() if _is_joined() else 0


def size() -> int:
    """How many processes the run has."""
    return dist.get_world_size() if _is_joined() else 1


def is_first() -> bool:
    """Whether this process is the one that writes."""
    return rank() == 0


def sum_(tensor: Tensor) -> Tensor:
    """`tensor` of every process, added up in place; the same bits in each. Nothing waits for a GPU."""
    if size() > 1:
        with _broken_off():
            dist.all_reduce(tensor)
    return tensor


def any_of(flag: bool) -> bool:
    """Whether `flag` holds in any process. All must ask."""
    return bool(sum_(torch.tensor(float(flag))))


@contextmanager
def in_turn() -> Iterator[None]:
    """Within, the run's first process is alone; after it come the first of the other hosts, then all that are left. So
    what one writes and others read is written once for each disk."""
    turn = 0 if is_first() else 1 if os.environ.get("LOCAL_RANK") == "0" else 2
    _wait(turn)
    yield
    _wait(2 - turn)


def _is_joined() -> bool:
    return dist.is_available() and dist.is_initialized()


def _wait(times: int) -> None:
    for _ in range(times):
        any_of(False)


@contextmanager
def _broken_off() -> Iterator[None]:
    try:
        yield
    except RuntimeError as error:
        reason = str(error).partition("\n")[0]
        raise HypersdError(f"lost another process of this run, which may have said why ({reason})") from None
