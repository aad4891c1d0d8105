"""Does one engine serve a crowd better than llama.cpp does, and does it keep what it promises under load? In one run:

    streams    1, 4, 8 and 16 prompts of 128 tokens at once, 64 new tokens each: ours and llama-batched-bench, in turn,
               on the same full-size Qwen-1.8B of random weights (int4 and Q4_0) and the same threads
    sampling   what scheduling and sampling take of a step at 16 streams, with the checkpoint's own sampling
    prefix     the first token of a request whose first 1,000 tokens another one had before it
    overload   64 requests of mixed lengths on a cache for 8 of them: all end, none starves, memory is what was planned

    benchmarks/peer_llama.sh DIR                      # once: builds llama-batched-bench, makes the GGUF files
    python benchmarks/versus_batched.py DIR --threads 2 [--rounds 3] [--only streams,sampling,prefix,overload]

Speed is counted as llama-batched-bench counts it, over the time in which every stream decodes, prefill left out; of its
variants the best one counts, for each number of streams. It samples nothing; ours is the whole engine, text included.
Random weights give nearly flat probabilities, so the checkpoint's own top_p keeps most of the vocabulary, which is the
worst that sampling can meet; a lower temperature stands for a trained model. The last line is one JSON document.
"""

from __future__ import annotations

import argparse
import json
import math
import multiprocessing
import platform
import random
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from versus_llama import GREEDY

import qwenlet
from qwenlet.cache import PAGE_TOKENS
from qwenlet.engine import Chunk
from qwenlet.profiling.ceilings import read_speed

VARIANTS: dict[str, list[str]] = {
    "plain": ["-fa", "off"],
    "flash": ["-fa", "on"],
    "flash, q8_0 cache": ["-fa", "on", "-ctk", "q8_0", "-ctv", "q8_0"],
    "flash, one cache": ["-fa", "on", "-kvu"],
}
PROMPT, NEW = 128, 64
# The least that is accepted: streams -> ratio to llama.cpp's best.
TARGETS = {1: 1.2, 4: 2.5, 8: 4.0, 16: 3.0}
CROWD = max(TARGETS)
OUTSIDE_TARGET = 0.05
PREFIX, OWN, PREFIX_TARGET = 1000, 20, 0.15
REQUESTS, SEATS = 64, 8
# Served in the order of arrival, the last request waits twice as long as the median one.
WAIT_TARGET = 3.0
PLAN_TARGET = 0.1
# None is what the checkpoint asks for: top_p 0.8, top_k 0, repetition penalty 1.1, temperature 1.
SAMPLING: dict[str, float | None] = {"the checkpoint's own": None, "the same, temperature 0.15": 0.15}
EVERYTHING = ("streams", "sampling", "prefix", "overload")


class Peer:
    """llama-batched-bench on the Q4_0 file."""

    def __init__(self, folder: Path, threads: int) -> None:
        self.command = [str(folder / "llama-batched-bench"), "-m", str(folder / "q4_0.gguf"), "-t", str(threads)]

    def measure(self, variant: str, streams: int) -> float:
        """Decoded tokens a second of all streams together."""
        # a context of whole cache blocks of 256 tokens for each stream
        what = ["-c", str(256 * streams), "-npp", str(PROMPT), "-ntg", str(NEW), "-npl", str(streams)]
        command = [*self.command, *VARIANTS[variant], *what, "--output-format", "jsonl"]
        done = subprocess.run(command, check=True, capture_output=True, text=True)
        (line,) = (line for line in (done.stdout + done.stderr).splitlines() if line.startswith("{"))
        return float(json.loads(line)["speed_tg"])


# --------------------------------------------------------------------------------------------------------------- ours


@dataclass(frozen=True)
class Reply:
    """One request's last chunk, and when each of its tokens came (time.perf_counter)."""

    last: Chunk
    times: list[float]


def load(folder: Path, **options: Any) -> qwenlet.LLM:
    return qwenlet.load(str(folder / "model"), quant="int4", **options)


def prompt(tokens: int, *seed: int) -> list[int]:
    return random.Random(repr(seed)).choices(range(150_000), k=tokens)


def serve(llm: qwenlet.LLM, prompts: Sequence[Sequence[int]], params: Sequence[qwenlet.SamplingParams]) -> list[Reply]:
    """Submits all at once, then reads one stream after the other: the chunks carry their own times."""
    submitted = []
    for ids, each in zip(prompts, params, strict=True):
        at = time.perf_counter()
        (request,) = llm.engine.submit(ids, each)
        submitted.append((at, request))
    streams = [(at, llm.engine.stream(request)) for at, request in submitted]
    return [_read(at, stream) for at, stream in streams]


def _read(submitted: float, stream: Iterator[Chunk]) -> Reply:
    times: list[float] = []
    for chunk in stream:
        took = chunk.timings
        if chunk.token_ids:
            assert took.time_to_first_token is not None, "a token came, but no first token"
            times += [submitted + took.time_to_first_token + (took.decode_seconds or 0.0)] * len(chunk.token_ids)
    return Reply(chunk, times)


def crowd(llm: qwenlet.LLM, streams: int, seed: int, params: qwenlet.SamplingParams) -> list[Reply]:
    return serve(llm, [prompt(PROMPT, seed, stream) for stream in range(streams)], [params] * streams)


def common_time(replies: Sequence[Reply]) -> tuple[float, float]:
    """From when the last stream has its first token to when the first one has its last."""
    return max(reply.times[0] for reply in replies), min(reply.times[-1] for reply in replies)


def decode_speed(replies: Sequence[Reply]) -> float:
    """Tokens a second while all decode: the sum of the streams' own speeds, which no place in a step shifts."""
    start, end = common_time(replies)
    speed = 0.0
    for reply in replies:
        times = [at for at in reply.times if start <= at <= end]
        assert len(times) > NEW // 2, f"a stream had {len(times)} tokens of {NEW} while all were decoding"
        speed += (len(times) - 1) / (times[-1] - times[0])
    return speed


@contextmanager
def clock(owner: Any, name: str) -> Iterator[list[tuple[float, float]]]:
    """Start and end of each call of a method within the block."""
    method = getattr(owner, name)
    calls: list[tuple[float, float]] = []

    def timed(*args: Any, **options: Any) -> Any:
        start = time.perf_counter()
        try:
            return method(*args, **options)
        finally:
            calls.append((start, time.perf_counter()))

    setattr(owner, name, timed)
    try:
        yield calls
    finally:
        delattr(owner, name)


def share_outside(calls: Sequence[tuple[float, float]], start: float, end: float) -> float:
    return 1 - sum(ended - began for began, ended in calls if start <= began and ended <= end) / (end - start)


# ----------------------------------------------------------------------------------------------------------- questions


def streams(args: argparse.Namespace, llm: qwenlet.LLM) -> list[dict[str, Any]]:
    """Tokens a second of the two sides, in turn."""
    peer, params = Peer(args.folder, args.threads), qwenlet.SamplingParams(max_new_tokens=NEW, **GREEDY)
    ours: dict[int, list[float]] = {count: [] for count in TARGETS}
    theirs: dict[int, dict[str, list[float]]] = {count: {name: [] for name in args.variants} for count in TARGETS}
    for turn in range(args.rounds):
        for count in TARGETS:
            for variant in args.variants:
                theirs[count][variant].append(peer.measure(variant, count))
            ours[count].append(decode_speed(crowd(llm, count, turn, params)))
    return [_compared(count, ours[count], theirs[count]) for count in TARGETS]


def _compared(count: int, ours: list[float], peer: dict[str, list[float]]) -> dict[str, Any]:
    medians = {variant: statistics.median(values) for variant, values in peer.items()}
    best = max(medians, key=lambda variant: medians[variant])
    ratio = statistics.median(ours) / medians[best]
    others = ", ".join(f"{variant} {value:.1f}" for variant, value in medians.items())
    print(
        f"{count:2} streams   ours {statistics.median(ours):6.1f} ({min(ours):.1f}-{max(ours):.1f})   "
        f"llama.cpp {medians[best]:5.1f} [{others}]   ratio {ratio:.2f}   target {TARGETS[count]}",
        flush=True,
    )
    return {"streams": count, "ours": ours, "llama_cpp": peer, "best": best, "ratio": ratio, "target": TARGETS[count]}


def sampling(args: argparse.Namespace, llm: qwenlet.LLM) -> list[dict[str, Any]]:
    """The share of a step at CROWD streams that is not running the model."""
    results = []
    for name, temperature in SAMPLING.items():
        params = qwenlet.SamplingParams(max_new_tokens=NEW, temperature=temperature, ignore_eos=True, seed=0)
        shares, outside, speeds = [], [], []
        for turn in range(args.rounds):
            runner = llm.engine.runner
            assert runner.program is not None, f"the forward pass is timed in the native program: {llm.engine.obstacle}"
            with clock(runner, "run") as runs, clock(runner.program, "forward") as passes:
                replies = crowd(llm, CROWD, turn, params)
            start, end = common_time(replies)
            shares.append(share_outside(runs, start, end))
            outside.append(share_outside(passes, start, end))
            speeds.append(decode_speed(replies))
        kept = nucleus(llm, temperature)
        print(
            f"{CROWD} streams, sampling: {name} (top_p keeps some {kept:,} tokens)   "
            f"scheduling, sampling and emitting {statistics.median(shares):.1%}   target {OUTSIDE_TARGET:.0%}   "
            f"with laying out rows {statistics.median(outside):.1%}   {statistics.median(speeds):.1f} tokens/s",
            flush=True,
        )
        results.append(
            {"sampling": name, "nucleus": kept, "share": shares, "outside": outside, "tokens_per_second": speeds}
        )
    return results


def nucleus(llm: qwenlet.LLM, temperature: float | None) -> int:
    """How many tokens top_p keeps after a random prompt, penalties aside."""
    logits = llm.logits(prompt(PROMPT, 0))[-1] / (llm.defaults.temperature if temperature is None else temperature)
    mass = logits.softmax(-1).sort(descending=True).values.cumsum(-1)
    return int((mass < llm.defaults.top_p).sum()) + 1


def prefix(args: argparse.Namespace, llm: qwenlet.LLM) -> dict[str, Any]:
    """Time to the first token of two requests that share a beginning, the second one after the first."""
    params, expected = [qwenlet.SamplingParams(max_new_tokens=1, **GREEDY)], PREFIX // PAGE_TOKENS * PAGE_TOKENS
    pairs, cached = [], set()
    for turn in range(args.rounds):
        shared = prompt(PREFIX, turn)
        (first,), (second,) = (serve(llm, [shared + prompt(OWN, turn, user)], params) for user in range(2))
        pairs.append([answer.last.timings.time_to_first_token or math.nan for answer in (first, second)])
        cached.add(second.last.cached_tokens)
    ratio = statistics.median(later / first for first, later in pairs)
    print(
        f"{PREFIX} shared tokens and {OWN} own: first token after {statistics.median(p[0] for p in pairs):.2f} s, then "
        f"{statistics.median(p[1] for p in pairs):.2f} s   ratio {ratio:.1%}   target {PREFIX_TARGET:.0%}   "
        f"cached_tokens {sorted(cached)}, expected {expected}",
        flush=True,
    )
    return {"seconds": pairs, "ratio": ratio, "target": PREFIX_TARGET, "cached": sorted(cached), "expected": expected}


def overload(folder: Path, threads: int) -> dict[str, Any]:
    """REQUESTS of mixed lengths at once on a cache for SEATS of them. Runs in a process of its own, for its VmHWM."""
    torch.set_num_threads(threads)
    dice = random.Random(0)
    lengths = [(dice.randint(16, 384), dice.randint(16, 128)) for _ in range(REQUESTS)]
    context = -(-statistics.mean(map(sum, lengths)) // PAGE_TOKENS) * PAGE_TOKENS
    with load(folder, cache_tokens=int(SEATS * context)) as llm:
        start = time.perf_counter()
        replies = serve(
            llm,
            [prompt(tokens, number) for number, (tokens, _) in enumerate(lengths)],
            [qwenlet.SamplingParams(max_new_tokens=new, ignore_eos=True, seed=0) for _, new in lengths],
        )
        took = time.perf_counter() - start
        preemptions = llm.engine.stats.preemptions
    complete = sum(len(reply.times) == new for reply, (_, new) in zip(replies, lengths, strict=True))
    waits = [reply.last.timings.queued_seconds or 0.0 for reply in replies]
    pauses = [later - at for reply in replies for at, later in zip(reply.times, reply.times[1:], strict=False)]
    return {
        "context": int(context),
        "complete": complete,
        "seconds": took,
        "preemptions": preemptions,
        "longest_wait": max(waits),
        "median_wait": statistics.median(waits),
        "longest_pause": max(pauses),
        "peak": int(Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0]) * 1024,
    }


def overloaded(args: argparse.Namespace) -> dict[str, Any]:
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as process:
        seen = process.submit(overload, args.folder, args.threads).result()
    options = ["--quant", "int4", "--context", str(seen["context"]), "--batch", str(SEATS), "--json"]
    command = [sys.executable, "-m", "qwenlet", "plan", str(args.folder / "model"), *options]
    planned = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)["peak"]
    print(
        f"{REQUESTS} requests on a cache of {SEATS} times {seen['context']} tokens: {seen['complete']} complete after "
        f"{seen['seconds']:.0f} s and {seen['preemptions']} preemptions\n"
        f"  waited {seen['longest_wait']:.1f} s at most, {seen['median_wait']:.1f} s in the median   "
        f"ratio {seen['longest_wait'] / seen['median_wait']:.2f}   target below {WAIT_TARGET:g}   "
        f"longest pause between two tokens {seen['longest_pause']:.1f} s\n"
        f"  peak {seen['peak'] / 1e9:.2f} GB, planned {planned / 1e9:.2f} GB   "
        f"off by {seen['peak'] / planned - 1:+.1%}   target {PLAN_TARGET:.0%}",
        flush=True,
    )
    return seen | {"planned": planned}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "folder", type=Path, help="llama-batched-bench, q4_0.gguf and model/, as peer_llama.sh makes them"
    )
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--only", default=",".join(EVERYTHING))
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, default=list(VARIANTS), help="of llama.cpp's flags")
    args = parser.parse_args()
    asked = args.only.split(",")
    if unknown := set(asked) - set(EVERYTHING):
        parser.error(f"--only knows {', '.join(EVERYTHING)}, not {', '.join(sorted(unknown))}")
    torch.set_num_threads(args.threads)
    speed, _ = read_speed(torch.device("cpu"))
    print(f"{platform.machine()}, torch {torch.__version__}, {args.threads} threads, read {speed / 1e9:.1f} GB/s")
    results: dict[str, Any] = {"threads": args.threads}
    # random weights repeat themselves, so guessing what comes next would flatter us
    with load(args.folder, speculate=False) as llm:
        print(llm.load_report)
        crowd(llm, 1, args.rounds, qwenlet.SamplingParams(max_new_tokens=2, **GREEDY))
        for question in (streams, sampling, prefix):
            if question.__name__ in asked:
                results[question.__name__] = question(args, llm)
    if "overload" in asked:
        results["overload"] = overloaded(args)
    print(json.dumps(results))


if __name__ == "__main__":
    main()
