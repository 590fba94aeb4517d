"""Readers of raw data, one file a format, and the choice between them."""

from __future__ import annotations

from pathlib import Path

from fusionrec.data.readers.amazon_reviews import AmazonReviewsReader
from fusionrec.data.readers.movielens import MovieLensReader
from fusionrec.data.readers.protocol import Options, Reader
from fusionrec.data.readers.recbole import RecBoleReader
from fusionrec.data.readers.s3rec import S3RecReader
from fusionrec.data.readers.table import SUFFIXES, TableReader
from fusionrec.errors import DataError

READERS: tuple[type[Reader], ...] = (
    MovieLensReader,
    S3RecReader,
    RecBoleReader,
    AmazonReviewsReader,
    TableReader,
)
"""In the order in which they are asked; the generic one, which takes any table, comes last."""


def open_reader(folder: Path, format: str | None, options: Options) -> Reader:  # noqa: A002
    """The reader of ``folder``: the first that recognises it, or the one that ``format`` names.

    Raises:
        DataError: the folder is not there, holds no known format, or lacks a file or a column.
    """
    if not folder.is_dir():
        what = "is a file: give the folder that it lies in" if folder.exists() else "does not exist"
        raise DataError(f"raw data {folder} {what}")
    named = [reader for reader in READERS if reader.format == format]
    for reader in named or READERS:
        if named or reader.recognises(folder):
            return reader.open(folder, options)
    there = ", ".join(sorted(path.name for path in folder.iterdir())[:8]) or "nothing"
    raise DataError(
        f"{folder} holds no known format (there: {there}): give a folder of "
        f"{', '.join(reader.format for reader in READERS)} files ({', '.join(SUFFIXES)} for table)"
    )
