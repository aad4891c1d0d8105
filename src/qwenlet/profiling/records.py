"""What comes out of a profile: rows, the machine, the ceilings. Plain data, written as JSON."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from statistics import median
from typing import Any

INT = ("int4", "int8")


@dataclass(frozen=True)
class Ceilings:
    """The most this machine was seen to do, with nothing of the model in it.

    Attributes:
        read: bytes/s of memory.
        operations: multiplications and additions a second of large products, by the type of the numbers: "fp32",
            "bf16", "fp16", "int8".
        how: the way each was reached, by "read" and those names.
    """

    read: float
    operations: Mapping[str, float]
    how: Mapping[str, str]

    def arithmetic(self, precision: str) -> float:
        """Operations/s for weights of a precision: codes may be multiplied as whole numbers or as floats."""
        if precision in INT:
            return max(self.operations.get(name, 0.0) for name in ("int8", "bf16", "fp32"))
        return self.operations[precision]

    def best(self, other: Ceilings) -> Ceilings:
        """The larger of two measurements of each."""
        ways = dict(self.how)
        operations = dict(self.operations)
        for name, value in other.operations.items():
            if value > operations.get(name, 0.0):
                operations[name], ways[name] = value, other.how[name]
        if other.read > self.read:
            ways["read"] = other.how["read"]
        return Ceilings(max(self.read, other.read), operations, ways)


@dataclass(frozen=True)
class Machine:
    """Where it ran.

    Attributes:
        device: "cpu" or "cuda".
        name: of the processor or the GPU; kernels: what runs linears there; cores: usable, of the CPU.
        memory: bytes, of the device.
        software: names and versions.
    """

    device: str
    name: str
    kernels: str
    cores: int
    threads: int
    memory: int | None
    software: Mapping[str, str]

    def __str__(self) -> str:
        memory = "" if self.memory is None else f", {self.memory / 1e9:.0f} GB"
        where = f", {self.cores} cores, {self.threads} threads" if self.device == "cpu" else ""
        versions = ", ".join(f"{name} {version}" for name, version in self.software.items())
        return f"{self.name}{where}{memory}; kernels: {self.kernels}; {versions}"


@dataclass(frozen=True)
class Row:
    """One measurement.

    Attributes:
        kind: as Job has it; of a peer's work "generate" and "prefill".
        side: "qwenlet" or "transformers".
        prompt, tokens, batch: what was asked for, of each reply.
        done: tokens that were generated of each reply (of a prompt: read), less than asked where time ran out.
        seconds: of each round; first_token: from submission to the first token, of each round.
        bytes, operations: that one round needed at least.
        bound: which ceiling is nearer, "memory" or "arithmetic"; share: of it that was reached.
        peak: bytes of memory at the peak, of the GPU's allocator or of a process of its own.
        card_speed, card_peak: the published figures, on the card's hardware.
        problem: why there is nothing else.
    """

    kind: str
    precision: str
    attention: str
    prompt: int
    tokens: int
    batch: int = 1
    side: str = "qwenlet"
    done: int = 0
    seconds: tuple[float, ...] = ()
    first_token: tuple[float, ...] = ()
    bytes: int = 0
    operations: int = 0
    bound: str = ""
    share: float | None = None
    peak: int | None = None
    card_speed: float | None = None
    card_peak: int | None = None
    problem: str | None = None

    @property
    def asked(self) -> int:
        """What `done` would be without a limit."""
        return self.prompt if self.kind in ("encode", "prefill", "peer prefill") else self.tokens

    @property
    def cut(self) -> bool:
        return self.problem is None and self.done < self.asked

    @property
    def speed(self) -> float | None:
        """Tokens/s of all replies, by the median of the rounds."""
        return self.batch * self.done / median(self.seconds) if self.seconds else None

    @property
    def bytes_per_second(self) -> float | None:
        return self.bytes / median(self.seconds) if self.seconds else None

    @property
    def operations_per_second(self) -> float | None:
        return self.operations / median(self.seconds) if self.seconds else None

    @property
    def first_token_seconds(self) -> float | None:
        return median(self.first_token) if self.first_token else None

    def to_dict(self) -> dict[str, Any]:
        speeds = {
            "tokens_per_second": self.speed,
            "bytes_per_second": self.bytes_per_second,
            "operations_per_second": self.operations_per_second,
            "first_token_seconds": self.first_token_seconds,
            "cut": self.cut,
        }
        return asdict(self) | speeds


@dataclass(frozen=True)
class Profile:
    """All of a run, finished or not.

    Attributes:
        model: as it was named; parameters: how many.
        weights: bytes that a decoded token reads, by precision.
        started: UTC, ISO 8601.
        finished: no job is left.
        notes: what a reader must know to compare the figures.
    """

    model: str
    parameters: int
    machine: Machine
    ceilings: Ceilings
    weights: Mapping[str, int]
    started: str
    rows: tuple[Row, ...] = ()
    finished: bool = False
    notes: tuple[str, ...] = field(default=())

    def to_dict(self) -> dict[str, Any]:
        return asdict(self) | {"rows": [row.to_dict() for row in self.rows]}
