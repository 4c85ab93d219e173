"""ComfyUI's server, where there is one."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any


def prompt_server() -> Any | None:
    """Not imported here: a ComfyUI with a server has done so long before it loads packs, and one without may not be able
    to (`server` imports a `utils`, of which ComfyUI has two)."""
    return getattr(getattr(sys.modules.get("server"), "PromptServer", None), "instance", None)


def executing() -> Sequence[tuple]:
    """The queue's items that are executing: (number, prompt id, graph, extra data, outputs, …)."""
    server = prompt_server()
    found: Sequence[tuple] = () if server is None else server.prompt_queue.get_current_queue_volatile()[0]
    return found
