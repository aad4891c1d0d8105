"""POST /v1/completions: texts and token ids go on, without any chat format."""

from __future__ import annotations

import asyncio
import secrets
import time
from collections.abc import AsyncGenerator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from typing import Annotated, Any

from fastapi import FastAPI, Request
from msgspec import UNSET, Meta
from starlette.responses import Response

from qwenlet.engine import Chunk, Completion, check_prompt
from qwenlet.engine.request import Request as EngineRequest
from qwenlet.errors import ContextLengthError
from qwenlet.llm import LLM
from qwenlet.sampling import TokenLogprob
from qwenlet.server import replies
from qwenlet.server.bodies import json_answer, post
from qwenlet.server.errors import ApiError
from qwenlet.server.events import DONE, NOTHING, EventStream, event
from qwenlet.server.fields import Anything, SamplingFields, name_unstreamed, sampling, unsupported
from qwenlet.server.prompts import prompt_logprobs
from qwenlet.server.service import Service
from qwenlet.tokenizer import StreamDecoder, Tokenizer

DEFAULT_TOKENS = 16  # OpenAI's
MOST_PROMPTS = 2048  # OpenAI's


class CompletionRequest(SamplingFields, kw_only=True, forbid_unknown_fields=True):
    """Texts go on."""

    prompt: Annotated[
        str | list[str | int | list[int]], Meta(description="A text, token ids, or a list of either, not mixed.")
    ]
    max_tokens: Annotated[int, Meta(ge=0, description="16 if left out; 0 with echo alone.")] | None = None
    echo: Annotated[bool | None, Meta(description="The prompt leads the text, and its tokens the logprobs.")] = None
    logprobs: Annotated[int, Meta(ge=0, le=20)] | None = None
    suffix: Annotated[Anything, unsupported("the model was not taught to fill gaps")] = UNSET
    best_of: Annotated[int, Meta(ge=1, le=128, description="So many are written, the likeliest n are told.")] | None = (
        None
    )


@dataclass(frozen=True)
class Echo:
    """What leads a reply: the prompt's text, and its tokens with their log-probabilities where those are asked for.

    The first token's log-probability is null: nothing predicts it.
    """

    text: str
    ids: Sequence[int]
    entries: Sequence[TokenLogprob] | None


def add(app: FastAPI, service: Service) -> None:
    async def complete(body: CompletionRequest, request: Request) -> Response:
        service.check_model(body.model)
        prompts = await asyncio.to_thread(prompt_ids, service.llm, body.prompt)
        limit = _limit(body)
        if not limit and (not body.echo or body.stream):
            raise ApiError(400, "max_tokens is 0, which needs echo, and no stream", param="max_tokens")
        n, written = body.n or 1, max(body.best_of or 1, body.n or 1)
        if body.best_of is not None and (body.best_of < n or body.stream):
            raise ApiError(400, f"best_of is {body.best_of}, expected n or more, and no stream", param="best_of")
        ranks = written > n
        logprobs = 0 if ranks and body.logprobs is None else body.logprobs
        params = sampling(body, max_new_tokens=limit or 1, logprobs=logprobs, n=written)
        name_unstreamed(body, request.state.ignored)
        check_prompts(service.llm, prompts, limit)
        client, priority = request.state.client, body.priority or 0
        places, blamed = written * len(prompts), "prompt" if len(prompts) > 1 else "n"
        if not body.stream:  # a stream tells of all prompts side by side; others may run in slices
            places, blamed = min(places, max(service.share(client), written)), "n"
        with replies.held(service, client, places, blamed) as held:
            if body.stream:
                echoes = await _echoes(service, body, prompts)
                requests = await replies.submit(
                    service, client, prompts, params, held, model=body.model, priority=priority
                )
                events = _stream(service, body, n, requests, echoes)
                return EventStream(events, held.pop_all(), service.config.ping_interval)
            echoes, done, width = [], [], places // written
            for at in range(0, len(prompts), width):
                some = prompts[at : at + width]
                echoes += await _echoes(service, body, some)
                if limit:
                    with ExitStack() as running:
                        requests = await replies.submit(
                            service, client, some, params, running, model=body.model, priority=priority
                        )
                        done += await replies.completions(service, requests)
            if not limit:
                service.limits.spend(client.name, sum(map(len, prompts)))
                return json_answer(_echoed(service, body, echoes, n))
            chosen = [one for at in range(0, len(done), written) for one in _best(done[at : at + written], n)]
            told = [replace(one, logprobs=None) for one in chosen] if body.logprobs is None else chosen
            return json_answer(_whole(service, body, n, told, echoes) | {"usage": replies.usage(done, written)})

    post(app, "/v1/completions", CompletionRequest, complete, prompt="prompt")


def _limit(body: CompletionRequest) -> int:
    return DEFAULT_TOKENS if body.max_tokens is None else body.max_tokens


def _best(done: Sequence[Completion], n: int) -> Sequence[Completion]:
    """The n of them with the highest log-probability per token, as OpenAI ranks them."""
    if n == len(done):
        return done

    def mean(one: Completion) -> float:
        entries = one.logprobs or ()
        return sum(each.logprob for each in entries) / max(len(entries), 1)

    return sorted(done, key=mean, reverse=True)[:n]


async def _echoes(service: Service, body: CompletionRequest, prompts: Sequence[Sequence[int]]) -> list[Echo | None]:
    """Of each prompt what leads its replies; None where no echo is asked for."""
    if not body.echo:
        return [None] * len(prompts)
    found: list[Any] = [None] * len(prompts)
    if body.logprobs is not None:
        reply = _limit(body)
        found = await prompt_logprobs(
            service, prompts, body.logprobs, reply, model=body.model, priority=body.priority or 0
        )
    decode = service.llm.tokenizer.decode
    texts = await asyncio.to_thread(lambda: [decode(ids) for ids in prompts])
    return [Echo(*one) for one in zip(texts, prompts, found, strict=True)]


def prompt_ids(llm: LLM, prompt: str | list[Any], name: str = "prompt") -> list[list[int]]:
    """Token ids of each prompt. Raises ApiError 400 for an empty or mixed list, RequestError for an empty prompt or an
    id that the model does not know."""
    return [list(check_prompt(ids, llm.config.vocab_size)) for ids in _prompt_ids(llm, prompt, name)]


def _prompt_ids(llm: LLM, prompt: str | list[Any], name: str) -> list[list[int]]:
    if isinstance(prompt, str):
        return [llm.tokenizer.encode(prompt, allowed_special=set())]
    kinds = {type(one) for one in prompt}
    if len(kinds) != 1:
        seen = "empty" if not kinds else "a list of mixed kinds"
        raise ApiError(400, f"{name} is {seen}, expected texts, token ids or lists of token ids", param=name)
    if kinds == {int}:
        return [prompt]
    if kinds == {str}:
        return [llm.tokenizer.encode(one, allowed_special=set()) for one in prompt]
    return prompt


def check_prompts(llm: LLM, prompts: Sequence[Sequence[int]], reply: int, name: str = "prompt") -> None:
    """How many and how long they are, before the first one runs.

    Raises:
        ApiError 400: too many; `name` is their field.
        ContextLengthError: so long a reply has no room after one of them.
    """
    if len(prompts) > MOST_PROMPTS:
        words = f"{name} holds {len(prompts)} texts, and at most {MOST_PROMPTS} are taken in one call"
        raise ApiError(400, words, param=name)
    longest = max(map(len, prompts))
    if longest + reply > llm.context_length:
        raise ContextLengthError(longest, llm.context_length, reply)


def _head(service: Service, model: str | None) -> dict[str, Any]:
    return {
        "id": f"cmpl-{secrets.token_hex(12)}",
        "object": "text_completion",
        "created": int(time.time()),
        "model": service.called(model),
        "system_fingerprint": None,
    }


def _whole(
    service: Service, body: CompletionRequest, n: int, done: Sequence[Completion], echoes: Sequence[Echo | None]
) -> dict[str, Any]:
    choices = []
    for number, one in enumerate(done):
        echo, lists = echoes[number // n], TokenLists(service.llm.tokenizer)
        lead = "" if echo is None else lists.lead(echo)
        told = None if one.logprobs is None else lists.told(one.logprobs)
        reason = replies.finish_reason(one)
        choices.append({"index": number, "text": lead + one.text, "logprobs": told, "finish_reason": reason})
    return _head(service, body.model) | {"choices": choices, "timings": replies.timings(done[0])}


def _echoed(service: Service, body: CompletionRequest, echoes: Sequence[Echo | None], n: int) -> dict[str, Any]:
    """The answer where nothing was to be written."""
    choices: list[dict[str, Any]] = []
    prompt_tokens = 0
    for echo in echoes:
        assert echo is not None, "nothing to be written needs echo"
        prompt_tokens += len(echo.ids)
        for _ in range(n):
            lists = TokenLists(service.llm.tokenizer)
            text = lists.lead(echo)
            told = None if echo.entries is None else lists.told(())
            choices.append({"index": len(choices), "text": text, "logprobs": told, "finish_reason": "length"})
    usage = {"prompt_tokens": prompt_tokens, "completion_tokens": 0, "total_tokens": prompt_tokens}
    return _head(service, body.model) | {"choices": choices, "usage": usage}


class TokenLists:
    """OpenAI's four lists of one choice, told piece by piece."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._decoder = StreamDecoder(tokenizer)
        self._offset = 0
        self._lists: dict[str, list[Any]] = {}
        self._clear()

    def _clear(self) -> None:
        self._lists = {"tokens": [], "token_logprobs": [], "top_logprobs": [], "text_offset": []}

    def lead(self, echo: Echo) -> str:
        """Puts the prompt's tokens before all others; gives its text."""
        if echo.entries is None:
            self._offset = len(echo.text)
            return echo.text
        # a prompt's control tokens are part of its text
        self._decoder = StreamDecoder(self._tokenizer, skip_special_tokens=False)
        self._add(echo.ids[0], None)
        for entry in echo.entries:
            self._add(entry.token_id, entry)
        self._offset, self._decoder = len(echo.text), StreamDecoder(self._tokenizer)
        return echo.text

    def told(self, entries: Sequence[TokenLogprob]) -> dict[str, list[Any]]:
        """The lists of what came since they were told last."""
        for entry in entries:
            self._add(entry.token_id, entry)
        lists = self._lists
        self._clear()
        return lists

    def _add(self, id: int, entry: TokenLogprob | None) -> None:
        lists = self._lists
        lists["tokens"].append(self._name(id))
        lists["text_offset"].append(self._offset)
        self._offset += len(self._decoder.push(id))
        lists["token_logprobs"].append(None if entry is None else entry.logprob)
        if entry is None:
            lists["top_logprobs"].append(None)
            return
        top: dict[str, float] = {}
        for each, logprob in (*entry.top, (id, entry.logprob)):  # the likeliest first, the token itself as well
            top.setdefault(self._name(each), logprob)
        lists["top_logprobs"].append(top)

    def _name(self, id: int) -> str:
        """A token's text; that of half a character says which bytes it is, so that no two are alike."""
        raw = self._tokenizer.decoded_bytes(id)
        try:
            return raw.decode()
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in raw)


async def _stream(
    service: Service, body: CompletionRequest, n: int, requests: Sequence[EngineRequest], echoes: Sequence[Echo | None]
) -> AsyncGenerator[bytes, None]:
    head, options = _head(service, body.model), body.stream_options
    counted = options is not None and bool(options.include_usage)
    always = options is not None and bool(options.continuous_usage_stats)
    last: dict[int, Chunk] = {}
    lists = [TokenLists(service.llm.tokenizer) for _ in requests]

    def chunk(
        number: int, text: str, entries: Sequence[TokenLogprob] | None, one: Chunk | None = None
    ) -> dict[str, Any]:
        told = None if entries is None or body.logprobs is None else lists[number].told(entries)
        reason = None if one is None else replies.finish_reason(one)
        data = head | {"choices": [{"index": number, "text": text, "logprobs": told, "finish_reason": reason}]}
        if counted:
            data["usage"] = replies.usage([one], 1) if always and one is not None else None
        return data

    for number in range(len(requests)):
        if (echo := echoes[number // n]) is not None:
            yield event(chunk(number, lists[number].lead(echo), ()))
    async for batch in replies.batches(service, requests):
        for number, one in batch:
            last[number] = one
            waiting = body.return_progress and not one.completion_tokens
            if not (one.text or one.logprobs or one.finish_reason or waiting):
                continue
            data = chunk(number, one.text, one.logprobs, one)
            if waiting:
                data["prompt_progress"] = replies.progress(one)
            if one.finish_reason is not None:
                data["timings"] = replies.timings(one)
            yield event(data)
        yield NOTHING
    if counted:
        ordered = [last[number] for number in range(len(requests))]
        yield event(head | {"choices": [], "usage": replies.usage(ordered, n)})
    yield DONE
