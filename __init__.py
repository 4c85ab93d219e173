"""ComfyUI's door to ComfyUI-Dense2MoE."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from comfy_api.latest import ComfyExtension

WEB_DIRECTORY = "./web"


async def comfy_entrypoint() -> ComfyExtension:
    """The pack's nodes. Imported here, so that the package itself can be imported anywhere."""
    from .nodes.extension import Dense2MoE

    return Dense2MoE()
