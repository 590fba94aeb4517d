"""A data set small enough to fine-tune on in a test."""

from pathlib import Path

import numpy as np
import pyarrow as pa

from fusionrec.data.catalogue import Catalogue
from fusionrec.data.ingest import DatasetWriter

NUM_USERS, NUM_ITEMS = 12, 20


def write_dataset(folder: Path, values: np.ndarray | None, texts: list[str] | None = None) -> Path:
    generator = np.random.default_rng(0)
    words = ["love", "war", "space", "night", "book", "music"]
    catalogue = Catalogue(
        item_ids=tuple(f"i{n}" for n in range(NUM_ITEMS)),
        titles=tuple(" ".join(generator.choice(words, 3)) for _ in range(NUM_ITEMS)),
        texts=("",) * NUM_ITEMS,
        categories=(("film",),) * NUM_ITEMS,
        domains=("film",) * NUM_ITEMS,
    )
    events = [(f"u{u}", f"i{i}") for u in range(NUM_USERS) for i in generator.permutation(20)[:8]]
    with DatasetWriter(folder, name="tiny", format="synthetic") as writer:
        writer.write_items(catalogue.to_table())
        writer.write_interactions(
            pa.table(
                {
                    "user_id": [user for user, _ in events],
                    "item_id": [item for _, item in events],
                    "timestamp": pa.array(range(len(events)), pa.int64()),
                    "event": ["view"] * len(events),
                    "value": pa.array(values, pa.float32())
                    if values is not None
                    else pa.nulls(len(events), pa.float32()),
                    "text": pa.array(texts or [None] * len(events), pa.string()),
                    "domain": ["film"] * len(events),
                }
            )
        )
        writer.finish()
    return folder
