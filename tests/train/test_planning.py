"""What a run will take, said before it starts: chosen by memory, tried, and held against a process's own peak."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from tests.train.tiny import CPU, made_samples, tiny_model

from qwenlet.config import TrainingConfig
from qwenlet.model import Qwen
from qwenlet.train.batches import Course, count_steps
from qwenlet.train.forecast import MODES
from qwenlet.train.planning import Plan, make_plan
from qwenlet.train.processes import Processes

SETTINGS = TrainingConfig(epochs=2, batch_size=2, accumulation=2, dtype="fp32")


def planned(model: Qwen, training: TrainingConfig = SETTINGS, memory: int | None = None) -> Plan:
    return make_plan(
        model, made_samples(), made_samples(seed=1), training, frozen_bytes=0, budget=40, memory=memory,
        dtype=torch.float32, device=CPU, group=Processes(),
    )  # fmt: skip


def test_what_is_computed_again_is_the_least_that_fits():
    model = tiny_model()
    peaks = [planned(model).forecast.peak(mode) for mode in MODES]
    assert peaks == sorted(peaks, reverse=True)
    for mode, peak in zip(MODES, peaks, strict=True):
        assert planned(model, memory=int(peak / 0.8) + 1).recompute == mode
        assert model.transformer.recompute == mode
    assert planned(model, memory=None).recompute == "full"


@pytest.mark.parametrize("asked", MODES)
def test_what_was_asked_for_is_done(asked: str):
    model = tiny_model()
    training = replace(SETTINGS, checkpointing=asked)  # type: ignore[arg-type]
    assert planned(model, training, memory=1 << 40).recompute == asked
    assert model.transformer.recompute == asked


def test_trying_changes_nothing():
    model = tiny_model()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    torch.manual_seed(5)
    state = torch.get_rng_state()
    plan = planned(model)
    assert torch.equal(torch.get_rng_state(), state)
    assert model.training
    assert all(torch.equal(p, before[name]) and p.grad is None for name, p in model.named_parameters())
    assert plan.seconds > 0


def test_steps_and_tokens_are_those_of_the_run():
    samples = made_samples()
    course = Course(samples, 0, 2, 40, 2)
    plan = planned(tiny_model())
    assert plan.steps == count_steps(course, SETTINGS) == sum(len(course.epoch(epoch)) for epoch in (0, 1))
    assert plan.tokens == pytest.approx(2 * samples.lengths.sum(), rel=0.1)
    half = planned(tiny_model(), replace(SETTINGS, max_steps=plan.steps // 2))
    assert half.tokens == pytest.approx(plan.tokens / 2, rel=0.1)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="the peak of a process is read from /proc")
@pytest.mark.parametrize("checkpointing", ["none", "full"])
def test_the_peak_of_a_process_is_what_was_planned(checkpointing: str, tmp_path: Path):
    """In a process of its own, as a peak can't be forgotten."""
    done = subprocess.run(
        [sys.executable, "-m", "tests.train.peak", str(tmp_path), checkpointing],
        capture_output=True,
        text=True,
        check=True,
    )
    peak, measured = json.loads(done.stdout)
    assert 0.75 < peak / measured < 1.3
