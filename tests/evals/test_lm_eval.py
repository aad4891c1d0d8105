"""lm-evaluation-harness with our engine as its model: the same answers as our runners, on the same questions."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import qwenlet
from qwenlet import SamplingParams
from qwenlet.errors import EvalError, RequestError
from qwenlet.evals.runner import answers
from qwenlet.evals.task import Choices, Continuation, Dialogue, Question, Sample

# lm-eval and its libraries warn of what is theirs
pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::UserWarning"),
    pytest.mark.filterwarnings("ignore::ResourceWarning"),
]

WORDS = "the quick brown fox jumps over a lazy dog and runs away from here".split()


@pytest.fixture(scope="module", autouse=True)
def _offline(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """lm-eval reads local files through datasets, which keeps copies and would ask its hub for news."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HF_HOME", str(tmp_path_factory.mktemp("hf")))
        for name in ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE"):
            patch.setenv(name, "1")
        yield


@pytest.fixture(scope="module")
def lm(llm: qwenlet.LLM) -> Any:
    from qwenlet.evals.lm_eval import QwenletLM

    return QwenletLM(llm=llm, max_length=1024)


def asked(*arguments: Any) -> list[Any]:
    return [SimpleNamespace(args=one) for one in arguments]


def run(lm: Any, name: str, folder: Path) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """(metrics, samples) of a local task."""
    from lm_eval import simple_evaluate
    from lm_eval.tasks import TaskManager

    manager = TaskManager(include_path=str(folder), include_defaults=False)
    found = simple_evaluate(lm, tasks=[name], task_manager=manager, log_samples=True, bootstrap_iters=0)
    assert found is not None
    return found["results"][name], sorted(found["samples"][name], key=lambda sample: sample["doc_id"])


# ------------------------------------------------------------------------------------------------ agreement


@pytest.mark.parametrize("options", [(" A", " B", " C", " D"), ("A", "B", "C")], ids=["two bytes", "one byte"])
def test_it_agrees_with_our_runner_on_options(
    lm: Any, llm: qwenlet.LLM, tmp_path: Path, options: tuple[str, ...]
) -> None:
    """The same task and model: the same choice and the same log-probability, question by question."""
    from qwenlet.evals.lm_eval import write_task

    samples = [
        Sample(f"q{n}", Choices(f"Shots. Question: {WORDS[n % 14]} {n}?\nAnswer:", options), options[n % 3].strip())
        for n in range(24)
    ]
    task = write_task("letters", samples, tmp_path)
    results, theirs = run(lm, task.name, task.folder)
    ours = {sample.id: answer for sample, answer in answers(llm, samples)}
    assert len(theirs) == 24
    for sample in theirs:
        answer = ours[sample["doc"]["id"]]
        assert [float(response[0][0]) for response in sample["resps"]] == pytest.approx(list(answer.logprobs), abs=1e-5)
        assert [response[0][1] for response in sample["resps"]] == list(answer.greedy)
    right = [options[ours[s.id].likeliest].strip() == s.target for s in samples]
    assert results["acc,none"] == pytest.approx(sum(right) / 24)


def test_it_agrees_with_our_runner_on_replies(lm: Any, llm: qwenlet.LLM, tmp_path: Path) -> None:
    from qwenlet.evals.lm_eval import write_task

    params = SamplingParams(temperature=0.0, repetition_penalty=1.0, max_new_tokens=20, stop=("q", "zz"))
    samples = [Sample(f"q{n}", Continuation(f"{word} {n}:", params), "?") for n, word in enumerate(WORDS)]
    ours = {sample.id: answer.text for sample, answer in answers(llm, samples)}
    # the targets of some are what we got, so that lm-eval's own score says who agrees
    samples = [Sample(s.id, s.question, ours[s.id] if n % 2 else "?") for n, s in enumerate(samples)]
    task = write_task("replies", samples, tmp_path)
    results, theirs = run(lm, task.name, task.folder)
    assert {sample["doc"]["id"]: sample["resps"][0][0] for sample in theirs} == ours
    assert results["exact_match,none"] == pytest.approx(sum(n % 2 for n in range(len(WORDS))) / len(WORDS))


# ------------------------------------------------------------------------------------------------ requests


def test_log_likelihoods_are_those_of_score(lm: Any, llm: qwenlet.LLM) -> None:
    pairs = [("once upon", " a time"), ("once upon", " a"), ("hello", " world"), ("", "no context")]
    found = lm.loglikelihood(asked(*pairs), disable_tqdm=True)
    for (context, continuation), (logprob, greedy) in zip(pairs, found, strict=True):
        prompt: Any = context or [lm.prefix_token_id]
        expected = llm.score(prompt, continuation)
        assert logprob == pytest.approx(expected.logprob, abs=1e-4)
        assert greedy is expected.is_greedy


def test_greedy_is_told_apart(lm: Any, llm: qwenlet.LLM) -> None:
    params = SamplingParams(temperature=0.0, repetition_penalty=1.0, max_new_tokens=6, ignore_eos=True)
    written = llm.generate("once upon", params)
    ids = list(written.token_ids)
    other = [*ids[:-1], (ids[-1] + 1) % 256]
    found = lm._loglikelihood_tokens([(("", ""), list(b"once upon"), one) for one in (ids, other, ids[:1])])
    assert [greedy for _, greedy in found] == [True, False, True]


def test_a_long_context_loses_its_beginning(llm: qwenlet.LLM) -> None:
    from qwenlet.evals.lm_eval import QwenletLM

    short = QwenletLM(llm=llm, max_length=16)
    text = "abcdefghijklmnopqrstuvwxyz"
    ((logprob, _),) = short.loglikelihood(asked((text, "!!")), disable_tqdm=True)
    # 17 tokens are kept, of which the last is only predicted
    assert logprob == pytest.approx(llm.score(text[-15:], "!!").logprob, abs=1e-4)


def test_whole_texts_are_scored_window_by_window(llm: qwenlet.LLM) -> None:
    """Every token once: against logits of the windows that lm-eval documents."""
    from qwenlet.evals.lm_eval import QwenletLM

    short = QwenletLM(llm=llm, max_length=10)
    ids = list(b"the rain fell in torrents")
    expected = 0.0
    for start in range(0, len(ids), 10):
        piece = ids[start : start + 10]
        before = [short.prefix_token_id] if start == 0 else [ids[start - 1]]
        if start + 10 > len(ids) and start:  # the last window is full of context
            before = ids[len(ids) - 10 - 1 : start]
        rows = llm.logits([*before, *piece][:-1]).log_softmax(-1)[-len(piece) :]
        expected += float(rows.gather(1, torch.tensor(piece)[:, None]).sum())
    (found,) = short.loglikelihood_rolling(asked((bytes(ids).decode(),)), disable_tqdm=True)
    assert found == pytest.approx(expected, abs=1e-3)
    assert math.isfinite(found)


def test_replies_end_where_the_task_says(lm: Any, llm: qwenlet.LLM) -> None:
    params = SamplingParams(temperature=0.0, repetition_penalty=1.0, max_new_tokens=12)
    plain = llm.generate("once upon", params).text
    stop = plain[3]
    found = lm.generate_until(
        asked(("once upon", {"until": [], "max_gen_toks": 12}), ("once upon", {"until": [stop], "max_gen_toks": 12}))
    )
    assert found[0] == plain
    assert found[1] == plain[: plain.index(stop)]


def test_sampled_replies_repeat_with_the_seed(llm: qwenlet.LLM) -> None:
    from qwenlet.evals.lm_eval import QwenletLM

    options = {"until": [], "max_gen_toks": 12, "do_sample": True, "temperature": 1.0}
    texts = [QwenletLM(llm=llm, seed=seed).generate_until(asked(("once", options)))[0] for seed in (1, 1, 2)]
    assert texts[0] == texts[1] != texts[2]


def test_conversations_are_chatml(lm: Any, llm: qwenlet.LLM) -> None:
    from qwenlet.chat import render
    from qwenlet.evals.lm_eval import QwenletLM

    own = QwenletLM(llm=llm)
    assert len(own.tok_encode("<|im_start|>")) > 1  # people's words are text
    messages = [{"role": "user", "content": "Hi"}]
    assert own.tok_encode(own.apply_chat_template(messages)) == render(llm.tokenizer, messages)
    opened = own.apply_chat_template(
        [*messages, {"role": "assistant", "content": "Sure:"}], add_generation_prompt=False
    )
    assert opened.endswith("<|im_start|>assistant\nSure:")
    assert own.chat_template(True)
    assert own.chat_template(False) is None
    assert "/" not in own.tokenizer_name


# ------------------------------------------------------------------------------------------------ refusals


def test_generation_options_without_a_meaning_are_named() -> None:
    from qwenlet.evals.lm_eval import drawing

    assert drawing({"until": "\n"}, 7) == SamplingParams(
        temperature=0.0, top_p=1.0, top_k=0, min_p=0.0, repetition_penalty=1.0, max_new_tokens=7, stop=("\n",)
    )
    assert drawing({"do_sample": True, "temperature": 0.5, "top_p": 0.9}, 7).top_p == 0.9
    # greedy, whatever cuts a task's file names beside it
    assert drawing({"do_sample": False, "temperature": 0.8, "top_k": 5}, 7).temperature == 0.0
    with pytest.raises(RequestError, match="num_beams"):
        drawing({"until": [], "num_beams": 4}, 7)
    with pytest.raises(RequestError, match="temperature is 0"):
        drawing({"do_sample": True, "temperature": 0.0}, 7)


def test_models_that_can_not_be_made(llm: qwenlet.LLM) -> None:
    from qwenlet.evals.lm_eval import QwenletLM

    with pytest.raises(EvalError, match="pretrained or llm"):
        QwenletLM()
    with pytest.raises(EvalError, match="max_length is 99999"):
        QwenletLM(llm=llm, max_length=99999)
    with pytest.raises(EvalError, match="batch_size"):
        QwenletLM(llm=llm, batch_size="many")
    with pytest.raises(EvalError, match="max_gen_toks is 64"):
        QwenletLM(llm=llm, max_length=64).generate_until(asked(("x", {"max_gen_toks": 64})))
    with pytest.raises(EvalError, match="0 tokens"):
        QwenletLM(llm=llm)._loglikelihood_tokens([(("a", ""), [1], [])])


def test_lm_eval_finds_it_by_name(byte_qwen: Path) -> None:
    from lm_eval.api.registry import get_model

    from qwenlet.evals.lm_eval import QwenletLM

    made = get_model("qwenlet")
    assert made is QwenletLM
    own = made.create_from_arg_string(
        f"pretrained={byte_qwen},dtype=fp32,max_context=64", {"batch_size": 4, "device": "cpu"}
    )
    with own.llm:
        assert own.max_length == 64
        assert own.llm.options.max_requests == 4


@pytest.mark.parametrize(
    ("questions", "target", "message"),
    [
        ([], "A", "no questions"),
        ([Dialogue(())], "A", "Dialogue"),
        ([Choices("a", ("A",)), Continuation("a")], "A", "alone"),
        ([Choices((1, 2), ("A",))], "A", "as ids"),
        ([Choices("a", ("A",))], "B", "none of its options"),
        ([Continuation("a"), Continuation("a", SamplingParams(max_new_tokens=1))], "A", "in 2 ways"),
    ],
)
def test_questions_that_are_no_task(tmp_path: Path, questions: list[Question], target: str, message: str) -> None:
    from qwenlet.evals.lm_eval import write_task

    samples = [Sample(str(n), question, target) for n, question in enumerate(questions)]
    with pytest.raises(EvalError, match=message):
        write_task("t", samples, tmp_path)
