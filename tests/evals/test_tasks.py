"""Prompts are the published ones to the letter; scores and summaries are what the benchmarks define."""

from __future__ import annotations

import json

import pytest

from evals import folders
from qwenlet.errors import EvalError
from qwenlet.evals import data as data_module
from qwenlet.evals import tasks
from qwenlet.evals.figures import Figure
from qwenlet.evals.task import Answer, Bench, Choices, Continuation, Dialogue, Passage, Result, Sample
from qwenlet.evals.tasks import bbh, cmmlu, longbench
from qwenlet.evals.tasks.mmlu import CATEGORIES


def samples(name: str, bench: Bench) -> list[Sample]:
    return list(tasks.get(name).samples(bench))


def said(sample: Sample) -> str:
    """The user's message of a question to the chat model."""
    assert isinstance(sample.question, Dialogue)
    system, user = sample.question.messages
    assert system.content == "You are a helpful assistant."
    return user.content


def figures(name: str, results: list[Result], bench: Bench) -> dict[str, Figure]:
    return {figure.name: figure for figure in tasks.get(name).summary(results, bench).figures}


def answered(name: str, found: list[Sample], answers: list[Answer], bench: Bench) -> list[Result]:
    task = tasks.get(name)
    return [Result(s, a, task.score(s, a, bench)) for s, a in zip(found, answers, strict=True)]


# ---------------------------------------------------------------------------------------------------- MMLU


def test_mmlu_five_shots(bench: Bench) -> None:
    folders.mmlu(bench.data.root)
    found = samples("mmlu", bench)
    assert len(found) == 57 * 2
    first = next(sample for sample in found if sample.id == "high_school_biology/1")
    assert isinstance(first.question, Choices)
    shots = "".join(f"Question: example {n}?\nA. w\nB. x\nC. y\nD. z\nAnswer: {'ABCD'[n % 4]}\n\n" for n in range(5))
    assert first.question.prompt == (
        "The following are multiple choice questions (with answers) about high school biology.\n\n"
        + shots + "Question: high_school_biology 1?\nA. one\nB. two\nC. three\nD. four\nAnswer:"
    )  # fmt: skip
    assert first.question.options == (" A", " B", " C", " D")
    assert first.question.window == 2048


def test_mmlu_chat(bench: Bench) -> None:
    folders.mmlu(bench.data.root)
    assert said(samples("mmlu-chat", bench)[0]) == (
        "The following is a multiple-choice question. Please choose the most suitable one among A, B, C and D as the "
        "answer to this question.\n\nabstract_algebra 0?\nA. one\nB. two\nC. three\nD. four\n"
    )


def test_mmlu_is_a_micro_average_with_four_categories(bench: Bench) -> None:
    folders.mmlu(bench.data.root)
    found = samples("mmlu", bench)
    # right in STEM alone
    rows = [
        Answer(logprobs=tuple(float(x == s.target) if s.group in CATEGORIES["STEM"] else 0.0 for x in "ABCD"))
        for s in found
    ]
    got = figures("mmlu", answered("mmlu", found, rows, bench), bench)
    right = sum(s.group in CATEGORIES["STEM"] or s.target == "A" for s in found)
    assert got["accuracy"].value == pytest.approx(right / len(found))
    assert (got["STEM"].value, got["STEM"].count) == (1.0, 2 * 19)
    assert sum(got[c].count for c in CATEGORIES) == len(found)
    assert got["anatomy"].part


def test_a_sample_without_an_answer_is_wrong_and_not_unread(bench: Bench) -> None:
    folders.mmlu(bench.data.root)
    for name in ("mmlu", "mmlu-chat"):
        task, sample = tasks.get(name), samples(name, bench)[0]
        scored = task.score(sample, Answer(error="the prompt has 9,000 tokens"), bench)
        assert set(scored.values.values()) == {0.0}
        assert not scored.extracted


# ---------------------------------------------------------------------------------------- C-Eval and CMMLU


def test_ceval_five_shots(bench: Bench) -> None:
    folders.ceval(bench.data.root)
    found = samples("ceval", bench)
    assert [s.id for s in found[:2]] == ["logic/0", "logic/1"]
    assert isinstance(found[0].question, Choices)
    assert found[0].question.options == ("A", "B", "C", "D")
    assert found[0].question.prompt.startswith("问题：例0____。\nA. 甲\nB. 乙\nC. 丙\nD. 丁\n答案：A\n\n问题：例1")
    assert found[0].question.prompt.endswith("答案：A\n\n问题：题0____。\nA. 甲甲\nB. 乙乙\nC. 丙丙\nD. 丁丁\n答案：")


def test_ceval_chat(bench: Bench) -> None:
    folders.ceval(bench.data.root)
    assert said(samples("ceval-chat", bench)[1]) == "题1____。\n\nA. 甲甲\nB. 乙乙\nC. 丙丙\nD. 丁丁\n"


def test_ceval_means_are_over_subjects(bench: Bench) -> None:
    folders.ceval(bench.data.root)
    found = samples("ceval-chat", bench)[:-2]  # logic has four questions, physics two
    replies = [Answer(texts=(f"答案是{s.target if s.group == 'logic' else 'A'}。",)) for s in found]
    got = figures("ceval-chat", answered("ceval-chat", found, replies, bench), bench)
    assert got["published"].value == pytest.approx((1.0 + 0.5) / 2)
    assert (got["Humanities"].value, got["STEM"].value, got["Hard"].value) == (1.0, 0.5, 0.5)


def test_ceval_test_writes_the_submission(bench: Bench) -> None:
    folders.ceval(bench.data.root)
    found = samples("ceval-test", bench)
    replies = [Answer(texts=("不知道" if s.id == "logic/2" else "选B",)) for s in found]
    results = answered("ceval-test", found, replies, bench)
    summary = tasks.get("ceval-test").summary(results, bench)
    letters = json.loads(summary.files["submission-improved.json"])
    assert letters["logic"] == {"0": "B", "1": "B", "2": "", "3": "B"}
    assert set(letters) == {"logic", "college_physics"}
    assert summary.figures[0].value == pytest.approx(7 / 8)
    assert "no keys" in summary.figures[0].name


def test_ceval_test_is_scored_where_keys_are_given(bench: Bench) -> None:
    folders.ceval(bench.data.root)
    keys = {subject: {str(n): "B" for n in range(4)} for subject in ("logic", "college_physics")}
    folders.write(bench.data.root, "ceval/test_answers.json", json.dumps(keys))
    found = samples("ceval-test", bench)
    replies = [Answer(texts=("选B" if s.group == "logic" else "选C",)) for s in found]
    got = figures("ceval-test", answered("ceval-test", found, replies, bench), bench)
    assert (got["published"].value, got["Humanities"].value, got["STEM"].value) == (0.5, 1.0, 0.0)


def test_cmmlu(bench: Bench) -> None:
    head = ("", "Question", "A", "B", "C", "D", "Answer")
    for subject in (s for members in cmmlu.CATEGORIES.values() for s in members):
        rows = [(str(n), f"{subject}{n}", "甲", "乙", "丙", "丁", "C") for n in range(5)]
        for part in ("dev", "test"):
            folders.write(
                bench.data.root, f"cmmlu/{part}/{subject}.csv", folders.table(head, *rows[: 5 if part == "dev" else 1])
            )
    found = samples("cmmlu", bench)
    assert len(found) == 67
    assert isinstance(found[0].question, Choices)
    assert found[0].question.prompt.endswith("答案：C\n\n问题：agronomy0\nA. 甲\nB. 乙\nC. 丙\nD. 丁\n答案：")
    rows = [Answer(logprobs=(0.0, 0.0, float(s.group in cmmlu.CHINA), 0.0)) for s in found]
    got = figures("cmmlu", answered("cmmlu", found, rows, bench), bench)
    assert got["China specific"].value == 1.0
    assert got["accuracy"].value == pytest.approx(15 / 67)


# ------------------------------------------------------------------------------------------------- GSM8K


def test_gsm8k_eight_shots(bench: Bench) -> None:
    folders.gsm8k(bench.data.root)
    sample = samples("gsm8k", bench)[2]
    assert isinstance(sample.question, Continuation)
    assert sample.question.prompt == (
        "Question: What is 1 plus 1?\nLet's think step by step\nThe answer is 2\n\n"
        "Question: What is 2 plus 1?\nLet's think step by step\n"
    )
    assert sample.question.params.stop == ("\n\n", "Question:")
    assert (sample.question.params.temperature, sample.question.params.max_new_tokens) == (0.0, 512)
    assert sample.target == 3.0


def test_gsm8k_chat_forms(bench: Bench) -> None:
    folders.gsm8k(bench.data.root)
    assert said(samples("gsm8k-chat", bench)[0]) == "What is 0 plus 1?"
    four = said(samples("gsm8k-chat-4shot", bench)[0])
    assert four.startswith(
        "Question: Angelo and Melanie want ...?\nLet's think step by step\n2*3=6\nThe answer is 2\n\n"
    )
    assert four.count("The answer is") == 4
    assert four.endswith("\n\nQuestion: What is 0 plus 1?\nLet's think step by step")


def test_the_published_wording_is_taken_where_it_is(bench: Bench) -> None:
    folders.gsm8k(bench.data.root)
    folders.write(bench.data.root, "gsm8k/qwen_gsm8k_chat_prompt.txt", "Question: x\nThe answer is 1\n\n")
    four = said(samples("gsm8k-chat-4shot", bench)[0])
    assert four == "Question: x\nThe answer is 1\n\nQuestion: What is 0 plus 1?\nLet's think step by step"


def test_gsm8k_scores_both_readings(bench: Bench) -> None:
    folders.gsm8k(bench.data.root)
    sample = samples("gsm8k", bench)[2]
    scored = tasks.get("gsm8k").score(sample, Answer(texts=("2+1=3. The answer is 3.0",)), bench)
    assert scored.values == {"published": 0.0, "improved": 1.0}
    unread = tasks.get("gsm8k").score(sample, Answer(texts=("three",)), bench)
    assert unread.extracted == {"published": None, "improved": None}


# --------------------------------------------------------------------------------------- BBH, LongBench


def test_bbh(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    known = {"bbh/bbh/navigate.json": data_module.Expected(1, "")}
    monkeypatch.setattr(data_module, "expected", lambda: known)
    folders.write(
        bench.data.root, "bbh/bbh/navigate.json", json.dumps({"examples": [{"input": "Left?", "target": "No"}]})
    )
    folders.write(
        bench.data.root,
        "bbh/cot-prompts/navigate.txt",
        "canary\n-----\nFind out.\n\nQ: Right?\nA: So the answer is Yes.",
    )
    (sample,) = samples("bbh", bench)
    assert isinstance(sample.question, Continuation)
    assert sample.question.prompt == (
        "Find out.\n\nQ: Right?\nA: So the answer is Yes.\n\nQ: Left?\nA: Let's think step by step.\n"
    )
    scored = tasks.get("bbh").score(sample, Answer(texts=("We turn. So the answer is No.",)), bench)
    assert scored.values == {"published": 1.0, "improved": 1.0}
    scored = tasks.get("bbh").score(sample, Answer(texts=("Answer: **no**",)), bench)
    assert scored.values == {"published": 0.0, "improved": 1.0}


@pytest.mark.parametrize(
    ("reply", "published", "improved"),
    [
        ("So the answer is (B).", "(B)", "b"),
        ("So the answer is (B) red.", "(B) red", "b"),
        ("So the answer is } ] >.", "} ] >", "} ] >"),
        ("The answer is 5. Or, the answer is 7.", "7", "7"),
        ("I can't say.", None, None),
    ],
)
def test_bbh_answers(reply: str, published: str | None, improved: str | None) -> None:
    assert bbh.published(reply) == published
    assert bbh.improved(reply) == improved


def test_longbench_prompts_and_cuts_the_middle(bench: Bench) -> None:
    row = {"input": "谁？", "context": "段" * 3000, "answers": ["厦门大学。"]}
    for name in longbench.PROMPTS:
        folders.write(bench.data.root, f"longctx/longbench/{name}.jsonl", folders.lines(row))
    short = longbench._ask("multifieldqa_zh", {**row, "context": "文"}, bench)
    assert short.messages[1].content.startswith("阅读以下文字并用中文简短回答：\n\n文\n\n现在请基于上面的文章")
    assert short.params.max_new_tokens == 64
    cut = samples("longbench", bench)[0].question
    assert isinstance(cut, Dialogue)
    text = cut.messages[1].content
    assert text.startswith("阅读以下文字并用中文简短回答：\n\n段")
    assert text.endswith("问题：谁？\n回答：")
    room = bench.context_length - 64
    assert room - 100 < len(bench.tokenizer.encode(text)) < room


def test_longbench_measures() -> None:
    assert longbench.f1_chinese("厦门大学", "厦门大学。") == 1.0
    assert longbench.f1_chinese("北京", "厦门大学。") == 0.0
    assert 0.0 < longbench.f1_chinese("在厦门大学举办", "厦门大学。") < 1.0
    assert longbench.passage_number("段落27", "段落27") == 1.0
    assert longbench.passage_number("段落27或段落3", "段落27") == 0.5
    assert longbench.passage_number("没有", "段落27") == 0.0
    assert longbench.rouge_l("the cat sat on the mat", "the cat sat on the mat") == pytest.approx(1.0, abs=1e-6)
    assert longbench.rouge_l("...", "the cat") == 0.0


# --------------------------------------------------------------------------------------------- perplexity


def test_perplexity_of_a_file(bench: Bench) -> None:
    folders.write(bench.data.root, "story.txt", "once upon a time " * 100)
    task = tasks.get(f"perplexity:{bench.data.root / 'story.txt'}")
    assert task.name == "perplexity:story.txt"
    found = task.samples(bench)
    assert len(found) == 1700 // 512
    assert isinstance(found[0].question, Passage)
    assert (len(found[0].question.ids), found[0].question.first) == (512, 257)
    results = [Result(s, a, task.score(s, a, bench)) for s in found for a in [Answer(logprobs=(-1.0, -3.0))]]
    (figure,) = task.summary(results, bench).figures
    assert figure.value == pytest.approx(2.718281828**2)
    assert not figure.higher_is_better


def test_perplexity_needs_a_file_that_can_be_read(bench: Bench) -> None:
    with pytest.raises(EvalError, match="perplexity needs a text"):
        tasks.get("perplexity").samples(bench)
    with pytest.raises(EvalError, match="can't read"):
        tasks.get("perplexity:/nowhere").samples(bench)


# -------------------------------------------------------------------------------------------------- names


def test_an_unknown_task_names_the_nearest() -> None:
    with pytest.raises(EvalError, match="there is no task 'mmul'") as caught:
        tasks.get("mmul")
    assert caught.value.hint == "did you mean 'mmlu'?"


def test_a_task_without_an_argument_takes_none() -> None:
    with pytest.raises(EvalError, match="mmlu takes no argument"):
        tasks.get("mmlu:x")


@pytest.mark.parametrize("name", tasks.TASKS)
def test_every_task_says_what_it_is(name: str) -> None:
    task = tasks.get(name)
    assert task.name == name
    assert task.title
    assert task.kind in ("likelihood", "generation")
    module = __import__(type(task).__module__, fromlist=["x"])
    assert len((module.__doc__ or "").splitlines()) > 3, "a task's file opens with a real example of its data"
