"""A model and workloads that take moments."""

from __future__ import annotations

from functools import cache

from qwenlet.llm import LLM
from qwenlet.profiling.records import Ceilings, Machine, Profile, Row
from qwenlet.profiling.subject import Subject
from qwenlet.profiling.workload import Job, Workload

TINY = Subject("random:tiny", "cpu")
SMALL = Workload(
    precisions=("fp32",), generate=(3, 6), encode=20, prefill=(8,), batch=(1, 3), batch_tokens=2, rounds=2
)  # fmt: skip
CEILINGS = Ceilings(
    1e9, {"fp32": 1e10, "bf16": 2e10, "fp16": 1e10, "int8": 4e10}, {"read": "sum", "fp32": "a", "bf16": "b",
    "fp16": "c", "int8": "d"},
)  # fmt: skip


@cache
def tiny(precision: str = "fp32") -> LLM:
    return TINY.load(precision)


def job(kind: str, prompt: int, *tokens: int, **more: object) -> Job:
    return Job(kind, "fp32", "own", prompt, tokens, **more)  # type: ignore[arg-type]


def profile_of(*rows: Row, finished: bool = True) -> Profile:
    machine = Machine("cpu", "a processor", "avx2", 2, 2, 8_000_000_000, {"torch": "2"})
    return Profile(
        "random:tiny", 1000, machine, CEILINGS, {"bf16": 3_050_000_000}, "2026-01-01T00:00:00+00:00", rows,
        finished, ("a note",),
    )  # fmt: skip
