"""Parquet files and Hugging Face datasets on disk: a column of images and one of captions."""

from __future__ import annotations

import glob
import threading
from bisect import bisect_right
from collections.abc import Sequence
from itertools import accumulate
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .. import UserError
from .samples import (
    BROKEN_IMAGE,
    CAPTION_NAMES,
    EMPTY_CAPTION,
    IMAGE_ALONE,
    UNREADABLE,
    UnusableSample,
    drawn_caption,
    matching_files,
)
from .store import content_key

if TYPE_CHECKING:
    import pyarrow

_IMAGE_NAMES = ("image", "img", "picture", "photo", "jpg", "png", "webp")  # the likeliest first


class TableSamples:
    """Rows of the .parquet files of a path, folder or pattern, or of a folder that `datasets` wrote with save_to_disk."""

    def __init__(self, path: Path, image_column: str | None = None, caption_column: str | None = None) -> None:
        files = _files(path)
        tables = [_ParquetTable(file) if file.suffix == ".parquet" else _ArrowTable(file) for file in files]
        schema = tables[0].schema
        for file, table in zip(files, tables, strict=True):
            if set(table.schema.names) != set(schema.names):
                raise UserError(
                    f"{file} has columns {', '.join(table.schema.names)}; {files[0]}: {', '.join(schema.names)}."
                )
        self.image = _column(path, schema, "image", image_column, _IMAGE_NAMES)
        self.caption = _column(path, schema, "caption", caption_column, CAPTION_NAMES)
        self.expected = f"rows of {path} with an image in column {self.image} and words in column {self.caption}"
        self.left_out: dict[str, list[str]] = {}
        self._files, self._tables = files, tables
        self._ends = list(accumulate(table.rows for table in tables))
        seen = [(file.name, file.stat().st_size, file.stat().st_mtime_ns) for file in files]
        self.identity = content_key(self.image, self.caption, *seen)

    def __len__(self) -> int:
        return self._ends[-1]

    def name(self, place: int) -> str:
        file, row = self._place(place)
        return f"{self._files[file].name}#{row}"

    def read(self, place: int) -> tuple[bytes, str]:
        file, row = self._place(place)
        try:
            image, caption = self._tables[file].read(row, (self.image, self.caption))
        except UnicodeDecodeError:
            raise UnusableSample(UNREADABLE) from None
        if caption is None:
            raise UnusableSample(IMAGE_ALONE)
        caption = drawn_caption(caption, self.name(place))
        if not caption:
            raise UnusableSample(EMPTY_CAPTION)
        if isinstance(image, dict):  # the format of `datasets`
            path = image.get("path")
            image = image.get("bytes")
            if image is None and path:
                image = (self._files[file].parent / path).read_bytes()
        if not image:
            raise UnusableSample(BROKEN_IMAGE)
        return image, caption

    def _place(self, place: int) -> tuple[int, int]:
        file = bisect_right(self._ends, place)
        return file, place - (self._ends[file - 1] if file else 0)


class _ParquetTable:
    """A .parquet file. Keeps the latest row group, since samples are prepared in order."""

    def __init__(self, file: Path) -> None:
        import pyarrow.parquet

        try:
            self._file = pyarrow.parquet.ParquetFile(file, memory_map=True)
        except (pyarrow.ArrowException, OSError) as error:
            raise UserError(f"{file}: not a complete parquet file ({_first_line(error)}).") from None
        self.schema = self._file.schema_arrow
        about = self._file.metadata
        self.rows = about.num_rows
        self._ends = list(accumulate(about.row_group(group).num_rows for group in range(about.num_row_groups)))
        self._kept: tuple[int, Any] | None = None
        self._lock = threading.Lock()

    def read(self, row: int, columns: Sequence[str]) -> tuple[Any, ...]:
        group = bisect_right(self._ends, row)
        row -= self._ends[group - 1] if group else 0
        with self._lock:
            if self._kept is None or self._kept[0] != group:
                self._kept = (group, self._file.read_row_group(group, columns=list(columns)))
            table = self._kept[1]
        return tuple(table.column(name)[row].as_py() for name in columns)


class _ArrowTable:
    """A mapped .arrow file, in the streaming format of `datasets` or in the file format."""

    def __init__(self, file: Path) -> None:
        import pyarrow

        mapped = pyarrow.memory_map(str(file))
        try:
            try:
                self._table = pyarrow.ipc.open_stream(mapped).read_all()
            except pyarrow.ArrowInvalid:
                self._table = pyarrow.ipc.open_file(mapped).read_all()
        except (pyarrow.ArrowException, OSError) as error:
            raise UserError(f"{file}: not a complete Arrow file ({_first_line(error)}).") from None
        self.schema, self.rows = self._table.schema, self._table.num_rows

    def read(self, row: int, columns: Sequence[str]) -> tuple[Any, ...]:
        return tuple(self._table.column(name)[row].as_py() for name in columns)


def _files(path: Path) -> list[Path]:
    if path.is_dir():
        if (path / "dataset_dict.json").is_file():
            splits = sorted(part.name for part in path.iterdir() if part.is_dir())
            raise UserError(f"{path} holds the splits {', '.join(splits)}; set data.path to one: {path / splits[0]}.")
        files = sorted(path.rglob("*.parquet")) or sorted(
            file for file in path.rglob("*.arrow") if not file.name.startswith("cache-")
        )
    elif path.is_file():
        files = [path]
    elif glob.has_magic(str(path)):
        files = matching_files(path)
    else:
        raise UserError(f"{path}: there is no such file or folder.")
    if not files:
        raise UserError(f"{path}: no .parquet and no .arrow files there.")
    return files


def _column(path: Path, schema: pyarrow.Schema, what: str, named: str | None, usual: Sequence[str]) -> str:
    """Choose the column that is named, else one with a usual name, else the only one of a fitting type."""
    fits = _holds_images if what == "image" else _holds_text
    types = {field.name: str(field.type) for field in schema}
    columns = "Its columns are: " + ", ".join(f"{name} ({kind})" for name, kind in types.items()) + "."
    if named is not None:
        if named not in types or not fits(schema.field(named).type):
            problem = f"is {types[named]}" if named in types else "is not a column"
            raise UserError(f"{path}: data.{what}_column: {named} {problem}. {columns}")
        return named
    fitting = [name for name in types if fits(schema.field(name).type)]
    likely = [name for name in usual if name in fitting]
    if likely or len(fitting) == 1:
        return (likely or fitting)[0]
    holds = "image files (binary, or a struct of bytes and path)" if what == "image" else "captions (strings)"
    raise UserError(
        f"{path}: {'several columns' if fitting else 'no column'} could hold {holds}; "
        f"{f'set data.{what}_column. ' if fitting else ''}{columns}"
    )


def _holds_images(kind: pyarrow.DataType) -> bool:
    from pyarrow import types

    if types.is_struct(kind):
        return "bytes" in {kind.field(place).name for place in range(kind.num_fields)}
    return bool(types.is_binary(kind) or types.is_large_binary(kind) or types.is_binary_view(kind))


def _holds_text(kind: pyarrow.DataType) -> bool:
    from pyarrow import types

    if types.is_dictionary(kind) or types.is_list(kind) or types.is_large_list(kind):
        kind = kind.value_type  # of a list of captions, one is drawn
    return bool(types.is_string(kind) or types.is_large_string(kind) or types.is_string_view(kind))


def _first_line(error: Exception) -> str:
    return str(error).partition("\n")[0]
