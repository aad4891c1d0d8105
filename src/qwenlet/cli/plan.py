"""`qwenlet plan`: the memory a model will take, before anything is loaded. Reads configurations, never weights."""

from __future__ import annotations

import json
import re
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from qwenlet import plan as planning
from qwenlet.cli import console
from qwenlet.cli.options import new_app
from qwenlet.cli.random import MODELS
from qwenlet.config import EngineConfig, ModelConfig, QuantConfig, config_from_gguf, read_json
from qwenlet.config.engine import KV_CACHES
from qwenlet.config.quant import keeps_codes
from qwenlet.errors import CheckpointError, ConfigError, OfflineError, RequestError
from qwenlet.machine import cpu_info, gpu_memory
from qwenlet.plan import available_memory

if TYPE_CHECKING:
    from rich.table import Table

    from qwenlet.gguf_header import GGUFHeader

app = new_app()

_UNITS = {"": 1, "k": 10**3, "M": 10**6, "G": 10**9, "T": 10**12}
_QUANTIZED_DTYPE = "fp32"  # of what is not quantized in a quantized model, on a CPU
_GPU_DTYPE = "bf16"  # on a GPU of compute capability 8.0 and up; older ones take fp16, which is as large
# what config.json calls the dtype of its weights
_STORED = {"bfloat16": "bf16", "float16": "fp16", "float32": "fp32"}


@dataclass(frozen=True)
class Source:
    """What is known of a model without its weights; `stored` is the dtype that its config names."""

    name: str
    config: ModelConfig
    quant: QuantConfig | None = None
    stored: str | None = None
    header: GGUFHeader | None = None


@app.command()
def plan(
    model: Annotated[
        str | None, typer.Argument(help="A model as for chat; of one that is not here, only config.json is fetched.")
    ] = None,
    like: Annotated[str | None, typer.Option(help=f"A shape by name instead. One of: {', '.join(MODELS)}.")] = None,
    quant: Annotated[str | None, typer.Option(help="int4, int8 or none; as the checkpoint is unless given.")] = None,
    dtype: Annotated[
        str | None, typer.Option(help="bf16, fp16 or fp32; what suits this processor unless given.")
    ] = None,
    kv_cache: Annotated[str, typer.Option(help=f"How the past is stored. One of: {', '.join(KV_CACHES)}.")] = "auto",
    context: Annotated[
        int | None, typer.Option(min=1, help="Tokens of prompt and reply; the training length unless given.")
    ] = None,
    batch: Annotated[int, typer.Option(min=1, help="Requests at a time.")] = 1,
    device: Annotated[str, typer.Option(help="Where it shall run: cpu, cuda, or cuda:N.")] = "cpu",
    memory: Annotated[
        str | None, typer.Option(help="A limit such as 4G or 900M; what is free here, or on the GPU, unless given.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object instead of a table.")] = False,
    offline: Annotated[bool, typer.Option("--offline", help="Use only what is on this machine.")] = False,
) -> None:
    """Say how much memory a model will take, whether it fits, and what to change where it doesn't."""
    gpu = _gpu_index(device)
    if memory is not None:
        limit: int | None = parse_size(memory)
    else:
        limit = available_memory() if gpu is None else gpu_memory(gpu)
    source = _source(model, like, offline)
    setup = setup_of(source, quant, dtype, context, gpu=gpu is not None)
    setup = replace(setup, kv_cache=kv_cache, batch=batch)
    if as_json:
        print(json.dumps(_facts(source, setup, limit, dtype), ensure_ascii=False, indent=2))
    else:
        _print(source, setup, limit, dtype)


def _gpu_index(device: str) -> int | None:
    """Of "cuda" or "cuda:N"; None: the CPU."""
    if device == "cpu":
        return None
    match = re.fullmatch(r"cuda(?::(\d+))?", device)
    if match is None:
        raise typer.BadParameter(f"{device!r} is not cpu, cuda or cuda:N", param_hint="--device")
    return int(match[1] or 0)


def setup_of(
    source: Source,
    quant: str | None = None,
    dtype: str | None = None,
    context: int | None = None,
    *,
    gpu: bool = False,
) -> planning.Setup:
    """What `qwenlet.load` would choose where nothing is asked for: on a CPU, or on a GPU that computes in bfloat16."""
    asked = None if quant in (None, "none", "stored") else QuantConfig.named(quant)
    beside = _GPU_DTYPE if gpu else _QUANTIZED_DTYPE
    if asked is not None and not gpu and dtype not in (None, beside):
        raise ConfigError(f"dtype is {dtype!r}, but quantized weights compute in fp32", hint="leave --dtype out")
    codes = None
    if asked is not None and source.quant is not None:
        asked = source.quant.completed(asked)
    elif dtype is None and (
        quant == "stored"
        or (quant is None and keeps_codes(source.config.parameter_count, gguf=source.header is not None))
    ):
        asked = source.quant
        codes = None if source.header is None else planning.gguf_bits(source.header, beside)
    quantized = asked is not None or codes is not None
    chosen = dtype or (beside if quantized or gpu else _auto_dtype())
    as_stored = source.header is None and source.quant is None and source.stored in (None, chosen)
    return planning.Setup(
        model=source.config,
        dtype=chosen,
        quant=asked,
        codes=codes,
        context=context or min(source.config.seq_length, source.config.context_length),
        gguf=source.header is not None,
        mapped=quantized or as_stored,
        stored=source.stored or ("fp16" if source.quant is not None else None),
        given=source.quant,
        chunk=EngineConfig().chunks("cuda" if gpu else "cpu")[0],
        gpu=gpu,
    )


def parse_size(text: str) -> int:
    """Bytes: "4G" is 4 * 10^9, "4GiB" 4 * 2^30. Raises RequestError for what is no size."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([kKMGT]?)(i?)[bB]?", text.strip())
    if match is None or (match[3] and not match[2]) or not float(match[1]):
        raise RequestError(f"{text!r} is no amount of memory", hint="write it like 4G, 900M or 3.5GiB")
    unit = match[2].replace("K", "k")
    scale = 1024 ** list(_UNITS).index(unit) if match[3] else _UNITS[unit]
    return int(float(match[1]) * scale)


def _auto_dtype() -> str:
    """What dtype "auto" is on this processor, by its flags: torch, which knows, would take a second to import."""
    _, flags = cpu_info()
    return "bf16" if flags & {"avx512_bf16", "amx_tile"} else "fp32"


# ------------------------------------------------------------------------------------------------- the configuration


def _source(model: str | None, like: str | None, offline: bool) -> Source:
    if (model is None) == (like is None):
        raise RequestError(
            "give a model, or a shape with --like, and not both" if model else "there is no model to plan for",
            hint=f"qwenlet plan --like {next(iter(MODELS))}",
        )
    if like is not None:
        if like not in MODELS:
            raise typer.BadParameter(f"{like!r} is not one of {', '.join(MODELS)}", param_hint="--like")
        return Source(like, MODELS[like]())
    assert model is not None
    from qwenlet import hub

    try:
        path = hub.resolve(model, offline=True)
    except OfflineError:
        if hub.is_offline(offline or None):
            raise
        return _described(model, hub.published_config(model), f"config.json of {model}")
    return local_source(model, path)


def local_source(name: str, path: Path) -> Source:
    """A folder, or a GGUF file: its configuration alone."""
    if path.is_dir():
        ggufs = sorted(path.glob("*.gguf"))
        if (path / "config.json").exists() or len(ggufs) != 1:
            raw = read_json(path / "config.json")
            beside = path / "quantize_config.json"
            if "quantization_config" not in raw and beside.exists():
                raw["quantization_config"] = read_json(beside)
            return _described(name, raw, str(path / "config.json"))
        path = ggufs[0]
    if path.suffix == ".json":
        return _described(name, read_json(path), str(path))
    if not path.exists():
        raise CheckpointError(f"{path} does not exist")
    from qwenlet.gguf_header import read_header

    header = read_header(path)
    return Source(name, config_from_gguf(header.metadata, list(header.tensors), str(path)), header=header)


def _described(name: str, raw: dict[str, Any], source: str) -> Source:
    section = raw.get("quantization_config")
    quant = None if section is None else QuantConfig.from_published(section, source)
    return Source(name, ModelConfig.from_dict(raw, source), quant, _stored_dtype(raw))


def _stored_dtype(raw: dict[str, Any]) -> str | None:
    """By transformers' field, or by the flags of the published Qwen-1 config."""
    named = raw.get("torch_dtype", raw.get("dtype"))
    if isinstance(named, str):
        return _STORED.get(named)
    return next((flag for flag in planning.ITEM_BYTES if raw.get(flag) is True), None)


# --------------------------------------------------------------------------------------------------------- the answer


def _facts(source: Source, setup: planning.Setup, limit: int | None, dtype: str | None) -> dict[str, Any]:
    found = planning.estimate(setup)
    facts: dict[str, Any] = {
        "model": source.name,
        "parameters": setup.model.parameter_count,
        "quantization": weights_text(setup),
        "kv_cache": setup.cache_type,
        "context": setup.context,
        "batch": setup.batch,
        **found.to_dict(),
        "memory": limit,
    }
    if limit is not None:
        facts |= {
            "fits": found.peak <= limit,
            "largest_context": planning.fitting(setup, limit),
            "advice": [
                {"options": change.options, "without": _without(change, setup, dtype), "peak": change.peak}
                for change in planning.advice(setup, limit)
            ],
        }
    return facts


def _without(change: planning.Change, setup: planning.Setup, dtype: str | None) -> list[str]:
    """Options that were given and don't go with the change: quantized weights compute in one precision on a CPU."""
    clashes = change.setup.quant is not None and not setup.gpu and dtype not in (None, _QUANTIZED_DTYPE)
    return ["--dtype"] if clashes else []


def weights_text(setup: planning.Setup) -> str:
    quant = setup.quant
    if quant is None:
        return setup.dtype if setup.codes is None else "as the file stores it"
    head = "bf16" if quant.head_bits is None else f"int{quant.head_bits} in groups of {quant.head_group_size}"
    floats = setup.dtype if setup.gpu else setup.stored or setup.dtype
    embedding = floats if quant.embedding_bits is None else f"int{quant.embedding_bits}"
    return f"int{quant.bits} in groups of {quant.group_size}, head {head}, embedding {embedding}"


def _print(source: Source, setup: planning.Setup, limit: int | None, dtype: str | None) -> None:
    from rich.console import Console

    width = None if console.is_terminal(sys.stdout) else 160
    out = Console(width=width, highlight=False, markup=False, emoji=False)
    found = planning.estimate(setup)
    title = f"{source.name}: {setup.model.parameter_count:,} parameters, {weights_text(setup)}"
    for heading, table in (
        (title, _memory_table(setup, found, limit)),
        ("What a token costs", _cost_table(setup, found, limit)),
    ):
        out.print(console.printable(heading), style="bold")
        out.print(table)
        out.print()
    changes = [] if limit is None else planning.advice(setup, limit)
    if changes:
        out.print("Each of these would fit", style="bold")
        table = _table()
        for change in changes:
            without = "".join(f", without {option}" for option in _without(change, setup, dtype))
            table.add_row(f"{change.options}{without}", console.size(change.peak))
        out.print(table)
    elif limit is not None and found.peak > limit:
        out.print("No setting makes this model fit: it takes a smaller model, or a larger machine.")


def _table() -> Table:
    from rich.table import Table

    table = Table(box=None, show_header=False)
    table.add_column(style="cyan", min_width=16)
    table.add_column(justify="right", no_wrap=True)
    table.add_column(style="dim")
    return table


def _memory_table(setup: planning.Setup, found: planning.Plan, limit: int | None) -> Table:
    table = _table()
    for kind in found.weights:
        part = "" if setup.gpu or kind.resident == kind.stored else f"; the rows in use, of {console.size(kind.stored)}"
        table.add_row(kind.name, console.size(kind.resident), f"{kind.bits:.2f} bits a weight{part}")
    each = planning.cache_bytes_per_token(setup.model, setup.cache_type)
    rows = "" if setup.batch == 1 else f" in each of {setup.batch} requests"
    table.add_row("past", console.size(found.cache),
                  f"{setup.context:,} tokens{rows}, {each:,} bytes each in {setup.cache_type}")  # fmt: skip
    table.add_row("activations", console.size(found.activations), f"{min(setup.chunk, setup.context)} tokens a step")
    table.add_row("runtime", console.size(found.runtime),
                  "workspaces, recorded steps" if setup.gpu else "Python, torch, the vocabulary")  # fmt: skip
    table.add_row("while loading", console.size(found.loading),
                  "the largest tensor a second time, before past and activations")  # fmt: skip
    fits = ""
    if limit is not None:
        fits = f"{'fits in' if found.peak <= limit else 'does not fit in'} {console.size(limit)}"
    table.add_row("peak", console.size(found.peak), fits, style="bold")
    return table


def _cost_table(setup: planning.Setup, found: planning.Plan, limit: int | None) -> Table:
    table = _table()
    weights = sum(kind.read for kind in found.weights)
    shares = f"read: {console.size(weights)} of weights, {console.size(found.decode_bytes - weights)} of past"
    table.add_row("decoded", console.size(found.decode_bytes), shares)
    table.add_row("of a prompt", f"{found.prefill_operations / 1e9:.1f} G", "multiplications and additions")
    if limit is not None:
        largest = planning.fitting(setup, limit)
        table.add_row("largest context", "none" if largest is None else f"{largest:,}",
                      f"of {setup.model.context_length:,}, within {console.size(limit)}")  # fmt: skip
    return table
