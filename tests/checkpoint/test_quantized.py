"""Quantized checkpoints: written in AutoGPTQ's layout, run as they are, rounded while loading; and damaged ones."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import gguf
import pytest
import torch
from gguf import GGMLQuantizationType as Kind
from safetensors.torch import load_file, save_file

from checkpoint.variants import (
    CPU,
    LLAMA,
    State,
    add_config,
    add_tensor,
    cut,
    finish,
    foreign_config,
    gguf_names,
    logits,
    published,
    qwen2_folder,
    random_llama,
    untied_state,
    write_gguf,
    write_json,
)
from qwenlet.checkpoint import Checkpoint, Rounding, convert, load_model, write_quantized, write_rounded
from qwenlet.checkpoint.files import open_folder
from qwenlet.checkpoint.gptq import GPTQFile
from qwenlet.checkpoint.names import Part
from qwenlet.config import ModelConfig, QuantConfig
from qwenlet.errors import CheckpointError, ConfigError, FormatError
from qwenlet.linear import MappedEmbedding, QuantEmbedding, QuantLinear, TiledLinear
from qwenlet.model import Linear, Qwen
from qwenlet.ops import cpu
from qwenlet.ops.packing import QuantTensor, from_tiles
from qwenlet.ops.rounding import round_to_nearest

INT4 = QuantConfig(group_size=32)
AS_PUBLISHED = QuantConfig(group_size=32, head_bits=None, embedding_bits=None)  # layers only
LAYER = "transformer.h.1.attn.c_attn"
LAYER_K = "model.layers.1.self_attn.k_proj"
# how a linear without codes runs beside others
FLOATS = (Linear, "float32") if cpu.status().isa is None else (TiledLinear, "bfloat16")


def load(path: Path, *, quantized: bool = True, **options: Any) -> Qwen:
    return load_model(Checkpoint.open(path), torch.float32, CPU, quantized=quantized, **options)[0]


def quantize(source: Path, out: Path, quant: QuantConfig = INT4) -> Path:
    return write_rounded(Checkpoint.open(source), out, quant)


def assert_close(quantized: Qwen, same_in_floats: Path | Qwen) -> None:
    """Of eight-bit activations; the weights are the same."""
    exact = (
        logits(same_in_floats) if isinstance(same_in_floats, Qwen) else logits(load(same_in_floats, quantized=False))
    )
    assert (logits(quantized) - exact).norm() < 0.03 * exact.norm()


def linears(model: Qwen) -> Iterator[tuple[str, torch.nn.Module]]:
    kinds = (QuantLinear, torch.nn.Linear)
    return ((name, module) for name, module in model.named_modules() if isinstance(module, kinds))


# ------------------------------------------------------------------------------------------------------- round trips


@pytest.mark.parametrize(
    "quant",
    [
        INT4,
        AS_PUBLISHED,
        QuantConfig.named("int8"),
        replace(INT4, sym=False),
        replace(INT4, head_bits=None),
        replace(INT4, embedding_bits=None),
    ],
    ids=["int4", "layers only", "int8", "asymmetric", "float head", "float embedding"],
)
def test_what_was_written_runs(tmp_path: Path, tiny: Path, quant: QuantConfig) -> None:
    out = quantize(tiny, tmp_path / "q", quant)
    checkpoint = Checkpoint.open(out)
    assert checkpoint.quant == quant.fit(checkpoint.config)
    assert checkpoint.is_quantized
    model = load(out)
    for name, module in linears(model):
        assert isinstance(module, QuantLinear) == (name != "lm_head" or quant.head_bits is not None), name
    expected = QuantEmbedding if quant.embedding_bits else MappedEmbedding
    assert isinstance(model.transformer.wte, expected)
    assert model.transformer.ln_f.weight.dtype == torch.float32
    assert_close(model, out)


def test_the_layout_is_autogptqs(tmp_path: Path, tiny: Path, state: State) -> None:
    out = quantize(tiny, tmp_path / "q", AS_PUBLISHED)
    tensors = load_file(out / "model.safetensors")
    shapes = {name.removeprefix(f"{LAYER}."): (list(t.shape), t.dtype) for name, t in tensors.items() if LAYER in name}
    assert shapes == {
        "qweight": ([64 // 8, 192], torch.int32),
        "qzeros": ([2, 192 // 8], torch.int32),
        "scales": ([2, 192], torch.float16),
        "g_idx": ([64], torch.int32),
        "bias": ([192], torch.float16),
    }
    assert tensors["lm_head.weight"].dtype == tensors["transformer.ln_f.weight"].dtype == torch.float16
    assert torch.equal(tensors["lm_head.weight"], state["lm_head.weight"].half())
    config = json.loads((out / "config.json").read_text())
    assert config["fp16"] is True
    section = json.loads((out / "quantize_config.json").read_text())
    assert config["quantization_config"] == section
    assert {
        "quant_method": "gptq",
        "bits": 4,
        "group_size": 32,
        "desc_act": False,
        "sym": True,
    }.items() <= section.items()
    assert "lm_head" not in section


def test_a_quantized_head_and_embedding_say_so(tmp_path: Path, tiny: Path) -> None:
    out = quantize(tiny, tmp_path / "q")
    section = json.loads((out / "config.json").read_text())["quantization_config"]
    assert section["lm_head"] is True
    assert section["dynamic"] == {"+:^lm_head$": {"bits": 4, "group_size": 32}}
    assert (section["embedding_bits"], section["embedding_group_size"]) == (8, 32)
    tensors = load_file(out / "model.safetensors")
    assert tensors["transformer.wte.weight"].dtype == torch.int8
    assert tensors["transformer.wte.scales"].shape == (384, 2)
    assert "lm_head.weight" not in tensors


def test_the_callers_codes_are_written(tmp_path: Path, tiny: Path, state: State) -> None:
    """Each linear is asked for once, in the model's order, the head last; act-order and zero points come back."""
    seen: list[str] = []

    def weight_of(name: str, weight: torch.Tensor) -> QuantTensor:
        seen.append(name)
        assert torch.equal(weight, state[f"{name}.weight"].float())
        order = torch.randperm(weight.shape[1], generator=torch.Generator().manual_seed(len(seen)))
        return replace(round_to_nearest(weight[:, order], 4, 32, sym=False), order=order)

    out = write_quantized(Checkpoint.open(tiny), tmp_path / "q", replace(INT4, sym=False, desc_act=True), weight_of)
    assert seen[:5] == [
        f"transformer.h.0.{m}" for m in ("attn.c_attn", "attn.c_proj", "mlp.w1", "mlp.w2", "mlp.c_proj")
    ]
    assert len(seen) == 3 * 5 + 1
    assert seen[-1] == "lm_head"
    model = load(out)
    assert all(module.tiles.order is not None and module.tiles.zeros is not None for _, module in linears(model))
    assert_close(model, out)


def test_rows_that_fill_no_tile(tmp_path: Path) -> None:
    """24 rows of k and v, a head of 392."""
    model = random_llama(vocab_size=392, num_key_value_heads=1, num_attention_heads=4, head_dim=24, hidden_size=96)
    source = published(
        tmp_path / "f", cut(untied_state(model), model.config), foreign_config(model.config, "llama") | {"head_dim": 24}
    )
    out = quantize(source, tmp_path / "q")
    assert_close(load(out), out)


@pytest.mark.parametrize("head_bits", [4, None])
def test_a_llama_with_a_tied_head_keeps_its_own_names(tmp_path: Path, head_bits: int | None) -> None:
    model = random_llama()
    source = published(tmp_path / "f", cut(untied_state(model), LLAMA), foreign_config(LLAMA, "llama"))
    out = quantize(source, tmp_path / "q", replace(INT4, head_bits=head_bits))
    names = set(load_file(out / "model.safetensors"))
    assert {f"model.layers.0.self_attn.{letter}_proj.qweight" for letter in "qkv"} < names
    assert ("lm_head.qweight" in names) == (head_bits is not None)
    loaded = load(out)
    assert loaded.config.tie_word_embeddings == (head_bits is None)
    assert isinstance(loaded.lm_head, QuantLinear)
    assert loaded.lm_head.tiles.bits == (head_bits or 8), "a tied head is a copy of the embedding's codes"
    assert_close(loaded, out)


def test_a_qwen2_folder(tmp_path: Path, tiny: Path) -> None:
    out = quantize(qwen2_folder(tmp_path / "f", tiny), tmp_path / "q")
    model = load(out)
    assert model.transformer.h[0].attn.c_attn.bias is not None
    assert_close(model, out)


def test_q_k_and_v_in_different_orders_become_floats(tmp_path: Path, tiny: Path) -> None:
    def weight_of(name: str, weight: torch.Tensor) -> QuantTensor:
        return round_to_nearest(weight, 4, 32)

    out = write_quantized(Checkpoint.open(qwen2_folder(tmp_path / "f", tiny)), tmp_path / "q", INT4, weight_of)
    tensors = load_file(out / "model.safetensors")
    stem = "model.layers.0.self_attn.k_proj"
    tensors[f"{stem}.g_idx"] = tensors[f"{stem}.g_idx"].flip(0).contiguous()
    save_file(tensors, out / "model.safetensors")
    model, report = load_model(Checkpoint.open(out), torch.float32, CPU, quantized=True)
    kind, dtype = FLOATS
    assert isinstance(model.transformer.h[0].attn.c_attn, kind)
    assert f"transformer.h.0.attn.c_attn in {dtype}" in str(report)
    assert_close(model, out)


def test_floats_out_of_codes(tmp_path: Path, tiny: Path) -> None:
    """convert takes a GPTQ folder for the floats it stands for."""
    out = quantize(tiny, tmp_path / "q")
    floats = convert(out, tmp_path / "f", dtype="fp32")
    assert torch.equal(logits(load(floats, quantized=False)), logits(load(out, quantized=False)))
    assert not Checkpoint.open(floats).is_quantized


def test_older_files_have_the_section_beside_the_config(tmp_path: Path, tiny: Path) -> None:
    out = quantize(tiny, tmp_path / "q", AS_PUBLISHED)
    config = json.loads((out / "config.json").read_text())
    del config["quantization_config"]
    write_json(out / "config.json", config)
    assert Checkpoint.open(out).quant == AS_PUBLISHED
    (out / "quantize_config.json").unlink()
    with pytest.raises(CheckpointError, match="unexpected") as caught:
        load(out)
    assert "quantize_config.json may be missing" in str(caught.value)


def test_the_rest_of_a_published_checkpoint_is_completed(tmp_path: Path, tiny: Path) -> None:
    """Its codes stay, the head and the embedding are rounded."""
    first = quantize(tiny, tmp_path / "q", AS_PUBLISHED)
    checkpoint = Checkpoint.open(first)
    assert checkpoint.quant is not None
    quant = checkpoint.quant.completed(QuantConfig())
    second = write_rounded(checkpoint, tmp_path / "r", quant)
    before, after = load_file(first / "model.safetensors"), load_file(second / "model.safetensors")
    assert all(torch.equal(after[name], value) for name, value in before.items() if "qweight" in name)
    assert "lm_head.qweight" in after
    assert Checkpoint.open(second).quant == quant
    with pytest.raises(ConfigError, match="with bits 4; bits 8 was asked for"):
        checkpoint.quant.completed(QuantConfig.named("int8"))
    with pytest.raises(ConfigError, match="quantized already"):
        write_rounded(checkpoint, tmp_path / "s", QuantConfig(bits=8))


# -------------------------------------------------------------------------------------------------------------- GGUF


@pytest.mark.parametrize("kind", [Kind.Q4_0, Kind.Q4_1, Kind.Q8_0], ids=lambda kind: kind.name)
@pytest.mark.parametrize("architecture", ["qwen", "qwen2", "llama"])
def test_gguf_tensors_run_as_they_are(tmp_path: Path, tiny: Path, state: State, architecture: str, kind: Kind) -> None:
    if architecture == "llama":
        config, original = LLAMA, untied_state(random_llama())
    else:
        config, original = replace(ModelConfig.from_file(tiny), model_type=architecture), state  # type: ignore[arg-type]
    path = write_gguf(tmp_path / "x.gguf", original, config, kind)
    floats, model = load(path, quantized=False), load(path)
    for name, module in linears(model):
        assert isinstance(module, QuantLinear), name
        reference = floats.get_submodule(name).weight
        assert torch.equal(module.unpack().dequantize(), reference), f"{name} lost something"
    ids = torch.tensor([0, 5, 383])
    assert torch.equal(model.transformer.wte(ids), floats.transformer.wte(ids))
    assert isinstance(model.transformer.wte, QuantEmbedding if kind == Kind.Q8_0 else MappedEmbedding)
    assert_close(model, floats)


def test_mixed_kinds_of_q_k_and_v_become_floats(tmp_path: Path) -> None:
    original = untied_state(random_llama())
    path = tmp_path / "x.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    add_config(writer, LLAMA)
    for name, value in gguf_names(original, LLAMA).items():
        kind = {"blk.0.attn_v.weight": Kind.Q8_0, "blk.1.ffn_up.weight": Kind.Q5_0, "token_embd.weight": Kind.F16}
        add_tensor(writer, name, value, kind.get(name, Kind.Q4_0))
    finish(writer)
    model, report = load_model(Checkpoint.open(path), torch.float32, CPU, quantized=True)
    floats = {name for name, module in model.named_modules() if isinstance(module, FLOATS[0])}
    assert floats == {"transformer.h.0.attn.c_attn", "transformer.h.1.mlp.w1", "lm_head"}
    assert "int4" in report.dtype
    assert_close(model, path)


def test_a_gguf_is_rounded_to_what_was_asked_for(tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "x.gguf", untied_state(random_llama()), LLAMA, Kind.Q8_0)
    out = quantize(path, tmp_path / "q")
    assert load(out).transformer.h[0].mlp.w1.tiles.bits == 4
    # the same without a folder between
    direct, kept = load(path, rounding=Rounding(INT4.fit(LLAMA))), load(out)
    for name, module in linears(direct):
        assert torch.equal(module.unpack().codes, kept.get_submodule(name).unpack().codes), name
    assert torch.equal(direct.transformer.wte(torch.arange(384)), kept.transformer.wte(torch.arange(384)))


# ----------------------------------------------------------------------------------------------------------- rounding


def test_rounding_while_loading_equals_a_written_checkpoint(tmp_path: Path, tiny: Path) -> None:
    out = quantize(tiny, tmp_path / "q")
    model, report = load_model(Checkpoint.open(tiny), torch.float32, CPU, quantized=True, rounding=Rounding(INT4))
    for name, module in linears(model):
        assert torch.equal(module.unpack().dequantize(), load(out).get_submodule(name).unpack().dequantize()), name
    assert report.dtype == "int4"


def test_a_head_of_rows_that_fill_no_word(tmp_path: Path) -> None:
    model = random_llama(vocab_size=390)
    source = published(tmp_path / "f", cut(untied_state(model), model.config), foreign_config(model.config, "llama"))
    out = quantize(source, tmp_path / "q")
    found = Checkpoint.open(out).quant
    assert found == replace(INT4, head_bits=None)
    assert f"{LAYER_K}.qweight" in load_file(out / "model.safetensors")
    assert_close(load(out), out)
    assert load(source, rounding=Rounding(INT4)).lm_head.tiles.rows == 390, "in memory it runs"


def test_a_layer_of_rows_that_fill_no_word_is_named_before_anything_is_written(tmp_path: Path) -> None:
    model = random_llama(num_key_value_heads=1, num_attention_heads=8, head_dim=20, hidden_size=160)
    source = published(
        tmp_path / "f", cut(untied_state(model), model.config), foreign_config(model.config, "llama") | {"head_dim": 20}
    )
    with pytest.raises(CheckpointError, match=r"k_proj\.weight has 20 rows, but the GPTQ layout packs 8 in a word"):
        quantize(source, tmp_path / "q")
    assert [p.name for p in tmp_path.iterdir()] == ["f"], "nothing half-written is left"


# ------------------------------------------------------------------------------------------------------- bad input


def test_a_group_that_cuts_a_layer_is_named_before_anything_is_read(tmp_path: Path, tiny: Path) -> None:
    with pytest.raises(ConfigError, match=r"groups of 128 do not divide the 64 inputs of transformer\.h\.0") as caught:
        quantize(tiny, tmp_path / "q", QuantConfig(group_size=128))
    assert "use group_size=32" in str(caught.value)


@pytest.fixture
def folder(tmp_path: Path, tiny: Path) -> Path:
    return quantize(tiny, tmp_path / "q")


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ({f"{LAYER}.qzeros": None}, f"{LAYER} lacks qzeros"),
        ({f"{LAYER}.qweight": None, f"{LAYER}.g_idx": None}, f"{LAYER} lacks qweight, g_idx"),
        ({f"{LAYER}.qweight": torch.zeros(16, 192, dtype=torch.int32)}, "which is not 4 bits in groups of 32"),
        ({f"{LAYER}.scales": torch.zeros(1, 192).half()}, "which is not 4 bits in groups of 32"),
        ({f"{LAYER}.scales": torch.zeros(2).half()}, "which is not 4 bits in groups of 32"),
        ({f"{LAYER}.qweight": torch.zeros(8, 192)}, "is stored as float32, expected int32"),
        ({f"{LAYER}.g_idx": torch.zeros(64, dtype=torch.int32)}, f"{LAYER}: g_idx does not divide 64 columns"),
        ({f"{LAYER}.scales": torch.full((2, 192), torch.nan).half()}, "not finite in float16"),
        ({f"{LAYER}.scales": torch.full((2, 192), 1e6)}, "not finite in float16"),
        ({"transformer.wte.scales": None}, "no embedding has scales"),
        ({"transformer.wte.scales": torch.ones(383, 2).half()}, r"codes \[384, 64\] and scales \[383, 2\]"),
        ({"transformer.wte.scales": torch.ones(384, 0).half()}, r"codes \[384, 64\] and scales \[384, 0\]"),
        ({"transformer.wte.weight": torch.zeros(384, 64)}, "stored as float32, expected int8"),
        (
            {"transformer.h.7.mlp.w1.scales": torch.ones(2, 160).half()},
            r"unexpected \(1\): transformer.h.7.mlp.w1.scal",
        ),
        ({"transformer.ln_f.weight": None}, r"missing \(1\): transformer.ln_f.weight"),
    ],
)
def test_damaged_tensors_are_named(folder: Path, change: dict[str, torch.Tensor | None], complaint: str) -> None:
    tensors = load_file(folder / "model.safetensors") | change
    save_file({name: t for name, t in tensors.items() if t is not None}, folder / "model.safetensors")
    with pytest.raises(CheckpointError, match=complaint):
        load(folder)
    with pytest.raises(CheckpointError, match=complaint):
        load(folder, quantized=False)


@pytest.mark.parametrize("keep", [0, 100, 5000, -1])
def test_a_truncated_file(folder: Path, keep: int) -> None:
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:keep])
    with pytest.raises(FormatError, match=r"model\.safetensors .* bytes"):
        load(folder)


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ({"bits": 8}, "which is not 8 bits in groups of 32"),
        ({"group_size": 64}, "which is not 4 bits in groups of 64"),
        ({"lm_head": False, "dynamic": None}, "lm_head is quantized, but its quantization_config does not say so"),
        ({"embedding_bits": None}, "transformer.wte has scales, but .* names no embedding_bits"),
    ],
)
def test_a_configuration_of_another_checkpoint(folder: Path, change: dict[str, Any], complaint: str) -> None:
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] |= change
    write_json(folder / "config.json", config)
    with pytest.raises(CheckpointError, match=complaint):
        load(folder)


def test_numbers_that_float16_cant_hold(tmp_path: Path, tiny: Path, state: State, raw_config: dict[str, Any]) -> None:
    source = published(tmp_path / "m", state | {"transformer.ln_f.weight": torch.full((64,), 1e6)}, raw_config)
    with pytest.raises(CheckpointError, match=r"transformer\.ln_f\.weight holds numbers beyond float16"):
        quantize(source, tmp_path / "q")


@pytest.mark.parametrize("case", ["int4_g128_asym", "int4_g128_sym_desc_act", "int4_g64_sym", "int8_g128_sym"])
def test_autogptqs_own_layers_in_a_folder(tmp_path: Path, golden: Path, case: str) -> None:
    tensors = load_file(golden / "gptq_layout.safetensors")
    layer = {f"layer.{leaf}": tensors[f"{case}.{leaf}"] for leaf in ("qweight", "qzeros", "scales", "g_idx")}
    save_file(layer, tmp_path / "model.safetensors")
    file = GPTQFile(
        open_folder(tmp_path), replace(AS_PUBLISHED, bits=int(case[3]), group_size=int(case.split("_")[1][1:]))
    )
    assert list(file.names()) == ["layer.weight"]
    assert file.shape("layer.weight") == (64, 256)
    assert file.stored_dtype("layer.weight") is None
    expected = tensors[f"{case}.dequantized_weight"]
    assert torch.equal(file.read("layer.weight", torch.float32), expected)
    tiles = file.read_tiles([Part("layer.weight", 64)])
    assert tiles is not None
    assert torch.equal(from_tiles(tiles).dequantize(), expected)
