"""Is int4 on a CPU faster than what a user would pick instead? Ours and llama.cpp, in one run, in turn.

Both sides hold the same full-size Qwen-1.8B of random weights (speed and memory don't depend on their values): ours as
`quant="int4"`, "int8" and bfloat16, llama.cpp as Q4_0, Q8_0 and F16 in the architecture `qwen`, on the same threads. Of
llama.cpp the best of plain, flash attention, and flash attention with a q8_0 cache counts. Ours is timed through
`LLM.stream`, sampling and text included; llama-bench samples nothing. The long run is of a checkpoint that
`qwenlet quantize` has written.

    benchmarks/peer_llama.sh DIR                      # once: builds llama-bench, makes the GGUF files (20 minutes)
    python benchmarks/versus_llama.py DIR --threads 2 [--long] [--rounds 3]

--long adds the 2,048 tokens from one token, their peak memory, and decoding at 8,000 tokens (half an hour and more).
Then, per operator of a decoded token, what share of the memory's read speed it reaches. The last line is one JSON
document.
"""

from __future__ import annotations

import argparse
import compileall
import json
import math
import platform
import statistics
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

import qwenlet
from qwenlet.cache import Rows
from qwenlet.checkpoint.gguf import row_bytes
from qwenlet.gguf_header import read_header
from qwenlet.profiling.ceilings import fastest_reader, read_speed

VARIANTS: dict[str, list[str]] = {
    "plain": ["-fa", "0"],
    "flash": ["-fa", "1"],
    "flash, q8_0 cache": ["-fa", "1", "-ctk", "q8_0", "-ctv", "q8_0"],
}
GREEDY: dict[str, Any] = {"temperature": 0.0, "repetition_penalty": 1.0, "ignore_eos": True}
PREFILL, DECODE, LONG, DEEP = 512, 64, 2048, 8000
# The least that is accepted, as ratios to llama.cpp's best.
TARGETS = {
    ("int4", "prefill"): 2.2,
    ("int4", "decode"): 1.2,
    ("int4", "long"): 2.0,
    ("int4", "deep"): 4.0,
    ("int8", "decode"): 1.15,
    ("bf16", "decode"): 0.97,
}
PEER_FILES = {"int4": "q4_0.gguf", "int8": "q8_0.gguf", "bf16": "f16.gguf"}


class Peer:
    """llama-bench on one file."""

    def __init__(self, folder: Path, kind: str, threads: int) -> None:
        self.command = [str(folder / "llama-bench"), "-m", str(folder / PEER_FILES[kind]), "-t", str(threads)]
        self.file = folder / PEER_FILES[kind]

    def bytes_per_token(self) -> int:
        """Bytes of weights that a decoded token reads: all tensors, of the embedding one row."""
        return sum(
            row_bytes(info) * (1 if name == "token_embd.weight" else math.prod(info.shape[:-1]))
            for name, info in read_header(self.file).tensors.items()
        )

    def measure(self, variant: str, *, prompt: int = 0, new: int = 0, depth: int = 0) -> float:
        """Tokens a second."""
        what = ["-p", str(prompt), "-n", str(new), "-d", str(depth), "-r", "1", "-o", "json"]
        done = subprocess.run([*self.command, *VARIANTS[variant], *what], check=True, capture_output=True, text=True)
        return float(json.loads(done.stdout)[-1]["avg_ts"])


class Ours:
    """An LLM, timed through its public stream, without guesses at next tokens, which llama-bench has none of."""

    def __init__(self, model: Path, kind: str) -> None:
        options: dict[str, Any] = {} if kind == "bf16" else {"quant": kind}
        self.llm = qwenlet.load(
            str(model), prefix_cache=False, speculate=False, **options
        )  # the same prompt in each round

    def _run(self, prompt: int, new: int) -> Any:
        ids = torch.randint(0, 150_000, (prompt,), generator=torch.Generator().manual_seed(prompt)).tolist()
        *_, last = self.llm.stream(ids, qwenlet.SamplingParams(max_new_tokens=new, **GREEDY))
        return last.timings

    def prefill(self, tokens: int) -> float:
        return tokens / self._run(tokens, 1).prefill_seconds

    def decode(self, prompt: int, new: int) -> float:
        timings = self._run(prompt, new)
        return timings.decode_tokens / timings.decode_seconds

    def bytes_per_token(self) -> int:
        """Bytes of weights that a decoded token reads."""
        program = self.llm.engine.runner.program
        return 0 if program is None else sum(program.native.bytes)

    def operators(
        self, past: int, repeats: int = 20, between: Callable[[], None] | None = None
    ) -> dict[str, dict[str, float]]:
        """Time and bytes of each kind of step of one decoded token with `past` tokens behind it: medians.

        Args:
            between: called before each.
        """
        engine = self.llm.engine
        program, config = engine.runner.program, self.llm.config
        assert program is not None, "operators are timed in the native program"
        pages = engine.pool.take(past // 64 + 1)
        cache = 2 * config.num_attention_heads * (config.head_dim + 4) * past  # int8 and a float32 scale
        each: dict[str, list[float]] = {}
        seconds = torch.zeros(len(program.native.names), dtype=torch.float64)
        with torch.inference_mode():
            for _ in range(repeats):
                if between is not None:
                    between()
                program.forward(
                    torch.tensor([5]), Rows.single(past, 1, 1.0), [pages], [past], torch.tensor([0]), seconds
                )
                sums: dict[str, float] = {}
                for name, took in zip(program.native.names, seconds.tolist(), strict=True):
                    sums[name] = sums.get(name, 0.0) + took
                for name, took in sums.items():
                    each.setdefault(name, []).append(took)
        engine.pool.give_back(pages)
        size: dict[str, int] = {}
        for name, count in zip(program.native.names, program.native.bytes, strict=True):
            size[name] = size.get(name, 0) + (cache if name == "attend" else count)
        return {n: {"seconds": statistics.median(t), "bytes": float(size[n])} for n, t in each.items()}


def saved(model: Path, kind: str, folder: Path) -> Path:
    """The model quantized as quant=kind does, written by `qwenlet quantize` once, and loaded once."""
    if not folder.is_dir():
        words = ["--bits", kind[-1], "--method", "rtn", "--no-report"]
        subprocess.run(
            [sys.executable, "-m", "qwenlet", "quantize", model, folder, *words], check=True, capture_output=True
        )
    with qwenlet.load(str(folder)):
        return folder


def peak_of_long_run(model: Path, threads: int) -> dict[str, float]:
    """VmHWM, load time and speed of LONG tokens from one token, in a process of its own, of a saved checkpoint."""
    code = f"""
import json, time, torch
torch.set_num_threads({threads})
import qwenlet
start = time.perf_counter()
llm = qwenlet.load({str(model)!r}, speculate=False)
loaded = time.perf_counter() - start
*_, last = llm.stream([100], qwenlet.SamplingParams(max_new_tokens={LONG}, **{GREEDY!r}))
status = open("/proc/self/status").read()
print(json.dumps({{"load_seconds": loaded, "speed": last.timings.decode_tokens / last.timings.decode_seconds,
    "peak_gb": int(status.split("VmHWM:")[1].split()[0]) * 1024 / 1e9}}))
"""
    compileall.compile_dir(Path(qwenlet.__file__).parent, quiet=1)  # as pip does; some environments switch it off
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    return dict(json.loads(done.stdout.splitlines()[-1]))


def row(kind: str, work: str, ours: list[float], peer: dict[str, list[float]]) -> dict[str, Any]:
    best = max(peer, key=lambda variant: statistics.median(peer[variant]))
    ratio = statistics.median(ours) / statistics.median(peer[best])
    target = TARGETS.get((kind, work))
    others = ", ".join(f"{variant} {statistics.median(values):.1f}" for variant, values in peer.items())
    print(
        f"{kind:5} {work:8} ours {statistics.median(ours):7.1f} ({min(ours):.1f}-{max(ours):.1f})   "
        f"llama.cpp {statistics.median(peer[best]):6.1f} [{others}]   ratio {ratio:.2f}"
        + (f"   target {target}" if target else ""),
        flush=True,
    )
    return {"kind": kind, "work": work, "ours": ours, "llama_cpp": peer, "best": best, "ratio": ratio, "target": target}


def compare(args: argparse.Namespace, kind: str) -> list[dict[str, Any]]:
    peer, ours = Peer(args.folder, kind, args.threads), Ours(args.folder / "model", kind)
    print(f"{kind}: {ours.llm.load_report}")
    mine, theirs = ours.bytes_per_token() / 1e9, peer.bytes_per_token() / 1e9
    print(f"{kind}: a token reads {mine:.2f} GB of weights, llama.cpp's {theirs:.2f} GB")
    ours.prefill(PREFILL)
    works: dict[str, tuple[list[float], dict[str, list[float]]]] = {}
    for _ in range(args.rounds):
        for work in ("prefill", "decode"):
            own, others = works.setdefault(work, ([], {variant: [] for variant in VARIANTS}))
            for variant, values in others.items():
                what = {"prompt": PREFILL} if work == "prefill" else {"new": DECODE}
                values.append(peer.measure(variant, **what))
            own.append(ours.prefill(PREFILL) if work == "prefill" else ours.decode(8, DECODE))
    results = [row(kind, work, own, others) for work, (own, others) in works.items()]
    if kind == "int4":
        results.append(operators(kind, ours, 64))
        if args.long:
            results += long_works(args, kind, peer, ours)
    ours.llm.close()
    return results


def operators(kind: str, ours: Ours, past: int) -> dict[str, Any]:
    """Where a decoded token's time goes. The pages of `past` tokens must have been written: what never was is one page
    of zeros to the system, and quick to read. Memory is read once before each token, since on a shared machine it may
    be twice as quick a second later."""
    reader = fastest_reader(torch.device("cpu"))
    reads: list[float] = []
    steps = ours.operators(past, 40, lambda: reads.append(reader.now() / 1e9))
    speed = statistics.median(reads)
    print(
        f"read speed {speed:.1f} GB/s in the median ({min(reads):.1f}-{max(reads):.1f}; {reader.how}); "
        f"of one decoded token behind {past}, in turn with it:"
    )
    steps["all"] = {what: sum(step[what] for step in steps.values()) for what in ("seconds", "bytes")}
    for name, step in steps.items():
        rate = step["bytes"] / step["seconds"] / 1e9
        print(f"  {name:12} {step['seconds'] * 1e3:6.2f} ms  {rate:6.1f} GB/s  {rate / speed:5.0%}", flush=True)
    return {"kind": kind, "work": "operators", "past": past, "steps": steps, "read_gb_s": speed}


def in_turn(
    rounds: int, ours: Callable[[], float], theirs: Callable[[str], float]
) -> tuple[list[float], dict[str, list[float]]]:
    """Ours after each of theirs, since a shared machine's memory may be twice as quick a minute later. What is far from
    the best way of llama.cpp in the first round is not measured again."""
    own: list[float] = []
    others: dict[str, list[float]] = {variant: [] for variant in VARIANTS}
    for turn in range(rounds):
        best = max((max(values) for values in others.values() if values), default=0.0)
        for variant, values in others.items():
            if turn == 0 or max(values) > 0.7 * best:
                values.append(theirs(variant))
                own.append(ours())
    return own, others


def long_works(args: argparse.Namespace, kind: str, peer: Peer, ours: Ours) -> list[dict[str, Any]]:
    folder = saved(args.folder / "model", kind, args.folder / f"saved-{kind}")
    runs: list[dict[str, float]] = []

    def long() -> float:
        runs.append(peak_of_long_run(folder, args.threads))
        return runs[-1]["speed"]

    results = [row(kind, "long", *in_turn(args.rounds, long, lambda variant: peer.measure(variant, new=LONG)))]
    loads, peaks = [run["load_seconds"] for run in runs], [run["peak_gb"] for run in runs]
    print(
        f"  loaded in {statistics.median(loads):.2f} s ({min(loads):.2f}-{max(loads):.2f}, target 1), "
        f"peak {max(peaks):.2f} GB (target 1.4)"
    )
    results.append({"kind": kind, "work": "memory", "load_seconds": loads, "peak_gb": peaks})
    deep = in_turn(
        args.rounds, lambda: ours.decode(DEEP, 32), lambda variant: peer.measure(variant, new=32, depth=DEEP)
    )
    return [*results, row(kind, "deep", *deep), operators(kind, ours, DEEP)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="llama-bench, the GGUF files and model/, as peer_llama.sh makes them")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--kinds", default="int4,int8,bf16")
    parser.add_argument("--long", action="store_true")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    speed, _ = read_speed(torch.device("cpu"))
    print(f"{platform.machine()}, torch {torch.__version__}, {args.threads} threads, read {speed / 1e9:.1f} GB/s")
    results = [result for kind in args.kinds.split(",") for result in compare(args, kind)]
    print(json.dumps({"threads": args.threads, "results": results}))


if __name__ == "__main__":
    main()
