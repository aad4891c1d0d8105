"""Disk -> model: each layout gives the same logits, files stay mapped, memory stays bounded, a misfit is one report."""

from __future__ import annotations

import json
import resource
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType as Kind
from gguf.quants import dequantize, quantize
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

from checkpoint.variants import (
    CPU,
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
from qwenlet.checkpoint import DEFAULT_SYSTEM, Checkpoint, auto_dtype, dtype_by_name, files, load_model, write_random
from qwenlet.config import GenerationDefaults, ModelConfig
from qwenlet.errors import CheckpointError, ConfigError, FormatError
from qwenlet.gguf_header import read_header
from qwenlet.linear import PrepackedLinear, StreamedLinear, choose_linear, prepack_works
from qwenlet.ops import cpu

needs_kernels = pytest.mark.skipif(not cpu.available(), reason="the package was built without a compiler")
# what float32 runs on here
TILED = choose_linear("auto", torch.device("cpu"), torch.float32)[0] or torch.nn.Linear
needs_prepack = pytest.mark.skipif(not prepack_works()[0], reason=f"no prepacking here: {prepack_works()[1]}")
needs_proc = pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads Linux's /proc")


# ------------------------------------------------------------------------------------------------------------ layouts


def test_the_qwen2_layout_gives_the_same_logits(tmp_path: Path, tiny: Path, expected: torch.Tensor) -> None:
    folder = qwen2_folder(tmp_path / "q2", tiny)
    assert Checkpoint.open(folder).layout == "qwen2"
    assert torch.equal(logits(folder), expected)
    config = json.loads((folder / "config.json").read_text())
    split = sharded(tmp_path / "q2s", load_file(folder / "model.safetensors"), config, pickled=True)
    assert torch.equal(logits(split), expected)


def test_the_llama_layout_with_grouped_heads_and_a_tied_head(tmp_path: Path) -> None:
    model = random_llama()
    state = cut(untied_state(model), LLAMA)
    folder = published(tmp_path / "l", state, foreign_config(LLAMA, "llama"))
    loaded = load(folder)
    assert loaded.lm_head.weight is loaded.transformer.wte.weight
    assert torch.equal(logits(loaded), logits(model))


def test_a_head_beside_a_tied_embedding_is_ignored_with_a_note(tmp_path: Path) -> None:
    model = random_llama()
    state = cut(untied_state(model), LLAMA) | {"lm_head.weight": torch.zeros(384, 64)}
    folder = published(tmp_path / "l", state, foreign_config(LLAMA, "llama"))
    loaded, report = load_model(Checkpoint.open(folder), torch.float32, CPU)
    assert torch.equal(logits(loaded), logits(model))
    assert "lm_head.weight ignored: the config ties it to the embedding" in str(report)


def test_an_untied_llama(tmp_path: Path) -> None:
    model = random_llama(tie_word_embeddings=False)
    folder = published(tmp_path / "l", cut(untied_state(model), model.config), foreign_config(model.config, "llama"))
    assert torch.equal(logits(folder), logits(model))


@pytest.mark.parametrize("kind", [Kind.F32, Kind.F16, Kind.BF16, Kind.Q8_0], ids=lambda kind: kind.name)
@pytest.mark.parametrize("architecture", ["qwen", "qwen2", "llama"])
def test_gguf_files_hold_the_same_model(
    tmp_path: Path, tiny: Path, state: State, architecture: str, kind: Kind, expected: torch.Tensor
) -> None:
    if architecture == "llama":
        model = random_llama()
        config, original = model.config, untied_state(model)
        expected = logits(model)
    else:
        config, original = replace(ModelConfig.from_file(tiny), model_type=architecture), state  # type: ignore[arg-type]
    path = write_gguf(tmp_path / "x.gguf", original, config, kind)
    loaded = load(path)
    assert loaded.config.tie_word_embeddings == (architecture == "llama")
    if kind == Kind.F32:
        assert torch.equal(logits(loaded), expected)
        return
    # the stored numbers are rounded; the model of the same rounded numbers must agree exactly
    rounded = {name: round_trip(value, kind) if value.ndim == 2 else value for name, value in original.items()}
    assert torch.equal(logits(loaded), logits(write_gguf(tmp_path / "rounded.gguf", rounded, config)))
    assert (logits(loaded) - expected).abs().max() < 0.05 * expected.abs().max()


def round_trip(value: torch.Tensor, kind: Kind) -> torch.Tensor:
    if kind == Kind.F16:
        return value.half().float()
    return torch.from_numpy(dequantize(quantize(value.numpy(), kind), kind).copy())


def test_a_qwen_gguf_is_read_as_the_published_model(tmp_path: Path, tiny: Path, state: State) -> None:
    """NTK, log-n and the chat defaults are not in the file: the architecture stands for them."""
    original = ModelConfig.from_file(tiny)
    checkpoint = Checkpoint.open(write_gguf(tmp_path / "x.gguf", state, original))
    assert replace(checkpoint.config, eos_token_ids=original.eos_token_ids) == original
    assert checkpoint.config.use_dynamic_ntk
    assert checkpoint.config.use_logn_attn
    assert checkpoint.defaults.chat_format == "chatml"
    assert checkpoint.defaults.eos_token_ids == (151643,)
    assert checkpoint.default_system == DEFAULT_SYSTEM


def test_a_chat_template_brings_its_system_message(tmp_path: Path) -> None:
    template = "{% if x %}{{ '<|im_start|>system\nYou are a helper.<|im_end|>\n' }}{% endif %}<|im_start|>"
    state = untied_state(random_llama())
    path = write_gguf(tmp_path / "x.gguf", state, LLAMA, metadata={"tokenizer.chat_template": template})
    checkpoint = Checkpoint.open(path)
    assert checkpoint.default_system == "You are a helper."
    assert checkpoint.defaults.chat_format == "chatml"
    plain = Checkpoint.open(write_gguf(tmp_path / "y.gguf", state, LLAMA))
    assert plain.defaults.chat_format is None


def test_a_folder_with_one_gguf_file_is_that_file(tmp_path: Path, tiny: Path, state: State) -> None:
    path = write_gguf(tmp_path / "x.gguf", state, ModelConfig.from_file(tiny))
    assert Checkpoint.open(tmp_path).path == path


def test_generation_config_is_read_and_its_absence_is_fine(
    tmp_path: Path, state: State, raw_config: dict[str, Any]
) -> None:
    folder = published(tmp_path / "m", state, raw_config)
    assert Checkpoint.open(folder).defaults == GenerationDefaults()
    write_json(folder / "generation_config.json", {"top_p": 0.5, "chat_format": "chatml"})
    assert Checkpoint.open(folder).defaults.top_p == 0.5


def test_buffers_of_older_code_are_not_unexpected(
    tmp_path: Path, state: State, raw_config: dict[str, Any], expected: torch.Tensor
) -> None:
    extra = {"transformer.rotary_emb.inv_freq": torch.ones(8), "transformer.h.0.attn.bias": torch.ones(4).bool()}
    assert torch.equal(logits(published(tmp_path / "m", state | extra, raw_config)), expected)


# ------------------------------------------------------------------------------------------------------------- dtypes


@pytest.mark.parametrize("stored", ["bf16", "fp16", "fp32"])
@pytest.mark.parametrize("wanted", ["bf16", "fp16", "fp32"])
def test_dtypes_by_name(tmp_path: Path, state: State, raw_config: dict[str, Any], stored: str, wanted: str) -> None:
    original = {name: value.to(dtype_by_name(stored)) for name, value in state.items()}
    checkpoint = Checkpoint.open(published(tmp_path / "m", original, raw_config))
    model, report = load_model(checkpoint, dtype_by_name(wanted), CPU)
    parameters = dict(model.named_parameters())
    assert parameters.keys() == state.keys()
    for name, value in original.items():
        assert torch.equal(parameters[name], value.to(dtype_by_name(wanted))), name
        assert not parameters[name].requires_grad
    assert not model.training
    assert report.parameters == model.config.parameter_count == sum(value.numel() for value in state.values())
    assert report.weight_bytes == report.parameters * dtype_by_name(wanted).itemsize


@pytest.mark.parametrize(("alias", "name"), [("bfloat16", "bf16"), ("half", "fp16"), ("float16", "fp16"),
                                             ("float32", "fp32"), ("float", "fp32")])  # fmt: skip
def test_long_names_of_dtypes(alias: str, name: str) -> None:
    assert dtype_by_name(alias) == dtype_by_name(name)


def test_a_dtype_we_dont_know() -> None:
    with pytest.raises(ConfigError, match="dtype is 'int8', expected 'auto' or one of bf16, fp16, fp32"):
        dtype_by_name("int8")


@pytest.mark.parametrize(
    ("avx512", "amx", "dtype"),
    [
        (True, False, torch.bfloat16),
        (False, True, torch.bfloat16),
        (False, False, torch.float32),
        (None, None, torch.float32),  # a torch that can't tell
    ],
)
@pytest.mark.parametrize("gpu", [False, True])
def test_auto_on_a_cpu_asks_the_cpu_alone(
    monkeypatch: pytest.MonkeyPatch, avx512: bool | None, amx: bool | None, dtype: torch.dtype, gpu: bool
) -> None:
    """With a GPU in the machine and the model on the CPU, the CPU decides."""

    def no_question(*_: object, **__: object) -> None:
        raise AssertionError("the GPU was asked")

    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpu)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", no_question)
    monkeypatch.setattr(torch.cuda, "get_device_capability", no_question)
    for name, answer in (("_is_avx512_bf16_supported", avx512), ("_is_amx_tile_supported", amx)):
        if answer is None:
            monkeypatch.delattr(torch.cpu, name, raising=False)
        else:
            monkeypatch.setattr(torch.cpu, name, lambda answer=answer: answer, raising=False)
    found, reason = auto_dtype(CPU)
    assert found == dtype
    assert "processor" in reason


@pytest.mark.parametrize(
    ("capability", "dtype"),
    [((6, 1), torch.float32), ((7, 0), torch.float16), ((7, 5), torch.float16), ((8, 0), torch.bfloat16),
     ((9, 0), torch.bfloat16)],
)  # fmt: skip
def test_auto_on_a_gpu_asks_that_gpu(
    monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int], dtype: torch.dtype
) -> None:
    """Two different GPUs in one machine: the one the model will live on decides, not the current one."""
    capabilities = {torch.device("cuda:0"): (6, 0), torch.device("cuda:1"): capability}
    monkeypatch.setattr(torch.cuda, "get_device_capability", capabilities.__getitem__)
    monkeypatch.setattr(torch.version, "hip", None)
    assert auto_dtype(torch.device("cuda:1"))[0] == dtype


def test_auto_elsewhere_is_float32() -> None:
    assert auto_dtype(torch.device("meta")) == (torch.float32, "nothing is known of meta")


# --------------------------------------------------------------------------------------------------------- prepacking


@needs_prepack
@pytest.mark.parametrize("layout", ["published", "qwen2", "gguf", "tied"])
def test_prepacked_models_give_the_same_logits(tmp_path: Path, tiny: Path, state: State, layout: str) -> None:
    match layout:
        case "published":
            path = tiny
        case "qwen2":
            path = qwen2_folder(tmp_path / "m", tiny)
        case "gguf":
            path = write_gguf(tmp_path / "x.gguf", state, ModelConfig.from_file(tiny))
        case _:
            path = published(tmp_path / "m", cut(untied_state(random_llama()), LLAMA), foreign_config(LLAMA, "llama"))
    plain = load(path, torch.bfloat16)
    packed, report = load_model(Checkpoint.open(path), torch.bfloat16, CPU, linear="prepacked")
    assert isinstance(packed.lm_head, PrepackedLinear)
    assert report.swapped == 5 * packed.config.num_hidden_layers + 1
    assert f"{report.swapped} linears by PrepackedLinear" in str(report)
    assert torch.equal(packed.lm_head.unpack(), plain.lm_head.weight)
    expected, found = logits(plain), logits(packed)
    assert (found - expected).abs().max() <= 0.02 * expected.abs().max()


@needs_kernels
def test_streamed_models_give_the_same_logits(tiny: Path) -> None:
    plain = load(tiny, torch.bfloat16)
    streamed, report = load_model(Checkpoint.open(tiny), torch.bfloat16, CPU, linear="streamed")
    assert isinstance(streamed.lm_head, StreamedLinear)
    assert report.swapped == 5 * streamed.config.num_hidden_layers + 1
    expected, found = logits(plain), logits(streamed)
    assert (found - expected).abs().max() <= 0.02 * expected.abs().max()


@needs_kernels
def test_linears_that_tiles_do_not_suit_are_named_with_what_runs_them(tmp_path: Path) -> None:
    model = random_llama(intermediate_size=88)  # the inputs of each layer's last linear
    path = published(tmp_path / "m", cut(untied_state(model), model.config), foreign_config(model.config, "llama"))
    found, report = load_model(Checkpoint.open(path), torch.bfloat16, CPU, linear="tiled")
    assert isinstance(found.transformer.h[0].mlp.c_proj, StreamedLinear)
    assert "11 linears by TiledLinear and StreamedLinear" in str(report)
    assert report.warnings == [
        "transformer.h.0.mlp.c_proj, transformer.h.1.mlp.c_proj by StreamedLinear, more slowly: their inputs are no "
        "multiple of 16"
    ]
    _, even = load_model(Checkpoint.open(path), torch.float32, CPU, linear="tiled")
    assert (even.linear, even.warnings) == ("TiledLinear", []), "in float32 any number will do"


@pytest.mark.parametrize(("dtype", "kind"), [(torch.float32, TILED), (torch.float16, torch.nn.Linear)])
def test_float32_runs_in_tiles_and_float16_on_torch(tiny: Path, dtype: torch.dtype, kind: type) -> None:
    model, report = load_model(Checkpoint.open(tiny), dtype, CPU, linear="auto")
    assert report.swapped == (0 if kind is torch.nn.Linear else 5 * model.config.num_hidden_layers + 1)
    assert isinstance(model.lm_head, kind)
    for linear in ("streamed", "prepacked"):
        with pytest.raises(ConfigError, match=linear):
            load_model(Checkpoint.open(tiny), dtype, CPU, linear=linear)


def test_progress_counts_bytes_up_to_all(tmp_path: Path, tiny: Path) -> None:
    for path in (tiny, qwen2_folder(tmp_path / "m", tiny)):
        calls: list[tuple[int, int, str]] = []
        load(path, torch.float16, progress=lambda *call, calls=calls: calls.append(call))
        done = [call[0] for call in calls]
        assert done == sorted(done)
        assert done[-1] == calls[0][1] == 2 * ModelConfig.from_file(tiny).parameter_count
        assert len({call[2] for call in calls}) == len(calls)


# ------------------------------------------------------------------------------------------------------------- memory


@needs_proc
@pytest.mark.parametrize("pickled", [False, True])
def test_weights_of_the_right_dtype_stay_in_their_file(
    tmp_path: Path, state: State, raw_config: dict[str, Any], pickled: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(files, "_COPY_BELOW", 0)  # all tensors of the tiny model are small
    folder = sharded(tmp_path / "m", state, raw_config, pickled=pickled)
    model = load(folder, torch.float16)  # as they are stored
    mapped = []
    for line in Path("/proc/self/maps").read_text().splitlines():
        span, *_, name = line.split(maxsplit=5)
        if str(folder) in name:
            mapped.append(tuple(int(end, 16) for end in span.split("-")))
    assert mapped
    for name, parameter in model.named_parameters():
        assert any(low <= parameter.data_ptr() < high for low, high in mapped), name


MEGABYTE = 1 << 20
BIG = ModelConfig(
    model_type="qwen", vocab_size=48_000, hidden_size=1024, num_hidden_layers=8, num_attention_heads=8,
    num_key_value_heads=8, head_dim=128, intermediate_size=2816, max_position_embeddings=64, seq_length=64,
    use_dynamic_ntk=True, use_logn_attn=True,
)  # fmt: skip
LARGEST_TENSOR = BIG.vocab_size * BIG.hidden_size

CASES = [  # what stays mapped comes first, before the process keeps memory that it freed
    ("safetensors", "bf16", "torch"),
    ("bin", "bf16", "torch"),
    ("safetensors", "fp16", "torch"),
    pytest.param("safetensors", "bf16", "prepacked", marks=needs_prepack),
    ("bin", "fp16", "torch"),
    pytest.param("bin", "bf16", "prepacked", marks=needs_prepack),
    pytest.param("safetensors", "bf16", "streamed", marks=needs_kernels),
    pytest.param("bin", "bf16", "streamed", marks=needs_kernels),
    ("model.gguf", "bf16", "torch"),
]

MEASURE = """
import json, sys, torch
torch.set_num_threads(1)
from qwenlet.checkpoint import Checkpoint, dtype_by_name, load_model

def memory(name):
    return int(dict(line.split(":") for line in open("/proc/self/status"))[name].split()[0]) * 1024

start = memory("VmRSS"), memory("RssAnon")
for line in sys.stdin:
    folder, source, dtype, linear = json.loads(line)
    checkpoint = Checkpoint.open(f"{folder}/{source}")
    model = report = None
    with open("/proc/self/clear_refs", "w") as file:
        file.write("5")  # the high-water mark starts anew
    model, report = load_model(checkpoint, dtype_by_name(dtype), torch.device("cpu"), linear=linear)
    assert (report.swapped > 0) == (linear != "torch"), report
    print(json.dumps([memory("VmHWM") - start[0], memory("RssAnon") - start[1]]), flush=True)
"""


@pytest.fixture(scope="module")
def big(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """400 MB of random weights in three kinds of files."""
    folder = tmp_path_factory.mktemp("big")
    write_random(folder / "safetensors", BIG, dtype="bf16")
    state = load_file(folder / "safetensors" / "model.safetensors")
    (folder / "bin").mkdir()
    torch.save(state, folder / "bin" / "pytorch_model.bin")
    shutil.copyfile(folder / "safetensors" / "config.json", folder / "bin" / "config.json")
    write_gguf(folder / "model.gguf", state, BIG, Kind.F16)
    yield folder
    shutil.rmtree(folder)


@pytest.fixture(scope="module")
def measure() -> Iterator[Callable[..., list[int]]]:
    """Bytes by which loading raised a process's peak, and by which its own memory grew."""
    with subprocess.Popen([sys.executable, "-c", MEASURE], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdin is not None
        assert process.stdout is not None

        def measure(*case: object) -> list[int]:
            process.stdin.write(json.dumps([str(case[0]), *case[1:]]).encode() + b"\n")
            process.stdin.flush()
            return json.loads(process.stdout.readline() or "[]")

        yield measure
        process.stdin.close()


@needs_proc
@pytest.mark.parametrize(("source", "dtype", "linear"), CASES)
def test_memory_stays_within_the_weights_the_largest_tensor_and_300_mb(
    big: Path, measure: Callable[..., list[int]], source: str, dtype: str, linear: str
) -> None:
    """Of the 300 MB the interpreter and a CPU build of torch take some 225, so loading may take 75."""
    peak, anonymous = measure(big, source, dtype, linear)
    weights, largest = 2 * BIG.parameter_count, 2 * LARGEST_TENSOR
    print(f"peak +{peak / MEGABYTE:.0f} MB, anonymous +{anonymous / MEGABYTE:.0f} MB of {weights / MEGABYTE:.0f} MB")
    assert 350 * MEGABYTE < weights < 450 * MEGABYTE
    assert peak <= weights + largest + 75 * MEGABYTE
    if (dtype, linear) == ("bf16", "torch") and source != "model.gguf":
        assert anonymous <= 50 * MEGABYTE, "the weights were copied"


# ------------------------------------------------------------------------------------------------------------- misfits


def test_one_report_of_missing_unexpected_and_wrong(tmp_path: Path, state: State, raw_config: dict[str, Any]) -> None:
    del state["transformer.h.1.ln_1.weight"]
    state["transformer.h.9.ln_1.weight"] = torch.ones(64)
    state["lm_head.weight"] = torch.ones(384, 65)
    folder = published(tmp_path / "m", state, raw_config)
    with pytest.raises(CheckpointError) as caught:
        load(folder)
    message = str(caught.value)
    assert str(folder) in message
    assert "missing (1): transformer.h.1.ln_1.weight" in message
    assert "unexpected (1): transformer.h.9.ln_1.weight" in message
    assert "wrong shape (1): lm_head.weight is [384, 65], expected [384, 64]" in message
    assert "hint:" in message


def test_a_long_report_is_cut(tmp_path: Path, state: State, raw_config: dict[str, Any]) -> None:
    folder = published(tmp_path / "m", {"transformer.wte.weight": state["transformer.wte.weight"]} | {
        f"x{number}": torch.ones(1) for number in range(9)
    }, raw_config)  # fmt: skip
    with pytest.raises(CheckpointError, match=r"unexpected \(9\): x0, x1, x2, x3, x4, x5, \.\.\. and 3 more"):
        load(folder)


def test_foreign_names_are_a_misfit_too(tmp_path: Path, tiny: Path, raw_config: dict[str, Any]) -> None:
    folder = qwen2_folder(tmp_path / "m", tiny)
    write_json(folder / "config.json", raw_config)
    with pytest.raises(CheckpointError, match=r"missing .*transformer.*\n.*unexpected .*model\."):
        load(folder)


@pytest.mark.parametrize("name", ["qweight", "qzeros", "weight_scale_inv", "weight.absmax"])
def test_quantized_weights_are_called_by_their_name(
    tmp_path: Path, state: State, raw_config: dict[str, Any], name: str
) -> None:
    state[f"transformer.h.0.mlp.w1.{name}"] = torch.ones(4, dtype=torch.int32)
    with pytest.raises(CheckpointError) as caught:
        load(published(tmp_path / "m", state, raw_config))
    assert "quantized weights" in str(caught.value.hint)


def test_another_quantization_is_refused_before_the_weights(tmp_path: Path, raw_config: dict[str, Any]) -> None:
    write_json(tmp_path / "config.json", raw_config | {"quantization_config": {"quant_method": "awq", "bits": 4}})
    with pytest.raises(ConfigError, match=r"quantized by 'awq', but only 'gptq' is read"):
        Checkpoint.open(tmp_path)


def test_a_config_of_a_billion_layers_is_refused_at_once(tmp_path: Path, state: State, raw_config: dict[str, Any]):
    for change in ({"num_hidden_layers": 10**9}, {"vocab_size": 1 << 62}, {"hidden_size": 1 << 40}):
        folder = published(tmp_path / "m", state, raw_config | change)
        with pytest.raises(CheckpointError, match="does not fit its configuration"):
            load(folder)


def test_what_is_not_there_or_not_a_model(tmp_path: Path, raw_config: dict[str, Any]) -> None:
    with pytest.raises(CheckpointError, match="does not exist") as caught:
        Checkpoint.open(tmp_path / "nothing")
    assert "hub id" in str(caught.value.hint)
    with pytest.raises(CheckpointError, match=rf"{tmp_path} has no config\.json; found neither"):
        Checkpoint.open(tmp_path)
    (tmp_path / "notes.txt").write_text("hello")
    with pytest.raises(FormatError, match=r"notes\.txt is not a GGUF file: it starts with b'hell'") as caught:
        Checkpoint.open(tmp_path / "notes.txt")
    assert "folder that holds config.json" in str(caught.value.hint)
    write_json(tmp_path / "config.json", raw_config)
    with pytest.raises(CheckpointError, match=r"has no weights.* found config\.json, notes\.txt"):
        load(tmp_path)


@pytest.mark.parametrize("text", ["", "{", '"qwen"', "\ufeff{}"])
def test_a_broken_config(tmp_path: Path, text: str) -> None:
    (tmp_path / "config.json").write_text(text, encoding="utf-8")
    with pytest.raises(ConfigError, match=r"config\.json"):
        Checkpoint.open(tmp_path)


def test_a_gguf_of_another_architecture_is_named(tmp_path: Path, state: State) -> None:
    path = tmp_path / "x.gguf"
    write_gguf(path, untied_state(random_llama()), LLAMA)
    path.write_bytes(path.read_bytes().replace(b"llama", b"bloom"))
    with pytest.raises(ConfigError, match="has GGUF architecture 'bloom'; known are qwen, qwen2, llama"):
        Checkpoint.open(path)


def test_a_gguf_tensor_of_a_type_we_dont_read_is_named(tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "x.gguf", untied_state(random_llama()), LLAMA)
    data, name = bytearray(path.read_bytes()), b"blk.1.ffn_up.weight"
    at = data.index(name) + len(name) + 4 + 16  # rank, two sizes
    data[at : at + 4] = (16).to_bytes(4, "little")
    path.write_bytes(data)
    with pytest.raises(FormatError, match=r"tensor blk\.1\.ffn_up\.weight has GGUF type IQ2_XXS, which is not read"):
        load(path)


@pytest.mark.parametrize("cut_at", [0.5, 0.9, 0.999])
def test_a_truncated_gguf_names_its_first_cut_tensor(tmp_path: Path, cut_at: float) -> None:
    path = write_gguf(tmp_path / "x.gguf", untied_state(random_llama()), LLAMA)
    data = path.read_bytes()
    path.write_bytes(data[: int(len(data) * cut_at)])
    with pytest.raises(FormatError, match=r"is truncated: [\w.]+ ends at byte \d+, the file at \d+"):
        load(path)


# --------------------------------------------------------------------------------------------------- wild GGUF files


@pytest.fixture(scope="module")
def miniature(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A whole GGUF model of some 4 kB."""
    model = random_llama(
        vocab_size=8, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=1, head_dim=8,
        intermediate_size=32,
    )  # fmt: skip
    metadata = {"tokenizer.chat_template": "<|im_start|>", "tokenizer.ggml.tokens": list("abcdefgh")}
    path = tmp_path_factory.mktemp("mini") / "mini.gguf"
    return write_gguf(path, untied_state(model), model.config, metadata=metadata)


def load_or_refuse(path: Path) -> bool:
    """True if it loaded. Anything but our own errors is a failure of the test."""
    try:
        checkpoint = Checkpoint.open(path)
        load_model(checkpoint, torch.float32, CPU)
    except (ConfigError, CheckpointError) as error:
        if str(path) in str(error) or "tensor " in str(error):
            return False
        raise AssertionError(f"the error names neither file nor tensor: {error}") from error
    return bool(checkpoint.default_system)


def test_a_gguf_cut_anywhere_is_refused(miniature: Path, tmp_path: Path) -> None:
    data, path = miniature.read_bytes(), tmp_path / "cut.gguf"
    assert load_or_refuse(miniature)
    end = max(info.offset + 4 * int(np.prod(info.shape)) for info in read_header(miniature).tensors.values())
    for length in [*range(0, end, 7), end - 1]:
        path.write_bytes(data[:length])
        assert not load_or_refuse(path), f"loaded with {length} of {len(data)} bytes"


@settings(max_examples=300)
@given(data=st.data())
def test_a_gguf_with_bytes_changed_loads_or_is_refused(miniature: Path, data: st.DataObject) -> None:
    """Above all it must not ask for memory or time by what a damaged number says."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    raw = bytearray(miniature.read_bytes())
    header = min(info.offset for info in read_header(miniature).tensors.values())
    for _ in range(data.draw(st.integers(1, 3))):
        at = data.draw(st.integers(0, header - 1))
        raw[at] = data.draw(st.one_of(st.integers(0, 255), st.sampled_from([0, 1, 127, 128, 255])))
    path = miniature.with_name("changed.gguf")
    path.write_bytes(raw)
    load_or_refuse(path)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 100_000  # kB
