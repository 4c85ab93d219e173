"""Token routers: which experts each token of a MoE FFN goes to."""

from .routing import Gate, Routing

__all__ = ["Gate", "Routing"]
