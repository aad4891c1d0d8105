"""A profile as Markdown: the card's two tables and the others, ours beside the card's figures."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from statistics import median

from qwenlet.profiling import card
from qwenlet.profiling.records import Ceilings, Profile, Row


def markdown(profile: Profile) -> str:
    """The whole report."""
    state = "" if profile.finished else " (not finished)"
    parts = [
        f"# Profile of {profile.model}{state}",
        f"{profile.parameters:,} parameters; {profile.machine}; {profile.started}.",
        _ceilings(profile.ceilings),
    ]
    for title, rows, table in (
        ("Generating from one token", ("generate",), _generating),
        ("Peak memory", ("generate", "encode"), _memory),
        ("Reading prompts", ("prefill", "encode"), _prompts),
        ("Several replies at once", ("batch",), _batches),
    ):
        chosen = [row for row in profile.rows if row.kind in rows and row.problem is None]
        if text := table(chosen, profile) if chosen else "":
            parts += [f"## {title}", text]
    if peers := [row for row in profile.rows if row.kind.startswith("peer ") and row.problem is None]:
        parts += ["## Against transformers, the same weights", _peers(peers)]
    if problems := [row for row in profile.rows if row.problem is not None]:
        parts += ["## Not measured", "\n".join(f"* {_job(row)}: {row.problem}" for row in problems)]
    notes = [*profile.notes, *_notes(profile)]
    parts += ["## How", "\n".join(f"* {note[0].upper()}{note[1:]}." for note in notes)]
    return "\n\n".join(parts) + "\n"


def _notes(profile: Profile) -> Iterator[str]:
    weights = ", ".join(f"{name} {size / 1e9:.2f} GB" for name, size in profile.weights.items())
    yield f"a decoded token reads every weight but the embedding: {weights}; and what is stored of the tokens before"
    if profile.machine.device == "cpu":
        yield (
            "memory is what was resident of a process of its own (VmHWM): Python, torch and loading are among it, the "
            "model card's is a GPU's"
        )
    else:
        yield "memory is what the GPU's allocator gave at most (max_memory_allocated)"
    if any(row.card_speed is not None or row.card_peak is not None for row in profile.rows):
        yield f"the card's figures are of one {card.HARDWARE} with flash attention, or without it beside our math"


def _ceilings(ceilings: Ceilings) -> str:
    rows = [["memory, read", _rate(ceilings.read, "B/s"), ceilings.how["read"]]]
    for name, value in ceilings.operations.items():
        rows.append([f"products, {name}", _rate(value, "op/s"), ceilings.how[name]])
    return _table(["this machine's ceilings", "measured", "how"], rows)


def _generating(rows: Sequence[Row], profile: Profile) -> str:
    columns = ["precision", "attention", "tokens", "tokens/s", "GB/s", "share", f"card, {card.HARDWARE}, tokens/s"]
    lines = [
        [
            row.precision, row.attention, _length(row), _number(row.speed), _number(_giga(row.bytes_per_second)),
            _share(row), _number(row.card_speed, 2),
        ]
        for row in rows
    ]  # fmt: skip
    return _table(*_without_empty_last(columns, lines))


def _memory(rows: Sequence[Row], profile: Profile) -> str:
    columns = ["precision", "attention", "work", "peak, GB", f"card, {card.HARDWARE}, GB"]
    lines = [
        [
            row.precision, row.attention,
            f"reading {_length(row)}, generating 1" if row.kind == "encode" else f"generating {_length(row)}",
            _number(_giga(row.peak), 2), _number(_giga(row.card_peak), 2),
        ]
        for row in rows
        if row.peak is not None
    ]  # fmt: skip
    return _table(*_without_empty_last(columns, lines)) if lines else ""


def _prompts(rows: Sequence[Row], profile: Profile) -> str:
    columns = ["precision", "attention", "prompt", "tokens/s", "to the first token, s", "Gop/s", "share"]
    read = sorted((row for row in rows if row.kind == "prefill"), key=lambda row: profile.rows.index(row))
    return _table(columns, ([
        row.precision, row.attention, _length(row), _number(row.speed), _number(row.first_token_seconds, 3),
        _number(_giga(row.operations_per_second), 0), _share(row),
    ] for row in read)) if read else ""  # fmt: skip


def _batches(rows: Sequence[Row], profile: Profile) -> str:
    columns = ["precision", "attention", "replies", "tokens/s in all", "of each", "GB/s", "Gop/s", "share"]
    return _table(columns, ([
        row.precision, row.attention, f"{row.batch}{_cut(row)}", _number(row.speed),
        _number(None if row.speed is None else row.speed / row.batch), _number(_giga(row.bytes_per_second)),
        _number(_giga(row.operations_per_second), 0), _share(row),
    ] for row in rows))  # fmt: skip


def _peers(rows: Sequence[Row]) -> str:
    lines = []
    ours = [row for row in rows if row.side == "qwenlet"]
    for row in ours:
        theirs = next(
            other for other in rows
            if other.side != "qwenlet" and (other.kind, other.precision) == (row.kind, row.precision)
        )  # fmt: skip
        work = f"a prompt of {row.prompt}" if row.kind == "peer prefill" else f"{_both(row, theirs)} tokens from one"
        lines.append([row.precision, work, _number(row.speed), _number(theirs.speed), f"{ratio(row, theirs):.2f}"])
    return _table(["precision", "work", "qwenlet, tokens/s", "transformers, tokens/s", "ratio"], lines)


def ratio(ours: Row, theirs: Row) -> float:
    """How many times faster ours is: the median over rounds that ran in turn."""
    pairs = zip(ours.seconds, theirs.seconds, strict=True)
    return median((ours.done / mine) / (theirs.done / other) for mine, other in pairs)


# -------------------------------------------------------------------------------------------------------- cells


def _job(row: Row) -> str:
    if not row.kind:
        return row.precision
    what = f"{row.batch} replies" if row.kind == "batch" else f"{row.kind} {row.asked:,}"
    return f"{row.precision}, attention {row.attention}, {what}"


def _length(row: Row) -> str:
    return f"first {row.done:,} of {row.asked:,}" if row.cut else f"{row.asked:,}"


def _both(ours: Row, theirs: Row) -> str:
    if ours.cut or theirs.cut:
        return f"first {ours.done:,} and {theirs.done:,} of {ours.tokens:,}"
    return f"{ours.tokens:,}"


def _cut(row: Row) -> str:
    return f" (first {row.done} of {row.asked} tokens)" if row.cut else ""


def _share(row: Row) -> str:
    return "" if row.share is None else f"{row.share:.0%} of {row.bound}"


def _giga(value: float | None) -> float | None:
    return None if value is None else value / 1e9


def _number(value: float | None, digits: int = 1) -> str:
    return "" if value is None else f"{value:,.{digits}f}"


def _rate(value: float, unit: str) -> str:
    return f"{value / 1e12:.2f} T{unit}" if value >= 1e12 else f"{value / 1e9:.1f} G{unit}"


def _without_empty_last(columns: list[str], lines: list[list[str]]) -> tuple[list[str], list[list[str]]]:
    """A model that isn't the card's needs no column for it."""
    if any(line[-1] for line in lines):
        return columns, lines
    return columns[:-1], [line[:-1] for line in lines]


def _table(columns: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [columns, ["---"] * len(columns), *rows]
    return "\n".join(f"| {' | '.join(cell.replace('|', ' ') for cell in line)} |" for line in lines)
