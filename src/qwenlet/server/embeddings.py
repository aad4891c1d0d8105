"""POST /v1/embeddings: mean-pooled last hidden states. The model was trained to write; as embeddings they are weak."""

from __future__ import annotations

import asyncio
import base64
import struct
from typing import Annotated, Any, Literal

import msgspec
from fastapi import FastAPI, Request
from msgspec import UNSET, Meta, Struct
from starlette.responses import Response
from torch import Tensor

from qwenlet.server import replies
from qwenlet.server.bodies import post
from qwenlet.server.completions import prompt_ids
from qwenlet.server.errors import ApiError
from qwenlet.server.fields import Anything, ignored
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
    user: Annotated[Anything, ignored("clients are told apart by their keys")] = UNSET


def add(app: FastAPI, service: Service) -> None:
    async def embed(body: EmbeddingRequest, request: Request) -> Response:
        service.check_model(body.model)
        size = service.llm.config.hidden_size
        if body.dimensions not in (None, size):
            words = f"dimensions is {body.dimensions}, and the model's vectors have {size}"
            raise ApiError(400, words, param="dimensions", code="unsupported_parameter")
        inputs = await asyncio.to_thread(prompt_ids, service.llm, body.input, "input")
        with replies.held(service, len(inputs)):
            adapter = service.adapter(body.model)
            waiting = [asyncio.wrap_future(service.llm.embedding(ids, adapter=adapter)) for ids in inputs]
            try:
                async with asyncio.timeout(service.config.request_timeout):
                    vectors = await asyncio.gather(*waiting)
            except TimeoutError:
                words = f"the request did not end within its {service.config.request_timeout:.3g} s"
                raise ApiError(504, words, "server_error", code="timeout") from None
            finally:
                for each in waiting:
                    each.cancel()
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
        return Response(msgspec.json.encode(answer), headers=kind, media_type="application/json")

    post(app, "/v1/embeddings", EmbeddingRequest, embed, prompt="input")


def _floats(vector: Tensor) -> Any:
    return vector.tolist()


def _base64(vector: Tensor) -> Any:
    """Little-endian float32."""
    values = vector.tolist()
    return base64.b64encode(struct.pack(f"<{len(values)}f", *values)).decode()
