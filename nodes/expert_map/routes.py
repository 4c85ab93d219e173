"""The routes by which expert maps read traces. A trace does not change, so its id is its entity tag; the browser asks
each time whether it is still held.

GET    /d2m/traces/{id}                               what it says, but for the choices themselves
GET    /d2m/traces/{id}/steps/{step}/samples/{sample} the choices of one step for one sample: Trace.step_bytes
DELETE /d2m/traces/{id}                               it is no longer shown
"""

from __future__ import annotations

import asyncio
import json
import re
from typing import Any

from aiohttp import web

from ...d2m_model.trace_record import Trace
from ..prompt_server import prompt_server
from .trace_store import STORE

ID = re.compile(r"[A-Za-z0-9_-]{22}")
NUMBER = re.compile(r"[0-9]{1,5}")
OCTETS = "application/octet-stream"


def refused(status: int, text: str) -> web.Response:
    return web.json_response({"error": text}, status=status)


def found(request: web.Request) -> tuple[str, Trace] | web.Response:
    shown = request.match_info["id"]
    if not ID.fullmatch(shown):
        return refused(400, "This is no id of a trace; expected 22 letters, digits, - or _.")
    trace = STORE.get(shown)
    if trace is None:
        return refused(404, "This trace is not held (any more). Queue the workflow again to record it anew.")
    return shown, trace


def number(request: web.Request, name: str, count: int) -> int | web.Response:
    """A number of the path that counts one of so many."""
    text = request.match_info[name]
    if not NUMBER.fullmatch(text):
        return refused(400, f"{name} is {text[:20]!r}; expected a number from 0.")
    if int(text) >= count:
        return refused(404, f"{name} is {int(text)}, but this trace has {count} of them.")
    return int(text)


def answer(request: web.Request, tag: str, body: bytes | None, content_type: str) -> web.Response:
    """`body` None: nothing has changed since the browser asked last."""
    headers = {"ETag": f'"{tag}"', "Cache-Control": "private, no-cache"}
    if body is None:
        return web.Response(status=304, headers=headers)
    return web.Response(body=body, content_type=content_type, headers=headers)


def known(request: web.Request, tag: str) -> bool:
    return any(it.value == tag for it in request.if_none_match or ())


async def describe(request: web.Request) -> web.Response:
    it = found(request)
    if isinstance(it, web.Response):
        return it
    shown, trace = it
    if known(request, shown):
        return answer(request, shown, None, "")

    def body() -> bytes:
        return json.dumps({"id": shown, **trace.described}, separators=(",", ":")).encode()

    return answer(request, shown, await asyncio.to_thread(body), "application/json")


async def step(request: web.Request) -> web.Response:
    it = found(request)
    if isinstance(it, web.Response):
        return it
    shown, trace = it
    at = number(request, "step", len(trace.steps))
    sample = number(request, "sample", len(trace.samples))
    for part in (at, sample):
        if isinstance(part, web.Response):
            return part
    assert isinstance(at, int)
    assert isinstance(sample, int)
    tag = f"{shown}-{at}-{sample}"
    if known(request, tag):
        return answer(request, tag, None, "")
    return answer(request, tag, await asyncio.to_thread(trace.step_bytes, at, sample), OCTETS)


async def free(request: web.Request) -> web.Response:
    it = found(request)
    if isinstance(it, web.Response):
        return it
    STORE.free(it[0])
    return web.Response(status=204)


def add(routes: Any) -> None:
    """To the routes of ComfyUI's server."""
    routes.get("/d2m/traces/{id}")(describe)
    routes.get("/d2m/traces/{id}/steps/{step}/samples/{sample}")(step)
    routes.delete("/d2m/traces/{id}")(free)


def register() -> None:
    """Where ComfyUI runs a server."""
    if (server := prompt_server()) is not None:
        add(server.routes)
