"""What exams of four options have in common: prompts, scores, means over subjects."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from qwenlet.evals.choices import LETTERS as LETTERS
from qwenlet.evals.choices import Rule
from qwenlet.evals.figures import Figure
from qwenlet.evals.statistics import grouped, mean_of_means
from qwenlet.evals.task import Answer, Result, Sample, Scored, Summary, Task

SHOTS = 5

Row = Mapping[str, str]


def options(row: Row) -> dict[str, str]:
    return {letter: row[letter] for letter in LETTERS}


def lines(row: Row) -> str:
    """The four options, a line each."""
    return "".join(f"\n{letter}. {row[letter]}" for letter in LETTERS)


def score_likeliest(sample: Sample, answer: Answer) -> Scored:
    """Right where the likeliest option is the target's."""
    if answer.error is not None:
        return Scored({"accuracy": 0.0})
    chosen = LETTERS[answer.likeliest]
    return Scored({"accuracy": float(chosen == sample.target)}, {"likeliest": chosen})


def score_reply(sample: Sample, answer: Answer, published: Rule, improved: Rule) -> Scored:
    """Right by the published rules, and by ours; without a target (a test without keys) nothing is."""
    if answer.error is not None:
        return Scored({"published": 0.0, "improved": 0.0})
    read = {
        name: rule(answer.text, sample.fields["question"], sample.fields["options"])
        for name, rule in (("published", published), ("improved", improved))
    }
    return Scored(
        {name: float(one.letter is not None and one.letter == sample.target) for name, one in read.items()},
        {name: one.letter for name, one in read.items()},
        tuple(name for name, one in read.items() if one.guessed),
    )


def macro_summary(task: Task, results: Sequence[Result], categories: Mapping[str, Sequence[str]]) -> Summary:
    """Every subject weighs the same: the mean over all subjects, and over those of each category."""
    figures = []
    for measure in task.measures:
        subjects = grouped((result.sample.group, result.scored.values[measure]) for result in results)
        figures.append(Figure(measure, *mean_of_means(subjects.values())))
    subjects = grouped((result.sample.group, result.scored.values[task.measures[0]]) for result in results)
    for category, members in categories.items():
        if chosen := [subjects[subject] for subject in members if subject in subjects]:
            figures.append(Figure(category, *mean_of_means(chosen)))
    return Summary((*figures, *task.by_group(results)))
