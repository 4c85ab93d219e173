"""Access to ComfyUI's server, if one runs."""

from __future__ import annotations

import sys
from collections.abc import Awaitable, Callable, Sequence
from typing import Any

from aiohttp import web

from ..d2m_model.foreign import MessageError

Handler = Callable[[web.Request], Awaitable[web.Response]]


class RequestError(MessageError):
    """A request that is answered with an error message and the HTTP status `status`."""

    def __init__(self, status: int, message: str) -> None:
        super().__init__(message)
        self.status = status


def prompt_server() -> Any | None:
    """Return the server's PromptServer, or None without a server.

    `server` is not imported here: a ComfyUI with a server has imported it before it loads packs, and one without may
    be unable to (`server` imports a module `utils`, and ComfyUI has two of that name).
    """
    return getattr(getattr(sys.modules.get("server"), "PromptServer", None), "instance", None)


def executing_items() -> Sequence[tuple]:
    """Return the queue's items that are executing: (number, prompt id, graph, extra data, outputs, …)."""
    server = prompt_server()
    items: Sequence[tuple] = () if server is None else server.prompt_queue.get_current_queue_volatile()[0]
    return items


async def read_body(request: web.Request, limit: int) -> bytes:
    """Read the body of a request. Raises RequestError, before all of it is read, if it has more than `limit` bytes."""
    body = b""
    if (request.content_length or 0) <= limit:
        async for piece in request.content.iter_chunked(1 << 16):
            body += piece
            if len(body) > limit:
                break
        else:
            return body
    size = request.content_length or f"{len(body)} or more"
    raise RequestError(400, f"The body has {size} bytes; expected {limit} at most.")


def with_json_errors(handler: Handler) -> Handler:
    """Wrap a handler so that a RequestError is answered with {"error": message} and its status."""

    async def handle(request: web.Request) -> web.Response:
        try:
            return await handler(request)
        except RequestError as error:
            return web.json_response({"error": str(error)}, status=error.status)

    return handle
