"""Tables in files, local or s3://: whole ones as Parquet, and several in one file by number."""

from __future__ import annotations

import io
from collections.abc import Iterable, Sequence

import numpy as np
import pyarrow
import pyarrow.parquet

from ... import storage


def save(table: pyarrow.Table, path: str) -> None:
    """Write a table as Parquet, whole or not at all."""
    sink = io.BytesIO()
    pyarrow.parquet.write_table(table, sink)
    storage.put(sink.getvalue(), path)


def load(path: str, columns: Sequence[str] | None = None) -> pyarrow.Table:
    """A table of `save`; only the given columns are read from a local file."""
    source = io.BytesIO(storage.read(path)) if storage.is_remote(path) else path
    with pyarrow.parquet.ParquetFile(source) as file:
        return file.read(None if columns is None else list(columns))


def save_many(tables: Sequence[pyarrow.Table], path: str) -> None:
    """Write tables of the same schema to one file, in which each can be read separately.

    The file begins with the offsets of all tables, and of its end, as uint64.
    """
    parts = []
    for table in tables:
        sink = pyarrow.BufferOutputStream()
        with pyarrow.ipc.new_stream(sink, table.schema) as writer:
            writer.write_table(table)
        parts.append(sink.getvalue().to_pybytes())
    offsets = np.cumsum([8 * (len(parts) + 1), *map(len, parts)], dtype=np.uint64)
    storage.put(b"".join([offsets.tobytes(), *parts]), path)


def load_one(path: str, number: int) -> pyarrow.Table:
    """The table `number` of a file of `save_many`."""
    head = storage.read_range(path, 8 * number, 8 * (number + 2))
    start, stop = np.frombuffer(head, np.uint64).tolist()
    return pyarrow.ipc.open_stream(storage.read_range(path, start, stop)).read_all()


def load_each(paths: Iterable[str], number: int) -> pyarrow.Table:
    """The tables `number` of several files of `save_many`, one after another."""
    return pyarrow.concat_tables([load_one(path, number) for path in paths])


def split(table: pyarrow.Table, group: np.ndarray, groups: int) -> list[pyarrow.Table]:
    """The rows of a table by their `group` (N,) from 0 to `groups` - 1, in their order."""
    order = np.argsort(group, kind="stable")
    ends = np.searchsorted(group[order], np.arange(groups + 1))
    ordered = table.take(order)
    return [ordered.slice(a, b - a) for a, b in zip(ends[:-1], ends[1:], strict=True)]
