"""Which jobs a workload asks for, and what it refuses."""

from __future__ import annotations

import pytest

from qwenlet.errors import ConfigError
from qwenlet.profiling.workload import LONG_SECONDS, Job, Workload, changed, quick


def test_the_card_s_tables_are_what_is_asked_for_by_default():
    jobs = list(Workload().jobs("bf16", ["flash", "math"]))
    assert {job.attention for job in jobs if job.kind in ("generate", "encode")} == {"flash", "math"}
    assert all(job.tokens == (2048, 8192) and job.prompt == 1 for job in jobs if job.kind == "generate")
    assert all(job.prompt == 2048 for job in jobs if job.kind == "encode")
    assert {job.attention for job in jobs if job.kind in ("prefill", "batch")} == {"flash"}, "compared only by the card"
    assert [job.batch for job in jobs if job.kind == "batch"] == [1, 2, 4, 8, 16, 32, 64]
    assert not any(job.kind == "peer" for job in jobs)


def test_what_is_left_out_makes_no_job():
    assert not list(Workload().jobs("bf16", []))
    kinds = {job.kind for job in Workload(encode=0, prefill=(), batch=()).jobs("bf16", ["own"])}
    assert kinds == {"generate"}


def test_the_context_is_enough_for_each_job():
    for workload in (Workload(), quick(), Workload(generate=(), batch=(64,)), Workload(peer="transformers")):
        for job in workload.jobs("int4", ["own"]):
            assert job.context <= workload.context, job


@pytest.mark.parametrize(
    ("options", "word"),
    [
        ({"precisions": ("bf17",)}, "bf17"),
        ({"precisions": ()}, "no precision"),
        ({"attention": ("flush",)}, "flush"),
        ({"peer": "vllm"}, "vllm"),
        ({"generate": (0,)}, "generate has 0"),
        ({"batch": (-1, 4)}, "batch has -1"),
        ({"rounds": 0}, "rounds is 0"),
        ({"limit_seconds": 0.0}, "limit_seconds is 0"),
        ({"generate": (), "encode": 0, "prefill": (), "batch": ()}, "nothing to measure"),
    ],
)
def test_nonsense_is_refused_by_name(options, word):
    with pytest.raises(ConfigError, match=word):
        Workload(**options)


def test_options_lie_over_a_preset_and_unknown_ones_are_named():
    assert changed(quick(), generate=(64, 32, 64), rounds=None).generate == (32, 64)
    with pytest.raises(ConfigError, match="genrate"):
        changed(quick(), genrate=(1,))


def test_what_takes_long_is_measured_once():
    job = Job("generate", "bf16", "own", 1, (8,), rounds=5)
    assert job.rounds_of(1.0) == 5
    assert job.rounds_of(LONG_SECONDS) == 1
