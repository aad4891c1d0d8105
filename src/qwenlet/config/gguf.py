"""The same model configuration out of GGUF metadata."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from qwenlet.config.fields import Fields, named
from qwenlet.config.model import MODEL_TYPES, ModelConfig
from qwenlet.errors import ConfigError

# Metadata of ours, which other programs pass over.
OWN_PREFIX = "qwenlet."

# Metadata fields under "{architecture}." that are read, ...
_GGUF_READ = frozenset(
    """vocab_size context_length embedding_length block_count feed_forward_length rope.dimension_count rope.freq_base
    attention.head_count attention.head_count_kv attention.key_length attention.value_length
    attention.layer_norm_rms_epsilon""".split()
)
# ... that change nothing, ...
_GGUF_INERT = frozenset(("tensor_data_layout", "rope.scaling.original_context_length", "rope.scaling.finetuned"))
# ... and that may be there as long as they switch nothing on. Any other may change the maths, so it is refused.
_GGUF_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "rope.scaling.type": ("none", "", None),
    "rope.scaling.factor": (0, 1),
    "rope.scale_linear": (0, 1),
    "attention.causal": (True,),
    "attention.sliding_window": (0,),
    "attention.clamp_kqv": (0,),
    "attention.max_alibi_bias": (0,),
    "use_parallel_residual": (False,),
    "expert_count": (0,),
    "expert_used_count": (0,),
    "logit_scale": (0, 1),
    "residual_scale": (0, 1),
    "embedding_scale": (0, 1),
}


def _refuse_gguf_maths(metadata: Mapping[str, Any], architecture: str, source: str) -> None:
    """Raises ConfigError naming metadata that would change the maths, or a file that is one of several."""
    if metadata.get("split.count", 1) not in (0, 1):
        raise ConfigError(
            f"{source} is one of {metadata['split.count']} parts of a model",
            hint="join them with llama-gguf-split --merge",
        )
    for key, value in metadata.items():
        name = key.removeprefix(f"{architecture}.")
        if name == key or name in _GGUF_READ or name in _GGUF_INERT:
            continue
        if name not in _GGUF_NEUTRAL:
            raise ConfigError(f"{source}: {key} is not understood, and it may change the maths")
        if value not in _GGUF_NEUTRAL[name]:
            raise ConfigError(f"{source}: {key} is {value!r}, which is not implemented")


def config_from_gguf(metadata: Mapping[str, Any], tensor_names: Sequence[str], source: str) -> ModelConfig:
    """ModelConfig from GGUF metadata of the architectures `qwen`, `qwen2` and `llama`."""
    architecture = metadata.get("general.architecture")
    if architecture not in MODEL_TYPES:
        raise ConfigError(
            f"{source} has GGUF architecture {architecture!r}; known are {', '.join(MODEL_TYPES)}",
            hint="qwenlet runs first-generation Qwen, dense Qwen2 and Llama-shaped models",
        )

    def get(name: str, default: Any = ...) -> Any:
        value = metadata.get(f"{architecture}.{name}", default)
        if value is ...:
            raise ConfigError(f"{source} has no {architecture}.{name}, which a {architecture} model needs")
        return value

    def count(name: str, default: Any = ...) -> int:
        value = get(name, default)
        if not isinstance(value, int) or isinstance(value, bool) or value <= 0:
            raise ConfigError(f"{source}: {architecture}.{name} is {value!r}, expected a positive whole number")
        return value

    def number(name: str, default: float) -> float:
        value = get(name, default)
        if not isinstance(value, (int, float)) or isinstance(value, bool):
            raise ConfigError(f"{source}: {architecture}.{name} is {value!r}, expected a number")
        return float(value)

    def token_id(name: str) -> int | None:
        value = metadata.get(f"tokenizer.ggml.{name}")
        if value is not None and (not isinstance(value, int) or isinstance(value, bool)):
            raise ConfigError(f"{source}: tokenizer.ggml.{name} is {value!r}, expected a token id")
        return value

    _refuse_gguf_maths(metadata, architecture, source)
    hidden, heads, positions = count("embedding_length"), count("attention.head_count"), count("context_length")
    head_dim = count("attention.key_length", hidden // heads)
    if get("attention.value_length", head_dim) != head_dim:
        raise ConfigError(
            f"{source}: attention.value_length is {get('attention.value_length')}, expected {head_dim}, as the keys'"
        )
    rotated = get("rope.dimension_count", head_dim)
    if rotated != head_dim:
        raise ConfigError(f"{source}: rope.dimension_count is {rotated}, but the whole head ({head_dim}) must rotate")
    theta = number("rope.freq_base", 10000.0)
    is_qwen = architecture == "qwen"
    # GGUF has no field for dynamic NTK and log-n. Of the first generation, all sizes with base 10,000 were trained on
    # at most 8,192 tokens with both switched on; the 72B model (base 1,000,000) has them off.
    # Files of ours say it under names of our own.
    extends = is_qwen and theta == 10000.0
    own = {name: metadata.get(f"{OWN_PREFIX}{name}") for name in ("seq_length", "use_dynamic_ntk", "use_logn_attn")}
    if any(value is not None for value in own.values()):
        with named(source):
            f = Fields(own, source, f"{architecture} GGUF")
            extent = f.take("seq_length", int), f.take("use_dynamic_ntk", bool), f.take("use_logn_attn", bool)
    else:
        extent = min(positions, 8192) if extends else positions, extends, extends
    tokens = metadata.get("tokenizer.ggml.tokens")
    vocab_size = count("vocab_size", len(tokens) if isinstance(tokens, list) else 0)
    eos = token_id("eos_token_id")
    with named(source):
        return ModelConfig(
            model_type=architecture,
            vocab_size=vocab_size,
            hidden_size=hidden,
            num_hidden_layers=count("block_count"),
            num_attention_heads=heads,
            num_key_value_heads=count("attention.head_count_kv", heads),
            head_dim=head_dim,
            intermediate_size=count("feed_forward_length") // (2 if is_qwen else 1),  # Qwen-1 writes both halves
            max_position_embeddings=positions,
            seq_length=extent[0],
            rms_norm_eps=_shortest_float(number("attention.layer_norm_rms_epsilon", 1e-6)),
            rope_theta=theta,
            use_dynamic_ntk=extent[1],
            use_logn_attn=extent[2],
            qkv_bias=architecture != "llama",
            tie_word_embeddings="output.weight" not in tensor_names,
            bos_token_id=token_id("bos_token_id"),
            eos_token_ids=() if eos is None else (eos,),
        )


def _shortest_float(value: float) -> float:
    """1e-5 was stored as float32 and comes back as 9.99999974e-06; seven digits restore what was meant."""
    return float(f"{value:.7g}")
