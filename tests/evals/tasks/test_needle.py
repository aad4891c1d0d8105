"""The needle is in the text where it was put, the question fits, and an answer is worth the parts it names."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

import qwenlet
from qwenlet.errors import EvalError
from qwenlet.evals import tasks
from qwenlet.evals.figures import HeatMap
from qwenlet.evals.run import Run
from qwenlet.evals.task import Answer, Bench, Dialogue, Result
from qwenlet.evals.tasks.needle import DEPTHS, Needle, NeedleZh

HAY = {Needle: "Sentence number %d is here. ", NeedleZh: "这是第%d句话。"}


@pytest.fixture(params=[Needle, NeedleZh], ids=["en", "zh"])
def task(request: pytest.FixtureRequest, bench: Bench, monkeypatch: pytest.MonkeyPatch) -> Needle:
    kind = request.param
    folder = bench.data.root / "hay"
    folder.mkdir(parents=True)
    for name in "ab":
        text = "".join(HAY[kind] % n for n in range(300))
        (folder / f"{name}.txt").write_text(text, encoding="utf-8")
    monkeypatch.setattr(kind, "folder", "hay/")
    made: Needle = kind()
    return made


def texts(task: Needle, bench: Bench) -> dict[str, str]:
    found = {}
    for sample in task.samples(bench):
        assert isinstance(sample.question, Dialogue)
        found[sample.id] = sample.question.messages[-1].content
    return found


def test_it_is_hidden_at_its_depth_between_sentences(task: Needle, bench: Bench) -> None:
    for id, text in texts(task, bench).items():
        size, depth = map(int, id.split("/"))
        assert text.count(task.needle) == 1
        hay, _, _ = text.rpartition("\n\n")
        place = hay.index(task.needle)
        share = len(hay[:place].encode()) / (len(hay.encode()) - len(task.needle.encode()))
        assert share == pytest.approx(depth / 100, abs=60 / size + 0.02)
        assert not place or hay[:place].rstrip(" ")[-1] in task.ends or depth == 100
        assert "\ufffd" not in text


def test_every_question_fits_with_its_reply(task: Needle, bench: Bench, llm: qwenlet.LLM) -> None:
    from qwenlet import chat

    for sample in task.samples(bench):
        assert isinstance(sample.question, Dialogue)
        used = len(chat.render(llm.tokenizer, sample.question.messages))
        size = sample.fields["length"]
        reserve = sample.question.params.max_new_tokens
        assert reserve is not None
        assert size - 80 < used + reserve <= size


def test_an_answer_is_worth_the_parts_it_names(bench: Bench) -> None:
    sample = Result.__new__(Result)
    english = Needle()
    for text, worth in (
        ("Eat a sandwich in Dolores Park on a Sunny day.", 1.0),
        ("Eat a SANDWICH.", 1 / 3),
        ("Visit the bridge.", 0.0),
    ):
        scored = english.score(sample, Answer(texts=(text,)), bench)  # type: ignore[arg-type]
        assert scored.values["found"] == pytest.approx(worth)
        assert (scored.extracted["named"] is None) is (worth == 0.0)
    assert NeedleZh().score(sample, Answer(texts=("豆浆和油条，在槐树下。",)), bench).values["found"] == 1.0  # type: ignore[arg-type]


def test_the_heat_map_has_a_cell_per_question(task: Needle, bench: Bench) -> None:
    results = []
    for sample in task.samples(bench)[5:]:
        text = task.needle if sample.fields["depth"] >= 50 else ""
        results.append(Result(sample, Answer(texts=(text,)), task.score(sample, Answer(texts=(text,)), bench)))
    summary = task.summary(results, bench)
    (plot,) = summary.plots
    assert isinstance(plot, HeatMap)
    assert [float(row) for row in plot.rows] == list(DEPTHS)
    assert len(plot.values[0]) == len(plot.columns)
    assert plot.values[0][0] is None  # was not asked
    assert plot.values[0][-1] == 0.0
    assert plot.values[-1][-1] == 1.0
    assert summary.figures[0].name == "found"


def test_what_is_too_small_says_so(task: Needle, bench: Bench) -> None:
    with pytest.raises(EvalError, match="needs a context of"):
        task.samples(replace(bench, context_length=300))
    (bench.data.root / "hay" / "b.txt").unlink()
    with pytest.raises(EvalError, match="tokens, but needle"):
        task.samples(replace(bench, context_length=30_000))


def test_a_run(task: Needle, bench: Bench, byte_qwen: Path, tmp_path: Path) -> None:
    run = Run(tmp_path / "run", bench.data, "byte-qwen", limit=3)
    load = lambda _: qwenlet.load(str(byte_qwen), device="cpu", dtype="fp32", max_context=2048)  # noqa: E731
    (outcome,) = run.evaluate([task.name], load)
    assert outcome.count == 3
    assert outcome.summary.figures[0].value == 0.0
    assert tasks.get(task.name).title == task.title
