"""What is fitted, and where; every other fit is in the tests of what uses it."""

import numpy as np
import pytest

from fusionrec.data.splits import split
from fusionrec.serving.pipeline import read_config
from fusionrec.sources.ease import EASE
from fusionrec.sources.item_item import ItemItemConfig
from fusionrec.sources.popularity import PopularityConfig
from fusionrec.sources.protocol import TrainingData
from fusionrec.sources.sasrec import SASRec, SASRecConfig
from jobs.fit import FitConfig, fit

TINY = SASRecConfig(width=8, num_heads=1, num_blocks=1, dropout=0, epochs=2, batch_events=256)


@pytest.mark.ray
@pytest.mark.slow
# Ray copies its own settings, deprecated ones among them, whenever it starts something.
@pytest.mark.filterwarnings("ignore:.*is deprecated.*:DeprecationWarning")
def test_sasrec_learns_in_two_workers_what_it_learns_in_one(ray_cluster, synthetic, tmp_path):
    directory = tmp_path / "pipeline"
    given = {"dataset": synthetic.directory, "pipeline": directory, "sources": ("sasrec",)}
    fit(FitConfig(**given, sasrec=TINY, num_workers=2))
    assert [path.name for path in (directory / "sources").iterdir()] == ["sasrec"]
    parts = split(synthetic)
    alone = SASRec(TINY).fit(TrainingData(synthetic.catalogue, parts.train))
    asked = parts.test.histories.slice(0, 20)
    candidates = np.tile(np.arange(parts.num_items, dtype=np.int32), (20, 1))
    found = SASRec.load(directory / "sources" / "sasrec").score(asked, candidates)
    np.testing.assert_allclose(found, alone.score(asked, candidates), atol=1e-4)


def test_other_settings_of_the_same_sources_leave_nothing_that_was_found_for_theirs(
    synthetic, tmp_path
):
    given = {"dataset": synthetic.directory, "pipeline": tmp_path, "sources": ("popularity",)}
    kept = [tmp_path / name for name in ("fusion.json", "lambdarank/model.txt", "diversity/it")]

    def left(**settings):
        for path in kept:
            path.parent.mkdir(exist_ok=True)
            path.touch()
        fit(FitConfig(**given, **settings))
        return [path for path in kept if path.exists()]

    assert left() == []
    assert left() == kept  # the same again: what was found still holds
    assert left(popularity=PopularityConfig(half_life_days=30)) == []
    assert [path.name for path in (tmp_path / "sources").iterdir()] == ["popularity"]


def test_workers_without_sasrec_are_ignored_aloud(synthetic, tmp_path):
    given = {"dataset": synthetic.directory, "pipeline": tmp_path, "sources": ("popularity",)}
    with pytest.warns(UserWarning, match="--num-workers 2 is ignored: sasrec is not among"):
        fit(FitConfig(**given, num_workers=2))


def test_ease_is_left_out_aloud_where_its_pairs_would_not_fit(synthetic, tmp_path):
    large = ItemItemConfig(learner=EASE(max_items=1, max_pairs=2))
    given = {"dataset": synthetic.directory, "pipeline": tmp_path, "prepare": True}
    with pytest.warns(UserWarning, match="source ease is left out: the histories hold"):
        fit(FitConfig(**given, ease=large))
    assert "ease" not in read_config(tmp_path).sources
