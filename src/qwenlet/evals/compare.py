"""Two runs over the same samples: is one better, or is it chance?"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from qwenlet.errors import EvalError
from qwenlet.evals.records import Record, Settings, read_log
from qwenlet.evals.statistics import Paired, paired


@dataclass(frozen=True)
class Side:
    """One task of a run at one precision."""

    settings: Settings
    records: dict[str, Record]


@dataclass(frozen=True)
class Comparison:
    """One measure of one task.

    Attributes:
        first, second: precisions, or models where those are what differs.
        left_out: samples that only one side has, or that were asked differently.
    """

    task: str
    measure: str
    first: str
    second: str
    result: Paired
    left_out: int


def compare(first: str, second: str) -> list[Comparison]:
    """Every task that both have. A run is a folder, or FOLDER:PRECISION.

    Precisions are paired by name; where each side has one of a task, those are paired.

    Raises:
        EvalError: nothing to compare, or files that can't be read.
    """
    left, right = sides(first), sides(second)
    pairs = [(a, b) for a in left for b in right if a.settings.task == b.settings.task and _belong(a, b, left, right)]
    found = [comparison for a, b in pairs for comparison in between(a, b)]
    if not found:
        raise EvalError(
            f"{first} and {second} have no task in common whose samples could be paired",
            hint="both need the same tasks, the same --seed, and precisions of one name (or name one: RUN:int4)",
        )
    return found


def sides(run: str) -> list[Side]:
    """All of a run, or what it has at one precision."""
    folder, colon, precision = run.rpartition(":") if not Path(run).is_dir() else (run, "", "")
    path = Path(folder if colon else run)
    files = sorted((path / "samples").glob("*.jsonl"))
    if not files:
        raise EvalError(f"{run} is no run: {path / 'samples'} has no samples", hint="give a folder that --out named")
    found = [Side(settings, {r.id: r for r in records}) for settings, records in map(read_log, files)]
    if colon and not any(side.settings.precision == precision for side in found):
        known = sorted({side.settings.precision for side in found})
        raise EvalError(f"{path} has nothing at {precision!r}; it has {', '.join(known)}")
    return [side for side in found if not colon or side.settings.precision == precision]


def _belong(a: Side, b: Side, left: list[Side], right: list[Side]) -> bool:
    alone = all(sum(s.settings.task == a.settings.task for s in side) == 1 for side in (left, right))
    return alone or a.settings.precision == b.settings.precision


def between(a: Side, b: Side) -> Iterator[Comparison]:
    """Every measure that both sides have."""
    common = [id for id, record in a.records.items() if _same_question(record, b.records.get(id))]
    names = _names(a.settings, b.settings)
    # a measure may belong to some questions only, such as false alarms to those that need no tool
    for measure in dict.fromkeys(name for id in common for name in a.records[id].scored.values):
        ids = [id for id in common if all(measure in side.records[id].scored.values for side in (a, b))]
        if ids:
            values = [[side.records[id].scored.values[measure] for id in ids] for side in (a, b)]
            asked = sum(measure in one.scored.values for side in (a, b) for one in side.records.values())
            yield Comparison(a.settings.task, measure, *names, paired(*values), asked - 2 * len(ids))


def _same_question(record: Record, other: Record | None) -> bool:
    return other is not None and record.prompt_sha256 == other.prompt_sha256


def _names(a: Settings, b: Settings) -> tuple[str, str]:
    if a.model == b.model:
        return a.precision, b.precision
    return f"{a.model}, {a.precision}", f"{b.model}, {b.precision}"
