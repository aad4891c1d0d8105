from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from checkpoint.variants import State, tiny_state


@pytest.fixture(scope="session")
def tiny(golden: Path) -> Path:
    """The tiny golden model, in the published layout."""
    return golden / "tiny-qwen"


@pytest.fixture
def state(tiny: Path) -> State:
    return tiny_state(tiny)


@pytest.fixture
def raw_config(tiny: Path) -> dict[str, Any]:
    return json.loads((tiny / "config.json").read_text(encoding="utf-8"))


@pytest.fixture(scope="session")
def expected(golden: Path) -> torch.Tensor:
    """The tiny model's logits of `variants.IDS`; tests/test_model.py ties the model itself to the published code."""
    from checkpoint.variants import logits

    return logits(golden / "tiny-qwen")
