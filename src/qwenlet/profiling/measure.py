"""Runs one job on a loaded model: token ids in, figures out.

Each job gets an engine of its own, sized for it, and steps it in the calling thread. Sampling is greedy, no end token
ends a reply, nothing is guessed ahead and no prefix is kept, so that each token costs what a token costs.
"""

from __future__ import annotations

import gc
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Protocol

import torch

from qwenlet.config import ATTENTION_BACKENDS, EngineConfig, GenerationDefaults, SamplingParams
from qwenlet.engine import Engine, Request
from qwenlet.errors import ConfigError
from qwenlet.machine import peak_memory
from qwenlet.model import Qwen
from qwenlet.ops.attention import check_backend
from qwenlet.profiling.ceilings import finish
from qwenlet.profiling.workload import ATTENTION, OWN, Job, batch_room

_WARM_TOKENS = 4


class Loaded(Protocol):
    """What is measured: an LLM, or anything that holds a model on a device."""

    @property
    def model(self) -> Qwen: ...

    device: torch.device
    dtype: torch.dtype
    options: EngineConfig


@dataclass(frozen=True)
class Figure:
    """Of one length of a job.

    Attributes:
        tokens: that were asked for; done: that there are, of each reply (of a prompt: read).
        seconds, first_token: of each round.
        context: tokens behind each reply when its measuring began.
        peak: bytes of memory at the peak; None where it isn't this process's to say.
    """

    tokens: int
    done: int
    seconds: tuple[float, ...]
    first_token: tuple[float, ...] = ()
    context: int = 0
    peak: int | None = None


def greedy(tokens: int) -> SamplingParams:
    """The same work for every model, so many tokens long."""
    return SamplingParams(max_new_tokens=tokens, temperature=0.0, repetition_penalty=1.0, ignore_eos=True, seed=0)


def prompt_ids(count: int, vocab_size: int, seed: int = 0) -> list[int]:
    """Token ids that repeat nothing on purpose."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, vocab_size, (count,), generator=generator).tolist()


@contextmanager
def engine_for(
    llm: Loaded, attention: str, *, context: int, batch: int = 1, tokens: int | None = None
) -> Iterator[Engine]:
    """An engine for so many replies of so many tokens.

    Args:
        tokens: of all replies together; None: of one.
    """
    gc.collect()  # pages of the engine before this one, which stand in a circle
    options = replace(
        llm.options,
        max_context=context,
        cache_tokens=tokens,
        max_requests=max(batch, 1),
        attention=torch_attention(attention),
        prefix_cache=False,
        speculate=False,
    )
    engine = Engine(llm.model, None, options, GenerationDefaults(), llm.device)
    try:
        yield engine
    finally:
        engine.close()


def torch_attention(name: str) -> str:
    """What EngineConfig calls it: the choice left to torch is its "auto"."""
    return name if name in ATTENTION_BACKENDS else "auto"


def offered(llm: Loaded, asked: Sequence[str] = ()) -> tuple[list[str], list[str]]:
    """Attention kernels to measure with, of those asked for (none: all), and why others can't be.

    The native program of a CPU has its own, and so have a GPU's replies, beside torch's kernels to compare with.
    """
    with engine_for(llm, OWN, context=1) as engine:
        native = llm.device.type == "cpu" and engine.obstacle is None
    if native:
        others = [name for name in asked if name != OWN]
        why = f"attention {', '.join(others)}: here it is by kernels of our own" if others else ""
        return ([] if others and OWN not in asked else [OWN]), [why] if why else []
    found, refused = [], []
    for name in asked or ((OWN, *ATTENTION) if llm.device.type == "cuda" else ATTENTION):
        try:
            check_backend(torch_attention(name), llm.device, llm.dtype)
            found.append(name)
        except ConfigError as error:
            refused.append(f"attention {name}: {error.message}")
    return found, refused if asked else []


def run_job(llm: Loaded, job: Job) -> list[Figure]:
    """One figure for each length of the job."""
    if job.kind in ("encode", "prefill"):
        return [_read(llm, job)]
    if job.kind == "batch":
        return [_batch(llm, job)]
    # pages on a GPU are taken at once, for the longest reply: each length gets its own
    lengths = [job.tokens] if llm.device.type == "cpu" else [(tokens,) for tokens in job.tokens]
    return [figure for marks in lengths for figure in _generate(llm, replace(job, tokens=marks))]


def _generate(llm: Loaded, job: Job) -> list[Figure]:
    seconds: dict[int, list[float]] = {tokens: [] for tokens in job.tokens}
    first: list[float] = []
    peaks: dict[int, int | None] = {}
    ids = prompt_ids(job.prompt, llm.model.config.vocab_size)
    with engine_for(llm, job.attention, context=max(job.context, job.prompt + _WARM_TOKENS)) as engine:
        run(engine, ids, [_WARM_TOKENS], None)
        reset_peak(llm.device)
        while len(first) < max(1, job.rounds_of(sum(seconds[job.tokens[-1]]))):
            run_ = run(engine, ids, job.tokens, job.limit_seconds)
            if run_.cut:
                whole = [_figure(tokens, took, run_) for tokens, took in run_.marks.items()]
                late = [tokens for tokens in job.tokens if tokens not in run_.marks]
                cut = [Figure(t, run_.done, (run_.seconds,), (run_.first,), job.prompt, run_.peak) for t in late]
                return [replace(figure, context=job.prompt) for figure in whole] + cut
            first.append(run_.first)
            for tokens, (took, peak) in run_.marks.items():
                seconds[tokens].append(took)
                peaks[tokens] = peak
    return [
        Figure(tokens, tokens, tuple(seconds[tokens]), tuple(first), job.prompt, peaks[tokens]) for tokens in job.tokens
    ]


@dataclass
class Run:
    """One reply: when each length was reached and the peak of memory then, or how far it came."""

    marks: dict[int, tuple[float, int | None]]
    first: float
    done: int
    seconds: float
    peak: int | None
    cut: bool


def _figure(tokens: int, mark: tuple[float, int | None], run_: Run) -> Figure:
    return Figure(tokens, tokens, (mark[0],), (run_.first,), peak=mark[1])


def run(engine: Engine, ids: Sequence[int], lengths: Sequence[int], limit: float | None) -> Run:
    """Generates as many tokens as the last of `lengths`, or until `limit` seconds have passed."""
    finish(engine.device)
    began = time.perf_counter()
    (request,) = engine.submit(ids, greedy(lengths[-1]))
    marks: dict[int, tuple[float, int | None]] = {}
    first = passed = 0.0
    for _ in _steps(engine, [request]):
        passed = time.perf_counter() - began
        if not first and request.reply_length:
            first = passed
        for tokens in lengths:
            if tokens not in marks and request.reply_length >= tokens:
                finish(engine.device)
                marks[tokens] = (time.perf_counter() - began, peak_bytes(engine.device))
        if limit is not None and passed > limit and request.finish_reason is None:
            finish(engine.device)
            passed = time.perf_counter() - began
            break
    done = request.reply_length
    cut = request.finish_reason is None
    engine.cancel(request)
    engine.step()
    passed = marks.get(lengths[-1], (passed, None))[0]
    return Run(marks, first or passed, done or request.stored, passed, peak_bytes(engine.device), cut)


def _steps(engine: Engine, requests: Sequence[Request]) -> Iterator[None]:
    """Steps until all have ended; a request that failed raises what it failed by."""
    while any(request.finish_reason is None for request in requests):
        engine.step()
        for request in requests:
            if request.failure is not None:
                raise request.failure
        yield


def _read(llm: Loaded, job: Job) -> Figure:
    ids = prompt_ids(job.prompt, llm.model.config.vocab_size)
    seconds: list[float] = []
    with engine_for(llm, job.attention, context=job.prompt + _WARM_TOKENS) as engine:
        # so that what is made at the first call is not in the figure: kernels compile, code comes into memory
        run(engine, ids[: min(len(ids), 64)], [_WARM_TOKENS], None)
        reset_peak(llm.device)
        while len(seconds) < max(1, job.rounds_of(sum(seconds))):
            run_ = run(engine, ids, [1], job.limit_seconds)
            if run_.cut:
                return Figure(1, run_.done, (run_.seconds,), (), 0, run_.peak)
            seconds.append(run_.first)
        return Figure(1, job.prompt, tuple(seconds), tuple(seconds), 0, peak_bytes(llm.device))


def _batch(llm: Loaded, job: Job) -> Figure:
    """Rounds of some steps of all replies, when the last of them has its first token."""
    steps, vocabulary = job.tokens[-1], llm.model.config.vocab_size
    room = batch_room(job.batch, job.rounds * steps)
    seconds: list[float] = []
    with engine_for(
        llm, job.attention, context=job.prompt + room, batch=job.batch, tokens=job.batch * (job.prompt + room + 64)
    ) as engine:
        run(engine, prompt_ids(job.prompt, vocabulary), [_WARM_TOKENS], None)
        reset_peak(llm.device)
        requests = [
            engine.submit(prompt_ids(job.prompt, vocabulary, seed), greedy(room))[0] for seed in range(job.batch)
        ]
        stepping = _steps(engine, requests)
        while not all(request.reply_length > 1 for request in requests):
            next(stepping)
        context = sum(len(request.known) for request in requests) // job.batch
        while len(seconds) < max(1, job.rounds_of(sum(seconds))):
            left = None if job.limit_seconds is None else job.limit_seconds - sum(seconds)
            done, took = _round(stepping, requests, steps, left, llm.device)
            if done < steps:
                if not seconds:
                    return Figure(steps, done, (took,), (), context, peak_bytes(llm.device))
                break
            seconds.append(took)
        for request in requests:
            engine.cancel(request)
        engine.step()
        return Figure(steps, steps, tuple(seconds), (), context, peak_bytes(llm.device))


def _round(
    stepping: Iterator[None], requests: Sequence[Request], steps: int, limit: float | None, device: torch.device
) -> tuple[int, float]:
    """(tokens of each reply, seconds), less than `steps` where `limit` seconds have passed before."""
    finish(device)
    before, began = _replied(requests), time.perf_counter()
    while (done := (_replied(requests) - before) // len(requests)) < steps:
        if limit is not None and done and time.perf_counter() - began > limit:
            break
        next(stepping)
    finish(device)
    return done, time.perf_counter() - began


def _replied(requests: Sequence[Request]) -> int:
    return sum(request.reply_length for request in requests)


def reset_peak(device: torch.device) -> None:
    """The peak of a GPU's memory counts from now on. A process's own peak can't be taken back."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)


def peak_bytes(device: torch.device) -> int | None:
    """Of memory at the peak: what the GPU's allocator gave, or what of this process was resident."""
    return torch.cuda.max_memory_allocated(device) if device.type == "cuda" else peak_memory()
