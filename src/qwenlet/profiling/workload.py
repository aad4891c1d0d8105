"""What is measured: jobs, in the order in which they run."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields, replace
from typing import Literal

from qwenlet.errors import ConfigError

PRECISIONS = ("fp32", "bf16", "fp16", "int8", "int4")
ATTENTION = ("flash", "sdpa", "math")
OWN = "own"  # attention by our kernels, where torch's have no part in it
PEERS = ("transformers",)
BATCH_PROMPT = 32  # tokens of each prompt of a batch
PEER_PROMPT = 512
LONG_SECONDS = 30.0

Kind = Literal["generate", "encode", "prefill", "batch", "peer"]


@dataclass(frozen=True)
class Job:
    """One thing to measure.

    Attributes:
        kind: "generate" tokens from a prompt; "encode" a prompt and generate one token, for its memory; "prefill" the
            same for its speed; "batch" a few tokens of several replies at once; "peer" both sides on the same work.
        attention: of ATTENTION, or OWN.
        prompt: tokens, of each reply.
        tokens: to generate, of each reply: several lengths are marks of one run.
        rounds: of which the median counts.
        limit_seconds: after which a run is cut; None: never.
    """

    kind: Kind
    precision: str
    attention: str
    prompt: int
    tokens: tuple[int, ...]
    batch: int = 1
    rounds: int = 1
    limit_seconds: float | None = None

    @property
    def context(self) -> int:
        """Positions that each reply needs."""
        return self.prompt + self.tokens[-1]

    def rounds_of(self, seconds: float) -> int:
        """How many, where one takes so many seconds: what takes long is measured once."""
        return self.rounds if seconds < LONG_SECONDS else 1

    def __str__(self) -> str:
        about = f"{self.precision}, attention {self.attention}: "
        if self.kind in ("encode", "prefill"):
            return f"{about}a prompt of {self.prompt:,} tokens"
        if self.kind == "batch":
            return f"{about}{self.tokens[-1]} tokens of {self.batch} replies at once"
        peer = " by ours and transformers in turn" if self.kind == "peer" else ""
        return f"{about}{self.tokens[-1]:,} tokens from {self.prompt:,}{peer}"


@dataclass(frozen=True, kw_only=True)
class Workload:
    """What to measure.

    Attributes:
        precisions: of the weights: fp32, bf16, fp16, int8, int4.
        attention: kernels to compare: flash, sdpa (torch chooses), math; none: all that the device offers.
        generate: how many tokens to generate from one.
        encode: tokens of the prompt whose memory is measured; 0: none.
        prefill: lengths of the prompts that are timed.
        batch: how many replies at once.
        batch_tokens: of each of them.
        rounds: of which the median counts, where one takes less than half a minute.
        limit_seconds: after which a row is cut, and says so.
        peer: "transformers", to run Qwen2ForCausalLM on the same weights.
        peer_tokens: that both sides generate.
    """

    precisions: tuple[str, ...] = ("fp32", "bf16", "int8", "int4")
    attention: tuple[str, ...] = ()
    generate: tuple[int, ...] = (2048, 8192)
    encode: int = 2048
    prefill: tuple[int, ...] = (128, 512, 2048)
    batch: tuple[int, ...] = (1, 2, 4, 8, 16, 32, 64)
    batch_tokens: int = 32
    rounds: int = 3
    limit_seconds: float | None = None
    peer: str | None = None
    peer_tokens: int = 256

    def __post_init__(self) -> None:
        known = (("precisions", PRECISIONS), ("attention", (OWN, *ATTENTION)), ("peer", PEERS))
        for name, choices in known:
            given = getattr(self, name)
            for value in (given,) if isinstance(given, str) else given or ():
                if value not in choices:
                    raise ConfigError(f"{name} has {value!r}, expected of {', '.join(choices)}")
        for name, lengths in (("generate", self.generate), ("prefill", self.prefill), ("batch", self.batch)):
            values = tuple(sorted(set(lengths)))
            if values and values[0] < 1:
                raise ConfigError(f"{name} has {values[0]}, expected 1 or more")
            object.__setattr__(self, name, values)
        for name in ("batch_tokens", "rounds", "peer_tokens"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} is {getattr(self, name)}, expected 1 or more")
        if self.encode < 0:
            raise ConfigError(f"encode is {self.encode}, expected 0 or more")
        if self.limit_seconds is not None and not self.limit_seconds > 0:
            raise ConfigError(f"limit_seconds is {self.limit_seconds}, expected more than 0")
        if not self.precisions:
            raise ConfigError("there is no precision to measure", hint=f"name some of {', '.join(PRECISIONS)}")
        if not (self.generate or self.encode or self.prefill or self.batch):
            raise ConfigError("there is nothing to measure", hint="ask for one of generate, encode, prefill and batch")
        for name in ("precisions", "attention"):
            object.__setattr__(self, name, tuple(dict.fromkeys(getattr(self, name))))

    @property
    def context(self) -> int:
        """Most positions that a job needs."""
        peer = max(1 + self.peer_tokens, PEER_PROMPT + 1) if self.peer else 0
        room = batch_room(max(self.batch), self.rounds * self.batch_tokens) if self.batch else 0
        prompts = max((self.encode, *self.prefill)) + 1
        return max(1 + max(self.generate, default=0), prompts, BATCH_PROMPT + room, peer)

    def jobs(self, precision: str, attention: Sequence[str]) -> Iterator[Job]:
        """Those of one precision; kernels are compared in what the card compares, the rest runs with the first."""
        if not attention:
            return
        common = {"precision": precision, "rounds": self.rounds, "limit_seconds": self.limit_seconds}
        plain = Job("generate", attention=attention[0], prompt=1, tokens=(1,), **common)  # type: ignore[arg-type]
        for one in attention:
            if self.encode:
                yield replace(plain, kind="encode", attention=one, prompt=self.encode, rounds=1)
            if self.generate:
                yield replace(plain, attention=one, tokens=self.generate)
        for length in self.prefill:
            yield replace(plain, kind="prefill", prompt=length)
        for batch in self.batch:
            yield replace(plain, kind="batch", prompt=BATCH_PROMPT, tokens=(self.batch_tokens,), batch=batch)
        if self.peer is not None:
            yield replace(plain, kind="peer", tokens=(self.peer_tokens,))


def batch_room(batch: int, tokens: int) -> int:
    """Tokens that a reply of a batch may have: the first are ahead of the last by as many as steps read prompts."""
    return tokens + 2 * batch + 2


def quick() -> Workload:
    """A couple of minutes on a CPU, for a model of two billion parameters."""
    return Workload(
        generate=(256,),
        encode=512,
        prefill=(128, 512),
        batch=(1, 4, 16),
        batch_tokens=8,
        rounds=1,
        limit_seconds=8.0,
        peer_tokens=16,
    )


def changed(base: Workload, **options: object) -> Workload:
    """`base` with the options that are given. Raises ConfigError as Workload does, and for a name it doesn't have."""
    known = {field.name for field in fields(base)}
    for name in options:
        if name not in known:
            raise ConfigError(f"unknown option {name!r} of a profile; known are {', '.join(sorted(known))}")
    return replace(base, **{name: value for name, value in options.items() if value is not None})  # type: ignore[arg-type]
