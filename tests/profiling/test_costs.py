"""The arithmetic that shares are shares of."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qwenlet.config import QuantConfig, qwen_1_8b
from qwenlet.plan import Setup, estimate
from qwenlet.profiling import card
from qwenlet.profiling.costs import Costs, Demand, expected_seconds, possible_costs

from .small import CEILINGS, TINY, job

BF16 = Costs.of(qwen_1_8b(), "bf16")


def test_a_decoded_token_reads_what_the_card_s_model_is_known_to_read():
    assert BF16.weights == pytest.approx(3.05e9, rel=0.005)
    assert BF16.past == 2 * 24 * 2048 * 2
    assert Costs.of(qwen_1_8b(), "fp32").weights == pytest.approx(2 * BF16.weights, rel=1e-3)
    assert Costs.of(qwen_1_8b(), "int4").weights < 0.3 * BF16.weights


@given(st.integers(1, 4000), st.integers(1, 4000), st.integers(1, 4000), st.integers(1, 64))
def test_generating_goes_on_where_it_stopped(prompt, first, second, batch):
    """Two runs, the second behind the first, need what one run needs."""
    one = BF16.generating(prompt, first + second, batch)
    parts = BF16.generating(prompt, first, batch), BF16.generating(prompt + first, second, batch)
    assert one == Demand(sum(p.bytes for p in parts), sum(p.operations for p in parts))


def test_reading_a_prompt_is_what_plan_says_of_it():
    plan = estimate(Setup(model=qwen_1_8b(), context=2048))
    demand = BF16.reading(2048)
    assert demand.operations - BF16.head == pytest.approx(2048 * plan.prefill_operations, rel=1e-3)
    assert demand.bytes == 4 * BF16.weights + 2048 * BF16.past, "four chunks read the weights four times"


def test_the_nearer_ceiling_counts():
    memory, arithmetic = Demand(4_000_000_000, 1), Demand(1, 40_000_000_000)
    assert memory.seconds(CEILINGS, "bf16") == pytest.approx(4.0)
    assert memory.bound(CEILINGS, "bf16") == "memory"
    assert arithmetic.seconds(CEILINGS, "bf16") == pytest.approx(2.0)
    assert arithmetic.seconds(CEILINGS, "int4") == pytest.approx(1.0), "codes may be multiplied as whole numbers"
    assert arithmetic.bound(CEILINGS, "bf16") == "arithmetic"


def test_a_limit_bounds_what_is_expected():
    long = job("generate", 1, 8192)
    assert expected_seconds(long, BF16, CEILINGS) > 1000
    assert expected_seconds(job("generate", 1, 8192, limit_seconds=5.0), BF16, CEILINGS) < 30


def test_a_checkpoint_s_own_codes_are_kept():
    stored = QuantConfig.named("int4").fit(qwen_1_8b())
    assert isinstance(possible_costs(qwen_1_8b(), "int4", stored), Costs)
    assert "quantized already" in str(possible_costs(qwen_1_8b(), "int8", stored))


def test_what_does_not_fit_is_said_before_it_is_tried():
    assert isinstance(possible_costs(qwen_1_8b(), "fp32", None, 8193, 12 * 10**9), Costs)
    assert "8,193 tokens need about 1" in str(possible_costs(qwen_1_8b(), "fp32", None, 8193, 8 * 10**9))
    assert isinstance(possible_costs(qwen_1_8b(), "int4", None, 8193, 8 * 10**9), Costs)


def test_the_card_s_figures():
    assert card.is_of(qwen_1_8b())
    assert not card.is_of(TINY.facts()[0])
    assert card.speed("bf16", "flash", 8192) == 54.04
    assert card.speed("int4", "math", 2048) == 68.37
    assert card.speed("int4", "own", 2048) == 71.07, "beside ours stands its fastest"
    assert card.speed("fp16", "flash", 2048) is None
    assert card.speed("bf16", "flash", 100) is None
    assert card.generating_bytes("fp32", 8192) == 13_060_000_000
    assert card.encoding_bytes("int8", 2048) == 3_480_000_000
    assert card.encoding_bytes("int8", 512) is None
