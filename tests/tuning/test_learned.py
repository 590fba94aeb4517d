"""The choice between a weighted sum and trees: by significance, on cases that did not teach."""

import shutil

import numpy as np
import pytest

from fusionrec.bundles.store import BundleStore
from fusionrec.data.histories import Histories
from fusionrec.data.splits import Cases, split
from fusionrec.errors import ConfigError
from fusionrec.fusion.candidates import Candidates
from fusionrec.fusion.features import ItemStatistics
from fusionrec.fusion.lambdarank import LambdaRank, LambdaRankConfig, NothingToLearn
from fusionrec.fusion.model import LAMBDARANK, Fusion, Segment
from fusionrec.serving.pipeline import Pipeline
from fusionrec.serving.schemas import RecommendRequest
from fusionrec.serving.service import Service, recommend
from jobs.fit import FitConfig, fit
from tuning import history
from tuning.fusion import FusionCampaign, campaign
from tuning.learned import FusionModel, choose, cross_fitted, leave
from tuning.trees import TreesTask, search_trees

ITEMS, WIDTH = 30, 10
STATISTICS = ItemStatistics(np.ones(ITEMS, dtype=np.int64), None)
SMALL = LambdaRankConfig(trees=15, learning_rate=0.3, leaves=4, min_leaf_rows=5)


def linear(names=("a", "b")):
    weights = dict.fromkeys(names, 1.0)
    return Fusion(sources=names, scales=weights, segments=(Segment(weights=weights),))


def problem(num_cases, liked):
    """Cases whose target has ``liked`` [2] from two sources, where others have both or neither."""
    generator = np.random.default_rng(0)
    items = np.tile(np.arange(WIDTH, dtype=np.int32), (num_cases, 1))
    both = generator.integers(0, 2, items.shape)
    scores = np.stack([both, both]).astype(np.float32)
    target = generator.integers(0, WIDTH, num_cases)
    scores[:, np.arange(num_cases), target] = np.array(liked)[:, None]
    scores += generator.uniform(0.1, 0.4, scores.shape).astype(np.float32)
    histories = Histories.of([[WIDTH + 1]] * num_cases)
    targets = Histories.of(target[:, None])
    cases = Cases(np.arange(num_cases), histories, targets)
    return Candidates(items, scores, histories.lengths), cases


def chosen(model, candidates, cases):
    return choose(model, linear(), candidates, cases, STATISTICS, SMALL, k=5, seed=0)


def test_trees_are_kept_where_they_see_what_the_sum_cannot(capsys):
    found = chosen(FusionModel.AUTO, *problem(200, liked=(1, 0)))
    assert isinstance(found, LambdaRank)
    assert "lambdarank has NDCG@5" in (said := capsys.readouterr().out)
    assert "is significant" in said


def test_the_sum_stays_where_trees_find_nothing_more(capsys):
    candidates, cases = problem(200, liked=(2, 2))  # the sum is right already
    assert chosen(FusionModel.AUTO, candidates, cases) is None
    assert "is not significant" in capsys.readouterr().out
    assert chosen(FusionModel.LAMBDARANK, candidates, cases) is not None
    assert chosen(FusionModel.LINEAR, candidates, cases) is None


def test_the_sum_stays_where_trees_learn_noise():
    candidates, cases = problem(60, liked=(1, 0))
    noise = np.random.default_rng(1).random(candidates.scores.shape).astype(np.float32)
    candidates = Candidates(candidates.items, noise, candidates.lengths)
    assert chosen(FusionModel.AUTO, candidates, cases) is None


def test_too_little_to_learn_from_is_said(capsys):
    candidates, cases = problem(20, liked=(1, 0))
    nothing = Cases(cases.users, cases.histories, Histories.of([[ITEMS]] * 20))
    assert chosen(FusionModel.AUTO, candidates, nothing) is None
    assert "the fusion stays linear: no case has a target" in capsys.readouterr().out
    with pytest.raises(NothingToLearn):
        chosen(FusionModel.LAMBDARANK, candidates, nothing)


@pytest.mark.ray
def test_trees_are_searched_on_half_of_the_cases_and_judged_on_the_other(ray_cluster, tmp_path):
    candidates, cases = problem(240, liked=(1, 0))
    poor = LambdaRankConfig(trees=1, learning_rate=0.02, leaves=2, min_leaf_rows=300)
    task = TreesTask(poor, linear(), candidates, cases, STATISTICS, k=5, seed=0)
    found, deciding = search_trees(task, tmp_path / "lambdarank", trials=6, workers=2)
    assert 100 < deciding.sum() < 140
    study = history.read(tmp_path / "lambdarank", "lambdarank", "ndcg")
    assert len(study.trials) == 6
    first = next(each for each in study.trials if each.number == 0)
    assert first.value == pytest.approx(task.take(~deciding).value({}))
    best = next(each for each in study.trials if each.number == study.best)
    assert best.value >= first.value
    assert found.trees == best.params["trees"]
    again = search_trees(task, tmp_path / "lambdarank", trials=6, workers=2)
    assert again[0] == found
    assert history.read(tmp_path / "lambdarank", "lambdarank", "ndcg") == study
    other = TreesTask(poor, linear(("b", "a")), candidates, cases, STATISTICS, k=5, seed=0)
    search_trees(other, tmp_path / "lambdarank", trials=1, workers=1)  # over other weights: anew
    assert len(history.read(tmp_path / "lambdarank", "lambdarank", "ndcg").trials) == 1


def test_what_decides_are_the_cases_that_did_not_choose(capsys):
    candidates, cases = problem(200, liked=(1, 0))
    deciding = np.arange(200) < 20
    settings = (linear(), candidates, cases, STATISTICS, SMALL, 5, 0)
    values = cross_fitted(*settings)
    choose(FusionModel.AUTO, *settings, deciding)
    trees, plain = values[deciding].mean(axis=0)
    said = f"lambdarank has NDCG@5 {trees:.4f} against {plain:.4f} of linear"
    assert said in capsys.readouterr().out
    assert plain != pytest.approx(values[:, 1].mean(), abs=1e-4)


@pytest.mark.ray
def test_a_campaign_leaves_trees_that_every_part_of_the_pipeline_uses(
    ray_cluster, fitted, synthetic, tmp_path
):
    pipeline = shutil.copytree(fitted, tmp_path / "pipeline")
    config = FusionCampaign(
        pipeline=pipeline,
        dataset=synthetic.directory,
        out=tmp_path / "campaign",
        trials=4,
        model=FusionModel.LAMBDARANK,
        lambdarank=SMALL,
    )
    found = campaign(config)
    assert Fusion.load(pipeline / "fusion.json") == found
    loaded = Pipeline.load(pipeline)
    histories = split(synthetic).test.histories.slice(0, 20)
    lists = loaded.retrieve(histories)
    sources = found.sources
    assert lists.term_names == (*sources, "history", "item")
    np.testing.assert_allclose(lists.terms.sum(axis=1), lists.scores, atol=1e-4)
    assert set(loaded.weights()["trees, share of gain"]) >= {*sources, "item"}

    store = BundleStore(tmp_path / "bundles")
    bundle = store.path(store.add(pipeline).id)
    request = RecommendRequest(history=[synthetic.catalogue.item_ids[0]], k=3, explain=True)
    [answer] = recommend(Service.load(bundle), Pipeline.load(bundle), [request])
    for item in answer.items:
        assert sum(item.terms.values()) == pytest.approx(item.score, abs=1e-4)
        assert "history" in item.terms

    # A linear campaign removes them, and so do other sources.
    learned = loaded.learned
    campaign(config.model_copy(update={"model": FusionModel.LINEAR}))
    assert Pipeline.load(pipeline).learned is None
    leave(learned, found, pipeline)
    assert Pipeline.load(pipeline).learned is not None
    found.model_copy(update={"scales": dict.fromkeys(sources, 2.0)}).save(pipeline / "fusion.json")
    with pytest.raises(ConfigError, match=r"was grown over other weights than .*fusion.json"):
        Pipeline.load(pipeline)
    fit(FitConfig(dataset=synthetic.directory, pipeline=pipeline, sources=("popularity",)))
    assert not (pipeline / LAMBDARANK).exists()
