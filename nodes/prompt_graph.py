"""Prompts as graphs of nodes, and digests of what a node's result is computed from."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from typing import Any

from comfy_execution.graph_utils import is_link

PromptGraph = Mapping[str, Mapping[str, Any]]  # nodes by id, as in ComfyUI's API


def result_digests(
    graph: PromptGraph, outputs: Iterable[str], revisions: Mapping[str, int] | None = None
) -> dict[str, str]:
    """Return a digest for every node that `outputs` need, of all that its result depends on.

    That is nodes, widgets, links and the `revisions` of live values by node, as far as the graph shows it.
    """
    digests: dict[str, str] = {}

    def digest(node_id: str) -> str:
        if node_id in digests or node_id not in graph:
            return digests.get(node_id, "")
        node, inputs = graph[node_id], {}
        digests[node_id] = ""  # ends the recursion of a loop, which ComfyUI refuses to run
        for name, value in sorted(node["inputs"].items()):
            inputs[name] = ["link", digest(value[0]), value[1]] if is_link(value) else ["value", value]
        content = [node["class_type"], (revisions or {}).get(node_id, 0), inputs]
        digests[node_id] = hashlib.sha256(json.dumps(content, sort_keys=True, default=str).encode()).hexdigest()
        return digests[node_id]

    for output in outputs:
        digest(output)
    return digests
