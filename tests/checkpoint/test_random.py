"""Random weights without files load like any others, in floats and in codes."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

import qwenlet
from qwenlet.checkpoint import RandomCheckpoint, load_model
from qwenlet.config import ModelConfig, QuantConfig, SamplingParams, qwen_1_8b
from qwenlet.errors import ConfigError, MissingTokenizerError


def tiny_config(**changes) -> ModelConfig:
    shapes = {"vocab_size": 320, "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2,
              "num_key_value_heads": 2, "head_dim": 32, "intermediate_size": 96}  # fmt: skip
    return replace(qwen_1_8b(), **(shapes | changes))


GREEDY = SamplingParams(temperature=0, max_new_tokens=4, ignore_eos=True)


@pytest.mark.parametrize("quant", [None, "int4", "int8"])
def test_it_loads_and_generates(quant):
    codes = None if quant is None else QuantConfig.named(quant)
    checkpoint = RandomCheckpoint.of(tiny_config(), quant=codes)
    with qwenlet.load(checkpoint, device="cpu", quant=quant, tile_cache=False, max_context=32) as llm:
        assert llm.precision == (quant or qwenlet.api.dtype_name(llm.dtype))
        assert len(llm.generate([1, 2, 3], GREEDY).token_ids) == 4
        logits = llm.logits([1, 2, 3])
        assert logits.isfinite().all()
        assert logits.std() > 0
        with pytest.raises(MissingTokenizerError):
            llm.generate("text")


def test_the_same_seed_gives_the_same_weights_and_rows_differ():
    def weight(seed, name="transformer.wte.weight"):
        return RandomCheckpoint.of(tiny_config(), seed=seed).weights().read(name, torch.float32)

    assert torch.equal(weight(1), weight(1))
    assert not torch.equal(weight(1), weight(2))
    assert len(weight(1).unique(dim=0)) == len(weight(1))
    assert weight(1).std() == pytest.approx(tiny_config().initializer_range, rel=0.05)


def test_codes_are_spread_as_the_floats_are():
    config = tiny_config()
    floats, _ = load_model(RandomCheckpoint.of(config), torch.float32, torch.device("cpu"))
    for name in ("int4", "int8"):
        coded = RandomCheckpoint.of(config, quant=QuantConfig.named(name))
        model, _ = load_model(coded, torch.float32, torch.device("cpu"), quantized=True)
        ours, theirs = model.transformer.h[0].mlp.w1, floats.transformer.h[0].mlp.w1
        assert ours.unpack().dequantize().std() == pytest.approx(float(theirs.weight.std()), rel=0.1)


def test_a_shape_that_the_groups_cut_is_refused():
    with pytest.raises(ConfigError):
        RandomCheckpoint.of(tiny_config(hidden_size=40, head_dim=20), quant=QuantConfig.named("int4"))
