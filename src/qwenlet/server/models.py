"""GET /v1/models and /v1/models/{id}."""

from __future__ import annotations

from typing import Any

from fastapi import FastAPI

from qwenlet.server.service import Service


def add(app: FastAPI, service: Service) -> None:
    @app.get("/v1/models")
    async def models() -> dict[str, Any]:
        """The loaded model, under all its names, and the adapters beside it."""
        return {"object": "list", "data": [_card(service, name) for name in service.names]}

    @app.get("/v1/models/{name:path}")
    async def model(name: str) -> dict[str, Any]:
        """One of its names, which may hold slashes."""
        service.check_model(name)
        return _card(service, name)


def _card(service: Service, name: str) -> dict[str, Any]:
    config = service.llm.config
    return {
        "id": name,
        "object": "model",
        "created": service.created,
        "owned_by": "qwenlet",
        "max_model_len": service.llm.context_length,
        "parent": None if service.adapter(name) is None else service.own_names[0],
        "meta": {
            "n_vocab": config.vocab_size,
            "n_ctx_train": config.seq_length,
            "n_embd": config.hidden_size,
            "n_params": config.parameter_count,
        },
    }
