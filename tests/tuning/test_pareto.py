"""The front: what is traded, which point is chosen, and what it leaves."""

import json
import shutil
from dataclasses import replace

import numpy as np
import pytest

from fusionrec.data.splits import split
from fusionrec.errors import ConfigError
from fusionrec.evaluation.metrics import ndcg
from fusionrec.evaluation.ranks import list_ranks
from fusionrec.fusion.diversity import Diversity, DiversityConfig, ItemCategories
from fusionrec.fusion.exposure import exposures
from fusionrec.fusion.model import Fusion, Segment, fuse
from fusionrec.fusion.rules import Rules
from fusionrec.retrieval.index import IndexConfig, build
from fusionrec.serving.pipeline import Pipeline, read_config
from fusionrec.sources.semantic import Semantic
from tuning.front import Front, Point, choose
from tuning.pareto import Begun, ParetoCampaign, _begun, _install, _with_prices, campaign
from tuning.tradeoff import Tradeoff, collect, cost_ms, diversified, weighed

MODES = {"ndcg": "max", "latency_ms": "min"}
FUSION = Fusion(
    sources=("a", "b", "c"),
    scales={"a": 1.0, "b": 2.0, "c": 1.0},
    segments=(
        Segment(max_events=5, weights={"a": 1.0, "b": 0.5, "c": 0.0}, reranker=0.2),
        Segment(weights={"a": 0.0, "b": 1.0, "c": 0.0}),
    ),
)


def point(number, ndcg, latency_ms):
    return Point(number=number, params={}, values={"ndcg": ndcg, "latency_ms": latency_ms})


def trust(**values):
    return {f"trust.{name}": value for name, value in values.items()}


def test_the_chosen_point_is_near_the_best_of_everything():
    points = [point(0, 1.0, 10), point(1, 0.98, 2), point(2, 0.5, 1)]
    assert choose(points, MODES, max_loss=0.05) == 1
    assert choose(points, MODES, max_loss=0.01) == 0  # the loss is more than may be
    assert choose(points[:1], MODES, max_loss=0.05) == 0


def test_trust_multiplies_the_weights_of_every_segment():
    found = weighed(FUSION, trust(a=0.5, b=1.0, c=0.0))
    assert found.sources == ("a", "b")
    assert [s.weights for s in found.segments] == [{"a": 0.5, "b": 0.5}, {"a": 0.0, "b": 1.0}]
    assert found.scales == {"a": 1.0, "b": 2.0}
    assert [s.reranker for s in found.segments] == [0, 0]
    Fusion.model_validate(found.model_dump())


def test_a_source_that_had_no_weight_gets_the_mean_one():
    found = weighed(FUSION, trust(a=0.0, b=0.0, c=2.0))
    assert [s.weights for s in found.segments] == [{"c": 1.5}, {"c": 2.0}]
    assert weighed(FUSION, trust(a=0.0, b=0.05, c=0.0)).sources == ("b",)  # one is asked


def test_popularity_that_is_not_worth_its_time_becomes_the_fallback(fitted):
    pipeline = Pipeline.load(fitted)
    searched = pipeline.fusion.without(["bm25"]).model_copy(update={"off": {"bm25": 0.5}})
    begun = Begun(fusion=searched, pipeline=pipeline.config, diversity=DiversityConfig())
    trusts = {"trust.popularity": 0.0, "trust.item-knn": 0.0, "trust.transitions": 1.5}
    point = Point(number=1, params=trusts, values={})
    found = begun.at(point)
    assert found.fusion.sources == ("transitions", "popularity")
    assert found.fusion.fallback == "popularity"
    # What a search of the fusion turned off stays for the next one.
    assert found.pipeline.sources == ("popularity", "transitions", "bm25")
    # The fallback is no part of what is traded, and stays.
    again = begun.model_copy(update={"fusion": found.fusion})
    kept = again.at(Point(number=1, params={"trust.transitions": 1.0}, values={}))
    assert kept.fusion.sources == ("transitions", "popularity")
    assert kept.fusion.fallback == "popularity"


@pytest.fixture(scope="module")
def tradeoff(fitted, synthetic):
    pipeline, cases = Pipeline.load(fitted), split(synthetic).validation
    candidates, proposed = collect(pipeline.sources, cases.histories, 30)
    categories = synthetic.catalogue.categories
    return Tradeoff(
        fusion=pipeline.fusion,
        diversity=Diversity(DiversityConfig(), ItemCategories.of(categories), pipeline.item_counts),
        histories=cases.histories,
        candidates=candidates,
        proposed=proposed,
        targets=cases.targets,
        cold=pipeline.item_counts == 0,
        vectors=None,
        categories=categories,
        cost_ms=dict(zip([*pipeline.config.sources, "diversity"], (1, 2, 4, 8, 16), strict=True)),
    )


@pytest.mark.parametrize(("weight", "cap"), [(0.0, None), (0.4, 2)])
@pytest.mark.parametrize("off", [(), ("bm25",), ("popularity", "item-knn")])
def test_a_point_is_what_the_pipeline_would_answer(
    tradeoff, fitted, synthetic, tmp_path, off, weight, cap
):
    trusts = {f"trust.{name}": 0.0 if name in off else 1.5 for name in tradeoff.fusion.sources}
    weights = {"diversity.similarity": weight, "diversity.popularity": 0.01}
    point = {**trusts, **weights, "diversity.max_per_category": float(cap or 20)}
    found = tradeoff.measure(point)
    directory = shutil.copytree(fitted, tmp_path / "pipeline")
    fusion = weighed(tradeoff.fusion, point)
    settings = read_config(directory).model_copy(update={"sources": fusion.sources})
    (directory / "pipeline.json").write_text(settings.model_dump_json())
    fusion.save(directory / "fusion.json")
    config = diversified(tradeoff.diversity.config, point)
    assert config == DiversityConfig(similarity=weight, max_per_category=cap)  # 0.01 is off
    if weight:
        replace(tradeoff.diversity, config=config).save(directory / "diversity")
    cases = split(synthetic).validation
    lists = Pipeline.load(directory).retrieve(cases.histories)
    values = ndcg(list_ranks(lists.items, lists.scores, cases.targets), 10)
    assert found["ndcg"] == pytest.approx(values.mean(), abs=1e-9)
    shown = np.unique(lists.items[:, :10])
    assert found["coverage"] == (shown >= 0).sum() / len(synthetic.catalogue)
    assert 0 < found["diversity"] < 1
    asked = [*fusion.sources, *(["diversity"] if weight else [])]
    assert found["latency_ms"] == sum(tradeoff.cost_ms[name] for name in asked)


def test_the_start_is_the_pipeline_as_it_is(tradeoff):
    start = tradeoff.start()
    assert start["diversity.max_per_category"] == 20  # of 20 places: none
    assert set(start.values()) == {0.0, 1.0, 20.0}
    assert weighed(tradeoff.fusion, start) == tradeoff.fusion
    assert not diversified(tradeoff.diversity.config, start).changes


def test_similar_lists_can_be_traded(tradeoff):
    start = tradeoff.start()
    spread = tradeoff.measure({**start, "diversity.similarity": 0.5})
    assert spread["diversity"] > tradeoff.measure(start)["diversity"]


def test_a_cap_per_category_can_be_traded(tradeoff):
    start = tradeoff.start()
    capped = tradeoff.measure({**start, "diversity.max_per_category": 1.0})
    assert capped["diversity"] > tradeoff.measure(start)["diversity"]
    assert capped["latency_ms"] == tradeoff.measure(start)["latency_ms"] + 16
    config = DiversityConfig(max_per_category=3)
    begun = replace(tradeoff, diversity=replace(tradeoff.diversity, config=config)).start()
    assert begun["diversity.max_per_category"] == 3
    assert diversified(config, begun) == config
    assert diversified(config, start).max_per_category is None


def test_what_the_pipeline_has_can_be_traded(tradeoff):
    assert "diversity.exposure" not in tradeoff.start()
    config = DiversityConfig(max_exposure=0.5)
    prices = np.zeros(len(tradeoff.cold), dtype=np.float32)
    prices[tradeoff.candidates.items[0, :5]] = 1
    diversity = replace(tradeoff.diversity, config=config, prices=prices)
    priced = replace(tradeoff, diversity=diversity)
    start = priced.start()
    assert start["diversity.exposure"] == 1
    free = priced.measure({**start, "diversity.exposure": 0.0})
    assert free == tradeoff.measure(tradeoff.start())
    assert priced.measure(start)["ndcg"] != free["ndcg"]


def test_a_cap_on_exposure_is_searched_from_nothing(fitted, synthetic, tmp_path):
    directory = shutil.copytree(fitted, tmp_path / "pipeline")
    Pipeline.load(directory).fusion.save(directory / "fusion.json")
    config = ParetoCampaign(
        pipeline=directory, dataset=synthetic.directory, out=tmp_path / "out", max_exposure=0.2
    )
    config.out.mkdir()
    cases = split(synthetic).validation
    pipeline = Pipeline.load(directory)
    found, _ = collect(pipeline.sources, cases.histories, 30)
    begun = _begun(config, read_config(directory))
    diversity = _with_prices(config, synthetic, begun, cases.histories, found)
    lists = fuse(begun.fusion, found, pipeline.item_counts == 0)
    whole = replace(diversity, config=begun.diversity.model_copy(update={"exposure": 1.0}))
    most = exposures(whole.apply(cases.histories, lists).items, 10, len(pipeline.item_counts)).max()
    assert most <= 0.2 * len(cases) < exposures(lists.items, 10, len(pipeline.item_counts)).max()

    point = {"diversity.exposure": 0.8, **trust(**dict.fromkeys(begun.fusion.sources, 1.0))}
    front = Front(
        start=Point(number=0, params={}, values={}),
        points=(Point(number=3, params=point, values={}),),
        chosen=3,
        max_loss=0.1,
        num_cases=1,
        num_trials=4,
        cost_ms={},
    )
    for _ in range(2):  # done twice it is the same
        _install(directory, synthetic, begun, front, config.out / "prices.npy")
        served = Pipeline.load(directory).diversity
        assert (served.config.max_exposure, served.config.exposure) == (0.2, 0.8)
        assert served.prices.tolist() == diversity.prices.tolist()
    other = config.model_copy(update={"out": tmp_path / "other", "max_exposure": 0.1})
    with pytest.raises(ConfigError, match=r"max_exposure = 0.1 is not the 0.2 that the diversity"):
        campaign(other)
    again = config.model_copy(update={"out": tmp_path / "other", "max_exposure": None})
    again.out.mkdir()
    begun = _begun(again, read_config(directory))
    kept = _with_prices(again, synthetic, begun, cases.histories, found)
    assert kept.prices.tolist() == diversity.prices.tolist()  # the pipeline's are gone on with


def test_rules_hold_in_what_is_traded(fitted, synthetic):
    pipeline, histories = Pipeline.load(fitted), split(synthetic).validation.histories
    permitted = np.arange(len(synthetic.catalogue)) < 8
    rules = Rules.of(permitted, pipeline.item_counts)
    found, proposed = collect(pipeline.sources, histories, 30, rules)
    assert found.items.max() < 8
    assert (proposed.any(axis=0) == (found.items >= 0)).all()
    pipeline.rules = rules
    np.testing.assert_array_equal(pipeline.candidates(histories).items, found.items)


def test_semantic_costs_what_its_encoder_takes(fitted, synthetic, monkeypatch):
    pipeline = Pipeline.load(fitted)
    cases, clock = split(synthetic).validation, [0.0]
    monkeypatch.setattr("tuning.tradeoff.time.perf_counter", lambda: clock[0])

    def embed(histories):
        clock[0] += 0.25
        return histories.with_vectors(np.tile(np.eye(4, dtype=np.float32)[:1], (len(histories), 1)))

    pipeline.embed = embed
    index = build(np.eye(len(pipeline.item_counts), 4, dtype=np.float32), IndexConfig())
    pipeline.sources = [*pipeline.sources, Semantic(index=index)]
    names = tuple(source.name for source in pipeline.sources)
    pipeline.fusion = Fusion.uniform(names, np.ones(len(names), np.float32))
    plain = Diversity(
        DiversityConfig(), ItemCategories.of(synthetic.catalogue.categories), pipeline.item_counts
    )
    costs = cost_ms(pipeline, cases.histories.slice(0, 3), plain)
    assert costs == {**dict.fromkeys(pipeline.config.sources, 0.0), "semantic": 250, "diversity": 0}


@pytest.mark.ray
def test_the_front_is_kept_and_the_chosen_point_is_left(ray_cluster, fitted, synthetic, tmp_path):
    directory = shutil.copytree(fitted, tmp_path / "pipeline")
    start = Pipeline.load(directory).fusion
    start.save(directory / "fusion.json")
    config = ParetoCampaign(
        pipeline=directory,
        dataset=synthetic.directory,
        out=tmp_path / "out",
        trials=12,
        max_loss=0.3,
    )
    front = campaign(config)
    values = np.array([list(p.values.values()) for p in front.points]) * (1, 1, 1, -1)
    assert list(front.start.values) == ["ndcg", "diversity", "coverage", "latency_ms"]
    for mine in values:
        assert not ((values >= mine).all(axis=1) & (values > mine).any(axis=1)).any()
    assert front.num_trials == 12
    assert Front.model_validate_json((config.out / "front.json").read_text()) == front
    chosen = front.point
    assert chosen.number == front.chosen
    pipeline = Pipeline.load(directory)
    before = Begun(fusion=start, pipeline=read_config(fitted), diversity=DiversityConfig())
    assert pipeline.fusion == before.at(chosen).fusion
    assert set(pipeline.config.sources) == set(pipeline.fusion.sources)

    def left():
        return [json.loads((directory / n).read_text()) for n in ("fusion.json", "pipeline.json")]

    fusion, settings = left()
    half = {**settings, "sources": list(start.sources)}
    (directory / "pipeline.json").write_text(json.dumps(half))  # killed between the two files
    assert campaign(config) == front
    assert left() == [fusion, settings]


def test_without_a_fusion_the_remedy_is_named(fitted, synthetic, tmp_path):
    config = ParetoCampaign(pipeline=fitted, dataset=synthetic.directory, out=tmp_path / "out")
    with pytest.raises(ConfigError, match=r"run `python -m tuning.fusion`"):
        campaign(config)
