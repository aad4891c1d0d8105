"""Tokens chosen by the kernels, in Triton's interpreter, against `sampling.choose`."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from qwenlet.config import SamplingParams
from qwenlet.ops import cpu
from qwenlet.sampling import TokenCounts, choose, needs_counts, uniform

pytest.importorskip("triton")

from qwenlet.ops.triton.sampling import SampleScratch, Settings, sample


def by_kernels(logits: Tensor, rows: list[SamplingParams], prompts: list[list[int]], position: int = 9) -> Tensor:
    count, vocabulary = logits.shape
    s = Settings.greedy(count, vocabulary, "cpu", tables=count)
    for i, (params, prompt) in enumerate(zip(rows, prompts, strict=True)):
        s.temperature[i], s.top_p[i], s.min_p[i] = params.temperature or 0.0, params.top_p or 1.0, params.min_p or 0.0
        s.top_k[i], s.repetition[i] = params.top_k or 0, params.repetition_penalty or 1.0
        s.presence[i], s.frequency[i] = params.presence_penalty, params.frequency_penalty
        s.u[i] = uniform(params.seed or 0, 0, position)
        if needs_counts(params):
            s.slots[i] = i
            s.counts[i, prompt] = 0
    return sample(logits, s, SampleScratch(count, vocabulary, "cpu"))


def by_definition(logits: Tensor, params: SamplingParams, prompt: list[int], position: int = 9) -> int:
    counts = TokenCounts(prompt) if needs_counts(params) else None
    return choose(logits.float(), params, counts, 0, position)


def plainly(logits: Tensor, params: SamplingParams, position: int = 9) -> int:
    """By sorting everything; of equals the first ids are kept, which torch's `topk` leaves open."""
    weights = ((logits - logits.max()) / params.temperature).exp().double()
    if 0 < (params.top_k or 0) < len(logits):
        weights = torch.where(logits >= logits.sort(descending=True).values[params.top_k - 1], weights, 0.0)
    order = weights.sort(descending=True, stable=True).indices
    before = weights[order].cumsum(0) - weights[order]
    if params.top_p < 1.0:
        weights[order[before >= params.top_p * weights.sum()]] = 0.0
    total = torch.where(weights >= (params.min_p or 0.0), weights, 0.0).cumsum(0)
    return int(torch.searchsorted(total, total[-1] * uniform(params.seed or 0, 0, position), right=True))


def logits_of(rows: int, vocabulary: int, seed: int, spread: float = 3.0) -> Tensor:
    return torch.randn(rows, vocabulary, generator=torch.Generator().manual_seed(seed)) * spread


EVERY = [
    SamplingParams(temperature=0.0),
    SamplingParams(temperature=1.0, seed=1),
    SamplingParams(temperature=0.7, top_p=0.8, seed=2),
    SamplingParams(temperature=1.3, top_k=40, seed=3),
    SamplingParams(temperature=1.0, top_k=300, top_p=0.95, seed=4),
    SamplingParams(temperature=1.0, min_p=0.05, seed=5),
    SamplingParams(temperature=0.9, top_k=50, top_p=0.9, min_p=0.02, repetition_penalty=1.1, seed=6),
    SamplingParams(temperature=0.0, repetition_penalty=1.5, presence_penalty=0.5, frequency_penalty=0.3),
]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_setting_at_once(dtype: torch.dtype) -> None:
    """Rows of one call want different things, and each gets what it would by itself."""
    for seed in range(3):
        logits = logits_of(len(EVERY), 5003, seed).to(dtype)
        prompts = [logits[i].topk(3).indices.tolist() for i in range(len(EVERY))]
        found = by_kernels(logits, EVERY, prompts, position=seed)
        wanted = [by_definition(x, p, prompt, seed) for x, p, prompt in zip(logits, EVERY, prompts, strict=True)]
        assert found.tolist() == wanted


def test_the_whole_vocabulary() -> None:
    logits = logits_of(3, 151_936, 1, spread=2.0)
    chosen = [EVERY[0], EVERY[2], EVERY[4]]
    assert by_kernels(logits, chosen, [[]] * 3).tolist() == [
        by_definition(x, params, []) for x, params in zip(logits, chosen, strict=True)
    ]


@settings(max_examples=40, deadline=None)
@given(
    st.lists(st.integers(-30, 30), min_size=2, max_size=40),
    st.floats(0.05, 3.0),
    st.integers(0, 12),
    st.floats(0.01, 1.0),
    st.floats(0.0, 0.9),
    st.integers(0, 2**64 - 1),
)
def test_ties_and_edges(whole: list[int], temperature: float, k: int, p: float, least: float, seed: int) -> None:
    """Few different logits, so that borders fall among equals."""
    params = SamplingParams(temperature=temperature, top_k=k, top_p=p, min_p=least, seed=seed)
    logits = torch.tensor(whole)[None] / 4.0
    found = by_kernels(logits, [params], [[]]).item()
    if found != plainly(logits[0], params):
        # a sum that meets a border to within a rounding may fall to either side of it: both must be as likely
        near = [SamplingParams(temperature=temperature, top_k=k, top_p=min(1.0, p * (1 + e)), min_p=least * (1 + e),
                               seed=seed) for e in (-1e-6, 1e-6)]  # fmt: skip
        assert found in [plainly(logits[0], params) for params in near]


def test_all_logits_the_same() -> None:
    logits = torch.zeros(1, 3000)
    half = SamplingParams(temperature=1.0, top_p=0.5, seed=3)
    found = by_kernels(logits, [half], [[]]).item()
    assert found == plainly(logits[0], half) == int(uniform(3, 0, 9) * 1500)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_no_finite_largest_logit(bad: float) -> None:
    logits = logits_of(3, 4100, 1)
    logits[1, 4000] = bad
    logits[2] = -math.inf
    params = [SamplingParams(temperature=1.0, seed=1)] * 3
    found = by_kernels(logits, params, [[]] * 3).tolist()
    assert found[0] == by_definition(logits[0], params[0], [])
    assert found[1:] == [-1, -1]


def test_drawn_tokens_are_counted() -> None:
    """Step after step without the host: a frequency penalty sees what the steps before have drawn."""
    params = SamplingParams(temperature=0.0, frequency_penalty=0.4)
    logits = logits_of(1, 100, 5, spread=0.5)
    s = Settings.greedy(1, 100, "cpu")
    s.slots[0], s.frequency[0] = 0, 0.4
    scratch, counts, wanted = SampleScratch(1, 100, "cpu"), TokenCounts([]), []
    found = [sample(logits, s, scratch).item() for _ in range(12)]
    for position in range(12):
        wanted.append(choose(logits[0], params, counts, 0, position))
        counts.add(wanted[-1])
    assert found == wanted
    assert len(set(found)) > 1
    assert s.counts[0].clamp(min=0).sum() == 12


@pytest.mark.skipif(cpu.status().isa is None, reason="no kernels of a CPU run here")
def test_as_the_native_kernels_draw() -> None:
    for seed in range(20):
        params = SamplingParams(temperature=1.0, top_p=0.9, seed=seed)
        logits = logits_of(1, 2500, seed)
        assert by_kernels(logits, [params], [[]]).item() == by_definition(logits[0], params, [])
