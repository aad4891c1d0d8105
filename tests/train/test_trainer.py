"""The loop: samples that don't see each other, runs that go on as if never interrupted, and what ends a run."""

from __future__ import annotations

import errno
import os
import signal
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tests.train.tiny import CPU, made_samples, tiny_model, trainer

from qwenlet.errors import CheckpointError, TrainingError
from qwenlet.model import Qwen
from qwenlet.train import checkpoints
from qwenlet.train.batches import epoch_batches
from qwenlet.train.journal import read_log
from qwenlet.train.objective import NextToken
from qwenlet.train.samples import Samples
from qwenlet.train.schedule import factor


def with_other_ids(samples: Samples, index: int) -> Samples:
    ids = samples.ids.copy()
    ids[samples.starts[index] : samples.starts[index + 1]] += 1
    return Samples(ids, samples.learned, samples.starts, samples.where, samples.report)


# ------------------------------------------------------------------------------------------------------------- packing


def test_a_packed_sample_has_the_loss_it_has_alone():
    samples, model = made_samples(), tiny_model()
    together = NextToken(samples).loss(model, (3, 0, 7), CPU)
    alone = sum(NextToken(samples).loss(model, (index,), CPU) for index in (3, 0, 7))
    torch.testing.assert_close(together, alone)


def test_a_packed_sample_does_not_see_its_neighbours():
    """The gradient of one sample's loss by its own words is the same whatever stands before it."""
    samples, model = made_samples(), tiny_model()
    before = NextToken(samples).loss(model, (3, 0), CPU) - NextToken(samples).loss(model, (3,), CPU)
    changed = with_other_ids(samples, 3)
    after = NextToken(changed).loss(model, (3, 0), CPU) - NextToken(changed).loss(model, (3,), CPU)
    torch.testing.assert_close(before, after, atol=1e-5, rtol=0)


def test_every_sample_is_in_one_batch_of_an_epoch_and_batches_keep_their_budget():
    samples = made_samples(200)
    for budget in (None, 40):
        batches = epoch_batches(samples, 1, seed=0, batch_size=4, budget=budget)
        assert sorted(index for batch in batches for index in batch) == list(range(200))
        assert batches == epoch_batches(samples, 1, seed=0, batch_size=4, budget=budget)
        assert batches != epoch_batches(samples, 2, seed=0, batch_size=4, budget=budget)
        if budget:
            assert all(sum(samples.lengths[index] for index in batch) <= budget for batch in batches)


# ------------------------------------------------------------------------------------------------------------ the loop


def test_it_learns_to_count(tmp_path: Path):
    held_out = NextToken(made_samples(seed=1))
    run = trainer(tmp_path, epochs=12, held_out=held_out)
    before = run.measure(held_out)
    outcome = run.run()
    assert outcome.why == "done"
    assert outcome.steps == outcome.planned == len(outcome.losses)
    assert outcome.best is not None
    assert outcome.best < before - 1.5
    assert min(loss for _, loss in outcome.held_out) == outcome.best
    run.take_best()
    assert run.measure(held_out) == pytest.approx(outcome.best)


def test_accumulated_batches_are_one_large_batch(tmp_path: Path):
    small = trainer(tmp_path / "a", accumulation=4, packed=False, batch_size=1, max_steps=5).run()
    large = trainer(tmp_path / "b", accumulation=1, packed=False, batch_size=4, max_steps=5).run()
    assert small.losses == pytest.approx(large.losses, abs=1e-5)


def test_what_is_frozen_stays(tmp_path: Path):
    model = tiny_model()
    model.transformer.requires_grad_(False)
    before = {name: p.clone() for name, p in model.named_parameters()}
    trainer(tmp_path, model, max_steps=3).run()
    moved = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
    assert moved == {"lm_head.weight"}


def test_patience_ends_a_run(tmp_path: Path):
    """A learning rate of nearly nothing makes no evaluation better by chance: the first one stays the best or ties."""
    run = trainer(tmp_path, epochs=50, lr=1.0, eval_every=1, patience=2, held_out=NextToken(made_samples(seed=1)))
    outcome = run.run()
    assert outcome.why == "patience"
    assert outcome.steps == (outcome.best_step or 0) + 2
    again = trainer(tmp_path, epochs=50, lr=1.0, eval_every=1, patience=2, held_out=NextToken(made_samples(seed=1)))
    assert again.run().losses == ()


def test_learning_rates_rise_and_fall():
    config = trainer_config(warmup=0.1, schedule="cosine", min_lr=0.1)
    rates = [factor(config, step, 100) for step in range(100)]
    assert rates[0] == pytest.approx(0.1)
    assert rates[9] == rates[10] == pytest.approx(1.0)
    assert rates[55] == pytest.approx(0.55)
    assert rates == sorted(rates[:10]) + sorted(rates[10:], reverse=True)
    assert rates[-1] == pytest.approx(0.1, abs=0.01)
    assert factor(trainer_config(warmup=5, schedule="constant"), 50, 100) == 1.0
    assert factor(trainer_config(warmup=0, schedule="linear"), 25, 100) == 0.75


def trainer_config(**changes: object):
    from qwenlet.config import TrainingConfig

    return TrainingConfig(**changes)


# ------------------------------------------------------------------------------------------------------------ going on


@pytest.mark.parametrize("kind", ["signal", "killed"])
def test_an_interrupted_run_goes_on_to_the_same_weights(tmp_path: Path, kind: str):
    """Dropout included: the model has an adapter."""
    from qwenlet.lora import LoraConfig, add_lora

    def model():
        made = tiny_model()
        add_lora(made, LoraConfig(rank=4, dropout=0.3))
        return made.train()

    def stop(done: int, total: int, what: str) -> None:
        if done == 5 and kind == "signal":
            os.kill(os.getpid(), signal.SIGTERM)
        if done == 7:
            raise RuntimeError("killed")

    whole = trainer(tmp_path / "whole", model(), save_every=2)
    expected = whole.run()
    part = trainer(tmp_path / "part", model(), save_every=2, progress=stop)
    if kind == "signal":
        outcome = part.run()
        assert (outcome.why, outcome.steps) == ("interrupted", 5)
    else:
        with pytest.raises(RuntimeError, match="killed"):
            part.run()
    rest = trainer(tmp_path / "part", model(), save_every=2)
    outcome = rest.run()
    assert outcome.resumed == (5 if kind == "signal" else 6)
    assert outcome.losses == expected.losses[outcome.resumed :]
    for name, tensor in whole.sharing.weights().items():
        assert torch.equal(tensor, rest.sharing.weights()[name]), name
    lines = [line["step"] for line in read_log(tmp_path / "part" / "training") if "loss" in line]
    assert lines == list(range(1, expected.steps + 1))


def test_another_run_does_not_go_on_in_its_folder(tmp_path: Path):
    trainer(tmp_path, max_steps=2).run()
    with pytest.raises(TrainingError, match="seed 3 then, 4 now"):
        trainer(tmp_path, max_steps=2, seed=4).run()


def test_old_checkpoints_go_and_the_newest_stay(tmp_path: Path):
    trainer(tmp_path, save_every=1, keep=2, max_steps=5).run()
    assert sorted(p.name for p in (tmp_path / "training").glob("step-*")) == ["step-000004", "step-000005"]


def test_checkpoints_are_in_the_order_of_their_steps(tmp_path: Path):
    kept = checkpoints.Checkpoints(tmp_path, {}, keep=2)
    for step in (999_800, 999_900, 1_000_000):
        kept.save(checkpoints.Standing(step=step), {}, {})
    assert [path.name for path in kept.all()] == ["step-999900", "step-1000000"]
    assert kept.load()[0].step == 1_000_000


# ----------------------------------------------------------------------------------------------------------- bad luck


def test_a_loss_that_is_no_number_ends_the_run_and_says_where(tmp_path: Path):
    trainer(tmp_path, save_every=2, max_steps=4).run()
    kept = load_file(tmp_path / "training" / "step-000004" / "weights.safetensors")
    poisoned = trainer(tmp_path, save_every=2, max_steps=8)
    poisoned.objective.loss = lambda *_: torch.tensor(float("nan"), requires_grad=True)  # type: ignore[method-assign]
    with pytest.raises(TrainingError, match=r"loss is nan at step 5 .*made\.jsonl:\d+.*step-000004"):
        poisoned.run()
    again = load_file(tmp_path / "training" / "step-000004" / "weights.safetensors")
    assert all(torch.equal(again[name], kept[name]) for name in kept)


def test_a_gradient_that_is_no_number_ends_a_run_in_float16_too(tmp_path: Path):
    """Steps that overflow are left out while there is less to scale by; their norm is no number of JSON."""
    run = trainer(tmp_path, max_steps=40, arithmetic=torch.float16)

    def loss(model: Qwen, *_: object) -> torch.Tensor:
        return model.lm_head.weight.sum().mul(0.0).sqrt()  # 0, and its gradient is no number

    run.objective.loss = loss  # type: ignore[method-assign]
    before = run.sharing.weights()
    with pytest.raises(TrainingError, match=r"gradient is nan at step 17 .*made\.jsonl:\d+"):
        run.run()
    assert all(torch.equal(tensor, before[name]) for name, tensor in run.sharing.weights().items())
    lines = read_log(tmp_path / "training")
    assert len(lines) == 16
    assert all(line["grad_norm"] is None for line in lines)
    assert "NaN" not in (tmp_path / "training" / "log.jsonl").read_text()


def test_a_run_in_float16_goes_on_with_its_scale(tmp_path: Path):
    first = trainer(tmp_path, max_steps=3, save_every=3, arithmetic=torch.float16)
    first.run()
    again = trainer(tmp_path, max_steps=6, save_every=3, arithmetic=torch.float16)
    again._resume()
    assert first.sharing.scale == again.sharing.scale
    assert again.sharing.scale is not None
    assert again.sharing.scale[1] == 3, "steps since it changed: it grows behind some thousand"


def test_a_full_disk_leaves_the_checkpoint_before_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """The disk is full at the second checkpoint, in the middle of the optimizer's file."""
    real = checkpoints.save_file
    calls = 0

    def full(tensors, path, **rest):
        nonlocal calls
        calls += 1
        if calls == 4:
            Path(path).write_bytes(b"half")
            raise OSError(errno.ENOSPC, "No space left on device")
        real(tensors, path, **rest)

    monkeypatch.setattr(checkpoints, "save_file", full)
    with pytest.raises(CheckpointError, match="No space left"):
        trainer(tmp_path, save_every=2, max_steps=6).run()
    monkeypatch.undo()
    assert [p.name for p in (tmp_path / "training").glob("*step*")] == ["step-000002"]
    outcome = trainer(tmp_path, save_every=2, max_steps=6).run()
    assert (outcome.resumed, outcome.steps) == (2, 6)


def test_a_damaged_checkpoint_is_named(tmp_path: Path):
    trainer(tmp_path, save_every=2, max_steps=2).run()
    (tmp_path / "training" / "step-000002" / "weights.safetensors").write_bytes(b"half")
    with pytest.raises(CheckpointError, match="step-000002"):
        trainer(tmp_path, save_every=2, max_steps=4).run()
