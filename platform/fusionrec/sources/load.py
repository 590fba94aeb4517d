"""Loading a saved source without knowing which it is: its directory's name says it."""

from __future__ import annotations

from pathlib import Path

from fusionrec.sources.bm25 import BM25
from fusionrec.sources.content import Content
from fusionrec.sources.ials import IALS
from fusionrec.sources.item_item import ItemItem
from fusionrec.sources.popularity import Popularity
from fusionrec.sources.protocol import Source
from fusionrec.sources.recvae import RecVAE
from fusionrec.sources.sasrec import SASRec
from fusionrec.sources.semantic import Semantic

SOURCES: dict[str, type[Source]] = {
    "popularity": Popularity,
    "item-knn": ItemItem,
    "ease": ItemItem,
    "transitions": ItemItem,
    "ials": IALS,
    "sasrec": SASRec,
    "bm25": BM25,
    "semantic": Semantic,
    "content": Content,
    "recvae": RecVAE,
}
"""Name → class, of every source there is."""


def load_source(directory: Path) -> Source:
    """The source saved in ``directory``."""
    return SOURCES[directory.name].load(directory)
