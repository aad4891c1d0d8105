"""What a Python user holds, on the real demo model: a 135M chat model whose reference outputs were computed by
transformers in float32 on the dequantized file (tests/golden/smollm2.json)."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import qwenlet
from qwenlet import SamplingParams
from qwenlet.checkpoint import write_random
from qwenlet.config import qwen_1_8b
from qwenlet.errors import ContextLengthError, MissingTokenizerError, RequestError

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


def test_a_model_that_leaves_our_kernels_says_so_unless_that_was_asked_for(tmp_path: Path) -> None:
    shape = replace(
        qwen_1_8b(), vocab_size=64, hidden_size=64, intermediate_size=88, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=2, head_dim=32,
    )  # fmt: skip
    path = str(write_random(tmp_path / "odd", shape))
    with qwenlet.load(path, device="cpu", dtype="fp32", max_context=64) as llm:
        assert llm.load_report.warnings == [f"runs by modules, more slowly: {llm.engine.obstacle}"]
    with qwenlet.load(path, device="cpu", dtype="fp32", max_context=64, linear="torch") as llm:
        assert llm.load_report.warnings == []
        assert "runs by modules" in str(llm.load_report)


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
