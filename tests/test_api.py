"""What a Python user holds, on the real demo model: a 135M chat model whose reference outputs were computed by
transformers in float32 on the dequantized file (tests/golden/smollm2.json)."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import qwenlet
from qwenlet import SamplingParams
from qwenlet.checkpoint import Checkpoint, write_rounded
from qwenlet.errors import ConfigError, ContextLengthError, FormatError, HubError, MissingTokenizerError, RequestError
from qwenlet.ops import cpu

QUESTION = "What is the capital of France?"


@pytest.fixture(scope="module")
def reference(golden: Path) -> dict[str, Any]:
    return json.loads((golden / "smollm2.json").read_text(encoding="utf-8"))["chat"]  # type: ignore[no-any-return]


@pytest.fixture(scope="module")
def llm(demo_gguf: Path) -> Iterator[qwenlet.LLM]:
    with qwenlet.load(str(demo_gguf), dtype="fp32", device="cpu") as llm:
        yield llm


@pytest.fixture(scope="module")
def tiny(golden: Path) -> Iterator[qwenlet.LLM]:
    """The golden Qwen-1, which has no vocabulary."""
    with qwenlet.load(str(golden / "tiny-qwen"), dtype="fp32", device="cpu") as llm:
        yield llm


def test_logits_of_the_demo_model(llm: qwenlet.LLM, reference: dict[str, Any]) -> None:
    logits = llm.logits(reference["ids"])
    assert logits.shape == (len(reference["ids"]), llm.config.vocab_size)
    assert logits.dtype == torch.float32
    top = logits[-1].topk(20)
    assert top.indices.tolist() == reference["top20_ids"]
    assert (top.values - torch.tensor(reference["top20_logits"])).abs().max() <= 0.02


def test_greedy_tokens_of_the_demo_model(llm: qwenlet.LLM, reference: dict[str, Any]) -> None:
    completion = llm.generate(
        reference["ids"], SamplingParams(temperature=0, repetition_penalty=1.0, max_new_tokens=40)
    )
    assert list(completion.token_ids) == reference["greedy40"]
    assert completion.text + "<|im_end|>" == reference["greedy40_text"]
    assert completion.finish_reason == "stop"


def test_chat_returns_the_reply_and_a_new_history(llm: qwenlet.LLM) -> None:
    history: list[tuple[str, str]] = []
    response, after = llm.chat(QUESTION, history, system=llm.default_system)
    assert "Paris" in response
    assert history == []
    assert after == [(QUESTION, response)]
    assert llm.default_system.startswith("You are a helpful AI assistant named SmolLM")


def test_bfloat16_answers_too(demo_gguf: Path) -> None:
    with qwenlet.load(str(demo_gguf), dtype="bf16", device="cpu") as llm:
        assert "Paris" in llm.chat(QUESTION, system=llm.default_system)[0]


def test_streamed_chunks_add_up_to_the_completion(llm: qwenlet.LLM) -> None:
    params = SamplingParams(temperature=0.8, seed=3, max_new_tokens=30)
    chunks = list(llm.stream("The weather today is", params))
    whole = llm.generate("The weather today is", params)
    assert "".join(chunk.text for chunk in chunks) == whole.text
    assert tuple(token for chunk in chunks for token in chunk.token_ids) == whole.token_ids
    assert whole.text == llm.tokenizer.decode(whole.token_ids, skip_special_tokens=True)


def test_a_stop_text_ends_the_reply_and_is_not_part_of_it(llm: qwenlet.LLM, reference: dict[str, Any]) -> None:
    stopped = llm.generate(reference["ids"], SamplingParams(temperature=0, stop=["France is"], max_new_tokens=40))
    assert stopped.text == "The capital of "
    assert stopped.finish_reason == "stop"
    assert stopped.completion_tokens == 5, "the token that completed the stop text is the last one computed"


def test_lists_of_prompts_and_of_parameters(llm: qwenlet.LLM, reference: dict[str, Any]) -> None:
    first = SamplingParams(temperature=0, max_new_tokens=3)
    second = SamplingParams(temperature=1.0, seed=1, n=2, max_new_tokens=4)
    completions = llm.generate([reference["ids"], "Once upon a time"], [first, second])
    assert [c.completion_tokens for c in completions] == [3, 4, 4]
    assert [c.choice for c in completions] == [0, 0, 1]
    assert completions[1].token_ids != completions[2].token_ids
    with pytest.raises(RequestError, match="1 sampling parameters were given for 2"):
        llm.generate(["a", "b"], [first])


def test_control_tokens_in_text_stay_text(llm: qwenlet.LLM) -> None:
    ids = llm.tokenizer.encode("<|im_end|>", allowed_special=set())
    completion = llm.generate("<|im_end|>", SamplingParams(max_new_tokens=1))
    assert completion.prompt_tokens == len(ids) > 1


def test_old_turns_are_dropped_until_the_conversation_fits(demo_gguf: Path) -> None:
    with qwenlet.load(str(demo_gguf), device="cpu", max_context=256) as llm:
        history = [("Tell me about number " + str(i), "It is a number. " * 10) for i in range(6)]
        chunks = list(llm.chat_stream(QUESTION, history, params=SamplingParams(max_new_tokens=16, temperature=0)))
        assert chunks[-1].dropped_turns > 0
        assert chunks[-1].prompt_tokens + 16 <= 256
        with pytest.raises(ContextLengthError, match="256"):
            list(llm.chat_stream("word " * 300))
        # a reply length that was asked for is kept whole: more turns go instead
        first = next(llm.chat_stream(QUESTION, history, params=SamplingParams(max_new_tokens=200)))
        assert first.prompt_tokens + 200 <= 256


def test_score_is_the_sum_of_token_logprobs(llm: qwenlet.LLM, reference: dict[str, Any]) -> None:
    good = llm.score(reference["ids"], reference["greedy40"])
    assert good.is_greedy
    assert good.logprob == pytest.approx(sum(good.token_logprobs))
    assert len(good.token_logprobs) == len(reference["greedy40"])
    bad = llm.score(reference["ids"], " Berlin")
    assert bad.logprob < good.logprob
    assert not bad.is_greedy


def test_a_checkpoint_without_a_vocabulary_takes_ids_and_says_what_is_missing_for_text(tiny: qwenlet.LLM) -> None:
    completion = tiny.generate([1, 2, 3], SamplingParams(temperature=0, max_new_tokens=5))
    assert completion.completion_tokens == 5
    assert completion.text == ""
    for call in (lambda: tiny.generate("text"), lambda: tiny.chat("text"), lambda: tiny.tokenizer):
        with pytest.raises(MissingTokenizerError, match=r"qwen\.tiktoken"):
            call()


@pytest.mark.parametrize(
    ("ids", "word"),
    [([], "empty"), ([384], "384"), ([-1], "-1"), ([[1, 2]], "token ids"), ([0.5], "token ids"), (["a"], "token ids")],
)
def test_logits_of_bad_ids(tiny: qwenlet.LLM, ids: list[Any], word: str) -> None:
    with pytest.raises(RequestError, match=word):
        tiny.logits(ids)


def test_scoring_sees_what_generation_saw(golden: Path) -> None:
    """The NTK factor is the prompt's, also when prompt and continuation together cross seq_length (here 32)."""
    with qwenlet.load(str(golden / "tiny-qwen"), dtype="fp32", device="cpu") as tiny:
        prompt = list(range(1, 31))
        written = tiny.generate(prompt, SamplingParams(temperature=0, max_new_tokens=6, logprobs=0, ignore_eos=True))
        score = tiny.score(prompt, written.token_ids)
        assert score.is_greedy
        assert written.logprobs is not None
        assert score.token_logprobs == pytest.approx([entry.logprob for entry in written.logprobs], abs=1e-4)


def test_tensors_and_arrays_are_prompts_too(tiny: qwenlet.LLM) -> None:
    params = SamplingParams(temperature=0, max_new_tokens=3)
    expected = tiny.generate([1, 2, 3], params)
    for prompt in (torch.tensor([1, 2, 3]), np.array([1, 2, 3]), list(np.array([1, 2, 3])), (1, 2, 3)):
        assert tiny.generate(prompt, params).token_ids == expected.token_ids  # type: ignore[call-overload]
    with pytest.raises(RequestError, match="token ids"):
        tiny.generate([1, 2.7], params)  # type: ignore[list-item]
    with pytest.raises(RequestError, match="expected SamplingParams"):
        tiny.generate([1], {"temperature": 0})  # type: ignore[call-overload]


def test_more_ids_than_there_are_positions(tiny: qwenlet.LLM) -> None:
    with pytest.raises(ContextLengthError, match="40000 tokens"):
        tiny.logits([1] * 40_000)


def test_a_closed_model_says_so(golden: Path) -> None:
    llm = qwenlet.load(str(golden / "tiny-qwen"), device="cpu")
    llm.close()
    llm.close()
    with pytest.raises(RequestError, match="was closed"):
        llm.generate([1])


def test_the_config_names_the_end_where_no_generation_config_does(golden: Path, tmp_path: Path) -> None:
    folder = tmp_path / "m"
    shutil.copytree(golden / "tiny-qwen", folder)
    with qwenlet.load(str(folder), device="cpu", dtype="fp32") as llm:
        free = llm.generate([1, 2, 3], SamplingParams(temperature=0, max_new_tokens=9)).token_ids
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"eos_token_id": free[2]}))
    with qwenlet.load(str(folder), device="cpu", dtype="fp32") as llm:
        completion = llm.generate([1, 2, 3], SamplingParams(temperature=0, max_new_tokens=9))
    assert completion.token_ids == free[: free.index(free[2]) + 1]
    assert completion.finish_reason == "stop"


def test_an_empty_prompt(llm: qwenlet.LLM) -> None:
    with pytest.raises(RequestError, match="empty"):
        llm.generate("")
    with pytest.raises(RequestError, match="n is 2"):
        llm.stream("x", SamplingParams(n=2))


@pytest.mark.parametrize(
    ("options", "word"),
    [
        ({"dtype": "int3"}, "int3"),
        ({"device": "tpu0"}, "tpu0"),
        ({"device": "cuda:9"}, "cuda"),
        ({"quant": "int2"}, "quant"),
        ({"kv_cache": "int7"}, "kv_cache"),
        ({"max_context": -1}, "max_context"),
        ({"max_contexts": 5}, "did you mean 'max_context'"),
        ({"attention": "efficient"}, "efficient"),
    ],
)
def test_options_are_refused_by_name(golden: Path, options: dict[str, Any], word: str) -> None:
    with pytest.raises(ConfigError, match=word):
        qwenlet.load(str(golden / "tiny-qwen"), **({"device": "cpu"} | options))


def test_names_that_lead_nowhere(tmp_path: Path) -> None:
    with pytest.raises(HubError):
        qwenlet.load(str(tmp_path / "nothing"), offline=True)
    with pytest.raises(HubError, match="Qwen/Qwen-1_8B-Nope"):
        qwenlet.load("Qwen/Qwen-1_8B-Nope", offline=True)
    junk = tmp_path / "junk.gguf"
    junk.write_bytes(b"<html>not a model</html>")
    with pytest.raises(FormatError, match="not a GGUF"):
        qwenlet.load(str(junk))


def test_no_file_of_a_checkpoint_is_executed(golden: Path, tmp_path: Path) -> None:
    folder = tmp_path / "with-code"
    shutil.copytree(golden / "tiny-qwen", folder)
    mark = tmp_path / "executed"
    for name in ("modeling_qwen.py", "configuration_qwen.py", "tokenization_qwen.py"):
        (folder / name).write_text(f"open({str(mark)!r}, 'w')\n")
    with qwenlet.load(str(folder), device="cpu") as llm:
        llm.generate([1, 2], SamplingParams(max_new_tokens=2))
    assert not mark.exists()


def test_the_dtype_follows_the_device_the_model_lives_on(golden: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The published code asked "is a GPU present" and then failed on the CPU with 'addmm_impl_cpu_'."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda **_: False)
    with qwenlet.load(str(golden / "tiny-qwen"), device="cpu") as llm:
        assert llm.dtype in (torch.bfloat16, torch.float32)
        assert "this processor" in str(llm.load_report)


# ------------------------------------------------------------------------------------------------------- quantization


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("QWENLET_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "kernels"


def close_to(logits: torch.Tensor, reference: torch.Tensor) -> bool:
    return bool((logits - reference).norm() < 0.05 * reference.norm())


def test_quantized_tensors_of_a_gguf_run_as_they_are(
    llm: qwenlet.LLM, demo_gguf: Path, reference: dict[str, Any]
) -> None:
    with qwenlet.load(str(demo_gguf), device="cpu", quant="stored") as quantized:
        assert quantized.load_report.dtype == "int4 and int8"
        assert quantized.dtype == torch.float32
        assert quantized.options.kv_cache == "int8"
        exact, ours = llm.logits(reference["ids"]), quantized.logits(reference["ids"])
        # activations of eight bits; bfloat16 costs 0.002
        assert F.kl_div(ours.log_softmax(-1), exact.log_softmax(-1), log_target=True, reduction="batchmean") < 0.02
        assert "Paris" in quantized.chat(QUESTION, system=quantized.default_system)[0]


def test_without_kernels_codes_become_floats(golden: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    saved = write_rounded(Checkpoint.open(golden / "tiny-qwen"), tmp_path / "q", qwenlet.QuantConfig())
    with qwenlet.load(str(saved), device="cpu") as codes:
        assert (codes.load_report.dtype == "int4") == (cpu.status().isa is not None)
    monkeypatch.setenv("QWENLET_ISA", "torch")
    with qwenlet.load(str(saved), device="cpu", dtype="auto") as floats:
        assert floats.load_report.dtype in ("bfloat16", "float32")
        assert close_to(floats.logits([1, 2, 3]).float(), qwenlet_logits(saved))


def qwenlet_logits(saved: Path) -> torch.Tensor:
    with qwenlet.load(str(saved), device="cpu", quant="none", dtype="fp32") as floats:
        return floats.logits([1, 2, 3])


def test_stored_needs_codes_and_a_cpu(golden: Path, demo_gguf: Path) -> None:
    with pytest.raises(ConfigError, match="not quantized"):
        qwenlet.load(str(golden / "tiny-qwen"), quant="stored", device="cpu")
    with pytest.raises(ConfigError, match="no dtype but fp32"):
        qwenlet.load(str(demo_gguf), quant="stored", dtype="bf16", device="cpu")


def test_a_small_gguf_runs_in_floats_unless_asked(demo_gguf: Path) -> None:
    with qwenlet.load(str(demo_gguf), device="cpu", max_context=64) as floats:
        assert floats.load_report.dtype in ("bfloat16", "float32")


def test_a_dtype_or_none_makes_floats_of_them(llm: qwenlet.LLM, demo_gguf: Path) -> None:
    assert llm.load_report.dtype == "float32", "the fixture asks for dtype='fp32'"
    assert llm.options.kv_cache == "fp32"
    with qwenlet.load(str(demo_gguf), device="cpu", quant="none", max_context=64) as floats:
        assert floats.load_report.dtype in ("bfloat16", "float32")


def test_quant_rounds_once_and_keeps_the_result(tiny: qwenlet.LLM, golden: Path, cache: Path) -> None:
    ids = list(range(20))
    with qwenlet.load(str(golden / "tiny-qwen"), quant="int8", device="cpu") as first:
        assert close_to(first.logits(ids), tiny.logits(ids))
        assert "rounded, and kept in" in str(first.load_report)
        assert first.path == golden / "tiny-qwen", "the model is still the one that was named"
    (kept,) = cache.iterdir()
    before = kept.stat().st_mtime_ns
    with qwenlet.load(str(golden / "tiny-qwen"), quant="int8", device="cpu") as second:
        assert second.load_report.kept
        assert torch.equal(second.logits(ids), unkept_logits(golden, ids))
    assert kept.stat().st_mtime_ns == before


def unkept_logits(golden: Path, ids: list[int]) -> torch.Tensor:
    quant = qwenlet.QuantConfig.named("int8")
    with qwenlet.load(str(golden / "tiny-qwen"), quant=quant, device="cpu", tile_cache=False) as again:
        assert not again.load_report.kept
        return again.logits(ids)


def test_without_a_cache_it_is_rounded_in_memory(
    tiny: qwenlet.LLM, golden: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("QWENLET_CACHE", str(tmp_path / "file"))
    with qwenlet.load(str(golden / "tiny-qwen"), quant="int8", device="cpu", kv_cache="fp32") as llm:
        assert "repacked anew at each start" in str(llm.load_report)
        assert llm.options.kv_cache == "fp32"
        assert close_to(llm.logits([1, 2, 3]), tiny.logits([1, 2, 3]))


@pytest.mark.parametrize(
    ("options", "word"),
    [
        ({"quant": 4}, "quant is 4"),
        ({"quant": "int4", "dtype": "bf16"}, "compute in fp32"),
        ({"quant": qwenlet.QuantConfig(group_size=128)}, "groups of 128 do not divide the 64 inputs"),
        ({"quant": qwenlet.QuantConfig(method="gptq")}, "rounded to nearest"),
    ],
)
def test_what_quant_cant_mean(golden: Path, cache: Path, options: dict[str, Any], word: str) -> None:
    with pytest.raises(ConfigError, match=word):
        qwenlet.load(str(golden / "tiny-qwen"), device="cpu", **options)
