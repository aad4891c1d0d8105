"""Is our bfloat16 path faster than what a user would pick instead? Ours and Hugging Face transformers, in one run.

Three sides: our engine ("qwenlet"), our model behind transformers' API ("qwenlet.hf"), and Qwen2ForCausalLM
("transformers"); the last two decode by the same `generate`. All run the same weights (below 8,192 tokens Qwen-1 and
Qwen2ForCausalLM are the same maths), on the same threads, in turn, and the median of several rounds is printed.
Prefill: one prompt of 512 tokens. Decode: greedy tokens after a short prompt; a decoded token reads every weight but
the embedding, 3.05 GB for Qwen-1.8B, so decode is also given in GB/s beside the read speed measured in the same run.

    qwenlet random OUT --like qwen-1.8b          # once: full size, random weights, 3.7 GB
    python benchmarks/versus_transformers.py OUT --threads 2
    python benchmarks/versus_transformers.py OUT --sides qwenlet.hf transformers

The last line is one JSON document.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import subprocess
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

import qwenlet
from qwenlet.checkpoint import Checkpoint
from qwenlet.profiling.ceilings import read_speed
from qwenlet.profiling.peer import peer_model


def timed(work: Callable[[], Any]) -> tuple[float, Any]:
    start = time.perf_counter()
    result = work()
    return time.perf_counter() - start, result


class Ours:
    name = "qwenlet"

    def __init__(self, path: Path) -> None:
        self.llm = qwenlet.load(
            str(path), dtype="bf16", device="cpu", prefix_cache=False
        )  # the same prompt in each round

    def prefill(self, ids: Sequence[int]) -> float:
        """Seconds from the prompt to its last logits."""
        completion = self.llm.generate(ids, qwenlet.SamplingParams(temperature=0, max_new_tokens=1, ignore_eos=True))
        return completion.timings.prefill_seconds or 0.0

    def decode(self, ids: Sequence[int], count: int) -> tuple[float, list[int]]:
        """Seconds for `count` tokens after the first one."""
        params = qwenlet.SamplingParams(
            temperature=0, repetition_penalty=1.0, max_new_tokens=count + 1, ignore_eos=True
        )
        completion = self.llm.generate(ids, params)
        assert completion.completion_tokens == count + 1
        return completion.timings.decode_seconds or 0.0, list(completion.token_ids)


class Transformers:
    name = "transformers"

    def __init__(self, path: Path) -> None:
        from transformers import GenerationConfig

        self.model = self.load(path)
        # of its own, so that a checkpoint's defaults don't give one side work that the other hasn't
        self.model.generation_config = GenerationConfig(do_sample=False, eos_token_id=None, pad_token_id=0)

    def load(self, path: Path) -> Any:
        return peer_model(Checkpoint.open(path), torch.bfloat16, torch.device("cpu"))

    @torch.inference_mode()
    def prefill(self, ids: Sequence[int]) -> float:
        tokens = torch.tensor([list(ids)])
        return timed(lambda: self.model(tokens, use_cache=True, logits_to_keep=1).logits[0, -1].argmax())[0]

    @torch.inference_mode()
    def decode(self, ids: Sequence[int], count: int) -> tuple[float, list[int]]:
        """Its own `generate`, timed as the whole minus the prefill that it starts with."""
        tokens = torch.tensor([list(ids)])
        options = {"attention_mask": torch.ones_like(tokens)}
        first, _ = timed(lambda: self.model.generate(tokens, max_new_tokens=1, **options))
        whole, out = timed(lambda: self.model.generate(tokens, max_new_tokens=count + 1, **options))
        return whole - first, out[0, len(ids) :].tolist()


class Door(Transformers):
    """Our model, through the same `generate`."""

    name = "qwenlet.hf"

    def load(self, path: Path) -> Any:
        from qwenlet.hf import QWenLMHeadModel

        return QWenLMHeadModel.from_pretrained(path, dtype=torch.bfloat16).eval()


SIDES: dict[str, type[Ours] | type[Transformers]] = {side.name: side for side in (Ours, Door, Transformers)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("model", type=Path)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--prompt", type=int, default=512)
    parser.add_argument("--tokens", type=int, default=24)
    parser.add_argument("--sides", nargs="+", choices=list(SIDES), default=list(SIDES))
    options = parser.parse_args()
    torch.set_num_threads(options.threads)

    generator = torch.Generator().manual_seed(0)
    long = torch.randint(1000, 100_000, (options.prompt,), generator=generator).tolist()
    sides = [SIDES[name](options.model) for name in options.sides]
    config = Checkpoint.open(options.model).config
    token_bytes = 2 * (config.parameter_count - config.vocab_size * config.hidden_size)

    prefill: dict[str, list[float]] = {side.name: [] for side in sides}
    decode: dict[str, list[float]] = {side.name: [] for side in sides}
    first_tokens: dict[str, list[int]] = {}
    for side in sides:  # warm up
        side.prefill(long)
        side.decode(long[:16], 2)
    for _ in range(options.rounds):
        for side in sides:
            prefill[side.name].append(options.prompt / side.prefill(long))
        for side in sides:
            seconds, tokens = side.decode(long[:16], options.tokens)
            decode[side.name].append(options.tokens / seconds)
            first_tokens[side.name] = tokens

    peer = first_tokens[sides[-1].name]
    speed = read_speed(torch.device("cpu"))[0] / 1e9
    rows: dict[str, dict[str, Any]] = {}
    print(f"{platform.processor() or platform.machine()}, {options.threads} threads, torch {torch.__version__}, bf16")
    print(f"read speed {speed:.1f} GB/s")
    print(f"{'':22}" + "".join(f"{side.name:>14}" for side in sides) + "   ratios to the last")
    for title, table in (("prefill tokens/s", prefill), ("decode tokens/s", decode)):
        medians = {name: statistics.median(values) for name, values in table.items()}
        last = table[sides[-1].name]
        ratios = {
            name: statistics.median(x / y for x, y in zip(values, last, strict=True)) for name, values in table.items()
        }
        rows[title] = {**medians, "ratios": ratios, "all": table}
        row = "".join(f"{value:14.2f}" for value in medians.values())
        print(f"{title:22}{row}   {', '.join(f'{ratio:.2f}' for ratio in ratios.values())}")
    for name, tokens in first_tokens.items():
        achieved = token_bytes * rows["decode tokens/s"][name] / 1e9
        same = sum(a == b for a, b in zip(tokens, peer, strict=True))
        print(
            f"{name} reads {token_bytes / 1e9:.2f} GB a token: {achieved:.1f} GB/s, {achieved / speed:.0%} of the read "
            f"speed; greedy tokens equal: {same} of {options.tokens + 1}"
        )
    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False
    ).stdout.strip()
    print(
        json.dumps(
            {
                "benchmark": "versus_transformers",
                "commit": commit,
                "threads": options.threads,
                "read_gbs": speed,
                **rows,
            }
        )
    )


if __name__ == "__main__":
    main()
