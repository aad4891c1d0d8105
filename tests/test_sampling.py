"""Sampling: each function against its definition by sorting, and randomness that depends on its key alone."""

from __future__ import annotations

import math
import random
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from qwenlet import sampling
from qwenlet.config import GenerationDefaults, SamplingParams
from qwenlet.errors import RequestError
from qwenlet.ops import cpu
from qwenlet.sampling import (
    Row,
    TokenCounts,
    bias_of,
    choose,
    choose_all,
    draw,
    min_p,
    needs_counts,
    penalize,
    token_logprob,
    top_k,
    top_p,
    uniform,
)

rows = st.lists(st.floats(-20, 20, width=32), min_size=1, max_size=40).map(torch.tensor)


def params(**fields: object) -> SamplingParams:
    return SamplingParams(**({"seed": 0} | fields)).resolve(GenerationDefaults())  # type: ignore[arg-type]


def test_temperature_zero_is_argmax() -> None:
    assert choose(torch.tensor([1.0, 3.0, 2.0]), params(temperature=0), None, 0, 0) == 1


@given(logits=rows, p=st.floats(0.01, 1.0))
def test_top_p_is_the_smallest_set_that_reaches_p(logits: torch.Tensor, p: float) -> None:
    values, ids = top_p(logits, None, p)
    probabilities = logits.double().softmax(0)
    if ids is None:
        assert p == 1.0
        return
    kept = probabilities[ids]
    assert kept.sum() >= p - 1e-6
    assert kept.sum() - kept.min() < p + 1e-6, "one token fewer would reach p too"
    assert len(ids) == len(logits) or kept.min() >= probabilities[[i for i in range(len(logits)) if i not in ids]].max()
    assert torch.equal(values, logits[ids])


def test_top_p_widens_its_search_until_it_is_exact() -> None:
    """A flat distribution of 50,000 tokens needs 80 % of them: the first 128 don't do."""
    values, ids = top_p(torch.zeros(50_000), None, 0.8)
    assert ids is not None
    assert abs(len(ids) - 40_000) <= 1
    assert len(values) == len(ids) == len(set(ids.tolist()))


@given(logits=rows, k=st.integers(0, 50))
def test_top_k_keeps_the_k_most_likely(logits: torch.Tensor, k: int) -> None:
    values, ids = top_k(logits, None, k)
    if 0 < k < len(logits):
        assert ids is not None
        kth = sorted(logits.tolist(), reverse=True)[k - 1]
        assert sorted(values.tolist()) == sorted(x for x in logits.tolist() if x >= kth), "ties with the k-th stay"
        assert torch.equal(logits[ids], values)
    else:
        assert values is logits


@given(logits=rows, p=st.floats(0.001, 1.0))
def test_min_p_is_relative_to_the_most_likely(logits: torch.Tensor, p: float) -> None:
    _, ids = min_p(logits, None, p)
    assert ids is not None
    probabilities = logits.double().softmax(0)
    for index, probability in enumerate(probabilities.tolist()):
        ratio = probability / float(probabilities.max())
        if abs(ratio - p) > 1e-4 * p:
            assert (index in ids) == (ratio > p), (ratio, p)


def test_cuts_compose_and_give_ids_of_the_whole_vocabulary() -> None:
    logits = torch.tensor([0.0, 5.0, 4.0, 3.0, -9.0])
    kept = min_p(*top_p(*top_k(logits, None, 4), 0.99), 0.2)
    assert kept[1] is not None
    assert sorted(kept[1].tolist()) == [1, 2]


def test_penalties() -> None:
    logits = torch.tensor([2.0, -2.0, 1.0, 1.0])
    counts = TokenCounts([0, 1])
    counts.add(2)
    counts.add(2)
    out = penalize(logits, counts, params(repetition_penalty=2.0, presence_penalty=0.5, frequency_penalty=0.1))
    assert out.tolist() == pytest.approx([1.0, -4.0, 0.5 - 0.5 - 0.2, 1.0])


def test_counts_are_built_only_when_needed() -> None:
    assert not needs_counts(params())
    for field in ("repetition_penalty", "presence_penalty", "frequency_penalty"):
        assert needs_counts(params(**{field: 1.3}))


def test_uniform_depends_on_its_key_alone_and_is_uniform() -> None:
    draws = [uniform(7, 0, position) for position in range(4000)]
    assert draws == [uniform(7, 0, position) for position in range(4000)]
    assert all(0 <= u < 1 for u in draws)
    # mean and variance of 4,000 uniform numbers, five standard errors wide
    assert abs(np.mean(draws) - 0.5) < 5 * math.sqrt(1 / 12 / 4000)
    assert abs(np.var(draws) - 1 / 12) < 0.01
    neighbours = {uniform(7, 0, 3), uniform(8, 0, 3), uniform(7, 1, 3), uniform(7, 0, 4)}
    assert len(neighbours) == 4


def test_the_random_numbers_stay_what_they_are() -> None:
    """A seed saved with a conversation must draw the same reply in a later version."""
    assert [round(uniform(1234, 0, p), 12) for p in (0, 1, 2)] == [0.334723681298, 0.592053481881, 0.08098741258]


def test_draw_follows_the_distribution() -> None:
    logits = torch.tensor([0.5, 0.3, 0.2]).log()
    settings = params(temperature=1.0)
    counts = np.bincount([choose(logits, settings, None, 0, position) for position in range(3000)], minlength=3)
    # chi-square with two degrees of freedom: 20 is exceeded once in 22,000 runs, and the key is fixed anyway
    expected = np.array([1500, 900, 600])
    assert ((counts - expected) ** 2 / expected).sum() < 20


@given(logits=rows, u=st.floats(0, 1, exclude_max=True))
def test_draw_never_leaves_the_kept_set(logits: torch.Tensor, u: float) -> None:
    values, ids = top_p(logits, None, 0.7)
    assert ids is None or draw(values, ids, u) in ids
    assert 0 <= draw(logits, None, u) < len(logits)


@pytest.mark.parametrize("temperature", [1e-46, 1e-30, 1e-6, 0.01])
def test_temperatures_near_zero_become_greedy_and_dont_overflow(temperature: float) -> None:
    """The published stop rule added 2^15 to a logit, which overflows float16 below temperature 0.5."""
    logits = torch.tensor([32768.0, 10.0, 40000.0])
    assert all(choose(logits, params(temperature=temperature), None, 0, p) == 2 for p in range(5))


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("temperature", [0, 1.0])
def test_logits_that_are_not_finite_are_said_to_be(bad: float, temperature: float) -> None:
    """An infinite logit used to become NaN in the draw, and the last id of the vocabulary was taken in silence."""
    with pytest.raises(RequestError, match="largest logit"):
        choose(torch.tensor([1.0, bad, -math.inf]), params(temperature=temperature), None, 0, 0)
    masked = torch.tensor([1.0, -math.inf, -math.inf])
    assert choose(masked, params(temperature=temperature), None, 0, 0) == 0


def test_logprobs_are_those_of_the_model() -> None:
    logits = torch.randn(50)
    entry = token_logprob(logits, 7, 3)
    reference = logits.log_softmax(0)
    assert entry.logprob == pytest.approx(float(reference[7]), abs=1e-5)
    assert [i for i, _ in entry.top] == reference.topk(3).indices.tolist()
    assert token_logprob(logits, 7, 0).top == ()


@pytest.mark.skipif(not cpu.available(), reason="built without a compiler: there are no kernels to test")
@pytest.mark.parametrize("isa", cpu.available())
@pytest.mark.parametrize("seed", range(60))
def test_the_native_draw_follows_the_definition(isa: str, seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The token at u of what penalties, temperature and cuts leave; float32 weights may shift a border a little."""
    monkeypatch.setenv("QWENLET_ISA", isa)
    dice, noise = random.Random(seed), torch.Generator().manual_seed(seed)
    size = dice.choice([1, 5, 16, 1000, 20_011])
    logits = torch.randn(size, generator=noise) * dice.choice([0.01, 1.0, 6.0])
    logits[torch.rand(size, generator=noise) < dice.choice([0.0, 0.3])] = -math.inf
    logits[dice.randrange(size)] = 1.0
    settings = params(
        temperature=dice.choice([0.3, 1.0, 2.0]),
        top_k=dice.choice([0, 0, 3, 50]),
        top_p=dice.choice([1.0, 0.83, 0.5, 0.01]),
        min_p=dice.choice([0.0, 0.0, 0.07]),
        repetition_penalty=dice.choice([1.0, 1.1]),
        presence_penalty=dice.choice([0.0, 0.4]),
        frequency_penalty=dice.choice([0.0, 0.2]),
        logit_bias=dice.choice([None, {dice.randrange(size): amount for amount in (-100.0, -0.5, 2.0)}]),
        seed=seed,
    )
    counts = TokenCounts(dice.choices(range(size), k=20))
    for token in dice.choices(range(size), k=40):
        counts.add(token)
    left = penalize(logits, counts, settings)
    if bias := bias_of(settings, size):
        left = bias.added_to(left)
    left = (left - left.max()) / (settings.temperature or 1.0)
    kept, ids = min_p(*top_p(*top_k(left, None, settings.top_k or 0), settings.top_p or 1.0), settings.min_p or 0.0)
    ids, order = (torch.arange(size), slice(None)) if ids is None else ids.sort()
    mass = kept[order].double().softmax(0).cumsum(0)
    for position in range(20):
        u = uniform(seed, 0, position)
        token = choose(logits, settings, counts, 0, position)
        place = ids.tolist().index(token)
        assert mass[place] >= u - 1e-5
        assert place == 0 or mass[place - 1] <= u + 1e-5


@pytest.mark.skipif(not cpu.available(), reason="built without a compiler: there are no kernels to test")
@pytest.mark.parametrize("isa", cpu.available())
@pytest.mark.parametrize("spread", [0.0, 0.3, 1.0, 4.0])
@pytest.mark.parametrize("order", ["mixed", "falling", "every 32nd is likely"])
def test_what_top_p_keeps_of_a_whole_vocabulary(
    isa: str, spread: float, order: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The border is guessed from every 32nd token; where the guess is wrong, because these are like no others, what is
    kept is the same."""
    monkeypatch.setenv("QWENLET_ISA", isa)
    size = 151_936
    logits = torch.randn(size, generator=torch.Generator().manual_seed(1)) * spread
    if order == "falling":
        logits = logits.sort(descending=True).values
    elif order == "every 32nd is likely":
        logits[::32] += 3.0
    settings = params(temperature=1.0, top_p=0.8, seed=1)
    best = logits.sort(descending=True, stable=True)
    mass = best.values.double().softmax(0).cumsum(0)
    kept = int((mass < 0.8).sum()) + 1
    near = best.values[kept - 1]
    ids = best.indices[:kept].sort().values
    inside = logits[ids].double().softmax(0).cumsum(0)
    for position in range(8):
        token = choose(logits, settings, None, 0, position)
        assert logits[token] >= near - 1e-3
        at = int(torch.searchsorted(ids, token))
        u = uniform(1, 0, position)
        assert inside[min(at, kept - 1)] >= u - 2e-5
        assert inside[max(at - 1, 0)] <= u + 2e-5 or at == 0


@pytest.mark.skipif(not cpu.available(), reason="built without a compiler: there are no kernels to test")
@given(st.integers(0, 2**64 - 1), st.integers(0, 2**32), st.integers(0, 2**40))
def test_the_native_draw_has_the_same_randomness(seed: int, choice: int, position: int) -> None:
    """Of 2^16 tokens, each as likely, the one drawn tells 16 bits of the number."""
    logits = torch.zeros(1 << 16)
    settings = params(temperature=1.0, top_p=1.0, seed=seed)
    assert choose(logits, settings, None, choice, position) == int(uniform(seed, choice, position) * (1 << 16))


@pytest.mark.skipif(not cpu.available(), reason="built without a compiler: there are no kernels to test")
def test_rows_drawn_together_are_drawn_as_alone() -> None:
    rows = [
        Row(torch.randn(3000), params(temperature=1.0, top_p=0.7, seed=i), TokenCounts([i]), 0, i) for i in range(9)
    ]
    rows[4].logits[7] = math.nan
    tokens = choose_all(rows)
    assert tokens[4] == -1
    assert [choose_all([row])[0] for row in rows] == tokens
    assert choose_all([replace(rows[0], params=params(temperature=0))])[0] == int(rows[0].logits.argmax())


def test_biases_and_banned_tokens() -> None:
    logits = torch.tensor([0.0, 1.0, 2.0, 3.0])
    greedy = SamplingParams(temperature=0, top_p=1.0, top_k=0, min_p=0.0, logit_bias={"1": 2.5, 3: -100})
    assert choose(logits, greedy, None, 0, 0) == 1
    assert choose(logits, greedy, None, 0, 0, bias_of(greedy, 4, banned=(1, 99))) == 2
    assert logits.tolist() == [0.0, 1.0, 2.0, 3.0]
    assert SamplingParams(logit_bias='{"7": 1}').logit_bias == {7: 1}


@pytest.mark.skipif(not cpu.available(), reason="built without a compiler: there are no kernels to test")
@pytest.mark.parametrize("penalty", [1.0, 1.2])
def test_a_biased_row_is_drawn_natively(penalty: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """By the functions a token of a whole vocabulary took up to 60 ms, for which all other requests waited."""
    drawn = []
    native = sampling.choose_all
    monkeypatch.setattr(sampling, "choose_all", lambda rows: drawn.extend(rows) or native(rows))
    logits = torch.randn(151_936, generator=torch.Generator().manual_seed(1))
    before, counts = logits.clone(), TokenCounts([7, 8])
    settings = params(temperature=1.0, top_p=0.8, repetition_penalty=penalty, logit_bias={42: 100.0})
    assert choose(logits, settings, counts if penalty > 1.0 else None, 0, 0) == 42
    assert len(drawn) == 1
    assert torch.equal(logits, before)


@pytest.mark.parametrize("bias", [{"x": 1}, {1: 101}, {-1: 1}, {1: "a"}, {1: float("nan")}, [1], "[]", {1: True}])
def test_bad_biases_are_refused(bias: Any) -> None:
    with pytest.raises(RequestError, match="logit_bias"):
        SamplingParams(logit_bias=bias)
