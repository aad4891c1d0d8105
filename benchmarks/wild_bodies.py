"""Request bodies that nobody would send: good ones of every endpoint, changed at random, and bad ones that are known.

case = draw(Random("0:17"), conversation)     # the same seed, the same body
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from wild_json import PARAMETERS, SCHEMAS, Draw, change

USER = {"role": "user", "content": "What is the capital of France? 首都在哪里?"}
FUNCTION = {"name": "weather", "description": "The weather of a city.", "parameters": PARAMETERS}
TOOL = {"type": "function", "function": FUNCTION}
ANTHROPIC_TOOL = {"name": "weather", "description": "The weather.", "input_schema": PARAMETERS}
CALL = {"id": "call_1", "type": "function", "function": {"name": "weather", "arguments": '{"city": "Paris"}'}}
CALLED = [USER, {"role": "assistant", "content": None, "tool_calls": [CALL]},
          {"role": "tool", "tool_call_id": "call_1", "content": "22 degrees"}]  # fmt: skip
CHAT, COMPLETIONS, RESPONSES = "/v1/chat/completions", "/v1/completions", "/v1/responses"
MESSAGES, COUNT, INPUT = "/v1/messages", "/v1/messages/count_tokens", "/v1/responses/input_tokens"
TREE = {"format": "qwenlet.conversations", "version": 1, "conversations": [
    {"title": "a", "model": "demo", "settings": {"system": "Be brief."}, "created": 1.0, "updated": 2.0, "current": "2",
     "messages": [{"id": "1", "parent": None, "role": "user", "content": "a", "created": 1.0, "extra": {}},
                  {"id": "2", "parent": "1", "role": "assistant", "content": "b", "created": 2.0, "extra": {}}]},
]}  # fmt: skip
HELD = {"conversations": [{
    "conversation": {"id": "c", "title": "a", "model": "demo", "current": "1", "created": 1.0, "updated": 2.0,
                     "settings": {}},
    "messages": [{"id": "1", "parent": None, "role": "user", "content": "a", "created": 1.0, "extra": {}}],
}]}  # fmt: skip
CHATGPT = [{"title": "a", "current_node": "n", "mapping": {
    "r": {"id": "r", "message": None, "parent": None, "children": ["n"]},
    "n": {"id": "n", "parent": "r", "children": [], "message": {
        "author": {"role": "user"}, "content": {"content_type": "text", "parts": ["hello"]}, "create_time": 1.0}},
}}]  # fmt: skip
SHAREGPT = [{"id": "a", "conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]}]

# Where a schema may stand in a body of each family: the path, the body around it.
SCHEMA_PLACES: list[tuple[str, Callable[[Any], dict[str, Any]]]] = [
    (CHAT, lambda schema: {"messages": [USER], "max_tokens": 8, "response_format": {
        "type": "json_schema", "json_schema": {"name": "a", "schema": schema}}}),
    (CHAT, lambda schema: {"messages": [USER], "max_tokens": 8, "tool_choice": "required", "tools": [
        {"type": "function", "function": FUNCTION | {"parameters": schema}}]}),
    (CHAT, lambda schema: {"messages": [USER], "max_tokens": 8, "guided_json": schema}),
    (COMPLETIONS, lambda schema: {"prompt": "a", "max_tokens": 8, "structured_outputs": {"json": schema}}),
    (RESPONSES, lambda schema: {"input": "a", "max_output_tokens": 8, "text": {
        "format": {"type": "json_schema", "name": "a", "schema": schema}}}),
    (RESPONSES, lambda schema: {"input": "a", "max_output_tokens": 8, "tool_choice": "required", "tools": [
        {"type": "function", **FUNCTION, "parameters": schema}]}),
    (MESSAGES, lambda schema: {"messages": [USER], "max_tokens": 8, "tool_choice": {"type": "any"}, "tools": [
        ANTHROPIC_TOOL | {"input_schema": schema}]}),
    ("/api/chat", lambda schema: {"messages": [USER], "format": schema, "options": {"num_predict": 8}}),
    ("/api/generate", lambda schema: {"prompt": "a", "format": schema, "options": {"num_predict": 8}}),
]  # fmt: skip


def good(talk: str) -> list[tuple[str, Any]]:
    """Bodies that are served; `talk` is a conversation of the page."""
    few: dict[str, Any] = {"max_tokens": 3}
    knobs = {"temperature": 0.7, "top_p": 0.9, "top_k": 20, "seed": 1, "stop": ["\n\n"], "presence_penalty": 0.1}
    page = "/page/api"
    return [
        (CHAT, {"messages": [{"role": "system", "content": "Be brief."}, USER], **few, **knobs}),
        (CHAT, {"messages": [USER], **few, "n": 2, "logprobs": True, "top_logprobs": 2, "logit_bias": {"42": -1}}),
        (CHAT, {"messages": [USER], **few, "stream": True, "stream_options": {"include_usage": True}}),
        (CHAT, {"messages": CALLED, **few, "tools": [TOOL], "tool_choice": "auto", "parallel_tool_calls": True}),
        (CHAT, {"messages": [USER], **few, "tools": [TOOL], "tool_choice": {
            "type": "function", "function": {"name": "weather"}}}),
        (CHAT, {"messages": [USER], **few, "functions": [FUNCTION], "function_call": {"name": "weather"}}),
        (CHAT, {"messages": [USER], **few, "response_format": {"type": "json_object"}}),
        (CHAT, {"messages": [USER, {"role": "assistant", "content": [{"type": "text", "text": "It"}]}], **few,
                "continue_final_message": True, "add_generation_prompt": False}),
        (COMPLETIONS, {"prompt": ["a", "b"], **few, **knobs, "n": 2, "min_tokens": 1}),
        (COMPLETIONS, {"prompt": [[7, 8], [9]], "max_tokens": 1, "echo": True, "logprobs": 2}),
        (COMPLETIONS, {"prompt": "a", **few, "guided_regex": "[ab]{1,3}"}),
        (COMPLETIONS, {"prompt": "a", **few, "guided_choice": ["yes", "no"], "stream": True}),
        (RESPONSES, {"input": "a", "max_output_tokens": 3, "instructions": "Be brief.", "metadata": {"a": "b"}}),
        (RESPONSES, {"input": [{"role": "user", "content": [{"type": "input_text", "text": "a"}]},
                               {"type": "function_call", "call_id": "x", "name": "weather", "arguments": "{}"},
                               {"type": "function_call_output", "call_id": "x", "output": "22"}],
                     "max_output_tokens": 3, "stream": True, "tools": [{"type": "function", **FUNCTION}]}),
        (INPUT, {"input": "a", "tools": [{"type": "function", **FUNCTION}]}),
        ("/v1/responses/resp_none/cancel", {}),
        (MESSAGES, {"messages": [USER], **few, "system": [{"type": "text", "text": "a"}], "stop_sequences": ["x"]}),
        (MESSAGES, {"messages": [
            USER, {"role": "assistant", "content": [{"type": "tool_use", "id": "t", "name": "weather", "input": {}}]},
            {"role": "user", "content": [{"type": "tool_result", "tool_use_id": "t", "content": "22"}]}],
            **few, "tools": [ANTHROPIC_TOOL], "tool_choice": {"type": "tool", "name": "weather"}, "stream": True}),
        (COUNT, {"messages": [USER], "tools": [ANTHROPIC_TOOL], "system": "a"}),
        ("/api/chat", {"messages": [USER], "tools": [TOOL], "options": {"num_predict": 3, "temperature": 0.5}}),
        ("/api/chat", {"messages": [USER, {"role": "assistant", "content": "", "tool_calls": [
            {"function": {"name": "weather", "arguments": {"city": "Paris"}}}]}, {"role": "tool", "content": "22"}],
            "stream": False, "format": "json", "options": {"num_predict": 3, "stop": ["x"], "seed": 1}}),
        ("/api/generate", {"prompt": "a", "system": "b", "options": {"num_predict": 3}, "keep_alive": "5m"}),
        ("/api/generate", {"prompt": "a", "raw": True, "stream": False, "options": {"num_predict": 3, "top_k": 3}}),
        ("/api/show", {"model": "demo", "verbose": True}),
        ("/v1/embeddings", {"input": ["a", "b"], "encoding_format": "base64"}),
        ("/v1/embeddings", {"input": [7, 8, 9]}),
        ("/tokenize", {"prompt": "a b c"}),
        ("/tokenize", {"messages": [USER], "add_generation_prompt": False}),
        ("/detokenize", {"tokens": [7, 8, 9]}),
        (f"{page}/conversations", {"title": "a", "settings": {"system": "b", "sampling": {"top_p": 0.5}}}),
        (f"{page}/conversations/{talk}", {"title": "b", "settings": {}}),
        (f"{page}/conversations/{talk}/messages", {"role": "user", "content": "a", "parent": None, "extra": {"a": 1}}),
        (f"{page}/conversations/conv_none/delete", {}),
        (f"{page}/messages/msg_none", {"content": "a", "extra": {}}),
        (f"{page}/import", TREE), (f"{page}/read", TREE), (f"{page}/read", CHATGPT), (f"{page}/read", SHAREGPT),
        (f"{page}/render", HELD), (f"{page}/render?form=markdown", HELD),
    ]  # fmt: skip


@dataclass(frozen=True)
class Case:
    """One request.

    Attributes:
        kind: how it was made.
        refused: whether no answer but 400 is right.
    """

    path: str
    raw: bytes
    kind: str
    refused: bool = False


def draw(by: Draw, talk: str) -> Case:
    kinds: list[tuple[int, Callable[[Draw, str], Case]]] = [
        (50, _changed), (12, _broken), (8, _schema), (6, _tools), (4, _roles), (4, _missing), (3, _grammar), (2, _long),
        (4, _trees), (2, _good),
    ]  # fmt: skip
    (make,) = by.choices([kind for _, kind in kinds], [weight for weight, _ in kinds])
    return make(by, talk)


def encoded(body: Any) -> bytes:
    """JSON with NaN and Infinity as Python writes them; half surrogate pairs stay escapes."""
    return json.dumps(body, ensure_ascii=True).encode()


# ---------------------------------------------------------------------------------------------------------- kinds


def _good(by: Draw, talk: str) -> Case:
    path, body = by.choice(good(talk))
    return Case(path, encoded(body), "good")


def _changed(by: Draw, talk: str) -> Case:
    """One to four changes, anywhere within."""
    path, body = by.choice(good(talk))
    body = json.loads(json.dumps(body))
    for _ in range(by.choice((1, 1, 1, 2, 4))):
        body = change(by, body)
    return Case(path, encoded(body), "changed")


def _broken(by: Draw, talk: str) -> Case:
    """No JSON in UTF-8."""
    path, body = by.choice(good(talk))
    raw = json.dumps(body, ensure_ascii=False).encode()
    at = by.randrange(1, len(raw))
    broken = by.choice([
        raw[:at], raw + b"}", raw + raw, b"", b"\xff\xfe" + raw, raw.decode().encode("utf-16"),
        raw.replace(b'": "', b'": "\xff', 1) if b'": "' in raw else b"\xff",
        raw.replace(b'": ', b'": \xc0\xaf', 1) if b'": ' in raw else b"\xc0",
        b"[" * by.choice((100, 20_000, 500_000)), b'{"a":' * by.choice((100, 20_000, 200_000)), b"'" + raw,
        raw.replace(b'":', b'": NaN, "', 1) if b'":' in raw else b"NaN", raw[:at] + b"\x00" + raw[at:],
    ])  # fmt: skip
    if not _is_json(broken):
        return Case(path, broken, "broken", refused=not path.endswith("/cancel"))  # which reads no body
    return Case(path, broken, "broken")


def _is_json(raw: bytes) -> bool:
    try:
        json.loads(raw.decode("utf-8"))
    except (ValueError, RecursionError):
        return False
    return True


def _schema(by: Draw, talk: str) -> Case:
    path, around = by.choice(SCHEMA_PLACES)
    return Case(path, encoded(around(by.choice(SCHEMAS)(by))), "schema")


def _tools(by: Draw, talk: str) -> Case:
    """Declarations that name nothing, or twice, or too much."""
    function = json.loads(json.dumps(FUNCTION))
    name = by.choice([None, "", 0, [], {}, "a b", "a\nb", "a" * 5_000, "Final Answer", "天气", "\0", "../..", "\ud800"])
    if by.random() < 0.3:
        del function["name"]
    elif by.random() < 0.6:
        function["name"] = name
    else:
        function = by.choice([None, [], "weather", 1, {}, function | {"parameters": by.choice([None, [], 1, "x"])}])
    many = by.choice((1, 1, 2, 300))
    choice = by.choice(["auto", "none", "required", "maybe", None, 1, {"type": "function"},
                        {"type": "function", "function": {"name": "nothing"}},
                        {"type": "tool", "name": name}])  # fmt: skip
    flat = function | {"type": "function"} if isinstance(function, dict) else function
    tool = by.choice([{"type": "function", "function": function}, flat, {"function": function}, {"type": "retrieval"}])
    fields = {"tools": [tool] * many, "tool_choice": choice}
    path, body = by.choice([
        (CHAT, {"messages": [USER], "max_tokens": 3}),
        (CHAT, {"messages": [USER], "max_tokens": 3, "functions": [function] * many, "function_call": choice}),
        (RESPONSES, {"input": "a", "max_output_tokens": 3}), (INPUT, {"input": "a"}),
        (MESSAGES, {"messages": [USER], "max_tokens": 3}), (COUNT, {"messages": [USER]}),
        ("/api/chat", {"messages": [USER], "options": {"num_predict": 3}}),
    ])  # fmt: skip
    return Case(path, encoded(fields | body), "tools")


def _roles(by: Draw, talk: str) -> Case:
    role = by.choice(["wizard", "", None, 1, [], {}, "USER", "user ", "system", "tool", "function", "developer", "\0",
                      "<|im_start|>system", "assistant" * 1_000])  # fmt: skip
    bad = {"role": role, "content": by.choice(["a", None, [], 1, [{"type": "text"}], [{"type": "image_url"}]])}
    turns = by.choice([[bad], [USER, bad], [bad, USER], [bad, bad, bad], [USER, USER, bad]])
    path, body = by.choice([
        (CHAT, {"messages": turns, "max_tokens": 3}), ("/tokenize", {"messages": turns}),
        (RESPONSES, {"input": turns, "max_output_tokens": 3}), (INPUT, {"input": turns}),
        (MESSAGES, {"messages": turns, "max_tokens": 3}), (COUNT, {"messages": turns}),
        ("/api/chat", {"messages": turns, "options": {"num_predict": 3}}),
        (f"/page/api/conversations/{talk}/messages", bad),
    ])  # fmt: skip
    return Case(path, encoded(body), "roles")


def _missing(by: Draw, talk: str) -> Case:
    """Some of the fields, each as it should be."""
    path, body = by.choice([(path, body) for path, body in good(talk) if isinstance(body, dict)])
    return Case(path, encoded({name: value for name, value in body.items() if by.random() < 0.5}), "missing")


def _grammar(by: Draw, talk: str) -> Case:
    regex = by.choice(["(", "[", "a{1000000}", "(a{1000}){1000}", "(a*)*b", "(?=a)b", "\\1", "a" * 100_000, "", "^$",
                       "(?P<a>x)", "[^\\x00-\\x{10FFFF}]", "(.*.*.*.*)*x", "\\p{Han}+", "(|)+", "\ud800"])  # fmt: skip
    choice = by.choice([[], [""], ["a"] * 20_000, [str(each) for each in range(50_000)], ["a" * 200_000], ["\0"]])
    fields = by.choice([{"guided_regex": regex}, {"guided_choice": choice}, {"structured_outputs": {"regex": regex}},
                        {"structured_outputs": {"choice": choice}}, {"guided_json": regex}])  # fmt: skip
    path, body = by.choice([(CHAT, {"messages": [USER]}), (COMPLETIONS, {"prompt": "a"})])
    return Case(path, encoded(body | fields | {"max_tokens": 3}), "grammar")


def _trees(by: Draw, talk: str) -> Case:
    """Conversations whose messages are no tree: cycles, ids twice, parents that are missing or come later."""
    ids = [by.choice(("1", "2", "3", "4")) for _ in range(by.choice((1, 2, 3, 5)))]
    calls = by.choice(({}, {"tool_calls": [CALL]}, {"tool_calls": 1}, {"tool_calls": [{}]}, {"finish_reason": []}))
    roles = ("user", "assistant", "system", "tool")
    messages = [
        {"id": id, "parent": by.choice((None, *ids, "5")), "role": by.choice(roles), "content": "a", "created": 1.0,
         "extra": calls}
        for id in ids
    ]  # fmt: skip
    head = {"title": "a", "model": "demo", "current": by.choice((None, *ids, "5")), "created": 1.0, "updated": 2.0,
            "settings": {}}  # fmt: skip
    held = {"conversations": [{"conversation": head | {"id": "c"}, "messages": messages}]}
    tree = TREE | {"conversations": [head | {"messages": messages}]}
    path, body = by.choice([
        ("render", held), ("render?form=markdown", held), ("import", tree), ("read", tree),
    ])  # fmt: skip
    return Case(f"/page/api/{path}", encoded(body), "trees")


def _long(by: Draw, talk: str) -> Case:
    """More than fits: the context, a page, a name."""
    text = by.choice(["word ", "字", "a", "\u200d", "😀", "\n", " "]) * by.choice((5_000, 300_000))
    path, body = by.choice([
        (CHAT, {"messages": [{"role": "user", "content": text}], "max_tokens": 3}),
        (CHAT, {"messages": [USER] * 3_000, "max_tokens": 3}), (CHAT, {"messages": [USER], "model": text}),
        (CHAT, {"messages": [USER], "max_tokens": 3, "stop": [text, "x"]}),
        (CHAT, {"messages": [USER], "max_tokens": 3, "stop": [str(each) for each in range(20_000)]}),
        (CHAT, {"messages": [USER], "max_tokens": 3, text[:20_000]: 1}),
        (COMPLETIONS, {"prompt": [7] * 50_000, "max_tokens": 3}), (COMPLETIONS, {"prompt": text, "max_tokens": 3}),
        (COMPLETIONS, {"prompt": ["a"] * 5_000, "max_tokens": 3}),
        (RESPONSES, {"input": text, "max_output_tokens": 3}), (MESSAGES, {"messages": [USER | {"content": text}]}),
        ("/api/generate", {"prompt": text}), ("/v1/embeddings", {"input": text}), ("/tokenize", {"prompt": text}),
        ("/v1/embeddings", {"input": ["a"] * 3_000}), ("/detokenize", {"tokens": [7] * 100_000}),
        (f"/page/api/conversations/{talk}/messages", {"role": "user", "content": text}),
        ("/page/api/conversations", {"title": text}),
    ])  # fmt: skip
    return Case(path, encoded(body), "long")
