"""POST /tokenize and /detokenize, as vLLM and llama-server have them."""

from __future__ import annotations

import asyncio
from typing import Annotated

from fastapi import FastAPI, Request
from msgspec import Meta, Struct
from starlette.responses import Response

from qwenlet.server.bodies import json_answer, post
from qwenlet.server.dialogue import ChatMessage, converse
from qwenlet.server.errors import ApiError
from qwenlet.server.service import Service


class TokenizeRequest(Struct, kw_only=True, forbid_unknown_fields=True):
    """Token ids of a text, or of a conversation's prompt."""

    model: str | None = None
    prompt: str | None = None
    content: Annotated[str | None, Meta(description="llama-server's name of `prompt`.")] = None
    messages: list[ChatMessage] | None = None
    add_generation_prompt: bool = True


class DetokenizeRequest(Struct, kw_only=True, forbid_unknown_fields=True):
    """The text of token ids."""

    tokens: list[int]
    model: str | None = None


def add(app: FastAPI, service: Service) -> None:
    async def tokenize(body: TokenizeRequest, request: Request) -> Response:
        service.check_model(body.model)
        given = [text for text in (body.prompt, body.content) if text is not None]
        if len(given) + (body.messages is not None) != 1:
            raise ApiError(400, "one of prompt, content and messages is needed", param="prompt")

        def ids() -> list[int]:
            if body.messages is None:
                return service.llm.tokenizer.encode(given[0], allowed_special=set())
            return converse(service.llm, body.messages, add_generation_prompt=body.add_generation_prompt).ids

        tokens = await asyncio.to_thread(ids)
        answer = {"tokens": tokens, "count": len(tokens), "max_model_len": service.llm.context_length}
        return json_answer(answer)

    async def detokenize(body: DetokenizeRequest, request: Request) -> Response:
        service.check_model(body.model)
        text = await asyncio.to_thread(service.llm.tokenizer.decode, body.tokens)
        return json_answer({"prompt": text, "content": text})

    post(app, "/tokenize", TokenizeRequest, tokenize)
    post(app, "/detokenize", DetokenizeRequest, detokenize)
