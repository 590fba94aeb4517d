"""Searching sources: what is decided, and that it can be had again."""

import json
import shutil

import numpy as np
import pytest
import yaml

from fusionrec.data.splits import split
from fusionrec.errors import ConfigError
from fusionrec.evaluation.metrics import ndcg
from fusionrec.evaluation.ranks import full_ranks
from fusionrec.retrieval.index import IndexConfig
from fusionrec.serving.pipeline import Pipeline, read_config
from fusionrec.sources.ials import IALS, IALSConfig
from fusionrec.sources.item_item import ItemItem, ItemItemConfig
from fusionrec.sources.item_knn import ItemKNN
from fusionrec.sources.load import load_source
from fusionrec.sources.protocol import TrainingData
from fusionrec.sources.semantic import Semantic
from fusionrec.sources.transitions import Transitions
from jobs.fit import FitConfig, fit
from tuning import history
from tuning.source_trial import SourceTrial, Task, gains, steps
from tuning.sources import SourcesCampaign, campaign, write_fit_settings

BAD = ItemItemConfig(
    learner=ItemKNN(power=1.0, shrinkage=0.1, length_power=0.0), recency=0.2, neighbours=300
)
"""Settings that any others beat: what is searched from is to be replaced."""


@pytest.fixture
def data(synthetic):
    return TrainingData(synthetic.catalogue, split(synthetic).train)


@pytest.fixture
def begun(fitted, data, tmp_path):
    """A pipeline whose item-knn can only get better."""
    directory = shutil.copytree(fitted, tmp_path / "pipeline")
    ItemItem(BAD).fit(data).save(directory / "sources" / "item-knn")
    return directory


@pytest.fixture
def config(begun, synthetic, tmp_path):
    return SourcesCampaign(
        pipeline=begun,
        dataset=synthetic.directory,
        out=tmp_path / "campaign",
        names=("item-knn", "transitions"),
        trials=5,
    )


def test_gains_are_those_of_the_whole_ranking(fitted, synthetic):
    source = load_source(fitted / "sources" / "item-knn")
    cases = split(synthetic).validation
    num_items = len(synthetic.catalogue)
    whole = ndcg(full_ranks(source, cases.histories, cases.targets, num_items), 10)
    np.testing.assert_allclose(gains(source, cases, 10), whole)


def test_a_source_that_learns_in_passes_is_measured_on_the_way(data, synthetic):
    task = Task(IALS, IALSConfig(factors=8, iterations=4), data, split(synthetic).validation, 10)
    trial = SourceTrial.__new__(SourceTrial)
    trial.setup({"alpha": 2.0}, task)
    found = [trial.step() for _ in range(3)]
    assert [each["epochs"] for each in found] == [1, 3, 4]
    assert [each["done"] for each in found] == [False, False, True]
    whole = IALS(IALSConfig(factors=8, iterations=4, alpha=2.0)).fit(data)
    assert found[-1]["ndcg"] == gains(whole, task.cases, 10).mean()
    assert found[0]["ndcg"] != found[-1]["ndcg"]


def test_a_source_without_passes_is_fitted_once(data, fitted):
    source = load_source(fitted / "sources" / "transitions")
    [(epochs, last, again)] = steps(type(source)(source.config), data)
    assert (epochs, last) == (1, True)
    assert again.config.learner == Transitions()


@pytest.mark.ray
def test_the_best_trial_wins_where_it_holds_and_can_be_had_again(ray_cluster, config, tmp_path):
    (config.pipeline / "fusion.json").write_text("{}")  # weights for the sources as they were
    sources = config.pipeline / "sources"
    before = {n: (sources / n / "config.json").read_text() for n in config.names}
    winners = campaign(config)
    assert [winner.name for winner in winners] == list(config.names)
    for winner in winners:
        assert winner.value_best >= winner.value_before
        assert bool(winner.changed) == (winner.held_out.mean > 0)
        now = (sources / winner.name / "config.json").read_text()
        assert (now != before[winner.name]) == bool(winner.changed)
        assert json.loads(now) == winner.after
    assert winners[0].changed
    assert not (config.pipeline / "fusion.json").exists()

    again = tmp_path / "again"
    settings = yaml.safe_load((config.out / "fit.yaml").read_text())
    fit(FitConfig(**{**settings, "pipeline": again}))
    for path in sources.rglob("*"):
        if path.is_file():
            assert path.read_bytes() == (again / path.relative_to(config.pipeline)).read_bytes()

    journals = {n: (config.out / n / "journal.log").read_bytes() for n in config.names}
    assert campaign(config) == winners  # nothing is left to do
    for name, journal in journals.items():
        assert (config.out / name / "journal.log").read_bytes() == journal
    Pipeline.load(config.pipeline)


def test_settings_that_are_not_searched_are_kept(begun, synthetic, tmp_path):
    vectors = np.eye(len(synthetic.catalogue), 4, dtype=np.float32)
    data = TrainingData(synthetic.catalogue, split(synthetic).train, item_vectors=vectors)
    chosen = IndexConfig(flat_up_to=7, kind="hnsw")
    Semantic(chosen).fit(data).save(begun / "sources" / "semantic")
    now = read_config(begun).model_copy(update={"sources": ("item-knn", "semantic")})
    (begun / "pipeline.json").write_text(now.model_dump_json())
    found = write_fit_settings(begun, synthetic.directory, tmp_path / "fit.yaml")
    again = FitConfig(**yaml.safe_load((tmp_path / "fit.yaml").read_text()))
    assert again == FitConfig(**found)
    assert (again.semantic, again.item_knn) == (chosen, BAD)


@pytest.mark.ray
def test_a_decision_that_was_not_carried_out_is(ray_cluster, config, data):
    config = config.model_copy(update={"names": ("item-knn",)})
    winners = campaign(config)
    place = config.pipeline / "sources" / "item-knn"
    names = sorted(path.name for path in place.parent.iterdir())
    whole = {path.name: path.read_bytes() for path in place.iterdir()}

    place.rename(place.with_name(f".{place.name}.new"))  # killed between two renames
    assert campaign(config) == winners
    assert {path.name: path.read_bytes() for path in place.iterdir()} == whole

    shutil.rmtree(place)  # killed before them
    ItemItem(BAD).fit(data).save(place)
    assert campaign(config) == winners
    assert {path.name: path.read_bytes() for path in place.iterdir()} == whole
    assert sorted(path.name for path in place.parent.iterdir()) == names


@pytest.mark.ray
def test_minutes_end_a_search_too(ray_cluster, config):
    budget = {"names": ("transitions",), "trials": 100_000, "minutes": 0.1}
    short = config.model_copy(update=budget)
    [winner] = campaign(short)
    assert len(history.read(short.out / "transitions", "transitions", "ndcg").trials) < 100_000
    assert campaign(short) == [winner]


def test_an_unknown_source_is_named(config):
    wrong = config.model_copy(update={"names": ("item-nn",)})
    with pytest.raises(ConfigError, match=r"names = 'item-nn' is no source .* among popularity"):
        campaign(wrong)
