"""A run: tasks x precisions over one folder of data, into one folder of results, taken up where it was left.

    RUN/samples/TASK.PRECISION.jsonl    every sample, as it comes in
    RUN/results.json                    figures of everything in the folder, written after each task
    RUN/files/...                       what tasks make beside figures: a submission, for example

The same command goes on after a kill. More tasks, more precisions and a larger limit add to the folder; another model,
seed or version of the data does not fit into it and is refused.
"""

from __future__ import annotations

import json
import random
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import qwenlet
from qwenlet.errors import EvalError, QwenletError
from qwenlet.evals import tasks
from qwenlet.evals.data import DataFolder
from qwenlet.evals.identity import fingerprint, quantization
from qwenlet.evals.records import SampleLog, Settings
from qwenlet.evals.runner import answers
from qwenlet.evals.task import Bench, Result, Sample, Summary, Task
from qwenlet.llm import LLM
from qwenlet.tokenizer_formats import write_atomically

# what a precision's name asks of `qwenlet.load`
PRECISIONS: dict[str, dict[str, Any]] = {
    "fp32": {"dtype": "fp32"},
    "fp16": {"dtype": "fp16"},
    "bf16": {"dtype": "bf16"},
    "int8": {"quant": "int8"},
    "int4": {"quant": "int4"},
    "as-is": {},  # as `load` takes it unless told
}
RESULTS = "results.json"

Load = Callable[[str], LLM]  # a precision -> the model at it


@dataclass(frozen=True)
class Progress:
    """What is told while a task runs.

    Attributes:
        done, total: samples.
        score: mean of the task's first measure so far.
        seconds_left: at the speed of this session; None before the first answer.
    """

    task: str
    precision: str
    done: int
    total: int
    score: float
    seconds_left: float | None


@dataclass(frozen=True)
class Outcome:
    """One task at one precision.

    Attributes:
        available: samples the task has; `count` of them were run.
        unread: rule -> ids of answers from which it read nothing; guessed: rule -> ids where it had to guess.
        unanswered: id -> why there is no answer.
        cut: ids of answers that ended at their length limit.
        seconds, computed: this session's, and how many samples it answered; the others were there already.
    """

    task: str
    title: str
    precision: str
    settings: Settings
    available: int
    count: int
    summary: Summary
    unread: Mapping[str, Sequence[str]]
    guessed: Mapping[str, Sequence[str]]
    unanswered: Mapping[str, str]
    cut: Sequence[str]
    seconds: float
    computed: int


@dataclass
class Run:
    """One folder of results.

    Attributes:
        out: the folder.
        limit: most samples of a task, a fixed choice of them; None: all.
        seed: of that choice, and of sampled replies.
        note: gets messages for people.
    """

    out: Path
    data: DataFolder
    model: str
    limit: int | None = None
    seed: int = 1234
    note: Callable[[str], None] = field(default=lambda _: None)

    def evaluate(
        self,
        names: Sequence[str],
        load: Load,
        precisions: Sequence[str] = ("as-is",),
        progress: Callable[[Progress], None] = lambda _: None,
    ) -> list[Outcome]:
        """Runs every task at every precision; each model is loaded once.

        Raises:
            EvalError: an unknown task or precision, data that is missing or altered, a folder of another run, a chat
                task for a model without a chat format. All that can be known is known before a sample runs.
        """
        for precision in precisions:
            if precision not in PRECISIONS:
                raise EvalError(f"there is no precision {precision!r}; known are {', '.join(PRECISIONS)}")
        found = [tasks.get(name) for name in names]
        outcomes = []
        for precision in precisions:
            with load(precision) as llm:
                bench = Bench(self.data, llm.tokenizer, llm.context_length, llm.config)
                chosen = [(task, *self._chosen(llm, task, bench)) for task in found]
                self._make_folder()
                for task, samples, available in chosen:
                    outcome = self._one(llm, task, bench, precision, samples, available, progress)
                    outcomes.append(outcome)
                    self._write(outcome)
        return outcomes

    def _chosen(self, llm: LLM, task: Task, bench: Bench) -> tuple[list[Sample], int]:
        """The samples that run, and how many there are in all."""
        if task.chat and llm.chat_format != "chatml":
            raise EvalError(
                f"{task.name} asks for chat, but {llm.name} has no chat format",
                hint="take the task's form for base models; `qwenlet eval list` names them",
            )
        try:
            samples = list(task.samples(bench))
        except (LookupError, TypeError, AttributeError, ValueError) as problem:
            if isinstance(problem, QwenletError) or not self.data.altered:
                raise
            raise EvalError(
                f"{task.name} can't use {self.data.root / self.data.altered[-1]}, which is not the published file: "
                f"{type(problem).__name__}: {problem}",
                hint="give it the published file's fields, or fetch that",
            ) from problem
        if not samples:
            raise EvalError(f"{task.name} has no samples: its data in {self.data.root} is empty", hint="fetch it again")
        return choose(samples, self.limit, self.seed), len(samples)

    def _make_folder(self) -> None:
        try:
            self.out.mkdir(parents=True, exist_ok=True)
        except OSError as problem:
            raise EvalError(
                f"{self.out} can't be the folder of a run: {problem.strerror or problem}", hint="choose another --out"
            ) from None

    def _one(
        self,
        llm: LLM,
        task: Task,
        bench: Bench,
        precision: str,
        samples: Sequence[Sample],
        available: int,
        progress: Callable[[Progress], None],
    ) -> Outcome:
        settings = Settings(
            task=task.name,
            model=self.model,
            weights=fingerprint(llm.path),
            precision=precision,
            quantization=quantization(llm),
            kv_cache=str(llm.engine.pool.dtype).removeprefix("torch."),
            seed=self.seed,
            version=qwenlet.__version__,
        )
        began = time.monotonic()
        with SampleLog(self.log_path(task.name, precision), settings) as log:
            if log.dropped:
                self.note(f"the last line of {log.path} was cut; its sample runs again")
            results = {result.sample.id: result for result in _kept(log, samples)}
            if results:
                self.note(f"{task.name} at {precision} goes on after {len(results)} of {len(samples)} samples")
            computed = 0
            for result in self._compute(llm, task, bench, [s for s in samples if s.id not in results]):
                log.add(result)
                results[result.sample.id] = result
                computed += 1
                seconds = time.monotonic() - began
                left = seconds / computed * (len(samples) - len(results))
                score = sum(r.scored.values[task.measures[0]] for r in results.values()) / len(results)
                progress(Progress(task.name, precision, len(results), len(samples), score, left))
        ordered = [results[sample.id] for sample in samples]
        return _outcome(task, precision, settings, available, ordered, bench, time.monotonic() - began, computed)

    def _compute(self, llm: LLM, task: Task, bench: Bench, samples: Sequence[Sample]) -> Iterator[Result]:
        for sample, answer in answers(llm, samples, seed=self.seed):
            yield Result(sample, answer, task.score(sample, answer, bench))

    def log_path(self, task: str, precision: str) -> Path:
        name = "".join(letter if letter.isalnum() or letter in "-_" else "-" for letter in task)
        return self.out / "samples" / f"{name}.{precision}.jsonl"

    def _write(self, outcome: Outcome) -> None:
        """Adds an outcome to results.json, in place of an earlier one of the same task and precision."""
        path = self.out / RESULTS
        results: dict[str, Any] = {"outcomes": []}
        if path.exists():
            try:
                results = read_results(self.out)
            except EvalError as problem:
                self.note(f"{problem.message}; it is written again")
        plain = asdict(outcome)
        files = plain["summary"].pop("files")
        key = (outcome.task, outcome.precision)
        others = [o for o in results["outcomes"] if (o["task"], o["precision"]) != key]
        written = {
            "model": self.model, "seed": self.seed, "limit": self.limit, "version": qwenlet.__version__,
            "altered_data": sorted({*results.get("altered_data", []), *self.data.altered}),
            "outcomes": [*others, plain],
        }  # fmt: skip
        for name, content in files.items():
            target = self.out / "files" / f"{outcome.task}.{outcome.precision}.{name}"
            target.parent.mkdir(parents=True, exist_ok=True)
            write_atomically(target, content.encode())
        write_atomically(path, (json.dumps(written, ensure_ascii=False, indent=1) + "\n").encode())


def choose(samples: Sequence[Sample], limit: int | None, seed: int) -> list[Sample]:
    """A fixed choice of `limit` samples, in their own order; a larger limit only adds to it."""
    if limit is None or limit >= len(samples):
        return list(samples)
    order = list(range(len(samples)))
    random.Random(f"samples/{seed}").shuffle(order)
    return [samples[number] for number in sorted(order[:limit])]


def read_results(out: Path) -> dict[str, Any]:
    """What results.json of a run's folder says.

    Raises:
        EvalError: it is missing or damaged.
    """
    path = out / RESULTS
    try:
        value: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        for name in ("model", "seed", "altered_data"):
            value[name]
        for outcome in value["outcomes"]:
            if missing := {one.name for one in fields(Outcome)} - set(outcome):
                raise ValueError(f"an outcome has no {sorted(missing)[0]}")
    except FileNotFoundError:
        raise EvalError(f"{path} does not exist", hint="qwenlet eval TASK --out RUN makes it") from None
    except (ValueError, LookupError, TypeError) as problem:
        raise EvalError(f"{path} is damaged: {problem}", hint="the same command as before writes it again") from None
    return value


def _kept(log: SampleLog, samples: Sequence[Sample]) -> Iterator[Result]:
    for sample in samples:
        record = log.kept.get(sample.id)
        if record is None:
            continue
        if record.prompt_sha256 != sample.prompt_sha256:
            raise EvalError(
                f"{log.path} has an answer to {sample.id}, but its question was another one",
                hint="the data or the task has changed: choose another --out",
            )
        yield record.result(sample)


def _outcome(
    task: Task,
    precision: str,
    settings: Settings,
    available: int,
    results: Sequence[Result],
    bench: Bench,
    seconds: float,
    computed: int,
) -> Outcome:
    unread: dict[str, list[str]] = {}
    guessed: dict[str, list[str]] = {}
    for result in results:
        for rule, found in result.scored.extracted.items():
            if found is None:
                unread.setdefault(rule, []).append(result.sample.id)
        for rule in result.scored.guessed:
            guessed.setdefault(rule, []).append(result.sample.id)
    return Outcome(
        task=task.name,
        title=task.title,
        precision=precision,
        settings=replace(settings),
        available=available,
        count=len(results),
        summary=task.summary(results, bench),
        unread=unread,
        guessed=guessed,
        unanswered={r.sample.id: r.answer.error for r in results if r.answer.error is not None},
        cut=[r.sample.id for r in results if "length" in r.answer.finish_reasons],
        seconds=seconds,
        computed=computed,
    )
