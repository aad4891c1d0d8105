"""Adapters chosen row by row: the program and the modules against weights with the adapter added in."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from engine.tiny import KINDS, random_model, small_engine
from lora.tiny import plain_model, random_adapter
from qwenlet.cache import Rows
from qwenlet.config import SamplingParams
from qwenlet.errors import CheckpointError, RequestError
from qwenlet.linear import TiledLinear, float_weight, replace_linear
from qwenlet.lora import Adapter, LoadedAdapter
from qwenlet.model import Qwen
from qwenlet.ops import cpu

PROMPTS = [list(range(start, start + length)) for start, length in ((3, 5), (40, 30), (7, 1), (90, 12))]
needs_kernels = pytest.mark.skipif(not cpu.available(), reason="the package was built without a compiler")


@pytest.fixture(params=[*cpu.available(), "torch"])
def isa(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setenv("QWENLET_ISA", request.param)
    return str(request.param)


def with_added(model: Qwen, adapter: Adapter) -> Qwen:
    """A float32 model whose weights are the sum: what the adapter stands for."""
    other = Qwen(model.config).eval().requires_grad_(False)
    with torch.no_grad():
        for name, module in other.named_modules():
            if hasattr(module, "weight"):
                source = model.get_submodule(name)
                weight = float_weight(source) if hasattr(source, "out_features") else source.weight
                if name in adapter.factors:
                    weight = adapter.factors[name].added_to(weight)
                module.weight.copy_(adapter.saved.get(f"{name}.weight", weight))
                if getattr(module, "bias", None) is not None:
                    module.bias.copy_(source.bias)
    return other


def logits(model: Qwen, ids: list[int]) -> torch.Tensor:
    with torch.inference_mode():
        return model(torch.tensor(ids), Rows.fresh([len(ids)], [model.config.ntk_alpha(len(ids))]))


@pytest.mark.parametrize("whole", [False, True])
def test_rows_get_what_their_adapter_adds(isa: str, whole: bool) -> None:
    """In float32, four prompts in one step, each with another adapter or none."""
    model = random_model("fp32")
    engine = small_engine(model, "fp32", prefill_chunk=200)
    adapters = [random_adapter(model, 1, 5), random_adapter(model, 2, 20, whole=whole), random_adapter(model, 3, 3)]
    for number, adapter in enumerate(adapters):
        engine.add_adapter(LoadedAdapter.beside(model, f"a{number}", adapter))
    found: list[list[torch.Tensor]] = [[] for _ in PROMPTS]
    names = ["a1", None, "a0", "a2"]
    for ids, name, parts in zip(PROMPTS, names, found, strict=True):
        engine.read(ids, 1.0, 0, lambda _, part, parts=parts: parts.append(part.clone()), adapter=name)
    assert engine.step()
    assert engine.stats.steps == 1
    for ids, name, parts in zip(PROMPTS, names, found, strict=True):
        reference = model if name is None else with_added(model, adapters[int(name[1])])
        assert torch.allclose(torch.cat(parts), logits(reference, ids), atol=2e-4, rtol=1e-4), name
    engine.close()


@pytest.mark.parametrize("kind", ["bf16", "int8", "int4"])
def test_beside_codes_the_adapter_is_bfloat16(kind: str) -> None:
    model, adapter = random_model(kind), random_adapter(random_model(kind), 1, 8)
    engine = small_engine(model, kind)
    engine.add_adapter(LoadedAdapter.beside(model, "a", adapter))
    base, found = (engine.logits(PROMPTS[1], 1.0, adapter=name) for name in (None, "a"))
    plain, expected = logits(model, PROMPTS[1]), logits(with_added(model, adapter), PROMPTS[1])
    # as far from the exact sum as the model alone is from its exact self, and a rounding to bfloat16 more
    error, own = (found - expected).std() / expected.std(), (base - plain.float()).std() / base.std()
    assert error < 0.06 + own, (float(error), float(own))
    assert (found - base).std() > 0.3 * base.std()
    engine.close()


def test_embeddings_have_the_adapter_too() -> None:
    model, adapter = random_model("fp32"), random_adapter(random_model("fp32"), 1, 8, whole=True)
    engine = small_engine(model)
    engine.add_adapter(LoadedAdapter.beside(model, "a", adapter))

    def embedded(name: str | None) -> torch.Tensor:
        request, state = engine.embed(PROMPTS[1], 1.0, adapter=name)
        for _ in engine.stream(request):
            pass
        return state.mean

    expected = with_added(model, adapter).hidden(torch.tensor(PROMPTS[1]), Rows.fresh([30], [1.0])).mean(0)
    assert torch.allclose(embedded("a"), expected, atol=1e-4)
    assert not torch.allclose(embedded(None), expected, atol=1e-2)
    engine.close()


@pytest.mark.parametrize("kind", KINDS)
def test_the_same_prompt_with_another_adapter_is_another_prompt(kind: str) -> None:
    """What the prefix cache holds of one adapter is not found for another, and not for a new one of the same name."""
    model = random_model(kind)
    engine = small_engine(model, kind)
    prompt = [index % 200 for index in range(130)]

    def cached(adapter: str | None) -> int:
        (request,) = engine.submit(prompt, SamplingParams(max_new_tokens=1, temperature=0.0, adapter=adapter))
        while engine.step():
            pass
        return request.cached

    for seed in (1, 2):
        engine.add_adapter(LoadedAdapter.beside(model, "a", random_adapter(model, seed)))
        assert cached("a") == 0
        assert cached("a") == 128
    assert cached(None) == 0
    assert cached(None) == 128
    engine.close()


def test_an_adapter_goes_when_it_is_taken_away() -> None:
    model = random_model("fp32")
    engine = small_engine(model)
    before = engine.logits(PROMPTS[0], 1.0)
    engine.add_adapter(LoadedAdapter.beside(model, "a", random_adapter(model, 1)))
    (running,) = engine.submit(PROMPTS[0], SamplingParams(max_new_tokens=5, ignore_eos=True, adapter="a"))
    engine.remove_adapter("a")
    with pytest.raises(RequestError, match="adapter is 'a', but none is loaded"):
        engine.submit(PROMPTS[0], SamplingParams(adapter="a"))
    for _ in engine.stream(running):
        pass
    assert running.finish_reason == "length"
    assert torch.equal(engine.logits(PROMPTS[0], 1.0), before)
    engine.close()


def test_a_name_that_is_not_loaded_is_said() -> None:
    model = random_model("fp32")
    engine = small_engine(model)
    engine.add_adapter(LoadedAdapter.beside(model, "mine", random_adapter(model, 1)))
    with pytest.raises(RequestError, match="adapter is 'yours', but loaded are mine"):
        engine.submit([1], SamplingParams(adapter="yours"))
    with pytest.raises(RequestError, match="adapter is ''"):
        SamplingParams(adapter="")
    engine.close()


@pytest.mark.parametrize("what", ["ln_f", "dora", "vocabulary"])
def test_what_has_to_be_merged_is_said(what: str) -> None:
    model = random_model("fp32")
    adapter = random_adapter(model, 1)
    if what == "ln_f":
        adapter = replace(adapter, saved={"transformer.ln_f.weight": torch.ones(64)})
    elif what == "dora":
        adapter = replace(adapter, config=replace(adapter.config, dora=True))
    else:
        adapter = replace(
            adapter, saved=dict.fromkeys(("transformer.wte.weight", "lm_head.weight"), torch.zeros(300, 64))
        )
    with pytest.raises(CheckpointError, match="can't be chosen row by row") as problem:
        LoadedAdapter.beside(model, "a", adapter)
    assert "qwenlet merge" in str(problem.value)


def test_closing_leaves_the_model_as_it_was() -> None:
    model = plain_model()
    engine = small_engine(model)
    engine.add_adapter(LoadedAdapter.beside(model, "a", random_adapter(model, 1)))
    engine.logits([1, 2], 1.0, adapter="a")
    assert any(module._forward_hooks for module in model.modules())
    engine.close()
    assert not any(module._forward_hooks for module in model.modules())


@needs_kernels
def test_a_model_in_tiles_and_torch_agree_on_the_precision() -> None:
    model = random_model("bf16")
    adapter = random_adapter(model, 1, rank=3)
    pair = LoadedAdapter.beside(model, "a", adapter).pairs["transformer.h.0.mlp.w1"]
    assert [type(module) for module in pair] == [TiledLinear, TiledLinear]
    assert [module.tiles.bits for module in pair] == [16, 16]
    replace_linear(model, "transformer.h.0.mlp.w1", torch.nn.Linear(64, 96, dtype=torch.float64))
    assert LoadedAdapter.beside(model, "a", adapter).pairs["lm_head"][0](torch.ones(1, 64)).dtype == torch.float32
