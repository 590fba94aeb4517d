"""The catalogue: what can be recommended, and the only place where an item id meets its code.

Everything behind the catalogue works on codes (positions in it); ids exist at the edges alone.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Self

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from fusionrec.data.histories import CodeArray

ITEM_SCHEMA = pa.schema(
    [
        pa.field("item_id", pa.string(), nullable=False),
        pa.field("title", pa.string()),
        pa.field("text", pa.string()),
        pa.field("categories", pa.list_(pa.string())),
        pa.field("domain", pa.string()),
    ]
)
"""The columns that every item table has; a data set may carry more, kept as they came."""


@dataclass(frozen=True)
class Catalogue:
    """I items with what is known of each."""

    item_ids: tuple[str, ...]
    titles: tuple[str, ...]
    """An item without a title has an empty one."""
    texts: tuple[str, ...]
    """Description of each item; empty where there is none."""
    categories: tuple[tuple[str, ...], ...]
    domains: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.item_ids)

    @cached_property
    def code_of(self) -> dict[str, int]:
        """Item id → code."""
        return {item_id: code for code, item_id in enumerate(self.item_ids)}

    @property
    def has_text(self) -> bool:
        """Whether any item has a title or a description for a language model to read."""
        return any(self.titles) or any(self.texts)

    def encode(self, item_ids: Iterable[str]) -> CodeArray:
        """Codes of ``item_ids``; −1 for an unknown id."""
        code_of = self.code_of
        return np.fromiter((code_of.get(i, -1) for i in item_ids), dtype=np.int32)

    def decode(self, codes: Sequence[int] | CodeArray) -> list[str]:
        """Ids of ``codes``."""
        return [self.item_ids[code] for code in codes]

    @classmethod
    def from_table(cls, table: pa.Table) -> Self:
        """From a table with at least the columns of ``ITEM_SCHEMA``."""
        columns = {name: table.column(name).to_pylist() for name in ITEM_SCHEMA.names}
        return cls(
            item_ids=tuple(columns["item_id"]),
            titles=tuple(title or "" for title in columns["title"]),
            texts=tuple(text or "" for text in columns["text"]),
            categories=tuple(tuple(c or ()) for c in columns["categories"]),
            domains=tuple(domain or "" for domain in columns["domain"]),
        )

    def to_table(self) -> pa.Table:
        """The inverse of :meth:`from_table`."""
        return pa.table(
            {
                "item_id": list(self.item_ids),
                "title": list(self.titles),
                "text": list(self.texts),
                "categories": [list(c) for c in self.categories],
                "domain": list(self.domains),
            },
            schema=ITEM_SCHEMA,
        )

    @classmethod
    def load(cls, path: Path) -> Self:
        """Read ``path``, a Parquet file."""
        return cls.from_table(pq.read_table(path))

    def save(self, path: Path) -> None:
        """Write ``path``, a Parquet file."""
        pq.write_table(self.to_table(), path)
