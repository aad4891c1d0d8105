"""What memory a device has left, and whether a model fits a GPU: said before any of it is loaded."""

from __future__ import annotations

import torch

from qwenlet import plan
from qwenlet.checkpoint.dtypes import dtype_name
from qwenlet.checkpoint.load import Checkpoint
from qwenlet.checkpoint.moving import memory_to_come
from qwenlet.config import EngineConfig, QuantConfig
from qwenlet.errors import ConfigError


def free_memory(device: torch.device) -> int | None:
    """Bytes that can be had on a device now; None where the system doesn't say."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    free = plan.available_memory()
    return free if free is None else max(0, free - memory_to_come())


def check_room(
    checkpoint: Checkpoint,
    quant: QuantConfig | None,
    dtype: torch.dtype,
    options: EngineConfig,
    device: torch.device,
    *,
    coded: bool,
) -> None:
    """Raises ConfigError, with what would fit, where the memory that is free now holds less than the plan says.

    Args:
        quant: what floats are rounded to; coded: weights run in codes, their own unless `quant` says otherwise.
    """
    free, _ = torch.cuda.mem_get_info(device)
    setup = setup_of(checkpoint, quant, dtype, options, coded=coded)
    needed = plan.estimate(setup).peak
    if needed <= free:
        return
    fits = [f"{change.options} ({change.peak / 1e9:.1f} GB)" for change in plan.advice(setup, free)[:4]]
    raise ConfigError(
        f"the model and {setup.context} tokens of past need {needed / 1e9:.1f} GB on {device}, but "
        f"{free / 1e9:.1f} GB are free there",
        hint=f"these would fit: {', '.join(fits)}" if fits else "a smaller model, or device='cpu'",
    )


def setup_of(
    checkpoint: Checkpoint, quant: QuantConfig | None, dtype: torch.dtype, options: EngineConfig, *, coded: bool
) -> plan.Setup:
    """The model on a GPU, for the planner; without max_context for a page, as the context then is what fits."""
    name = dtype_name(dtype)
    if checkpoint.quant is not None and coded:
        quant = checkpoint.quant if quant is None else checkpoint.quant.completed(quant)
    codes = plan.gguf_bits(checkpoint.header, name) if coded and checkpoint.header is not None else None
    return plan.Setup(
        model=checkpoint.config,
        dtype=name,
        quant=quant,
        codes=codes,
        given=checkpoint.quant,
        kv_cache=options.kv_cache,
        context=min(options.max_context or plan.PAGE_TOKENS, checkpoint.config.context_length),
        chunk=options.chunks("cuda")[0],
        gpu=True,
    )
