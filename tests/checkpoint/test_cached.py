"""Quantized models kept in the kernels' order: the same model, made once, and never one that doesn't fit."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from gguf import GGMLQuantizationType as Kind
from safetensors import safe_open
from safetensors.torch import save_file

from checkpoint.variants import CPU, LLAMA, State, logits, published, random_llama, untied_state, write_gguf
from qwenlet.checkpoint import Checkpoint, Rounding, load_model, load_quantized, write_rounded
from qwenlet.checkpoint.tilefile import tile_files
from qwenlet.config import QuantConfig
from qwenlet.linear import QuantEmbedding, QuantLinear, TiledLinear
from qwenlet.model import Qwen
from qwenlet.ops import cpu

INT4 = QuantConfig(group_size=32)
KINDS = {
    "int4": INT4,
    "int8": QuantConfig(bits=8, group_size=32, head_bits=8),
    "asymmetric": replace(INT4, sym=False),
    "float head and embedding": replace(INT4, head_bits=None, embedding_bits=None),
}


def unkept(checkpoint: Checkpoint, quant: QuantConfig | None) -> Qwen:
    rounding = None if quant is None else Rounding(quant)
    return load_model(checkpoint, torch.float32, CPU, quantized=True, rounding=rounding)[0]


def assert_same(one: Qwen, other: Qwen) -> None:
    theirs = dict(other.named_modules())
    for name, module in one.named_modules():
        if isinstance(module, QuantLinear | TiledLinear):
            for field in ("bits", "group_size", "rows"):
                assert getattr(module.tiles, field) == getattr(theirs[name].tiles, field), name
            for field in ("weight", "scales", "zeros", "minimums", "order"):
                ours, their = getattr(module.tiles, field), getattr(theirs[name].tiles, field)
                assert (ours is None) == (their is None), (name, field)
                assert ours is None or torch.equal(ours, their), (name, field)
    assert torch.equal(logits(one), logits(other))


@pytest.mark.parametrize("quant", KINDS.values(), ids=KINDS)
def test_the_kept_model_is_the_same_model(tmp_path: Path, tiny: Path, quant: QuantConfig) -> None:
    checkpoint = Checkpoint.open(tiny)
    first, made = load_quantized(checkpoint, quant, tmp_path)
    second, found = load_quantized(checkpoint, quant, tmp_path)
    assert any("rounded, and kept in" in note for note in made.notes)
    assert found.kept
    assert not any("kept in" in note for note in found.notes)
    assert (found.dtype, found.weight_bytes) == (made.dtype, made.weight_bytes)
    plain = unkept(checkpoint, quant)
    assert_same(first, plain)
    assert_same(second, plain)


@pytest.mark.parametrize("desc_act", [False, True])
def test_a_stored_gptq_checkpoint_is_repacked_once(tmp_path: Path, tiny: Path, desc_act: bool) -> None:
    saved = write_rounded(Checkpoint.open(tiny), tmp_path / "q", INT4)
    if desc_act:  # the first group's columns last
        tensors = {}
        with safe_open(saved / "model.safetensors", "pt") as file:
            for name in file.keys():  # noqa: SIM118, not a dict
                tensors[name] = file.get_tensor(name)
        name = "transformer.h.0.attn.c_attn.g_idx"
        tensors[name] = tensors[name].flip(0).contiguous()
        save_file(tensors, saved / "model.safetensors")
    checkpoint = Checkpoint.open(saved)
    load_quantized(checkpoint, None, tmp_path / "cache")
    model, report = load_quantized(checkpoint, None, tmp_path / "cache")
    assert report.kept
    assert (model.transformer.h[0].attn.c_attn.tiles.order is not None) == desc_act
    assert_same(model, unkept(checkpoint, None))
    assert isinstance(model.transformer.wte, QuantEmbedding)
    (file,) = tile_files(tmp_path / "cache")
    assert "transformer.wte" not in file._modules, "it lies in the checkpoint, mapped"


def test_a_gguf_with_minimums_is_kept_too(tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "m.gguf", untied_state(random_llama()), LLAMA, Kind.Q4_1)
    checkpoint = Checkpoint.open(path)
    load_quantized(checkpoint, None, tmp_path / "cache")
    kept, report = load_quantized(checkpoint, None, tmp_path / "cache")
    assert report.kept
    assert_same(kept, unkept(checkpoint, None))


def test_every_tensor_starts_on_a_line(tmp_path: Path, tiny: Path) -> None:
    """The kernels load whole lines: one that straddles two costs twice."""
    load_quantized(Checkpoint.open(tiny), INT4, tmp_path)
    (file,) = tile_files(tmp_path)
    assert len(file._spans) > 20
    assert all(begin % 64 == 0 for _, _, begin, _ in file._spans.values())


def test_a_source_that_changed_is_read_anew_and_the_old_file_goes(tmp_path: Path, tiny: Path, state: State) -> None:
    source = published(tmp_path / "m", state, json.loads((tiny / "config.json").read_text()))
    cache = tmp_path / "cache"
    load_quantized(Checkpoint.open(source), INT4, cache)
    load_quantized(Checkpoint.open(source), KINDS["int8"], cache)
    before = set(cache.iterdir())
    assert len(before) == 2
    save_file(state | {"transformer.ln_f.weight": torch.zeros(64)}, source / "model.safetensors")
    model, report = load_quantized(Checkpoint.open(source), INT4, cache)
    assert any("kept in" in note for note in report.notes)
    assert not model.transformer.ln_f.weight.any()
    after = set(cache.iterdir())
    assert (len(after), len(after & before)) == (2, 1), "int8's waits for its next load"


def test_a_report_beside_the_weights_is_no_other_source(tmp_path: Path, tiny: Path) -> None:
    saved = write_rounded(Checkpoint.open(tiny), tmp_path / "q", INT4)
    load_quantized(Checkpoint.open(saved), None, tmp_path)
    (saved / "quality_report.json").write_text("{}")
    _, found = load_quantized(Checkpoint.open(saved), None, tmp_path)
    assert found.kept


def test_files_of_sources_that_are_gone_go(tmp_path: Path, tiny: Path, state: State) -> None:
    cache = tmp_path / "cache"
    source = published(tmp_path / "m", state, json.loads((tiny / "config.json").read_text()))
    load_quantized(Checkpoint.open(source), INT4, cache)
    source.rename(tmp_path / "elsewhere")
    load_quantized(Checkpoint.open(tiny), INT4, cache)
    assert [file.about["path"] for file in tile_files(cache)] == [str(tiny.resolve())]


def test_files_in_an_older_format_go(tmp_path: Path, tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as before:
        before.setattr("qwenlet.checkpoint.cached._FORMAT", 0)
        load_quantized(Checkpoint.open(tiny), KINDS["int8"], tmp_path)
    load_quantized(Checkpoint.open(tiny), INT4, tmp_path)
    assert [file.about["quant"]["bits"] for file in tile_files(tmp_path)] == [4]


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-10])


def empty(path: Path) -> None:
    path.write_bytes(b"")


def foreign(path: Path) -> None:
    save_file({"x": torch.zeros(3)}, path)


def wild_index(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-16] + (1 << 40).to_bytes(8, "little") + b"qwtiles1")


def other_shapes(path: Path) -> None:
    """As if two models' files had been exchanged."""
    held = path.read_bytes()
    path.write_bytes(held.replace(b'"rows": 192', b'"rows": 208'))


@pytest.mark.parametrize("damage", [cut, empty, foreign, wild_index, other_shapes])
def test_a_damaged_file_is_made_again(tmp_path: Path, tiny: Path, damage) -> None:  # type: ignore[no-untyped-def]
    checkpoint, cache = Checkpoint.open(tiny), tmp_path / "cache"
    load_quantized(checkpoint, INT4, cache)
    (path,) = cache.iterdir()
    damage(path)
    model, report = load_quantized(checkpoint, INT4, cache)
    assert any("kept in" in note for note in report.notes)
    assert_same(model, unkept(checkpoint, INT4))
    assert load_quantized(checkpoint, INT4, cache)[1].kept


def test_a_cache_that_cant_be_written_costs_the_cache_alone(tmp_path: Path, tiny: Path) -> None:
    blocked = tmp_path / "file"
    blocked.write_text("in the way")
    model, report = load_quantized(Checkpoint.open(tiny), INT4, blocked)
    assert report.warnings[-1].startswith("repacked anew at each start, as the result can't be kept in ")
    assert_same(model, unkept(Checkpoint.open(tiny), INT4))


def test_a_full_disk_leaves_nothing_behind(tmp_path: Path, tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.replace", full)
    _, report = load_quantized(Checkpoint.open(tiny), INT4, tmp_path / "cache")
    assert "No space left on device" in report.warnings[-1]
    assert not list((tmp_path / "cache").iterdir())


@pytest.mark.skipif(cpu.status().isa is None, reason="without kernels floats stay torch's")
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_head_in_half_precision_runs_in_bfloat16_tiles(
    tmp_path: Path, tiny: Path, state: State, dtype: torch.dtype
) -> None:
    """As AutoGPTQ publishes it; what was bfloat16 before comes out of float16 without loss."""
    halved = {name: value.bfloat16().to(dtype) for name, value in state.items()}
    source = published(tmp_path / "m", halved, json.loads((tiny / "config.json").read_text()))
    saved = write_rounded(Checkpoint.open(source), tmp_path / "q", KINDS["float head and embedding"])
    model, report = load_quantized(Checkpoint.open(saved), None, None)
    assert isinstance(model.lm_head, TiledLinear)
    assert "lm_head in bfloat16" in report.notes
    unit = torch.eye(64)
    assert torch.equal(model.lm_head(unit).T, state["lm_head.weight"].bfloat16().float())
