"""MMLU: 14,042 questions of 57 subjects with four options each (Hendrycks et al., arXiv:2009.03300).

A row of mmlu/test/astronomy_test.csv, which has no header (question, four options, the right one):

    "What is true for a type-Ia (""type one-a"") supernova?",This type occurs in binary systems.,This type occurs in
    young galaxies.,This type produces gamma-ray bursts.,This type produces high amounts of X-rays.,A
"""

from __future__ import annotations

from collections.abc import Sequence

from qwenlet.evals.choices import LETTERS, check_library, improved_english, published_english
from qwenlet.evals.figures import Figure
from qwenlet.evals.statistics import grouped, mean
from qwenlet.evals.task import Answer, Bench, Choices, Dialogue, Result, Sample, Scored, Summary, Task
from qwenlet.evals.tasks.exam import SHOTS, lines, options, score_likeliest, score_reply

COLUMNS = ("question", *LETTERS, "answer")
WINDOW = 2048  # of the published script; longer prompts lose their beginning

# the published script's order of subjects, which is the order of its questions here
CATEGORIES = {
    "STEM": """abstract_algebra anatomy astronomy college_biology college_chemistry college_computer_science
        college_mathematics college_physics computer_security conceptual_physics electrical_engineering
        elementary_mathematics high_school_biology high_school_chemistry high_school_computer_science
        high_school_mathematics high_school_physics high_school_statistics machine_learning""".split(),
    "Humanities": """formal_logic high_school_european_history high_school_us_history high_school_world_history
        international_law jurisprudence logical_fallacies moral_disputes moral_scenarios philosophy prehistory
        professional_law world_religions""".split(),
    "Other": """business_ethics college_medicine human_aging management marketing medical_genetics miscellaneous
        nutrition professional_accounting professional_medicine virology global_facts clinical_knowledge""".split(),
    "Social sciences": """econometrics high_school_geography high_school_government_and_politics
        high_school_macroeconomics high_school_microeconomics high_school_psychology human_sexuality
        professional_psychology public_relations security_studies sociology us_foreign_policy""".split(),
}
CATEGORY = {subject: category for category, subjects in CATEGORIES.items() for subject in subjects}


class Mmlu(Task):
    """5-shot: the likeliest of " A", " B", " C", " D" behind "Answer:"."""

    name = "mmlu"
    title = "MMLU (5-shot, likelihood)"
    kind = "likelihood"

    def samples(self, bench: Bench) -> list[Sample]:
        found = []
        for subject in CATEGORY:
            examples = bench.data.rows(f"mmlu/dev/{subject}_dev.csv", COLUMNS)
            shots = head(subject) + "".join(f"{asked(row)} {row['answer']}\n\n" for row in examples[:SHOTS])
            for number, row in enumerate(bench.data.rows(f"mmlu/test/{subject}_test.csv", COLUMNS)):
                question = Choices(shots + asked(row), tuple(f" {letter}" for letter in LETTERS), WINDOW)
                found.append(Sample(f"{subject}/{number}", question, row["answer"], subject))
        return found

    def score(self, sample: Sample, answer: Answer, bench: Bench) -> Scored:
        return score_likeliest(sample, answer)

    def summary(self, results: Sequence[Result], bench: Bench) -> Summary:
        return summary(self, results)


class MmluChat(Task):
    """0-shot: the question alone, answered in the model's own words."""

    name = "mmlu-chat"
    title = "MMLU (0-shot, chat)"
    kind = "generation"
    chat = True
    measures = ("published", "improved")

    def samples(self, bench: Bench) -> list[Sample]:
        check_library()
        return [
            Sample(
                f"{subject}/{number}",
                Dialogue.ask(INSTRUCTION + row["question"] + lines(row) + "\n"),
                row["answer"],
                subject,
                {"question": row["question"], "options": options(row)},
            )
            for subject in CATEGORY
            for number, row in enumerate(bench.data.rows(f"mmlu/test/{subject}_test.csv", COLUMNS))
        ]

    def score(self, sample: Sample, answer: Answer, bench: Bench) -> Scored:
        return score_reply(sample, answer, published_english, improved_english)

    def summary(self, results: Sequence[Result], bench: Bench) -> Summary:
        return summary(self, results)


INSTRUCTION = (
    "The following is a multiple-choice question. Please choose the most suitable one among A, B, C and D as the "
    "answer to this question.\n\n"
)


def head(subject: str) -> str:
    return f"The following are multiple choice questions (with answers) about {subject.replace('_', ' ')}.\n\n"


def asked(row: dict[str, str]) -> str:
    """A question with its options, up to where the answer is due."""
    return f"Question: {row['question']}{lines(row)}\nAnswer:"


def summary(task: Task, results: Sequence[Result]) -> Summary:
    """As published: the share over all questions, and over those of each of four categories."""
    figures = [Figure(m, *mean([result.scored.values[m] for result in results])) for m in task.measures]
    first = task.measures[0]
    categories = grouped((CATEGORY[result.sample.group], result.scored.values[first]) for result in results)
    figures += [Figure(category, *mean(categories[category])) for category in CATEGORIES if category in categories]
    return Summary((*figures, *task.by_group(results)))
