"""The whole path, small: every stage for real, up to an endpoint that answers."""

import json
import subprocess
import sys

import pyarrow.parquet as pq
import pytest

from benchmarks.harness.processes import free_port
from fusionrec.bundles.store import BundleStore
from jobs.quickstart import QuickstartConfig, walk


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_raw_data_to_an_answer(tiny_encoder, tmp_path):
    port = free_port()
    command = [sys.executable, "-m", "jobs.quickstart", "--once", "--artifacts", str(tmp_path)]
    command += ["--encoder", str(tiny_encoder), "--trials", "8", "--port", str(port)]
    command += ["--encoder-examples", "64", "--reranker-examples", "16"]
    command += ["--synthetic.num-users", "80", "--synthetic.num-items", "160"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=1100, check=False)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-8000:]
    said = done.stderr + done.stdout
    for expected in ("semantic", "fused", "95% interval", "the endpoint is up", "/v1/recommend"):
        assert expected in said

    root = tmp_path / "synthetic"
    report = json.loads((root / "report" / "report.json").read_text())
    names = {system["name"] for system in report["systems"]}
    assert {"popularity", "item-knn", "ease", "transitions", "bm25", "semantic", "fused"} <= names
    run = pq.read_table(root / "run.parquet")
    assert run.column_names == ["user_id", "item_id", "rank", "score"]
    store = BundleStore(root / "bundles")
    store.verify(store.current().name)
    assert (root / "campaign" / "trials.svg").is_file()


def test_a_folder_that_is_not_there(tmp_path, capfd):
    from fusionrec.errors import DataError

    config = QuickstartConfig(data=tmp_path / "none", artifacts=tmp_path / "artifacts")
    with pytest.raises(DataError, match=r"--data .*none is not a folder"):
        walk(config)


def test_a_failed_stage_ends_the_walk_with_its_sentence(tmp_path, capfd):
    raw = tmp_path / "raw"
    raw.mkdir()
    with pytest.raises(SystemExit) as ended:
        walk(QuickstartConfig(data=raw, artifacts=tmp_path / "artifacts"))
    assert ended.value.code == 2
    assert "error: " in capfd.readouterr().err
