import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fusionrec.bundles.gate import CASES, forget_measurements, judge, write_cases
from fusionrec.bundles.store import BundleStore
from fusionrec.errors import BundleError
from fusionrec.language.precision import INFERENCE
from jobs.publish import PublishConfig, publish

ROOT = Path(__file__).resolve().parents[2]
USERS = [f"u{i}" for i in range(400)]
BASE = np.random.default_rng(5).random(400)


@pytest.fixture
def store(tmp_path: Path, pipeline: Path) -> BundleStore:
    write_cases(pipeline, USERS, BASE)
    store = BundleStore(tmp_path / "bundles")
    store.promote(store.add(pipeline).id, "test")
    return store


def candidate(store: BundleStore, pipeline: Path, values, users=USERS):
    write_cases(pipeline, users, values)
    return judge(store, store.add(pipeline))


def test_the_first_bundle_passes(tmp_path: Path, pipeline: Path):
    store = BundleStore(tmp_path / "empty")
    assert judge(store, store.add(pipeline)).passed


def test_the_same_bundle_passes(store: BundleStore, pipeline: Path):
    assert judge(store, store.add(pipeline)).passed


def test_a_better_or_equal_one_passes(store: BundleStore, other_pipeline: Path):
    better = candidate(store, other_pipeline, BASE + 0.05)
    assert better.passed
    assert better.comparison is not None
    assert better.comparison.significant
    assert candidate(store, other_pipeline, BASE).passed


def test_an_insignificantly_worse_one_passes(store: BundleStore, other_pipeline: Path):
    noise = np.random.default_rng(6).normal(-0.005, 0.3, 400)
    verdict = candidate(store, other_pipeline, BASE + noise)
    assert verdict.passed
    assert "not significantly worse" in verdict.reason


def test_a_significantly_worse_one_does_not(store: BundleStore, other_pipeline: Path):
    verdict = candidate(store, other_pipeline, BASE - 0.05)
    assert not verdict.passed
    assert "-0.0500" in verdict.reason


def test_only_common_users_count(store: BundleStore, other_pipeline: Path):
    """New users are worse, in another order; the users that both know are better."""
    users = [*reversed(USERS[:200]), *(f"new{i}" for i in range(300))]
    verdict = candidate(store, other_pipeline, [*(BASE[:200][::-1] + 0.1), *[0.0] * 300], users)
    assert verdict.passed
    assert verdict.comparison is not None
    assert verdict.comparison.num_cases == 200
    assert verdict.comparison.difference.mean == pytest.approx(0.1)


def test_what_cannot_be_compared_does_not_pass(store: BundleStore, other_pipeline: Path):
    assert "no validation.parquet" in judge(store, store.add(other_pipeline)).reason
    assert "no validation user" in candidate(store, other_pipeline, [0.5], ["x"]).reason
    document = json.loads((other_pipeline / "pipeline.json").read_text())
    document["dataset"]["name"] = "another"
    (other_pipeline / "pipeline.json").write_text(json.dumps(document))
    verdict = candidate(store, other_pipeline, BASE)
    assert not verdict.passed
    assert "data set another" in verdict.reason


def test_unreadable_cases(store: BundleStore, other_pipeline: Path):
    (other_pipeline / CASES).write_bytes(b"PAR1")
    with pytest.raises(BundleError, match=r"validation.parquet cannot be read"):
        judge(store, store.add(other_pipeline))


def test_publish_asks_the_gate_and_force_overrides_it(
    store: BundleStore, other_pipeline: Path, capsys: pytest.CaptureFixture[str]
):
    before = store.current_id()
    write_cases(other_pipeline, USERS, BASE - 0.05)
    settings = PublishConfig(pipeline=other_pipeline, bundles=store.directory)
    with pytest.raises(BundleError, match=r"significantly worse; publish with --force"):
        publish(settings)
    assert store.current_id() == before
    forced = publish(settings.model_copy(update={"force": True}))
    assert store.current_id() == forced
    assert store.history()[-1].reason.startswith("forced although")
    assert f"bundle {forced} is in service" in capsys.readouterr().out


def claim(pipeline: Path, measured: dict[str, Any] | None) -> None:
    (pipeline / INFERENCE).write_text('{"encoder": "fp32", "reranker": "bf16"}')
    metrics = {} if measured is None else {"inference": {"reranker": measured}}
    (pipeline / "metrics.json").write_text(json.dumps(metrics))


@pytest.mark.parametrize(
    ("bf16", "passed"), [(0.42, True), (0.4, True), (0.39801, True), (0.397, False)]
)
def test_a_precision_must_keep_the_quality_of_float32(
    tmp_path: Path, pipeline: Path, bf16: float, passed: bool
):
    store = BundleStore(tmp_path / "empty")  # also the first bundle is looked at
    claim(pipeline, {"num_cases": 300, "precision": "bf16", "fp32": 0.4, "faster": bf16})
    verdict = judge(store, store.add(pipeline))
    assert verdict.passed is passed
    if not passed:
        assert "bf16 for the reranker, with which ndcg@10 is 0.3970" in verdict.reason
        assert "99.5% of the 0.4000 of fp32" in verdict.reason


def test_a_precision_that_was_not_measured_is_refused(tmp_path: Path, pipeline: Path):
    settings = PublishConfig(pipeline=pipeline, bundles=tmp_path / "empty")
    claim(pipeline, None)
    with pytest.raises(BundleError, match=r"was not measured: run `python -m jobs.optimise`"):
        publish(settings)
    claim(pipeline, {"num_cases": 300, "precision": "int8", "fp32": 0.4, "faster": 0.4})
    with pytest.raises(BundleError, match=r"bf16 for the reranker, which was not measured"):
        publish(settings)
    claim(pipeline, {"num_cases": 300, "fp32": "?"})
    with pytest.raises(BundleError, match=r"under inference\); measure it again"):
        publish(settings)
    (pipeline / INFERENCE).write_text('{"encoder": "int4"}')
    with pytest.raises(BundleError, match=r"inference.json is wrong: encoder: .*remove it"):
        publish(settings)
    forget_measurements(pipeline)
    assert not (pipeline / INFERENCE).exists()
    publish(settings)


def test_the_jobs(store: BundleStore, other_pipeline: Path):
    def job(name: str, *flags: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", f"jobs.{name}", "--bundles", str(store.directory), *flags]
        return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)

    first = store.current_id()
    refused = job("publish", "--pipeline", str(other_pipeline))
    assert refused.returncode == 2
    assert refused.stderr.count("\n") == 1
    assert "cannot be compared" in refused.stderr
    assert job("publish", "--pipeline", str(other_pipeline), "--force").returncode == 0
    assert store.current_id() != first
    rolled_back = job("rollback")
    assert rolled_back.returncode == 0
    assert f"bundle {first} is in service again" in rolled_back.stdout
    assert store.current_id() == first


@pytest.mark.parametrize(
    ("part", "job"),
    [
        ("users.parquet", "jobs.fit"),
        ("sources/ease", "jobs.fit"),
        ("fusion.json", "tuning.fusion"),
    ],
)
def test_publish_refuses_an_incomplete_pipeline(tmp_path: Path, pipeline: Path, part: str, job):
    (pipeline / part).rename(tmp_path / "elsewhere")
    settings = PublishConfig(pipeline=pipeline, bundles=tmp_path / "bundles")
    with pytest.raises(BundleError, match=f"has no {part}: run `python -m {job}`"):
        publish(settings)
    assert not (tmp_path / "bundles").exists()
