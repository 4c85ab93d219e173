"""Checks of a JSON object's fields against a dataclass, with errors that name the field."""

from __future__ import annotations

import dataclasses
from collections.abc import Container
from typing import Any

from .foreign import MessageError


class ConfigError(MessageError):
    """A configuration that cannot be: the message names the field, what it is and what was expected."""


_FIELD_TYPES: dict[str, type | tuple[type, ...]] = {
    "int": int, "float": (int, float), "bool": bool, "str": str, "int | None": (int, type(None)), "dict[str, Any]": dict,
}  # fmt: skip


def expect(holds: bool, name: str, value: object, expected: str) -> None:
    """Raise ConfigError about the field `name`, unless `holds`."""
    if not holds:
        raise ConfigError(f"d2m_config: {name} is {value!r}; expected {expected}.")


def fields_of(cls: type, data: object, where: str, without: Container[str] = ()) -> dict[str, Any]:
    """The fields of the JSON object `data`: those of the dataclass, except `without`, with simple types as annotated.

    Raises ConfigError for a field that is missing, unknown or of another type.
    """
    if not isinstance(data, dict):
        raise ConfigError(f"d2m_config: {where} is {data!r}; expected an object.")
    fields = {f.name: f for f in dataclasses.fields(cls) if f.name not in without}
    for name in data:
        expect(name in fields, f"{where}.{name}", data[name], f"no such field (known: {', '.join(fields)})")
    for name, f in fields.items():
        expect(name in data, f"{where}.{name}", "missing", "a value")
        expected = _FIELD_TYPES.get(str(f.type))
        if expected is not None:
            right = isinstance(data[name], expected) and (str(f.type) == "bool" or not isinstance(data[name], bool))
            expect(right, f"{where}.{name}", data[name], "an object" if expected is dict else str(f.type))
    return dict(data)
