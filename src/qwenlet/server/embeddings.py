"""POST /v1/embeddings: mean-pooled last hidden states. The model was trained to write; as embeddings they are weak."""

from __future__ import annotations

import asyncio
import base64
import struct
from collections.abc import Sequence
from typing import Annotated, Any, Literal

from fastapi import FastAPI, Request
from msgspec import UNSET, Meta, Struct
from starlette.responses import Response
from torch import Tensor

from qwenlet.engine import MeanState
from qwenlet.engine.request import Request as EngineRequest
from qwenlet.server import replies
from qwenlet.server.bodies import json_answer, post
from qwenlet.server.completions import prompt_ids
from qwenlet.server.errors import ApiError
from qwenlet.server.fields import Account
from qwenlet.server.service import Service


class EmbeddingRequest(Struct, kw_only=True, forbid_unknown_fields=True):
    """Vectors of texts: mean-pooled last hidden states, for want of a model that was trained to embed."""

    input: Annotated[
        str | list[str | int | list[int]],
        Meta(description="A text, token ids of this model's vocabulary, or a list of either, not mixed."),
    ]
    model: str | None = None
    encoding_format: Annotated[Literal["float", "base64"] | None, Meta(description="float if left out.")] = None
    dimensions: Annotated[int, Meta(ge=1, description="The model's own number alone.")] | None = None
    user: Account = UNSET


def add(app: FastAPI, service: Service) -> None:
    async def embed(body: EmbeddingRequest, request: Request) -> Response:
        service.check_model(body.model)
        size = service.llm.config.hidden_size
        if body.dimensions not in (None, size):
            words = f"dimensions is {body.dimensions}, and the model's vectors have {size}"
            raise ApiError(400, words, param="dimensions", code="unsupported_parameter")
        inputs = await asyncio.to_thread(prompt_ids, service.llm, body.input, "input")
        with replies.held(service, len(inputs)):
            vectors = await _vectors(service, inputs, service.adapter(body.model))
        service.limits.spend(request.state.client.name, sum(map(len, inputs)))
        encoded = _floats if body.encoding_format != "base64" else _base64
        count = sum(map(len, inputs))
        answer = {
            "object": "list",
            "model": service.called(body.model),
            "data": [
                {"object": "embedding", "index": number, "embedding": encoded(vector)}
                for number, vector in enumerate(vectors)
            ],
            "usage": {"prompt_tokens": count, "total_tokens": count},
        }
        kind = {"x-qwenlet-embedding": "mean-pooled last hidden states"}
        return json_answer(answer, kind)

    post(app, "/v1/embeddings", EmbeddingRequest, embed, prompt="input")


async def _vectors(service: Service, inputs: Sequence[Sequence[int]], adapter: str | None) -> list[Tensor]:
    """Float32 [C] of each input. They run among the replies, piece by piece."""
    engine, config = service.llm.engine, service.llm.config
    requests: list[EngineRequest] = []
    states: list[MeanState] = []
    try:
        for ids in inputs:
            alpha, timeout = config.ntk_alpha(len(ids)), service.config.request_timeout
            request, state = engine.embed(ids, alpha, timeout=timeout, adapter=adapter)
            requests.append(request)
            states.append(state)
        await replies.ended(service, requests)
    finally:
        for request in requests:
            engine.cancel(request)
    return [state.mean for state in states]


def _floats(vector: Tensor) -> Any:
    return vector.tolist()


def _base64(vector: Tensor) -> Any:
    """Little-endian float32."""
    values = vector.tolist()
    return base64.b64encode(struct.pack(f"<{len(values)}f", *values)).decode()
