"""DeepSpeed's ZeRO: what its settings may say, and, where it is installed, the curve of one process and going on."""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tests.train.test_processes import free_port, run
from tests.train.tiny import trainer

from qwenlet.config import TrainingConfig
from qwenlet.errors import ConfigError
from qwenlet.train.zero import zero_settings

ROOT = Path(__file__).parents[2]
FILES = ROOT / "docs/guides/deepspeed"
OURS = TrainingConfig(batch_size=2, accumulation=3, clip=0.5)
# as accelerate's plugin fills it in from docs/guides/deepspeed/zero2.yaml
PLUGIN: dict[str, Any] = {
    "train_batch_size": "auto", "train_micro_batch_size_per_gpu": "auto", "gradient_accumulation_steps": 1,
    "gradient_clipping": "auto", "steps_per_print": float("inf"),
    "zero_optimization": {
        "stage": 2, "offload_optimizer": {"device": "none", "nvme_path": None}, "reduce_bucket_size": "auto",
        "offload_param": {"device": "none", "nvme_path": None}, "stage3_gather_16bit_weights_on_model_save": False,
    },
}  # fmt: skip


def settings(dtype: torch.dtype = torch.float32, **changes: Any) -> dict[str, Any]:
    return zero_settings(PLUGIN | changes, OURS, dtype, 4)


def test_what_a_run_decides_is_filled_in():
    made = settings(gradient_clipping=0.5, train_batch_size=24, optimizer=None, bf16={"enabled": False})
    assert made["gradient_clipping"] == 0.5
    assert (made["train_micro_batch_size_per_gpu"], made["gradient_accumulation_steps"]) == (1, 1)
    assert made["train_batch_size"] == 4  # DeepSpeed holds it to the product of these two and the processes
    assert made["zero_optimization"] == {"stage": 2, "stage3_gather_16bit_weights_on_model_save": False}


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"gradient_accumulation_steps": 8}, "gradient_accumulation_steps is 8 .* --accumulation is 3"),
        ({"gradient_clipping": 1.0}, "gradient_clipping is 1.0 .* --clip is 0.5"),
        ({"train_batch_size": 64}, "train_batch_size is 64 .* 4 processes is 24"),
        ({"optimizer": {"type": "AdamW"}}, "'optimizer': qwenlet's AdamW is used"),
        ({"bf16": {"enabled": "auto"}}, "'bf16': --dtype"),
        ({"zero_optimization": {"stage": 0}}, "zero_stage is 0, expected 1, 2 or 3"),
        ({"zero_optimization": {"stage": 3, "offload_param": {"device": "cpu"}}}, "offload_param's device is 'cpu'"),
    ],
)
def test_settings_that_say_otherwise_are_refused(changes: dict[str, Any], said: str):
    with pytest.raises(ConfigError, match=said):
        settings(**changes)


def test_accelerate_s_precision_is_the_run_s(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    assert settings(torch.bfloat16)["zero_optimization"]["stage"] == 2
    with pytest.raises(ConfigError, match="mixed_precision is 'bf16', but this run computes in fp32"):
        settings(torch.float32)


def test_deepspeed_is_refused_beside_another_way_and_in_one_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
    with pytest.raises(ConfigError, match="parallel is 'fsdp', but accelerate launch asks for DeepSpeed"):
        trainer(tmp_path, parallel="fsdp")
    with pytest.raises(ConfigError, match="DeepSpeed in one process"):
        trainer(tmp_path)


def launched(out: Path, stage: int, method: str, max_steps: int = 6) -> tuple[Any, dict[str, torch.Tensor]]:
    """As test_processes' `run`, by accelerate and the guide's file for two processes."""
    out.mkdir(exist_ok=True)
    command = [
        sys.executable, "-W", "ignore", "-m", "accelerate.commands.launch", "--config_file",
        str(FILES / f"zero{stage}.yaml"), "--main_process_port", str(free_port()), "-m", "tests.train.two", str(out),
        "auto", method, str(max_steps),
    ]  # fmt: skip
    alone = os.environ | {"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=ROOT, env=alone, capture_output=True, text=True, timeout=280, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads((out / "outcome.json").read_text()), load_file(out / "weights.safetensors")


needs_deepspeed = pytest.mark.skipif(
    importlib.util.find_spec("deepspeed") is None,
    reason="DeepSpeed has no wheel: DS_BUILD_OPS=0 pip install --no-build-isolation deepspeed",
)


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("alone")
    return {method: run(folder / method, 1, "ddp", method) for method in ("full", "lora")}


@pytest.mark.slow
@needs_deepspeed
@pytest.mark.parametrize("method", ["full", "lora"])
@pytest.mark.parametrize("stage", [2, 3])
def test_zero_follows_the_curve_of_one_process(tmp_path: Path, alone: dict[str, Any], stage: int, method: str):
    (losses, held_out, _), weights = launched(tmp_path, stage, method)
    (expected, expected_held_out, _), expected_weights = alone[method]
    assert losses == pytest.approx(expected, abs=1e-4)
    assert [loss for _, loss in held_out] == pytest.approx([loss for _, loss in expected_held_out], abs=1e-4)
    for name, tensor in expected_weights.items():
        torch.testing.assert_close(weights[name], tensor, atol=2e-3, rtol=0, msg=name)


@pytest.mark.slow
@needs_deepspeed
@pytest.mark.parametrize("stage", [2, 3])
def test_a_run_goes_on_from_zero_s_checkpoints(tmp_path: Path, alone: dict[str, Any], stage: int):
    """Under ZeRO, and without it: they hold whole tensors, the optimizer's too."""
    launched(tmp_path / "zero", stage, "full")
    shutil.rmtree(tmp_path / "zero" / "training" / "step-000006")  # what is left is what a kill would leave
    shutil.copytree(tmp_path / "zero", tmp_path / "one")
    (expected, _, _), expected_weights = alone["full"]
    for (losses, _, resumed), weights in (
        launched(tmp_path / "zero", stage, "full"),
        run(tmp_path / "one", 1, "ddp", "full"),
    ):
        assert resumed == 3
        assert losses == pytest.approx(expected[3:], abs=1e-4)
        for name, tensor in expected_weights.items():
            torch.testing.assert_close(weights[name], tensor, atol=2e-3, rtol=0, msg=name)
