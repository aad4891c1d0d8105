"""The runners bring back what the model says of each sample by itself, whatever runs beside it."""

from __future__ import annotations

import math

import pytest
import torch

import qwenlet
from qwenlet import SamplingParams
from qwenlet.chat import Message
from qwenlet.errors import CheckpointError
from qwenlet.evals.runner import answers
from qwenlet.evals.task import GREEDY, Answer, Choices, Continuation, Dialogue, Passage, Question, Sample

LETTERS = (" A", " B")  # two bytes, so two tokens here


def ask(llm: qwenlet.LLM, *questions: Question, seed: int = 0) -> list[Answer]:
    """Answers in the order of the questions."""
    samples = [Sample(str(number), question, None) for number, question in enumerate(questions)]
    found = {sample.id: answer for sample, answer in answers(llm, samples, seed=seed)}
    return [found[sample.id] for sample in samples]


def logprobs(llm: qwenlet.LLM, ids: list[int]) -> torch.Tensor:
    return llm.logits(ids).log_softmax(-1)


def test_options_of_one_token_are_read_off_one_pass(llm: qwenlet.LLM) -> None:
    (answer,) = ask(llm, Choices("Answer:", ("A", "B", "C")))
    expected = logprobs(llm, list(b"Answer:"))[-1]
    assert answer.logprobs == pytest.approx([float(expected[ord(letter)]) for letter in "ABC"], abs=1e-5)
    assert answer.prompt_tokens == len("Answer:")


def test_longer_options_sum_their_tokens(llm: qwenlet.LLM) -> None:
    (answer,) = ask(llm, Choices("Answer:", ("yes", "no", "!")))
    expected = [llm.score("Answer:", option).logprob for option in ("yes", "no", "!")]
    assert answer.logprobs == pytest.approx(expected, abs=1e-4)


def test_a_long_prompt_keeps_its_end(llm: qwenlet.LLM) -> None:
    """As published: of more than `window` tokens the last window - 1; of exactly so many, all."""
    text = "abcdefghij"
    (cut, whole) = ask(llm, Choices(text, ("A", "B"), window=8), Choices(text, ("A", "B"), window=10))
    assert (cut.prompt_tokens, whole.prompt_tokens) == (7, 10)
    assert cut.logprobs == ask(llm, Choices(text[-7:], ("A", "B")))[0].logprobs


def test_a_passage_is_scored_token_by_token(llm: qwenlet.LLM) -> None:
    ids = list(b"The quick brown fox jumps over the lazy dog. " * 30)
    (answer,) = ask(llm, Passage(tuple(ids), first=7))
    rows = logprobs(llm, ids)
    expected = [float(rows[at - 1, ids[at]]) for at in range(7, len(ids))]
    assert answer.logprobs == pytest.approx(expected, abs=1e-4)


def test_company_changes_nothing(llm: qwenlet.LLM) -> None:
    """Sixty questions that share beginnings, in one crowd and each alone: equal to the bit."""
    questions = [Choices("shared beginning " * (1 + n % 5) + str(n), LETTERS) for n in range(60)]
    crowd = ask(llm, *questions)
    llm.engine.prefix.clear()  # type: ignore[union-attr]
    assert crowd[::7] == [ask(llm, question)[0] for question in questions[::7]]


def test_replies_are_drawn_greedily_and_end_at_their_stop(llm: qwenlet.LLM) -> None:
    params = SamplingParams(temperature=0.0, repetition_penalty=1.0, max_new_tokens=12)
    (answer,) = ask(llm, Continuation("once upon", params))
    alone = llm.generate("once upon", params)
    assert (answer.texts, answer.finish_reasons) == ((alone.text,), (alone.finish_reason,))
    assert answer.new_tokens == alone.completion_tokens


def test_seeds_belong_to_the_run_and_the_sample(llm: qwenlet.LLM) -> None:
    params = SamplingParams(temperature=1.0, max_new_tokens=16, n=3)
    question = Continuation("once upon", params)
    first, second = ask(llm, question, question, seed=1)
    assert len(set(first.texts)) == 3
    assert first.texts != second.texts
    assert [first, second] == ask(llm, question, question, seed=1)
    assert first.texts != ask(llm, question, seed=2)[0].texts


def test_a_dialogue_of_turns_sees_its_own_replies(llm: qwenlet.LLM) -> None:
    params = SamplingParams(temperature=0.0, repetition_penalty=1.0, max_new_tokens=10)
    (answer,) = ask(llm, Dialogue((Message("user", "hi"),), params, then=("and?", "so?")))
    history = [Message("user", "hi")]
    for reply, following in zip(answer.texts, ["and?", "so?", ""], strict=True):
        assert reply == qwenlet.engine.Completion.from_chunks(llm.reply(history, params)).text  # type: ignore[attr-defined]
        history += [Message("assistant", reply), Message("user", following)]


def test_what_does_not_fit_is_an_answer_with_a_reason(llm: qwenlet.LLM) -> None:
    too_long, fine = ask(llm, Continuation("x" * 5000, GREEDY), Choices("Answer:", ("A", "B")))
    assert too_long.error is not None
    assert "5000 tokens" in too_long.error
    assert not too_long.texts
    assert fine.error is None


def test_numbers_that_are_none_stop_the_run(llm: qwenlet.LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    run = llm.engine.runner.run
    monkeypatch.setattr(llm.engine.runner, "run", lambda work: [rows * math.nan for rows in run(work)])
    with pytest.raises(CheckpointError, match="not finite"):
        ask(llm, Choices("Answer:", ("A", "B")))


def test_leaving_early_frees_everything(llm: qwenlet.LLM) -> None:
    samples = [Sample(str(n), Continuation(f"story {n}", GREEDY), None) for n in range(40)]
    running = answers(llm, samples)
    next(running)
    running.close()
    assert llm.engine.drain(timeout=30)
    llm.engine._driver.draining = False
    assert llm.engine.stats.pages_used == 0
