"""Perplexity against length on the tiny golden model, whose training length is 32 tokens."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import qwenlet
from qwenlet.errors import EvalError
from qwenlet.evals import tasks
from qwenlet.evals.data import DataFolder
from qwenlet.evals.figures import Lines
from qwenlet.evals.run import Run
from qwenlet.evals.runner import answers
from qwenlet.evals.task import Answer, Bench, Passage, Result, Sample, Scored
from qwenlet.evals.tasks import length
from qwenlet.evals.tasks.length import variants
from qwenlet.pretokenizer import QWEN
from qwenlet.tokenizer_export import tokenizer_json
from qwenlet.tokenizer_formats import Vocabulary

TEXT = "It was a dark and stormy night; the rain fell in torrents, and the wind blew. " * 30


def with_vocabulary(golden: Path, folder: Path, **config: object) -> Path:
    """The golden model with a vocabulary of single bytes, and fields of its configuration changed."""
    shutil.copytree(golden / "tiny-qwen", folder)
    ranks = {bytes([byte]): byte for byte in range(256)}
    special = {"<|endoftext|>": 256, "<|im_start|>": 257, "<|im_end|>": 258}
    files = tokenizer_json(Vocabulary(ranks, special, QWEN, 259, "single bytes"))
    for name, content in zip(("tokenizer.json", "tokenizer_config.json"), files, strict=True):
        (folder / name).write_text(json.dumps(content), encoding="utf-8")
    raw = json.loads((folder / "config.json").read_text()) | config
    (folder / "config.json").write_text(json.dumps(raw))
    return folder


@pytest.fixture(scope="module")
def tiny(golden: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[qwenlet.LLM]:
    folder = with_vocabulary(golden, tmp_path_factory.mktemp("length") / "tiny")
    with qwenlet.load(str(folder), device="cpu", dtype="fp32", max_context=512) as llm:
        yield llm


@pytest.fixture
def book(tiny: qwenlet.LLM, tmp_path: Path) -> Bench:
    path = tmp_path / "data" / "longctx" / "en_books" / "walden.md"
    path.parent.mkdir(parents=True)
    path.write_text(TEXT, encoding="utf-8")
    return Bench(DataFolder(tmp_path / "data", unchecked=True), tiny.tokenizer, tiny.context_length, tiny.config)


def test_every_length_covers_the_same_tokens(book: Bench) -> None:
    samples = tasks.get("length").samples(book)
    kinds: dict[tuple[int, str], list[int]] = {}
    for sample in samples:
        assert isinstance(sample.question, Passage)
        kinds.setdefault((sample.fields["length"], sample.fields["switches"]), []).extend(sample.question.ids)
    assert sorted({size for size, _ in kinds}) == [16, 32, 64, 128, 256]
    assert len({tuple(ids) for ids in kinds.values()}) == 1
    assert len(next(iter(kinds.values()))) == len(TEXT) // 256 * 256
    assert {switches for size, switches in kinds if size <= 32} == {"within the training length"}
    assert {switches for size, switches in kinds if size > 32} == {"neither", "NTK", "log-n", "both"}
    assert len({sample.id for sample in samples}) == len(samples)


def test_long_windows_are_few(book: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(length, "MOST_TOKENS", 1024)  # four of them
    samples = tasks.get("length").samples(book)
    assert sum(sample.fields["length"] == 256 for sample in samples) == 4 * length.MOST_WINDOWS


@pytest.mark.parametrize(
    ("switches", "config"),
    [
        ("both", {}),
        ("NTK", {"use_logn_attn": False}),
        ("log-n", {"use_dynamic_ntk": False}),
        ("neither", {"use_dynamic_ntk": False, "use_logn_attn": False}),
    ],
)
def test_a_switch_is_what_the_configuration_would_be(
    book: Bench, tiny: qwenlet.LLM, golden: Path, tmp_path: Path, switches: str, config: dict[str, object]
) -> None:
    """Against the published way to switch: a checkpoint whose config.json says so."""
    samples = [s for s in tasks.get("length").samples(book) if s.id == f"128/{switches}/3"]
    (answer,) = [answer for _, answer in answers(tiny, samples)]
    question = samples[0].question
    assert isinstance(question, Passage)
    folder = with_vocabulary(golden, tmp_path / "other", max_position_embeddings=128, **config)
    with qwenlet.load(str(folder), device="cpu", dtype="fp32", max_context=128) as other:
        logits = other.logits(question.ids[:-1])
    # the NTK factor of 127 tokens is that of 128
    expected = logits.log_softmax(-1).gather(1, torch.tensor(question.ids[1:])[:, None])[:, 0]
    assert answer.logprobs == pytest.approx(expected.tolist(), abs=1e-4)


def test_figures_and_plots(book: Bench, tiny: qwenlet.LLM, golden: Path, tmp_path: Path) -> None:
    """A run from folder to figures; the table's perplexities are those of the windows' tokens."""
    folder = with_vocabulary(golden, tmp_path / "model")
    run = Run(tmp_path / "run", book.data, "tiny")
    load = lambda _: qwenlet.load(str(folder), device="cpu", dtype="fp32", max_context=256)  # noqa: E731
    (outcome,) = run.evaluate(["length"], load)
    names = [figure.name for figure in outcome.summary.figures]
    assert names[:4] == [f"256 tokens (8x), {name}" for name in ("both", "log-n", "NTK", "neither")]
    assert names[13] == "16 tokens (0.5x), within the training length"
    assert names[-3:] == [f"64 tokens (2x), change by {name} in %" for name in ("NTK", "log-n", "log-n beside NTK")]
    assert len(names) == 2 + 3 * 4 + 3 * 3
    figure = outcome.summary.figures[2 + 3 * 4 - 1]
    assert (figure.unit, figure.higher_is_better, figure.count) == ("number", False, 9 * 16)
    used = [s for s in tasks.get("length").samples(book) if s.fields["length"] == 16]
    losses = [-math.fsum(a.logprobs) / 15 for _, a in answers(tiny, used)]
    assert figure.value == pytest.approx(math.exp(math.fsum(losses) / len(losses)), rel=1e-6)
    lengths, positions, changes = outcome.summary.plots
    assert isinstance(lengths, Lines)
    assert isinstance(positions, Lines)
    assert isinstance(changes, Lines)
    assert list(lengths.x) == [16, 32, 64, 128, 256]
    curves = dict(lengths.curves)
    assert list(curves) == ["neither", "NTK", "log-n", "both"]
    assert len({values[1] for values in curves.values()}) == 1  # within the training length they are one
    assert len({values[4] for values in curves.values()}) == 4
    assert len(positions.x) == 256 // 8
    first = [values[0] for _, values in positions.curves]
    assert dict(positions.curves)["neither"][0] == pytest.approx(dict(positions.curves)["log-n"][0])
    assert None not in first
    # log-n acts from position 32 on, which is the end of the fourth quarter of the training length
    assert list(changes.x) == list(positions.x)
    of_logn = dict(changes.curves)["log-n"]
    assert of_logn[:4] == pytest.approx([0.0] * 4, abs=1e-4)
    assert max(map(abs, of_logn[4:])) > 1e-3  # type: ignore[arg-type, type-var]


def read(number: int, switches: str, losses: list[float]) -> Result:
    """A window of twice the training length with these losses."""
    sample = Sample(
        f"64/{switches}/{number}", Passage(tuple(range(64))), None,
        fields={"length": 64, "switches": switches, "window": number},
    )  # fmt: skip
    answer = Answer(logprobs=tuple(-loss for loss in losses))
    return Result(sample, answer, Scored({"nats per token": sum(losses) / len(losses)}))


def test_what_a_switch_changes_is_taken_window_by_window(book: Bench) -> None:
    """Windows differ by 4 nats, the switch by 0.01: a third window that was read one way only is left out."""
    results = [read(0, "neither", [1.0] * 63), read(1, "neither", [5.0] * 63), read(2, "neither", [9.0] * 63)]
    results += [read(0, "NTK", [0.98] * 63), read(1, "NTK", [4.96] * 63)]
    summary = tasks.get("length").summary(results, book)
    (change,) = [figure for figure in summary.figures if "change" in figure.name]
    assert change.name == "64 tokens (2x), change by NTK in %"
    assert change.value == pytest.approx(100 * (math.exp(-0.03) - 1))
    assert change.error == pytest.approx(100 * math.exp(-0.03) * 0.01)
    assert (change.count, change.unit, change.higher_is_better) == (2, "number", False)
    (name, values), *others = summary.plots[2].curves  # type: ignore[union-attr]
    assert (name, others) == ("NTK", [])
    assert values == pytest.approx([100 * (math.exp(-0.03) - 1)] * 8)


def test_a_model_without_switches_has_one_curve(book: Bench) -> None:
    plain = replace(book.config, use_dynamic_ntk=False, use_logn_attn=False)
    assert list(variants(plain, 64)) == ["neither"]
    assert list(variants(replace(book.config, use_logn_attn=False), 64)) == ["neither", "NTK"]
    bench = replace(book, config=replace(plain, seq_length=4096), context_length=100)
    assert {sample.fields["length"] for sample in tasks.get("length").samples(bench)} == {100}


def test_a_file_of_ones_own(book: Bench, tmp_path: Path) -> None:
    own = tmp_path / "own.txt"
    own.write_text("Something else. " * 100)
    task = tasks.get(f"length:{own}")
    assert task.name == "length:own.txt"
    assert task.title == "Perplexity against length, own.txt"
    assert bytes(task.samples(book)[0].question.ids) == b"Something else. "  # type: ignore[union-attr]
    own.write_text("short")
    with pytest.raises(EvalError, match=r"has 5 tokens, but length:own.txt needs windows of 256"):
        task.samples(book)
    with pytest.raises(EvalError, match="can't read"):
        tasks.get("length:nowhere.txt").samples(book)


def test_a_window_without_an_answer_stops_the_run(book: Bench) -> None:
    task = tasks.get("length")
    with pytest.raises(EvalError, match="could not be read: too long"):
        task.score(task.samples(book)[0], Answer(error="too long"), book)
