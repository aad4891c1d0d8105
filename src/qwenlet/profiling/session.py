"""All jobs of a profile, one after the other. What is finished is handed out at once, and kept when a run is ended."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from statistics import median

import torch

from qwenlet.checkpoint import device_by_name
from qwenlet.config import ModelConfig
from qwenlet.errors import ConfigError, QwenletError
from qwenlet.plan import available_memory
from qwenlet.profiling import card
from qwenlet.profiling.alone import run_alone
from qwenlet.profiling.ceilings import measure_ceilings
from qwenlet.profiling.costs import QUANTIZED, Costs, Demand, expected_seconds, possible_costs
from qwenlet.profiling.hardware import describe
from qwenlet.profiling.measure import Figure, Loaded, offered, run_job
from qwenlet.profiling.records import Ceilings, Profile, Row
from qwenlet.profiling.subject import Subject
from qwenlet.profiling.workload import OWN, PEER_PROMPT, Job, Workload

NOTES = (
    "greedy, no end token ends a reply, nothing guessed ahead, no prefix kept; the engine is stepped by the caller",
    "share: of what the nearer of the two measured ceilings allows for the bytes and operations counted",
)


@dataclass(frozen=True)
class Hooks:
    """Who is told.

    Attributes:
        say: a line for people; kept: the profile so far, after each job.
    """

    say: Callable[[str], None] = lambda text: None
    kept: Callable[[Profile], None] = lambda profile: None


class Session:
    """One run over a workload."""

    def __init__(self, subject: Subject, workload: Workload, hooks: Hooks) -> None:
        self.subject, self.workload, self.hooks = subject, workload, hooks
        self.device = device_by_name(subject.device)

    def run(self) -> Profile:
        """All of it. An exception (Ctrl-C among them) leaves what was handed to `kept`.

        Raises:
            QwenletError: the model is not to be had, or no job at all can run.
        """
        config, stored = self.subject.facts()
        self._check(config)
        self._is_cards = card.is_of(config)
        self.hooks.say("measuring how fast this machine reads and multiplies ...")
        ceilings = measure_ceilings(self.device)
        memory = available_memory() if self.device.type == "cpu" else None
        context = self.workload.context
        costs = {name: possible_costs(config, name, stored, context, memory) for name in self.workload.precisions}
        self.profile = Profile(
            model=self.subject.model,
            parameters=config.parameter_count,
            machine=describe(self.device),
            ceilings=ceilings,
            weights={name: one.weights for name, one in costs.items() if isinstance(one, Costs)},
            started=datetime.now(UTC).isoformat(timespec="seconds"),
            notes=NOTES,
        )
        clock = _Clock(self._expected(costs, ceilings))
        self.hooks.say(f"{clock.jobs} measurements, {clock.left()} in all")
        for precision, one in costs.items():
            if isinstance(one, str):
                self._keep([_refused(precision, one)])
            else:
                self._precision(precision, one, clock)
        if not any(row.problem is None for row in self.profile.rows):
            raise ConfigError(
                f"nothing could be measured: {self.profile.rows[0].problem if self.profile.rows else 'no job is left'}",
                hint="--precisions and --attention choose others",
            )
        again = ceilings.best(measure_ceilings(self.device))
        self.profile = replace(
            self.profile, ceilings=again, finished=True, rows=tuple(_shared(row, again) for row in self.profile.rows)
        )
        self.hooks.kept(self.profile)
        return self.profile

    def _check(self, config: ModelConfig) -> None:
        if self.workload.context > config.context_length:
            raise ConfigError(
                f"the longest job needs {self.workload.context:,} positions, but this model has published maths for "
                f"{config.context_length:,}",
                hint="lower --generate, --encode or --prefill",
            )

    def _expected(self, costs: dict[str, Costs | str], ceilings: Ceilings) -> list[tuple[Job, float]]:
        attention = self.workload.attention or (OWN, "flash", "sdpa", "math") if self.device.type == "cuda" else (OWN,)
        return [
            (job, expected_seconds(job, one, ceilings, alone=self._is_alone(job)))
            for precision, one in costs.items()
            if isinstance(one, Costs)
            for job in self.workload.jobs(precision, attention)
            if not (job.kind == "peer" and precision in QUANTIZED)
        ]

    # --------------------------------------------------------------------------------------------- one precision

    def _precision(self, precision: str, costs: Costs, clock: _Clock) -> None:
        try:
            llm = self.subject.load(precision)
        except Exception as error:  # the other precisions go on
            self._keep([_refused(precision, _line(error))])
            return
        with llm:
            found, refused = offered(llm, self.workload.attention)
            self._keep([replace(_refused(precision, why), attention="") for why in refused])
            jobs = list(self.workload.jobs(precision, found))
            together = [job for job in jobs if not self._is_alone(job)]
            for job in together:
                self._job(job, costs, clock, llm)
        gc.collect()  # the model goes from this process: two of them may not fit
        for job in jobs:
            if self._is_alone(job):
                self._job(job, costs, clock, None)

    def _is_alone(self, job: Job) -> bool:
        return self.device.type == "cpu" and job.kind in ("encode", "generate")

    def _job(self, job: Job, costs: Costs, clock: _Clock, llm: Loaded | None) -> None:
        self.hooks.say(clock.before(job))
        began = time.perf_counter()
        try:
            if job.kind == "peer":
                assert llm is not None, "a peer runs beside a loaded model"
                rows = self._peer(job, costs, llm)
            elif llm is None:
                figures = run_alone(self.subject, job, torch.get_num_threads())
                rows = [self._row(job, figure, costs) for figure in figures]
            else:
                rows = [self._row(job, figure, costs) for figure in run_job(llm, job)]
        except Exception as error:  # whatever it was, the other jobs can still tell something
            rows = [_failed(job, _line(error))]
        clock.after(job, time.perf_counter() - began)
        self._keep([_shared(row, self.profile.ceilings) for row in rows])

    def _keep(self, rows: Sequence[Row]) -> None:
        if not rows:
            return
        for row in rows:
            self.hooks.say(f"  {sentence(row)}")
        self.profile = replace(self.profile, rows=(*self.profile.rows, *rows))
        self.hooks.kept(self.profile)

    def _row(self, job: Job, figure: Figure, costs: Costs) -> Row:
        reads = job.kind in ("encode", "prefill")
        written = costs.generating(figure.context, figure.done, job.batch)
        demand = costs.reading(figure.done) if reads else written
        alone = self.device.type == "cuda" or self._is_alone(job)  # else the peak is the whole session's
        tokens = figure.tokens
        return Row(
            kind=job.kind,
            precision=job.precision,
            attention=job.attention,
            prompt=job.prompt,
            tokens=tokens,
            batch=job.batch,
            done=figure.done,
            seconds=figure.seconds,
            first_token=figure.first_token,
            bytes=demand.bytes,
            operations=demand.operations,
            peak=figure.peak if alone else None,
            card_speed=self._card_speed(job, tokens),
            card_peak=self._card_peak(job, tokens),
        )

    def _card_speed(self, job: Job, tokens: int) -> float | None:
        if not self._is_cards or job.kind != "generate":
            return None
        return card.speed(job.precision, job.attention, tokens)

    def _card_peak(self, job: Job, tokens: int) -> int | None:
        if not self._is_cards:
            return None
        if job.kind == "encode":
            return card.encoding_bytes(job.precision, job.prompt)
        return card.generating_bytes(job.precision, tokens) if job.kind == "generate" else None

    def _peer(self, job: Job, costs: Costs, llm: Loaded) -> list[Row]:
        from qwenlet.profiling.peer import peer_model, run_duel

        if job.precision in QUANTIZED:
            return [_failed(job, f"transformers has no {job.precision} of these weights")]
        model = peer_model(self.subject.checkpoint(), llm.dtype, llm.device, job.attention)
        duel = run_duel(llm, model, job)
        read = costs.reading(PEER_PROMPT)
        rows = []
        for side, done in duel.done.items():
            written = costs.generating(job.prompt, done)
            row = Row("peer generate", job.precision, job.attention, job.prompt, job.tokens[-1], side=side)
            rows += [
                replace(
                    row, kind="peer prefill", prompt=PEER_PROMPT, tokens=1, done=PEER_PROMPT,
                    seconds=tuple(duel.prefill[side]), bytes=read.bytes, operations=read.operations,
                ),
                replace(
                    row, done=done, seconds=tuple(duel.generate[side]), bytes=written.bytes,
                    operations=written.operations,
                ),
            ]  # fmt: skip
        return rows


def _refused(precision: str, why: str) -> Row:
    return Row(kind="", precision=precision, attention="", prompt=0, tokens=0, problem=why)


def _line(error: Exception) -> str:
    if isinstance(error, QwenletError):
        return error.message
    return f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"


def _failed(job: Job, why: str) -> Row:
    return Row(
        kind=job.kind, precision=job.precision, attention=job.attention, prompt=job.prompt, tokens=job.tokens[-1],
        batch=job.batch, problem=why,
    )  # fmt: skip


def _shared(row: Row, ceilings: Ceilings) -> Row:
    """The row with its share of a ceiling."""
    if not row.seconds:
        return row
    demand = Demand(row.bytes, row.operations)
    possible = demand.seconds(ceilings, row.precision)
    return replace(row, bound=demand.bound(ceilings, row.precision), share=possible / median(row.seconds))


def sentence(row: Row) -> str:
    """A finished row for the terminal."""
    if row.problem is not None:
        return f"{row.precision}: not measured: {row.problem}"
    speed = "" if row.speed is None else f"{row.speed:,.1f} tokens/s"
    share = "" if row.share is None else f", {row.share:.0%} of {row.bound}"
    peak = "" if row.peak is None else f", peak {row.peak / 1e9:.2f} GB"
    cut = f", cut: first {row.done:,} of {row.asked:,}" if row.cut else ""
    side = "" if row.side == "qwenlet" else f"{row.side}: "
    return f"{side}{speed}{share}{peak}{cut}"


class _Clock:
    """How long the rest will take: what was expected of it, corrected by how it went so far."""

    def __init__(self, expected: Sequence[tuple[Job, float]]) -> None:
        self._expected = dict(expected)
        self.jobs, self._number = len(expected), 0
        self._took = self._of_done = 0.0

    def left(self) -> str:
        factor = self._took / self._of_done if self._of_done else 1.0
        return spoken(sum(self._expected.values()) * factor)

    def before(self, job: Job) -> str:
        self._number += 1
        return f"[{self._number}/{max(self.jobs, self._number)}] {job}; {self.left()} left"

    def after(self, job: Job, seconds: float) -> None:
        self._of_done += self._expected.pop(job, seconds)
        self._took += seconds


def spoken(seconds: float) -> str:
    """About how long, for people."""
    if seconds < 90:
        return f"about {max(seconds, 1.0):.0f} s"
    return f"about {seconds / 60:.0f} min" if seconds < 5400 else f"about {seconds / 3600:.1f} h"
