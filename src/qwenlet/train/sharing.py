"""A model that learns, alone or shared by processes: what the loop asks for, and torch's way to do it.

ByTorch    alone; "ddp": the whole model in each process, gradients averaged; "fsdp" (torch's fully_shard): weights,
           gradients and the optimizer's moments cut into as many parts, block by block
DeepSpeed's way is in zero.py.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from qwenlet.config import TrainingConfig
from qwenlet.errors import ConfigError
from qwenlet.model import Qwen
from qwenlet.train.batches import Batch
from qwenlet.train.objective import Learner, Objective
from qwenlet.train.optimizer import learning_names, new_optimizer, optimizer_state, restore_optimizer
from qwenlet.train.processes import Processes, like, whole_tensor


class Sharing(Protocol):
    """A model, its optimizer, and how processes share both. All processes call the same, in the same order."""

    @property
    def scale(self) -> tuple[float, int] | None:
        """What losses are multiplied by in float16, so that their gradients don't vanish, and for how many steps it has
        been so: it grows behind some thousand. None: they are not."""
        ...

    def loss(self, batch: Batch, objective: Objective | None = None) -> Tensor:
        """The sum over a batch, of the objective that is learned unless another is given."""
        ...

    def learn(self, batch: Batch, share: float, *, last: bool) -> Tensor:
        """Adds the gradient of `share` times the loss to the step's; the loss, detached.

        A step's gradient is the mean over processes. `last`: of the step's batches in this process.
        """
        ...

    def move(self, rate: float) -> float:
        """Ends a step: the norm of its gradient before clipping. Weights stay as they are where it is not finite."""
        ...

    def weights(self) -> dict[str, Tensor]:
        """What learns, whole and on the CPU, by name."""
        ...

    def assign(self, weights: dict[str, Tensor]) -> None:
        """The way back from `weights`."""
        ...

    def moments(self) -> dict[str, Tensor]:
        """The optimizer's state, whole and on the CPU, as `optimizer_state` names it."""
        ...

    def restore(self, weights: dict[str, Tensor], moments: dict[str, Tensor], scale: tuple[float, int] | None) -> None:
        """The way back from what a checkpoint holds."""
        ...

    def whole(self) -> AbstractContextManager[None]:
        """Within it every parameter of the model is whole, in every process."""
        ...


def share(
    model: Qwen, objective: Objective, config: TrainingConfig, *, lr: float, dtype: torch.dtype, device: torch.device,
    group: Processes, sample: Batch,
) -> Sharing:  # fmt: skip
    """The way that the settings and accelerate's environment ask for.

    Args:
        model: its parameters that learn require gradients, and are float32.
        dtype: of the arithmetic; sample: some batch of the objective.
    Raises:
        ConfigError: they contradict each other, or ask for what is not here.
    """
    if os.environ.get("ACCELERATE_USE_DEEPSPEED", "false").lower() != "true":
        return ByTorch(model, objective, config, lr=lr, dtype=dtype, device=device, group=group)
    if config.parallel != "auto":
        raise ConfigError(
            f"parallel is {config.parallel!r}, but accelerate launch asks for DeepSpeed",
            hint="leave --parallel out, or start with torchrun",
        )
    if group.count == 1:
        raise ConfigError(
            "accelerate launch asks for DeepSpeed in one process, which has nobody to share a model with",
            hint="set num_processes in accelerate's file, or start without it",
        )
    from qwenlet.train.zero import ByDeepSpeed

    return ByDeepSpeed(model, objective, config, lr=lr, dtype=dtype, device=device, group=group, sample=sample)


class ByTorch:
    """Alone, or by torch's own means."""

    def __init__(
        self, model: Qwen, objective: Objective, config: TrainingConfig, *, lr: float, dtype: torch.dtype,
        device: torch.device, group: Processes,
    ) -> None:  # fmt: skip
        self.model, self.clip = model, config.clip
        self.learner = _shared(Learner(model, objective, device, dtype), model, config.parallel, group, device)
        self.learning = learning_names(model)  # of fsdp: the parts
        self.optimizer = new_optimizer(model, config, lr)
        self.scaler = torch.amp.GradScaler(device.type, enabled=dtype == torch.float16)

    @property
    def scale(self) -> tuple[float, int] | None:
        if not self.scaler.is_enabled():
            return None
        return float(self.scaler.get_scale()), int(self.scaler.state_dict()["_growth_tracker"])

    def loss(self, batch: Batch, objective: Objective | None = None) -> Tensor:
        return self.learner(batch, objective)

    def learn(self, batch: Batch, share: float, *, last: bool) -> Tensor:
        with _quiet_gradients(self.learner, last):
            loss = self.loss(batch)
            self.scaler.scale(loss * share).backward()
        return loss.detach()

    def move(self, rate: float) -> float:
        self.scaler.unscale_(self.optimizer)
        parameters = [p for p in self.learning.values() if p.grad is not None]
        gradient = nn.utils.clip_grad_norm_(parameters, self.clip or math.inf)
        norm = float(gradient.full_tensor() if isinstance(gradient, DTensor) else gradient)
        for settings in self.optimizer.param_groups:
            settings["lr"] = rate
        if math.isfinite(norm) or self.scaler.is_enabled():  # the scaler leaves out what is not finite, and counts it
            self.scaler.step(self.optimizer)
            self.scaler.update()
        self.optimizer.zero_grad(set_to_none=True)
        return norm

    def weights(self) -> dict[str, Tensor]:
        return {name: whole_tensor(p).contiguous() for name, p in self.learning.items()}

    def assign(self, weights: dict[str, Tensor]) -> None:
        with torch.no_grad():
            for name, parameter in self.learning.items():
                parameter.copy_(like(weights[name], parameter.data))

    def moments(self) -> dict[str, Tensor]:
        return optimizer_state(self.model, self.optimizer)

    def restore(self, weights: dict[str, Tensor], moments: dict[str, Tensor], scale: tuple[float, int] | None) -> None:
        self.assign(weights)
        restore_optimizer(self.model, self.optimizer, moments)
        if scale is not None and self.scaler.is_enabled():
            now = {"scale": scale[0], "_growth_tracker": scale[1]}
            self.scaler.load_state_dict(self.scaler.state_dict() | now)

    @contextmanager
    def whole(self) -> Iterator[None]:
        cut = [module for module in self.learner.modules() if isinstance(module, FSDPModule)]
        for module in cut:
            module.unshard()
        try:
            yield
        finally:
            for module in cut:
                module.reshard()


def _shared(whole: nn.Module, model: Qwen, how: str, group: Processes, device: torch.device) -> nn.Module:
    """`whole`, which holds `model`, made ready for several processes; as it is in one."""
    if group.count == 1:
        return whole
    if how != "fsdp":
        return DistributedDataParallel(whole, gradient_as_bucket_view=True)
    mesh = init_device_mesh(device.type, (group.count,))
    for block in model.transformer.h:
        fully_shard(block, mesh=mesh)
    # what is left (embedding, last norm, head) stays whole from forward to backward, so that the loss may use the head
    fully_shard(whole, mesh=mesh, reshard_after_forward=False)
    return whole


@contextmanager
def _quiet_gradients(shared: nn.Module, last: bool) -> Iterator[None]:
    """Keeps gradients of one batch to this process, but those of a step's last."""
    if isinstance(shared, DistributedDataParallel) and not last:
        with shared.no_sync():
            yield
        return
    sync: Any = getattr(shared, "set_requires_gradient_sync", None)
    if sync is not None:
        sync(last)
    yield
