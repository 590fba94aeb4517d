"""Nothing written at the time of a rating or after it is read, and never its own review."""

from dataclasses import replace

import numpy as np
import pyarrow as pa
import pytest

from fusionrec.data.dataset import Dataset
from fusionrec.data.splits import split
from fusionrec.errors import TrainingError
from fusionrec.training.examples import Examples
from fusionrec.training.ratings import Ratings
from fusionrec.training.reviews import Reviews

# User 0 reviews items 5 and 6, user 1 item 5 twice, user 2 item 5.
REVIEWS = Reviews(
    texts=pa.chunked_array([["0 of 5", "1 of 5", "0 of 6", "1 again", "2 of 5"]]),
    users=np.array([0, 1, 0, 1, 2], np.int32),
    items=np.array([5, 5, 6, 5, 5], np.int32),
    times=np.array([10, 20, 30, 40, 50]),
    timed=True,
)


def read(user: int, item: int, time: int, count: int = 2, reviews: Reviews = REVIEWS) -> list:
    found = reviews.before(np.array([user]), np.array([item]), np.array([time]), count)
    return [reviews.text_of(side[side >= 0]) for side in found[0]]


def test_the_newest_before_the_rating():
    assert read(2, 5, 50) == [[], ["1 again", "1 of 5"]]
    assert read(0, 5, 45) == [["0 of 6", "0 of 5"], ["1 again", "1 of 5"]]
    assert read(0, 5, 45, count=1) == [["0 of 6"], ["1 again"]]


def test_neither_its_own_review_nor_a_later_one():
    assert read(1, 5, 20) == [[], ["0 of 5"]]
    assert read(0, 6, 30) == [["0 of 5"], []]
    assert read(9, 9, 99) == [[], []]


def test_without_times_all_that_others_wrote():
    untimed = replace(REVIEWS, timed=False)
    assert read(1, 5, 20, count=9, reviews=untimed) == [[], ["2 of 5", "0 of 5"]]


def test_of_a_data_set_only_training_events_are_read(synthetic, tmp_path):
    train = split(synthetic).train
    reviews = Reviews.of(synthetic, train)
    table = synthetic.interactions()
    written = table.num_rows - table.column("text").null_count
    assert 0.5 * written < len(reviews.users) < written
    events = zip(reviews.users, reviews.items, strict=True)
    had = {(row, item) for row in range(len(train)) for item in train.row(row).tolist()}
    assert {(int(u), int(i)) for u, i in events} <= had

    examples = Examples.of(train, per_user=3, limit=99, generator=np.random.default_rng(0))
    examples = Ratings.of(synthetic.events, train).beside(examples)
    found = reviews.beside(examples, 2)
    assert found.reviews.shape == (len(examples), 2, 2)
    assert (found.reviews >= 0).any(axis=(0, 2)).all()
    times = train.timestamps[train.offsets[found.users] + found.histories.lengths]
    all_texts = reviews.texts.to_pylist()
    for row in range(len(found)):
        for side, keys, key in (
            (0, reviews.users, found.users),
            (1, reviews.items, found.positives),
        ):
            for code in found.reviews[row, side][found.reviews[row, side] >= 0]:
                text = found.review_texts[code]
                (among,) = np.nonzero((keys == key[row]) & (reviews.times < times[row]))
                assert text in {all_texts[each] for each in among}
    found.save(tmp_path)
    again = Examples.load(tmp_path)
    assert again.review_texts == found.review_texts
    np.testing.assert_array_equal(again.take(np.arange(3)).reviews, found.reviews[:3])
    assert again.fingerprint == found.fingerprint != examples.fingerprint


def test_a_data_set_without_reviews(synthetic, monkeypatch):
    silent = pa.table({"text": pa.nulls(synthetic.info.num_interactions, pa.string())})
    monkeypatch.setattr(Dataset, "interactions", lambda *_: silent)
    synthetic.__dict__.setdefault("events", synthetic.events)
    train = split(synthetic).train
    reviews = Reviews.of(synthetic, train)
    assert not len(reviews.users)
    examples = Examples.of(train, per_user=1, limit=9, generator=np.random.default_rng(0))
    with pytest.raises(TrainingError, match="leave --num-reviews out"):
        reviews.beside(examples, 2)
