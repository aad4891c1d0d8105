"""A profile as a PNG: speed beside the card's, memory, prompts and several replies at once."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from qwenlet.errors import MissingExtraError
from qwenlet.profiling import card
from qwenlet.profiling.records import Profile, Row


def write_png(profile: Profile, path: Path) -> None:
    """Writes the picture, whole or not at all.

    Raises:
        MissingExtraError: matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise MissingExtraError("matplotlib", "profile", "the plot of a profile") from error
    figure = Figure(figsize=(12, 8), layout="constrained")
    figure.suptitle(f"{profile.model} on {profile.machine.name}")
    speed, memory, prompts, batches = figure.subplots(2, 2).flat
    rows = [row for row in profile.rows if row.problem is None]
    _bars(speed, [row for row in rows if row.kind == "generate"], "tokens/s from one token",
          lambda row: row.speed, lambda row: row.card_speed)  # fmt: skip
    _bars(memory, [row for row in rows if row.peak is not None and row.kind in ("generate", "encode")],
          "peak memory, GB", lambda row: (row.peak or 0) / 1e9,
          lambda row: None if row.card_peak is None else row.card_peak / 1e9)  # fmt: skip
    _lines(prompts, [row for row in rows if row.kind == "prefill"], "prompt, tokens", "tokens/s",
           lambda row: row.prompt)  # fmt: skip
    _lines(batches, [row for row in rows if row.kind == "batch"], "replies at once", "tokens/s in all",
           lambda row: row.batch)  # fmt: skip
    work = path.with_name(f".{path.name}.partial-{os.getpid()}")
    try:
        figure.savefig(work, format="png", dpi=120)
        os.replace(work, path)
    finally:
        work.unlink(missing_ok=True)


def _bars(
    axes: Any, rows: Sequence[Row], title: str, ours: Callable[[Row], float | None],
    theirs: Callable[[Row], float | None],
) -> None:  # fmt: skip
    verbs = {"encode": "reading ", "generate": ""}
    names = [f"{row.precision} {row.attention}\n{verbs[row.kind]}{row.asked:,}" for row in rows]
    at = list(range(len(rows)))
    axes.set_title(title)
    axes.bar(at, [ours(row) or 0.0 for row in rows], color="#615ced", label="measured")
    known = [(x, value) for x, row in zip(at, rows, strict=True) if (value := theirs(row)) is not None]
    if known:
        axes.plot([x for x, _ in known], [value for _, value in known], "D", color="#e4572e",
                  label=f"card, {card.HARDWARE}")  # fmt: skip
    axes.set_xticks(at, names, fontsize=7)
    if rows:
        axes.legend(fontsize=8)


def _lines(axes: Any, rows: Sequence[Row], x_name: str, y_name: str, x: Callable[[Row], int]) -> None:
    axes.set_xlabel(x_name)
    axes.set_ylabel(y_name)
    axes.set_xscale("log", base=2)
    for precision in dict.fromkeys(row.precision for row in rows):
        own = [row for row in rows if row.precision == precision]
        axes.plot([x(row) for row in own], [row.speed or 0.0 for row in own], "o-", label=precision)
    ticks = sorted({x(row) for row in rows})
    axes.set_xticks(ticks, [f"{tick:,}" for tick in ticks])
    if rows:
        axes.legend(fontsize=8)
