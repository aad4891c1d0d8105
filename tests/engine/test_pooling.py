"""A text's vector: the mean of its hidden states, whatever pieces they come in, and nobody waits for all of it."""

from __future__ import annotations

import pytest
import torch

from engine.tiny import random_model, small_engine
from qwenlet.cache import Rows
from qwenlet.config import SamplingParams
from qwenlet.engine import Engine
from qwenlet.engine.pooling import MeanState

IDS = [(7 * n) % 250 for n in range(150)]


def embedded(engine: Engine, ids: list[int]) -> torch.Tensor:
    request, state = engine.embed(ids, engine.model.config.ntk_alpha(len(ids)))
    for _ in engine.stream(request):
        pass
    assert engine.stats.pages_used == 0
    return state.mean


@pytest.mark.parametrize("kind", ["fp32", "int4"])
def test_a_vector_is_the_mean_of_the_modules_hidden_states(kind: str) -> None:
    model = random_model(kind)
    with torch.inference_mode():
        rows = Rows.fresh([len(IDS)], [model.config.ntk_alpha(len(IDS))])
        expected = model.hidden(torch.tensor(IDS), rows).float().mean(0)
    found = embedded(small_engine(model, kind, prefill_chunk=32), IDS)
    near = 1e-5 if kind == "fp32" else 0.05  # keys and values in int8
    torch.testing.assert_close(found, expected, atol=near, rtol=near)


def test_pieces_and_company_change_no_bit() -> None:
    model = random_model("int4")
    alone = embedded(small_engine(model, "int4"), IDS)
    crowded = small_engine(model, "int4", prefill_chunk=16, mixed_chunk=5)
    crowded.submit([1, 2, 3], SamplingParams(max_new_tokens=100, ignore_eos=True, seed=1))
    assert torch.equal(embedded_in_a_crowd(crowded), alone)


def embedded_in_a_crowd(engine: Engine) -> torch.Tensor:
    request, state = engine.embed(IDS, engine.model.config.ntk_alpha(len(IDS)))
    while request.finish_reason is None:
        engine.step()
    return state.mean


def test_a_reply_goes_on_beside_a_long_text() -> None:
    engine = small_engine(random_model("fp32"), prefill_chunk=16, mixed_chunk=8)
    (reply,) = engine.submit([1, 2, 3], SamplingParams(max_new_tokens=60, ignore_eos=True, seed=1))
    engine.step()
    request, _ = engine.embed(IDS, 1.0)
    before = reply.reply_length
    while request.finish_reason is None:
        engine.step()
    assert reply.reply_length - before >= len(IDS) // 8


def test_states_of_a_request_that_began_anew_count_once() -> None:
    state, hidden = MeanState(), torch.randn(10, 4)
    state(0, hidden[:6])
    state(0, hidden[:4])  # its pages were taken, and it starts again in other pieces
    state(4, hidden[4:9])
    state(9, hidden[9:])
    torch.testing.assert_close(state.mean, hidden.mean(0))
