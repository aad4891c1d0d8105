"""GET /health, /ready and /version: for whoever watches the server."""

from __future__ import annotations

from typing import Any

from fastapi import FastAPI
from starlette.responses import JSONResponse

import qwenlet
from qwenlet.server.errors import RETRY_SECONDS
from qwenlet.server.service import Service


def _later(told: dict[str, str]) -> JSONResponse:
    return JSONResponse(told, 503, {"retry-after": str(RETRY_SECONDS)})


def add(app: FastAPI, service: Service) -> None:
    @app.get("/health", response_model=None)
    async def health() -> JSONResponse:
        """Whether the engine does its work: 503 while the model is loaded, and where it doesn't. The end may take its
        time: a server that lets its last requests end is well."""
        trouble = service.trouble()
        if trouble is not None:
            return JSONResponse({"status": "error", "reason": trouble}, 503)
        if service.state == "loading":
            return _later({"status": "loading"})
        return JSONResponse({"status": "ok" if service.state == "ready" else service.state})

    @app.get("/ready", response_model=None)
    async def ready() -> JSONResponse:
        """Whether requests are taken: 503 while the model is loaded, and while the server ends."""
        if service.state == "ready" and service.trouble() is None:
            return JSONResponse({"status": service.state})
        return _later({"status": service.state})

    @app.get("/version")
    async def version() -> dict[str, Any]:
        return {"version": qwenlet.__version__}
