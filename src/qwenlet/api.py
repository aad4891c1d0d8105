"""load: a name or a path -> an LLM, on the device, in the precision and with the cache that were asked for."""

from __future__ import annotations

from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from qwenlet import hub
from qwenlet.checkpoint import (
    Checkpoint,
    LoadReport,
    Progress,
    auto_dtype,
    check_dtype,
    check_room,
    device_by_name,
    dtype_by_name,
    dtype_name,
    load_model,
    load_quantized,
    read_tokenizer,
    rounding_of,
)
from qwenlet.config import EngineConfig, QuantConfig
from qwenlet.config.quant import keeps_codes
from qwenlet.errors import ConfigError
from qwenlet.llm import LLM
from qwenlet.model import Qwen
from qwenlet.ops import cpu
from qwenlet.ops.attention import check_backend


def load(
    name_or_path: str | Checkpoint,
    device: str = "auto",
    dtype: str = "auto",
    quant: str | QuantConfig | None = None,
    kv_cache: str = "auto",
    offline: bool | None = None,
    *,
    revision: str | None = None,
    progress: Progress | None = None,
    adapters: Mapping[str, str | Path] | None = None,
    **engine_options: Any,
) -> LLM:
    """Loads a model, ready to chat.

    Args:
        name_or_path: a folder in any layout we read, a .gguf file, a hub id such as "Qwen/Qwen-1_8B-Chat", or "demo";
            or a checkpoint that was opened already.
        device: "auto" (a GPU if torch can use one, else the CPU), "cpu", "cuda", "cuda:1".
        dtype: precision of the weights: "bf16", "fp16", "fp32", or "auto": quantized weights stay as they are, others
            take what is fast where the model will live.
        quant: "int4", "int8" or a QuantConfig rounds weights to nearest while they are read and (on a CPU) keeps the
            result in qwenlet's cache; a GPTQ checkpoint keeps its codes, and what it left in half precision is
            rounded. "stored" runs quantized weights (GPTQ; Q4_0, Q4_1 and Q8_0 of GGUF) as they are, "none" makes
            floats of them. None means "stored" unless `dtype` names a precision, the package was built without
            kernels for the processor it runs on, or a GGUF model is so small (below half a billion parameters, as the
            demo is) that memory is no reason to round its activations. On a CPU quantized weights compute in fp32, on
            a GPU in `dtype`.
        kv_cache: how keys and values are stored: "int8", "bf16", "fp16", "fp32", or "auto": int8 if weights run
            quantized, else the precision of the weights.
        offline: True forbids any network use; None asks QWENLET_OFFLINE and HF_HUB_OFFLINE.
        revision: branch, tag or commit on the hub.
        progress: called with (bytes done, bytes in all, what) while files are fetched and weights are read.
        adapters: folders of LoRA adapters by name, for `SamplingParams(adapter=name)`; as `LLM.add_adapter` loads them.
        engine_options: the fields of EngineConfig, such as max_context=4096.
    Raises:
        QwenletError: its branches say what was wrong with the name, the files, the configuration or an option.
    """
    options = EngineConfig.from_options(engine_options | {"kv_cache": kv_cache})
    asked = _quant(quant)
    where = device_by_name(device)
    named = None if dtype == "auto" else dtype_by_name(dtype)
    if named is not None:
        check_dtype(named, where)
    if asked is not None:
        _check_quant(asked, where, named)
    if isinstance(name_or_path, Checkpoint):
        checkpoint, name = name_or_path, str(name_or_path.path)
    else:
        name = str(name_or_path)
        checkpoint = Checkpoint.open(hub.resolve(name, offline=offline, revision=revision, progress=progress))
    as_stored = _runs_as_stored(checkpoint, quant, where, named)
    coded = asked is not None or as_stored
    if coded and where.type == "cpu":
        chosen, reason = torch.float32, "quantized weights compute in it"
    else:
        chosen, reason = auto_dtype(where) if named is None else (named, "")
    if coded:
        options = replace(options, kv_cache="int8") if options.kv_cache == "auto" else options
    else:
        options = replace(options, kv_cache=dtype_name(chosen)) if options.kv_cache == "auto" else options
    check_backend(options.attention, where, chosen)
    if where.type == "cuda":
        check_room(checkpoint, asked, chosen, options, where, coded=coded)
    # the vocabulary is Python's work and the weights are the kernels': side by side they take half as long
    with ThreadPoolExecutor(1) as side:
        reading = side.submit(read_tokenizer, checkpoint)
        if coded:
            model, report = _load_quantized(checkpoint, asked, options, chosen, where, progress)
        else:
            model, report = load_model(checkpoint, chosen, where, linear=options.linear, progress=progress)
        tokenizer = reading.result()
    report.notes.append(f"{dtype_name(chosen)} {f'because {reason}' if reason else 'asked for'}")
    llm = LLM(name, checkpoint, model, tokenizer, where, chosen, options, report)
    for name, folder in (adapters or {}).items():
        llm.add_adapter(name, folder)
    return llm


def _runs_as_stored(
    checkpoint: Checkpoint, quant: str | QuantConfig | None, device: torch.device, dtype: torch.dtype | None
) -> bool:
    """Whether a checkpoint's codes go into the kernels unchanged."""
    if quant == "stored":
        if not checkpoint.is_quantized:
            raise ConfigError(f"quant is 'stored', but {checkpoint.path} is not quantized", hint="leave quant out")
        if device.type == "cpu" and dtype not in (None, torch.float32):
            raise ConfigError(
                "quant is 'stored', which on a CPU needs no dtype but fp32", hint="use quant='none' for floats"
            )
        return True
    if quant is not None or not checkpoint.is_quantized or dtype is not None:
        return False
    if device.type == "cpu" and cpu.status().isa is None:
        return False  # floats on torch's operators take three times the memory, codes on the plain definition forever
    return keeps_codes(checkpoint.config.parameter_count, gguf=checkpoint.header is not None)


def _quant(quant: str | QuantConfig | None) -> QuantConfig | None:
    """What to round to, if anything."""
    if isinstance(quant, QuantConfig):
        return quant
    if quant in (None, "none", "stored"):
        return None
    if not isinstance(quant, str):
        raise ConfigError(f"quant is {quant!r}, expected None, 'stored', 'none', 'int4', 'int8' or a QuantConfig")
    return QuantConfig.named(quant)


def _check_quant(quant: QuantConfig, device: torch.device, dtype: torch.dtype | None) -> None:
    if device.type == "cpu" and dtype not in (None, torch.float32):
        raise ConfigError(
            f"dtype is {dtype_name(dtype)!r}, but quantized weights compute in fp32 on a CPU", hint="leave dtype out"
        )
    if quant.method != "rtn":
        raise ConfigError(
            f"quant has method {quant.method!r}, but weights are rounded to nearest ('rtn') while loading",
            hint="qwenlet quantize writes a GPTQ checkpoint, which loads as it is",
        )


def _load_quantized(
    checkpoint: Checkpoint,
    quant: QuantConfig | None,
    options: EngineConfig,
    dtype: torch.dtype,
    device: torch.device,
    progress: Progress | None,
) -> tuple[Qwen, LoadReport]:
    """The model with codes as `quant` says, or as they are stored."""
    if quant is not None:
        quant = quant if checkpoint.quant is None else checkpoint.quant.completed(quant)
        quant = quant.fit(checkpoint.config)
        quant = None if quant == checkpoint.quant else quant
    if device.type != "cpu":
        rounding = None if quant is None else rounding_of(checkpoint, quant, progress)
        return load_model(checkpoint, dtype, device, quantized=True, rounding=rounding, progress=progress)
    cache = hub.cache_dir() / "kernels" if options.tile_cache else None
    return load_quantized(checkpoint, quant, cache, linear=options.linear, progress=progress)
