"""The routes by which expert maps read traces.

A trace does not change, so its id is its entity tag; the browser asks each time whether the trace still exists.

GET    /d2m/traces/{id}                                description of a trace, without the choices of its routers
GET    /d2m/traces/{id}/steps/{step}/samples/{sample}  choices of one step for one sample: Trace.step_bytes
DELETE /d2m/traces/{id}                                the map does not show the trace any longer
"""

from __future__ import annotations

import asyncio
import json
import re
from collections.abc import Callable
from typing import Any

from aiohttp import web

from ...d2m_model.trace_record import Trace
from ..prompt_server import RequestError, prompt_server, with_json_errors
from .trace_store import STORE

_ID = re.compile(r"[A-Za-z0-9_-]{22}")
_NUMBER = re.compile(r"[0-9]{1,5}")


def _requested_trace(request: web.Request) -> tuple[str, Trace]:
    """Return the id in the path and its trace. Raises RequestError."""
    trace_id = request.match_info["id"]
    if not _ID.fullmatch(trace_id):
        raise RequestError(400, "This is not the id of a trace; expected 22 letters, digits, - or _.")
    trace = STORE.get(trace_id)
    if trace is None:
        raise RequestError(404, "This trace does not exist (any more). Queue the workflow again to record it anew.")
    return trace_id, trace


def _requested_index(request: web.Request, name: str, count: int) -> int:
    """Return the number `name` of the path, which is below `count`. Raises RequestError."""
    text = request.match_info[name]
    if not _NUMBER.fullmatch(text):
        raise RequestError(400, f"{name} is {text[:20]!r}; expected a number from 0.")
    if int(text) >= count:
        raise RequestError(404, f"{name} is {int(text)}, but this trace has {count} of them.")
    return int(text)


async def _respond(request: web.Request, tag: str, body: Callable[[], bytes], content_type: str) -> web.Response:
    """Answer with the body, or with status 304 if the browser has what the tag stands for."""
    headers = {"ETag": f'"{tag}"', "Cache-Control": "private, no-cache"}
    if any(known.value == tag for known in request.if_none_match or ()):
        return web.Response(status=304, headers=headers)
    return web.Response(body=await asyncio.to_thread(body), content_type=content_type, headers=headers)


@with_json_errors
async def get_trace(request: web.Request) -> web.Response:
    trace_id, trace = _requested_trace(request)

    def body() -> bytes:
        return json.dumps({"id": trace_id, **trace.described}, separators=(",", ":")).encode()

    return await _respond(request, trace_id, body, "application/json")


@with_json_errors
async def get_step(request: web.Request) -> web.Response:
    trace_id, trace = _requested_trace(request)
    step = _requested_index(request, "step", len(trace.steps))
    sample = _requested_index(request, "sample", len(trace.samples))
    tag = f"{trace_id}-{step}-{sample}"
    return await _respond(request, tag, lambda: trace.step_bytes(step, sample), "application/octet-stream")


@with_json_errors
async def delete_trace(request: web.Request) -> web.Response:
    trace_id, _ = _requested_trace(request)
    STORE.free(trace_id)
    return web.Response(status=204)


def add_routes(routes: Any) -> None:
    """Add the routes to a table of routes, such as that of ComfyUI's server."""
    routes.get("/d2m/traces/{id}")(get_trace)
    routes.get("/d2m/traces/{id}/steps/{step}/samples/{sample}")(get_step)
    routes.delete("/d2m/traces/{id}")(delete_trace)


def register() -> None:
    """Add the routes if ComfyUI runs a server."""
    if (server := prompt_server()) is not None:
        add_routes(server.routes)
