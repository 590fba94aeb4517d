import json
from pathlib import Path

import pytest


def build_pipeline(directory: Path, salt: str = "") -> Path:
    """Enough of a pipeline directory for the store, which looks into nothing but the JSON."""
    (directory / "sources" / "ease").mkdir(parents=True)
    document = {"dataset": {"name": "toy", "fingerprint": "ab" * 32}, "sources": ["ease"]}
    (directory / "pipeline.json").write_text(json.dumps(document))
    (directory / "metrics.json").write_text(json.dumps({"test": {"ndcg@10": 0.25}}))
    (directory / "catalogue.parquet").write_bytes(b"catalogue" * 1000)
    (directory / "users.parquet").write_bytes(b"users")
    (directory / "item_counts.npy").write_bytes(b"counts")
    (directory / "sources" / "ease" / "neighbours.npz").write_bytes(b"n" * 50_000)
    (directory / "fusion.json").write_text(json.dumps({"salt": salt}))
    return directory


@pytest.fixture
def pipeline(tmp_path: Path) -> Path:
    return build_pipeline(tmp_path / "pipeline")


@pytest.fixture
def other_pipeline(tmp_path: Path) -> Path:
    return build_pipeline(tmp_path / "other", salt="other")
