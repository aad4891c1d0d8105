"""Does our server serve a crowd better than llama-server does, and what do its connections cost? In one run:

    crowd   16 clients at once, each streams 64 tokens after a prompt of 128: `qwenlet serve` (int4), llama-server
            (Q4_0, 16 slots) and LLM.generate on the same prompts, in turn, on the same weights and threads
    idle    what 1,000 connections that are kept alive add to our server's memory

    benchmarks/peer_llama.sh DIR                                   # once: builds llama-server, makes the GGUF files
    python benchmarks/versus_server.py DIR --threads 2 [--rounds 3]
    python benchmarks/versus_server.py --model demo [--rounds 1]   # ours alone, to try the script

Speed is all output tokens over the time from the first request to the last token, prompts included. The best round
counts. The last line is one JSON document.
"""

from __future__ import annotations

import argparse
import http.client
import json
import os
import random
import re
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

CLIENTS, PROMPT, NEW, IDLE = 16, 128, 64, 1000
PEER_TARGET, GENERATE_TARGET, IDLE_TARGET_MB = 2.2, 0.93, 50.0
FIRST_ID, LAST_ID = 1000, 40_000

GENERATE = """
import json, sys, time, torch, qwenlet
name, quant, threads, new, prompts, rounds = json.loads(sys.stdin.read())
torch.set_num_threads(threads)
params = qwenlet.SamplingParams(temperature=0, max_new_tokens=new, ignore_eos=True)
with qwenlet.load(name, quant=quant) as llm:
    llm.generate(prompts[0][:8], params)
    for ids in prompts:
        began = time.perf_counter()
        done = llm.generate(ids, params)
        print(sum(len(one.token_ids) for one in done) / (time.perf_counter() - began), flush=True)
"""


def prompts(seed: int) -> list[list[int]]:
    draw = random.Random(seed)
    return [[draw.randrange(FIRST_ID, LAST_ID) for _ in range(PROMPT)] for _ in range(CLIENTS)]


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@contextmanager
def serving(command: Sequence[str], port: int, threads: int, *, shown: bool = False) -> Iterator[int]:
    """The process's id, once it answers; it ends with the block. `shown`: what it says of errors is seen."""
    env = os.environ | {"OMP_NUM_THREADS": str(threads)}
    words = None if shown else subprocess.DEVNULL
    process = subprocess.Popen(command, env=env, stdout=subprocess.DEVNULL, stderr=words)
    try:
        deadline = time.monotonic() + 600
        while not healthy(port):
            if process.poll() is not None or time.monotonic() > deadline:
                sys.exit(f"{command[0]} did not start; try: {' '.join(command)}")
            time.sleep(0.2)
        yield process.pid
    finally:
        process.terminate()
        process.wait(60)


def healthy(port: int) -> bool:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=5)
    try:
        connection.request("GET", "/health")
        answer = connection.getresponse()
        return answer.status == 200 and json.loads(answer.read()).get("status") == "ok"
    except (OSError, ValueError):
        return False
    finally:
        connection.close()


def stream(port: int, path: str, body: dict[str, Any]) -> int:
    """Tokens that were written, as the server's last event counts them."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=600)
    connection.request("POST", path, json.dumps(body), {"content-type": "application/json"})
    answer, written = connection.getresponse(), 0
    for line in answer:
        if line.startswith(b"data: {"):
            event = json.loads(line[6:])
            if "error" in event:
                sys.exit(f"{path} failed: {event}")
            written = (event.get("timings") or {}).get("predicted_n", written)
    connection.close()
    if written != NEW:
        sys.exit(f"{path} wrote {written} tokens, expected {NEW} (status {answer.status})")
    return written


def crowd(port: int, path: str, bodies: Sequence[dict[str, Any]]) -> float:
    """Output tokens a second of all clients together."""
    counts: list[int] = []
    failures: list[BaseException] = []

    def client(body: dict[str, Any]) -> None:
        try:
            counts.append(stream(port, path, body))
        except BaseException as error:  # a thread's own sys.exit would say nothing
            failures.append(error)

    clients = [threading.Thread(target=client, args=(body,)) for body in bodies]
    began = time.perf_counter()
    for thread in clients:
        thread.start()
    for thread in clients:
        thread.join()
    if failures:
        sys.exit(f"{len(failures)} of {len(bodies)} clients were not served: {failures[0]!r}")
    return sum(counts) / (time.perf_counter() - began)


def our_body(ids: list[int]) -> dict[str, Any]:
    return {"prompt": ids, "max_tokens": NEW, "temperature": 0, "ignore_eos": True, "stream": True}


def peer_body(ids: list[int]) -> dict[str, Any]:
    return {
        "prompt": ids,
        "n_predict": NEW,
        "temperature": 0,
        "ignore_eos": True,
        "stream": True,
        "cache_prompt": False,
    }


def memory_mb(pid: int) -> float:
    match = re.search(r"VmRSS:\s+(\d+)", Path(f"/proc/{pid}/status").read_text())
    assert match is not None, "this needs Linux"
    return int(match.group(1)) / 1024


def idle_mb(port: int, pid: int) -> float:
    """What so many connections add, each kept alive behind an answered request."""
    before = memory_mb(pid)
    with ExitStack() as held:
        for _ in range(IDLE):
            connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
            held.callback(connection.close)
            connection.request("GET", "/version")
            connection.getresponse().read()
        return memory_mb(pid) - before


def ours(model: str, quant: str | None, threads: int, rounds: int) -> tuple[list[float], float]:
    port = free_port()
    command = [sys.executable, "-m", "qwenlet", "serve", model, "--port", str(port), "--quiet"]
    with serving([*command, *(["--quant", quant] if quant else [])], port, threads) as pid:
        crowd(port, "/v1/completions", [our_body(ids) for ids in prompts(99)])
        speeds = [crowd(port, "/v1/completions", [our_body(ids) for ids in prompts(seed)]) for seed in range(rounds)]
        return speeds, idle_mb(port, pid)


def generated(model: str, quant: str | None, threads: int, rounds: int) -> list[float]:
    given = json.dumps([model, quant, threads, NEW, [prompts(seed) for seed in (99, *range(rounds))], rounds])
    command = [sys.executable, "-c", GENERATE]
    done = subprocess.run(command, input=given, capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(f"LLM.generate failed: {done.stderr[-2000:]}")
    return [float(line) for line in done.stdout.split()][1:]


def peer(folder: Path, threads: int, rounds: int) -> list[float]:
    port = free_port()
    room = str(CLIENTS * (PROMPT + NEW + 64))
    command = [str(folder / "llama-server"), "-m", str(folder / "q4_0.gguf"), "-np", str(CLIENTS), "-c", room]
    with serving([*command, "-t", str(threads), "-tb", str(threads), "--port", str(port)], port, threads):
        crowd(port, "/completion", [peer_body(ids) for ids in prompts(99)])
        return [crowd(port, "/completion", [peer_body(ids) for ids in prompts(seed)]) for seed in range(rounds)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", nargs="?", type=Path, help="what peer_llama.sh made")
    parser.add_argument("--model", help="another model of ours, without a peer")
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args()
    if (args.folder is None) == (args.model is None):
        parser.error("give DIR, or --model")
    model, quant = (args.model, None) if args.folder is None else (str(args.folder / "model"), "int4")
    served, idle = ours(model, quant, args.threads, args.rounds)
    plain = generated(model, quant, args.threads, args.rounds)
    theirs = [] if args.folder is None else peer(args.folder, args.threads, args.rounds)
    result: dict[str, Any] = {
        "served": served,
        "generate": plain,
        "llama_server": theirs,
        "of_generate": max(served) / max(plain),
        "of_generate_target": GENERATE_TARGET,
        "idle_mb": idle,
        "idle_target_mb": IDLE_TARGET_MB,
    }
    if theirs:
        result |= {"of_llama_server": max(served) / max(theirs), "of_llama_server_target": PEER_TARGET}
    print(f"served {max(served):.1f} tokens/s, LLM.generate {max(plain):.1f}: {result['of_generate']:.2f} of it")
    if theirs:
        print(f"llama-server {max(theirs):.1f} tokens/s: ours are {result['of_llama_server']:.2f} times as many")
    print(f"{IDLE} idle connections: {idle:.1f} MB")
    print(json.dumps(result))


if __name__ == "__main__":
    main()
