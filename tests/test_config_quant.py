"""What a checkpoint says of its quantization: read strictly, written back, and fitted to a model's layers."""

from __future__ import annotations

from contextlib import suppress
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qwenlet.config import QuantConfig, qwen_1_8b
from qwenlet.errors import ConfigError

# as the published Int8 checkpoint's quantize_config.json has it, with Int4's bits
PUBLISHED = {
    "bits": 4, "group_size": 128, "damp_percent": 0.01, "desc_act": False, "static_groups": False, "sym": True,
    "true_sequential": True, "model_name_or_path": None, "model_file_base_name": "model",
}  # fmt: skip


def read(**changes: Any) -> QuantConfig:
    return QuantConfig.from_published(PUBLISHED | changes, "quantize_config.json")


@pytest.mark.parametrize("bits", [4, 8])
def test_the_published_file(bits: int) -> None:
    config = read(bits=bits, quant_method="gptq")
    assert config == QuantConfig(
        bits=bits, group_size=128, mse=False, method="gptq", head_bits=None, embedding_bits=None
    )


@pytest.mark.parametrize(
    "config",
    [
        QuantConfig(group_size=64),
        QuantConfig(bits=8, group_size=32, sym=False, desc_act=True, method="gptq", mse=False, damp_percent=0.1),
        QuantConfig(group_size=128, head_bits=8, head_group_size=128, embedding_bits=None),
        QuantConfig(group_size=128, head_bits=None),
    ],
)
def test_what_is_written_is_read_back(config: QuantConfig) -> None:
    assert QuantConfig.from_published(config.to_published(), "config.json") == config


def test_a_head_without_a_rule_is_like_the_layers() -> None:
    config = read(lm_head=True, bits=8, group_size=64)
    assert config.of_linear("lm_head") == config.of_linear("transformer.h.0.mlp.w1") == (8, 64)


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({"quant_method": "awq"}, "quantized by 'awq', but only 'gptq' is read"),
        ({"quant_method": "bitsandbytes", "bits": None}, "quantized by 'bitsandbytes'"),
        ({"bits": 3}, "bits is 3, but only 4 and 8"),
        ({"bits": "4"}, "bits is '4', expected int"),
        ({"group_size": -1}, "group_size is -1, but only 32, 64, 128"),
        ({"group_size": 256}, "group_size is 256"),
        ({"checkpoint_format": "gptq_v2"}, "checkpoint_format is 'gptq_v2'"),
        ({"checkpoint_format": "marlin"}, "checkpoint_format is 'marlin'"),
        ({"is_marlin_format": True}, "is_marlin_format is True"),
        ({"rotation": "hadamard"}, "rotation is 'hadamard'"),
        ({"dynamic": {"+:.*mlp.*": {"bits": 8}}}, r"dynamic has rules for '\+:\.\*mlp\.\*', but only lm_head may"),
        ({"dynamic": {"-:.*c_proj.*": {}}}, "dynamic has rules for"),
        ({"dynamic": ["lm_head"]}, "dynamic has rules for"),
        ({"dynamic": {"lm_head": {"bits": 4}}}, "a rule for lm_head, but lm_head is not true"),
        ({"lm_head": True, "dynamic": {"lm_head": {"bits": 2}}}, "lm_head's bits is 2"),
        ({"lm_head": True, "dynamic": {"lm_head": {"format": "x"}}}, "expected bits and group_size"),
        ({"modules_in_block_to_quantize": [["c_attn"]]}, "modules_in_block_to_quantize"),
        ({"embedding_bits": 4}, "embedding_bits is 4"),
        ({"damp_percent": 2.0}, "damp_percent is 2.0"),
        ({"zero_scale": 1}, "not understood: zero_scale"),
    ],
)
def test_what_changes_the_maths_is_refused_by_name(changes: dict[str, Any], complaint: str) -> None:
    with pytest.raises(ConfigError, match=complaint) as caught:
        read(**changes)
    assert "quantize_config.json" in str(caught.value) or caught.value.message.startswith(("embedding", "damp"))


@given(
    st.dictionaries(
        st.sampled_from([*PUBLISHED, "quant_method", "lm_head", "dynamic", "embedding_bits", "meta", "mse", "x"]),
        st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=3) | st.lists(st.integers()),
    )
)
def test_wild_values_are_read_or_refused(changes: dict[str, Any]) -> None:
    with suppress(ConfigError):
        read(**changes)


def test_the_group_size_is_the_largest_that_divides_every_layer() -> None:
    model = qwen_1_8b()
    assert QuantConfig().fit(model).group_size == 128
    assert QuantConfig().fit(replace(model, intermediate_size=5504 - 64)).group_size == 64
    assert QuantConfig().fit(replace(model, hidden_size=2048 + 32)).group_size == 32
    assert QuantConfig(group_size=64).fit(model).group_size == 64


@pytest.mark.parametrize(
    ("quant", "change", "complaint", "hint"),
    [
        (
            {"group_size": 128},
            {"intermediate_size": 1600},
            "1600 inputs of transformer.h.0.mlp.c_proj",
            "group_size=64",
        ),
        ({"group_size": 64}, {"hidden_size": 2080}, "2080 inputs of transformer.h.0.attn.c_attn", "group_size=32"),
        ({"head_group_size": 64}, {"hidden_size": 2080}, "2080 inputs of lm_head", "head_group_size=32"),
        ({}, {"intermediate_size": 1000}, "groups of 32 do not divide the 1000 inputs", "can't be cut"),
    ],
)
def test_a_group_that_cuts_a_layer(quant: dict[str, Any], change: dict[str, Any], complaint: str, hint: str) -> None:
    with pytest.raises(ConfigError, match=complaint) as caught:
        QuantConfig(**quant).fit(replace(qwen_1_8b(), **change))
    assert hint in str(caught.value.hint)
