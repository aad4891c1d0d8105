"""Model -> one GGUF file, tensor by tensor: what llama.cpp and everything built on it loads.

Matrices are F32, F16, BF16, Q8_0 or Q4_0; norms and biases are F32, as llama.cpp wants them. In a Q4_0 file embedding
and head are Q8_0: four bits there cost more quality than they save.

Dynamic NTK and log-n have no field there; ours stand under `qwenlet.`, where only we look.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from gguf import GGMLQuantizationType as Kind
from gguf import LlamaFileType
from torch import Tensor

from qwenlet.checkpoint.names import parts_of, split
from qwenlet.config import OWN_PREFIX, GenerationDefaults, ModelConfig
from qwenlet.errors import ConfigError

FILE_TYPES = {
    "fp32": (Kind.F32, LlamaFileType.ALL_F32),
    "fp16": (Kind.F16, LlamaFileType.MOSTLY_F16),
    "bf16": (Kind.BF16, LlamaFileType.MOSTLY_BF16),
    "q8_0": (Kind.Q8_0, LlamaFileType.MOSTLY_Q8_0),
    "q4_0": (Kind.Q4_0, LlamaFileType.MOSTLY_Q4_0),
}
_SLICE_ELEMENTS = 1 << 22  # that are quantized at a time


class GGUFOut:
    """Writes a file whose header is made first; then tensors come in the order of the header.

    Args:
        config: of the model as the file names it; its model_type is the architecture.
        shapes: of all our tensors, in the order in which they will be added.
        vocabulary: what `tokenizer_export.gguf_metadata` says, or None for a file without one.
    Raises:
        ConfigError: a matrix whose rows are not made of whole blocks.
    """

    def __init__(
        self,
        path: Path,
        config: ModelConfig,
        dtype: str,
        shapes: Mapping[str, tuple[int, ...]],
        vocabulary: Mapping[str, Any] | None,
        defaults: GenerationDefaults,
        *,
        name: str,
        chat_template: str | None,
    ) -> None:
        self.config, self.dtype = config, dtype
        self._writer = gguf.GGUFWriter(path, config.model_type)
        self._writer.add_name(name)
        self._writer.add_file_type(FILE_TYPES[dtype][1])
        self._shapes(config)
        self._maths(config)
        if vocabulary is not None:
            self._vocabulary(vocabulary)
            if chat_template:
                self._writer.add_chat_template(chat_template)
        self._sampling(defaults)
        for theirs, shape in self._directory(shapes):
            kind = self._kind(theirs, shape)
            stored = gguf.quant_shape_to_byte_shape(shape, kind) if kind not in _PLAIN else shape
            element: np.dtype[Any] = _PLAIN.get(kind, np.dtype(np.uint8))
            size = int(np.prod(stored)) * element.itemsize
            self._writer.add_tensor_info(theirs, stored, element, size, raw_dtype=kind)
        self._writer.write_header_to_file()
        self._writer.write_kv_data_to_file()
        self._writer.write_ti_data_to_file()

    def add(self, name: str, tensor: Tensor) -> None:
        """One of our tensors, in any float dtype."""
        for theirs, rows in split(name, tensor, "gguf", self.config):
            self._writer.write_tensor_data(encode(rows, self._kind(theirs, tuple(rows.shape))))

    def close(self) -> None:
        self._writer.close()

    # ------------------------------------------------------------------------------------------------- metadata

    def _shapes(self, config: ModelConfig) -> None:
        writer = self._writer
        writer.add_vocab_size(config.vocab_size)
        writer.add_context_length(config.max_position_embeddings)
        writer.add_embedding_length(config.hidden_size)
        writer.add_block_count(config.num_hidden_layers)
        # the first generation counts both halves of its feed-forward
        writer.add_feed_forward_length(config.intermediate_size * (2 if config.model_type == "qwen" else 1))
        writer.add_head_count(config.num_attention_heads)
        if config.model_type != "qwen":
            writer.add_head_count_kv(config.num_key_value_heads)
        if config.head_dim * config.num_attention_heads != config.hidden_size:
            writer.add_key_length(config.head_dim)
            writer.add_value_length(config.head_dim)

    def _maths(self, config: ModelConfig) -> None:
        writer = self._writer
        writer.add_layer_norm_rms_eps(config.rms_norm_eps)
        writer.add_rope_freq_base(config.rope_theta)
        writer.add_rope_dimension_count(config.head_dim)
        if config.use_dynamic_ntk or config.use_logn_attn or config.model_type == "qwen":
            writer.add_uint32(f"{OWN_PREFIX}seq_length", config.seq_length)
            writer.add_bool(f"{OWN_PREFIX}use_dynamic_ntk", config.use_dynamic_ntk)
            writer.add_bool(f"{OWN_PREFIX}use_logn_attn", config.use_logn_attn)

    def _vocabulary(self, vocabulary: Mapping[str, Any]) -> None:
        writer = self._writer
        writer.add_tokenizer_model(vocabulary["model"])
        writer.add_tokenizer_pre(vocabulary["pre"])
        writer.add_token_list(vocabulary["tokens"])
        writer.add_token_types(vocabulary["token_type"])
        writer.add_token_merges(vocabulary["merges"])
        for key, value in vocabulary.items():
            if key.endswith("_token_id"):
                writer.add_uint32(f"tokenizer.ggml.{key}", value)
        writer.add_add_bos_token(vocabulary["add_bos_token"])

    def _sampling(self, defaults: GenerationDefaults) -> None:
        """For llama.cpp what it knows, and all of it for us."""
        writer = self._writer
        if defaults.do_sample:
            writer.add_float32("general.sampling.temp", defaults.temperature)
            writer.add_float32("general.sampling.top_p", defaults.top_p)
            writer.add_int32("general.sampling.top_k", defaults.top_k)
            writer.add_float32("general.sampling.min_p", defaults.min_p)
            writer.add_float32("general.sampling.penalty_repeat", defaults.repetition_penalty)
        writer.add_string(f"{OWN_PREFIX}generation_config", json.dumps(defaults.to_published()))

    # -------------------------------------------------------------------------------------------------- tensors

    def _directory(self, shapes: Mapping[str, tuple[int, ...]]) -> Iterator[tuple[str, tuple[int, ...]]]:
        for name, shape in shapes.items():
            for part in parts_of(name, shape[0], "gguf", self.config):
                yield part.name, (part.rows, *shape[1:])

    def _kind(self, name: str, shape: tuple[int, ...]) -> Kind:
        if len(shape) == 1:
            return Kind.F32
        kind = FILE_TYPES[self.dtype][0]
        if kind == Kind.Q4_0 and name in ("token_embd.weight", "output.weight"):
            kind = Kind.Q8_0
        if kind not in _PLAIN and shape[1] % gguf.GGML_QUANT_SIZES[kind][0]:
            raise ConfigError(
                f"{name} has rows of {shape[1]}, which {kind.name} can't cut into blocks of "
                f"{gguf.GGML_QUANT_SIZES[kind][0]}",
                hint="write it in fp16 or bf16",
            )
        return kind


_PLAIN: dict[Kind, np.dtype[Any]] = {
    Kind.F32: np.dtype(np.float32),
    Kind.F16: np.dtype(np.float16),
    Kind.BF16: np.dtype(np.uint16),
}


def encode(tensor: Tensor, kind: Kind) -> np.ndarray[Any, Any]:
    """A tensor as a file of this kind holds it: bfloat16 as its bits, codes as bytes."""
    if kind == Kind.BF16:
        return tensor.to(torch.bfloat16).contiguous().view(torch.uint16).numpy()
    if kind in _PLAIN:
        return tensor.to(torch.float32 if kind == Kind.F32 else torch.float16).contiguous().numpy()
    step = max(1, _SLICE_ELEMENTS // tensor.shape[-1])
    pieces = [gguf.quants.quantize(rows.float().numpy(), kind) for rows in tensor.split(step)]
    return np.concatenate(pieces)
