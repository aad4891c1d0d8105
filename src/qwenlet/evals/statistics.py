"""How sure a figure is, and whether two runs differ: standard errors, McNemar's exact test, the paired bootstrap."""

from __future__ import annotations

import math
from collections.abc import Hashable, Iterable, Sequence
from dataclasses import dataclass
from typing import TypeVar

import numpy as np

Key = TypeVar("Key", bound=Hashable)
Value = TypeVar("Value")

_RESAMPLES = 10_000


def grouped(pairs: Iterable[tuple[Key, Value]]) -> dict[Key, list[Value]]:
    """Values by key, in the order the keys came."""
    groups: dict[Key, list[Value]] = {}
    for key, value in pairs:
        groups.setdefault(key, []).append(value)
    return groups


def mean(values: Sequence[float]) -> tuple[float, float | None, int]:
    """(mean, its standard error or None for fewer than two values, how many); NaN of nothing."""
    count = len(values)
    if not count:
        return math.nan, None, 0
    center = math.fsum(values) / count
    if count == 1:
        return center, None, 1
    spread = math.fsum((value - center) ** 2 for value in values) / (count - 1)
    return center, math.sqrt(spread / count), count


def mean_of_means(groups: Iterable[Sequence[float]]) -> tuple[float, float | None, int]:
    """The mean of the groups' means, every group with the same weight, as `mean` gives it.

    The error is that of independent groups. Where most groups have one sample, what these few say of the spread within
    groups is next to nothing: then the spread of the groups' means stands for it, which can only be too large.
    """
    parts = [mean(values) for values in groups]
    center, error, _ = mean([part[0] for part in parts])
    count = sum(part[2] for part in parts)
    if count >= 2 * len(parts) > 0:
        errors = [error for _, error, _ in parts if error is not None]
        # a group of one sample has no error of its own: what the others say stands for it
        error = math.sqrt(math.fsum(e * e for e in errors) / len(errors) / len(parts))
    return center, error, count


def wilson(share: float, count: int, z: float = 1.96) -> tuple[float, float]:
    """Wilson's 95 % interval of a share of `count` samples; it says something where all of them agree, too."""
    assert count > 0, "an interval of nothing"
    center = share + z * z / (2 * count)
    spread = z * math.sqrt(share * (1 - share) / count + z * z / (4 * count * count))
    scale = 1 + z * z / count
    return max(0.0, (center - spread) / scale), min(1.0, (center + spread) / scale)


@dataclass(frozen=True)
class Paired:
    """Two runs over the same samples.

    Attributes:
        first, second: their means.
        difference: second - first, with `error`, its standard error from the differences sample by sample, and `low`
            and `high`, its 95 % interval (bootstrap over samples).
        p_value: how likely so large a difference is if neither is better. Of shares of right and wrong by McNemar's
            exact test, else by the bootstrap.
        better, worse: samples on which the second run scores higher, or lower.
        count: samples.
    """

    first: float
    second: float
    difference: float
    error: float
    low: float
    high: float
    p_value: float
    test: str
    better: int
    worse: int
    count: int


def paired(first: Sequence[float], second: Sequence[float], *, seed: int = 0) -> Paired:
    """Compares two runs sample by sample; `first[i]` and `second[i]` belong to one sample."""
    assert len(first) == len(second) > 0, f"{len(first)} and {len(second)} values can't be paired"
    a, b = np.asarray(first, dtype=np.float64), np.asarray(second, dtype=np.float64)
    differences = b - a
    better, worse = int((differences > 0).sum()), int((differences < 0).sum())
    draws = _bootstrap(differences, seed)
    low, high = np.quantile(draws, [0.025, 0.975])
    if set(np.unique(np.concatenate([a, b]))) <= {0.0, 1.0}:
        p_value, test = mcnemar(better, worse), "McNemar, exact"
    else:
        p_value, test = _two_sided(draws), "paired bootstrap"
    error = float(differences.std(ddof=1) / math.sqrt(len(a))) if len(a) > 1 else math.nan
    return Paired(
        float(a.mean()), float(b.mean()), float(differences.mean()), error, float(low), float(high),
        p_value, test, better, worse, len(a),
    )  # fmt: skip


def mcnemar(better: int, worse: int) -> float:
    """Two-sided exact p-value of `better` against `worse` disagreements, each as likely as the other."""
    count = better + worse
    if not count:
        return 1.0
    tail = sum(math.comb(count, k) for k in range(min(better, worse) + 1))
    return min(1.0, 2 * tail / 2**count)


def _bootstrap(differences: np.ndarray, seed: int) -> np.ndarray:
    """Means [_RESAMPLES] of samples drawn with replacement."""
    generator = np.random.default_rng(seed)
    count = len(differences)
    block = max(1, (1 << 22) // count)  # a few MB at a time
    parts = [
        differences[generator.integers(count, size=(min(block, _RESAMPLES - start), count))].mean(axis=1)
        for start in range(0, _RESAMPLES, block)
    ]
    return np.concatenate(parts)


def _two_sided(draws: np.ndarray) -> float:
    """How often a resampled mean lies on the other side of zero, twice; never below what so many draws can show."""
    other = min(int((draws <= 0).sum()), int((draws >= 0).sum()))
    return min(1.0, 2 * max(other, 1) / len(draws)) if draws.any() else 1.0
