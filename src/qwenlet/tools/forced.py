"""A grammar that holds the whole reply to a call, its arguments to the tool's JSON schema, or to a formatted answer."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from qwenlet.config import JSON_GUIDANCE
from qwenlet.tools.declared import Tool, Toolbox

MAX_THOUGHT = 200  # characters; a small model that may ramble does
MAX_CALLS = 8
# with these the schema's own word on other properties would be cut short
_COMPOUND = {"additionalProperties", "patternProperties", "allOf", "anyOf", "oneOf", "$ref", "if"}


def forced_reply(toolbox: Toolbox, *, thinking: bool = False, answer: Mapping[str, Any] | None = None) -> str | None:
    """A Lark grammar for `SamplingParams.lark`, or None where the reply is free.

    Where there is a choice between tools, the reply may think first; the call may end in the beginning of an
    observation, which is where a model that knows the format wants to go on.

    Args:
        thinking: the prompt ends within a thought, as `continues_thought` says.
        answer: JSON schema of an answer, where the reply may call a tool or answer; a reply that must call gives none.
    """
    free = toolbox.choice.mode != "required"
    if free and answer is None:
        return None
    tools = toolbox.offered
    opening = '"\\n" ' if thinking else ""
    if len(tools) > 1 or free:
        opening = '(" " idea)? "\\n" ' if thinking else '("Thought: " idea "\\n")? '
    again = f' ("\\n" call){{0,{MAX_CALLS - 1}}}' if toolbox.parallel else ""
    calls = f'call{again} "\\nObservation:"?'
    rules = [f"start: {opening}{calls}", f"idea: /[^\\n]{{1,{MAX_THOUGHT}}}/"]
    if answer is not None and free:
        # without a thought the answer may come at once, as from a model that knows no such format
        bare = "" if thinking else "answer | "
        rules[0] = f'start: {bare}{opening}({calls} | "Final Answer: " answer)'
        rules.append(f"answer: %json {json.dumps({**answer, 'x-guidance': JSON_GUIDANCE}, ensure_ascii=False)}")
    rules.append("call: " + " | ".join(f"call_{number}" for number in range(len(tools))))
    for number, tool in enumerate(tools):
        words = json.dumps(f"Action: {tool.name}\nAction Input: ", ensure_ascii=False)
        rules.append(f"call_{number}: {words} input_{number}")
        rules.append(f"input_{number}: %json {json.dumps(_schema(tool), ensure_ascii=False)}")
    return "\n".join(rules) + "\n"


def _schema(tool: Tool) -> dict[str, Any]:
    """The tool's schema; arguments it does not declare are left out unless it speaks of them."""
    schema = {"type": "object", **tool.parameters, "x-guidance": JSON_GUIDANCE}
    if not _COMPOUND & schema.keys():
        schema["additionalProperties"] = False
    return schema
