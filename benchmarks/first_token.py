"""How long from typing the command to the first word of the demo model, and where the time goes?

Two measurements, each several times, medians printed:

    1. the command itself, `qwenlet chat --prompt ...`: from process start to the first byte on stdout, and to the end
    2. the same steps in a fresh Python, with a clock between them

The demo model must be in the cache already (`qwenlet pull demo`). The last line is one JSON document.

    python benchmarks/first_token.py --runs 5
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time

QUESTION = "What is the capital of France?"

STEPS = """
import time; start = time.perf_counter(); marks = []
def mark(name): marks.append((name, time.perf_counter() - start))
import torch; mark("import torch")
from qwenlet import chat, hub
from qwenlet.checkpoint import Checkpoint, auto_dtype, load_model
from qwenlet.config import EngineConfig, SamplingParams
from qwenlet.engine import Engine
from qwenlet.tokenizer import Tokenizer
mark("import qwenlet")
checkpoint = Checkpoint.open(hub.resolve("demo", offline=True)); mark("find and read the header")
tokenizer = Tokenizer.from_gguf(checkpoint.header.metadata, "demo"); mark("tokenizer")
cpu = torch.device("cpu")
model, _ = load_model(checkpoint, auto_dtype(cpu)[0], cpu, linear="auto"); mark("weights")
engine = Engine(model, tokenizer, EngineConfig(), checkpoint.defaults, cpu, chat.stop_ids(tokenizer))
ids = chat.render(tokenizer, [{"role": "system", "content": checkpoint.default_system},
                              {"role": "user", "content": "What is the capital of France?"}])
(request,) = engine.submit(ids, SamplingParams())
next(chunk for chunk in engine.stream(request) if chunk.completion_tokens); mark("prefill")
import json; print(json.dumps(marks))
"""


def command_times() -> tuple[float, float]:
    """Seconds from process start to the first byte on stdout, and to the process's end."""
    start = time.perf_counter()
    command = [sys.executable, "-m", "qwenlet", "chat", "demo", "--offline", "--prompt", QUESTION]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stdin=subprocess.DEVNULL) as process:
        assert process.stdout is not None
        first = process.stdout.read(1)
        to_first = time.perf_counter() - start
        process.stdout.read()
    assert first, "nothing was printed"
    assert process.returncode == 0, f"exit code {process.returncode}"
    return to_first, time.perf_counter() - start


def steps() -> dict[str, float]:
    """Seconds each step took in a fresh Python."""
    done = subprocess.run([sys.executable, "-c", STEPS], capture_output=True, text=True, check=True)
    before, out = 0.0, {}
    for name, at in json.loads(done.stdout.splitlines()[-1]):
        out[name], before = at - before, at
    return out


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--runs", type=int, default=5)
    runs = parser.parse_args().runs
    command_times()  # warm the file cache
    commands = [command_times() for _ in range(runs)]
    to_first, to_end = (statistics.median(column) for column in zip(*commands, strict=True))
    print(f"first word after {to_first:.2f} s, end after {to_end:.2f} s (median of {runs})")
    each = [steps() for _ in range(runs)]
    medians = {name: statistics.median(run[name] for run in each) for name in each[0]}
    for name, seconds in medians.items():
        print(f"  {name:28}{seconds:6.2f} s")
    result = {"benchmark": "first_token", "first": to_first, "end": to_end, "steps": medians, "runs": commands}
    print(json.dumps(result))


if __name__ == "__main__":
    main()
