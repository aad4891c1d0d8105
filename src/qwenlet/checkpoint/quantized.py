"""Float checkpoint -> quantized checkpoint, in AutoGPTQ's v1 layout, tensor by tensor.

Linears inside the layers are X.qweight, X.qzeros, X.scales, X.g_idx, the rest is float16, as published. Beyond that
layout a head is quantized the way GPTQModel writes it, and an embedding is int8 [V, C] with float16 scales.
Modules have the names of the model's own type: q, k and v lie apart where that type has them apart. Zero points lie
side by side along the outputs, which must fill words of 32 bits: a head that doesn't stays in half precision.

How codes are found is the caller's business; `write_rounded` is the quick way.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor, nn

from qwenlet.checkpoint.codes import float_dtype
from qwenlet.checkpoint.files import WeightFile, read_parts
from qwenlet.checkpoint.gptq import GPTQFile
from qwenlet.checkpoint.importance import rounding_of
from qwenlet.checkpoint.load import Checkpoint, Progress, plan_reading
from qwenlet.checkpoint.names import Layout, Part, parts_of
from qwenlet.checkpoint.rounding import Rounding
from qwenlet.checkpoint.save import ShardWriter, new_folder, write_defaults, write_json, write_tokenizer
from qwenlet.config import ModelConfig, QuantConfig
from qwenlet.errors import CheckpointError, ConfigError
from qwenlet.linear import QuantEmbedding
from qwenlet.ops.packing import GPTQTensors, QuantTensor, to_gptq

# gives the codes of a linear, by our name and its weight [N, K] in float32
WeightOf = Callable[[str, Tensor], QuantTensor]


_WORD = 32  # bits


def fit_layout(quant: QuantConfig, config: ModelConfig) -> QuantConfig:
    """What is written where `quant` is asked for: with group sizes that are numbers, the head in half precision where
    the layout can't hold its codes.

    Raises:
        ConfigError: a group size that cuts a layer.
        CheckpointError: a layer whose outputs don't fill the layout's words.
    """
    quant = quant.fit(config)
    for part in parts_of("transformer.h.0.attn.c_attn.weight", config.qkv_size, _layout(config), config):
        if part.rows * quant.bits % _WORD:
            raise CheckpointError(
                f"{part.name} has {part.rows} rows, but the GPTQ layout packs {_WORD // quant.bits} in a word",
                hint="this model can be rounded while it is loaded, with quant='int4', but not written",
            )
    return quant if head_obstacle(quant, config) is None else replace(quant, head_bits=None)


def head_obstacle(quant: QuantConfig, config: ModelConfig) -> str | None:
    """Why the layout can't hold the codes of the head that `quant` asks for; None if it can, or none are asked for."""
    if quant.head_bits is None or config.vocab_size * quant.head_bits % _WORD == 0:
        return None
    return (
        f"the GPTQ layout packs {_WORD // quant.head_bits} outputs in a word, and {config.vocab_size} don't fill them"
    )


def _layout(config: ModelConfig) -> Layout:
    return "qwen" if config.model_type == "qwen" else "qwen2"


def write_rounded(
    checkpoint: Checkpoint, out: str | Path, quant: QuantConfig, *, progress: Progress | None = None
) -> Path:
    """`write_quantized` with every weight rounded to nearest."""
    quant = fit_layout(quant, checkpoint.config)
    rounding = rounding_of(checkpoint, quant, progress)
    return write_quantized(checkpoint, out, quant, rounding.linear, progress=progress)


def write_quantized(
    checkpoint: Checkpoint,
    out: str | Path,
    quant: QuantConfig,
    weight_of: WeightOf,
    *,
    beside: Callable[[Path], None] | None = None,
    progress: Progress | None = None,
) -> Path:
    """Writes the checkpoint quantized, tokenizer and generation config included.

    Of a GPTQ checkpoint the codes are kept, and `weight_of` is asked for what it left in floats.

    Args:
        quant: what is written, as `fit_layout` settles it.
        weight_of: called once for each linear that is quantized, in the model's order, the head last, with its name
            (such as "transformer.h.0.attn.c_attn") and its weight [N, K] in float32.
        beside: called with the folder before it takes its name, to add files of the caller's.
        progress: called with (bytes read, bytes in all, name).
    Raises:
        ConfigError: a group size that cuts a layer, or a checkpoint that is quantized in another way.
        CheckpointError: the source is incomplete, `out` exists or could not be written, or a layer does not fit the
            layout.
    """
    quant = fit_layout(quant, checkpoint.config)
    if checkpoint.quant is not None and checkpoint.quant.completed(quant) != quant:
        raise ConfigError(
            f"{checkpoint.path} is quantized already, in another way",
            hint="start from the unquantized checkpoint",
        )
    config = checkpoint.config
    if quant.head_bits is not None:
        config = replace(config, tie_word_embeddings=False)  # the head gets codes of its own
    weights = checkpoint.weights()
    model, plan = plan_reading(checkpoint, weights, [])
    writing = _Writing(checkpoint, weights, quant, weight_of)
    done, total = 0, checkpoint.config.parameter_count
    with new_folder(out) as folder:
        section = quant.to_published()
        precision = {"fp16": True} if config.model_type == "qwen" else {}
        write_json(folder / "config.json", config.to_own_layout() | precision | {"quantization_config": section})
        write_json(folder / "quantize_config.json", section)
        write_defaults(folder, config, checkpoint.defaults)
        write_tokenizer(folder, checkpoint, foreign=True)
        writer = ShardWriter(folder)
        for module_name, module in model.named_modules():
            parts = {
                leaf: plan[f"{module_name}.{leaf}"]
                for leaf, _ in module.named_parameters(recurse=False)
                if f"{module_name}.{leaf}" in plan
            }
            if not parts and module_name == "lm_head" and quant.head_bits is not None:
                parts = {"weight": plan["transformer.wte.weight"]}
            for name, tensor in writing.tensors(module_name, module, parts):
                writer.add(name, tensor)
            if parts and progress is not None:
                done += sum(parameter.numel() for parameter in module.parameters(recurse=False))
                progress(min(done, total), total, module_name)
        writer.close()
        if beside is not None:
            beside(folder)
    return Path(out)


class _Writing:
    """The tensors of each module as they go to disk."""

    def __init__(self, checkpoint: Checkpoint, weights: WeightFile, quant: QuantConfig, weight_of: WeightOf) -> None:
        self.config, self.weights, self.quant, self.weight_of = checkpoint.config, weights, quant, weight_of
        self.layout = _layout(checkpoint.config)
        self.rounding = Rounding(quant)

    def tensors(self, name: str, module: nn.Module, parts: dict[str, tuple[Part, ...]]) -> Iterator[tuple[str, Tensor]]:
        for leaf, sources in parts.items():
            ours = f"{name}.{leaf}"
            if leaf == "weight" and isinstance(module, nn.Linear) and self.quant.of_linear(name) is not None:
                yield from self._linear(name, sources)
            elif leaf == "weight" and isinstance(module, nn.Embedding) and self.quant.embedding_bits is not None:
                yield from self._embedding(ours, sources)
            else:
                yield from self._floats(ours, sources)

    def _floats(self, name: str, parts: Sequence[Part]) -> Iterator[tuple[str, Tensor]]:
        whole = read_parts(self.weights, parts, torch.float16)
        if not bool(whole.isfinite().all()):
            raise CheckpointError(
                f"{name} holds numbers beyond float16, in which this layout keeps what is not quantized",
                hint="check the checkpoint: a trained model's weights stay far below 65504",
            )
        targets = self._targets(name, whole.shape[0])
        for target, rows in zip(targets, whole.split([target.rows for target in targets]), strict=True):
            yield target.name, rows

    def _linear(self, name: str, parts: Sequence[Part]) -> Iterator[tuple[str, Tensor]]:
        if isinstance(self.weights, GPTQFile) and self.weights.is_linear(parts):
            for part in parts:  # as stored, one by one: their groups need not be in one order
                kept = self.weights.gptq_tensors([part])
                assert kept is not None
                yield from _four(part.name, kept)
            return
        weight = self.weight_of(name, read_parts(self.weights, parts, torch.float32))
        bits, group_size = self.quant.of_linear(name) or (None, None)
        assert (weight.bits, weight.group_size) == (bits, group_size), f"{name}: {weight.bits}, {weight.group_size}"
        at = 0
        for target in self._targets(f"{name}.weight", weight.shape[0]):
            yield from _four(target.name, to_gptq(_rows(weight, at, at + target.rows)))
            at += target.rows

    def _embedding(self, name: str, parts: Sequence[Part]) -> Iterator[tuple[str, Tensor]]:
        (target,) = self._targets(name, parts[0].rows)
        stored = self.weights.read_embedding(parts[0].name, torch.float32)
        if isinstance(stored, QuantEmbedding):
            codes, scales = stored.codes.flatten(1), stored.scales
        else:
            codes, scales = self.rounding.embedding(read_parts(self.weights, parts, float_dtype(self.weights, parts)))
        yield target.name, codes
        yield f"{target.name.removesuffix('.weight')}.scales", scales

    def _targets(self, name: str, rows: int) -> tuple[Part, ...]:
        return parts_of(name, rows, self.layout, self.config)


def _four(name: str, tensors: GPTQTensors) -> Iterator[tuple[str, Tensor]]:
    stem = name.removesuffix(".weight")
    for leaf in ("qweight", "qzeros", "scales", "g_idx"):
        yield f"{stem}.{leaf}", getattr(tensors, leaf)


def _rows(weight: QuantTensor, start: int, stop: int) -> QuantTensor:
    zeros, minimums = weight.zeros, weight.minimums
    return replace(
        weight,
        codes=weight.codes[start:stop],
        scales=weight.scales[start:stop],
        zeros=None if zeros is None else zeros[start:stop],
        minimums=None if minimums is None else minimums[start:stop],
    )
