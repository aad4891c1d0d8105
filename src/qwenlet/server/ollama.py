"""Ollama's /api/chat, /api/generate, /api/tags, /api/ps, /api/show and /api/version."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable, Mapping, Sequence
from contextlib import aclosing
from datetime import UTC, datetime
from typing import Annotated, Any

import msgspec
from fastapi import FastAPI, Request
from msgspec import UNSET, Struct
from starlette.responses import Response

import qwenlet
from qwenlet.config import SamplingParams
from qwenlet.engine import Chunk
from qwenlet.engine.request import Request as EngineRequest
from qwenlet.server import parsed, replies
from qwenlet.server.bodies import json_answer, post
from qwenlet.server.declared import toolbox_of
from qwenlet.server.dialogue import Dialogue, Format, asked
from qwenlet.server.errors import ApiError, refused
from qwenlet.server.events import EventStream
from qwenlet.server.fields import Anything, Stops, StopText, Thinking, ignored, unsupported
from qwenlet.server.nested import Fields, look
from qwenlet.server.parsed import arguments_object
from qwenlet.server.service import Service
from qwenlet.tools import Call, ToolMessage

_NANO = 1e9  # Ollama's times are in nanoseconds
_CALL = Fields.of("", function=Fields.of("name arguments"))
_MESSAGE = Fields.of("role content thinking images", tool_calls=_CALL)
_FOREVER = "9999-12-31T23:59:59Z"


class Options(Struct, kw_only=True):
    """Sampling settings under Ollama's names."""

    temperature: float | None = None
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    seed: int | None = None
    num_predict: int | None = None
    stop: Stops | StopText | None = None
    repeat_penalty: float | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    num_ctx: Annotated[Anything, ignored("the server was started with its context")] = UNSET


class Asked(Struct, kw_only=True):
    """What chat and generate share."""

    model: str | None = None
    stream: bool | None = None
    format: str | dict[str, Any] | None = None
    options: Options | None = None
    keep_alive: Annotated[Anything, ignored("the model stays loaded")] = UNSET
    think: Thinking = UNSET
    template: Annotated[Anything, unsupported("the format is the checkpoint's")] = UNSET


class OllamaChatRequest(Asked, kw_only=True):
    """The assistant's next message, in Ollama's form."""

    messages: list[dict[str, Any]]
    tools: list[dict[str, Any]] | None = None


class OllamaGenerateRequest(Asked, kw_only=True):
    """A reply to a prompt, in Ollama's form."""

    prompt: str = ""
    system: str | None = None
    raw: bool | None = None
    suffix: str | None = None
    images: list[str] | None = None
    context: Annotated[Anything, ignored("prompts that begin alike are found without")] = UNSET


class OllamaShowRequest(Struct, kw_only=True):
    """What is known of the model."""

    model: str | None = None
    name: str | None = None
    verbose: Annotated[Anything, ignored("all is told")] = UNSET


class LineStream(EventStream):
    media_type = "application/x-ndjson"
    ping = b""  # lines have no comments


def add(app: FastAPI, service: Service) -> None:
    async def chat(body: OllamaChatRequest, request: Request) -> Response:
        _check_model(service, body.model)
        built = None if not body.messages else lambda: _chat(service, body, request.state.ignored)
        return await _answer(service, request, body, "message", built)

    async def generate(body: OllamaGenerateRequest, request: Request) -> Response:
        _check_model(service, body.model)
        for name in ("suffix", "images"):
            if getattr(body, name):
                raise refused(name, "is not supported: the model reads text, and was not taught to fill gaps")
        built = None if not body.prompt else lambda: _prompt(service, body)
        return await _answer(service, request, body, "response", built)

    async def show(body: OllamaShowRequest, request: Request) -> Response:
        _check_model(service, body.model or body.name)
        return json_answer(_shown(service))

    post(app, "/api/chat", OllamaChatRequest, chat, prompt="messages")
    post(app, "/api/generate", OllamaGenerateRequest, generate, prompt="prompt")
    post(app, "/api/show", OllamaShowRequest, show)

    async def cards(**more: Any) -> dict[str, Any]:
        digest = await asyncio.to_thread(service.llm.source.digest)
        return {"models": [_card(service, name, digest) | more for name in service.names]}

    @app.get("/api/tags")
    async def tags() -> dict[str, Any]:
        """The loaded model, under all its names."""
        return await cards()

    @app.get("/api/ps")
    async def running() -> dict[str, Any]:
        """The same: what is there is loaded."""
        return await cards(expires_at=_FOREVER, size_vram=0, context_length=service.llm.context_length)

    @app.get("/api/version")
    async def version() -> dict[str, str]:
        """qwenlet's."""
        return {"version": qwenlet.__version__}


def _check_model(service: Service, name: str | None) -> None:
    """Ollama's clients may add a tag to a name without one."""
    plain = name.removesuffix(":latest") if name is not None and name not in service.names else name
    service.check_model(plain)


# --------------------------------------------------------------------------------------------------- what is asked


def _chat(service: Service, body: OllamaChatRequest, ignored: list[str]) -> Dialogue:
    told = _conversation(body.messages)
    look(body.messages, _MESSAGE, "messages", ignored)
    return asked(service.llm, told, toolbox_of(body.tools, ignored=ignored, refuse=False))


def _conversation(messages: Sequence[Mapping[str, Any]]) -> list[ToolMessage]:
    """Ollama's calls have no ids: results are read in their order."""
    told = []
    for number, message in enumerate(messages):
        place = f"messages[{number}]"
        if message.get("images"):
            raise refused(f"{place}.images", "are not supported: the model reads text alone")
        given = message.get("tool_calls") or []
        if not isinstance(given, list):
            raise ApiError(400, f"{place}.tool_calls is {given!r:.80}, expected a list", param=place)
        calls = tuple(_call(call, place) for call in given)
        content, thought = message.get("content") or "", message.get("thinking") or ""
        if not isinstance(content, str) or not isinstance(thought, str):
            raise ApiError(400, f"{place}.content is {content!r:.80}, expected text", param=place)
        told.append(ToolMessage(message.get("role"), content, calls, thought))  # type: ignore[arg-type]
    return told


def _call(call: Any, place: str) -> Call:
    function = call.get("function") if isinstance(call, Mapping) else None
    if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
        raise ApiError(400, f"{place}.tool_calls holds {call!r:.80}, expected a function with a name", param=place)
    return Call("", function["name"], msgspec.json.encode(function.get("arguments") or {}).decode())


def _prompt(service: Service, body: OllamaGenerateRequest) -> Dialogue:
    if body.raw:
        return Dialogue(service.llm.tokenizer.encode(body.prompt, allowed_special=set()))
    return asked(service.llm, [ToolMessage("user", body.prompt)], instructions=body.system)


def _asked(built: Callable[[], Dialogue], body: Asked, ignored: list[str]) -> tuple[Dialogue, SamplingParams]:
    dialogue = built()
    return dialogue, _params(body, dialogue, ignored)


def _params(body: Asked, dialogue: Dialogue, ignored: list[str]) -> SamplingParams:
    options = body.options or Options()
    answer = None
    if body.format == "json":
        answer = Format()
    elif isinstance(body.format, dict):
        answer = Format(body.format)
    elif body.format:
        raise ApiError(400, f"format is {body.format!r:.80}, expected json or a JSON schema", param="format")
    stop = (options.stop,) if isinstance(options.stop, str) else tuple(options.stop or ())
    limit = options.num_predict
    return SamplingParams(
        max_new_tokens=None if limit is None or limit < 1 else limit,  # -1 and -2 are no limit
        temperature=options.temperature,
        top_k=options.top_k,
        top_p=options.top_p,
        min_p=options.min_p,
        seed=None if options.seed is None else options.seed % 2**64,
        repetition_penalty=options.repeat_penalty,
        presence_penalty=options.presence_penalty or 0.0,
        frequency_penalty=options.frequency_penalty or 0.0,
        stop=(*stop, *dialogue.stop),
        **dialogue.held_to(answer, "format", ignored),
    )


# --------------------------------------------------------------------------------------------------------- answers


async def _answer(
    service: Service, request: Request, body: Asked, field: str, built: Callable[[], Dialogue] | None
) -> Response:
    """`field`: where the text stands; `built`: makes the dialogue, None where there is nothing to say."""
    if built is None:  # Ollama's way to load a model
        end = {"done": True, "done_reason": "load"}
        return json_answer(_head(service, body.model) | {field: _text(field, "")} | end)
    dialogue, params = await asyncio.to_thread(_asked, built, body, request.state.ignored)
    with replies.held(service, request.state.client, 1) as held:
        requests = await replies.submit(service, request.state.client, [dialogue.ids], params, held, model=body.model)
        if body.stream is not False:
            lines = _lines(service, body.model, field, dialogue, requests)
            return LineStream(lines, held.pop_all(), service.config.ping_interval, _failed)
        (one,) = await parsed.whole(service, dialogue, requests)
        calls = [(call.name, call.arguments) for call in one.calls]
        said = _text(field, one.text, one.thought, calls)
        return json_answer(_head(service, body.model) | {field: said} | _end(one.completion, one.finish))


async def _lines(
    service: Service, model: str | None, field: str, dialogue: Dialogue, requests: Sequence[EngineRequest]
) -> AsyncGenerator[bytes, None]:
    """Calls come whole, in the last line but one."""
    calls: list[tuple[str, str]] = []
    async with aclosing(parsed.steps(service, dialogue, requests)) as stepped:
        async for batch in stepped:
            for step in batch:
                delta = step.delta
                if delta.text or delta.thought:
                    yield _line(service, model, field, {"done": False}, delta.text, delta.thought)
                for call in delta.calls:
                    if call.name is not None:
                        calls.append((call.name, ""))
                    calls[call.index] = (calls[call.index][0], calls[call.index][1] + call.arguments)
                if step.finish is not None:
                    if calls:
                        yield _line(service, model, field, {"done": False}, "", "", calls)
                    yield _line(service, model, field, _end(step.chunk, step.finish))


def _line(service: Service, model: str | None, field: str, more: dict[str, Any], *said: Any) -> bytes:
    return msgspec.json.encode(_head(service, model) | {field: _text(field, *(said or ("",)))} | more) + b"\n"


def _failed(error: ApiError) -> bytes:
    return msgspec.json.encode({"error": error.message}) + b"\n"


def _head(service: Service, model: str | None) -> dict[str, Any]:
    return {"model": service.called(model), "created_at": datetime.now(UTC).isoformat()}


def _text(field: str, text: str, thought: str = "", calls: Sequence[tuple[str, str]] = ()) -> Any:
    if field == "response":
        return text
    message: dict[str, Any] = {"role": "assistant", "content": text}
    if thought:
        message["thinking"] = thought
    if calls:
        message["tool_calls"] = [
            {"function": {"name": name, "arguments": arguments_object(written)}} for name, written in calls
        ]
    return message


def _end(one: Chunk | Any, finish: str) -> dict[str, Any]:
    took = one.timings
    parts = (took.queued_seconds or 0.0, took.prefill_seconds or 0.0, took.decode_seconds or 0.0)
    return {
        "done": True,
        "done_reason": "length" if finish == "length" else "stop",
        "total_duration": int(sum(parts) * _NANO),
        "load_duration": 0,
        "prompt_eval_count": one.prompt_tokens,
        "prompt_eval_duration": int(parts[1] * _NANO),
        "eval_count": one.completion_tokens,
        "eval_duration": int(parts[2] * _NANO),
    }


# -------------------------------------------------------------------------------------------------------- the model


def _card(service: Service, name: str, digest: str) -> dict[str, Any]:
    return {
        "name": name,
        "model": name,
        "modified_at": datetime.fromtimestamp(service.created, UTC).isoformat(),
        "size": service.llm.source.size,
        "digest": digest,
        "details": _details(service),
    }


def _details(service: Service) -> dict[str, Any]:
    llm = service.llm
    count, family = llm.config.parameter_count, llm.config.model_type
    return {
        "parent_model": "",
        "format": llm.source.format,
        "family": family,
        "families": [family],
        "parameter_size": f"{count / 1e9:.1f}B" if count >= 1e9 else f"{count / 1e6:.0f}M",
        "quantization_level": llm.precision.upper(),
    }


def _shown(service: Service) -> dict[str, Any]:
    config = service.llm.config
    family = config.model_type
    known = {
        "general.architecture": family,
        "general.parameter_count": config.parameter_count,
        f"{family}.context_length": service.llm.context_length,
        f"{family}.embedding_length": config.hidden_size,
        f"{family}.block_count": config.num_hidden_layers,
        f"{family}.vocab_size": config.vocab_size,
    }
    return {
        "modelfile": "",
        "parameters": "",
        "template": "",
        "details": _details(service),
        "model_info": known,
        "capabilities": ["completion", "tools"],
        "modified_at": datetime.fromtimestamp(service.created, UTC).isoformat(),
    }
