"""Configurations are read strictly: what changes the maths and is not understood is refused by name."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qwenlet.config import (
    EngineConfig,
    GenerationDefaults,
    GrammarSpec,
    ModelConfig,
    SamplingParams,
    config_from_gguf,
    qwen_1_8b,
    read_json,
)
from qwenlet.errors import ConfigError, RequestError

LLAMA = {
    "model_type": "llama", "vocab_size": 100, "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 8,
    "num_key_value_heads": 2, "intermediate_size": 128, "max_position_embeddings": 256, "hidden_act": "silu",
    "rms_norm_eps": 1e-5, "rope_theta": 100000, "tie_word_embeddings": True, "eos_token_id": 2,
}  # fmt: skip


def published() -> dict[str, Any]:
    return qwen_1_8b().to_published()


def test_the_published_config_has_the_published_size() -> None:
    config = ModelConfig.from_dict(published())
    assert config.parameter_count == 1_836_828_672
    assert (config.intermediate_size, config.qkv_size) == (5504, 6144)
    assert config.use_dynamic_ntk
    assert config.use_logn_attn


def test_to_published_is_the_inverse_of_reading() -> None:
    assert ModelConfig.from_dict(published()).to_published() == published()


@pytest.mark.parametrize(
    ("length", "alpha"), [(1, 1), (8191, 1), (8192, 1), (8193, 3), (16384, 3), (16385, 7), (32768, 7)]
)
def test_ntk_factor_steps_at_powers_of_two(length: int, alpha: float) -> None:
    assert qwen_1_8b().ntk_alpha(length) == alpha


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("no_bias", False), ("scale_attn_weights", False), ("rotary_pct", 0.5), ("sliding_window_size", 4096),
        ("rope_scaling", {"type": "yarn"}),
    ],
)  # fmt: skip
def test_a_field_that_changes_the_maths_is_refused_by_name(field: str, value: Any) -> None:
    with pytest.raises(ConfigError, match=field):
        ModelConfig.from_dict(published() | {field: value})


@given(name=st.from_regex(r"[a-z][a-z_]{4,30}", fullmatch=True))
def test_no_unknown_field_passes_in_silence(name: str) -> None:
    raw = published() | {f"zz_{name}": 1}
    with pytest.raises(ConfigError, match=f"zz_{name}"):
        ModelConfig.from_dict(raw)


@pytest.mark.parametrize(
    "field", sorted(set(qwen_1_8b().to_published()) & {"hidden_size", "num_attention_heads", "vocab_size"})
)
@pytest.mark.parametrize("value", [None, "x", True, 0, -1, 2.5])
def test_sizes_must_be_positive_whole_numbers(field: str, value: Any) -> None:
    with pytest.raises(ConfigError, match=field):
        ModelConfig.from_dict(published() | {field: value})


def test_llama_shaped_and_qwen2_differ_in_the_bias() -> None:
    llama = ModelConfig.from_dict(LLAMA)
    qwen2 = ModelConfig.from_dict(LLAMA | {"model_type": "qwen2"})
    assert (llama.qkv_bias, qwen2.qkv_bias) == (False, True)
    assert llama.head_dim == 8
    assert llama.eos_token_ids == (2,)


@pytest.mark.parametrize(
    "change",
    [
        {"hidden_act": "gelu"}, {"rope_scaling": {"type": "linear", "factor": 2}}, {"use_sliding_window": True},
        {"attention_bias": True}, {"mlp_bias": True}, {"layer_types": ["sliding_attention"]}, {"q_norm": True},
        {"rope_parameters": {"rope_type": "llama3", "rope_theta": 1.0}}, {"num_key_value_heads": 3},
    ],
)  # fmt: skip
def test_llama_shaped_variants_we_dont_have_are_refused(change: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=next(iter(change))):
        ModelConfig.from_dict(LLAMA | change)


def test_transformers_5_keeps_theta_in_rope_parameters() -> None:
    raw = {k: v for k, v in LLAMA.items() if k != "rope_theta"}
    raw["rope_parameters"] = {"rope_type": "default", "rope_theta": 5e5}
    assert ModelConfig.from_dict(raw).rope_theta == 5e5


@pytest.mark.parametrize(
    "change",
    [
        {"num_attention_heads": 0}, {"layer_types": 5}, {"rope_parameters": [1]}, {"rope_theta": 10**400},
        {"rms_norm_eps": 10**400}, {"rope_parameters": {"rope_theta": "big"}}, {"head_dim": 2}, {"use_mrope": True},
    ],
)  # fmt: skip
def test_values_of_the_wrong_kind_are_refused_by_name(change: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=next(iter(change))):
        ModelConfig.from_dict(LLAMA | change)


@pytest.mark.parametrize("model_type", ["gpt2", None, 3, "qwen3", ["qwen"], {}])
def test_unknown_architecture_names_the_known_ones(model_type: Any) -> None:
    with pytest.raises(ConfigError, match=r"known are qwen, qwen2, llama"):
        ModelConfig.from_dict(published() | {"model_type": model_type})


def test_what_a_config_says_of_quantization_is_read_elsewhere() -> None:
    """By QuantConfig (test_config_quant.py): the shapes are the same."""
    raw = published() | {"quantization_config": {"quant_method": "gptq", "bits": 4}}
    assert ModelConfig.from_dict(raw) == ModelConfig.from_dict(published())


def test_gguf_metadata_of_the_first_generation() -> None:
    metadata = {
        "general.architecture": "qwen", "qwen.context_length": 8192, "qwen.embedding_length": 2048,
        "qwen.block_count": 24, "qwen.feed_forward_length": 11008, "qwen.attention.head_count": 16,
        "qwen.rope.dimension_count": 128,
        "qwen.attention.layer_norm_rms_epsilon": 9.999999974752427e-07, "qwen.rope.freq_base": 10000.0,
        "tokenizer.ggml.tokens": [""] * 151936, "tokenizer.ggml.eos_token_id": 151643,
    }  # fmt: skip
    assert config_from_gguf(metadata, ["output.weight"], "x.gguf") == qwen_1_8b()


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("qwen.rope.scale_linear", 4.0), ("qwen.rope.scaling.factor", 4.0), ("qwen.rope.scaling.type", "yarn"),
        ("qwen.attention.scale", 0.1), ("qwen.attention.causal", False), ("qwen.logit_scale", 0.5),
        ("qwen.foo", 1), ("split.count", 2), ("qwen.expert_count", 4),
    ],
)  # fmt: skip
def test_gguf_metadata_that_changes_the_maths_is_refused_by_name(key: str, value: Any) -> None:
    metadata = {
        "general.architecture": "qwen", "qwen.context_length": 64, "qwen.embedding_length": 64, "qwen.block_count": 2,
        "qwen.feed_forward_length": 64, "qwen.attention.head_count": 4, "qwen.vocab_size": 50,
    }  # fmt: skip
    assert config_from_gguf(metadata, ["output.weight"], "x.gguf").head_dim == 16
    with pytest.raises(ConfigError, match="parts" if key.startswith("split") else key):
        config_from_gguf(metadata | {key: value}, ["output.weight"], "x.gguf")


@pytest.mark.parametrize("text", ["{", "[1]", '"x"', "\xff"])
def test_json_errors_name_the_file(tmp_path: Path, text: str) -> None:
    path = tmp_path / "config.json"
    path.write_bytes(text.encode("latin-1"))
    with pytest.raises(ConfigError, match=r"config\.json"):
        read_json(path)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("temperature", -1), ("temperature", math.nan), ("temperature", math.inf), ("temperature", "hot"), ("top_p", 0),
        ("top_p", 1.5), ("top_p", math.nan), ("top_k", -1), ("top_k", 1.5), ("min_p", 2), ("repetition_penalty", 0),
        ("max_new_tokens", 0), ("max_new_tokens", True), ("seed", -1), ("n", 0), ("logprobs", -1), ("stop", ""),
        ("stop", ["a", ""]), ("stop", [1]), ("stop_token_ids", [-1]), ("presence_penalty", math.nan),
        ("stop", 5), ("stop_token_ids", 5), ("ignore_eos", "no"), ("repetition_penalty", 1e-300),
        ("regex", ""), ("regex", 5), ("regex", "\ud800"), ("json_object", 1), ("json_schema", ""), ("json_schema", "{"),
        ("json_schema", "[1]"), ("json_schema", "true"), ("json_schema", [1]), ("json_schema", {"const": {1}}),
        ("json_schema", {"const": math.nan}), ("json_schema", '{"const": NaN}'), ("json_schema", {"const": "\ud800"}),
        ("json_schema", '{"a":' * 100_000),
    ],
)  # fmt: skip
def test_sampling_parameters_are_checked_by_name(field: str, value: Any) -> None:
    with pytest.raises(RequestError, match=field):
        SamplingParams(**{field: value})


def test_a_schema_is_kept_as_text_in_its_order() -> None:
    schema = {"type": "object", "properties": {"乙": {}, "a": {}}}
    params = SamplingParams(json_schema=schema)
    schema["properties"] = {}
    assert params.json_schema == '{"type": "object", "properties": {"乙": {}, "a": {}}}'
    assert params == SamplingParams(json_schema='{"type":"object", "properties":{"\\u4e59":{}, "a":{}}}')
    assert hash(replace(params, seed=1).grammar) == hash(params.grammar)


def test_a_reply_is_held_to_one_grammar_at_most() -> None:
    assert SamplingParams().grammar is None
    assert SamplingParams(regex="a").grammar == GrammarSpec("regex", "a")
    assert SamplingParams(json_schema={}).grammar == GrammarSpec("json_schema", "{}")
    assert SamplingParams(json_object=True).grammar == GrammarSpec("json_schema", '{"type": "object"}')
    with pytest.raises(RequestError, match="json_schema and regex are given"):
        SamplingParams(json_schema={}, regex="a")
    with pytest.raises(RequestError, match="json_object and regex are given"):
        SamplingParams(json_object=True, regex="a")


def test_none_means_what_the_checkpoint_says() -> None:
    chat = GenerationDefaults.from_dict(
        {"chat_format": "chatml", "eos_token_id": 151643, "pad_token_id": 151643, "max_window_size": 6144,
         "max_new_tokens": 512, "do_sample": True, "top_k": 0, "top_p": 0.8, "repetition_penalty": 1.1,
         "transformers_version": "4.31.0"}
    )  # fmt: skip
    resolved = SamplingParams(top_p=0.5).resolve(chat)
    assert (resolved.temperature, resolved.top_p, resolved.repetition_penalty, resolved.max_new_tokens) == (
        1.0,
        0.5,
        1.1,
        512,
    )
    assert SamplingParams().resolve(GenerationDefaults()).temperature == 0.0
    assert SamplingParams(top_p=0.9).resolve(GenerationDefaults()).temperature == 1.0


@pytest.mark.parametrize(
    "raw", [{"top_p": 0.0}, {"temperature": -1.0}, {"chat_format": "alpaca"}, {"stop_words_ids": [1]}]
)
def test_a_broken_generation_config_is_refused(raw: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=next(iter(raw))):
        GenerationDefaults.from_dict(raw)


def test_engine_options_are_not_filtered_in_silence() -> None:
    with pytest.raises(ConfigError, match="did you mean 'max_context'"):
        EngineConfig.from_options({"max_contxt": 4})
    with pytest.raises(ConfigError, match="attention"):
        EngineConfig(attention="fast")


def test_the_tiny_golden_config_reads(golden: Path) -> None:
    raw = json.loads((golden / "tiny-qwen" / "config.json").read_text())
    config = ModelConfig.from_dict(raw)
    assert (config.seq_length, config.head_dim, config.intermediate_size) == (32, 16, 160)
    assert config.context_length == 32767
