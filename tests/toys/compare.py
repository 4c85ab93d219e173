"""Comparison of results."""

from __future__ import annotations

from torch import Tensor


def distance(found: Tensor, expected: Tensor) -> float:
    """Relative distance: the norm of the difference over the norm of `expected`."""
    return float((found.double() - expected.double()).norm() / expected.double().norm())
