"""The log of the settings that each evaluation used, in the metadata of the images that a prompt saves.

Nodes that save images write the content of the prompt's extra_pnginfo. So an empty log is put there when a prompt
with controls is queued, and samplers append to it. A sampler whose result ComfyUI takes from its cache does not run
again: live_values.py remembers its log and adds it when such a prompt begins.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from .kinds import CONTROL_KINDS

LOG_KEY = "d2m_log"  # in extra_pnginfo, and in an image's metadata
NEGATIVE = "negative"  # `model` in the log of a run whose model evaluates negative prompts alone

RunLog = dict[
    str, Any
]  # one sampling run: node, controls, evaluations and masks, see evaluation_settings.ControlledRun


class PromptLog(list[RunLog]):
    """The logs of one prompt's runs. ComfyUI lists running prompts as copies, which share this one log."""

    def __deepcopy__(self, memo: dict) -> PromptLog:
        return self


def add_empty_log(json_data: dict[str, Any]) -> dict[str, Any]:
    """Handle PromptServer's on_prompt: add an empty log to a prompt with controls that is about to be queued."""
    graph = json_data.get("prompt")
    if isinstance(graph, dict) and any(node.get("class_type") in CONTROL_KINDS for node in graph.values()):
        extra_data = json_data.setdefault("extra_data", {})
        if not isinstance(extra_data.get("extra_pnginfo"), dict):
            extra_data["extra_pnginfo"] = {}
        extra_data["extra_pnginfo"][LOG_KEY] = PromptLog()
    return json_data


def find_log(extra_data: Mapping[str, Any]) -> PromptLog | None:
    """Return the log in a prompt's extra data, or None if the prompt was queued without `add_empty_log`."""
    log = (extra_data.get("extra_pnginfo") or {}).get(LOG_KEY)
    return log if isinstance(log, PromptLog) else None
