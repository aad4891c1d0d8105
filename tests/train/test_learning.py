"""What of a model learns: vocabularies that grow, over codes too, and adapters that go on as they were begun."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from tests.engine.tiny import random_model
from tests.train.tiny import CPU, TINY, made_samples, tiny_model

from qwenlet.config import LoraConfig
from qwenlet.errors import ConfigError
from qwenlet.linear import QuantEmbedding
from qwenlet.lora import add_lora, save_adapter, trainable
from qwenlet.model import Qwen
from qwenlet.train.learning import keep_masters, make_learn, shapes_of
from qwenlet.train.objective import NextToken

BOTH = ("wte", "lm_head")


def coded_model() -> Qwen:
    """Every linear and the embedding in codes."""
    model = random_model("int4")
    table = model.transformer.wte.weight.detach()
    scales = table.unflatten(1, (-1, 32)).abs().amax(-1) / 127
    codes = (table / scales.repeat_interleave(32, 1)).round().to(torch.int8)
    model.transformer.wte = QuantEmbedding(codes, scales.half())  # type: ignore[assignment]
    return model


def test_a_vocabulary_grows_over_codes():
    model = coded_model()
    before = model.transformer.wte(torch.arange(271))
    make_learn(model, whole=False, lora=LoraConfig(rank=4, modules_to_save=BOTH), vocabulary=300)
    keep_masters(model)
    wte, head = model.transformer.wte.weight, model.lm_head.weight
    assert (wte.shape, head.shape) == ((300, 64), (300, 64))
    assert torch.equal(wte[:271], before)
    assert {"transformer.wte.weight", "lm_head.weight"} <= trainable(model).keys()
    NextToken(made_samples()).loss(model.train(), (0, 1), CPU).backward()
    assert head.grad is not None
    assert head.grad[299].any()


@pytest.mark.parametrize("lora", [LoraConfig(rank=4), LoraConfig(rank=4, modules_to_save=("lm_head",), dora=True)])
def test_shapes_learn_what_weights_would(lora: LoraConfig):
    """What a plan counts before weights are loaded is what learns once they are."""
    shapes, model = shapes_of(TINY), tiny_model()
    for one in (shapes, model):
        make_learn(one, whole=False, lora=lora, vocabulary=0)
    sizes = {name: p.shape for name, p in trainable(model).items()}
    assert {name: p.shape for name, p in trainable(shapes).items()} == sizes
    assert all(p.is_meta for p in shapes.parameters())
    whole = shapes_of(TINY)
    make_learn(whole, whole=True, vocabulary=300)
    assert len(trainable(whole)) == len(list(whole.parameters()))
    assert whole.config.vocab_size == 300


@pytest.fixture
def begun(tmp_path: Path) -> Path:
    model = tiny_model()
    add_lora(model, LoraConfig(rank=4, dropout=0.1))
    return save_adapter(model, tmp_path / "begun")


@pytest.mark.parametrize(
    ("asked", "said"),
    [
        ({"rank": 8}, "rank is 8, but the adapter in .* was begun with 4"),
        ({"dropout": 0.2}, "dropout is 0.2"),
        ({"targets": ("c_attn",)}, "targets is"),
        ({"modules_to_save": BOTH}, "modules_to_save is"),
        ({"dora": True}, "dora is True"),
    ],
)
def test_an_adapter_goes_on_as_it_was_begun(begun: Path, asked: dict[str, Any], said: str):
    with pytest.raises(ConfigError, match=said):
        make_learn(shapes_of(TINY), whole=False, lora=LoraConfig(**asked), adapter=begun, vocabulary=0)


def test_what_an_adapter_is_may_be_said_again(begun: Path):
    model = tiny_model()
    lora = LoraConfig(rank=4, dropout=0.1, targets=("w2", "w1", "c_proj", "c_attn"))
    make_learn(model, whole=False, lora=lora, adapter=begun, vocabulary=0)
    assert len(trainable(model)) == 2 * 5 * 2


def test_rows_that_would_stay_frozen_are_refused(begun: Path, tmp_path: Path):
    with pytest.raises(ConfigError, match="300 tokens, but the model 271"):
        make_learn(shapes_of(TINY), whole=False, vocabulary=300)
    with pytest.raises(ConfigError, match=r"the adapter in .*begun does not train them"):
        make_learn(shapes_of(TINY), whole=False, adapter=begun, vocabulary=300)
    model = tiny_model()
    make_learn(model, whole=False, lora=LoraConfig(rank=4, modules_to_save=BOTH), vocabulary=280)
    folder = save_adapter(model, tmp_path / "grown")
    make_learn(shapes_of(TINY), whole=False, adapter=folder, vocabulary=300)
    other = tiny_model()
    make_learn(other, whole=False, adapter=folder, vocabulary=300)
    assert other.lm_head.weight.shape == (300, 32)
    assert other.lm_head.weight.requires_grad
    assert torch.equal(other.lm_head.weight[:280], model.lm_head.weight)
