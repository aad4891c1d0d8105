"""One process or several: which one this is, what they add up, and tensors of which each has a part.

`torchrun` and `accelerate launch` say in the environment who takes part. How they share a model: sharing.py.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor, distribute_tensor

from qwenlet.errors import TrainingError


@dataclass(frozen=True)
class Processes:
    """This process among the others.

    Attributes:
        rank: from 0 on; count: of all.
    """

    rank: int = 0
    count: int = 1

    @property
    def first(self) -> bool:
        """Whether this one speaks and writes for all."""
        return self.rank == 0

    def add_up(self, value: Tensor) -> Tensor:
        """The sum over all processes, in place."""
        if self.count > 1:
            dist.all_reduce(value)
        return value

    def wait(self) -> None:
        if self.count > 1:
            dist.barrier()

    def agreed(self, value: bool) -> bool:
        """Whether it is true in any of them."""
        flag = torch.tensor(float(value))
        return bool(self.add_up(flag) > 0) if self.count > 1 else value

    def least(self, value: int | None) -> int | None:
        """The smallest that any of them has; None where one doesn't know."""
        if self.count == 1:
            return value
        found = torch.tensor(-1 if value is None else value)
        dist.all_reduce(found, dist.ReduceOp.MIN)
        return None if found < 0 else int(found)


@contextmanager
def processes(device: torch.device, timeout: float = 1800.0) -> Iterator[Processes]:
    """Joins the processes that the environment names; alone where it names none.

    Raises:
        TrainingError: they don't find each other.
    """
    count = int(os.environ.get("WORLD_SIZE", "1"))
    if count == 1:
        yield Processes()
        return
    if device.type == "cuda" and device.index is None:
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))  # else all of a machine would take its first GPU
    try:
        # what is agreed on lies on the CPU, on a GPU's machine too
        backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
        dist.init_process_group(backend, timeout=timedelta(seconds=timeout))
    except (RuntimeError, ValueError) as error:
        raise TrainingError(
            f"{count} processes could not join: {str(error).splitlines()[0]}",
            hint="start them with torchrun, which sets RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT",
        ) from error
    try:
        yield Processes(dist.get_rank(), count)
    finally:
        dist.destroy_process_group()


def whole_tensor(tensor: Tensor) -> Tensor:
    """A tensor or its parts put together, detached and on the CPU. All processes must ask."""
    tensor = tensor.detach()
    return (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).cpu()


def like(whole: Tensor, model: Tensor) -> Tensor:
    """A whole tensor as `model` is kept: this process's part of it, on its device."""
    if isinstance(model, DTensor) and whole.shape == model.shape and whole.dim():
        return distribute_tensor(whole.to(model.device), model.device_mesh, model.placements)
    return whole.to(model.device)
