"""A model shared by DeepSpeed's ZeRO, as `accelerate launch` was told to: stage 1 cuts the optimizer's moments among
the processes, 2 gradients as well, 3 weights as well.

The settings come from accelerate's file, or from DeepSpeed's that it names, by accelerate's plugin. What a run of ours
decides itself (batches, accumulation, clipping, optimizer, schedule, precision) must not be said otherwise there.

DeepSpeed's optimizer holds float32 of its own beside the model's weights, flat and cut. So whole tensors go through its
functions for parts ("tensor fragments"), and weights that come from a checkpoint are written to both places.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from qwenlet.config import TrainingConfig
from qwenlet.errors import ConfigError
from qwenlet.model import Qwen
from qwenlet.train.batches import Batch
from qwenlet.train.objective import Learner, Objective
from qwenlet.train.optimizer import SEPARATOR, learning_names, new_optimizer
from qwenlet.train.processes import Processes

_NAMES = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}
_MOMENTS = ("exp_avg", "exp_avg_sq")
_SAID_ELSEWHERE = {
    "optimizer": "qwenlet's AdamW is used, with --weight-decay, --beta1, --beta2",
    "scheduler": "--schedule and --warmup say how the rate goes",
    "fp16": "--dtype says what is computed in",
    "bf16": "--dtype says what is computed in",
    "amp": "--dtype says what is computed in",
    "torch_autocast": "--dtype says what is computed in",
}


class ByDeepSpeed:
    """See sharing.py's Sharing for what its methods promise.

    Args:
        model: its parameters that learn require gradients, and are float32; the others become float32, too.
        sample: a batch of `objective`, for a step that changes nothing.
    Raises:
        ConfigError: DeepSpeed is not here, or its settings contradict the run's.
    """

    scale = None

    def __init__(
        self, model: Qwen, objective: Objective, config: TrainingConfig, *, lr: float, dtype: torch.dtype,
        device: torch.device, group: Processes, sample: Batch,
    ) -> None:  # fmt: skip
        if device.type == "cpu":
            os.environ.setdefault("DS_ACCELERATOR", "cpu")  # else it looks for a GPU, and warns where there is none
        try:
            import deepspeed
            from accelerate.utils import DeepSpeedPlugin
        except ImportError as error:
            raise ConfigError(
                f"accelerate launch asks for DeepSpeed, but {error.name} can't be imported: {error}",
                hint="pip install 'qwenlet[train]', and: DS_BUILD_OPS=0 pip install --no-build-isolation deepspeed",
            ) from error
        # its calls of torch's collectives by their former names, at every step
        warnings.filterwarnings("ignore", r"`torch\.distributed\.\w+` is deprecated", FutureWarning)
        if dtype == torch.float16:
            raise ConfigError("dtype is 'fp16', which is not wired in under DeepSpeed", hint="use --dtype bf16 or fp32")
        if config.optimizer != "adamw":
            raise ConfigError(f"optimizer is {config.optimizer!r}, expected 'adamw' under DeepSpeed")
        settings = zero_settings(DeepSpeedPlugin().deepspeed_config, config, dtype, group.count)
        self.deepspeed, self.model, self.sample = deepspeed, model, sample
        self.stage = int(settings["zero_optimization"]["stage"])
        for parameter in model.parameters():
            parameter.data = parameter.data.float()  # it refuses a model of two dtypes
        self.learning = learning_names(model)
        self.optimizer = new_optimizer(model, config, lr)
        self.engine, self.zero, _, _ = deepspeed.initialize(
            model=Learner(model, objective, device, dtype), optimizer=self.optimizer, config=settings
        )

    def loss(self, batch: Batch, objective: Objective | None = None) -> Tensor:
        return self.engine(batch, objective)

    def learn(self, batch: Batch, share: float, *, last: bool) -> Tensor:
        self.engine.set_gradient_accumulation_boundary(last)
        loss = self.loss(batch)
        self.engine.backward(loss * share)
        return loss.detach()

    def move(self, rate: float) -> float:
        for settings in self.zero.param_groups:
            settings["lr"] = rate
        self.engine.step()  # in float32, it leaves weights alone where the norm is not finite
        return float(self.engine.get_global_grad_norm())

    def weights(self) -> dict[str, Tensor]:
        found = {}
        for name, parameter in self.learning.items():
            with self._gathered([parameter]):
                found[name] = parameter.detach().cpu().clone().contiguous()
        return found

    def assign(self, weights: dict[str, Tensor]) -> None:
        for name, parameter in self.learning.items():
            value = weights[name].to(parameter.device)
            with torch.no_grad(), self._gathered([parameter], changed=True):
                parameter.copy_(value)
            self._set(parameter, value)

    def moments(self) -> dict[str, Tensor]:
        state = {}
        self._link_moments()
        (steps,) = {int(kept["step"]) for kept in self.optimizer.state.values() if "step" in kept}
        for name, parameter in self.learning.items():
            state[f"step{SEPARATOR}{name}"] = torch.tensor(float(steps))
            for kind in _MOMENTS:
                whole = self.deepspeed.utils.safe_get_full_optimizer_state(parameter, kind)
                state[f"{kind}{SEPARATOR}{name}"] = whole.detach().cpu().clone().contiguous()
        return state

    def restore(self, weights: dict[str, Tensor], moments: dict[str, Tensor], scale: tuple[float, int] | None) -> None:
        # moments are made by the first step: one with a gradient and a rate of 0 makes them and changes nothing
        self.learn(self.sample, 0.0, last=True)
        self.move(0.0)
        self._link_moments()
        self.assign(weights)
        for name, parameter in self.learning.items():
            for kind in _MOMENTS:
                if (whole := moments.get(f"{kind}{SEPARATOR}{name}")) is not None:
                    self._set(parameter, whole.to(parameter.device), kind)
        steps = [int(tensor) for key, tensor in moments.items() if key.startswith(f"step{SEPARATOR}")]
        for kept in self.optimizer.state.values():
            if "step" in kept:
                kept["step"].fill_(max(steps, default=0))

    @contextmanager
    def whole(self) -> Iterator[None]:
        with self._gathered(list(self.model.parameters())):
            yield

    @contextmanager
    def _gathered(self, parameters: list[torch.nn.Parameter], *, changed: bool = False) -> Iterator[None]:
        """Within it these are whole, in every process; what the first one writes to them is kept where it is said."""
        if self.stage < 3:
            yield
            return
        with self.deepspeed.zero.GatheredParameters(parameters, modifier_rank=0 if changed else None):
            yield

    def _link_moments(self) -> None:
        """DeepSpeed 0.19 links parameters to their moments within its first step, after that of the first group of
        parameters, so that it finds no moments of the second. Done again behind a whole step, all are there."""
        if self.stage < 3:
            self.zero._hp_optimizer_states_linked = False
            self.zero._lazy_init_hp_params_optimizer_state()

    def _set(self, parameter: torch.nn.Parameter, whole: Tensor, kind: str | None = None) -> None:
        """Writes this process's part of the optimizer's float32: of the weight, or of a moment."""
        utils = self.deepspeed.utils
        if self.stage < 3:
            if kind is None:
                utils.safe_set_full_fp32_param(parameter, whole)
            else:
                utils.safe_set_full_optimizer_state(parameter, whole, kind)
            return
        size = parameter.ds_tensor.numel()  # type: ignore[attr-defined]  # zeros follow the last part's end
        part = whole.new_zeros(size)
        mine = whole.flatten()[torch.distributed.get_rank() * size :][:size]
        part[: len(mine)] = mine
        if kind is None:
            utils.safe_set_local_fp32_param(parameter, part)
        else:
            utils.safe_set_local_optimizer_state(parameter, part, kind)


def zero_settings(given: Mapping[str, Any], config: TrainingConfig, dtype: torch.dtype, count: int) -> dict[str, Any]:
    """DeepSpeed's settings as they are used, from those of accelerate's plugin.

    Args:
        dtype: of the arithmetic; count: processes.
    Raises:
        ConfigError: they say otherwise than the run what is the run's to say, or ask for what is not wired in.
    """
    for name, instead in _SAID_ELSEWHERE.items():
        section = given.get(name)
        if section is not None and (not isinstance(section, Mapping) or section.get("enabled", True) is not False):
            raise ConfigError(f"DeepSpeed's settings have {name!r}: {instead}", hint="take it out of the file")
    precision, named = os.environ.get("ACCELERATE_MIXED_PRECISION", "no"), _NAMES[dtype]
    if precision not in ("no", named):
        raise ConfigError(
            f"accelerate's mixed_precision is {precision!r}, but this run computes in {named}",
            hint="leave it 'no' in accelerate's file: --dtype says what is computed in",
        )
    zero = {name: value for name, value in given.get("zero_optimization", {}).items() if value != "auto"}
    if zero.get("stage") not in (1, 2, 3):
        raise ConfigError(f"zero_stage is {zero.get('stage')!r}, expected 1, 2 or 3", hint="without ZeRO: torchrun")
    for part in ("offload_optimizer", "offload_param"):
        if (device := (zero.pop(part, None) or {}).get("device", "none")) != "none":
            raise ConfigError(
                f"{part}'s device is {device!r}, and keeping parts outside the device is not wired in",
                hint="set it to none; --method lora or qlora need less memory",
            )
    batch = config.batch_size * config.accumulation * count
    ours = {
        "train_micro_batch_size_per_gpu": (config.batch_size, "--batch-size"),
        "gradient_accumulation_steps": (config.accumulation, "--accumulation"),
        "gradient_clipping": (config.clip, "--clip"),
        "train_batch_size": (batch, f"--batch-size x --accumulation x {count} processes"),
    }
    for name, (value, flag) in ours.items():
        # accelerate writes 1 for the accumulation where nothing is said
        unsaid = (None, "auto", 1) if name == "gradient_accumulation_steps" else (None, "auto")
        if (said := given.get(name)) not in unsaid and said != value:
            raise ConfigError(
                f"{name} is {said!r} in DeepSpeed's settings, but {flag} is {value}",
                hint="leave it out there, or say the same",
            )
    # a step's batches are as many as there are: `learn` says which is the last, and its shares make the mean
    return dict(given) | {
        "zero_optimization": zero,
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
        "train_batch_size": count,
        "gradient_clipping": config.clip,
        "zero_allow_untested_optimizer": True,
    }
