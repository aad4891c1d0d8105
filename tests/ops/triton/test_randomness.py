"""The device draws what the host draws."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from qwenlet import sampling

pytest.importorskip("triton")

from qwenlet.ops.triton.randomness import uniform


def test_bit_for_bit() -> None:
    seeds = [0, 1, 2**31, 2**63 - 1, 2**63, 2**64 - 1, 12345678901234567890] * 10
    choices = [i % 3 for i in range(70)]
    positions = [i * 117 for i in range(70)]
    bits = torch.from_numpy(np.array(seeds, np.uint64).view(np.int64))
    found = uniform(bits, torch.tensor(choices, dtype=torch.int32), torch.tensor(positions, dtype=torch.int32))
    assert found.tolist() == [sampling.uniform(*each) for each in zip(seeds, choices, positions, strict=True)]
