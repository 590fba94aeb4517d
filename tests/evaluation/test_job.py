"""jobs.evaluate on a real pipeline directory of two quick sources."""

import json

import numpy as np
import pyarrow.parquet as pq
import pytest

from fusionrec.data.splits import Protocol, split
from fusionrec.errors import ConfigError
from fusionrec.evaluation.report import Report
from fusionrec.evaluation.systems import Kind
from fusionrec.language.reranker import RerankerConfig
from fusionrec.serving.pipeline import PipelineConfig
from fusionrec.sources.item_item import ItemItem, ItemItemConfig
from fusionrec.sources.popularity import Popularity, PopularityConfig
from fusionrec.sources.protocol import TrainingData
from fusionrec.sources.transitions import Transitions
from jobs import evaluate as job
from jobs.evaluate import EvaluateConfig, evaluate


@pytest.fixture
def pipeline(synthetic, tmp_path):
    directory = tmp_path / "pipeline"
    directory.mkdir()
    parts = split(synthetic, Protocol.LEAVE_ONE_OUT)
    data = TrainingData(synthetic.catalogue, parts.train)
    sources = [
        Popularity(PopularityConfig()).fit(data),
        ItemItem(ItemItemConfig(learner=Transitions())).fit(data),
    ]
    for source in sources:
        (directory / "sources" / source.name).mkdir(parents=True)
        source.save(directory / "sources" / source.name)
    synthetic.catalogue.save(directory / "catalogue.parquet")
    np.save(directory / "item_counts.npy", parts.item_counts)
    config = PipelineConfig(
        dataset=synthetic.info,
        protocol=Protocol.LEAVE_ONE_OUT,
        sources=tuple(source.name for source in sources),
    )
    (directory / "pipeline.json").write_text(config.model_dump_json())
    return directory


@pytest.fixture
def config(pipeline, synthetic, tmp_path):
    return EvaluateConfig(
        pipeline=pipeline,
        dataset=synthetic.directory,
        out=tmp_path / "report",
        export_run=tmp_path / "run.parquet",
        draws=200,
    )


def test_report_run_and_metrics(config, synthetic):
    report = evaluate(config)
    assert Report.load(config.out / "report.json") == report
    assert [system.kind for system in report.systems] == [Kind.SOURCE, Kind.SOURCE, Kind.FUSED]
    assert report.served.seen_items == 0
    assert report.weights["all"]["popularity"] == 1
    kept = json.loads((config.pipeline / "metrics.json").read_text())
    assert kept["test"]["ndcg@10"]["mean"] == report.served.metrics["ndcg"].mean
    assert not (config.pipeline / "validation.parquet").exists()

    exported = pq.read_table(config.export_run).to_pandas()
    assert exported.user_id.nunique() == report.num_cases
    parts = split(synthetic)
    target = {
        parts.user_ids[user]: synthetic.catalogue.item_ids[parts.test.targets.row(b)[0]]
        for b, user in enumerate(parts.test.users)
    }
    right = exported[exported.item_id == exported.user_id.map(target)]
    assert (right["rank"] <= 10).sum() / report.num_cases == pytest.approx(
        report.served.metrics["hr"].mean,
        abs=2 / report.num_cases,  # a tie at the tenth place
    )


def test_against_its_own_run_nothing_differs(config):
    evaluate(config)
    report = evaluate(config.model_copy(update={"against": config.export_run, "export_run": None}))
    other = report.systems[-1]
    assert other.kind is Kind.RUN
    found = report.comparison("fused", other.name)
    assert found.difference.mean == found.difference.high == 0


def test_validation_leaves_the_cases_of_the_gate(config):
    report = evaluate(config.model_copy(update={"part": "validation", "export_run": None}))
    cases = pq.read_table(config.pipeline / "validation.parquet").to_pydict()
    assert len(cases["user_id"]) == report.num_cases
    assert np.mean(cases["ndcg@10"]) == pytest.approx(report.served.metrics["ndcg"].mean)
    evaluate(config)
    assert json.loads((config.pipeline / "metrics.json").read_text()).keys() == {
        "test",
        "validation",
    }


def test_a_protocol_that_would_leak_is_refused(config):
    with pytest.raises(ConfigError, match=r"--protocol global-time .* fit it again"):
        evaluate(config.model_copy(update={"protocol": Protocol.GLOBAL_TIME}))


def test_another_data_set_is_refused(config):
    path = config.pipeline / "pipeline.json"
    values = json.loads(path.read_text())
    values["dataset"] |= {"fingerprint": "0" * 64, "name": "other"}
    path.write_text(json.dumps(values))
    with pytest.raises(ConfigError, match="was fitted on other"):
        evaluate(config)


class FirstPlace:
    """A reranker that reads lists and likes what it is shown first."""

    reads_lists = True
    config = RerankerConfig()

    def score(self, _history_texts, candidate_texts):
        return [-np.arange(len(texts), dtype=np.float32) for texts in candidate_texts]


def test_what_the_order_does_to_a_reranker_is_measured(config, monkeypatch):
    load = job.Pipeline.load

    def with_reranker(directory):
        pipeline = load(directory)
        pipeline.reranker = FirstPlace()
        return pipeline

    monkeypatch.setattr(job.Pipeline, "load", with_reranker)
    config = config.model_copy(update={"order_cases": 30})
    report = evaluate(config)
    assert report.orders.num_cases == 30
    assert report.orders.tau == pytest.approx(0, abs=0.1)
    assert "is the same in" in (config.out / "report.md").read_text()
    assert Report.load(config.out / "report.json").orders == report.orders
    assert evaluate(config.model_copy(update={"order_cases": 0})).orders is None
