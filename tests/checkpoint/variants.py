"""The tiny golden model in other clothes: sharded, pickled, cut as Qwen2 and Llama files cut it, and as GGUF.

Every writer here is written from the formats' descriptions and shares no code with the readers under test.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from gguf import GGMLQuantizationType as Kind
from safetensors.torch import load_file, save_file

from qwenlet.cache import Rows
from qwenlet.checkpoint import Checkpoint, load_model
from qwenlet.config import ModelConfig
from qwenlet.model import Qwen

CPU = torch.device("cpu")
IDS = torch.tensor([5, 300, 17, 42, 42, 0, 383, 99])  # shorter than the tiny model's seq_length: all layouts agree

State = dict[str, torch.Tensor]

LLAMA = ModelConfig(
    model_type="llama", vocab_size=384, hidden_size=64, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=2, head_dim=16, intermediate_size=96, max_position_embeddings=64, seq_length=64,
    rms_norm_eps=1e-5, rope_theta=10000.0, qkv_bias=False, tie_word_embeddings=True,
)  # fmt: skip


def load(path: Path, dtype: torch.dtype = torch.float32, **options: Any) -> Qwen:
    return load_model(Checkpoint.open(path), dtype, CPU, **options)[0]


def logits(model: Qwen | Path) -> torch.Tensor:
    """Of a short prompt, in float32."""
    if isinstance(model, Path):
        model = load(model)
    with torch.no_grad():
        return model(IDS, Rows.fresh([len(IDS)], [1.0])).float()


def tiny_state(tiny: Path) -> State:
    return load_file(tiny / "model.safetensors")


def random_llama(seed: int = 0, **changes: Any) -> Qwen:
    """No biases, a tied head, two query heads to a key/value head."""
    torch.manual_seed(seed)
    model = Qwen(replace(LLAMA, **changes))
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return model.eval()


# ----------------------------------------------------------------------------------------------------------- folders


def write_json(path: Path, value: object) -> None:
    path.write_text(json.dumps(value), encoding="utf-8")


def published(folder: Path, state: State, config: Mapping[str, Any]) -> Path:
    folder.mkdir(exist_ok=True)
    save_file(state, folder / "model.safetensors")
    write_json(folder / "config.json", config)
    return folder


def sharded(folder: Path, state: State, config: Mapping[str, Any], *, pickled: bool = False, count: int = 3) -> Path:
    """Shards and an index, as the published checkpoint has them."""
    folder.mkdir(exist_ok=True)
    stem, suffix = ("pytorch_model", "bin") if pickled else ("model", "safetensors")
    weight_map = {}
    for number in range(count):
        file = f"{stem}-{number + 1:05d}-of-{count:05d}.{suffix}"
        part = {name: state[name] for name in list(state)[number::count]}
        weight_map.update(dict.fromkeys(part, file))
        if pickled:
            torch.save(part, folder / file)
        else:
            save_file(part, folder / file)
    write_json(folder / f"{stem}.{suffix}.index.json", {"metadata": {}, "weight_map": weight_map})
    write_json(folder / "config.json", config)
    return folder


def cut(state: State, config: ModelConfig) -> dict[str, torch.Tensor]:
    """Our tensors under the names of Qwen2 and Llama files, the fused projection cut into q, k and v."""
    query, key = config.num_attention_heads * config.head_dim, config.num_key_value_heads * config.head_dim
    outer = {
        "transformer.wte.weight": "model.embed_tokens.weight",
        "transformer.ln_f.weight": "model.norm.weight",
        "lm_head.weight": "lm_head.weight",
    }
    inner = {
        "ln_1.weight": "input_layernorm.weight",
        "ln_2.weight": "post_attention_layernorm.weight",
        "attn.c_proj.weight": "self_attn.o_proj.weight",
        "mlp.w1.weight": "mlp.up_proj.weight",
        "mlp.w2.weight": "mlp.gate_proj.weight",
        "mlp.c_proj.weight": "mlp.down_proj.weight",
    }
    out = {}
    for name, value in state.items():
        if name in outer:
            out[outer[name]] = value
            continue
        _, _, layer, leaf = name.split(".", 3)
        if leaf in inner:
            out[f"model.layers.{layer}.{inner[leaf]}"] = value
            continue
        kind = leaf.removeprefix("attn.c_attn.")
        for letter, part in zip("qkv", value.split((query, key, key)), strict=True):
            out[f"model.layers.{layer}.self_attn.{letter}_proj.{kind}"] = part.clone()
    return out


def foreign_config(config: ModelConfig, model_type: str) -> dict[str, Any]:
    """A config.json of `qwen2` or `llama`, as transformers writes it."""
    return {
        "architectures": ["Qwen2ForCausalLM" if model_type == "qwen2" else "LlamaForCausalLM"],
        "model_type": model_type,
        "hidden_act": "silu",
        "hidden_size": config.hidden_size,
        "intermediate_size": config.intermediate_size,
        "max_position_embeddings": config.max_position_embeddings,
        "num_attention_heads": config.num_attention_heads,
        "num_hidden_layers": config.num_hidden_layers,
        "num_key_value_heads": config.num_key_value_heads,
        "rms_norm_eps": config.rms_norm_eps,
        "rope_theta": config.rope_theta,
        "tie_word_embeddings": config.tie_word_embeddings,
        "vocab_size": config.vocab_size,
    }


def qwen2_folder(folder: Path, tiny: Path) -> Path:
    """The tiny model as a Qwen2 checkpoint."""
    config = ModelConfig.from_file(tiny)
    return published(folder, cut(tiny_state(tiny), config), foreign_config(config, "qwen2"))


def untied_state(model: Qwen) -> State:
    """The parameters, a tied head once."""
    return {name: value.detach() for name, value in model.named_parameters()}


# -------------------------------------------------------------------------------------------------------------- GGUF


def gguf_names(state: State, config: ModelConfig) -> dict[str, torch.Tensor]:
    """The names of GGUF tensors: fused q, k, v for `qwen`, cut for the others, turned into pairs for `llama`."""
    outer = {
        "model.embed_tokens.weight": "token_embd.weight",
        "model.norm.weight": "output_norm.weight",
        "lm_head.weight": "output.weight",
    }
    inner = {
        "input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm", "self_attn.q_proj": "attn_q",
        "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v", "self_attn.o_proj": "attn_output",
        "mlp.up_proj": "ffn_up", "mlp.gate_proj": "ffn_gate", "mlp.down_proj": "ffn_down",
    }  # fmt: skip
    out = {}
    for name, value in cut(state, config).items():
        if name in outer:
            out[outer[name]] = value
            continue
        _, _, layer, leaf = name.split(".", 3)
        module, _, kind = leaf.rpartition(".")
        if config.model_type == "llama" and module in ("self_attn.q_proj", "self_attn.k_proj"):
            value = to_pairs(value, config.head_dim)
        out[f"blk.{layer}.{inner[module]}.{kind}"] = value
    if config.model_type == "qwen":
        for name in [name for name in out if ".attn_q." in name]:
            parts = [out.pop(name.replace("attn_q", f"attn_{letter}")) for letter in "qkv"]
            out[name.replace("attn_q", "attn_qkv")] = torch.cat(parts)
    return out


def to_pairs(weight: torch.Tensor, head_dim: int) -> torch.Tensor:
    """Row i and row i + D/2 of each head become neighbours: the order in which llama.cpp turns them."""
    half = head_dim // 2
    order = [
        head + i // 2 + (half if i % 2 else 0) for head in range(0, len(weight), head_dim) for i in range(head_dim)
    ]
    return weight[torch.tensor(order)]


def add_config(writer: gguf.GGUFWriter, config: ModelConfig) -> None:
    arch = config.model_type
    numbers = {
        "context_length": config.max_position_embeddings,
        "embedding_length": config.hidden_size,
        "block_count": config.num_hidden_layers,
        "feed_forward_length": config.intermediate_size * (2 if arch == "qwen" else 1),
        "attention.head_count": config.num_attention_heads,
        "attention.head_count_kv": config.num_key_value_heads,
        "rope.dimension_count": config.head_dim,
        "vocab_size": config.vocab_size,
    }
    for name, value in numbers.items():
        writer.add_uint32(f"{arch}.{name}", value)
    writer.add_float32(f"{arch}.attention.layer_norm_rms_epsilon", config.rms_norm_eps)
    writer.add_float32(f"{arch}.rope.freq_base", config.rope_theta)


def add_tensor(writer: gguf.GGUFWriter, name: str, value: torch.Tensor, kind: Kind) -> None:
    """Vectors stay in float32, as converters keep them."""
    kind = Kind.F32 if value.ndim == 1 else kind
    if kind == Kind.F16:
        writer.add_tensor(name, value.half().numpy())
    elif kind == Kind.F32:
        writer.add_tensor(name, value.float().numpy())
    else:
        writer.add_tensor(name, gguf.quants.quantize(value.float().numpy(), kind), raw_dtype=kind)


def finish(writer: gguf.GGUFWriter) -> None:
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def write_gguf(
    path: Path,
    state: State,
    config: ModelConfig,
    kind: Kind = Kind.F32,
    metadata: Mapping[str, Any] | None = None,
) -> Path:
    """A GGUF file of the architecture `config.model_type`; metadata: strings and lists beside the shapes."""
    writer = gguf.GGUFWriter(path, config.model_type)
    add_config(writer, config)
    for key, value in (metadata or {}).items():
        if isinstance(value, str):
            writer.add_string(key, value)
        else:
            writer.add_array(key, value)
    for name, value in gguf_names(state, config).items():
        add_tensor(writer, name, value, kind)
    finish(writer)
    return path


def write_raw_gguf(path: Path, tensors: Sequence[tuple[str, np.ndarray, Kind]]) -> Path:
    """Tensors alone, as [rows, bytes of a row], without a model around them."""
    writer = gguf.GGUFWriter(path, "test")
    for name, raw, kind in tensors:
        writer.add_tensor(name, raw, raw_dtype=kind)
    finish(writer)
    return path
