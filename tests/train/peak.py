"""A run in a process of its own, started by test_planning.py: prints the planned and the real peak in bytes."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import torch
from tests.train.tiny import CPU, TINY

from qwenlet.config import TrainingConfig
from qwenlet.train.objective import NextToken
from qwenlet.train.planning import make_plan
from qwenlet.train.pretrain import new_model, sized
from qwenlet.train.processes import Processes
from qwenlet.train.samples import Report, Samples
from qwenlet.train.trainer import Trainer

LENGTH, BUDGET = 256, 4096


def main(out: Path, checkpointing: str) -> None:
    torch.set_num_threads(1)
    config = sized(
        TINY, vocab_size=8192, hidden_size=256, num_hidden_layers=6, num_attention_heads=4, intermediate_size=688,
        seq_length=LENGTH, max_position_embeddings=LENGTH,
    )  # fmt: skip
    model = new_model(config, 0, CPU)
    ids = np.random.default_rng(0).integers(0, 8192, 3 * BUDGET).astype(np.int32)
    starts = np.arange(0, len(ids) + 1, LENGTH)
    samples = Samples(ids, np.ones(len(ids), bool), starts, [""] * (len(starts) - 1), Report())
    training = TrainingConfig(epochs=1, accumulation=1, checkpointing=checkpointing)  # type: ignore[arg-type]
    plan = make_plan(
        model, samples, None, training, frozen_bytes=0, budget=BUDGET, memory=None, dtype=torch.float32, device=CPU,
        group=Processes(),
    )  # fmt: skip
    run = Trainer(
        model, NextToken(samples), training, lr=1e-3, dtype=torch.float32, device=CPU, out=out, run={}, budget=BUDGET
    )
    run.run()
    status = Path("/proc/self/status").read_text()
    peak = next(line for line in status.splitlines() if line.startswith("VmHWM")).split()[1]
    print(json.dumps([plan.peak, int(peak) * 1024]))


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2])
