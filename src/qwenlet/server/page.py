"""GET / and /page/...: the web page, as it was built from `web/`, and what it asks to know of the server.

The files are part of the package and nothing of them comes from elsewhere; the policy they are sent with lets a browser
fetch nothing from elsewhere either.
"""

from __future__ import annotations

import gzip
import hashlib
import mimetypes
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import msgspec
from fastapi import FastAPI, Request
from starlette.responses import Response

import qwenlet
from qwenlet.checkpoint import dtype_name
from qwenlet.config import SamplingParams
from qwenlet.linear import QuantLinear
from qwenlet.llm import LLM
from qwenlet.server.service import Service

STATIC = Path(__file__).parent / "static"
API = "/page/api/"

_POLICY = "; ".join(
    [
        "default-src 'none'",
        "script-src 'self'",
        "style-src 'self'",
        "font-src 'self'",
        "img-src 'self'",
        "connect-src 'self'",
        "base-uri 'none'",
        "form-action 'none'",
        "frame-ancestors 'none'",
        "require-trusted-types-for 'script'",
        "trusted-types dompurify",
    ]
)
_HEADERS = {
    "content-security-policy": _POLICY,
    "x-content-type-options": "nosniff",
    "x-frame-options": "DENY",
    "referrer-policy": "no-referrer",
    "cross-origin-opener-policy": "same-origin",
    "cross-origin-resource-policy": "same-origin",
    "permissions-policy": "camera=(), geolocation=(), microphone=()",
    "vary": "accept-encoding",
}
_KINDS = {".js": "text/javascript", ".woff2": "font/woff2", ".svg": "image/svg+xml"}  # not every system knows these


@dataclass(frozen=True)
class PageFile:
    """One file as it is sent; `small` is it in gzip, None where that gains nothing."""

    content: bytes
    small: bytes | None
    kind: str
    etag: str
    lasting: bool

    @classmethod
    def read(cls, path: Path, *, lasting: bool) -> PageFile:
        """`lasting`: its name holds its hash, so a browser need not ask again."""
        content = path.read_bytes()
        small = gzip.compress(content, mtime=0)
        kind = _KINDS.get(path.suffix) or mimetypes.guess_type(path.name)[0] or "application/octet-stream"
        if kind.startswith("text/"):
            kind += "; charset=utf-8"
        etag = f'"{hashlib.sha256(content).hexdigest()[:16]}"'
        return cls(content, small if len(small) < 0.95 * len(content) else None, kind, etag, lasting)

    def answer(self, request: Request) -> Response:
        age = "public, max-age=31536000, immutable" if self.lasting else "no-cache"
        headers = _HEADERS | {"cache-control": age, "etag": self.etag}
        if self.etag in request.headers.get("if-none-match", ""):
            return Response(status_code=304, headers=headers)
        content = self.content
        if self.small is not None and "gzip" in request.headers.get("accept-encoding", ""):
            content = self.small
            headers["content-encoding"] = "gzip"
        return Response(content, headers=headers, media_type=self.kind)


@cache
def paths() -> dict[str, Path]:
    """The page's files by the path they are asked for. They need no key: a browser has none before it has the page."""
    found = {f"/page/{path.relative_to(STATIC).as_posix()}": path for path in STATIC.rglob("*") if path.is_file()}
    index = found.pop("/page/index.html", None)
    return found if index is None else {"/": index, **found}


def add(app: FastAPI, service: Service) -> None:
    files: dict[str, PageFile] = {}

    async def file(request: Request) -> Response:
        path = request.url.path
        if path not in files:
            files[path] = PageFile.read(paths()[path], lasting="/assets/" in path)
        return files[path].answer(request)

    for path in paths():
        app.add_api_route(path, file, methods=["GET", "HEAD"], include_in_schema=False, name=f"page {path}")

    async def about() -> Response:
        """What the page shows of the server."""
        ready = service.state != "loading"
        told = {
            "version": qwenlet.__version__,
            "state": service.state,
            "trouble": service.trouble(in_full=True),
            "history": service.keeps_history,
            "model": _facts(service.own_names[0], service.llm) if ready else None,
        }
        return Response(msgspec.json.encode(told), media_type="application/json")

    app.add_api_route(f"{API}about", about, include_in_schema=False, name="about", response_model=None)


def _facts(name: str, llm: LLM) -> dict[str, Any]:
    own, cut = SamplingParams().resolve(llm.defaults), SamplingParams(top_p=1.0).resolve(llm.defaults)
    fields = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty", "presence_penalty", "frequency_penalty")
    return {
        "name": name,
        "context_length": llm.context_length,
        "parameters": llm.load_report.parameters or llm.config.parameter_count,
        "precision": _precision(llm),
        "device": str(llm.device),
        "default_system": llm.default_system,
        "chats": llm.chat_format == "chatml",
        "sampling": {field: getattr(own, field) for field in fields} | {"max_new_tokens": own.max_new_tokens},
        # a caller who cuts means to sample, so that a greedy checkpoint's temperature gives way
        "temperature_if_cut": cut.temperature,
    }


def _precision(llm: LLM) -> str:
    """How most of the weights are stored: int4, int8, or the name of their precision."""
    bits = [module.tiles.bits for module in llm.model.modules() if isinstance(module, QuantLinear)]
    return f"int{min(bits)}" if bits else dtype_name(llm.dtype)
