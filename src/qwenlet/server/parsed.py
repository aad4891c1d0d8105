"""Replies as they are read: from the engine's chunks to text, thoughts and calls, the same for every protocol."""

from __future__ import annotations

import json
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from dataclasses import dataclass
from typing import Any

from qwenlet.engine import Chunk, Completion
from qwenlet.engine.request import Request
from qwenlet.server import replies
from qwenlet.server.dialogue import Delta, Dialogue
from qwenlet.server.service import Service
from qwenlet.tools import Call


@dataclass(frozen=True)
class Step:
    """What one chunk added to one reply.

    Attributes:
        finish: None until the last step: "stop", "length" or "tool_calls".
    """

    number: int
    delta: Delta
    chunk: Chunk
    finish: str | None


@dataclass(frozen=True)
class Parsed:
    """A whole reply; `finish` as in Step."""

    text: str
    thought: str
    calls: tuple[Call, ...]
    finish: str
    completion: Completion


async def steps(service: Service, dialogue: Dialogue, requests: Sequence[Request]) -> AsyncGenerator[list[Step], None]:
    """Steps as they come; an empty list where nothing came for a while. A reply that has called enough is ended."""
    engine = service.llm.engine
    readers = [dialogue.reader() for _ in requests]
    async with aclosing(replies.batches(service, requests)) as batches:
        async for batch in batches:
            found = []
            for number, chunk in batch:
                reader = readers[number]
                delta, finish = reader.push(chunk.text), None
                if chunk.finish_reason is not None:
                    cut = chunk.finish_reason == "length" and not reader.done
                    delta += reader.finish(cut=cut)
                    finish = "length" if cut else "tool_calls" if reader.called else "stop"
                elif reader.done:
                    engine.stop(requests[number])
                found.append(Step(number, delta, chunk, finish))
            yield found


async def whole(service: Service, dialogue: Dialogue, requests: Sequence[Request]) -> list[Parsed]:
    """The whole replies, in the order of the requests."""
    parts: list[list[Step]] = [[] for _ in requests]
    async with aclosing(steps(service, dialogue, requests)) as stepped:
        async for batch in stepped:
            for step in batch:
                parts[step.number].append(step)
    return [_joined(each) for each in parts]


def _joined(each: Sequence[Step]) -> Parsed:
    text = "".join(step.delta.text for step in each)
    thought = "".join(step.delta.thought for step in each)
    pieces = [piece for step in each for piece in step.delta.calls]
    calls = tuple(
        Call(one.id or "", one.name, "".join(piece.arguments for piece in pieces if piece.index == one.index))
        for one in pieces
        if one.name is not None
    )
    completion = Completion.from_chunks([step.chunk for step in each])
    return Parsed(text, thought, calls, each[-1].finish or "stop", completion)


def arguments_object(written: str) -> dict[str, Any]:
    """A call's arguments; what is no object, because a small model slipped, stands under `arguments`."""
    try:
        value = json.loads(written)
    except (ValueError, RecursionError):
        value = written
    return value if isinstance(value, dict) else {"arguments": value}
