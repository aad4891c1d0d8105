"""Model -> disk: the published layout from any other, random weights, and nothing half-written."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import stat
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from gguf import GGMLQuantizationType as Kind
from safetensors import SafetensorError
from safetensors.torch import load_file

from checkpoint.variants import (
    LLAMA,
    State,
    cut,
    foreign_config,
    load,
    logits,
    published,
    qwen2_folder,
    random_llama,
    sharded,
    untied_state,
    write_gguf,
    write_json,
)
from qwenlet.checkpoint import Checkpoint, convert, dtype_by_name, new_folder, save, write_random
from qwenlet.config import GenerationDefaults, ModelConfig, qwen_1_8b
from qwenlet.errors import CheckpointError, ConfigError, TokenizerError
from qwenlet.tokenizer import Tokenizer
from qwenlet.tokenizer_formats import QWEN_BASE_SIZE, QWEN_SPECIAL_TOKENS, read_ranks

INDEX = "model.safetensors.index.json"


def digests(folder: Path) -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(folder.iterdir())}


# ------------------------------------------------------------------------------------------------------------ convert


def test_published_to_published_is_the_same_model(tmp_path: Path, tiny: Path, expected: torch.Tensor) -> None:
    out = convert(tiny, tmp_path / "out")
    assert sorted(path.name for path in out.iterdir()) == [
        "config.json", "generation_config.json", "model.safetensors", "tokenizer_config.json"
    ]  # fmt: skip
    assert torch.equal(logits(out), expected)
    assert ModelConfig.from_file(out) == ModelConfig.from_file(tiny)
    before, after = (load_file(folder / "model.safetensors") for folder in (tiny, out))
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert {value.dtype for value in after.values()} == {torch.float16}, "stored as the source stores them"


@pytest.mark.parametrize(("dtype", "flags"), [("bf16", (True, False)), ("fp16", (False, True)), ("fp32", (False,) * 2)])
def test_another_dtype_is_written_and_told(
    tmp_path: Path, tiny: Path, state: State, dtype: str, flags: tuple[bool, bool]
) -> None:
    out = convert(tiny, tmp_path / "out", dtype=dtype)
    for name, value in load_file(out / "model.safetensors").items():
        assert torch.equal(value, state[name].to(dtype_by_name(dtype))), name
    raw = json.loads((out / "config.json").read_text())
    assert (raw["bf16"], raw["fp16"], raw["fp32"]) == (*flags, False)


def test_shards_have_the_published_names_and_an_index(tmp_path: Path, tiny: Path, expected: torch.Tensor) -> None:
    out = convert(tiny, tmp_path / "out", shard_bytes=100_000)
    shards = sorted(out.glob("*.safetensors"))
    count = len(shards)
    assert count > 2
    assert [path.name for path in shards] == [f"model-{i:05d}-of-{count:05d}.safetensors" for i in range(1, count + 1)]
    index = json.loads((out / INDEX).read_text())
    held = {path.name: load_file(path) for path in shards}
    assert index["weight_map"] == {name: file for file, tensors in held.items() for name in tensors}
    assert index["metadata"]["total_size"] == sum(t.nbytes for tensors in held.values() for t in tensors.values())
    assert all(sum(t.nbytes for t in tensors.values()) <= 100_000 for tensors in held.values())
    assert torch.equal(logits(out), expected)


def test_one_tensor_larger_than_a_shard_gets_one_of_its_own(tmp_path: Path, tiny: Path) -> None:
    out = convert(tiny, tmp_path / "out", shard_bytes=1)
    assert len(list(out.glob("*.safetensors"))) == len(load_file(tiny / "model.safetensors"))
    load(out)


def test_from_a_bin_whose_tensors_share_memory(tmp_path: Path, state: State, raw_config: dict[str, Any]) -> None:
    """Saved by code that tied head and embedding; safetensors refuses such a pair."""
    state["lm_head.weight"] = state["transformer.wte.weight"]
    source = tmp_path / "source"
    source.mkdir()
    torch.save(state, source / "pytorch_model.bin")
    write_json(source / "config.json", raw_config)
    out = convert(source, tmp_path / "out")
    assert torch.equal(logits(out), logits(source))
    assert torch.equal(load_file(out / "model.safetensors")["lm_head.weight"], state["transformer.wte.weight"])


def test_from_the_qwen2_layout(tmp_path: Path, tiny: Path, expected: torch.Tensor) -> None:
    source = qwen2_folder(tmp_path / "q2", tiny)
    out = convert(source, tmp_path / "out")
    assert Checkpoint.open(out).layout == "qwen"
    assert torch.equal(logits(out), expected)
    raw = json.loads((out / "config.json").read_text())
    assert (raw["model_type"], raw["use_dynamic_ntk"], raw["use_logn_attn"]) == ("qwen", False, False)


@pytest.mark.parametrize(("kind", "dtype"), [(Kind.F32, torch.float32), (Kind.BF16, torch.bfloat16),
                                             (Kind.Q8_0, torch.float16)])  # fmt: skip
def test_from_gguf(tmp_path: Path, tiny: Path, state: State, kind: Kind, dtype: torch.dtype) -> None:
    source = write_gguf(tmp_path / "x.gguf", state, ModelConfig.from_file(tiny), kind)
    out = convert(source, tmp_path / "out")
    assert {value.dtype for value in load_file(out / "model.safetensors").values()} == {dtype}
    assert torch.equal(logits(out), logits(load(source, dtype).float()))
    assert not (out / "qwen.tiktoken").exists()  # the file has no vocabulary, and is converted all the same
    generation = GenerationDefaults.from_dict(json.loads((out / "generation_config.json").read_text()), "g")
    assert (generation.chat_format, generation.top_p, generation.eos_token_ids) == ("chatml", 0.8, (151643,))


def test_the_vocabulary_of_a_gguf_becomes_qwen_tiktoken(
    tmp_path: Path, tiny: Path, state: State, qwen_vocab: Path
) -> None:
    config = replace(
        ModelConfig.from_file(tiny), vocab_size=QWEN_BASE_SIZE + 208, hidden_size=16, num_attention_heads=1,
        num_key_value_heads=1, num_hidden_layers=1, intermediate_size=8,
    )  # fmt: skip
    write_random(tmp_path / "random", config)
    path = write_gguf(
        tmp_path / "x.gguf", load_file(tmp_path / "random" / "model.safetensors"), config, Kind.F16,
        metadata=vocabulary(qwen_vocab),
    )  # fmt: skip
    out = convert(path, tmp_path / "out")
    assert (out / "qwen.tiktoken").read_bytes() == qwen_vocab.read_bytes()
    text = "The quick brown fox 通义千问 🦊"
    assert Tokenizer.from_folder(out).encode(text) == Tokenizer.from_file(qwen_vocab).encode(text)


def vocabulary(qwen_vocab: Path) -> dict[str, Any]:
    """Qwen's vocabulary as GGUF metadata: GPT-2's spelling of bytes, and one merge for each longer token."""
    plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in plain]
    spelling = {byte: chr(byte) for byte in plain} | {byte: chr(256 + i) for i, byte in enumerate(others)}
    ranks = read_ranks(qwen_vocab)

    def spell(token: bytes) -> str:
        return "".join(spelling[byte] for byte in token)

    def merge(token: bytes) -> str:
        # any cut into two known tokens will do: the reader goes by ids
        at = next(at for at in range(1, len(token)) if token[:at] in ranks and token[at:] in ranks)
        return f"{spell(token[:at])} {spell(token[at:])}"

    return {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "qwen2",
        "tokenizer.ggml.tokens": [*(spell(token) for token in ranks), *QWEN_SPECIAL_TOKENS],
        "tokenizer.ggml.token_type": [1] * len(ranks) + [3] * len(QWEN_SPECIAL_TOKENS),
        "tokenizer.ggml.merges": [merge(token) for token in ranks if len(token) > 1],
    }


def test_a_folders_tokenizer_and_generation_config_come_along(
    tmp_path: Path, state: State, raw_config: dict[str, Any]
) -> None:
    source = published(tmp_path / "source", state, raw_config)
    for name in ("qwen.tiktoken", "qwen_extra.tiktoken", "tokenizer.json", "tokenizer_config.json"):
        (source / name).write_text(f"this is {name}")
    write_json(source / "generation_config.json", {"top_p": 0.3, "something": 1})
    (source / "notes.txt").touch()
    out = convert(source, tmp_path / "out")
    for name in ("qwen.tiktoken", "qwen_extra.tiktoken", "tokenizer.json", "tokenizer_config.json",
                 "generation_config.json"):  # fmt: skip
        assert (out / name).read_bytes() == (source / name).read_bytes()
    assert not (out / "notes.txt").exists()


def test_progress_ends_at_all(tmp_path: Path, tiny: Path) -> None:
    calls: list[tuple[int, int, str]] = []
    convert(tiny, tmp_path / "out", dtype="fp32", progress=lambda *call: calls.append(call))
    assert calls[-1][0] == calls[-1][1] == 4 * ModelConfig.from_file(tiny).parameter_count


# ----------------------------------------------------------------------------------------------------------- refusals


@pytest.mark.parametrize("changes", [{}, {"tie_word_embeddings": False}, {"num_key_value_heads": 4}])
def test_what_the_published_layout_cant_say_is_refused_with_the_reason(tmp_path: Path, changes: dict[str, Any]) -> None:
    model = random_llama(**changes)
    source = published(tmp_path / "l", cut(untied_state(model), model.config), foreign_config(model.config, "llama"))
    with pytest.raises(ConfigError, match="the Qwen-1 layout") as caught:
        convert(source, tmp_path / "out")
    if model.config.num_key_value_heads == 2:
        assert "has 2 for 4" in str(caught.value)
    else:
        assert "qkv_bias=False" in str(caught.value)
    assert [path.name for path in tmp_path.iterdir()] == ["l"]


def test_grouped_heads_of_a_qwen2_gguf_are_refused(tmp_path: Path) -> None:
    config = replace(LLAMA, model_type="qwen2", qkv_bias=True, tie_word_embeddings=False)
    path = write_gguf(tmp_path / "x.gguf", untied_state(random_llama(**vars(config))), config)
    with pytest.raises(ConfigError, match="one key/value head per query head; this model has 2 for 4"):
        convert(path, tmp_path / "out")


def test_a_foreign_vocabulary_is_refused_before_any_weight_is_written(
    tmp_path: Path, tiny: Path, state: State, monkeypatch: pytest.MonkeyPatch
) -> None:
    metadata = vocabulary_of_bytes()
    path = write_gguf(tmp_path / "x.gguf", state, ModelConfig.from_file(tiny), metadata=metadata)
    monkeypatch.setattr(save, "save_file", lambda *_, **__: pytest.fail("weights were written"))
    with pytest.raises(TokenizerError, match="is not Qwen-1's"):
        convert(path, tmp_path / "out")
    assert [entry.name for entry in tmp_path.iterdir()] == ["x.gguf"]


def vocabulary_of_bytes() -> dict[str, Any]:
    plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
    tokens = [*map(chr, plain), *(chr(256 + i) for i in range(256 - len(plain)))]
    return {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "qwen2",
        "tokenizer.ggml.tokens": [*tokens, "!!"],
        "tokenizer.ggml.token_type": [1] * 257,
        "tokenizer.ggml.merges": ["! !"],
    }


def test_other_targets_and_dtypes_are_refused(tmp_path: Path, tiny: Path) -> None:
    with pytest.raises(ConfigError, match="to is 'onnx'"):
        convert(tiny, tmp_path / "out", to="onnx")
    with pytest.raises(ConfigError, match="dtype is 'int4'"):
        convert(tiny, tmp_path / "out", dtype="int4")
    assert not list(tmp_path.iterdir())


def test_an_incomplete_source_is_refused(tmp_path: Path, state: State, raw_config: dict[str, Any]) -> None:
    del state["lm_head.weight"]
    source = sharded(tmp_path / "source", state, raw_config)
    with pytest.raises(CheckpointError, match=r"missing \(1\): lm_head\.weight"):
        convert(source, tmp_path / "out")
    assert not (tmp_path / "out").exists()


# ------------------------------------------------------------------------------------------- nothing lost, nothing half


def outputs(tiny: Path) -> Iterator[tuple[str, Callable[[Path], Path]]]:
    config = ModelConfig.from_file(tiny)
    yield "convert", lambda out: convert(tiny, out, shard_bytes=50_000)
    yield "random", lambda out: write_random(out, config)


def test_a_folder_with_something_in_it_is_left_alone(tmp_path: Path, tiny: Path) -> None:
    for name, write in outputs(tiny):
        for kind in ("full", "file"):
            out = tmp_path / f"{name}-{kind}"
            if kind == "full":
                out.mkdir()
                (out / "thesis.txt").write_text("years of work")
            else:
                out.write_text("years of work")
            with pytest.raises(CheckpointError, match="exists already and is not an empty folder") as caught:
                write(out)
            assert caught.value.hint
            assert (out / "thesis.txt" if kind == "full" else out).read_text() == "years of work"
    assert len(list(tmp_path.iterdir())) == 4


def test_an_empty_folder_and_missing_parents_are_fine(tmp_path: Path, tiny: Path) -> None:
    for name, write in outputs(tiny):
        empty = tmp_path / f"{name}-empty"
        empty.mkdir()
        load(write(empty))
        load(write(tmp_path / name / "a" / "b"))


def test_the_current_folder_can_be_filled(tmp_path: Path, tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    convert(tiny, ".")
    load(tmp_path)


@pytest.mark.parametrize(
    "failure",
    [
        OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)),
        SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)"),
        KeyboardInterrupt(),
    ],
    ids=["OSError", "safetensors' own", "Ctrl-C"],
)
def test_a_failure_in_the_middle_leaves_nothing_behind(
    tmp_path: Path, tiny: Path, monkeypatch: pytest.MonkeyPatch, failure: BaseException
) -> None:
    real = save.save_file

    def full_disk(tensors: State, path: Path, **options: Any) -> None:
        real(dict(list(tensors.items())[:1]), path, **options)
        raise failure

    monkeypatch.setattr(save, "save_file", full_disk)
    for _, write in outputs(tiny):
        if isinstance(failure, Exception):
            with pytest.raises(CheckpointError, match=r"could not be written: .*No space left on device") as caught:
                write(tmp_path / "out")
            assert "free space" in str(caught.value.hint)
        else:
            with pytest.raises(KeyboardInterrupt):
                write(tmp_path / "out")
        assert not list(tmp_path.iterdir())


def test_a_place_that_cant_be_written(tmp_path: Path, tiny: Path) -> None:
    (tmp_path / "file").touch()
    for _, write in outputs(tiny):
        with pytest.raises(CheckpointError, match="could not be written"):
            write(tmp_path / "file" / "out")


@pytest.mark.parametrize("umask", [0o022, 0o027])
def test_files_have_the_permissions_that_the_umask_gives(tmp_path: Path, tiny: Path, umask: int) -> None:
    before = os.umask(umask)
    try:
        for name, write in outputs(tiny):
            out = write(tmp_path / name)
            assert stat.S_IMODE(out.stat().st_mode) == 0o777 & ~umask
            assert {stat.S_IMODE(path.stat().st_mode) for path in out.iterdir()} == {0o666 & ~umask}
    finally:
        os.umask(before)


def test_new_folder_appears_at_the_end(tmp_path: Path) -> None:
    with new_folder(tmp_path / "out") as work:
        (work / "a").touch()
        assert not (tmp_path / "out").exists()
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["a"]
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


# ------------------------------------------------------------------------------------------------------------- random


def test_random_weights_by_seed(tmp_path: Path, tiny: Path) -> None:
    config = ModelConfig.from_file(tiny)
    folders = [write_random(tmp_path / str(i), config, seed=seed) for i, seed in enumerate((7, 7, 8))]
    a, b, c = map(digests, folders)
    assert a == b
    assert {name for name in a if a[name] != c[name]} == {"model.safetensors"}


@pytest.mark.parametrize("dtype", ["bf16", "fp16", "fp32"])
def test_random_weights_are_spread_as_published(tmp_path: Path, tiny: Path, dtype: str) -> None:
    config = ModelConfig.from_file(tiny)
    out = write_random(tmp_path / "out", config, dtype=dtype)
    assert ModelConfig.from_file(out) == config
    assert Checkpoint.open(out).defaults.chat_format == "chatml"
    raw = json.loads((out / "config.json").read_text())
    assert [name for name in ("bf16", "fp16") if raw[name]] == [name for name in ("bf16", "fp16") if name == dtype]
    for name, value in load_file(out / "model.safetensors").items():
        assert value.dtype == dtype_by_name(dtype)
        if "ln_" in name:
            assert (value == 1).all(), name
        elif name.endswith("bias"):
            assert (value == 0).all(), name
        else:
            # 0.02 / sqrt(2 * 3 layers) where a block writes to the residual stream
            std = 0.02 / 6**0.5 if name.endswith("c_proj.weight") else 0.02
            assert float(value.float().std()) == pytest.approx(std, rel=0.1), name
            assert abs(float(value.float().mean())) < std / 10, name
    assert logits(out).isfinite().all()


def test_random_takes_a_vocabulary_along(tmp_path: Path, tiny: Path, qwen_vocab: Path) -> None:
    out = write_random(tmp_path / "out", ModelConfig.from_file(tiny), tokenizer_file=qwen_vocab)
    assert (out / "qwen.tiktoken").read_bytes() == qwen_vocab.read_bytes()
    (tmp_path / "words").write_text("IQ== 0\n")
    for wrong in ("nowhere", "words"):
        with pytest.raises(TokenizerError, match=wrong):
            write_random(tmp_path / "other", ModelConfig.from_file(tiny), tokenizer_file=tmp_path / wrong)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "words"]


def test_random_refuses_what_the_layout_cant_say_before_it_draws(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(save, "save_file", lambda *_, **__: pytest.fail("weights were written"))
    with pytest.raises(ConfigError, match="the Qwen-1 layout"):
        write_random(tmp_path / "out", LLAMA)
    with pytest.raises(ConfigError, match="dtype is 'auto'"):
        write_random(tmp_path / "out", qwen_1_8b(), dtype="auto")
    assert not list(tmp_path.iterdir())
