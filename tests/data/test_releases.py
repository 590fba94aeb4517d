from datetime import date
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from fusionrec.data.dataset import Dataset, DatasetInfo
from fusionrec.data.histories import Histories
from fusionrec.data.releases import Releases
from fusionrec.errors import DataError

DAY = 86_400
TRAIN = Histories.of([[0, 1], [1]], [[5 * DAY, 7 * DAY], [6 * DAY]])
UNKNOWN = np.iinfo(np.int64).max


def dataset(*, has_timestamps=True, **columns):
    info = DatasetInfo(
        name="x",
        format="table",
        fingerprint="0",
        num_interactions=3,
        num_users=2,
        num_items=3,
        has_timestamps=has_timestamps,
    )
    made = Dataset(Path("x"), info)
    made.__dict__["items"] = pa.table({"item_id": ["a", "b", "c"], **columns})  # as if read
    return made


def test_the_first_event_counts_where_the_catalogue_says_nothing():
    found = Releases.of(dataset(), TRAIN)
    assert found.times.tolist() == [5 * DAY, 6 * DAY, UNKNOWN]
    assert found.newest == 7 * DAY


@pytest.mark.parametrize(
    "column",
    [
        pa.array([None, 2 * DAY, DAY]),
        pa.array([None, date(1970, 1, 3), date(1970, 1, 2)]),
        pa.array([None, "1970-01-03", "1970-01-02T00:00:00"]),
    ],
)
def test_the_catalogue_counts_before_the_events(column):
    found = Releases.of(dataset(released=column), TRAIN)
    assert found.times.tolist() == [5 * DAY, 2 * DAY, DAY]


def test_a_year_counts_from_its_first_second():
    found = Releases.of(dataset(year=pa.array([1971, None, 1969], pa.int32())), TRAIN)
    assert found.times.tolist() == [365 * DAY, 6 * DAY, -365 * DAY]


def test_without_times_only_the_catalogue_knows():
    assert Releases.of(dataset(has_timestamps=False), TRAIN) is None
    found = Releases.of(dataset(has_timestamps=False, released=[DAY, None, 3 * DAY]), TRAIN)
    assert found.times.tolist() == [DAY, UNKNOWN, 3 * DAY]
    assert found.newest == 3 * DAY


def test_ages_are_counted_from_the_question(tmp_path):
    Releases.of(dataset(), TRAIN).save(tmp_path / "releases.npz")
    found = Releases.load(tmp_path / "releases.npz")
    asked = np.array([[8 * DAY], [5 * DAY]])
    ages = found.ages_days(np.array([[0, 1, 2], [0, 1, 2]]), asked)
    assert ages.tolist() == [[3, 2, np.inf], [0, 0, np.inf]]
    assert Releases.load(tmp_path / "none.npz") is None


def test_a_column_that_holds_no_times_is_named():
    with pytest.raises(DataError, match=r"column released of the items holds no times"):
        Releases.of(dataset(released=["soon", "later", None]), TRAIN)
