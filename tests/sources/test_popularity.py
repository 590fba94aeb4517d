import numpy as np

from fusionrec.data.catalogue import Catalogue
from fusionrec.data.histories import Histories
from fusionrec.sources.popularity import Popularity, PopularityConfig
from fusionrec.sources.protocol import TrainingData

DAY = 86_400


def training(items, days, num_items=3, has_timestamps=True):
    empty = ("",) * num_items
    catalogue = Catalogue(tuple(map(str, range(num_items))), empty, empty, ((),) * num_items, empty)
    times = [np.array(days) * DAY]
    return TrainingData(catalogue, Histories.of([items], times), has_timestamps)


def scores(source, day=None):
    histories = Histories.of([[]]) if day is None else Histories.of([[2]], [[day * DAY]])
    return source.score(histories, np.arange(3, dtype=np.int32)[None])[0]


def test_an_event_counts_half_after_the_half_life():
    source = Popularity(PopularityConfig(half_life_days=10)).fit(training([0, 1], [0, 10]))
    np.testing.assert_allclose(scores(source), np.log1p([0.5, 1, 0]), rtol=1e-6)


def test_what_happened_later_is_not_known():
    source = Popularity(PopularityConfig(half_life_days=1e6)).fit(training([0, 1, 1], [0, 10, 20]))
    np.testing.assert_allclose(scores(source, day=5), np.log1p([1, 0, 0]), atol=1e-4)
    np.testing.assert_allclose(scores(source, day=15), np.log1p([1, 1, 0]), atol=1e-4)
    np.testing.assert_allclose(scores(source), np.log1p([1, 2, 0]), atol=1e-4)


def test_positions_are_not_times():
    source = Popularity().fit(training([0, 1, 1], [0, 1, 2], has_timestamps=False))
    np.testing.assert_allclose(scores(source, day=0), np.log1p([1, 2, 0]), rtol=1e-6)


def test_top_skips_a_long_history():
    source = Popularity().fit(training([0, 0, 0, 1, 1, 2], range(6)))
    ranked = source.top(Histories.of([[0, 1]], [[9 * DAY, 9 * DAY]]), 2)
    assert ranked.items.tolist() == [[2, -1]]
