"""Perplexity against length: the card's long-context table, with dynamic NTK and log-n attention each on and off.

The same tokens at every length: a text is cut into windows of half the training length, of it, and of twice, four and
eight times it, as far as the context goes. Windows within the training length are the same whatever is switched off.
What a switch changes is taken window by window: its error is that of the differences, which is far smaller than that of
either perplexity. The text is a book unless length:FILE names another, in the data folder or anywhere. The beginning of
longctx/en_books/walden.md:

    # Walden, and On The Duty Of Civil Disobedience

    by Henry David Thoreau

Published for the base model (arXiv text, 1,024 to 32,768 tokens, of which 2,048 were seen in training then):
5.00 4.48 4.13 3.89 17.42 433.85 without either, 5.00 4.48 4.14 3.93 3.82 3.83 with both and windowed attention.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Self

from qwenlet.config import ModelConfig
from qwenlet.errors import EvalError
from qwenlet.evals.figures import Figure, Lines
from qwenlet.evals.statistics import grouped, mean
from qwenlet.evals.task import Answer, Bench, Passage, Result, Sample, Scored, Summary, Task

TEXT = "longctx/en_books/walden.md"
MULTIPLES = (0.5, 1, 2, 4, 8)
MOST_WINDOWS = 8  # of the greatest length, or more where they are short:
MOST_TOKENS = 1 << 16
# name -> (dynamic NTK, log-n attention)
SWITCHES = {"neither": (False, False), "NTK": (True, False), "log-n": (False, True), "both": (True, True)}
# name -> (without it, with it)
CHANGES = {"NTK": ("neither", "NTK"), "log-n": ("neither", "log-n"), "log-n beside NTK": ("NTK", "both")}
WITHIN = "within the training length"
_PARTS = 4  # of a training length, in the plot by position


class Length(Task):
    """Windows of a text, at every length and switch."""

    name = "length"
    title = "Perplexity against length"
    kind = "likelihood"
    measures = ("nats per token",)
    file = TEXT

    def with_argument(self, argument: str) -> Self:
        task = copy.copy(self)
        task.file = argument
        task.name = f"{self.name}:{Path(argument).name}"
        task.title = f"{self.title}, {Path(argument).name}"
        return task

    def samples(self, bench: Bench) -> list[Sample]:
        sizes = lengths(bench)
        name = self.file if bench.data.has(self.file) else str(Path(self.file).resolve())
        ids = bench.tokenizer.encode(bench.data.text(name), allowed_special=set())
        count = min(len(ids) // sizes[-1], max(MOST_WINDOWS, MOST_TOKENS // sizes[-1]))
        if not count:
            raise EvalError(
                f"{name} has {len(ids)} tokens, but {self.name} needs windows of {sizes[-1]}",
                hint="length:FILE takes a longer text, --max-context shorter windows",
            )
        used = ids[: count * sizes[-1]]
        found = []
        for size in sizes:
            for switches, (ntk, logn) in variants(bench.config, size).items():
                for number in range(len(used) // size):
                    passage = Passage(tuple(used[number * size :][:size]), ntk=ntk, logn=logn)
                    fields = {"length": size, "switches": switches, "window": number}
                    found.append(Sample(f"{size}/{switches}/{number}", passage, None, fields=fields))
        return found

    def score(self, sample: Sample, answer: Answer, bench: Bench) -> Scored:
        if answer.error is not None:
            raise EvalError(f"a window of {sample.fields['length']} tokens could not be read: {answer.error}")
        return Scored({"nats per token": -math.fsum(answer.logprobs) / len(answer.logprobs)})

    def summary(self, results: Sequence[Result], bench: Bench) -> Summary:
        """Perplexities from the greatest length down, all switches on first; then what each switch changes."""
        kinds = grouped(((r.sample.fields["length"], r.sample.fields["switches"]), r) for r in results)
        ordered = sorted(kinds, key=lambda kind: (-kind[0], -_rank(kind[1])))
        figures = [self._figure(bench, size, switches, kinds[size, switches]) for size, switches in ordered]
        for size in sorted({size for size, _ in kinds}, reverse=True):
            of_size = {switches: of_kind for (other, switches), of_kind in kinds.items() if other == size}
            figures += self._changes(bench, size, of_size)
        plots = [by_length(bench.config, figures_of(kinds))]
        longest = max((size for size, _ in kinds), default=0)
        if longest > bench.config.seq_length:
            of_longest = [r for r in results if len(_ids(r)) == longest]
            plots += by_position(bench.config, longest, of_longest)
        return Summary(tuple(figures), tuple(plots))

    def _figure(self, bench: Bench, size: int, switches: str, results: Sequence[Result]) -> Figure:
        value, error = perplexity(results)
        name = f"{_at(bench.config, size)}, {switches}"
        return Figure(name, value, error, len(results), "number", higher_is_better=False)

    def _changes(self, bench: Bench, size: int, of_size: Mapping[str, Sequence[Result]]) -> list[Figure]:
        """Percent of perplexity at this length that each switch adds, over the windows that were read both ways."""
        found = []
        for name, (without, with_it) in CHANGES.items():
            if pairs := paired_windows(of_size, without, with_it):
                differences = [
                    after.scored.values["nats per token"] - before.scored.values["nats per token"]
                    for before, after in pairs
                ]
                center, error, count = mean(differences)
                spread = None if error is None else 100 * math.exp(center) * error
                label = f"{_at(bench.config, size)}, change by {name} in %"
                value = 100 * math.expm1(center)
                found.append(Figure(label, value, spread, count, "number", higher_is_better=False))
        return found


def lengths(bench: Bench) -> list[int]:
    """Half the training length, it, and its multiples, up to what fits the context."""
    sizes = [int(bench.config.seq_length * multiple) for multiple in MULTIPLES]
    return [size for size in sizes if 2 <= size <= bench.context_length] or [bench.context_length]


def variants(config: ModelConfig, size: int) -> dict[str, tuple[bool, bool]]:
    """What can be switched at this length, by name."""
    if size <= config.seq_length:
        return {WITHIN: (True, True)}
    has = (config.use_dynamic_ntk, config.use_logn_attn)
    return {name: on for name, on in SWITCHES.items() if not (on[0] and not has[0]) and not (on[1] and not has[1])}


def perplexity(results: Sequence[Result]) -> tuple[float, float | None]:
    """(perplexity, its standard error), of windows of one length as samples."""
    center, error, _ = mean([result.scored.values["nats per token"] for result in results])
    value = math.exp(center)
    return value, None if error is None else value * error


def figures_of(kinds: dict[tuple[int, str], list[Result]]) -> dict[tuple[int, str], float]:
    return {kind: perplexity(results)[0] for kind, results in kinds.items()}


def by_length(config: ModelConfig, values: dict[tuple[int, str], float]) -> Lines:
    """One curve per switch; within the training length they are one."""
    sizes = sorted({size for size, _ in values})
    names = [name for name in SWITCHES if any(switches == name for _, switches in values)] or [WITHIN]
    curves = [(name, [values.get((size, name), values.get((size, WITHIN))) for size in sizes]) for name in names]
    title = f"Perplexity against length (training length {config.seq_length})"
    return Lines(title, "tokens", "perplexity", sizes, curves, logarithmic=True)


def paired_windows(of_size: Mapping[str, Sequence[Result]], without: str, with_it: str) -> list[tuple[Result, Result]]:
    """The windows of one length that were read both ways."""
    before, after = (
        {result.sample.fields["window"]: result for result in of_size.get(switches, ())}
        for switches in (without, with_it)
    )
    return [(before[window], after[window]) for window in before if window in after]


def by_position(config: ModelConfig, size: int, results: Sequence[Result]) -> list[Lines]:
    """Where in the longest windows, by quarters of a training length: perplexities, and what each switch changes."""
    step = max(config.seq_length // _PARTS, 2)  # the first token is not predicted
    starts = list(range(0, size, step))
    middles = [start + step / 2 for start in starts]
    of_size = grouped((r.sample.fields["switches"], r) for r in results)

    def losses(some: Sequence[Result]) -> list[float]:
        return [_loss(some, start, start + step) for start in starts]

    perplexities = [(name, [math.exp(loss) for loss in losses(some)]) for name, some in of_size.items()]
    changes = []
    for name, (without, with_it) in CHANGES.items():
        if pairs := paired_windows(of_size, without, with_it):
            before, after = (losses(some) for some in zip(*pairs, strict=True))
            changes.append((name, [100 * math.expm1(b - a) for a, b in zip(before, after, strict=True)]))
    where = f"by position in windows of {size} tokens (training length {config.seq_length})"
    plots = [Lines(f"Perplexity {where}", "position", "perplexity", middles, perplexities, logarithmic=True)]
    if changes:
        plots.append(Lines(f"What a switch changes, {where}", "position", "% of perplexity", middles, changes))
    return plots


def _loss(results: Sequence[Result], start: int, end: int) -> float:
    """Mean loss of the tokens at these positions; log-probabilities begin with the second token."""
    losses = [-x for r in results for x in r.answer.logprobs[max(start - 1, 0) : end - 1]]
    return math.fsum(losses) / len(losses)


def _ids(result: Result) -> tuple[int, ...]:
    assert isinstance(result.sample.question, Passage)
    return result.sample.question.ids


def _at(config: ModelConfig, size: int) -> str:
    return f"{size} tokens ({size / config.seq_length:g}x)"


def _rank(switches: str) -> int:
    return list(SWITCHES).index(switches) if switches in SWITCHES else 0
