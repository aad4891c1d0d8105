"""What does an adapter cost a decoded token?

Adapters of the published rank (64, beside c_attn, c_proj, w1 and w2) with random numbers, beside a model as `load` has
it: tokens/s of one reply with none and with one, and of two replies at once with none, with one for both, and with one
each. Turns are taken in one process, medians of them are shown.

    python benchmarks/adapters.py demo --threads 2

The last line is one JSON document.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import torch

import qwenlet
from qwenlet import hub
from qwenlet.checkpoint import Checkpoint, load_model
from qwenlet.config import LoraConfig, SamplingParams
from qwenlet.lora import add_lora, save_adapter

PROMPT = "Once upon a time"
# name -> the adapter of each reply
WORKS: dict[str, tuple[str | None, ...]] = {
    "one reply, no adapter": (None,),
    "one reply, an adapter": ("a",),
    "two replies, no adapter": (None, None),
    "two replies, the same adapter": ("a", "a"),
    "two replies, an adapter each": ("a", "b"),
}


def make_adapter(path: Path, folder: Path, seed: int) -> None:
    """One whose both factors are random, as after training."""
    model, _ = load_model(Checkpoint.open(path), torch.bfloat16, torch.device("cpu"))
    add_lora(model, LoraConfig())
    torch.manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.normal_(std=0.01)
    save_adapter(model, folder)


def decode_rate(llm: qwenlet.LLM, adapters: Sequence[str | None], tokens: int) -> float:
    """Tokens/s of all replies together, from the first chunk of the last of them on."""
    params = [
        SamplingParams(temperature=0.0, max_new_tokens=tokens, ignore_eos=True, adapter=name) for name in adapters
    ]
    streams = [llm.stream(PROMPT, each) for each in params]
    for stream in streams:
        next(iter(stream))
    begun = time.perf_counter()
    done = [qwenlet.Completion.from_chunks(stream) for stream in streams]
    seconds = time.perf_counter() - begun
    return sum(len(completion.token_ids) for completion in done) / seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    with tempfile.TemporaryDirectory() as folder:
        places = {name: Path(folder) / name for name in ("a", "b")}
        for seed, place in enumerate(places.values()):
            make_adapter(hub.resolve(options.model), place, seed)
        rates: dict[str, list[float]] = {name: [] for name in WORKS}
        with qwenlet.load(options.model, adapters=places, speculate=False) as llm:
            for turn in range(options.rounds + 1):
                for name, adapters in WORKS.items():
                    rate = decode_rate(llm, adapters, options.tokens)
                    if turn:  # the first warms up
                        rates[name].append(rate)
    print(f"\n| {options.model}, {options.tokens} tokens a reply | tokens/s | of none |\n|---|---|---|")
    medians = {name: statistics.median(values) for name, values in rates.items()}
    for name, rate in medians.items():
        none = medians["one reply, no adapter" if len(WORKS[name]) == 1 else "two replies, no adapter"]
        print(f"| {name} | {rate:.1f} | {rate / none:.2f} |")
    print(json.dumps({"medians": medians, "rates": rates}))


if __name__ == "__main__":
    main()
