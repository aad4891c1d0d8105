"""What a summary is made of: figures with their errors, and plots as data. No drawing in here."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from qwenlet.evals.statistics import wilson


@dataclass(frozen=True)
class Figure:
    """One number of a report.

    Attributes:
        name: what was measured.
        value: a share is from 0 to 1; the report shows it in percent.
        error: standard error of `value`; None where there is none.
        count: samples behind it.
        unit: "share" or "number".
        part: one of many parts (a subject of an exam), shown apart from the main figures.
        higher_is_better: False for a perplexity, for example.
    """

    name: str
    value: float
    error: float | None
    count: int
    unit: Literal["share", "number"] = "share"
    part: bool = False
    higher_is_better: bool = True

    def text(self) -> str:
        """For people: 43.3 ± 0.4 of a share, 12.34 ± 0.05 of a number.

        Where all samples agree the standard error is 0 and says nothing: 0.0 (0.0 to 8.8), Wilson's 95 % interval.
        """
        factor, digits = (100.0, 1) if self.unit == "share" else (1.0, 2)
        shown = f"{factor * self.value:.{digits}f}"
        if self.error is None:
            return shown
        if self.error == 0.0 and self.unit == "share" and self.value in (0.0, 1.0):
            low, high = wilson(self.value, self.count)
            return f"{shown} ({100 * low:.1f} to {100 * high:.1f})"
        return f"{shown} ± {factor * self.error:.{digits}f}"


@dataclass(frozen=True)
class Bars:
    """A number, and perhaps its error, for each name; `ours` are drawn apart."""

    title: str
    names: Sequence[str]
    values: Sequence[float]
    errors: Sequence[float | None]
    ours: Sequence[bool]
    kind: Literal["bars"] = "bars"


@dataclass(frozen=True)
class Lines:
    """Curves over a common axis: `curves` are (name, one value per x or None where there is none).

    Attributes:
        logarithmic: the axis of values; that of x is marked at its values, one step from each to the next.
    """

    title: str
    x_name: str
    y_name: str
    x: Sequence[float]
    curves: Sequence[tuple[str, Sequence[float | None]]]
    logarithmic: bool = False
    kind: Literal["lines"] = "lines"


@dataclass(frozen=True)
class HeatMap:
    """A share, or None, for each row and column."""

    title: str
    x_name: str
    y_name: str
    columns: Sequence[str]
    rows: Sequence[str]
    values: Sequence[Sequence[float | None]]
    kind: Literal["heat map"] = "heat map"


Plot = Bars | Lines | HeatMap


def plot_from_json(raw: Mapping[str, Any]) -> Plot:
    """A plot as `dataclasses.asdict` made it plain."""
    kinds: dict[str, type[Plot]] = {"bars": Bars, "lines": Lines, "heat map": HeatMap}
    return kinds[raw["kind"]](**raw)
