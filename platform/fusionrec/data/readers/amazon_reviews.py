"""Amazon Reviews 2023: ``<Domain>.jsonl[.gz]`` and ``meta_<Domain>.jsonl[.gz]``, one pair a domain.

An item is a ``parent_asin``; times come in milliseconds; a review's title and text are kept. A
folder may hold several domains, each with its metadata or all without.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Self

import pyarrow as pa

from fusionrec.data.readers import records
from fusionrec.data.readers.mapping import require
from fusionrec.data.readers.protocol import Options, Rows
from fusionrec.errors import DataError

_SUFFIXES = (".jsonl", ".jsonl.gz")
_NEEDED = ("user_id", "parent_asin", "timestamp", "rating")


@dataclass(frozen=True)
class AmazonReviewsReader:
    """Files of reviews, and of metadata, by domain in alphabetical order."""

    format: ClassVar[str] = "amazon-reviews"
    reviews: dict[str, Path]
    metadata: dict[str, Path]
    batch_bytes: int
    has_timestamps: bool = True
    timestamp_unit: str = "ms"
    values_may_miss: bool = False

    @classmethod
    def recognises(cls, folder: Path) -> bool:
        """Whether reviews lie beside metadata, or their first record has the right keys."""
        reviews, metadata = _files(folder)
        if set(reviews) & set(metadata):
            return True
        return any(set(_NEEDED) <= set(_keys(path)) for path in reviews.values())

    @classmethod
    def open(cls, folder: Path, options: Options) -> Self:
        """Find the files of each domain."""
        reviews, metadata = _files(folder)
        if not reviews:
            raise DataError(
                f"{folder} is not Amazon Reviews 2023: it has no reviews DOMAIN.jsonl or "
                "DOMAIN.jsonl.gz; give the folder that holds them"
            )
        for domain, path in reviews.items():
            if metadata and domain not in metadata:
                raise DataError(
                    f"{path} has no metadata meta_{domain}.jsonl beside it while other domains "
                    "have: add it, or ingest the domain by itself"
                )
            require(path, _keys(path), _NEEDED)
        metadata = {domain: metadata[domain] for domain in reviews if domain in metadata}
        return cls(reviews, metadata, options.batch_bytes)

    def interactions(self) -> Iterator[Rows]:
        """The reviews of one domain after the other."""
        for number, (domain, path) in enumerate(self.reviews.items()):
            for batch in records.read(path, self.batch_bytes):
                objects = batch.objects
                columns = {
                    "user_id": records.text_column(objects, "user_id"),
                    "item_id": records.text_column(objects, "parent_asin"),
                    "timestamp": records.text_column(objects, "timestamp"),
                    "event": pa.repeat(pa.scalar("review"), len(objects)),
                    "value": records.text_column(objects, "rating"),
                    "text": pa.array([_review(record) for record in objects], pa.string()),
                    "domain": pa.repeat(pa.scalar(domain), len(objects)),
                }
                batch.progress = (number + batch.progress) / len(self.reviews)
                yield batch.rows(path.name, pa.table(columns))

    def items(self) -> Iterator[Rows] | None:
        """The metadata of one domain after the other."""
        return self._items() if self.metadata else None

    def _items(self) -> Iterator[Rows]:
        for number, (domain, path) in enumerate(self.metadata.items()):
            for batch in records.read(path, self.batch_bytes):
                objects = batch.objects
                texts = {name: records.text_column(objects, name) for name in ("price", "details")}
                columns = {
                    "item_id": records.text_column(objects, "parent_asin"),
                    "title": records.text_column(objects, "title"),
                    "text": pa.array([_description(record) for record in objects], pa.string()),
                    "categories": pa.array(
                        [_texts(record.get("categories")) for record in objects],
                        pa.list_(pa.string()),
                    ),
                    "domain": pa.repeat(pa.scalar(domain), len(objects)),
                    "main_category": records.text_column(objects, "main_category"),
                    "store": records.text_column(objects, "store"),
                    "average_rating": _numbers(objects, "average_rating"),
                    "rating_number": _numbers(objects, "rating_number"),
                    **texts,
                }
                batch.progress = (number + batch.progress) / len(self.metadata)
                yield batch.rows(path.name, pa.table(columns))


def _files(folder: Path) -> tuple[dict[str, Path], dict[str, Path]]:
    """Domain → reviews, domain → metadata; the unpacked one where a file is there twice."""
    reviews: dict[str, Path] = {}
    metadata: dict[str, Path] = {}
    for suffix in _SUFFIXES:
        for path in sorted(folder.glob(f"*{suffix}")):
            name = path.name.removesuffix(suffix)
            files = metadata if name.startswith("meta_") else reviews
            files.setdefault(name.removeprefix("meta_"), path)
    return dict(sorted(reviews.items())), metadata


def _keys(path: Path) -> list[str]:
    first = next((b.objects[0] for b in records.read(path, 1 << 12) if b.objects), {})
    return list(first)


def _texts(value: Any) -> list[str]:
    """The non-empty texts of a value that should be a list of them."""
    values = value if isinstance(value, list) else [value]
    return [v.strip() for v in values if isinstance(v, str) and v.strip()]


def _review(record: records.Record) -> str:
    return "\n".join(_texts([record.get("title"), record.get("text")]))


def _description(record: records.Record) -> str:
    return "\n".join(_texts(record.get("description")) + _texts(record.get("features")))


def _numbers(objects: list[records.Record], key: str) -> pa.Array:
    values = [record.get(key) for record in objects]
    return pa.array(
        [float(v) if isinstance(v, int | float) else None for v in values], pa.float64()
    )
