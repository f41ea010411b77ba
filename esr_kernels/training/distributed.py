"""Several processes, started by `torchrun`, as one run."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor

from ..errors import TrainingError

_PATIENCE = timedelta(minutes=30)  # a validation on another process may take long


@dataclass(frozen=True)
class Process:
    """This process among those of the run.

    Attributes:
        rank: 0..world-1.
        world: number of processes.
        device: where it computes.
    """

    rank: int
    world: int
    device: torch.device

    @property
    def first(self) -> bool:
        """Whether this is the process that writes files and speaks."""
        return self.rank == 0

    def sum(self, values: Tensor) -> Tensor:
        """The element-wise sum over all processes; with one process `values` itself."""
        if self.world > 1:
            dist.all_reduce(values)
        return values

    def wait(self) -> None:
        """Until all processes are here."""
        if self.world > 1:
            dist.barrier()


def _environment(name: str, default: int) -> int:
    text = os.environ.get(name, str(default))
    if not text.isdecimal():
        raise TrainingError(f"environment variable {name}: expected a number as torchrun sets it, got {text!r}")
    return int(text)


def _device(name: str, local_rank: int) -> torch.device:
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError:
        raise TrainingError(f"run.device: expected auto, cpu or cuda, got {name!r}") from None
    if device.type not in ("cpu", "cuda"):
        raise TrainingError(f"run.device: expected auto, cpu or cuda, got {name!r}")
    if device.type == "cuda":
        if not torch.cuda.is_available():
            raise TrainingError("run.device: there is no CUDA device here; use cpu")
        device = torch.device("cuda", local_rank if device.index is None else device.index)
        if device.index >= torch.cuda.device_count():
            raise TrainingError(
                f"run.device: {device} is not here; torchrun started more processes than there are GPUs"
            )
        torch.cuda.set_device(device)
    return device


@contextmanager
def joined(device: str) -> Iterator[Process]:
    """Join the other processes that `torchrun` started; alone without it.

    Raises:
        TrainingError: no such device, or the others cannot be reached. Also in place of PyTorch's error when another
            process ends in the middle.
    """
    world, rank = _environment("WORLD_SIZE", 1), _environment("RANK", 0)
    place = _device(device, _environment("LOCAL_RANK", 0))
    if world == 1:
        yield Process(0, 1, place)
        return
    try:
        backend = "nccl" if place.type == "cuda" else "gloo"
        dist.init_process_group(backend, rank=rank, world_size=world, timeout=_PATIENCE)
        yield Process(rank, world, place)
    except RuntimeError as error:
        if _connection_lost(error):
            raise TrainingError(
                f"process {rank} of {world}: another process of the run has ended or cannot be reached; the last "
                f"checkpoint is complete, --resume goes on from it ({str(error).splitlines()[0][:160]})"
            ) from error
        raise
    dist.destroy_process_group()


def _connection_lost(error: RuntimeError) -> bool:
    if isinstance(error, TrainingError):
        return False
    if isinstance(error, dist.DistError):
        return True
    text = str(error).lower()
    return any(word in text for word in ("gloo", "nccl", "connection closed", "connection reset", "broken pipe"))
