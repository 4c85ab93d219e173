"""Token routers: which experts each token of a MoE FFN goes to. token_router.py is the seam, KINDS the register."""

from __future__ import annotations

import json
from dataclasses import asdict
from functools import cache

from ..fields import expect, fields_of
from .capacity import CapacityRouter
from .routing import Gate, GateMode, Routing
from .token_router import RouterCompanion, RouterTensors, TokenRouter, TrainingCompanion
from .top_k import TopKRouter

__all__ = [
    "KINDS",
    "TOP_K_ROUTER",
    "CapacityRouter",
    "Gate",
    "GateMode",
    "RouterCompanion",
    "RouterTensors",
    "Routing",
    "TokenRouter",
    "TopKRouter",
    "TrainingCompanion",
    "kind_with_setting",
    "router_from_entries",
    "router_from_text",
    "router_to_entries",
    "router_to_text",
]

TOP_K_ROUTER = TopKRouter()  # of files that state no other
KINDS: dict[str, type[TokenRouter]] = {kind.kind: kind for kind in (TopKRouter, CapacityRouter)}


def kind_with_setting(setting: str) -> type[TokenRouter] | None:
    """The first kind that `setting` steers; None if there is none."""
    return next((kind for kind in KINDS.values() if kind.setting == setting), None)


def router_to_entries(router: TokenRouter) -> dict[str, object]:
    """Entries of d2m_config that state the router. A top-k router has none but those that schema 1 always has."""
    entries: dict[str, object] = {"capacity_router": None}
    return entries if router == TOP_K_ROUTER else entries | {f"{router.kind}_router": asdict(router)}


def router_from_entries(data: dict[str, object]) -> TokenRouter:
    """Take these entries out of d2m_config. Raises ConfigError for a missing or wrong one."""
    expect("capacity_router" in data, "d2m_config.capacity_router", "missing", "a value")
    stated = {name: data.pop(f"{name}_router", None) for name in KINDS}
    routers = [
        KINDS[name](**fields_of(KINDS[name], value, f"{name}_router"))
        for name, value in stated.items()
        if value is not None
    ]
    expect(len(routers) < 2, "d2m_config", " and ".join(f"{router.kind}_router" for router in routers), "one of them")
    return routers[0] if routers else TOP_K_ROUTER


def router_to_text(router: TokenRouter) -> str:
    """The router as a text, which a graph of torch.compile can hold."""
    return json.dumps(router_to_entries(router))


@cache
def router_from_text(text: str) -> TokenRouter:
    """The router of `router_to_text`."""
    return router_from_entries(json.loads(text))
