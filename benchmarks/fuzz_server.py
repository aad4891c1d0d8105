"""Does the server answer whatever it is sent? Thousands of bodies that nobody would send, to all that take one:

    good bodies with anything changed, broken JSON and UTF-8, NaN and huge numbers, deep nesting, recursive schemas and
    such of a megabyte, tools without names, unknown roles, missing fields, texts beyond the context

    python benchmarks/fuzz_server.py [MODEL] [--count 10000] [--clients 4] [--seed 0] [--only NUMBER]
    python benchmarks/fuzz_server.py --tiny qwen.tiktoken    # a small model of random weights: quicker

Every body has to be answered in time (the time in which this program runs, so that it may be stopped), with a status
that is meant, in the shape of its protocol; the same good request has the same reply all along; at the end the server
is well and has all its pages. A body depends on (seed, number) alone: --only sends that one again and shows what comes
back. The last line is one JSON document; the exit status says whether all held.
"""

from __future__ import annotations

import argparse
import http.client
import json
import random
import socket
import sys
import tempfile
import threading
import time
from collections import Counter
from pathlib import Path
from typing import Any

import wild_bodies
from own_time import OwnTime
from soak_server import gauge, settled
from versus_server import free_port, memory_mb, serving

SECONDS = 60.0  # of this program's own time, within which each body is answered
SLOWEST = 8  # that are told
CONTEXT = 512  # replies that name no length are short
MEANT = {200, 400, 404, 413, 503}  # 503 is a full queue
PROBE = {"prompt": "One, two, three", "max_tokens": 4, "temperature": 0}


class Fuzzer(threading.Thread):
    """Sends the cases of every so-manieth number."""

    def __init__(self, port: int, seed: int, numbers: range, clock: OwnTime, talk: str) -> None:
        super().__init__(daemon=True)
        self.port, self.seed, self.numbers, self.clock, self.talk = port, seed, numbers, clock, talk
        self.trouble: list[str] = []
        self.statuses: Counter[str] = Counter()
        self.took: list[tuple[float, int, str]] = []
        self.sent: tuple[float, int, http.client.HTTPConnection] | None = None

    def run(self) -> None:
        first = probe(self.port)
        for done, number in enumerate(self.numbers):
            case = wild_bodies.draw(random.Random(f"{self.seed}:{number}"), self.talk)
            began = self.clock.now()
            try:
                status, kind, raw = self.send(number, case)
            except (OSError, http.client.HTTPException) as problem:
                self.trouble.append(f"{number} {case.kind} {case.path}: {type(problem).__name__}: {problem}")
                continue
            self.took.append((round(self.clock.now() - began, 2), number, f"{case.kind} {case.path}"))
            self.statuses[f"{case.kind} {status}"] += 1
            if wrong := faults(case, status, kind, raw, stopped=self.clock.stopped_since(began)):
                self.trouble.append(f"{number} {case.kind} {case.path}: {wrong}")
            if done % 50 == 49 and (now := probe(self.port)) != first:
                self.trouble.append(f"after {number} the same request has another reply: {now} and not {first}")

    def send(self, number: int, case: wild_bodies.Case) -> tuple[int, str, bytes]:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=3600)
        connection.connect()
        self.sent = (self.clock.now(), number, connection)
        try:
            connection.request("POST", case.path, case.raw, {"content-type": "application/json"})
            answer = connection.getresponse()
            return answer.status, answer.headers.get_content_type(), answer.read()
        finally:
            self.sent = None
            connection.close()

    def check_hang(self) -> None:
        """Cuts a call that takes too long, which then is trouble."""
        sent = self.sent
        if sent is not None and self.clock.now() - sent[0] > SECONDS:
            self.trouble.append(f"{sent[1]} has no answer after {SECONDS:g} s")
            self.sent = None
            if sent[2].sock is not None:
                sent[2].sock.shutdown(socket.SHUT_RDWR)


def faults(case: wild_bodies.Case, status: int, kind: str, raw: bytes, *, stopped: bool) -> str | None:
    """What is wrong with an answer."""
    if stopped and status in (408, 504):
        return None  # the server's clock went on
    if status not in MEANT or (case.refused and status != 400):
        return f"status {status}: {raw[:300]!r}"
    if b"Traceback" in raw or b"site-packages" in raw:
        return f"shows its inside: {raw[:300]!r}"
    if status == 200:
        return stream_fault(kind, raw, stopped=stopped)
    problem = error_fault(case.path, raw)
    if problem is None and status == 503 and b"have room" not in raw:
        problem = "503 for want of something else than room"
    return None if problem is None else f"{problem}: {raw[:300]!r}"


def error_fault(path: str, raw: bytes) -> str | None:
    """Whether an error has the shape of its protocol."""
    try:
        told = json.loads(raw)["error"]
    except (ValueError, KeyError, TypeError):
        return "no error in JSON"
    if path.startswith("/api/"):
        return None if isinstance(told, str) and told else "not Ollama's shape"
    if not isinstance(told, dict) or not isinstance(told.get("message"), str) or not told["message"]:
        return "an error without words"
    if path.startswith("/v1/messages"):
        good = json.loads(raw)["type"] == "error" and isinstance(told.get("type"), str)
        return None if good else "not Anthropic's shape"
    return None if set(told) == {"message", "type", "param", "code"} else "not OpenAI's shape"


def stream_fault(kind: str, raw: bytes, *, stopped: bool) -> str | None:
    """Whether what was begun as an answer has come to its end."""
    if kind not in ("text/event-stream", "application/x-ndjson"):
        return None
    broke = b'"server_error"' in raw or b'"api_error"' in raw
    ended = any(mark in raw for mark in (b"[DONE]", b'"response.completed"', b'"response.incomplete"', b"message_stop"))
    if kind == "application/x-ndjson":
        ended = b'"done":true' in raw
    return None if (ended and not broke) or stopped else f"a stream that broke off: {raw[-300:]!r}"


def probe(port: int) -> Any:
    """What a good request is answered with: its text; it may have to come again while the queue is full."""
    while True:
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=3600)
        connection.request("POST", "/v1/completions", json.dumps(PROBE), {"content-type": "application/json"})
        answer = connection.getresponse()
        told = json.loads(answer.read())
        connection.close()
        if b"have room" not in json.dumps(told).encode():
            return told["choices"][0]["text"] if answer.status == 200 else told
        time.sleep(0.1)


def new_talk(port: int) -> str:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
    connection.request("POST", "/page/api/conversations", "{}", {"content-type": "application/json"})
    made = json.loads(connection.getresponse().read())
    connection.close()
    return str(made["id"])


def tiny(out: Path, tokenizer: Path) -> str:
    """Qwen's whole vocabulary over a model that takes no time."""
    from qwenlet import checkpoint, config

    shape = config.ModelConfig(
        model_type="qwen", vocab_size=151936, hidden_size=64, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=2, head_dim=32, intermediate_size=96, max_position_embeddings=8192, seq_length=8192,
        use_dynamic_ntk=True, use_logn_attn=True, eos_token_ids=(151643,),
    )  # fmt: skip
    return str(checkpoint.write_random(out, shape, tokenizer_file=tokenizer))


def show(port: int, fuzzer: Fuzzer, number: int) -> None:
    case = wild_bodies.draw(random.Random(f"{fuzzer.seed}:{number}"), fuzzer.talk)
    print(f"{case.kind}: POST {case.path}, {len(case.raw)} bytes: {case.raw[:2000]!r}")
    status, kind, raw = fuzzer.send(number, case)
    print(f"{status} {kind}: {raw[:2000]!r}")
    print(faults(case, status, kind, raw, stopped=False) or "as it should be")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", default="demo")
    parser.add_argument("--tiny", type=Path, metavar="FILE", help="a model of random weights with this vocabulary")
    parser.add_argument("--count", type=int, default=10_000)
    parser.add_argument("--clients", type=int, default=4)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", type=int, metavar="NUMBER", help="send this body alone, and show the answer")
    args = parser.parse_args()
    port, clock, memory = free_port(), OwnTime(), []
    with tempfile.TemporaryDirectory() as folder:
        model = args.model if args.tiny is None else tiny(Path(folder) / "tiny", args.tiny)
        command = ["env", f"QWENLET_DATA={folder}", sys.executable, "-m", "qwenlet", "serve", model, "--quiet"]
        command += ["--port", str(port), "--served-name", "demo", "--max-context", str(CONTEXT)]
        command += ["--cache-tokens", str(4 * CONTEXT)]
        with serving(command, port, 2, shown=True) as pid:
            talk = new_talk(port)
            numbers = [range(first, args.count, args.clients) for first in range(args.clients)]
            crowd = [Fuzzer(port, args.seed, each, clock, talk) for each in numbers]
            if args.only is not None:
                show(port, crowd[0], args.only)
                return
            began = clock.now()
            for fuzzer in crowd:
                fuzzer.start()
            while any(fuzzer.is_alive() for fuzzer in crowd):
                time.sleep(0.5)
                memory.append(memory_mb(pid))
                for fuzzer in crowd:
                    fuzzer.check_hang()
            held = settled(port)
            failed_steps = gauge(port, "qwenlet:engine_failed_steps_total")
    trouble = [one for fuzzer in crowd for one in fuzzer.trouble]
    for line in trouble[:50]:
        print(line)
    slowest = sorted((one for fuzzer in crowd for one in fuzzer.took), reverse=True)[:SLOWEST]
    statuses = sum((fuzzer.statuses for fuzzer in crowd), Counter[str]())
    result = {
        "bodies": args.count,
        "seed": args.seed,
        "seconds": round(clock.now() - began, 1),
        "statuses": dict(sorted(statuses.items())),
        "slowest": slowest,
        "trouble": len(trouble),
        "held": held,
        "failed_steps": failed_steps,
        "memory_mb": [round(one, 1) for one in memory[:: max(len(memory) // 20, 1)]],
    }
    print(json.dumps(result))
    sys.exit(bool(trouble or any(held.values()) or failed_steps or statuses.total() != args.count))


if __name__ == "__main__":
    main()
