"""An adapter added into a checkpoint's weights, tensor by tensor: what comes out needs no adapter any more.

An adapter that was trained beside weights in codes belongs to what those codes are worth, not to the floats they were
rounded from. Three ways out of that, and the difference is measured by whoever calls:
    merge into the quantized checkpoint: its codes are dequantized
    merge into the float checkpoint as it was rounded for training (`beside`)
    merge into the floats themselves: closest to the model as published, off by what rounding had cost
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from qwenlet.checkpoint import Change, Checkpoint, Progress, Rounding, convert, rounding_of, write_rounded
from qwenlet.checkpoint.save import refuse_existing
from qwenlet.config import EMBEDDING_GROUP_SIZE, QuantConfig
from qwenlet.lora.adapter import Adapter
from qwenlet.model import Qwen

_WTE, _HEAD = "transformer.wte.weight", "lm_head.weight"


def merge(
    source: str | Path,
    adapter: str | Path,
    out: str | Path,
    *,
    to: str = "own",
    dtype: str | None = None,
    beside: QuantConfig | None = None,
    quant: QuantConfig | None = None,
    progress: Progress | None = None,
) -> Path:
    """Writes `source` with the adapter in its weights.

    Args:
        to, dtype: as `convert`; the model's own layout, in the precision that is stored, unless given.
        beside: add to weights rounded like this, which the adapter was trained beside.
        quant: round what comes out, into a GPTQ folder.
        progress: called with (bytes done, bytes in all, tensor name).
    Raises:
        CheckpointError: an adapter that doesn't fit, an incomplete source, or `out` exists.
        ConfigError: a layout or a rounding that this model doesn't allow.
    """
    checkpoint = Checkpoint.open(source)
    change = change_of(checkpoint, Adapter.read(adapter, checkpoint.config), beside)
    if quant is None:
        return convert(source, out, to=to, dtype=dtype, change=change, progress=progress)
    out = Path(out).resolve()
    refuse_existing(out)
    quant.fit(change.of_config(checkpoint.config))  # what can't be rounded is refused before gigabytes are written
    floats = out.with_name(f".{out.name}.merged")
    try:
        _remove(floats)
        convert(source, floats, to="own", dtype=dtype, change=change, progress=progress)
        return write_rounded(Checkpoint.open(floats), out, quant, progress=progress)
    finally:
        _remove(floats)


def change_of(checkpoint: Checkpoint, adapter: Adapter, beside: QuantConfig | None = None) -> Change:
    """What an adapter does to a checkpoint's weights."""
    config, changes = checkpoint.config, dict[str, Callable[[Tensor], Tensor]]()
    if beside is not None:
        changes |= _rounded(checkpoint, rounding_of(checkpoint, beside.fit(config)))
    for name, factors in adapter.factors.items():
        before = changes.get(f"{name}.weight", _same)
        changes[f"{name}.weight"] = partial(_after, before, factors.added_to)
    for name, tensor in adapter.saved.items():
        changes[name] = partial(_instead, tensor)
    untie = config.tie_word_embeddings and _head_differs(adapter)
    return Change(changes, adapter.vocab_size, untie, adapter.chat_format)


def _same(weight: Tensor) -> Tensor:
    return weight


def _after(first: Callable[[Tensor], Tensor], then: Callable[[Tensor], Tensor], weight: Tensor) -> Tensor:
    return then(first(weight))


def _instead(tensor: Tensor, weight: Tensor) -> Tensor:
    return tensor


def _head_differs(adapter: Adapter) -> bool:
    """Whether a tied pair is no longer one."""
    if "lm_head" in adapter.factors or "transformer.wte" in adapter.factors:
        return True
    wte, head = (adapter.saved.get(name) for name in (_WTE, _HEAD))
    return head is not None and (wte is None or not torch.equal(wte, head))


def _rounded(checkpoint: Checkpoint, rounding: Rounding) -> dict[str, Callable[[Tensor], Tensor]]:
    """Every weight as training in codes saw it."""
    with torch.device("meta"):
        model = Qwen(checkpoint.config)
    changes: dict[str, Callable[[Tensor], Tensor]] = {}
    for name, module in model.named_modules():
        if hasattr(module, "out_features") and rounding.quant.of_linear(name) is not None:
            changes[f"{name}.weight"] = partial(_rounded_linear, rounding, name)
    if rounding.quant.embedding_bits is not None and not checkpoint.config.tie_word_embeddings:
        changes[_WTE] = partial(_rounded_embedding, rounding)
    return changes


def _rounded_linear(rounding: Rounding, name: str, weight: Tensor) -> Tensor:
    return rounding.linear(name, weight).dequantize()


def _rounded_embedding(rounding: Rounding, table: Tensor) -> Tensor:
    codes, scales = rounding.embedding(table)
    groups = codes.float().unflatten(1, (-1, EMBEDDING_GROUP_SIZE))
    return (groups * scales.float()[..., None]).flatten(1)


def _remove(folder: Path) -> None:
    shutil.rmtree(folder, ignore_errors=True)
