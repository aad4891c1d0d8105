"""Does DPO teach the demo model, in minutes on one core, to prefer what people preferred?

LoRA of the demo model (135 M parameters) by `qwenlet finetune --method dpo` on pairs of replies, a part of them held
out. Of the held-out pairs, before and after:

    accuracy   share of pairs whose chosen reply is likelier than the rejected one, as whole texts
    reward accuracy   share whose chosen reply gained more likelihood by training than the rejected one
    reward margin   beta * (what the margin log p(chosen) - log p(rejected) gained), mean, with its standard error
    loss       of DPO: log 2 before, by definition

    python benchmarks/dpo_demo.py pairs.json --out OUT --threads 1

DATA is a JSON list of pairs in any form that `--method dpo` reads. The last line is one JSON document.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from qwenlet import hub
from qwenlet.checkpoint import Checkpoint, load_model, read_tokenizer
from qwenlet.config import DataConfig
from qwenlet.errors import MissingTokenizerError
from qwenlet.lora import load_adapter
from qwenlet.train.dpo import Preference
from qwenlet.train.preferences import Pairs, load_pairs

CPU = torch.device("cpu")


def margins(path: Path, pairs: Pairs, adapter: Path | None) -> Tensor:
    """log p(chosen) - log p(rejected) of each pair, float64 [pairs]."""
    model, _ = load_model(Checkpoint.open(path), torch.bfloat16, CPU)
    if adapter is not None:
        load_adapter(model, adapter)
    model.eval()
    objective = Preference(pairs)
    with torch.no_grad():
        return torch.cat([objective.margins(model, (index,), CPU).double() for index in range(len(pairs))])


def share(values: Tensor) -> tuple[float, float]:
    """Of values above 0, with its standard error."""
    part = float((values > 0).double().mean())
    return part, math.sqrt(part * (1 - part) / len(values))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("pairs", type=Path)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--held-out", type=int, default=100, help="records of the file, before those too long go")
    parser.add_argument("--max-length", type=int, default=768)
    parser.add_argument("--epochs", default="1")
    parser.add_argument("--lr", default="2e-4")
    parser.add_argument("--beta", type=float, default=0.1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    options.out.mkdir(parents=True, exist_ok=True)
    records = json.loads(options.pairs.read_text(encoding="utf-8"))
    random.Random(0).shuffle(records)
    data, held_out = (options.out / f"{name}.json" for name in ("data", "held-out"))
    held_out.write_text(json.dumps(records[: options.held_out]))
    data.write_text(json.dumps(records[options.held_out :]))
    adapter = options.out / "adapter"
    if not (adapter / "adapter_config.json").exists():  # else it was trained before: only what follows is done again
        subprocess.run(
            [sys.executable, "-m", "qwenlet", "finetune", "demo", str(data), "--method", "dpo", "--out", str(adapter),
             "--max-length", str(options.max_length), "--batch-size", "1", "--accumulation", "2", "--epochs",
             options.epochs, "--lr", options.lr, "--rank", "32", "--alpha", "32", "--dropout", "0", "--dpo-beta",
             str(options.beta)],
            check=True, env=os.environ | {"OMP_NUM_THREADS": str(options.threads)},
        )  # fmt: skip
    path = hub.resolve("demo")
    checkpoint = Checkpoint.open(path)
    tokenizer = read_tokenizer(checkpoint)
    if isinstance(tokenizer, MissingTokenizerError):
        raise tokenizer
    pairs = load_pairs(
        [held_out], tokenizer, DataConfig(max_length=options.max_length), system=checkpoint.default_system
    )
    before, after = margins(path, pairs, None), margins(path, pairs, adapter)
    rewards = options.beta * (after - before)
    log = [json.loads(line) for line in (adapter / "training" / "log.jsonl").read_text().splitlines()]
    result: dict[str, Any] = {
        "held_out_pairs": len(pairs),
        "accuracy": {"before": share(before), "after": share(after)},
        "reward_accuracy": share(rewards),
        "reward_margin": (float(rewards.mean()), float(rewards.std()) / math.sqrt(len(pairs))),
        "loss": {"before": math.log(2), "after": float(-logsigmoid(rewards).mean())},
        "steps": len(log),
        "tokens": log[-1]["tokens"],
        "minutes": sum(line.get("seconds", 0.0) for line in log) / 60,
    }
    print(f"\n| {len(pairs)} held-out pairs | before | after |")
    print("|---|---|---|")
    was, now = result["accuracy"]["before"], result["accuracy"]["after"]
    print(f"| chosen reply likelier than the rejected | {was[0]:.0%} ± {was[1]:.0%} | {now[0]:.0%} ± {now[1]:.0%} |")
    gained, error = result["reward_accuracy"]
    print(f"| chosen reply gained more | | {gained:.0%} ± {error:.0%} |")
    print("| reward margin | 0 | {:.3f} ± {:.3f} |".format(*result["reward_margin"]))
    print(f"| loss | {math.log(2):.3f} | {result['loss']['after']:.3f} |")
    print(f"{result['steps']} steps, {result['tokens']:,} tokens, {result['minutes']:.1f} minutes of training")
    print(json.dumps(result))


if __name__ == "__main__":
    main()
