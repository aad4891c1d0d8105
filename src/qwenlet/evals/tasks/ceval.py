"""C-Eval: 13,948 questions of 52 Chinese subjects (Huang et al., arXiv:2305.08322).

A row of ceval/val/law_val.csv (the test set has no column `answer`: its keys are not public):

    id,question,A,B,C,D,answer
    0,下列关于法律推理的表述，能够成立的是____。,演绎推理是一种或然性推理,归纳推理是从一般知识推出个别知识的推理,类比推理是判例法国家
    运用的一种基本的法律推理方法,辩证推理实际上是一种立法活动,C
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence

from qwenlet.evals.choices import check_library, improved_chinese, published_chinese
from qwenlet.evals.figures import Figure
from qwenlet.evals.statistics import grouped, mean
from qwenlet.evals.task import Answer, Bench, Choices, Dialogue, Result, Sample, Scored, Summary, Task
from qwenlet.evals.tasks.exam import LETTERS, SHOTS, Row, lines, macro_summary, options, score_likeliest, score_reply

HARD = """advanced_mathematics discrete_mathematics probability_and_statistics college_physics college_chemistry
    high_school_mathematics high_school_physics high_school_chemistry""".split()
TITLES = {"STEM": "STEM", "Social Science": "Social sciences", "Humanities": "Humanities", "Other": "Other"}
MAPPING = "ceval/subject_mapping.json"
KEYS = "ceval/test_answers.json"  # for those who have them: {subject: {id: letter}}, as the submission


class Ceval(Task):
    """5-shot: the likeliest of "A", "B", "C", "D" behind "答案："."""

    name = "ceval"
    title = "C-Eval, validation (5-shot, likelihood)"
    kind = "likelihood"

    def samples(self, bench: Bench) -> list[Sample]:
        found = []
        for subject in subjects(bench):
            examples = bench.data.rows(f"ceval/dev/{subject}_dev.csv")
            shots = "".join(f"{asked(row)}{row['answer']}\n\n" for row in examples[:SHOTS])
            for row in bench.data.rows(f"ceval/val/{subject}_val.csv"):
                found.append(
                    Sample(f"{subject}/{row['id']}", Choices(shots + asked(row), LETTERS), row["answer"], subject)
                )
        return found

    def score(self, sample: Sample, answer: Answer, bench: Bench) -> Scored:
        return score_likeliest(sample, answer)

    def summary(self, results: Sequence[Result], bench: Bench) -> Summary:
        return macro_summary(self, results, categories(bench))


class CevalChat(Task):
    """0-shot, validation set: the question alone, answered in the model's own words."""

    name = "ceval-chat"
    title = "C-Eval, validation (0-shot, chat)"
    kind = "generation"
    chat = True
    measures = ("published", "improved")
    split = "val"

    def samples(self, bench: Bench) -> list[Sample]:
        check_library()
        keys = self.keys(bench)
        return [
            Sample(
                f"{subject}/{row['id']}",
                Dialogue.ask(f"{row['question']}\n{lines(row)}\n"),
                row["answer"] if "answer" in row else keys.get(subject, {}).get(row["id"]),
                subject,
                {"question": row["question"], "options": options(row)},
            )
            for subject in subjects(bench)
            for row in bench.data.rows(f"ceval/{self.split}/{subject}_{self.split}.csv")
        ]

    def keys(self, bench: Bench) -> Mapping[str, Mapping[str, str]]:
        return {}

    def score(self, sample: Sample, answer: Answer, bench: Bench) -> Scored:
        return score_reply(sample, answer, published_chinese, improved_chinese)

    def summary(self, results: Sequence[Result], bench: Bench) -> Summary:
        return macro_summary(self, results, categories(bench))


class CevalTest(CevalChat):
    """0-shot, test set, whose keys are not public: writes what the leaderboard wants, scores where keys are given."""

    name = "ceval-test"
    title = "C-Eval, test (0-shot, chat)"
    split = "test"

    def keys(self, bench: Bench) -> Mapping[str, Mapping[str, str]]:
        return bench.data.json(KEYS) if bench.data.has(KEYS) else {}

    def summary(self, results: Sequence[Result], bench: Bench) -> Summary:
        files = {f"submission-{rule}.json": submission(results, rule) for rule in self.measures}
        if all(result.sample.target is not None for result in results):
            scored = macro_summary(self, results, categories(bench))
            return Summary(scored.figures, scored.plots, files)
        said = [float(result.scored.extracted.get("improved") is not None) for result in results]
        by_subject = grouped((result.sample.group, value) for result, value in zip(results, said, strict=True))
        figures = [Figure("answered (no keys, so no score)", *mean(said))]
        for category, members in categories(bench).items():
            values = [value for subject in members for value in by_subject.get(subject, ())]
            figures += [Figure(f"{category}, answered", *mean(values))] if values else []
        return Summary(tuple(figures), files=files)


def submission(results: Sequence[Result], rule: str) -> str:
    """{subject: {id: letter}}, as the leaderboard takes it; an unread answer is an empty one."""
    letters: dict[str, dict[str, str]] = {}
    for result in results:
        letter = result.scored.extracted.get(rule) or ""
        letters.setdefault(result.sample.group, {})[result.sample.id.rpartition("/")[2]] = letter
    return json.dumps(letters, ensure_ascii=False, indent=1) + "\n"


def subjects(bench: Bench) -> list[str]:
    """In the published order."""
    return list(bench.data.json(MAPPING))


def categories(bench: Bench) -> dict[str, list[str]]:
    members = grouped((TITLES[entry[2]], subject) for subject, entry in bench.data.json(MAPPING).items())
    return {title: members[title] for title in TITLES.values() if title in members} | {"Hard": HARD}


def asked(row: Row) -> str:
    """A question with its options, up to where the answer is due."""
    return f"问题：{row['question']}{lines(row)}\n答案："
