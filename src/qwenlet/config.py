"""Every dataclass that a file or a flag can set. No torch in here.

    ModelConfig          what the weights are: shapes and maths, read strictly from config.json or GGUF metadata
    GenerationDefaults   what the checkpoint's generation_config.json asks for
    SamplingParams       what a caller asks for one request; None means "as the checkpoint says"
    EngineConfig         how the engine runs: context, pages, attention backend

A field that changes the maths and is not understood is an error that names it: a model that runs with the wrong maths
is worse than one that doesn't load.
"""

from __future__ import annotations

import difflib
import json
import math
import numbers
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any, Literal

from qwenlet.errors import ConfigError, RequestError

ModelType = Literal["qwen", "qwen2", "llama"]
MODEL_TYPES: tuple[ModelType, ...] = ("qwen", "qwen2", "llama")

# The published log-n table has entries for 1 ... 32767, so later positions have no published maths.
LOGN_TABLE_LENGTH = 32767


# ------------------------------------------------------------------------------------------------------ the model


@dataclass(frozen=True)
class ModelConfig:
    """Shapes and maths of one decoder: Qwen-1 (`qwen`), dense Qwen2 (`qwen2`) or Llama-shaped (`llama`).

    `intermediate_size` is the width of each half of the SwiGLU; Qwen-1's own config.json writes twice that.
    """

    model_type: ModelType
    vocab_size: int
    hidden_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int  # = num_attention_heads: MHA; fewer: each k/v head serves a group of query heads
    head_dim: int
    intermediate_size: int
    max_position_embeddings: int
    seq_length: int  # length seen in training: dynamic NTK and log-n attention act beyond it
    rms_norm_eps: float = 1e-6
    rope_theta: float = 10000.0
    use_dynamic_ntk: bool = False
    use_logn_attn: bool = False
    qkv_bias: bool = True
    tie_word_embeddings: bool = False
    initializer_range: float = 0.02
    bos_token_id: int | None = None
    eos_token_ids: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        for name in ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads",
                     "head_dim", "intermediate_size", "max_position_embeddings", "seq_length"):  # fmt: skip
            _positive(name, getattr(self, name))
        if self.num_attention_heads % self.num_key_value_heads:
            raise ConfigError(
                f"num_attention_heads {self.num_attention_heads} is not a multiple of "
                f"num_key_value_heads {self.num_key_value_heads}"
            )
        if self.seq_length < 2:
            raise ConfigError(
                f"seq_length is {self.seq_length}, expected 2 or more: log-n attention takes its logarithm"
            )
        if self.head_dim % 2 or self.head_dim < 4:
            raise ConfigError(
                f"head_dim is {self.head_dim}, expected an even number from 4: rotary embedding turns pairs"
            )
        for name in ("rms_norm_eps", "rope_theta"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value < math.inf:
                raise ConfigError(f"{name} is {value!r}, expected a positive number")

    @property
    def context_length(self) -> int:
        """Positions with published maths: beyond max_position_embeddings only where NTK and log-n carry on."""
        if self.use_dynamic_ntk and self.use_logn_attn:
            return max(self.max_position_embeddings, LOGN_TABLE_LENGTH)
        return self.max_position_embeddings

    @property
    def qkv_size(self) -> int:
        """Rows of the fused query-key-value projection."""
        return (self.num_attention_heads + 2 * self.num_key_value_heads) * self.head_dim

    def cache_bytes(self, itemsize: int) -> int:
        """Bytes of keys and values that one token of context takes, in a dtype of `itemsize` bytes."""
        return 2 * self.num_hidden_layers * self.num_key_value_heads * self.head_dim * itemsize

    @property
    def parameter_count(self) -> int:
        hidden, query = self.hidden_size, self.num_attention_heads * self.head_dim
        layer = self.qkv_size * hidden + (self.qkv_size if self.qkv_bias else 0) + query * hidden
        layer += 3 * hidden * self.intermediate_size + 2 * hidden
        embeddings = self.vocab_size * hidden * (1 if self.tie_word_embeddings else 2)
        return self.num_hidden_layers * layer + embeddings + hidden

    def ntk_alpha(self, prompt_length: int) -> float:
        """Dynamic NTK factor of a request whose whole prompt has `prompt_length` tokens.

        max(2^ceil(log2(L / seq_length) + 1) - 1, 1), as published: 1 up to seq_length, 3 up to twice that, then 7, ...
        """
        if not self.use_dynamic_ntk or prompt_length <= self.seq_length:
            return 1.0
        return max(2.0 ** math.ceil(math.log2(prompt_length / self.seq_length) + 1) - 1.0, 1.0)

    @classmethod
    def from_dict(cls, raw: Mapping[str, Any], source: str = "config.json") -> ModelConfig:
        """Reads a published `config.json` (already parsed). Raises ConfigError naming the field."""
        model_type = raw.get("model_type")
        if not isinstance(model_type, str) or model_type not in _READERS:
            raise ConfigError(
                f"{source} has model_type {model_type!r}; known are {', '.join(MODEL_TYPES)}",
                hint="qwenlet runs first-generation Qwen, dense Qwen2 and Llama-shaped models",
            )
        with _named(source):
            return _READERS[model_type](_Fields(raw, source, model_type))

    @classmethod
    def from_file(cls, path: str | Path) -> ModelConfig:
        """Reads `config.json` at `path`, or in the folder `path`."""
        path = Path(path)
        path = path / "config.json" if path.is_dir() else path
        return cls.from_dict(read_json(path), str(path))

    def to_published(self) -> dict[str, Any]:
        """The published `config.json` of a Qwen-1 model. Raises ConfigError for what that layout can't say."""
        if self.model_type != "qwen" and self.num_key_value_heads != self.num_attention_heads:
            raise ConfigError(
                f"the Qwen-1 layout has one key/value head per query head; this model has "
                f"{self.num_key_value_heads} for {self.num_attention_heads}",
                hint="keep the model as it is; every layout we read runs",
            )
        if (
            not self.qkv_bias
            or self.tie_word_embeddings
            or self.hidden_size != self.num_attention_heads * self.head_dim
        ):
            raise ConfigError(
                "the Qwen-1 layout needs q/k/v biases, an untied head and heads that fill hidden_size; "
                f"this {self.model_type} model has qkv_bias={self.qkv_bias}, tie_word_embeddings="
                f"{self.tie_word_embeddings}, {self.num_attention_heads} x {self.head_dim} of {self.hidden_size}"
            )
        return {
            "architectures": ["QWenLMHeadModel"],
            "auto_map": {
                "AutoConfig": "configuration_qwen.QWenConfig",
                "AutoModelForCausalLM": "modeling_qwen.QWenLMHeadModel",
            },
            "attn_dropout_prob": 0.0,
            "bf16": False,
            "emb_dropout_prob": 0.0,
            "fp16": False,
            "fp32": False,
            "hidden_size": self.hidden_size,
            "intermediate_size": 2 * self.intermediate_size,
            "initializer_range": self.initializer_range,
            "kv_channels": self.head_dim,
            "layer_norm_epsilon": self.rms_norm_eps,
            "max_position_embeddings": self.max_position_embeddings,
            "model_type": "qwen",
            "no_bias": True,
            "num_attention_heads": self.num_attention_heads,
            "num_hidden_layers": self.num_hidden_layers,
            "onnx_safe": None,
            "rotary_emb_base": self.rope_theta,
            "rotary_pct": 1.0,
            "scale_attn_weights": True,
            "seq_length": self.seq_length,
            "tie_word_embeddings": False,
            "tokenizer_class": "QWenTokenizer",
            "transformers_version": "4.32.0",
            "use_cache": True,
            "use_dynamic_ntk": self.use_dynamic_ntk,
            "use_flash_attn": "auto",
            "use_logn_attn": self.use_logn_attn,
            "vocab_size": self.vocab_size,
        }


def qwen_1_8b() -> ModelConfig:
    """The published Qwen-1.8B (and -Chat): 1,836,828,672 parameters."""
    return ModelConfig(
        model_type="qwen", vocab_size=151936, hidden_size=2048, num_hidden_layers=24, num_attention_heads=16,
        num_key_value_heads=16, head_dim=128, intermediate_size=5504, max_position_embeddings=8192, seq_length=8192,
        use_dynamic_ntk=True, use_logn_attn=True, eos_token_ids=(151643,),
    )  # fmt: skip


# Written by libraries into every config; none of them changes the maths of a forward pass in evaluation mode.
_INERT = frozenset(
    """architectures auto_map transformers_version torch_dtype dtype use_cache tokenizer_class name_or_path
    output_attentions output_hidden_states return_dict return_dict_in_generate output_scores torchscript id2label
    label2id problem_type finetuning_task task_specific_params prefix pad_token_id sep_token_id
    decoder_start_token_id chunk_size_feed_forward is_encoder_decoder is_decoder bad_words_ids
    begin_suppress_tokens suppress_tokens forced_bos_token_id forced_eos_token_id do_sample max_length min_length
    num_beams num_beam_groups num_return_sequences temperature top_k top_p typical_p repetition_penalty
    length_penalty no_repeat_ngram_size encoder_no_repeat_ngram_size early_stopping diversity_penalty
    remove_invalid_values exponential_decay_length_penalty attn_implementation use_bfloat16 unsloth_fixed
    unsloth_version is_llama_config""".split()
)
_INERT_BY_TYPE = {
    "qwen": frozenset(
        """attn_dropout_prob emb_dropout_prob attn_pdrop bf16 fp16 fp32 onnx_safe use_flash_attn softmax_in_fp32
        use_cache_quantization use_cache_kernel rotary_pct chat_format""".split()
    ),
    "qwen2": frozenset(("attention_dropout", "max_window_layers", "sliding_window")),
    "llama": frozenset(("attention_dropout",)),
}


@contextmanager
def _named(source: str) -> Iterator[None]:
    """Errors in the block say in which file the number stands."""
    try:
        yield
    except ConfigError as error:
        if source in error.message:
            raise
        raise ConfigError(f"{source}: {error.message}", hint=error.hint) from None


class _Fields:
    """Takes fields out of a raw config; what is left and not known to be inert is an error."""

    def __init__(self, raw: Mapping[str, Any], source: str, model_type: str) -> None:
        self.raw = dict(raw)
        self.source = source
        self.model_type = model_type
        self.raw.pop("model_type", None)

    def take(self, name: str, kind: type, default: Any = ...) -> Any:
        if name not in self.raw:
            if default is ...:
                raise ConfigError(f"{self.source} has no {name}, which a {self.model_type} model needs")
            return default
        value = self.raw.pop(name)
        if value is None and default is not ...:
            return default
        if kind is float and isinstance(value, int) and not isinstance(value, bool):
            value = float(value) if abs(value) < 2**1000 else math.inf
        if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
            raise ConfigError(f"{self.source}: {name} is {value!r}, expected {kind.__name__}")
        return value

    def require(self, name: str, allowed: Sequence[Any], why: str) -> None:
        """A field that may be absent, but if it is there must have one of the values we implement."""
        value = self.raw.pop(name, allowed[0])
        if value not in allowed:
            raise ConfigError(
                f"{self.source}: {name} is {value!r}, but only {' or '.join(map(repr, allowed))} is implemented ({why})"
            )

    def take_ids(self, name: str) -> tuple[int, ...]:
        value = self.raw.pop(name, None)
        values = value if isinstance(value, list) else [] if value is None else [value]
        if any(not isinstance(item, int) or isinstance(item, bool) for item in values):
            raise ConfigError(f"{self.source}: {name} is {value!r}, expected a token id or a list of them")
        return tuple(values)

    def finish(self) -> None:
        inert = _INERT | _INERT_BY_TYPE[self.model_type]
        unknown = sorted(name for name in self.raw if name not in inert and not name.startswith("_"))
        if unknown:
            raise ConfigError(
                f"{self.source} has fields that are not understood for model_type {self.model_type!r}: "
                f"{', '.join(unknown)}",
                hint="a field that changes the maths can't be ignored; if this one doesn't, remove it from the file",
            )


def _read_qwen(f: _Fields) -> ModelConfig:
    _refuse_quantized(f)
    f.require("no_bias", [True], "the projections and the feed-forward have no biases")
    f.require("scale_attn_weights", [True], "attention is scaled by 1/sqrt(head_dim)")
    if f.raw.get("rotary_pct", 1.0) != 1.0:
        f.require("rotary_pct", [1.0], "the rotation covers the whole head")
    hidden, heads = f.take("hidden_size", int), f.take("num_attention_heads", int)
    halves = f.take("intermediate_size", int)
    if halves % 2:
        raise ConfigError(
            f"{f.source}: intermediate_size is {halves}; Qwen-1 writes twice the width, so it must be even"
        )
    positions = f.take("max_position_embeddings", int, 8192)
    config = ModelConfig(
        model_type="qwen",
        vocab_size=f.take("vocab_size", int),
        hidden_size=hidden,
        num_hidden_layers=f.take("num_hidden_layers", int),
        num_attention_heads=heads,
        num_key_value_heads=heads,
        head_dim=f.take("kv_channels", int, 128),
        intermediate_size=halves // 2,
        max_position_embeddings=positions,
        seq_length=f.take("seq_length", int, positions),
        rms_norm_eps=f.take("layer_norm_epsilon", float, 1e-6),
        rope_theta=f.take("rotary_emb_base", float, 10000.0),
        use_dynamic_ntk=f.take("use_dynamic_ntk", bool, True),
        use_logn_attn=f.take("use_logn_attn", bool, True),
        qkv_bias=True,
        tie_word_embeddings=f.take("tie_word_embeddings", bool, False),
        initializer_range=f.take("initializer_range", float, 0.02),
        bos_token_id=f.take("bos_token_id", int, None),
        eos_token_ids=f.take_ids("eos_token_id"),
    )
    f.finish()
    return config


def _read_llama_shaped(f: _Fields) -> ModelConfig:
    """`qwen2` and `llama`: the same block; they differ in the q/k/v bias."""
    _refuse_quantized(f)
    f.require("hidden_act", ["silu", "swish"], "the feed-forward is SwiGLU")
    f.require("rope_scaling", [None], "plain rotary embedding")
    f.require("mlp_bias", [False], "the feed-forward has no biases")
    f.require("use_sliding_window", [False], "attention sees the whole context")
    f.require("pretraining_tp", [1], "the projections are whole")
    f.require("rope_interleaved", [False], "rotation by halves")
    f.require("partial_rotary_factor", [1.0], "the rotation covers the whole head")
    layers = f.take("num_hidden_layers", int)
    f.require("use_mrope", [False], "one position per token")
    kinds = f.raw.pop("layer_types", None)
    if kinds is not None and (not isinstance(kinds, list) or any(kind != "full_attention" for kind in kinds)):
        raise ConfigError(f"{f.source}: layer_types is {kinds!r}, but every layer must be 'full_attention'")
    if f.model_type == "llama":
        f.require("attention_bias", [False], "a Llama-shaped model has no attention biases")
    else:
        f.require("attention_bias", [True], "Qwen2 has q/k/v biases")
    theta = f.take("rope_theta", float, None)
    parameters = f.raw.pop("rope_parameters", None)  # transformers 5 puts theta and scaling in here
    if parameters is not None:
        known = isinstance(parameters, dict) and not set(parameters) - {"rope_type", "rope_theta"}
        if not known or parameters.get("rope_type", "default") != "default":
            raise ConfigError(
                f"{f.source}: rope_parameters is {parameters!r}, but only rope_type 'default' is implemented"
            )
        theta = _Fields(parameters, f"{f.source}: rope_parameters", f.model_type).take("rope_theta", float, theta)
    hidden, heads = f.take("hidden_size", int), f.take("num_attention_heads", int)
    _positive("num_attention_heads", heads)
    positions = f.take("max_position_embeddings", int, 32768 if f.model_type == "qwen2" else 2048)
    config = ModelConfig(
        model_type="qwen2" if f.model_type == "qwen2" else "llama",
        vocab_size=f.take("vocab_size", int),
        hidden_size=hidden,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=f.take("num_key_value_heads", int, heads),
        head_dim=f.take("head_dim", int, hidden // heads),
        intermediate_size=f.take("intermediate_size", int),
        max_position_embeddings=positions,
        seq_length=positions,
        rms_norm_eps=f.take("rms_norm_eps", float, 1e-6),
        rope_theta=10000.0 if theta is None else theta,
        qkv_bias=f.model_type == "qwen2",
        tie_word_embeddings=f.take("tie_word_embeddings", bool, False),
        initializer_range=f.take("initializer_range", float, 0.02),
        bos_token_id=f.take("bos_token_id", int, None),
        eos_token_ids=f.take_ids("eos_token_id"),
    )
    f.finish()
    return config


def _refuse_quantized(f: _Fields) -> None:
    section = f.raw.pop("quantization_config", None)
    if section is not None:
        method = section.get("quant_method", "unknown") if isinstance(section, Mapping) else section
        raise ConfigError(
            f"{f.source} describes a quantized checkpoint (quant_method {method!r}), which this version can't read",
            hint="load the unquantized checkpoint, for example Qwen/Qwen-1_8B-Chat",
        )


_READERS = {"qwen": _read_qwen, "qwen2": _read_llama_shaped, "llama": _read_llama_shaped}


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
    extends = is_qwen and theta == 10000.0
    tokens = metadata.get("tokenizer.ggml.tokens")
    vocab_size = count("vocab_size", len(tokens) if isinstance(tokens, list) else 0)
    eos = token_id("eos_token_id")
    with _named(source):
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
            seq_length=min(positions, 8192) if extends else positions,
            rms_norm_eps=_shortest_float(number("attention.layer_norm_rms_epsilon", 1e-6)),
            rope_theta=theta,
            use_dynamic_ntk=extends,
            use_logn_attn=extends,
            qkv_bias=architecture != "llama",
            tie_word_embeddings="output.weight" not in tensor_names,
            bos_token_id=token_id("bos_token_id"),
            eos_token_ids=() if eos is None else (eos,),
        )


def _shortest_float(value: float) -> float:
    """1e-5 was stored as float32 and comes back as 9.99999974e-06; seven digits restore what was meant."""
    return float(f"{value:.7g}")


# ------------------------------------------------------------------------------------------------------ generation

# A checkpoint that names no reply length gets this one, cut to what the context has room for.
DEFAULT_NEW_TOKENS = 512


@dataclass(frozen=True)
class GenerationDefaults:
    """What the checkpoint's `generation_config.json` asks for. Defaults: greedy, no penalties."""

    do_sample: bool = False
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    max_new_tokens: int | None = None
    eos_token_ids: tuple[int, ...] = ()
    stop_words_ids: tuple[tuple[int, ...], ...] = ()
    chat_format: Literal["chatml", "raw"] | None = None
    max_window_size: int = 6144

    @classmethod
    def from_dict(cls, raw: Mapping[str, Any], source: str = "generation_config.json") -> GenerationDefaults:
        """Reads a parsed `generation_config.json`; fields of generation modes we don't have are left alone."""
        f = _Fields(raw, source, "generation")
        words = f.raw.pop("stop_words_ids", None) or []
        if not isinstance(words, list) or any(not isinstance(w, list) for w in words):
            raise ConfigError(f"{source}: stop_words_ids is {words!r}, expected a list of lists of token ids")
        chat_format = f.take("chat_format", str, None)
        if chat_format not in (None, "chatml", "raw"):
            raise ConfigError(f"{source}: chat_format is {chat_format!r}, expected 'chatml' or 'raw'")
        sampling = {
            "temperature": f.take("temperature", float, 1.0),
            "top_p": f.take("top_p", float, 1.0),
            "top_k": f.take("top_k", int, 0),
            "min_p": f.take("min_p", float, 0.0),
            "repetition_penalty": f.take("repetition_penalty", float, 1.0),
            "max_new_tokens": f.take("max_new_tokens", int, None),
        }
        try:
            SamplingParams(**sampling)
        except RequestError as error:
            raise ConfigError(f"{source}: {error.message}") from None
        return cls(
            do_sample=f.take("do_sample", bool, False),
            eos_token_ids=f.take_ids("eos_token_id"),
            stop_words_ids=tuple(tuple(w) for w in words),
            chat_format=chat_format,
            max_window_size=f.take("max_window_size", int, 6144),
            **sampling,
        )


def _number(name: str, value: Any, low: float, high: float, *, open_low: bool = False, whole: bool = False) -> None:
    kinds = numbers.Integral if whole else numbers.Real
    good = isinstance(value, kinds) and not isinstance(value, bool) and math.isfinite(value)
    if not good or value > high or value < low or (open_low and value == low):
        kind = "a whole number" if whole else "a number"
        edge = f"above {low:g}" if open_low else f"at least {low:g}"
        top = "" if high == math.inf else f" and at most {high:g}"
        raise RequestError(f"{name} is {value!r}, expected {kind} {edge}{top}")


def _items(name: str, value: Any) -> tuple[Any, ...]:
    if value is None:
        return ()
    if not isinstance(value, Sequence):
        raise RequestError(f"{name} is {value!r}, expected a list")
    return tuple(value)


@dataclass(frozen=True, kw_only=True)
class SamplingParams:
    """What one request asks for. None means: as the checkpoint's generation config says.

    Attributes:
        max_new_tokens: at most so many tokens in the reply.
        temperature: 0 is greedy; above 0 the logits are divided by it.
        top_p: keep the smallest set of most likely tokens whose probabilities reach this sum, in (0, 1].
        top_k: keep the k most likely tokens; 0 keeps all.
        min_p: drop tokens less likely than min_p times the most likely one.
        repetition_penalty: above 1 makes every token of prompt and reply less likely (CTRL, arXiv:1909.05858).
        presence_penalty, frequency_penalty: subtracted from the logit of a token of the reply, once or per occurrence.
        seed: the same seed gives the same tokens, whatever else the engine runs. None draws one.
        stop: texts that end the reply and are not part of it.
        stop_token_ids: ids that end the reply, beside the checkpoint's own.
        ignore_eos: don't stop at the checkpoint's own end tokens.
        logprobs: give the log-probability of each token, and of so many most likely alternatives.
        n: so many replies, each with its own randomness.
    """

    max_new_tokens: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    seed: int | None = None
    stop: str | Sequence[str] | None = ()
    stop_token_ids: Sequence[int] | None = None
    ignore_eos: bool = False
    logprobs: int | None = None
    n: int = 1

    def __post_init__(self) -> None:
        def check(name: str, low: float, high: float = math.inf, **kinds: bool) -> None:
            value = getattr(self, name)
            if value is not None:
                _number(name, value, low, high, **kinds)

        check("max_new_tokens", 1, whole=True)
        check("temperature", 0.0)
        check("top_p", 0.0, 1.0, open_low=True)
        check("top_k", 0, whole=True)
        check("min_p", 0.0, 1.0)
        check("repetition_penalty", 0.01, 100.0)
        check("presence_penalty", -100.0, 100.0)
        check("frequency_penalty", -100.0, 100.0)
        check("seed", 0, 2**64 - 1, whole=True)
        check("logprobs", 0, whole=True)
        check("n", 1, 128, whole=True)
        stop = (self.stop,) if isinstance(self.stop, str) else _items("stop", self.stop)
        if any(not isinstance(text, str) or not text for text in stop):
            raise RequestError(f"stop is {self.stop!r}, expected texts that are not empty")
        ids = None if self.stop_token_ids is None else _items("stop_token_ids", self.stop_token_ids)
        if ids is not None and any(not isinstance(i, int) or isinstance(i, bool) or i < 0 for i in ids):
            raise RequestError(f"stop_token_ids is {self.stop_token_ids!r}, expected token ids")
        if not isinstance(self.ignore_eos, bool):
            raise RequestError(f"ignore_eos is {self.ignore_eos!r}, expected True or False")
        object.__setattr__(self, "stop", stop)
        object.__setattr__(self, "stop_token_ids", ids)

    def resolve(self, defaults: GenerationDefaults) -> SamplingParams:
        """The same with every None replaced by what the checkpoint says; max_new_tokens and seed may stay None."""
        cuts_set = any(value is not None for value in (self.top_p, self.top_k, self.min_p))
        temperature = self.temperature
        if temperature is None:
            # a caller who sets top_p wants sampling, also from a checkpoint whose default is greedy
            temperature = defaults.temperature if defaults.do_sample else 1.0 if cuts_set else 0.0

        def pick(value: Any, default: Any) -> Any:
            return default if value is None else value

        return replace(
            self,
            temperature=temperature,
            top_p=pick(self.top_p, defaults.top_p),
            top_k=pick(self.top_k, defaults.top_k),
            min_p=pick(self.min_p, defaults.min_p),
            repetition_penalty=pick(self.repetition_penalty, defaults.repetition_penalty),
            max_new_tokens=pick(self.max_new_tokens, defaults.max_new_tokens),
            stop_token_ids=self.stop_token_ids or (),
        )


# ------------------------------------------------------------------------------------------------------ the engine

ATTENTION_BACKENDS = ("auto", "flash", "math", "efficient")


@dataclass(frozen=True, kw_only=True)
class EngineConfig:
    """How the engine runs.

    Attributes:
        max_context: positions per request; None: as many as the model has published maths for.
        attention: which of torch's scaled-dot-product kernels may run; "auto" lets torch choose.
        ntk: "prompt" sets the NTK factor from the prompt, as published; "reserve" from prompt + max_new_tokens.
        prefill_chunk: prompt tokens per step, so that progress can be shown and a reply can be stopped early.
        prepack: let oneDNN keep its own copy of bfloat16 weights in blocked order on a CPU (faster decode).
    """

    max_context: int | None = None
    attention: str = field(default="auto", metadata={"choices": ATTENTION_BACKENDS})
    ntk: Literal["prompt", "reserve"] = "prompt"
    prefill_chunk: int = 512
    prepack: bool = True

    def __post_init__(self) -> None:
        if self.max_context is not None:
            _positive("max_context", self.max_context)
        _positive("prefill_chunk", self.prefill_chunk)
        if self.attention not in ATTENTION_BACKENDS:
            raise ConfigError(f"attention is {self.attention!r}, expected one of {', '.join(ATTENTION_BACKENDS)}")
        if not isinstance(self.prepack, bool):
            raise ConfigError(f"prepack is {self.prepack!r}, expected True or False")
        if self.ntk not in ("prompt", "reserve"):
            raise ConfigError(f"ntk is {self.ntk!r}, expected 'prompt' or 'reserve'")

    @classmethod
    def from_options(cls, options: Mapping[str, Any]) -> EngineConfig:
        """Refuses an option that does not exist, naming the nearest one that does."""
        known = [f.name for f in fields(cls)]
        for name in options:
            if name not in known:
                near = difflib.get_close_matches(name, known, 1)
                raise ConfigError(
                    f"unknown engine option {name!r}; known are {', '.join(known)}",
                    hint=f"did you mean {near[0]!r}?" if near else None,
                )
        return cls(**options)


def _positive(name: str, value: Any) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or value <= 0:
        raise ConfigError(f"{name} is {value!r}, expected a positive whole number")


def read_json(path: str | Path) -> dict[str, Any]:
    """A JSON object from a file, with errors that name the file and the place in it."""
    path = Path(path)
    try:
        value = json.loads(path.read_text(encoding="utf-8-sig"))
    except FileNotFoundError:
        raise ConfigError(
            f"{path} does not exist", hint="a model folder holds config.json beside its weights"
        ) from None
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path} is not UTF-8 text: {error.reason} at byte {error.start}") from None
    except json.JSONDecodeError as error:
        raise ConfigError(
            f"{path} is not valid JSON: {error.msg} in line {error.lineno}, column {error.colno}"
        ) from None
    except OSError as error:
        raise ConfigError(f"{path} can't be read: {error.strerror or error}") from None
    except (ValueError, RecursionError) as error:  # a number of thousands of digits, thousands of nested brackets
        raise ConfigError(f"{path} is not JSON that we read: {error}") from None
    if not isinstance(value, dict):
        raise ConfigError(f"{path} holds a JSON {type(value).__name__}, expected an object")
    return value
