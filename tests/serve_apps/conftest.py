import json
import warnings
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from fusionrec.bundles.store import BundleStore
from fusionrec.data.catalogue import Catalogue

with warnings.catch_warnings():  # its schemas use a deprecated form of pydantic's Field
    warnings.simplefilter("ignore", DeprecationWarning)
    import ray.serve  # noqa: F401


@pytest.fixture(scope="session")
def paper_bundles(tmp_path_factory: pytest.TempPathFactory) -> BundleStore:
    """A current bundle with all that the gateway reads, and stages that exist on paper only."""
    directory = tmp_path_factory.mktemp("paper")
    numbers = range(20)
    Catalogue(
        item_ids=tuple(f"i{n}" for n in numbers),
        titles=tuple(f"Title {n}" for n in numbers),
        texts=("",) * 20,
        categories=((),) * 20,
        domains=("films",) * 20,
    ).save(directory / "catalogue.parquet")
    users = {
        "user_id": ["ann"],
        "item_codes": pa.array([[3, 1]], pa.list_(pa.int32())),
        "timestamps": pa.array([[10, 20]], pa.list_(pa.int64())),
    }
    pq.write_table(pa.table(users), directory / "users.parquet")
    np.save(directory / "item_counts.npy", np.arange(20))
    (directory / "pipeline.json").write_text(json.dumps({"dataset": {"name": "paper"}}))
    for stage in ("encoder", "reranker"):
        (directory / stage).mkdir()
        (directory / stage / "weights").write_bytes(b"none")
    store = BundleStore(tmp_path_factory.mktemp("bundles"))
    store.promote(store.add(directory).id, "test")
    return store
