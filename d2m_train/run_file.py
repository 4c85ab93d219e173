"""Reading a run's YAML file, with overrides by dotted name. Unknown names are errors that suggest the closest field."""

from __future__ import annotations

import difflib
import types
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, Union, get_args, get_origin

import yaml
from pydantic import BaseModel, ValidationError
from pydantic.fields import FieldInfo

from . import UserError
from .run_config import RunConfig, Section
from .text_file import read_text


def load_run(path: Path, overrides: Sequence[str] = ()) -> RunConfig:
    """Load the run of a YAML file.

    `overrides` change its fields in turn: further YAML files, which are merged over it, or `dotted.name=value` (values
    are YAML). Raises UserError naming the file or override, the field, its value and what was expected.
    """
    data = _read(path)
    for override in overrides:
        if "=" not in override and override.endswith((".yaml", ".yml")):
            _merge(data, _read(Path(override)))
        else:
            _set(data, override)
    try:
        return RunConfig.model_validate(data)
    except ValidationError as error:
        raise UserError("\n".join(f"{path}: {line}" for line in _explained(error))) from None


def _read(path: Path) -> dict[str, Any]:
    try:
        text = read_text(path)
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror or error}).") from None
    try:
        data = parse_yaml(text)
    except ValueError as error:
        raise UserError(f"{path}: not YAML: {error}") from None
    if not isinstance(data, dict):
        raise UserError(f"{path}: {data!r}; expected fields such as teacher, student and data.")
    return data


class _Loader(yaml.SafeLoader):
    """A SafeLoader that refuses a key that comes twice, of which YAML takes the last."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        names = [key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode)]
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode) and names.count(key.value) > 1:
                raise yaml.constructor.ConstructorError(None, None, f"{key.value} is there twice", key.start_mark)
        return super().construct_mapping(node, deep)


def parse_yaml(text: str) -> Any:
    """Parse YAML. Raises ValueError."""
    try:
        return yaml.load(text, _Loader)  # a SafeLoader
    except RecursionError:
        raise ValueError("it is nested too deeply") from None
    except (yaml.YAMLError, TypeError, OverflowError) as error:
        raise ValueError(str(error)) from None


def _merge(data: dict[str, Any], over: dict[str, Any]) -> None:
    for name, value in over.items():
        below = data.get(name)
        if isinstance(value, dict) and isinstance(below, dict):
            _merge(below, value)
        else:
            data[name] = value


def _set(data: dict[str, Any], override: str) -> None:
    name, equals, value = override.partition("=")
    if not equals or not name:
        raise UserError(f"{override!r} is not an override; expected name=value, like training.batch_size=4.")
    *sections, field = name.split(".")
    for depth, section in enumerate(sections, start=1):
        data = data.setdefault(section, {})
        if not isinstance(data, dict):
            raise UserError(f"{override!r}: {'.'.join(sections[:depth])} has no fields of its own.")
    try:
        data[field] = parse_yaml(value)
    except ValueError as error:
        raise UserError(f"{override!r}: the value is not YAML: {error}") from None


def _explained(error: ValidationError) -> Iterator[str]:
    for problem in error.errors():
        where = _dotted(problem["loc"])
        if problem["type"] == "extra_forbidden":
            yield f"{where} is not a field{_suggestion(where)}"
        elif problem["type"] == "missing":
            yield f"{where} is missing."
        else:
            message = problem["msg"].removeprefix("Value error, ")
            found = "" if problem["type"] == "value_error" else f" is {problem['input']!r}"
            yield f"{where}{found}: {message[:1].lower()}{message[1:]}."


def _dotted(place: Sequence[int | str]) -> str:
    """Return the dotted name of a place in a run, without the alternatives of its type that pydantic adds."""
    names: list[str] = []
    inside: Any = RunConfig
    for part in place:
        if isinstance(part, int):
            names.append(str(part))
            inside = next(iter(get_args(inside)), None)
        elif (section := _section(inside)) is not None:
            names.append(part)
            field = section.model_fields.get(part)
            inside = None if field is None else field.annotation
    return ".".join(names) or "the run"


def _section(annotation: Any) -> type[BaseModel] | None:
    return annotation if isinstance(annotation, type) and issubclass(annotation, BaseModel) else None


def _suggestion(name: str) -> str:
    """Suggest the closest field, in the same section or of the same name in another, or else list those of the section."""
    *sections, last = name.split(".")
    own = _fields_below(".".join(sections))
    if near := difflib.get_close_matches(last, own, n=1):
        return f"; did you mean {'.'.join([*sections, near[0]])}?"
    elsewhere = [field for field, _ in run_fields() if field.rpartition(".")[2] == last]
    if elsewhere:
        return f"; did you mean {' or '.join(elsewhere)}?"
    return f" (fields: {', '.join(own)})." if own else "."


def _fields_below(prefix: str) -> list[str]:
    """Return the names of a section's fields; none where `prefix` is no section. The empty prefix is the run."""
    section: type[BaseModel] | None = RunConfig
    for name in prefix.split(".") if prefix else []:
        field = None if section is None else section.model_fields.get(name)
        section = None if field is None else _section(field.annotation)
    return [] if section is None else list(section.model_fields)


def run_fields(section: type[Section] = RunConfig, prefix: str = "") -> Iterator[tuple[str, FieldInfo]]:
    """Yield (dotted name, field) for all fields that have a value of their own."""
    for name, field in section.model_fields.items():
        below = _section(field.annotation)
        if below is not None and issubclass(below, Section):
            yield from run_fields(below, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", field


def fields_text() -> str:
    """List all fields of a run, with their values, their defaults and what they do."""
    lines = []
    for name, field in run_fields():
        default = "required" if field.is_required() else f"default {_plain(field.default)}"
        lines.append(f"{name}: {_values(field.annotation)}; {default}")
        if field.description:
            lines.append("    " + " ".join(field.description.split()))
    return "\n".join(lines)


def _plain(value: Any) -> str:
    """Write a default as it stands in YAML."""
    if isinstance(value, list | tuple):
        return "[" + ", ".join(map(_plain, value)) + "]"
    if isinstance(value, float):
        return f"{value:g}"
    return str(value).lower() if isinstance(value, bool) else "null" if value is None else str(value)


_KINDS = {int: "whole number", float: "number", str: "text", bool: "true | false", Path: "path", types.NoneType: "null"}


def _values(annotation: Any) -> str:
    """Describe the values of a field by its type."""
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        return _values(arguments[0])
    if origin is Literal:
        return " | ".join(map(str, arguments))
    if origin in (Union, types.UnionType):
        return " | ".join(map(_values, arguments))
    if origin is tuple:
        return f"list of {_values(arguments[0])}" if arguments[-1] is ... else f"[{', '.join(map(_values, arguments))}]"
    if (section := _section(annotation)) is not None:
        return "{" + ", ".join(section.model_fields) + "}"
    return _KINDS[annotation]
