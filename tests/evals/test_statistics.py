"""Errors and tests against what is known of them."""

from __future__ import annotations

import math
import random
import statistics

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qwenlet.evals.figures import Figure
from qwenlet.evals.statistics import mcnemar, mean, mean_of_means, paired, wilson


@given(st.lists(st.floats(-1e3, 1e3), min_size=2, max_size=50))
def test_mean_and_error_are_the_textbook_ones(values: list[float]) -> None:
    center, error, count = mean(values)
    assert center == pytest.approx(statistics.fmean(values), abs=1e-9)
    assert error == pytest.approx(statistics.stdev(values) / math.sqrt(len(values)), abs=1e-9)
    assert count == len(values)


def test_one_value_has_no_error_and_none_no_mean() -> None:
    assert mean([0.5]) == (0.5, None, 1)
    assert math.isnan(mean([])[0])


def test_groups_weigh_the_same() -> None:
    center, error, count = mean_of_means([[1.0] * 99, [0.0, 1.0]])
    assert (center, count) == (0.75, 101)
    assert error == pytest.approx(math.sqrt(0.5**2) / 2)


def test_the_error_of_a_macro_average_is_its_spread() -> None:
    """Drawn again and again, macro averages spread as the error says."""
    draw = random.Random(0)
    runs = [[[float(draw.random() < p) for _ in range(20)] for p in (0.2, 0.5, 0.9)] for _ in range(2000)]
    values, errors = zip(*[mean_of_means(run)[:2] for run in runs], strict=True)
    assert statistics.stdev(values) == pytest.approx(math.sqrt(statistics.fmean(e * e for e in errors)), rel=0.06)


def test_the_error_of_few_samples_in_many_groups_is_not_too_small() -> None:
    """One or two samples of each of 40 groups, among which the two may well agree everywhere."""
    draw = random.Random(1)
    runs = [
        [[float(draw.random() < p) for _ in range(1 + (number % 4 == 0))] for number, p in enumerate([0.1, 0.4] * 20)]
        for _ in range(2000)
    ]
    values, errors = zip(*[mean_of_means(run)[:2] for run in runs], strict=True)
    said = math.sqrt(statistics.fmean(e * e for e in errors))
    assert statistics.stdev(values) < said < 1.2 * statistics.stdev(values)


def test_one_sample_of_each_group_is_a_plain_mean() -> None:
    assert mean_of_means([[1.0], [0.0], [0.0], [1.0]]) == pytest.approx(mean([1.0, 0.0, 0.0, 1.0]))
    assert mean_of_means([[1.0]]) == (1.0, None, 1)
    assert math.isnan(mean_of_means([])[0])


@pytest.mark.parametrize(
    ("better", "worse", "expected"),
    # 2 * sum of binomials / 2^n, by hand
    [(0, 0, 1.0), (1, 0, 1.0), (5, 0, 0.0625), (10, 2, 2 * (1 + 12 + 66) / 4096), (3, 3, 1.0), (2, 10, 158 / 4096)],
)
def test_mcnemar_is_the_exact_binomial(better: int, worse: int, expected: float) -> None:
    assert mcnemar(better, worse) == pytest.approx(expected)


def test_right_and_wrong_are_tested_exactly() -> None:
    result = paired([0, 0, 0, 0, 0, 1, 1, 0], [1, 1, 1, 1, 1, 1, 1, 0])
    assert result.test == "McNemar, exact"
    assert (result.better, result.worse, result.p_value) == (5, 0, 0.0625)
    assert result.difference == pytest.approx(0.625)


def test_numbers_are_tested_by_bootstrap() -> None:
    draw = random.Random(1)
    first = [draw.gauss(3.0, 1.0) for _ in range(400)]
    worse = [value + 0.1 + draw.gauss(0.0, 0.3) for value in first]
    same = [value + draw.gauss(0.0, 0.3) for value in first]
    assert paired(first, worse).p_value < 0.001
    assert paired(first, same).p_value > 0.05
    result = paired(first, worse)
    assert result.low < 0.1 < result.high
    assert result.high - result.low == pytest.approx(2 * 1.96 * result.error, rel=0.1)
    assert paired(first, first).p_value == 1.0


def test_false_alarms_are_as_rare_as_promised() -> None:
    """5 % of comparisons of equals come out below 0.05; 200 of them give 2 to 20 with odds beyond 10,000 to 1."""
    draw = random.Random(2)
    alarms = 0
    for _ in range(200):
        first = [draw.gauss(0.0, 1.0) for _ in range(60)]
        second = [value + draw.gauss(0.0, 1.0) for value in first]
        alarms += paired(first, second).p_value < 0.05
    assert 2 <= alarms <= 22


def test_wilsons_interval_is_the_textbook_one() -> None:
    """Of 40 samples, none or all: 3.84 / 43.84; and 15 of 40 by hand."""
    assert wilson(0.0, 40) == pytest.approx((0.0, 0.0876), abs=1e-4)
    assert wilson(1.0, 40) == pytest.approx((0.9124, 1.0), abs=1e-4)
    assert wilson(15 / 40, 40) == pytest.approx((0.2422, 0.5297), abs=1e-3)


@given(st.integers(1, 2000), st.data())
def test_the_interval_holds_its_share(count: int, data: st.DataObject) -> None:
    share = data.draw(st.integers(0, count)) / count
    low, high = wilson(share, count)
    assert 0.0 <= low <= share + 1e-12
    assert share - 1e-12 <= high <= 1.0
    assert low < high


def test_a_share_on_which_all_agree_shows_an_interval_instead_of_no_error() -> None:
    assert Figure("right", 0.0, 0.0, 40).text() == "0.0 (0.0 to 8.8)"
    assert Figure("right", 1.0, 0.0, 8).text() == "100.0 (67.6 to 100.0)"
    assert Figure("right", 0.3, 0.073, 40).text() == "30.0 ± 7.3"
    assert Figure("perplexity", 1.0, 0.0, 40, "number").text() == "1.00 ± 0.00"
