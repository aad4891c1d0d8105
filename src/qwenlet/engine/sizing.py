"""How many pages an engine gets, and how long a request may be."""

from __future__ import annotations

import torch

from qwenlet.cache import PAGE_TOKENS, pages_for
from qwenlet.checkpoint import free_memory
from qwenlet.config import EngineConfig, ModelConfig
from qwenlet.errors import ConfigError, EngineError
from qwenlet.linear import QuantLinear
from qwenlet.model import Qwen

_CACHE_DTYPES = {"int8": torch.int8, "bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


def cache_dtype(model: Qwen, asked: str) -> torch.dtype:
    """ "auto" is int8 where weights are quantized, else their precision."""
    if asked != "auto":
        return _CACHE_DTYPES[asked]
    quantized = any(isinstance(module, QuantLinear) for module in model.modules())
    return torch.int8 if quantized else next(iter(model.transformer.ln_f.parameters())).dtype


def context_and_pages(
    config: ModelConfig, options: EngineConfig, dtype: torch.dtype, device: torch.device
) -> tuple[int, int]:
    """(tokens of the longest request, pages of the cache).

    Raises:
        ConfigError: a context without published maths, or more pages than memory holds; the message says what fits.
    """
    limit = config.context_length
    if options.max_context is not None and options.max_context > limit:
        raise ConfigError(
            f"max_context is {options.max_context}, but this model has published maths for {limit} positions",
            hint=f"use max_context={limit} or less",
        )
    token = config.cache_bytes(dtype.itemsize)
    free = free_memory(device)
    if options.cache_tokens is not None:
        pages = pages_for(options.cache_tokens)
        if free is not None and pages * PAGE_TOKENS * token > free:
            raise ConfigError(
                f"cache_tokens is {options.cache_tokens}, which take {options.cache_tokens * token / 1e9:.1f} GB, but "
                f"{free / 1e9:.1f} GB are free",
                hint=f"cache_tokens={free // (PAGE_TOKENS * token) * PAGE_TOKENS} would fit",
            )
        return min(options.max_context or limit, pages * PAGE_TOKENS), pages
    context = options.max_context
    if context is None:
        # on a GPU pages take their memory at once: as much of it as half of what is free holds
        affordable = free // 2 // token if device.type == "cuda" and free is not None else limit
        context = max(min(limit, affordable), 1)
    return context, pages_for(context)


def out_of_memory(error: Exception, device: torch.device) -> EngineError:
    """What a step that found no memory says to the request that asked too much. Gives back what torch holds unused."""
    free = ""
    if device.type == "cuda":
        torch.cuda.empty_cache()
        left, whole = torch.cuda.mem_get_info(device)
        free = f"; {left / 1e9:.2f} of {whole / 1e9:.1f} GB are free now"
    return EngineError(
        f"{device} ran out of memory in this step ({str(error).splitlines()[0]:.200}){free}",
        hint="ask for less at once (a shorter prompt, prefill_chunk=256), or load with a smaller cache_tokens",
    )
