"""What a run will be, in figures, before it starts.

foresee     memory, steps and tokens: by arithmetic, before weights are loaded
make_plan   the same and the time it takes, by trying a small batch
"""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, replace

import torch

from qwenlet.checkpoint import free_memory
from qwenlet.config import TrainingConfig
from qwenlet.model import Qwen
from qwenlet.train.batches import Batch, count_steps
from qwenlet.train.forecast import Forecast, Mode, forecast
from qwenlet.train.objective import NextToken
from qwenlet.train.processes import Processes
from qwenlet.train.samples import Samples

_TRIAL_TOKENS = 1024
_OPTIMIZER_BYTES = 28  # of a parameter, read and written in a step: weight, gradient, both moments
_NAMES = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}


@dataclass(frozen=True)
class Plan:
    """What a run will be, in figures.

    Attributes:
        learning, all: parameters.
        recompute: what is computed again; forecast: bytes by its parts.
        steps, tokens: of the run.
        memory: bytes that may be used; None: not known.
        seconds: as two batches of it went here, evaluations included; None: not tried yet.
    """

    learning: int
    all: int
    recompute: Mode
    forecast: Forecast
    steps: int
    tokens: int
    memory: int | None
    seconds: float | None = None

    @property
    def peak(self) -> int:
        """Bytes that one process will have resident at most."""
        return self.forecast.peak(self.recompute)


def usable_memory(given: int | None, device: torch.device, group: Processes) -> int | None:
    """Bytes that a process may use: what was given, or what devices have free. The same to all, which must do alike."""
    return group.least(free_memory(device) if given is None else given)


def foresee(
    model: Qwen,
    samples: Samples,
    training: TrainingConfig,
    *,
    frozen_bytes: int,
    budget: int | None,
    memory: int | None,
    dtype: torch.dtype,
    group: Processes,
) -> Plan:
    """Chooses what is computed again.

    Args:
        model: what learns requires gradients; its shapes are looked at, and it may be on the meta device.
        frozen_bytes: of weights that stay in memory.
        budget: tokens of a batch, packed; None: `batch_size` samples.
        memory: bytes that may be used; None: not known, so everything is computed again.
    """
    names = {name: p.numel() for name, p in model.named_parameters() if p.requires_grad}
    learning = sum(names.values())
    made = forecast(
        model.config, frozen_bytes=frozen_bytes, learning=learning,
        adapted=sum(count for name, count in names.items() if "lora_" in name),
        tokens=budget or training.batch_size * int(samples.lengths.max()), dtype=_NAMES[dtype],
        optimizer=training.optimizer, processes=group.count, sharded=training.parallel == "fsdp",
    )  # fmt: skip
    asked = training.checkpointing
    recompute = made.fitting(memory) if asked == "auto" else asked
    objective = NextToken(samples)
    course = objective.course(
        seed=training.seed, batch_size=training.batch_size, budget=budget, group=training.accumulation * group.count
    )
    steps = count_steps(course, training)
    tokens = round(steps / max(len(course.epoch(0)), 1) * int(samples.lengths.sum()))
    return Plan(learning, model.config.parameter_count, recompute, made, steps, tokens, memory)


def make_plan(
    model: Qwen,
    samples: Samples,
    held_out: Samples | None,
    training: TrainingConfig,
    *,
    frozen_bytes: int,
    budget: int | None,
    memory: int | None,
    dtype: torch.dtype,
    device: torch.device,
    group: Processes,
    reference: bool = False,
) -> Plan:
    """What `foresee` says, set in the model and tried.

    Args:
        reference: what the model says before it moves is needed as well.
    """
    plan = foresee(
        model, samples, training, frozen_bytes=frozen_bytes, budget=budget, memory=memory, dtype=dtype, group=group
    )
    model.transformer.recompute = plan.recompute
    whole = int(samples.lengths.sum())
    epochs = plan.tokens / whole
    learn, look = _seconds_a_token(model, samples, training, budget, dtype, device)
    seconds = plan.tokens * learn
    if reference:
        seconds += min(epochs, 1.0) * whole * look
    if held_out is not None:
        times = 1 + (round(epochs) or 1 if training.eval_every is None else -(-plan.steps // training.eval_every))
        seconds += times * int(held_out.lengths.sum()) * look
    moving = plan.steps * plan.learning * _OPTIMIZER_BYTES / _bytes_a_second(device)
    return replace(plan, seconds=seconds / group.count + moving)


def _seconds_a_token(
    model: Qwen,
    samples: Samples,
    training: TrainingConfig,
    budget: int | None,
    dtype: torch.dtype,
    device: torch.device,
) -> tuple[float, float]:
    """(to learn, to look at only), of a batch of some thousand tokens that changes nothing; its second time counts."""
    objective = NextToken(samples)
    small = None if budget is None else min(budget, max(_TRIAL_TOKENS, int(samples.lengths.max())))
    size = training.batch_size if budget is not None else 1
    batch = objective.course(seed=training.seed, batch_size=size, budget=small, group=1).epoch(0)[0].batches[0]
    tokens = max(objective.tokens(batch), 1)
    modes = model.training
    state = torch.get_rng_state()
    try:
        model.train()
        learn = _again(lambda: _learn(model, objective, batch, dtype, device), device)
        model.eval()
        look = _again(lambda: _look(model, objective, batch, dtype, device), device)
    finally:
        model.train(modes)
        torch.set_rng_state(state)
        for parameter in model.parameters():
            parameter.grad = None
    return learn / tokens, look / tokens


def _learn(model: Qwen, objective: NextToken, batch: Batch, dtype: torch.dtype, device: torch.device) -> None:
    with nullcontext() if dtype == torch.float32 else torch.autocast(device.type, dtype):
        loss = objective.loss(model, batch, device)
    (loss / max(objective.weight(batch), 1)).backward()


@torch.no_grad()
def _look(model: Qwen, objective: NextToken, batch: Batch, dtype: torch.dtype, device: torch.device) -> None:
    with nullcontext() if dtype == torch.float32 else torch.autocast(device.type, dtype):
        objective.loss(model, batch, device)


def _again(call: Callable[[], object], device: torch.device) -> float:
    """Seconds of a call's second time, or of its first where that takes long enough to tell."""
    seconds = 0.0
    for _ in range(2):
        begun = time.perf_counter()
        call()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        seconds = time.perf_counter() - begun
        if seconds > 10.0:
            break
    return seconds


def _bytes_a_second(device: torch.device) -> float:
    """Of memory, read and written."""
    x = torch.zeros(1 << 23, device=device)
    y = torch.empty_like(x)
    y.copy_(x)
    return 2 * x.nbytes / max(_again(lambda: y.copy_(x), device), 1e-9)
