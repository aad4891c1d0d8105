"""Plots are read by people: marks that run into each other say nothing."""

from __future__ import annotations

import re
from itertools import pairwise

import pytest

from qwenlet.evals.figures import Lines
from qwenlet.evals.plots import svg


@pytest.mark.parametrize(("count", "shown"), [(1, 1), (5, 5), (32, 11), (500, 12)])
def test_marks_of_the_axis_have_room(count: int, shown: int) -> None:
    x = [32.0 + 64 * number for number in range(count)]
    drawn = svg(Lines("title", "position", "loss", x, [("a curve", [1.0] * count)]))
    at_the_axis = re.findall(r'<text x="([\d.]+)" y="312.0" text-anchor="middle" [^>]*>(\d+)</text>', drawn)
    assert len(at_the_axis) == shown
    assert at_the_axis[0][1] == "32"
    for (left, name), (right, other) in pairwise(at_the_axis):
        assert float(right) - float(left) > 6 * (len(name) + len(other)) / 2  # a digit of 12 pixels is 6 to 7 wide
