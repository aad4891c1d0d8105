"""Whether a model fits a GPU, with a stand-in for its memory; the weights' way there, with the meta device for it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from qwenlet import plan
from qwenlet.checkpoint import Checkpoint, check_room, free_memory, load_model, moving, write_rounded
from qwenlet.checkpoint.room import setup_of
from qwenlet.config import EngineConfig, QuantConfig
from qwenlet.errors import ConfigError
from qwenlet.linear import QuantEmbedding, QuantLinear

GPU, META = torch.device("cuda"), torch.device("meta")


@pytest.fixture
def tiny(golden: Path) -> Checkpoint:
    return Checkpoint.open(golden / "tiny-qwen")


def free(monkeypatch: pytest.MonkeyPatch, size: int) -> None:
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device=None: (size, 80 << 30))


def test_what_does_not_fit_is_refused_with_what_would(tiny: Checkpoint, monkeypatch: pytest.MonkeyPatch) -> None:
    options = EngineConfig(max_context=4096, kv_cache="fp32")
    needed = plan.estimate(setup_of(tiny, None, torch.float32, options, coded=False)).peak
    free(monkeypatch, needed)
    check_room(tiny, None, torch.float32, options, GPU, coded=False)
    free(monkeypatch, needed - 1)
    with pytest.raises(ConfigError, match=r"(?s)4096 tokens of past need .* these would fit: --kv-cache int8"):
        check_room(tiny, None, torch.float32, options, GPU, coded=False)


def test_memory_is_that_of_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    free(monkeypatch, 12_345)
    monkeypatch.setattr(plan, "available_memory", lambda: 67_890)
    assert (free_memory(GPU), free_memory(torch.device("cpu"))) == (12_345, 67_890)
    # what a file's mapping will still move into memory isn't free
    monkeypatch.setitem(moving._left, 4096, 890)
    assert (free_memory(GPU), free_memory(torch.device("cpu"))) == (12_345, 67_000)


def test_nothing_fits(tiny: Checkpoint, monkeypatch: pytest.MonkeyPatch) -> None:
    free(monkeypatch, 1000)
    with pytest.raises(ConfigError, match="a smaller model, or device='cpu'"):
        check_room(tiny, None, torch.bfloat16, EngineConfig(), GPU, coded=False)


def test_on_a_gpu_every_weight_counts(tiny: Checkpoint) -> None:
    """Nothing is mapped, and nothing but what the device holds counts."""
    setup = setup_of(tiny, None, torch.bfloat16, EngineConfig(), coded=False)
    found = plan.estimate(setup)
    assert found.weight_bytes == tiny.config.parameter_count * 2
    assert found.runtime == plan.GPU_RUNTIME_BYTES
    assert found.loading == 0


def test_weights_in_codes_go_to_the_device_as_they_are(tiny: Checkpoint, tmp_path: Path) -> None:
    write_rounded(tiny, tmp_path / "int4", QuantConfig(group_size=32))
    model, report = load_model(Checkpoint.open(tmp_path / "int4"), torch.bfloat16, META, quantized=True)
    linears = [module for module in model.modules() if isinstance(module, QuantLinear)]
    assert len(linears) == 5 * tiny.config.num_hidden_layers + 1
    assert {linear.tiles.weight.device for linear in linears} == {META}
    assert {linear.tiles.scales.device for linear in linears} == {META}
    assert isinstance(model.transformer.wte, QuantEmbedding)
    assert model.transformer.wte.codes.device == META
    assert model.transformer.wte.codes.is_contiguous()
    assert {parameter.device for parameter in model.parameters()} == {META}
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    assert report.dtype == "int4"
