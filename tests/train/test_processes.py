"""Two processes learn what one learns: the same losses, step by step, with whole models (ddp) and with parts (fsdp)."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from qwenlet.checkpoint import Checkpoint

ROOT = Path(__file__).parents[2]


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def run(out: Path, count: int, parallel: str, method: str, max_steps: int = 6) -> tuple[Any, dict[str, torch.Tensor]]:
    """(losses, held-out losses, step gone on from), and the weights at the end."""
    out.mkdir(exist_ok=True)
    command = [sys.executable, "-W", "ignore", "-m", "tests.train.two", str(out), parallel, method, str(max_steps)]
    shared = os.environ | {"WORLD_SIZE": str(count), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    started = [
        subprocess.Popen(command, cwd=ROOT, env=shared | {"RANK": str(rank)}, stderr=subprocess.PIPE, text=True)
        for rank in range(count)
    ]
    for process in started:
        _, said = process.communicate(timeout=240)
        assert process.returncode == 0, said[-3000:]
    return json.loads((out / "outcome.json").read_text()), load_file(out / "weights.safetensors")


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("alone")
    return {method: run(folder / method, 1, "ddp", method) for method in ("full", "lora")}


@pytest.mark.parametrize("method", ["full", "lora"])
@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
def test_two_processes_follow_the_curve_of_one(tmp_path: Path, alone: dict[str, Any], parallel: str, method: str):
    (losses, held_out, _), weights = run(tmp_path, 2, parallel, method)
    (expected, expected_held_out, _), expected_weights = alone[method]
    assert len(losses) == 6
    assert losses == pytest.approx(expected, abs=1e-4)
    assert losses[-1] < losses[0] - 0.02
    assert [loss for _, loss in held_out] == pytest.approx([loss for _, loss in expected_held_out], abs=1e-4)
    for name, tensor in expected_weights.items():
        torch.testing.assert_close(weights[name], tensor, atol=2e-3, rtol=0, msg=name)


def test_a_run_of_parts_goes_on_where_it_stopped(tmp_path: Path, alone: dict[str, Any]):
    """Checkpoints hold whole tensors, so they are put back into parts."""
    run(tmp_path, 2, "fsdp", "full", max_steps=3)
    path = tmp_path / "training" / "step-000003"
    assert path.exists()
    (losses, _, resumed), _ = run(tmp_path, 2, "fsdp", "full", max_steps=6)
    assert resumed == 3
    assert len(losses) == 3


def test_two_processes_pretrain_by_the_verb(tmp_path: Path, qwen_vocab: Path):
    """Each holds parts of the model; the first one writes it, draws its sample and tells."""
    tales = [f"Once there were {count} owls in red hats." for count in range(60)]
    (tmp_path / "tales.txt").write_text("\n<|endoftext|>\n".join(tales), encoding="utf-8")
    command = [
        sys.executable, "-W", "ignore", "-m", "qwenlet", "pretrain", str(tmp_path / "tales.txt"), "--tokenizer",
        str(qwen_vocab), "--vocabulary", "400", "--layers", "1", "--hidden", "32", "--heads", "2", "--inner", "64",
        "--length", "32", "--max-steps", "2", "--accumulation", "1", "--dtype", "fp32", "--prompt", "Once",
        "--parallel", "fsdp", "--out", str(tmp_path / "out"),
    ]  # fmt: skip
    shared = os.environ | {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    shared |= {"OMP_NUM_THREADS": "1", "QWENLET_CACHE": str(tmp_path / "cache")}
    started = [
        subprocess.Popen(command, env=shared | {"RANK": str(rank)}, stderr=subprocess.PIPE, text=True)
        for rank in range(2)
    ]
    said = [process.communicate(timeout=120)[1] for process in started]
    assert [process.returncode for process in started] == [0, 0], said
    assert "a sample, of which" in said[0]
    assert said[1] == ""
    assert Checkpoint.open(tmp_path / "out").config.hidden_size == 32
