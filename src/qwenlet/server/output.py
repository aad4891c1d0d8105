"""A reply's steps -> the output items of /v1/responses, and the events that tell of them one by one."""

from __future__ import annotations

import secrets
from collections.abc import Sequence
from typing import Any

from qwenlet.engine import Chunk
from qwenlet.sampling import TokenLogprob
from qwenlet.server.dialogue import CallDelta
from qwenlet.server.parsed import Step
from qwenlet.server.replies import chat_logprobs
from qwenlet.tokenizer import Tokenizer

Events = list[tuple[str, dict[str, Any]]]
# of each kind of item with parts: its id's prefix, its part, and what its events are called
_PARTS = {
    "message": ("msg", "output_text", "response.output_text"),
    "reasoning": ("rs", "reasoning_text", "response.reasoning_text"),
}


class Output:
    """The items of one response. One is open at a time; another kind of text ends it.

    Attributes:
        items: as they stand.
    """

    def __init__(self, tokenizer: Tokenizer, logprobs: bool) -> None:
        self.items: list[dict[str, Any]] = []
        self._tokenizer, self._logprobs = tokenizer, logprobs
        self._open: dict[str, Any] | None = None
        self._call = -1

    def take(self, step: Step) -> Events:
        events: Events = []
        if step.delta.thought:
            events += self._write("reasoning", step.delta.thought)
        told = self._told(step.chunk.logprobs or ()) if self._logprobs else []
        if step.delta.text or (told and self._open is not None and self._open["type"] == "message"):
            events += self._write("message", step.delta.text, told)
        for call in step.delta.calls:
            events += self._argue(call)
        if step.finish is not None:
            if not self.items:  # a reply of nothing is a message all the same
                events += self._begin("message")
            events += self._close("incomplete" if step.finish == "length" else "completed")
        return events

    def _told(self, entries: Sequence[TokenLogprob]) -> list[dict[str, Any]]:
        content: list[dict[str, Any]] = chat_logprobs(self._tokenizer, entries)["content"]
        return content

    def _where(self) -> dict[str, Any]:
        assert self._open is not None, "only of an open item"
        return {"item_id": self._open["id"], "output_index": len(self.items) - 1}

    def _begin(self, kind: str) -> Events:
        events = self._close()
        prefix, part_kind, _ = _PARTS[kind]
        item: dict[str, Any] = {"id": f"{prefix}_{secrets.token_hex(24)}", "type": kind, "status": "in_progress"}
        item |= {"role": "assistant", "content": []} if kind == "message" else {"summary": [], "content": []}
        part: dict[str, Any] = {"type": part_kind, "text": ""}
        part |= {"annotations": [], "logprobs": []} if kind == "message" else {}
        self._open = item
        self.items.append(item)
        events.append(("response.output_item.added", {"output_index": len(self.items) - 1, "item": _copy(item)}))
        item["content"].append(part)
        events.append(("response.content_part.added", self._where() | {"content_index": 0, "part": dict(part)}))
        return events

    def _write(self, kind: str, text: str, told: Sequence[dict[str, Any]] = ()) -> Events:
        events = [] if self._open is not None and self._open["type"] == kind else self._begin(kind)
        assert self._open is not None, "begun above"
        part = self._open["content"][0]
        part["text"] += text
        fields: dict[str, Any] = {"content_index": 0, "delta": text}
        if kind == "message":
            fields["logprobs"] = list(told)
            part["logprobs"] = [*part["logprobs"], *told] if told else part["logprobs"]
        events.append((f"{_PARTS[kind][2]}.delta", self._where() | fields))
        return events

    def _argue(self, call: CallDelta) -> Events:
        events: Events = []
        if call.name is not None:
            events += self._close()
            item = {"id": f"fc_{secrets.token_hex(24)}", "type": "function_call", "status": "in_progress"}
            item |= {"call_id": call.id or "", "name": call.name, "arguments": ""}
            self._open = item
            self.items.append(item)
            events.append(("response.output_item.added", {"output_index": len(self.items) - 1, "item": dict(item)}))
        if call.arguments:
            assert self._open is not None, "arguments follow their call"
            self._open["arguments"] += call.arguments
            events.append(("response.function_call_arguments.delta", self._where() | {"delta": call.arguments}))
        return events

    def _close(self, status: str = "completed") -> Events:
        item = self._open
        if item is None:
            return []
        item["status"] = status
        where, events = self._where(), []
        if item["type"] == "function_call":
            done = {"name": item["name"], "arguments": item["arguments"]}
            events.append(("response.function_call_arguments.done", where | done))
        else:
            part = item["content"][0]
            done = {"content_index": 0, "text": part["text"]}
            if item["type"] == "message":
                done["logprobs"] = part["logprobs"]
            events.append((f"{_PARTS[item['type']][2]}.done", where | done))
            events.append(("response.content_part.done", where | {"content_index": 0, "part": dict(part)}))
        self._open = None
        events.append(("response.output_item.done", {"output_index": where["output_index"], "item": item}))
        return events


def _copy(item: dict[str, Any]) -> dict[str, Any]:
    return item | {"content": list(item["content"])}


def usage(chunk: Chunk) -> dict[str, Any]:
    return {
        "input_tokens": chunk.prompt_tokens,
        "input_tokens_details": {"cached_tokens": chunk.cached_tokens, "cache_write_tokens": 0},
        "output_tokens": chunk.completion_tokens,
        "output_tokens_details": {"reasoning_tokens": 0},
        "total_tokens": chunk.prompt_tokens + chunk.completion_tokens,
    }
