"""The draw of a step's rows side by side against `sampling.choose`, its definition row by row."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from decode.tiny import CPU
from qwenlet.config import GenerationDefaults, SamplingParams
from qwenlet.decode.inputs import Inputs
from qwenlet.decode.plain import draw
from qwenlet.sampling import TokenCounts, choose, is_greedy, uniform

V = 50


def rows(found: list[SamplingParams]) -> Inputs:
    at = Inputs.allocate(len(found), 1, CPU)
    for row, params in enumerate(found):
        at.temperature[row] = 0.0 if is_greedy(params) else params.temperature
        at.top_k[row] = params.top_k or 0
        at.top_p[row] = 1.0 if params.top_p is None else params.top_p
        at.min_p[row] = params.min_p or 0.0
        at.repetition[row] = params.repetition_penalty or 1.0
        at.presence[row], at.frequency[row] = params.presence_penalty, params.frequency_penalty
        at.u[row] = uniform(params.seed or 0, 0, 9)
        at.counted[row] = row
    return at


parameters = st.builds(
    SamplingParams,
    temperature=st.sampled_from([0.0, 0.3, 1.0, 2.0]),
    top_k=st.sampled_from([0, 1, 5, 49, 60]),
    top_p=st.sampled_from([0.1, 0.7, 0.95, 1.0]),
    min_p=st.sampled_from([0.0, 0.05, 0.5]),
    repetition_penalty=st.sampled_from([0.8, 1.0, 1.3]),
    presence_penalty=st.sampled_from([0.0, 0.5]),
    frequency_penalty=st.sampled_from([0.0, -0.3, 0.4]),
    seed=st.integers(0, 2**63),
)


@given(found=st.lists(parameters, min_size=1, max_size=4), seed=st.integers(0, 10_000))
@settings(max_examples=100)
def test_every_setting_draws_what_choose_draws(found: list[SamplingParams], seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(len(found), V, generator=generator) * 3
    found = [params.resolve(GenerationDefaults()) for params in found]
    tables = torch.full((len(found), V), -1, dtype=torch.int32)
    expected = []
    for row, params in enumerate(found):
        counts = TokenCounts([1, 2, 3, row])
        for token in (2, 2, 7):
            counts.add(token)
        tables[row, counts.ids] = counts.replied.int()
        expected.append(choose(logits[row], params, counts, 0, 9))
    assert draw(logits, tables, rows(found)).tolist() == expected


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_a_row_without_a_finite_largest_logit_says_so(bad: float) -> None:
    logits = torch.zeros(2, V)
    logits[1, 3] = bad
    at = rows([SamplingParams(temperature=0.0), SamplingParams(temperature=1.0, seed=1)])
    tokens = draw(logits, torch.full((2, V), -1, dtype=torch.int32), at).tolist()
    assert tokens == [0, -1]
