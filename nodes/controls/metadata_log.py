"""Where the log of what each evaluation used goes: into the metadata of the images that a prompt saves.

Nodes that save images write what lies in the prompt's extra_pnginfo. So a list is planted there when a prompt with
controls is queued, and samplers append to it. A sampler whose result ComfyUI has in its cache does not run again: its
log is remembered by what its node is computed from, and put in again when the prompt begins.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from typing import Any

from comfy_execution.graph_utils import is_link

from .transforms import KINDS

LOG_KEY = "d2m_log"  # of extra_pnginfo, and of an image's metadata
NEGATIVE = "negative"  # `model` of a run, where negative prompts have a model of their own

Graph = Mapping[str, Mapping[str, Any]]  # a prompt as ComfyUI's API has it


class PromptLog(list):
    """The runs of one prompt. ComfyUI lists running prompts as copies: they all have this one log."""

    def __deepcopy__(self, memo: dict) -> PromptLog:
        return self


def plant(json_data: dict[str, Any]) -> dict[str, Any]:
    """PromptServer's on_prompt handler: room for the log in what a prompt with controls is queued with."""
    graph = json_data.get("prompt")
    if isinstance(graph, dict) and any(node.get("class_type") in KINDS for node in graph.values()):
        extra_data = json_data.setdefault("extra_data", {})
        if not isinstance(extra_data.get("extra_pnginfo"), dict):
            extra_data["extra_pnginfo"] = {}
        extra_data["extra_pnginfo"][LOG_KEY] = PromptLog()
    return json_data


def planted(extra_data: Mapping[str, Any]) -> PromptLog | None:
    """The log in there. A prompt that was queued past the handler has none."""
    found = (extra_data.get("extra_pnginfo") or {}).get(LOG_KEY)
    return found if isinstance(found, PromptLog) else None


def computed_from(graph: Graph, outputs: Iterable[str], revisions: Mapping[str, int]) -> dict[str, str]:
    """Of every node that `outputs` need, a digest of all that its result depends on, so far as the graph tells:
    nodes, widgets, links, and the revisions of live values."""
    found: dict[str, str] = {}

    def digest(node_id: str) -> str:
        if node_id in found or node_id not in graph:
            return found.get(node_id, "")
        node, inputs = graph[node_id], {}
        found[node_id] = ""  # a loop, which ComfyUI refuses
        for name, value in sorted(node["inputs"].items()):
            inputs[name] = ["link", digest(value[0]), value[1]] if is_link(value) else ["value", value]
        said = json.dumps([node["class_type"], revisions.get(node_id, 0), inputs], sort_keys=True, default=str)
        found[node_id] = hashlib.sha256(said.encode()).hexdigest()
        return found[node_id]

    for output in outputs:
        digest(output)
    return found
