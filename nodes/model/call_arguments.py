"""Arguments of calls that pass through this pack: each is found, and handed on, by position or by name as it came.

Wrappers of other packs stand before and behind ours, and read an argument where ComfyUI puts it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple


class CallArguments(NamedTuple):
    args: Sequence[Any]
    kwargs: Mapping[str, Any]

    def find(self, index: int, name: str) -> Any:
        """Return an argument by its index or its name; None if it was left out."""
        return self.args[index] if index < len(self.args) else self.kwargs.get(name)

    def replace(self, index: int, name: str, value: Any) -> CallArguments:
        """Return the arguments with another value for one of them, passed in the same way; by name if it was left out."""
        if index < len(self.args):
            return CallArguments((*self.args[:index], value, *self.args[index + 1 :]), self.kwargs)
        return CallArguments(self.args, {**self.kwargs, name: value})

    def hand_on(self, function: Any) -> Any:
        return function(*self.args, **self.kwargs)
