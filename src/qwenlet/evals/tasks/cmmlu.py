"""CMMLU: 11,582 questions of 67 subjects, many of them about China (Li et al., arXiv:2306.09212).

A row of cmmlu/test/anatomy.csv:

    ,Question,A,B,C,D,Answer
    0,女性生殖腺是,卵巢,前庭大腺,前庭球,乳腺,A
"""

from __future__ import annotations

from collections.abc import Sequence

from qwenlet.evals.task import Answer, Bench, Choices, Result, Sample, Scored, Summary, Task
from qwenlet.evals.tasks.ceval import asked
from qwenlet.evals.tasks.exam import LETTERS, SHOTS, macro_summary, score_likeliest

CATEGORIES = {
    "STEM": """anatomy astronomy college_actuarial_science college_engineering_hydrology college_mathematics
        college_medical_statistics computer_science conceptual_physics electrical_engineering elementary_mathematics
        genetics high_school_biology high_school_chemistry high_school_mathematics high_school_physics machine_learning
        virology""".split(),
    "Humanities": """arts chinese_history chinese_literature college_law global_facts international_law jurisprudence
        logical marxist_theory philosophy professional_law world_history world_religions""".split(),
    "Social sciences": """ancient_chinese business_ethics chinese_civil_service_exam chinese_food_culture
        chinese_foreign_policy chinese_teacher_qualification college_education economics education elementary_chinese
        ethnology high_school_geography high_school_politics journalism management marketing modern_chinese
        professional_accounting professional_psychology public_relations security_study sociology""".split(),
    "Other": """agronomy chinese_driving_rule clinical_knowledge college_medicine computer_security
        construction_project_management elementary_commonsense elementary_information_and_technology food_science
        human_sexuality legal_and_moral_basis nutrition professional_medicine sports_science
        traditional_chinese_medicine""".split(),
}
CHINA = """ancient_chinese chinese_civil_service_exam chinese_driving_rule chinese_food_culture chinese_foreign_policy
    chinese_history chinese_literature chinese_teacher_qualification construction_project_management elementary_chinese
    elementary_commonsense ethnology high_school_politics modern_chinese traditional_chinese_medicine""".split()


class Cmmlu(Task):
    """5-shot: the likeliest of "A", "B", "C", "D" behind "答案："."""

    name = "cmmlu"
    title = "CMMLU (5-shot, likelihood)"
    kind = "likelihood"

    def samples(self, bench: Bench) -> list[Sample]:
        found = []
        for subject in sorted(subject for members in CATEGORIES.values() for subject in members):
            shown = [_row(row) for row in bench.data.rows(f"cmmlu/dev/{subject}.csv")[:SHOTS]]
            shots = "".join(f"{asked(row)}{row['answer']}\n\n" for row in shown)
            for number, raw in enumerate(bench.data.rows(f"cmmlu/test/{subject}.csv")):
                row = _row(raw)
                question = Choices(shots + asked(row), LETTERS)
                found.append(Sample(f"{subject}/{number}", question, row["answer"], subject))
        return found

    def score(self, sample: Sample, answer: Answer, bench: Bench) -> Scored:
        return score_likeliest(sample, answer)

    def summary(self, results: Sequence[Result], bench: Bench) -> Summary:
        return macro_summary(self, results, CATEGORIES | {"China specific": CHINA})


def _row(row: dict[str, str]) -> dict[str, str]:
    """With C-Eval's names of columns."""
    return {**{letter: row[letter] for letter in LETTERS}, "question": row["Question"], "answer": row["Answer"]}
