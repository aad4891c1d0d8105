"""The application: every family of endpoints behind the gate."""

from __future__ import annotations

from typing import Any

from fastapi import FastAPI
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.types import ASGIApp

import qwenlet
from qwenlet.errors import QwenletError
from qwenlet.server import (
    chat,
    completions,
    conversations,
    embeddings,
    errors,
    messages,
    metrics,
    models,
    ollama,
    operations,
    page,
    reference,
    responses,
    tokens,
)
from qwenlet.server.errors import ApiError
from qwenlet.server.gate import Gate
from qwenlet.server.service import LEFT, Service

FAMILIES = (
    chat,
    completions,
    responses,
    messages,
    ollama,
    models,
    embeddings,
    tokens,
    operations,
    metrics,
    page,
    conversations,
)
REQUESTS = (
    ("/v1/chat/completions", chat.ChatRequest),
    ("/v1/completions", completions.CompletionRequest),
    ("/v1/responses", responses.ResponsesRequest),
    ("/v1/responses/input_tokens", responses.TokensRequest),
    ("/v1/messages", messages.MessagesRequest),
    ("/v1/messages/count_tokens", messages.CountRequest),
    ("/api/chat", ollama.OllamaChatRequest),
    ("/api/generate", ollama.OllamaGenerateRequest),
    ("/api/show", ollama.OllamaShowRequest),
    ("/v1/embeddings", embeddings.EmbeddingRequest),
    ("/tokenize", tokens.TokenizeRequest),
    ("/detokenize", tokens.DetokenizeRequest),
)


def build(service: Service) -> ASGIApp:
    """ASGI. Answers 503 where a model is needed until `service.open`."""
    # FastAPI's own pages of docs load scripts from elsewhere
    app = FastAPI(title="qwenlet", version=qwenlet.__version__, docs_url=None, redoc_url=None)
    for family in FAMILIES:
        family.add(app, service)
    reference.add(app, REQUESTS)

    async def unknown(request: Request, problem: Exception) -> Response:
        assert isinstance(problem, HTTPException), "registered for these alone"
        words = f"{request.method} {request.url.path[:200]}: {problem.detail}"
        kind = "not_found_error" if problem.status_code == 404 else "invalid_request_error"
        return errors.response(ApiError(problem.status_code, words, kind, headers=problem.headers), request.url.path)

    async def misread(request: Request, problem: Exception) -> Response:
        assert isinstance(problem, RequestValidationError), "registered for these alone"
        first = problem.errors()[0]
        param = str(first["loc"][-1])
        return errors.response(ApiError(400, f"{param}: {first['msg']}", param=param), request.url.path)

    async def told(request: Request, problem: Exception) -> Response:
        error = errors.explained(problem)
        assert error is not None, "registered for errors that have a reason"
        return errors.response(error, request.url.path)

    async def failed(request: Request, problem: Exception) -> Response:
        if isinstance(problem, ClientDisconnect):
            return Response(status_code=LEFT)  # for the gate's count: nobody is there to read it
        error = errors.internal(request.state.request_id)  # the gate logs what it was
        return errors.response(error, request.url.path)

    app.add_exception_handler(HTTPException, unknown)
    app.add_exception_handler(RequestValidationError, misread)
    app.add_exception_handler(ApiError, told)
    app.add_exception_handler(QwenletError, told)
    app.add_exception_handler(Exception, failed)
    plain = app.openapi

    def document() -> dict[str, Any]:
        schema = plain()
        reference.document(schema, REQUESTS)
        return schema

    app.openapi = document  # type: ignore[method-assign]
    gate = Gate(app, service)
    if not service.config.cors_origin:
        return gate
    # outside the gate: a browser asks without a key whether it may ask
    return CORSMiddleware(
        gate,
        allow_origins=list(service.config.cors_origin),
        allow_methods=["GET", "POST"],
        allow_headers=["*"],
        expose_headers=["x-request-id", "x-qwenlet-ignored", "retry-after"],
    )
