"""Delimited text (CSV, TSV) in batches of rows, with the line that each row begins at."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import BinaryIO

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv as pa_csv

from fusionrec.data.histories import BoolArray, IntArray
from fusionrec.data.readers.protocol import BROKEN, NOT_UTF8, WRONG_FIELDS, Refused, Rows
from fusionrec.data.readers.text import TextStream
from fusionrec.errors import DataError


def header(path: Path, delimiter: str = ",", *, quoted: bool = True) -> list[str]:
    """The column names in the first line of ``path``.

    Raises:
        DataError: the file is empty or unreadable, or the header is not UTF-8 or names twice.
    """
    with io.BufferedReader(TextStream(path)) as buffered:
        return _header(path, buffered, delimiter, quoted=quoted)


def _header(path: Path, buffered: BinaryIO, delimiter: str, *, quoted: bool) -> list[str]:
    line = buffered.readline().decode().strip("\r\n")
    names = next(csv.reader([line], delimiter=delimiter), []) if quoted else line.split(delimiter)
    names = [name.strip() for name in names]
    if BROKEN in line:
        raise DataError(f"{path}: the header is not UTF-8: save the file as UTF-8")
    if not any(names):
        raise DataError(f"{path}: the first line, which names the columns, is blank")
    for name in names:
        if names.count(name) > 1:
            raise DataError(f"{path}: column {name!r} is twice in the header: rename one")
    return names


def read(
    path: Path,
    *,
    names: Sequence[str] | None = None,
    columns: Sequence[str] | None = None,
    delimiter: str = ",",
    quoted: bool = True,
    encoding: str = "utf-8",
    batch_bytes: int = 4 << 20,
) -> Iterator[Rows]:
    """Rows of ``path`` with all fields as strings; rows without any content are passed over.

    Args:
        path: the file, perhaps gzipped.
        names: the columns of a file without a header.
        columns: the columns to keep; default all.
        delimiter: one character.
        quoted: whether fields may be in double quotes, and so contain delimiters and line ends.
        encoding: what the file is encoded in.
        batch_bytes: bytes read at once.

    Raises:
        DataError: the file cannot be read, is empty, or has a quote that is never closed.
    """
    stream = TextStream(path, encoding)
    with io.BufferedReader(stream, batch_bytes) as buffered:
        fields = list(names) if names else _header(path, buffered, delimiter, quoted=quoted)
        numbering = _Numbering(header_lines=0 if names else 1)
        last = (0, "")
        try:
            reader = pa_csv.open_csv(
                buffered,
                # One thread: only then does Arrow number the rows that it refuses.
                read_options=pa_csv.ReadOptions(
                    use_threads=False, block_size=batch_bytes, column_names=fields
                ),
                parse_options=pa_csv.ParseOptions(
                    delimiter=delimiter,
                    quote_char='"' if quoted else False,
                    newlines_in_values=quoted,
                    ignore_empty_lines=False,
                    invalid_row_handler=numbering.refuse,
                ),
                convert_options=pa_csv.ConvertOptions(
                    column_types=dict.fromkeys(fields, pa.string()),
                    strings_can_be_null=False,
                    check_utf8=False,
                ),
            )
            for batch in reader:
                lines, blank = numbering.number(batch)
                table = pa.table(batch)
                if batch.num_rows:
                    last = (int(lines[-1]), batch.column(batch.num_columns - 1)[-1].as_py())
                if blank.any():
                    table, lines = table.filter(~blank), lines[~blank]
                kept = table.select(columns) if columns else table
                yield Rows(path.name, lines, kept, numbering.take(), stream.progress)
            empty = pa.table({name: pa.array([], pa.string()) for name in columns or fields})
            numbering.finish()
            # Arrow takes the end of the file for the end of a quote, were it opened lines before.
            if "\n" in last[1] and not stream.tail.rstrip().endswith(b'"'):
                raise DataError(
                    f"{path}: the double quote opened in line {last[0]} is never closed"
                )
            yield Rows(path.name, np.empty(0, np.int64), empty, numbering.take(), 1.0)
        except pa.ArrowInvalid as error:
            if "Empty CSV" in str(error):  # a header and nothing else
                return
            reason = str(error).splitlines()[0]
            if "straddling" in reason:
                reason = (
                    f"a row is longer than {batch_bytes:,} bytes, most often because a double "
                    "quote is never closed"
                )
            raise DataError(f"{path}: after line {numbering.line}: {reason}") from error


class _Numbering:
    """Keeps lines and rows together: Arrow numbers rows, and a quoted field may hold line ends."""

    def __init__(self, header_lines: int) -> None:
        self.line = header_lines
        """The last line of the rows numbered so far."""
        self._row = 0
        """The last row numbered so far."""
        self._waiting: list[tuple[int, str]] = []
        """Rows refused that lie behind the rows numbered so far."""
        self._refused: list[Refused] = []

    def refuse(self, row: pa_csv.InvalidRow) -> str:
        """Arrow's handler of rows with too few or too many fields; may run ahead of the batches."""
        self._waiting.append((row.number, row.text))
        return "skip"

    def number(self, batch: pa.RecordBatch) -> tuple[IntArray, BoolArray]:
        """[N] lines of the rows of ``batch``, and [N] whether the row is a blank line."""
        rank = np.arange(1, batch.num_rows + 1)
        bad = np.array([number for number, _ in self._waiting], dtype=np.int64)
        # A row's number is its rank among the good ones and the bad ones before it.
        rows = rank + np.searchsorted(bad - self._row - np.arange(len(bad)), rank, side="right")
        rows += self._row
        if not len(rows):
            return rows, np.empty(0, np.bool_)
        before = int(np.searchsorted(bad, rows[-1]))
        line_ends = np.zeros(len(rows), dtype=np.int64)
        blank = np.ones(len(rows), dtype=np.bool_)
        for column in batch.columns:
            line_ends += pc.count_substring(column, "\n").to_numpy(zero_copy_only=False)
            blank &= pc.equal(pc.fill_null(column, ""), "").to_numpy(zero_copy_only=False)
        bad_ends = np.array([text.count("\n") for _, text in self._waiting[:before]], np.int64)
        order = np.argsort(np.concatenate([bad[:before], rows]))
        heights = (1 + np.concatenate([bad_ends, line_ends]))[order]
        lines = np.empty(len(order), dtype=np.int64)
        lines[order] = self.line + 1 + np.cumsum(heights) - heights
        self._note(lines[:before].tolist())
        self._row = int(rows[-1])
        self.line += int(heights.sum())
        return lines[before:], blank

    def finish(self) -> None:
        """Number the refused rows behind the last good one."""
        for _, text in list(self._waiting):
            self._note([self.line + 1])
            self.line += 1 + text.count("\n")

    def take(self) -> list[Refused]:
        """The refused rows numbered since the last call."""
        taken, self._refused = self._refused, []
        return taken

    def _note(self, lines: list[int]) -> None:
        """Move the first waiting rows to the refused: one for each line that they swallowed."""
        for line, (_, text) in zip(lines, self._waiting, strict=False):
            for offset, part in enumerate(text.splitlines()):
                reason = NOT_UTF8 if BROKEN in part else WRONG_FIELDS
                self._refused.append(Refused(line + offset, reason, part))
        del self._waiting[: len(lines)]
