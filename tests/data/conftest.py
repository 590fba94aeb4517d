from collections.abc import Callable
from pathlib import Path

import pytest

from fusionrec.data.dataset import Dataset
from fusionrec.data.ingest import IngestConfig, ingest


@pytest.fixture
def raw(tmp_path: Path) -> Callable[..., Path]:
    """Writes raw files: name → text or bytes."""

    def write(files: dict[str, str | bytes]) -> Path:
        folder = tmp_path / "raw"
        folder.mkdir(exist_ok=True)
        for name, content in files.items():
            data = content.encode() if isinstance(content, str) else content
            (folder / name).write_bytes(data)
        return folder

    return write


@pytest.fixture
def ingested(tmp_path: Path) -> Callable[..., Dataset]:
    """Ingests a raw folder with settings, all broken rows allowed."""

    def run(folder: Path, **settings: object) -> Dataset:
        values = {"max_bad_fraction": 1.0, "out": tmp_path / "out"} | settings
        config = IngestConfig.model_validate({"raw": folder} | values)
        ingest(config)
        return Dataset.open(config.out)

    return run
