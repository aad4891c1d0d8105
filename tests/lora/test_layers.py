"""The modules that train: which parameters, what they compute, and the way back through weights in codes."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from engine.tiny import random_model
from lora.tiny import plain_model, stir
from qwenlet.config import LoraConfig, qwen_1_8b
from qwenlet.errors import ConfigError
from qwenlet.linear import QuantLinear, TiledLinear
from qwenlet.lora import LoraLinear, add_lora, trainable
from qwenlet.lora.layers import adapter_off
from qwenlet.model import Qwen
from qwenlet.ops import cpu
from qwenlet.ops.packing import QuantTensor, to_tiles
from qwenlet.ops.rounding import round_to_nearest

SMALL = LoraConfig(rank=4, alpha=8.0, dropout=0.0)
needs_kernels = pytest.mark.skipif(not cpu.available(), reason="the package was built without a compiler")


def count(model: Qwen) -> int:
    return sum(parameter.numel() for parameter in trainable(model).values())


def test_as_many_parameters_train_as_published() -> None:
    with torch.device("meta"):
        chat, base = Qwen(qwen_1_8b()), Qwen(qwen_1_8b())
    add_lora(chat, LoraConfig())
    assert count(chat) == 53_673_984
    add_lora(base, LoraConfig(modules_to_save=("wte", "lm_head")))
    assert count(base) - count(chat) == 622_329_856


def test_a_fresh_adapter_changes_nothing() -> None:
    model = plain_model()
    ids = torch.arange(20)[None]
    before = model.loss(ids, ids)
    add_lora(model, SMALL)
    assert torch.equal(model.loss(ids, ids), before)


def test_the_low_rank_part_is_what_the_formula_says() -> None:
    model = plain_model()
    weight = model.transformer.h[0].mlp.w1.weight.clone()
    add_lora(model, SMALL)
    stir(model)
    layer = model.transformer.h[0].mlp.w1
    assert isinstance(layer, LoraLinear)
    x = torch.randn(5, 64)
    whole = weight + 8.0 / 4 * layer.lora_B @ layer.lora_A
    assert torch.allclose(layer(x), F.linear(x, whole), atol=1e-5)


def test_rslora_divides_by_the_root_of_the_rank() -> None:
    assert LoraConfig(rank=16, alpha=8.0).scale() == 0.5
    assert LoraConfig(rank=16, alpha=8.0, rslora=True).scale() == 2.0


def test_dora_gives_each_row_the_length_it_learned() -> None:
    model = plain_model()
    base = model.transformer.h[0].attn.c_attn
    weight, bias = base.weight.clone(), base.bias.clone()
    add_lora(model, LoraConfig(rank=4, dropout=0.0, dora=True))
    x = torch.randn(5, 64)
    layer = model.transformer.h[0].attn.c_attn
    assert isinstance(layer, LoraLinear)
    assert torch.allclose(layer(x), F.linear(x, weight, bias), atol=1e-5)  # at first the model as it was
    stir(model)
    with torch.no_grad():
        layer.lora_magnitude_vector.mul_(torch.rand(192) + 0.5)
    whole = weight + layer.scale * layer.lora_B @ layer.lora_A
    whole = whole * (layer.lora_magnitude_vector / whole.norm(dim=1))[:, None]
    assert torch.allclose(layer(x), F.linear(x, whole, bias), atol=1e-5)
    layer(x).sum().backward()
    assert layer.lora_magnitude_vector.grad is not None


def test_dropout_acts_in_training_alone() -> None:
    model = plain_model()
    add_lora(model, LoraConfig(rank=4, dropout=0.5))
    stir(model)
    layer, x = model.transformer.h[0].mlp.w1, torch.randn(5, 64)
    assert torch.equal(layer(x), layer(x))
    model.train()
    assert not torch.equal(layer(x), layer(x))


def test_switched_off_the_model_is_as_before() -> None:
    model = plain_model()
    ids = torch.arange(20)[None]
    before = model.loss(ids, ids)
    add_lora(model, SMALL)
    stir(model)
    with_adapter = model.loss(ids, ids)
    with adapter_off(model):
        assert torch.equal(model.loss(ids, ids), before)
    assert torch.equal(model.loss(ids, ids), with_adapter)
    assert not torch.equal(with_adapter, before)


def test_modules_that_train_as_a_whole() -> None:
    model = plain_model()
    add_lora(model, LoraConfig(rank=4, targets=("c_attn",), modules_to_save=("lm_head", "ln_f")))
    assert {name for name in trainable(model) if "lora" not in name} == {"lm_head.weight", "transformer.ln_f.weight"}


def test_a_tied_pair_trains_as_one() -> None:
    model = plain_model(tie_word_embeddings=True)
    add_lora(model, LoraConfig(rank=4, targets=("c_attn",), modules_to_save=("wte",)))
    assert model.lm_head.weight is model.transformer.wte.weight
    assert model.lm_head.weight.requires_grad


@pytest.mark.parametrize(
    ("config", "said"),
    [
        ({"targets": ("q_proj",)}, "q_proj, but the model has c_attn"),
        ({"targets": ()}, "targets names no linear"),
        ({"modules_to_save": ("embed",)}, "embed, but the model has wte"),
        ({"modules_to_save": ("w1",)}, "stands in targets and in modules_to_save"),
        ({"rank": 0}, "rank is 0"),
        ({"alpha": 0.0}, "alpha is 0.0"),
        ({"dropout": 1.0}, "dropout is 1.0"),
    ],
)
def test_what_does_not_fit_is_said(config: dict[str, object], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        add_lora(plain_model(), LoraConfig(**config))  # type: ignore[arg-type]


def test_a_second_adapter_is_refused() -> None:
    model = plain_model()
    add_lora(model, SMALL)
    with pytest.raises(ConfigError, match="has an adapter already"):
        add_lora(model, SMALL)


# ------------------------------------------------------------------------------------------- weights in codes


def weights() -> dict[str, QuantTensor]:
    torch.manual_seed(3)
    w, half = torch.randn(40, 64), torch.float16
    rounded = {f"int{bits}": round_to_nearest(w, bits, 32) for bits in (4, 8)}
    odd = round_to_nearest(w, 4, 32, sym=False)
    order = torch.randperm(64)
    minimums = QuantTensor(4, 32, odd.codes, odd.scales, minimums=torch.randn(40, 2).to(half))
    ordered = QuantTensor(4, 32, odd.codes, odd.scales, odd.zeros, order=order)
    return rounded | {"zero points": odd, "minimums": minimums, "act-order": ordered}


@pytest.mark.parametrize("isa", [*cpu.available(), "torch"])
@pytest.mark.parametrize("kind", weights())
def test_columns_are_what_the_codes_are_worth(kind: str, isa: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("QWENLET_ISA", isa)
    weight = weights()[kind]
    stored = weight.dequantize() if weight.order is None else weight.dequantize()[:, weight.order]
    tiles = to_tiles(weight)
    assert torch.allclose(cpu.tiles_columns(tiles, 8, 40, torch.float32), stored.T[8:40], atol=1e-6)
    rounded = cpu.tiles_columns(tiles, 8, 40, torch.bfloat16)
    assert torch.allclose(rounded.float(), stored.T[8:40], rtol=2**-8, atol=1e-6)


@needs_kernels
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("isa", cpu.available())
def test_columns_of_floats_are_the_floats(isa: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("QWENLET_ISA", isa)
    weight = torch.randn(40, 64).to(dtype)
    tiles = TiledLinear(weight, None).tiles
    assert torch.equal(cpu.tiles_columns(tiles, 2, 34, dtype), weight.T[2:34])
    assert torch.equal(cpu.tiles_to_float(tiles, dtype), weight)


@pytest.mark.parametrize("isa", [*cpu.available()[:1], "torch"])
@pytest.mark.parametrize("kind", weights())
def test_the_gradient_goes_through_the_weight_the_codes_stand_for(
    kind: str, isa: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("QWENLET_ISA", isa)
    weight = weights()[kind]
    x = torch.randn(2, 3, 64, requires_grad=True)
    grad = torch.randn(2, 3, 40)
    y = QuantLinear(to_tiles(weight), torch.randn(40))(x)
    y.backward(grad)
    exact = grad @ weight.dequantize()
    # products of bfloat16: each of 40 terms within 2^-8, the sum rounded once more
    tolerance = 2**-7 * (grad.abs() @ weight.dequantize().abs()).max()
    assert x.grad is not None
    assert (x.grad - exact).abs().max() < tolerance


@needs_kernels
def test_floats_in_tiles_have_exact_gradients() -> None:
    weight, x = torch.randn(40, 64), torch.randn(7, 64, requires_grad=True)
    y = TiledLinear(weight, None)(x)
    grad = torch.randn_like(y)
    y.backward(grad)
    assert x.grad is not None
    assert torch.allclose(x.grad, grad @ weight, atol=1e-5)


@pytest.mark.parametrize("kind", ["int4", "int8", "bf16"])
def test_an_adapter_learns_beside_codes(kind: str) -> None:
    """The loss of a text falls to a third in fifty steps, and the codes stay what they were."""
    model = random_model(kind).train()
    layer = model.transformer.h[1].mlp.w1
    before = layer.tiles.weight.clone()
    add_lora(model, LoraConfig(rank=8, dropout=0.0))
    model.transformer.gradient_checkpointing = True
    ids = torch.randint(0, 256, (2, 24), generator=torch.Generator().manual_seed(0))
    optimizer = torch.optim.AdamW(trainable(model).values(), lr=0.02)
    losses = []
    for _ in range(50):
        loss = model.loss(ids, ids)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0] / 3, losses[::10]
    assert torch.equal(model.transformer.h[1].mlp.w1.base.tiles.weight, before)
