"""What the weights are: shapes and maths, read strictly from a published config.json.

A field that changes the maths and is not understood is an error that names it: a model that runs with the wrong maths
is worse than one that doesn't load.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from qwenlet.config.fields import Fields, named, positive, read_json
from qwenlet.errors import ConfigError

ModelType = Literal["qwen", "qwen2", "llama"]
MODEL_TYPES: tuple[ModelType, ...] = ("qwen", "qwen2", "llama")

# The nearest that transformers has to our dynamic NTK: its factor, 2 L / seq_length - 1, is ours at each step's end.
DYNAMIC_ROPE = {"rope_type": "dynamic", "factor": 2.0}

# The published log-n table has entries for 1 ... 32767, so later positions have no published maths.
LOGN_TABLE_LENGTH = 32767


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
            positive(name, getattr(self, name))
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
        with named(source):
            return _READERS[model_type](Fields(raw, source, model_type))

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
            or (self.tie_word_embeddings and self.model_type != "qwen")
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
            "tie_word_embeddings": self.tie_word_embeddings,
            "tokenizer_class": "QWenTokenizer",
            "transformers_version": "4.32.0",
            "use_cache": True,
            "use_dynamic_ntk": self.use_dynamic_ntk,
            "use_flash_attn": "auto",
            "use_logn_attn": self.use_logn_attn,
            "vocab_size": self.vocab_size,
        }

    def to_own_layout(self) -> dict[str, Any]:
        """config.json in the layout of this model type: the published one for `qwen`, else transformers' own."""
        if self.model_type == "qwen":
            return self.to_published()
        qwen2 = self.model_type == "qwen2"
        return {
            "architectures": ["Qwen2ForCausalLM" if qwen2 else "LlamaForCausalLM"],
            **({} if qwen2 else {"attention_bias": False, "mlp_bias": False, "pretraining_tp": 1}),
            "attention_dropout": 0.0,
            "bos_token_id": self.bos_token_id,
            "eos_token_id": list(self.eos_token_ids) or None,
            "head_dim": self.head_dim,
            "hidden_act": "silu",
            "hidden_size": self.hidden_size,
            "initializer_range": self.initializer_range,
            "intermediate_size": self.intermediate_size,
            "max_position_embeddings": self.max_position_embeddings,
            "model_type": self.model_type,
            "num_attention_heads": self.num_attention_heads,
            "num_hidden_layers": self.num_hidden_layers,
            "num_key_value_heads": self.num_key_value_heads,
            "rms_norm_eps": self.rms_norm_eps,
            "rope_scaling": None,
            "rope_theta": self.rope_theta,
            "tie_word_embeddings": self.tie_word_embeddings,
            "torch_dtype": "float16",
            "use_cache": True,
            **({"use_sliding_window": False} if qwen2 else {}),
            "vocab_size": self.vocab_size,
            **self._beyond_training_length(),
        }

    def _beyond_training_length(self) -> dict[str, Any]:
        """What a first-generation model in Qwen2's clothes does beyond `seq_length`: fields of Qwen-1 that Qwen2 does
        not have. Other programs pass over them; ours read them back."""
        if not (self.use_dynamic_ntk or self.use_logn_attn) and self.seq_length == self.max_position_embeddings:
            return {}
        return {
            "seq_length": self.seq_length,
            "use_dynamic_ntk": self.use_dynamic_ntk,
            "use_logn_attn": self.use_logn_attn,
        }


def qwen_1_8b() -> ModelConfig:
    """The published Qwen-1.8B (and -Chat): 1,836,828,672 parameters."""
    return ModelConfig(
        model_type="qwen", vocab_size=151936, hidden_size=2048, num_hidden_layers=24, num_attention_heads=16,
        num_key_value_heads=16, head_dim=128, intermediate_size=5504, max_position_embeddings=8192, seq_length=8192,
        use_dynamic_ntk=True, use_logn_attn=True, eos_token_ids=(151643,),
    )  # fmt: skip


# Written by libraries into every config; none of them changes the maths of a forward pass in evaluation mode.
# (quantization_config is read by QuantConfig.)
_INERT = frozenset(
    """quantization_config
    architectures auto_map transformers_version torch_dtype dtype use_cache tokenizer_class name_or_path
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


def _read_qwen(f: Fields) -> ModelConfig:
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
    f.finish(_INERT | _INERT_BY_TYPE[f.model_type])
    return config


def _read_llama_shaped(f: Fields) -> ModelConfig:
    """`qwen2` and `llama`: the same block; they differ in the q/k/v bias."""
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
    positions = f.take("max_position_embeddings", int, 32768 if f.model_type == "qwen2" else 2048)
    seq_length, dynamic_ntk, logn = positions, False, False
    if f.model_type == "qwen2":  # a first-generation model in Qwen2's clothes
        seq_length = f.take("seq_length", int, positions)
        dynamic_ntk, logn = f.take("use_dynamic_ntk", bool, False), f.take("use_logn_attn", bool, False)
    parameters = f.raw.pop("rope_parameters", None)  # transformers 5 puts theta and scaling in here
    if parameters is not None:
        if dynamic_ntk and isinstance(parameters, dict) and parameters.items() >= DYNAMIC_ROPE.items():
            parameters = {"rope_theta": parameters.get("rope_theta")}  # stands for use_dynamic_ntk
        known = isinstance(parameters, dict) and not set(parameters) - {"rope_type", "rope_theta"}
        if not known or parameters.get("rope_type", "default") != "default":
            raise ConfigError(
                f"{f.source}: rope_parameters is {parameters!r}, but only rope_type 'default' is implemented"
            )
        theta = Fields(parameters, f"{f.source}: rope_parameters", f.model_type).take("rope_theta", float, theta)
    hidden, heads = f.take("hidden_size", int), f.take("num_attention_heads", int)
    positive("num_attention_heads", heads)
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
        seq_length=seq_length,
        rms_norm_eps=f.take("rms_norm_eps", float, 1e-6),
        rope_theta=10000.0 if theta is None else theta,
        use_dynamic_ntk=dynamic_ntk,
        use_logn_attn=logn,
        qkv_bias=f.model_type == "qwen2",
        tie_word_embeddings=f.take("tie_word_embeddings", bool, False),
        initializer_range=f.take("initializer_range", float, 0.02),
        bos_token_id=f.take("bos_token_id", int, None),
        eos_token_ids=f.take_ids("eos_token_id"),
    )
    f.finish(_INERT | _INERT_BY_TYPE[f.model_type])
    return config


_READERS = {"qwen": _read_qwen, "qwen2": _read_llama_shaped, "llama": _read_llama_shaped}
