"""Bytes and operations that a job needs, and how long the machine would take for them at its ceilings. Arithmetic.

A decoded token reads every weight but the embedding, and what is stored of the tokens before it.
"""

from __future__ import annotations

from dataclasses import dataclass

from qwenlet.config import EngineConfig, ModelConfig, QuantConfig
from qwenlet.errors import ConfigError
from qwenlet.plan import (
    Setup,
    cache_bytes_per_token,
    estimate,
    head_operations,
    key_operations,
    token_operations,
)
from qwenlet.profiling.records import Ceilings
from qwenlet.profiling.workload import Job

# Of the ceilings, what is reckoned with before anything was measured, to say how long it will take.
_USUAL_READ, _USUAL_ARITHMETIC = 0.6, 0.35
_OVERHEAD = 4.0  # seconds: a process starts, weights are mapped
QUANTIZED = ("int4", "int8")


@dataclass(frozen=True)
class Demand:
    """Of one run: bytes that memory delivers at least, multiplications and additions."""

    bytes: int
    operations: int

    def seconds(self, ceilings: Ceilings, precision: str) -> float:
        """At the ceilings: of the two, what takes longer."""
        return max(self.bytes / ceilings.read, self.operations / ceilings.arithmetic(precision))

    def bound(self, ceilings: Ceilings, precision: str) -> str:
        """Which of the two it is: "memory" or "arithmetic"."""
        slow = self.operations / ceilings.arithmetic(precision)
        return "memory" if self.bytes / ceilings.read >= slow else "arithmetic"


@dataclass(frozen=True)
class Costs:
    """What one model's tokens cost in one precision.

    Attributes:
        weights: bytes that each step reads.
        past: bytes of a stored token.
        token, key, head: operations of a token, of a token with one key, of a position's logits.
        peak: bytes of memory on a CPU, of one reply with the longest context.
    """

    weights: int
    past: int
    token: int
    key: int
    head: int
    peak: int

    @classmethod
    def of(cls, model: ModelConfig, precision: str, stored: QuantConfig | None = None, context: int = 1) -> Costs:
        """`stored`: how the checkpoint is quantized, whose groups stay. Raises ConfigError where it can't be so."""
        quant = QuantConfig.named(precision) if precision in QUANTIZED else None
        if quant is not None and stored is not None:
            quant = stored.completed(quant)
        setup = Setup(model=model, dtype="fp32" if quant is not None else precision, quant=quant, context=context)
        plan = estimate(setup)
        return cls(
            weights=sum(kind.read for kind in plan.weights),
            past=cache_bytes_per_token(model, setup.cache_type),
            token=token_operations(model),
            key=key_operations(model),
            head=head_operations(model),
            peak=plan.peak,
        )

    def generating(self, prompt: int, tokens: int, batch: int = 1) -> Demand:
        """`tokens` steps of `batch` rows, the first of which has `prompt` tokens behind it."""
        contexts = tokens * prompt + tokens * (tokens - 1) // 2
        return Demand(
            bytes=tokens * self.weights + batch * contexts * self.past,
            operations=batch * (tokens * (self.token + self.head) + contexts * self.key),
        )

    def reading(self, prompt: int) -> Demand:
        """A prompt in steps of a chunk, and its last position's logits."""
        steps = -(-prompt // EngineConfig().chunks("cpu")[0])
        return Demand(
            bytes=steps * self.weights + prompt * self.past,
            operations=prompt * self.token + prompt * prompt // 2 * self.key + self.head,
        )

    def of_job(self, job: Job) -> Demand:
        """Of one round."""
        if job.kind in ("encode", "prefill"):
            return self.reading(job.prompt)
        return self.generating(job.prompt, job.tokens[-1], job.batch)


def expected_seconds(job: Job, costs: Costs, ceilings: Ceilings, *, alone: bool = False) -> float:
    """A guess at how long a job takes, before anything like it has run; `alone`: in a process that has to load."""
    demand = costs.of_job(job)
    read, arithmetic = ceilings.read * _USUAL_READ, ceilings.arithmetic(job.precision) * _USUAL_ARITHMETIC
    once = max(demand.bytes / read, demand.operations / arithmetic)
    if job.kind == "batch":
        prompts = costs.reading(job.prompt * job.batch)
        once += prompts.operations / arithmetic
    if job.kind == "peer":
        once *= 3.0  # both sides, and the other one is slower
    if job.limit_seconds is not None:
        once = min(once, job.limit_seconds)
    return once * job.rounds_of(once) + (_OVERHEAD if alone else 0.0)


def possible_costs(
    model: ModelConfig, precision: str, stored: QuantConfig | None, context: int = 1, memory: int | None = None
) -> Costs | str:
    """What it costs, or why there is no such precision of this model, within so many bytes of memory."""
    try:
        costs = Costs.of(model, precision, stored, context)
    except ConfigError as error:
        return error.message
    if memory is not None and costs.peak > memory:
        need, free = costs.peak / 1e9, memory / 1e9
        return (
            f"{context:,} tokens need about {need:.1f} GB, and {free:.1f} GB are available; qwenlet plan says what fits"
        )
    return costs
