import shutil

import numpy as np
import pytest

from fusionrec.data.splits import split
from fusionrec.errors import ConfigError
from fusionrec.fusion.diversity import DiversityConfig
from fusionrec.serving.pipeline import Pipeline
from tuning.diversity import DiversityCampaign, diversify


@pytest.fixture
def config(fitted, synthetic, tmp_path):
    directory = shutil.copytree(fitted, tmp_path / "pipeline")
    return DiversityCampaign(pipeline=directory, dataset=synthetic.directory, max_cases=100)


def test_the_most_diversity_that_the_loss_allows_is_kept_and_served(config, synthetic):
    before = Pipeline.load(config.pipeline)
    chosen, measured = diversify(config.model_copy(update={"max_loss": 0.05}))
    start, *tried = measured
    assert [each.diversity for each in tried] == sorted(each.diversity for each in tried)
    kept = next(each for each in tried if each.settings == chosen)
    assert chosen.similarity > 0
    assert kept.ndcg >= 0.95 * start.ndcg
    assert kept.diversity > start.diversity
    assert tried[0].ndcg == start.ndcg  # factor 0
    after = Pipeline.load(config.pipeline)
    assert after.diversity.config == chosen
    histories = split(synthetic).test.histories.slice(0, 30)
    lists, plain = after.retrieve(histories), before.retrieve(histories)
    assert lists.term_names == (*plain.term_names, "diversity")
    assert (lists.items != plain.items).any()
    np.testing.assert_allclose(lists.terms.sum(axis=1), lists.scores, atol=1e-4)
    # A second search starts from the lists as they are without the term.
    again, _ = diversify(config.model_copy(update={"max_loss": 0.05}))
    assert again == chosen


def test_a_cap_holds_in_what_is_served(config, synthetic):
    wanted = DiversityConfig(max_per_category=1, places=5)
    chosen, _ = diversify(config.model_copy(update={"diversity": wanted, "search": False}))
    assert chosen == wanted
    lists = Pipeline.load(config.pipeline).retrieve(split(synthetic).test.histories.slice(0, 30))
    categories = synthetic.catalogue.categories
    first = [[c for item in row[:2] for c in categories[item]] for row in lists.items.tolist()]
    assert all(len(set(row)) == len(row) for row in first)
    nothing = config.model_copy(update={"diversity": DiversityConfig()})
    diversify(nothing)
    assert Pipeline.load(config.pipeline).diversity is None


def test_no_item_is_in_more_than_its_share_of_the_lists(config):
    wanted = DiversityConfig(max_exposure=0.18, freshness=0.2)
    asked = config.model_copy(update={"diversity": wanted, "max_loss": 0.5})
    chosen, measured = diversify(asked)
    before, *priced = measured
    assert before.most > 0.2
    assert max(each.most for each in priced) <= 0.18
    term = Pipeline.load(config.pipeline).diversity
    assert term.config == chosen
    assert (term.prices > 0).any()
    assert chosen.freshness > 0
    shutil.rmtree(config.pipeline / "diversity")
    (config.pipeline / "releases.npz").unlink()
    with pytest.raises(ConfigError, match=r"--diversity: freshness = 0.2 needs to know"):
        diversify(asked)


def test_another_data_set_is_refused(config, synthetic, tmp_path):
    other = shutil.copytree(synthetic.directory, tmp_path / "other")
    text = (other / "dataset.json").read_text()
    fingerprint = synthetic.info.fingerprint
    (other / "dataset.json").write_text(text.replace(fingerprint, "0" * len(fingerprint)))
    with pytest.raises(ConfigError, match=r"is not what .* was fitted on"):
        diversify(config.model_copy(update={"dataset": other}))
