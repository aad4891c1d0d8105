"""Figures of a model so small that they are there at once: that they count what they say."""

from __future__ import annotations

import pytest
import torch

from qwenlet.profiling import measure
from qwenlet.profiling.ceilings import best_seconds, measure_ceilings
from qwenlet.profiling.measure import engine_for, offered, prompt_ids, run, run_job
from qwenlet.profiling.workload import OWN

from .small import CEILINGS, job, tiny

CPU = torch.device("cpu")


def test_each_length_is_a_mark_of_one_run():
    three, six = run_job(tiny(), job("generate", 1, 3, 6, rounds=2))
    assert (three.tokens, three.done, six.tokens, six.done) == (3, 3, 6, 6)
    assert len(three.seconds) == len(six.seconds) == len(six.first_token) == 2
    assert all(0 < first < a < b for first, a, b in zip(six.first_token, three.seconds, six.seconds, strict=True))
    assert six.peak is not None
    assert six.peak > 50_000_000, "the interpreter and torch alone are more"


def test_no_end_token_ends_a_reply_and_nothing_is_guessed():
    llm = tiny()
    with engine_for(llm, OWN, context=40) as engine:
        found = run(engine, [1], [30], None)
        assert found.done == 30
        assert not found.cut
        assert engine.stats.steps == 30, "a step for each token, the first by the prompt's"
        assert not engine.stop_ids


def test_time_out_says_how_far_it_came():
    (figure,) = run_job(tiny(), job("generate", 1, 200, rounds=3, limit_seconds=1e-9))
    assert 1 <= figure.done < 200
    assert len(figure.seconds) == 1
    early, late = run_job(tiny(), job("generate", 1, 1, 200, limit_seconds=1e-9))
    assert (early.done, early.tokens) == (1, 1), "what was reached before is whole"
    assert late.done < late.tokens


def test_a_prompt_may_be_cut_too(monkeypatch):
    llm = tiny()
    monkeypatch.setattr(llm, "options", llm.options.__class__(prefill_chunk=16))
    (figure,) = run_job(llm, job("encode", 64, 1, limit_seconds=1e-9))
    assert figure.done == 16
    assert len(figure.seconds) == 1


def test_prompts():
    (figure,) = run_job(tiny(), job("prefill", 20, 1, rounds=3))
    assert figure.done == 20
    assert figure.seconds == figure.first_token
    assert len(figure.seconds) == 3


@pytest.mark.parametrize("batch", [1, 5])
def test_a_batch_counts_steps_of_all_replies(batch):
    (figure,) = run_job(tiny(), job("batch", 32, 4, batch=batch, rounds=2))
    assert figure.done == 4
    assert len(figure.seconds) == 2
    assert figure.context > 32


def test_a_batch_is_cut_too():
    (figure,) = run_job(tiny(), job("batch", 32, 50, batch=2, rounds=2, limit_seconds=1e-9))
    assert 1 <= figure.done < 50


def test_a_request_that_fails_fails_the_job(monkeypatch):
    def broken(*args, **kwargs):
        raise RuntimeError("out of luck")

    monkeypatch.setattr(measure.Engine, "_guess", broken)
    with engine_for(tiny(), OWN, context=8) as engine:
        monkeypatch.setattr(engine.runner, "run", broken)
        with pytest.raises(RuntimeError, match="out of luck"):
            run(engine, [1], [4], None)


def test_attention_is_ours_where_the_program_is_native():
    found, refused = offered(tiny())
    with engine_for(tiny(), OWN, context=8) as engine:
        native = engine.obstacle is None
    if native:
        assert (found, refused) == (["own"], [])
        found, refused = offered(tiny(), ["flash"])
        assert not found
        assert "kernels of our own" in refused[0]
    else:
        assert "math" in found


def test_attention_by_torch_is_asked_of_torch(monkeypatch):
    llm = tiny("fp16")
    found, refused = offered(llm, ["math", "sdpa"])
    assert (found, refused) == (["math", "sdpa"], [])
    (figure,) = run_job(llm, job("generate", 1, 2))
    assert figure.done == 2


def test_prompts_are_the_same_again_and_differ_by_seed():
    assert prompt_ids(50, 1000) == prompt_ids(50, 1000)
    assert prompt_ids(50, 1000) != prompt_ids(50, 1000, 1)


def test_ceilings_of_this_machine():
    found = measure_ceilings(CPU, size=1 << 22, side=64)
    assert found.read > 1e6, "even of a machine that is busy"
    assert found.operations["fp32"] > 1e6
    assert found.arithmetic("int4") >= found.operations["fp32"]
    assert found.how.keys() == {"read", *found.operations}
    both = found.best(CEILINGS)
    assert both.read == max(found.read, CEILINGS.read)
    assert all(both.operations[name] >= value for name, value in found.operations.items())


def test_the_best_of_several_runs_counts():
    times = iter([0.0, 0.02, 0.0, 0.01])

    def work():
        import time

        time.sleep(next(times))

    assert best_seconds(work, CPU, rounds=3) < 0.01
