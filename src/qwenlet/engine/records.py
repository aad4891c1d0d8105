"""What leaves the engine. One record for everyone: command line, server and evaluations read the same fields."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Literal

from qwenlet.sampling import TokenLogprob

FinishReason = Literal["stop", "length", "cancelled", "error"]


@dataclass(frozen=True)
class Timings:
    """Seconds, and the speeds that follow from them. None where nothing has been measured yet.

    Attributes:
        queued_seconds: from submission to the first step.
        time_to_first_token: from submission to the first token.
        prefill_seconds: spent on the prompt, up to and including the first token's sampling.
        decode_seconds: from the first token to the latest.
    """

    queued_seconds: float | None = None
    time_to_first_token: float | None = None
    prefill_seconds: float | None = None
    decode_seconds: float | None = None
    prefill_tokens: int = 0
    decode_tokens: int = 0

    @property
    def prefill_tokens_per_second(self) -> float | None:
        return self.prefill_tokens / self.prefill_seconds if self.prefill_seconds else None

    @property
    def decode_tokens_per_second(self) -> float | None:
        """Tokens after the first one, over the time they took."""
        return self.decode_tokens / self.decode_seconds if self.decode_seconds and self.decode_tokens else None


@dataclass(frozen=True)
class Chunk:
    """What one step added to one reply.

    Attributes:
        text: new text, whole characters only; may be empty (prompt progress, half a character, a held-back stop text).
        token_ids: new ids, an end token included.
        logprobs: one entry per new id, if asked for.
        finish_reason: None until the last chunk. "stop": an end token or stop text; "length": max_new_tokens reached.
        prompt_tokens, prompt_done: length of the prompt, and how much of it has been processed.
        completion_tokens: ids of the reply so far.
        seed: the seed in force, so that a reply can be drawn again.
        dropped_turns: old turns left out to fit the context (chat only).
        cached_tokens: of the prompt, whose keys and values an earlier request had stored.
    """

    text: str
    token_ids: tuple[int, ...]
    finish_reason: FinishReason | None
    prompt_tokens: int
    prompt_done: int
    completion_tokens: int
    seed: int
    timings: Timings
    logprobs: tuple[TokenLogprob, ...] | None = None
    choice: int = 0
    dropped_turns: int = 0
    cached_tokens: int = 0
    error: str | None = None

    @staticmethod
    def joined(chunks: Sequence[Chunk]) -> Chunk:
        """Chunks of one choice that follow each other, as one."""
        last = chunks[-1]
        if len(chunks) == 1:
            return last
        return replace(
            last,
            text="".join(chunk.text for chunk in chunks),
            token_ids=tuple(token for chunk in chunks for token in chunk.token_ids),
            logprobs=None if last.logprobs is None else tuple(e for chunk in chunks for e in chunk.logprobs or ()),
        )


@dataclass(frozen=True)
class Completion:
    """A whole reply: the sum of its chunks. `token_ids` includes the end token, `text` does not."""

    text: str
    token_ids: tuple[int, ...]
    finish_reason: FinishReason
    prompt_tokens: int
    seed: int
    timings: Timings
    logprobs: tuple[TokenLogprob, ...] | None = None
    choice: int = 0
    dropped_turns: int = 0
    cached_tokens: int = 0
    error: str | None = None

    @property
    def completion_tokens(self) -> int:
        return len(self.token_ids)

    @classmethod
    def from_chunks(cls, chunks: Iterable[Chunk]) -> Completion:
        """Joins the chunks of one choice of one request; the last one must carry the finish reason."""
        parts = list(chunks)
        last = parts[-1]
        assert last.finish_reason is not None, f"{len(parts)} chunks, but the last has no finish reason"
        logprobs = None
        if last.logprobs is not None:
            logprobs = tuple(entry for part in parts for entry in part.logprobs or ())
        return cls(
            text="".join(part.text for part in parts),
            token_ids=tuple(token for part in parts for token in part.token_ids),
            finish_reason=last.finish_reason,
            prompt_tokens=last.prompt_tokens,
            seed=last.seed,
            timings=last.timings,
            logprobs=logprobs,
            choice=last.choice,
            dropped_turns=last.dropped_turns,
            cached_tokens=last.cached_tokens,
            error=last.error,
        )
