"""What can be asked without generating: the model, the server's health and numbers, and the chat page."""

from __future__ import annotations

import base64
import hashlib
import re
from importlib.resources import files

from fastapi import APIRouter, Request
from fastapi.responses import HTMLResponse, JSONResponse, Response
from prometheus_client import CONTENT_TYPE_LATEST

from dq_runtime.server.documents import Health, ModelCard, ModelList, errors
from dq_runtime.server.service import service_of

router = APIRouter()
PAGE = files("dq_runtime.server").joinpath("page.html").read_text(encoding="utf-8")


def _policy(page: str) -> str:
    """A content security policy under which ``page`` runs its own script and style and can reach only this server."""

    def hashes(tag: str) -> str:
        bodies = re.findall(f"<{tag}>(.*?)</{tag}>", page, re.DOTALL)
        return " ".join(f"'sha256-{base64.b64encode(hashlib.sha256(b.encode()).digest()).decode()}'" for b in bodies)

    return (
        f"default-src 'none'; script-src {hashes('script')}; style-src {hashes('style')}; connect-src 'self'; "
        "img-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    )


_PAGE_HEADERS = {
    "content-security-policy": _policy(PAGE),
    "referrer-policy": "no-referrer",
    "x-content-type-options": "nosniff",
    "cache-control": "no-cache",
}


@router.get("/", response_class=HTMLResponse)
async def page() -> HTMLResponse:
    """The chat page."""
    return HTMLResponse(PAGE, headers=_PAGE_HEADERS)


@router.get("/v1/models", response_model=ModelList, responses=errors(401))
async def models(http: Request) -> JSONResponse:
    """The one model, with its size."""
    return JSONResponse({"object": "list", "data": [service_of(http).served.card()]})


@router.get("/v1/models/{name:path}", response_model=ModelCard, responses=errors(401, 404))
async def model(name: str, http: Request) -> JSONResponse:
    """The model by its name."""
    served = service_of(http).served
    served.check_name(name)
    return JSONResponse(served.card())


@router.get("/health", response_model=Health, responses={503: {"model": Health}})
async def health(http: Request) -> JSONResponse:
    """200 while requests are taken; 503 when the server is stopping, or its engine has died."""
    service = service_of(http)
    stats = service.engine.stats()
    status = "failed" if not service.engine.healthy else "stopping" if http.app.state.draining else "ok"
    body = {"status": status, "running": stats.running, "waiting": stats.waiting}
    return JSONResponse(body, 200 if status == "ok" else 503)


@router.get("/metrics", response_class=Response, responses={200: {"content": {"text/plain": {}}}, **errors(401)})
async def metrics(http: Request) -> Response:
    """Prometheus' text format."""
    return Response(service_of(http).metrics.text(), media_type=CONTENT_TYPE_LATEST)
