"""The report of a run, in the card's layout: sections of tables and plots, written as Markdown, JSON and HTML.

Ours stands beside the card's figure and its peers', precision by precision, with sample sizes and standard errors; what
was not run, not read or not answered is said.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from qwenlet.evals import card, tasks
from qwenlet.evals.compare import between, sides
from qwenlet.evals.document import Report, Section, Table
from qwenlet.evals.figures import Bars, Figure, plot_from_json
from qwenlet.evals.page import html
from qwenlet.evals.run import read_results
from qwenlet.tokenizer_formats import write_atomically

MISSING = "not run"
_NAMED = 5  # ids that are written out


def save(built: Report, out: Path) -> list[Path]:
    """Writes report.md, report.json and report.html, each whole or not at all."""
    texts = {
        "report.md": built.markdown(),
        "report.json": json.dumps(asdict(built), ensure_ascii=False, indent=1) + "\n",
        "report.html": html(built),
    }
    for name, text in texts.items():
        write_atomically(out / name, text.encode())
    return [out / name for name in texts]


def report(out: Path) -> Report:
    """The report of a run's folder, from its results and samples.

    Raises:
        EvalError: the folder has none, or they are damaged.
    """
    results = read_results(out)
    outcomes = [_Outcome(raw) for raw in results["outcomes"]]
    outcomes.sort(key=lambda one: (_task_order(one.task), _precision_order(one.precision)))
    sections = [
        _quality(outcomes),
        *_ceval_test(outcomes),
        _peers(outcomes, results["model"]),
        _everything(outcomes),
        *_parts(outcomes),
        *_precisions(out),
        *_curves(outcomes),
        _not_read(outcomes),
        _not_run(outcomes),
        _made(results, outcomes),
    ]
    return Report(f"Evaluation of {results['model']}", sections)


class _Outcome:
    """An outcome as results.json has it."""

    def __init__(self, raw: Mapping[str, Any]) -> None:
        self.raw = raw
        self.task, self.title, self.precision = raw["task"], raw["title"], raw["precision"]
        self.count, self.available = raw["count"], raw["available"]
        self.figures = [Figure(**figure) for figure in raw["summary"]["figures"]]
        self.plots = [plot_from_json(plot) for plot in raw["summary"]["plots"]]

    @property
    def main(self) -> Figure:
        return self.figures[0]


# ------------------------------------------------------------------------------------------------------- sections


def _quality(outcomes: Sequence[_Outcome]) -> Section:
    """The card's quality table."""
    found = {(one.task, one.precision): one for one in outcomes}
    precisions = _unique([*card.BY_PRECISION["mmlu-chat"], *(one.precision for one in outcomes)])
    rows = []
    for precision in precisions:
        cells = []
        for task in card.QUALITY.values():
            one = found.get((task, precision))
            theirs = card.BY_PRECISION[task].get(precision)
            shown = MISSING if one is None else f"{one.main.text()} (n={one.count})"
            cells.append(f"{shown}; card {theirs}" if theirs is not None else shown)
        rows.append([precision, *cells])
    text = (
        "The card's table of the chat model by precision, zero-shot, by the published readings of replies. Ours ± "
        f"standard error, or (Wilson's 95 % interval) where all samples agree; the card's figure is {card.CHAT}'s."
    )
    return Section("Quality by precision", text, [Table(["precision", *card.QUALITY], rows)])


def _ceval_test(outcomes: Sequence[_Outcome]) -> list[Section]:
    ours = [one for one in outcomes if one.task == "ceval-test"]
    rows = [[name, *("" if value is None else f"{value}" for value in row)] for name, row in card.CEVAL_TEST.items()]
    text = "The keys of the test set are not public. "
    for one in ours:
        by_name = {figure.name: figure for figure in one.figures}
        if "published" in by_name:
            names = ["published", *card.CEVAL_TEST_COLUMNS[1:]]
            cells = [by_name[name].text() if name in by_name else MISSING for name in names]
            rows.append([f"ours, {one.precision} (n={one.count})", *cells])
        else:
            text += f"At {one.precision}, {one.main.text()} % of {one.count} replies named a choice; the submission is "
            text += "in files/. "
    if not ours:
        rows.append(["ours", MISSING, "", "", "", ""])
    return [Section("C-Eval, test", text, [Table(["model", *card.CEVAL_TEST_COLUMNS], rows)])]


def _peers(outcomes: Sequence[_Outcome], model: str) -> Section:
    """The card's lists of peers, ours among them by its figure."""
    tables, plots = [], []
    for title, task in card.QUALITY.items():
        ours = [one for one in outcomes if one.task == task]
        entries = [(name, f"{value:.1f}", value, 0.0, "card") for name, value in card.PEERS[task].items()]
        for one in ours:
            main, source = one.main, f"ours, n={one.count}"
            name = f"{model}, {one.precision}"
            entries.append((name, main.text(), 100 * main.value, 100 * (main.error or 0.0), source))
        entries.sort(key=lambda entry: entry[2])
        rows = [[name if source == "card" else f"**{name}**", shown, source] for name, shown, _, _, source in entries]
        if not ours:
            rows.append([f"**{model}**", MISSING, ""])
        tables.append(Table([title, "%", "source"], rows))
        plots.append(
            Bars(
                title,
                [name for name, *_ in entries],
                [value for _, _, value, *_ in entries],
                [error for *_, error, _ in entries],
                [source != "card" for *_, source in entries],
            )
        )
    return Section("Beside the card's peers", "Zero-shot, in percent; lowest first.", tables, plots)


def _everything(outcomes: Sequence[_Outcome]) -> Section:
    rows = []
    for one in outcomes:
        published = card.published(one.task, one.precision)
        theirs = "" if published is None else f"{published[1]} ({published[0]})"
        for number, figure in enumerate(figure for figure in one.figures if not figure.part):
            lead = [one.title, one.precision, f"{one.count} of {one.available}"] if number == 0 else ["", "", ""]
            rows.append([*lead, figure.name, figure.text(), theirs if number == 0 else ""])
    text = (
        "± standard error. Shares in percent. Fewer samples than there are: a fixed random choice of them. "
        "Where all samples agree that is 0 and says nothing: (low to high) is Wilson's 95 % interval then."
    )
    return Section("All figures", text, [Table(["task", "precision", "samples", "figure", "ours", "published"], rows)])


def _parts(outcomes: Sequence[_Outcome]) -> list[Section]:
    """Subjects, one column per precision."""
    tables = []
    for task in _unique([one.task for one in outcomes]):
        of_task = [one for one in outcomes if one.task == task]
        columns = [{figure.name: figure for figure in one.figures if figure.part} for one in of_task]
        names = _unique([name for column in columns for name in column])
        if not names:
            continue
        rows = [
            [name, *(f"{column[name].text()} ({column[name].count})" if name in column else "" for column in columns)]
            for name in names
        ]
        tables.append(Table([of_task[0].title, *(one.precision for one in of_task)], rows))
    return [Section("By subject", "Each with its number of samples.", tables)] if tables else []


def _precisions(out: Path) -> list[Section]:
    """Every precision against the first, sample by sample."""
    found = sides(str(out))
    rows = []
    for task in _unique([side.settings.task for side in found]):
        of_task = sorted(
            (s for s in found if s.settings.task == task), key=lambda s: _precision_order(s.settings.precision)
        )
        for other in of_task[1:]:
            for one in between(of_task[0], other):
                result = one.result
                rows.append(
                    [
                        task, one.measure, f"{one.first} to {one.second}", f"{result.difference:+.4f}",
                        f"{result.low:+.4f} to {result.high:+.4f}", f"{result.better} / {result.worse}",
                        f"{result.p_value:.3f}", result.test, str(result.count),
                    ]
                )  # fmt: skip
    if not rows:
        return []
    head = ["task", "measure", "from", "difference", "95 %", "better / worse", "p", "test", "samples"]
    text = "The same samples at two precisions: the difference of the means, and how likely one so large is by chance."
    return [Section("What precision costs", text, [Table(head, rows)])]


def _curves(outcomes: Sequence[_Outcome]) -> list[Section]:
    plots = [plot for one in outcomes for plot in one.plots]
    return [Section("Curves and maps", "Drawn in report.html.", plots=plots)] if plots else []


def _not_read(outcomes: Sequence[_Outcome]) -> Section:
    rows = []
    for one in outcomes:
        what = [(f"no answer found by the {rule} rule", ids) for rule, ids in one.raw["unread"].items()]
        what += [(f"guessed by the {rule} rule", ids) for rule, ids in one.raw["guessed"].items()]
        what += [("cut at the length limit", one.raw["cut"]), ("not answered", list(one.raw["unanswered"]))]
        for name, ids in what:
            if ids:
                shown = ", ".join(ids[:_NAMED]) + (" ..." if len(ids) > _NAMED else "")
                rows.append([one.task, one.precision, name, f"{len(ids)} of {one.count}", shown])
    text = "Counted as wrong, except what a published rule guessed right. results.json lists all of them."
    return Section("What could not be read", text, [Table(["task", "precision", "what", "how many", "which"], rows)])


def _not_run(outcomes: Sequence[_Outcome]) -> Section:
    run = {one.task.partition(":")[0] for one in outcomes}
    rest = [name for name in tasks.TASKS if name not in run]
    lines = [f"* {tasks.get(name).title} (`{name}`)" for name in rest]
    precisions = _unique([one.precision for one in outcomes])
    for task in _unique([one.task for one in outcomes]):
        if missing := [p for p in precisions if (task, p) not in {(o.task, o.precision) for o in outcomes}]:
            lines.append(f"* `{task}` at {', '.join(missing)}")
    part = _unique([f"`{o.task}` ({o.count} of {o.available} samples)" for o in outcomes if o.count < o.available])
    if part:
        lines.append(f"* in part only: {', '.join(part)}")
    return Section("What was not run", "\n".join(lines) or "Everything was run.")


def _made(results: Mapping[str, Any], outcomes: Sequence[_Outcome]) -> Section:
    rows = []
    for one in outcomes:
        made = one.raw["settings"]
        row = [made["precision"], made["quantization"], made["kv_cache"], made["weights"][:12], made["version"]]
        if row not in rows:
            rows.append(row)
    text = f"Model {results['model']}, seed {results['seed']}, greedy unless a task says otherwise."
    if results["altered_data"]:
        text += f" Data files that differ from the published ones: {', '.join(results['altered_data'])}."
    return Section(
        "How it was made", text, [Table(["precision", "weights", "keys and values", "files", "qwenlet"], rows)]
    )


# --------------------------------------------------------------------------------------------------------- helpers


def _unique(items: Sequence[str]) -> list[str]:
    return list(dict.fromkeys(items))


def _task_order(name: str) -> tuple[int, str]:
    known = list(tasks.TASKS)
    base = name.partition(":")[0]
    return (known.index(base) if base in known else len(known), name)


def _precision_order(name: str) -> int:
    known = ["fp32", "fp16", "bf16", "int8", "int4", "as-is"]
    return known.index(name) if name in known else len(known)
