"""One process or several: which one this is, how they share a model, and what they add up.

`torchrun` and `accelerate launch` say in the environment who takes part. With "ddp" each process holds the whole model
and the gradients are averaged; with "fsdp" (torch's fully_shard) weights, gradients and the optimizer's moments are cut
into as many parts, block by block.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.nn.parallel import DistributedDataParallel

from qwenlet.errors import TrainingError
from qwenlet.model import Qwen


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
    try:
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo", timeout=timedelta(seconds=timeout))
    except (RuntimeError, ValueError) as error:
        raise TrainingError(
            f"{count} processes could not join: {str(error).splitlines()[0]}",
            hint="start them with torchrun, which sets RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT",
        ) from error
    try:
        yield Processes(dist.get_rank(), count)
    finally:
        dist.destroy_process_group()


def shared(whole: nn.Module, model: Qwen, how: str, group: Processes, device: torch.device) -> nn.Module:
    """`whole`, which holds `model`, made ready for several processes; as it is in one.

    Args:
        how: "ddp" or "fsdp".
    """
    if group.count == 1:
        return whole
    if how == "ddp":
        return DistributedDataParallel(whole, gradient_as_bucket_view=True)
    mesh = init_device_mesh(device.type, (group.count,))
    for block in model.transformer.h:
        fully_shard(block, mesh=mesh)
    # what is left (embedding, last norm, head) stays whole from forward to backward, so that the loss may use the head
    fully_shard(whole, mesh=mesh, reshard_after_forward=False)
    return whole


@contextmanager
def put_together(shared: nn.Module) -> Iterator[None]:
    """Within it every parameter of the model is whole, in every process. All processes must enter."""
    cut = [module for module in shared.modules() if isinstance(module, FSDPModule)]
    for module in cut:
        module.unshard()
    try:
        yield
    finally:
        for module in cut:
            module.reshard()


@contextmanager
def quiet_gradients(shared: nn.Module, last: bool) -> Iterator[None]:
    """Keeps gradients of one batch to this process, but those of a step's last."""
    if isinstance(shared, DistributedDataParallel) and not last:
        with shared.no_sync():
            yield
        return
    sync: Any = getattr(shared, "set_requires_gradient_sync", None)
    if sync is not None:
        sync(last)
    yield


def whole_tensor(tensor: Tensor) -> Tensor:
    """A tensor or its parts put together, detached and on the CPU. All processes must ask."""
    tensor = tensor.detach()
    return (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).cpu()


def like(whole: Tensor, model: Tensor) -> Tensor:
    """A whole tensor as `model` is kept: this process's part of it, on its device."""
    if isinstance(model, DTensor) and whole.shape == model.shape and whole.dim():
        return distribute_tensor(whole.to(model.device), model.device_mesh, model.placements)
    return whole.to(model.device)
