"""Rules hold in every answer, and travel with the bundle."""

import shutil

import numpy as np
import pytest

from fusionrec.bundles.store import BundleStore
from fusionrec.data.histories import Histories
from fusionrec.data.splits import split
from fusionrec.errors import BundleError, ConfigError
from fusionrec.fusion.rules import RULES
from fusionrec.serving.pipeline import Pipeline
from fusionrec.serving.schemas import RecommendRequest
from fusionrec.serving.service import Service, recommend
from jobs.fit import FitConfig, fit
from jobs.publish import PublishConfig, publish
from jobs.rules import RulesJob, set_rules


@pytest.fixture(scope="module")
def made(synthetic, tmp_path_factory):
    directory = tmp_path_factory.mktemp("ruled") / "pipeline"
    sources = ("popularity", "item-knn", "bm25")
    fit(FitConfig(dataset=synthetic.directory, pipeline=directory, sources=sources, candidates=30))
    return directory


@pytest.fixture
def directory(made, tmp_path):
    return shutil.copytree(made, tmp_path / "pipeline")


def test_an_answer_of_any_kind_keeps_them(directory, synthetic):
    histories = split(synthetic).test.histories.slice(0, 40)
    before = Pipeline.load(directory).recommend(histories)
    ids = synthetic.catalogue.item_ids
    denied = {ids[code] for code in np.unique(before.items[:, :3]) if code >= 0}
    config = RulesJob(pipeline=directory, deny=tuple(denied))
    (directory / "metrics.json").write_text("{}")
    assert set_rules(config) == (len(ids) - len(denied), len(ids))
    assert not (directory / "metrics.json").exists()  # it was measured without the rules
    pipeline = Pipeline.load(directory)
    fused = pipeline.recommend(histories)
    assert not denied & {ids[code] for code in np.unique(fused.items) if code >= 0}
    assert (fused.items[:, 9] >= 0).all()
    service = Service.load(directory)
    requests = [
        RecommendRequest(user_id="nobody"),
        RecommendRequest(),
        RecommendRequest(history=[ids[3]]),
        RecommendRequest(text="a story of the sea"),
    ]
    for answer in recommend(service, pipeline, requests):
        shown = {item.item_id for item in answer.items}
        assert len(shown) == 10
        assert not denied & shown
    set_rules(RulesJob(pipeline=directory))
    assert not (directory / RULES).exists()
    np.testing.assert_array_equal(Pipeline.load(directory).recommend(histories).items, before.items)


def test_a_short_allow_list_fills_every_list(directory, synthetic):
    allowed = synthetic.catalogue.item_ids[40:46]
    set_rules(RulesJob(pipeline=directory, allow=allowed))
    fused = Pipeline.load(directory).retrieve(Histories.of([[0, 41], [], [3]]))
    lists = [sorted({*row} - {-1}) for row in fused.items.tolist()]
    assert lists == [[40, 42, 43, 44, 45], [*range(40, 46)], [*range(40, 46)]]
    np.testing.assert_allclose(fused.terms.sum(axis=1), fused.scores, atol=1e-5)


def test_the_bundle_keeps_them_and_publishing_looks_at_them(directory, synthetic, tmp_path):
    set_rules(RulesJob(pipeline=directory, deny=synthetic.catalogue.item_ids[:5]))
    pipeline = Pipeline.load(directory)
    pipeline.fusion.save(directory / "fusion.json")
    config = PublishConfig(pipeline=directory, bundles=tmp_path / "bundles", force=True)
    store = BundleStore(config.bundles)
    served = Pipeline.load(store.path(publish(config)))
    assert served.rules.permitted.tolist() == pipeline.rules.permitted.tolist()
    (directory / RULES).write_text('{"deny": ["no such item"]}')
    with pytest.raises(ConfigError, match=r"deny names item 'no such item', which the catalogue"):
        publish(config)
    with pytest.raises(ConfigError, match=r"the rules: allow names item 'x'"):
        set_rules(RulesJob(pipeline=directory, allow=("x",)))
    with pytest.raises(BundleError, match=r"has no pipeline.json"):
        set_rules(RulesJob(pipeline=tmp_path))
