"""One of several processes of a run, started by test_processes.py; the first writes losses and weights down."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch
from safetensors.torch import save_file
from tests.train.tiny import CPU, made_samples, tiny_model, trainer

from qwenlet.lora import LoraConfig, add_lora
from qwenlet.train.objective import NextToken
from qwenlet.train.processes import processes


def main(out: Path, parallel: str, method: str, max_steps: int) -> None:
    torch.set_num_threads(1)
    model = tiny_model()
    if method == "lora":
        add_lora(model, LoraConfig(rank=4, dropout=0.1))
    with processes(CPU) as group:
        assert group.least(10 + group.rank) == 10
        assert group.least(10 if group.count == 1 else [None, 10][group.rank]) == (10 if group.count == 1 else None)
        run = trainer(
            out, model, group=group, parallel=parallel, accumulation=4 // group.count, max_steps=max_steps,
            save_every=3, held_out=NextToken(made_samples(7, seed=1)),
            export=lambda folder: save_file(
                {name: p.detach().contiguous() for name, p in model.named_parameters()}, folder
            ),
        )  # fmt: skip
        outcome = run.run()
        run.write(out / "weights.safetensors")
        if group.first:
            (out / "outcome.json").write_text(json.dumps([outcome.losses, outcome.held_out, outcome.resumed]))


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2], sys.argv[3], int(sys.argv[4]))
