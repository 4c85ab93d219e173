"""Inputs that are made while the GPU works on those before them."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Generic, TypeVar

import torch

InputsT = TypeVar("InputsT")


class OneAhead(Generic[InputsT]):
    """Makes inputs by their numbers; on a GPU, the following ones in another thread. A CPU trains with all its cores."""

    def __init__(self, make: Callable[[int], InputsT], device: torch.device) -> None:
        self._make = make
        self._executor = None if device.type == "cpu" else ThreadPoolExecutor(1, "inputs")
        self._coming: tuple[int, Future[InputsT]] | None = None

    def take(self, number: int, following: int | None) -> InputsT:
        """Return inputs `number`, and begin with those that are taken next; None if there are none."""
        if self._executor is None:
            return self._make(number)
        coming, self._coming = self._coming, None
        inputs = coming[1].result() if coming is not None and coming[0] == number else self._make(number)
        if following is not None:
            self._coming = following, self._executor.submit(self._make, following)
        return inputs
