"""GET /health, /ready and /version: for whoever watches the server."""

from __future__ import annotations

from typing import Any

from fastapi import FastAPI
from starlette.responses import JSONResponse

import qwenlet
from qwenlet.server.service import Service


def add(app: FastAPI, service: Service) -> None:
    @app.get("/health", response_model=None)
    async def health() -> JSONResponse:
        """Whether the engine does its work; 503 says why it doesn't."""
        trouble = service.trouble()
        if trouble is not None:
            return JSONResponse({"status": "error", "reason": trouble}, 503)
        return JSONResponse({"status": "ok" if service.state == "ready" else service.state})

    @app.get("/ready", response_model=None)
    async def ready() -> JSONResponse:
        """Whether requests are taken: 503 while the model is loaded, and while the server ends."""
        good = service.state == "ready" and service.trouble() is None
        return JSONResponse({"status": service.state}, 200 if good else 503)

    @app.get("/version")
    async def version() -> dict[str, Any]:
        return {"version": qwenlet.__version__}
