"""Merging: the sum of weights, in every layout; out of codes and into codes; grown and untied vocabularies."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from lora.tiny import random_adapter, stir
from qwenlet.cache import Rows
from qwenlet.checkpoint import Checkpoint, load_model, load_quantized, write_random, write_rounded
from qwenlet.cli import main
from qwenlet.config import LoraConfig, ModelConfig, QuantConfig
from qwenlet.errors import CheckpointError
from qwenlet.lora import Adapter, add_lora, load_adapter, save_adapter
from qwenlet.lora.merge import merge
from qwenlet.model import Qwen

CPU = torch.device("cpu")
INT4 = QuantConfig(group_size=32)
CONFIG = ModelConfig(
    model_type="qwen", vocab_size=320, hidden_size=64, num_hidden_layers=2, num_attention_heads=2,
    num_key_value_heads=2, head_dim=32, intermediate_size=96, max_position_embeddings=2048, seq_length=2048,
)  # fmt: skip
IDS = torch.arange(40)


def load(path: Path) -> Qwen:
    return load_model(Checkpoint.open(path), torch.float32, CPU)[0]


def logits(model: Qwen) -> torch.Tensor:
    with torch.no_grad():
        return model(IDS, Rows.fresh([len(IDS)], [1.0]))


def with_adapter(path: Path, adapter: Path) -> torch.Tensor:
    model = load(path)
    load_adapter(model, adapter)
    return logits(model)


@pytest.fixture
def base(tmp_path: Path) -> Path:
    return write_random(tmp_path / "base", CONFIG, dtype="fp32")


def adapter_of(base: Path, out: Path, config: LoraConfig | None = None, vocab_size: int | None = None) -> Path:
    model = load(base)
    if vocab_size is not None:
        model.resize_vocabulary(vocab_size)
    add_lora(model, config or LoraConfig(rank=4))
    stir(model)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.requires_grad and "lora" not in name:
                parameter += torch.randn_like(parameter) * 0.02
    return save_adapter(model, out)


@pytest.mark.parametrize("to", ["own", "qwen2", "gguf"])
def test_the_merged_model_is_the_adapted_one(to: str, base: Path, tmp_path: Path) -> None:
    adapter = adapter_of(base, tmp_path / "adapter")
    out = merge(base, adapter, tmp_path / ("out.gguf" if to == "gguf" else "out"), to=to, dtype="fp32")
    assert torch.allclose(logits(load(out)), with_adapter(base, adapter), atol=1e-5)
    assert not torch.allclose(logits(load(out)), logits(load(base)), atol=1e-2)


def test_dora_is_merged_whole(base: Path, tmp_path: Path) -> None:
    adapter = adapter_of(base, tmp_path / "adapter", LoraConfig(rank=4, dora=True))
    out = merge(base, adapter, tmp_path / "out")
    assert torch.allclose(logits(load(out)), with_adapter(base, adapter), atol=1e-5)


def test_a_grown_vocabulary_comes_along_and_converts(base: Path, tmp_path: Path) -> None:
    config = LoraConfig(rank=4, modules_to_save=("wte", "lm_head"))
    adapter = adapter_of(base, tmp_path / "adapter", config, vocab_size=350)
    out = merge(base, adapter, tmp_path / "out")
    assert Checkpoint.open(out).config.vocab_size == 350
    expected = with_adapter(base, adapter)
    assert expected.shape == (40, 350)
    assert torch.allclose(logits(load(out)), expected, atol=1e-5)
    assert main(["convert", str(out), str(tmp_path / "qwen2"), "--to", "qwen2"]) == 0
    assert torch.equal(logits(load(tmp_path / "qwen2")), logits(load(out)))


def test_a_tied_pair_stays_one_or_parts(tmp_path: Path) -> None:
    tied = replace(CONFIG, model_type="qwen2", tie_word_embeddings=True)
    source = merge_source(tied, tmp_path / "tied")
    kept = merge(
        source, adapter_of(source, tmp_path / "a", LoraConfig(rank=4, modules_to_save=("wte",))), tmp_path / "o"
    )
    assert Checkpoint.open(kept).config.tie_word_embeddings
    adapter = adapter_of(source, tmp_path / "b", LoraConfig(rank=4, targets=("lm_head", "w1")))
    parted = merge(source, adapter, tmp_path / "parted")
    assert not Checkpoint.open(parted).config.tie_word_embeddings
    assert torch.allclose(logits(load(parted)), with_adapter(source, adapter), atol=1e-5)


def merge_source(config: ModelConfig, out: Path) -> Path:
    """A random Qwen2 checkpoint in its own layout."""
    from qwenlet.checkpoint.names import split
    from qwenlet.checkpoint.save import ShardWriter, new_folder, write_json

    torch.manual_seed(0)
    model = Qwen(config)
    with new_folder(out) as folder:
        write_json(folder / "config.json", config.to_own_layout())
        writer = ShardWriter(folder)
        for name, parameter in model.named_parameters():
            tensor = torch.randn(parameter.shape) * 0.1 + (1.0 if "ln_" in name else 0.0)
            for theirs, part in split(name, tensor, "qwen2", config):
                writer.add(theirs, part)
        writer.close()
    return out


# ---------------------------------------------------------------------------------------------------- codes


def quantized_logits(path: Path, quant: QuantConfig | None, adapter: Path | None) -> torch.Tensor:
    """By the kernels, as Q-LoRA trains."""
    checkpoint = Checkpoint.open(path)
    model, _ = load_quantized(checkpoint, None if quant is None else quant.fit(checkpoint.config), None)
    if adapter is not None:
        load_adapter(model, adapter)
    return logits(model)


def test_out_of_rounded_weights(base: Path, tmp_path: Path) -> None:
    """The merged floats stand nearer to what was trained than the floats it was rounded from do."""
    adapter = adapter_of(base, tmp_path / "adapter")
    trained = quantized_logits(base, INT4, adapter)
    faithful = logits(load(merge(base, adapter, tmp_path / "faithful", beside=INT4)))
    plain = logits(load(merge(base, adapter, tmp_path / "plain")))
    assert (faithful - trained).abs().mean() < 0.5 * (plain - trained).abs().mean()


def test_out_of_a_quantized_checkpoint_is_the_same(base: Path, tmp_path: Path) -> None:
    adapter = adapter_of(base, tmp_path / "adapter")
    int4 = write_rounded(Checkpoint.open(base), tmp_path / "int4", INT4)
    found = logits(load(merge(int4, adapter, tmp_path / "a", dtype="fp32")))
    expected = logits(load(merge(base, adapter, tmp_path / "b", beside=INT4)))
    assert torch.allclose(found, expected, atol=2e-3)  # what is no code is float16 there


def test_and_into_codes_again(base: Path, tmp_path: Path) -> None:
    adapter = adapter_of(base, tmp_path / "adapter")
    out = merge(base, adapter, tmp_path / "out", quant=INT4)
    assert Checkpoint.open(out).quant is not None
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []
    expected = with_adapter(base, adapter)
    assert (quantized_logits(out, None, None) - expected).std() < 0.3 * expected.std()


def test_a_full_disk_leaves_nothing(base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    adapter = adapter_of(base, tmp_path / "adapter")

    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("qwenlet.checkpoint.save.save_file", full)
    with pytest.raises(CheckpointError, match="could not be written"):
        merge(base, adapter, tmp_path / "out", quant=INT4)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["adapter", "base"]


# ------------------------------------------------------------------------------------------------ command line


def test_the_verb_says_the_difference(
    golden: Path, tmp_path: Path, qwen_vocab: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    base = tmp_path / "base"
    write_random(base, replace(CONFIG, vocab_size=151_936), dtype="fp32", tokenizer_file=qwen_vocab)
    adapter = adapter_of(base, tmp_path / "adapter")
    assert main(["merge", str(base), str(adapter), str(tmp_path / "out")]) == 0
    said = capsys.readouterr()
    assert said.out.strip() == str(tmp_path / "out")
    lines = [line for line in said.err.splitlines() if "perplexity" in line]
    assert [line.split("  ")[1] for line in lines] == ["the model", "adapter beside it", "merged"]
    beside, merged = (float(line.split("±")[0].split()[-1]) for line in lines[1:])
    assert merged == pytest.approx(beside, rel=1e-3)
    assert (tmp_path / "out" / "qwen.tiktoken").exists()


def test_the_verb_refuses_what_does_not_fit(base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    other = write_random(tmp_path / "other", replace(CONFIG, hidden_size=128, num_attention_heads=4,
                                                     num_key_value_heads=4), dtype="fp32")  # fmt: skip
    adapter = adapter_of(base, tmp_path / "adapter")
    assert main(["merge", str(other), str(adapter), str(tmp_path / "out")]) == 1
    assert "does not fit the model" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_the_sum_is_exact_in_the_file(base: Path, tmp_path: Path) -> None:
    adapter = adapter_of(base, tmp_path / "adapter")
    out = merge(base, adapter, tmp_path / "out")
    before, after = load_file(base / "model.safetensors"), load_file(out / "model.safetensors")
    read = Adapter.read(adapter, CONFIG)
    assert set(before) == set(after)
    for name, tensor in after.items():
        factors = read.factors.get(name.removesuffix(".weight"))
        assert torch.equal(tensor, before[name] if factors is None else factors.added_to(before[name])), name
    shutil.rmtree(out)
    assert random_adapter(load(base), 0).factors.keys() == {*read.factors, "lm_head"}
