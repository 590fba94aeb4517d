import numpy as np
import pytest

from fusionrec.data.splits import Protocol
from fusionrec.errors import DataError
from fusionrec.evaluation.evaluate import measure, measure_run
from fusionrec.evaluation.metrics import METRICS
from fusionrec.evaluation.render import html, markdown, off_sentence, write
from fusionrec.evaluation.report import CURVE_AT, EvaluationConfig, Report, build
from fusionrec.evaluation.significance import BootstrapConfig
from fusionrec.evaluation.systems import Kind
from fusionrec.sources.protocol import Ranked
from tests.pages.reading import check

CONFIG = EvaluationConfig(k=5, bootstrap=BootstrapConfig(draws=200, seed=1))


@pytest.fixture
def measured(pipeline, cases, item_counts):
    return measure(pipeline, cases, item_counts, 5)


@pytest.fixture
def report(measured, cases, item_counts, catalogue, dataset_info):
    return make(measured, cases, item_counts, catalogue, dataset_info)


def make(measured, cases, item_counts, catalogue, dataset_info, **more):
    return build(
        measured,
        cases,
        dataset=dataset_info,
        protocol=Protocol.GLOBAL_TIME,
        part="test",
        catalogue=catalogue,
        item_counts=item_counts,
        weights={"short & new": {"popular": 1.0, "chance": 0.1}},
        config=CONFIG,
        **more,
    )


def test_every_system_is_measured(measured, pipeline, cases):
    assert [system.name for system in measured] == [
        "popular",
        "chance",
        "fused",
        "fused + reranker",
    ]
    assert [system.kind for system in measured] == [
        Kind.SOURCE,
        Kind.SOURCE,
        Kind.FUSED,
        Kind.RERANKED,
    ]
    assert pipeline.asked == [256, 44]  # blocks, and every list made once
    for system in measured:
        assert len(system.ranks) == len(cases)
        assert system.seen_items == 0


def test_a_source_is_ranked_over_everything_and_a_list_over_itself(measured):
    source, fused = measured[0], measured[2]
    assert np.isfinite(source.ranks.ranks).all()
    assert not np.isfinite(fused.ranks.ranks).all()
    # Five items without events tie behind all others, histories of varying length before them.
    assert ((source.ranks.ranks * 2) % 1 == 0).all()


def test_histories_are_embedded_once_for_all(pipeline, cases, item_counts):
    asked = []

    def embed(histories):
        asked.append(len(histories))
        return histories.with_vectors(np.ones((len(histories), 2), np.float32))

    pipeline.embed = embed
    pipeline.retrieve = lambda histories, retrieve=pipeline.retrieve: (
        asked.append(histories.vectors.shape) or retrieve(histories)
    )
    measure(pipeline, cases, item_counts, 5)
    assert asked == [300, (256, 2), (44, 2)]


def test_without_a_reranker_the_fused_list_is_the_served_one(
    pipeline, cases, item_counts, catalogue, dataset_info
):
    pipeline.reranker = None
    report = make(
        measure(pipeline, cases, item_counts, 5), cases, item_counts, catalogue, dataset_info
    )
    assert [system.name for system in report.systems] == ["popular", "chance", "fused"]
    assert report.served.name == "fused"


def test_the_numbers_of_the_report(report, measured):
    for system, found in zip(measured, report.systems, strict=True):
        for name, metric in METRICS.items():
            estimate = found.metrics[name]
            assert estimate.mean == pytest.approx(metric(system.ranks, 5).mean())
            assert estimate.low <= estimate.mean <= estimate.high
        assert len(found.curve) == len(CURVE_AT)
        assert list(found.curve) == sorted(found.curve)
        assert len(found.slices) == len(report.slices)
    assert report.num_cases == 300
    assert report.num_targets == 600
    assert report.served.kind is Kind.RERANKED
    assert report.best_source.name == "popular"
    shares = [system.share for system in report.systems]
    assert shares[2:] == [None, None]
    assert 0 < shares[1] < shares[0] < 1


def test_what_is_compared(report):
    pairs = list(dict.fromkeys((found.a, found.b) for found in report.comparisons))
    assert pairs == [
        ("fused + reranker", "popular"),
        ("fused", "popular"),
        ("fused + reranker", "fused"),
    ]
    assert {found.metric for found in report.comparisons} == set(METRICS)
    headline = report.comparison("fused + reranker", "popular")
    assert headline.metric == "ndcg"
    assert headline.difference.mean == pytest.approx(headline.mean_a - headline.mean_b)
    assert report.comparison("popular", "fused") is None


def test_the_slices_of_one_group_add_up(report, measured):
    # With weights by cases, over a group in which each case is in one slice.
    parts = [i for i, part in enumerate(report.slices) if part.group == "history length"]
    cases = np.array([report.slices[i].num_cases for i in parts])
    means = np.array([report.systems[0].slices[i].mean for i in parts])
    assert cases.sum() == 300
    assert (cases * means).sum() / 300 == pytest.approx(report.systems[0].metrics["ndcg"].mean)


def test_another_run_is_compared_with_the_served_list(
    measured, cases, item_counts, catalogue, dataset_info
):
    served = measured[-1]
    other = measure_run("old", Ranked(served.items, served.scores), cases, 5)
    report = make([*measured, other], cases, item_counts, catalogue, dataset_info)
    found = report.comparison("fused + reranker", "old")
    assert found.difference.mean == found.difference.high == 0
    assert found.p_value == 1
    assert report.served.name == "fused + reranker"


def test_equal_input_gives_an_equal_report(
    report, pipeline, cases, item_counts, catalogue, dataset_info
):
    again = make(
        measure(pipeline, cases, item_counts, 5), cases, item_counts, catalogue, dataset_info
    )

    def timeless(found):
        return [system.model_copy(update={"seconds": 0}) for system in found.systems]

    assert timeless(again) == timeless(report)
    assert again.comparisons == report.comparisons


def test_round_trip(report, tmp_path):
    write(report, tmp_path / "out")
    assert Report.load(tmp_path / "out" / "report.json") == report
    assert {path.name for path in (tmp_path / "out").iterdir()} == {
        "report.json",
        "report.md",
        "report.html",
    }


def test_a_report_that_is_none(tmp_path):
    path = tmp_path / "report.json"
    with pytest.raises(DataError, match="cannot be read"):
        Report.load(path)
    path.write_text('{"dataset": 3}')
    with pytest.raises(DataError, match="dataset is wrong"):
        Report.load(path)


def test_the_page_is_whole_and_needs_no_other_host(report):
    text = html(report)
    page = check(text)
    assert page.tags.count("svg") == 3
    assert "NaN" not in text
    assert "shop &lt;&amp;&gt; co" in text
    assert "shop <&> co" not in text


@pytest.mark.parametrize("page", [html, markdown])
def test_pages_say_what_a_reader_looks_for(report, page):
    text = page(report)
    for system in report.systems:
        assert system.name in text
        assert f"{system.metrics['ndcg'].mean:.4f}" in text
    for part in report.slices:
        assert part.name in text
    assert report.dataset.fingerprint in text
    assert "NDCG@5" in text
    assert "global-time" in text


def test_tables_of_markdown_are_rectangular(report):
    width = None
    for line in markdown(report).splitlines():
        if line.startswith("|"):
            assert width in (None, line.count("|"))
            width = line.count("|")
        else:
            width = None


def test_a_pipeline_that_finds_nothing_still_makes_a_report(
    pipeline, cases, item_counts, catalogue, dataset_info
):
    for source in pipeline.sources:
        source.by_item = np.zeros(60)
    report = make(
        measure(pipeline, cases, item_counts, 5), cases, item_counts, catalogue, dataset_info
    )
    assert report.served.metrics["ndcg"].mean == 0
    assert report.served.beyond == {"coverage": 0, "diversity": None, "novelty": None, "gini": None}
    check(html(report))
    assert markdown(report)
    assert Report.model_validate_json(report.model_dump_json()) == report


def test_what_is_off_is_said_and_why(measured, cases, item_counts, catalogue, dataset_info):
    off = {"chance": 0.75, "old": None, "popular": 1.0}
    found = make(measured, cases, item_counts, catalogue, dataset_info, off=off, fallback="popular")
    assert Report.model_validate_json(found.model_dump_json()) == found
    said = (
        "chance (75%), old are off and not asked. popular (100%) is asked only where the others "
        "propose too few. In brackets: the share of the samples of the validation cases on which "
        "the best weight was 0."
    )
    assert off_sentence(off, "popular") == said
    assert said in markdown(found)
    assert said in html(found)
    plain = make(measured, cases, item_counts, catalogue, dataset_info)
    assert "asked" not in markdown(plain)
    assert off_sentence({}, None) == ""
    assert off_sentence({"a": None}, None) == "a is off and not asked."
