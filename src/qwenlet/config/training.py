"""How a model is trained."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal, get_args, get_type_hints

from qwenlet.errors import ConfigError


def _check_choices(config: Any) -> None:
    for name, hint in get_type_hints(type(config)).items():
        choices = get_args(hint)
        if choices and all(isinstance(choice, str) for choice in choices) and getattr(config, name) not in choices:
            raise ConfigError(f"{name} is {getattr(config, name)!r}, expected one of {', '.join(choices)}")


def _check_range(config: Any, low: float, *names: str, open: bool = False) -> None:
    for name in names:
        value = getattr(config, name)
        if value is None:
            continue
        if not math.isfinite(value) or value < low or (open and value == low):
            raise ConfigError(f"{name} is {value!r}, expected {'more than' if open else 'at least'} {low:g}")


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """How data become samples.

    Attributes:
        max_length: tokens of a sample at most; texts are cut into pieces of it.
        long: what becomes of longer dialogues: left out, cut to the length, or an error.
        labels: what is learned: the assistant's turns, the last of them, what the published code learns (the control
            tokens of every role too), or everything.
        system: the system message of dialogues without one: as the model's chats have it, none, or a text of your own.
        bad: what becomes of records that can't be used.
    """

    max_length: int = 512
    long: Literal["drop", "cut", "error"] = "drop"
    labels: Literal["assistant", "last", "published", "all"] = "assistant"
    system: str = "auto"
    bad: Literal["error", "skip"] = "error"

    def __post_init__(self) -> None:
        _check_choices(self)
        _check_range(self, 2, "max_length")


@dataclass(frozen=True, kw_only=True)
class TrainingConfig:
    """How a run goes.

    Attributes:
        epochs: times every sample is seen.
        max_steps: end after so many optimizer steps, whatever the epochs say.
        batch_size: samples of a batch; packed, so many times max_length tokens.
        accumulation: batches that each process adds up for a step of the optimizer.
        packed: fill batches by tokens instead of samples.
        lr: learning rate at its height; by the method unless given: 1e-5 for full, 3e-4 for adapters.
        schedule: how it falls after the warm-up.
        warmup: share of the steps in which it rises, or from 1 on their number.
        min_lr: share of the height at which cosine and linear end.
        weight_decay, beta1, beta2: of AdamW; norms and biases don't decay.
        clip: largest norm of the gradient; 0: any.
        optimizer: adamw, or adamw8bit, whose moments take a byte each (needs bitsandbytes).
        dtype: of weights that stay and of the arithmetic; weights that learn are kept in float32 beside.
        checkpointing: what a block keeps for its gradient: nothing and computes everything again, the products of its
            weights, or everything; auto takes the most that fits in memory.
        eval_every: steps between two evaluations; once an epoch unless given.
        patience: stop after so many evaluations without a better one.
        save_every: steps between two checkpoints to go on from; as often as is evaluated unless given.
        keep: checkpoints that stay.
        seed: of the order, of new weights and of dropout.
        dpo_beta: of DPO: how dear it is to leave the model as it was.
        parallel: how several processes share the work: ddp, each with the whole model; fsdp, each with a part of it;
            auto, by DeepSpeed where accelerate launch asks for it, else ddp.
    """

    epochs: float = 3.0
    max_steps: int | None = None
    batch_size: int = 1
    accumulation: int = 8
    packed: bool = True
    lr: float | None = None
    schedule: Literal["cosine", "linear", "constant"] = "cosine"
    warmup: float = 0.03
    min_lr: float = 0.0
    weight_decay: float = 0.1
    beta1: float = 0.9
    beta2: float = 0.95
    clip: float = 1.0
    optimizer: Literal["adamw", "adamw8bit"] = "adamw"
    dtype: Literal["auto", "bf16", "fp16", "fp32"] = "auto"
    checkpointing: Literal["auto", "full", "products", "none"] = "auto"
    eval_every: int | None = None
    patience: int | None = None
    save_every: int | None = None
    keep: int = 2
    seed: int = 0
    dpo_beta: float = 0.1
    parallel: Literal["auto", "ddp", "fsdp"] = "auto"

    def __post_init__(self) -> None:
        _check_choices(self)
        _check_range(self, 0, "epochs", "lr", "dpo_beta", open=True)
        _check_range(self, 0, "warmup", "min_lr", "weight_decay", "clip", "beta1", "beta2", "seed")
        _check_range(self, 1, "max_steps", "batch_size", "accumulation", "eval_every", "patience", "save_every", "keep")
        for name in ("beta1", "beta2", "min_lr"):
            if getattr(self, name) > 1 or (name != "min_lr" and getattr(self, name) == 1):
                raise ConfigError(f"{name} is {getattr(self, name)}, expected less than 1")
