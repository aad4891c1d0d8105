"""Errors weighed by what a short text makes of the inputs: the right sizes, better codes, all alike without a text."""

from __future__ import annotations

import shutil
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import qwenlet
from qwenlet import scoring
from qwenlet.cache import Rows
from qwenlet.checkpoint import Checkpoint, Rounding, load_model, load_quantized, rounding_of, write_random
from qwenlet.checkpoint import importance as weighing
from qwenlet.config import QuantConfig, qwen_1_8b
from qwenlet.errors import CheckpointError
from qwenlet.quant.report import built_in_text

CPU = torch.device("cpu")
INT4 = QuantConfig(group_size=32)


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory, qwen_vocab: Path) -> Path:
    """Two narrow layers below the whole vocabulary; some embeddings' columns are far larger than others."""
    config = replace(
        qwen_1_8b(), hidden_size=64, intermediate_size=96, num_attention_heads=2, num_key_value_heads=2, head_dim=32,
        num_hidden_layers=2, seq_length=128, max_position_embeddings=128, initializer_range=0.15,
    )  # fmt: skip
    path = write_random(tmp_path_factory.mktemp("model") / "tiny", config)
    tensors = load_file(path / "model.safetensors")
    for name in [name for name in tensors if name.endswith(("ln_1.weight", "ln_2.weight", "ln_f.weight"))]:
        tensors[name][::8] *= 12.0
    save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})
    shutil.copy(qwen_vocab, path / "qwen.tiktoken")
    return path


def inputs_of(path: Path) -> dict[str, Tensor]:
    """What every linear reads on the built-in rows, by hooks on the loaded model."""
    model, _ = load_model(Checkpoint.open(path), torch.float32, CPU)
    seen: dict[str, Tensor] = {}

    def saw(name: str, _: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        seen[name] = inputs[0]

    for name, module in model.named_modules():
        if isinstance(module, nn.Linear):
            module.register_forward_pre_hook(partial(saw, name))
    rows = weighing._rows(Checkpoint.open(path))
    with torch.inference_mode():
        model(torch.cat(rows), Rows.fresh([len(ids) for ids in rows], [1.0] * len(rows)))
    return seen


def test_inputs_count_as_their_mean_square(source: Path) -> None:
    found, seen = weighing.importance(Checkpoint.open(source)), inputs_of(source)
    assert found.keys() == seen.keys()
    assert "lm_head" in found
    for name, x in seen.items():
        squares = x.square().mean(0)
        expected = squares / squares.mean() + 1e-3
        assert torch.allclose(found[name], expected, rtol=1e-4), name


def test_outputs_are_nearer_for_it(source: Path) -> None:
    """On the very inputs; where they are all alike there is little to gain, so the gain is asked of each linear that
    reads a norm's output, whose columns differ."""
    seen, checkpoint = inputs_of(source), Checkpoint.open(source)
    floats = dict(load_model(checkpoint, torch.float32, CPU)[0].named_modules())
    weighted, plain = rounding_of(checkpoint, INT4), Rounding(INT4)
    for name in [name for name in seen if name.endswith(("c_attn", "w1", "w2", "lm_head"))]:
        weight, x = floats[name].weight.detach(), seen[name]
        lost = [(x @ (of.linear(name, weight).dequantize() - weight).T).norm() for of in (weighted, plain)]
        assert lost[0] < 0.85 * lost[1], name


def test_the_demo_loses_much_less(demo_gguf: Path) -> None:
    """The text that is measured is another one."""
    with qwenlet.load(str(demo_gguf), device="cpu", dtype="fp32") as reference:
        ids = reference.tokenizer.encode(built_in_text(), allowed_special=set())
        pieces = scoring.windows(ids, 256, 4)
        lost = {}
        for weighted in (True, False):
            quant = QuantConfig(weighted=weighted)
            with qwenlet.load(str(demo_gguf), device="cpu", quant=quant, tile_cache=False) as quantized:
                lost[weighted] = scoring.compare(reference.logits, quantized.logits, pieces).divergence.mean
    assert lost[True] < 0.7 * lost[False]


def test_the_text_is_asked_for_four_bits_alone(source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Path] = []
    monkeypatch.setattr(weighing, "importance", lambda checkpoint, _: asked.append(checkpoint.path) or {})
    checkpoint = Checkpoint.open(source)
    quant = QuantConfig(bits=8, group_size=32, head_bits=8, head_group_size=32)
    for other in (quant, replace(INT4, weighted=False), replace(INT4, mse=False)):
        load_quantized(checkpoint, other, None)
    assert asked == []
    load_quantized(checkpoint, replace(quant, head_bits=4), None)
    assert asked == [source]


def test_what_was_kept_needs_no_text_again(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoint = Checkpoint.open(source)
    load_quantized(checkpoint, INT4, tmp_path)
    monkeypatch.setattr(weighing, "importance", lambda *_: pytest.fail("asked again"))
    assert load_quantized(checkpoint, INT4, tmp_path)[1].kept


def test_without_a_vocabulary_all_inputs_count_alike(source: Path, tmp_path: Path) -> None:
    bare = tmp_path / "bare"
    shutil.copytree(source, bare)
    (bare / "qwen.tiktoken").unlink()
    assert weighing.importance(Checkpoint.open(bare)) == {}


def test_a_vocabulary_larger_than_the_model_is_no_text(tmp_path: Path, qwen_vocab: Path, tiny: Path) -> None:
    folder = tmp_path / "small"
    shutil.copytree(tiny, folder)
    shutil.copy(qwen_vocab, folder / "qwen.tiktoken")
    assert weighing.importance(Checkpoint.open(folder)) == {}


def test_a_bad_weight_is_named_and_not_what_it_spoils(source: Path, tmp_path: Path) -> None:
    folder = tmp_path / "bad"
    shutil.copytree(source, folder)
    tensors = load_file(folder / "model.safetensors")
    tensors["transformer.h.0.mlp.w2.weight"][3, 5] = float("nan")
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    checkpoint = Checkpoint.open(folder)
    assert weighing.importance(checkpoint) == {}
    with pytest.raises(CheckpointError, match="the weight holds NaN"):
        load_quantized(checkpoint, INT4, None)


def test_progress_reaches_the_end_of_the_layers(source: Path) -> None:
    seen: list[tuple[int, int]] = []
    weighing.importance(Checkpoint.open(source), lambda done, total, _: seen.append((done, total)))
    assert len(seen) == 2
    assert 0 < seen[0][0] < seen[1][0] < seen[1][1]
