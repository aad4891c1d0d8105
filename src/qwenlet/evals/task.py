"""What a task is: samples with what is asked of the model, and how its answers are scored.

    Choices, Passage          questions to the likelihood runner
    Continuation, Dialogue    questions to the generation runner
    Sample                    one question with its reference
    Answer                    what a runner brings back
    Scored                    what a task makes of an answer
    Task                      the base of all tasks: samples, score, summary

A task knows no model, no batch and no file but its data; a runner knows no task. Everything here is data that JSON
can hold, so that a run can be read, resumed and compared without the model.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from qwenlet.chat import Message
from qwenlet.checkpoint import DEFAULT_SYSTEM
from qwenlet.config import ModelConfig, SamplingParams
from qwenlet.errors import EvalError
from qwenlet.evals.data import DataFolder
from qwenlet.evals.figures import Figure, Plot
from qwenlet.evals.statistics import grouped, mean
from qwenlet.tokenizer import Tokenizer

GREEDY = SamplingParams(temperature=0.0, repetition_penalty=1.0, max_new_tokens=512)


# ------------------------------------------------------------------------------------------------------ questions


@dataclass(frozen=True)
class Choices:
    """Which of some continuations is the likeliest?

    Attributes:
        prompt: text, encoded as a whole, or ids.
        options: what may follow it, texts or ids; each is encoded by itself. Options of one token cost one pass for all
            of them.
        window: of a prompt of more tokens than this, the last `window - 1` are read, as published; None: all are.
    """

    prompt: str | tuple[int, ...]
    options: tuple[str | tuple[int, ...], ...]
    window: int | None = None


@dataclass(frozen=True)
class Passage:
    """How likely is each token of a text from position `first` on, given those before it?

    Attributes:
        ntk, logn: False takes dynamic NTK, or log-n attention, away from a model that has it.
    """

    ids: tuple[int, ...]
    first: int = 1
    ntk: bool = True
    logn: bool = True


@dataclass(frozen=True)
class Continuation:
    """What follows a text, or ids?"""

    prompt: str | tuple[int, ...]
    params: SamplingParams = GREEDY


@dataclass(frozen=True)
class Dialogue:
    """What does the assistant reply?

    Attributes:
        messages: the conversation up to the first reply; a system message is what the task says, or not there.
        then: what the user says after the first reply, after the second, ...; each gets a reply of its own.
    """

    messages: tuple[Message, ...]
    params: SamplingParams = GREEDY
    then: tuple[str, ...] = ()

    @classmethod
    def ask(cls, question: str, params: SamplingParams = GREEDY, *, system: str = DEFAULT_SYSTEM) -> Dialogue:
        """One question, as the published `chat` asks it."""
        return cls((Message("system", system), Message("user", question)), params)


Question = Choices | Passage | Continuation | Dialogue


@dataclass(frozen=True)
class Sample:
    """One question of a task.

    Attributes:
        id: names it for good, whatever else is asked: "anatomy/17".
        target: what is right: a letter, a number, texts ... whatever the task's `score` wants; JSON.
        group: what it is averaged with: a subject, a category; empty where there is none.
        fields: what else scoring needs; JSON.
    """

    id: str
    question: Question
    target: Any
    group: str = ""
    fields: Mapping[str, Any] = field(default_factory=dict)

    @property
    def prompt_sha256(self) -> str:
        """Of the question with everything in it that can change an answer."""
        text = json.dumps([type(self.question).__name__, asdict(self.question)], sort_keys=True, ensure_ascii=False)
        return hashlib.sha256(text.encode()).hexdigest()


# -------------------------------------------------------------------------------------------------------- answers


@dataclass(frozen=True)
class Answer:
    """What the model said.

    Attributes:
        logprobs: natural logs. Of Choices, one per option; of a Passage, one per token from `first` on.
        greedy: of Choices, whether greedy decoding would have written that option.
        texts: of a Continuation or a Dialogue the n replies, or of a Dialogue of several turns the reply of each turn.
        finish_reasons: "stop" or "length", one per text.
        prompt_tokens, new_tokens: of all passes for this question.
        error: why there is no answer; everything else is then empty.
    """

    logprobs: tuple[float, ...] = ()
    greedy: tuple[bool, ...] = ()
    texts: tuple[str, ...] = ()
    finish_reasons: tuple[str, ...] = ()
    prompt_tokens: int = 0
    new_tokens: int = 0
    error: str | None = None

    @property
    def text(self) -> str:
        """The first reply; empty where there is none."""
        return self.texts[0] if self.texts else ""

    @property
    def likeliest(self) -> int:
        """Number of the likeliest option, the first of equals."""
        return max(range(len(self.logprobs)), key=lambda i: self.logprobs[i])


@dataclass(frozen=True)
class Scored:
    """What a task makes of an answer.

    Attributes:
        values: measure -> value. An answer from which nothing could be read scores 0 and counts as unread.
        extracted: rule -> what it read out of the answer; None where it found nothing.
        guessed: rules that had to guess, as some published ones do.
    """

    values: Mapping[str, float]
    extracted: Mapping[str, str | None] = field(default_factory=dict)
    guessed: tuple[str, ...] = ()


@dataclass(frozen=True)
class Result:
    """A sample with its answer and score."""

    sample: Sample
    answer: Answer
    scored: Scored


@dataclass(frozen=True)
class Summary:
    """What a task says of all its results.

    Attributes:
        figures: the first one is the task's own figure.
        plots: what is better seen.
        files: name -> content, written beside the results (a submission, for example).
    """

    figures: tuple[Figure, ...]
    plots: tuple[Plot, ...] = ()
    files: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Bench:
    """What a task may look at beside its samples.

    Attributes:
        context_length: positions one question may use.
        config: the model's shapes and maths.
    """

    data: DataFolder
    tokenizer: Tokenizer
    context_length: int
    config: ModelConfig


class Task:
    """One benchmark. A subclass opens its file with a real example of its data.

    Attributes:
        name: as on the command line.
        title: for the report.
        kind: which runner answers it.
        chat: whether the model must have a chat format.
        measures: the keys of `Scored.values`, the published one first; the first is the running score.
    """

    name: str
    title: str
    kind: Literal["likelihood", "generation"]
    chat: bool = False
    measures: tuple[str, ...] = ("accuracy",)

    def with_argument(self, argument: str) -> Task:
        """The task for what stands behind the colon of NAME:ARGUMENT."""
        raise EvalError(f"the task {self.name} takes no argument, but {argument!r} was given")

    def samples(self, bench: Bench) -> Sequence[Sample]:
        """All questions, in the order of the data; those with a common beginning beside each other.

        Raises:
            EvalError: a file is missing or altered.
        """
        raise NotImplementedError

    def score(self, sample: Sample, answer: Answer, bench: Bench) -> Scored:
        """What the answer is worth; called once per sample, where the answer came in."""
        raise NotImplementedError

    def summary(self, results: Sequence[Result], bench: Bench) -> Summary:
        """Figures of all results: here the mean of every measure, and of the first one by group."""
        figures = [
            Figure(measure, *mean([result.scored.values[measure] for result in results])) for measure in self.measures
        ]
        return Summary((*figures, *self.by_group(results)))

    def by_group(self, results: Sequence[Result]) -> list[Figure]:
        """The first measure's mean of every group, where there are groups."""
        groups = grouped((result.sample.group, result.scored.values[self.measures[0]]) for result in results)
        return [Figure(group, *mean(values), part=True) for group, values in groups.items() if group]
