from dataclasses import replace

import numpy as np
import pytest
import torch

from fusionrec.data.dataset import Events
from fusionrec.data.histories import Histories
from fusionrec.errors import TrainingError
from fusionrec.language.reranker import Reranker
from fusionrec.training.examples import Examples
from fusionrec.training.objectives.rating import RATER, RaterConfig, RatingSettings, RatingTask
from fusionrec.training.ratings import Ratings

NAN = np.nan
# Two users: ratings 5, 3, none, 4 of items 0 1 2 3, and 1 of item 0; not in the order of time.
EVENTS = Events(
    users=np.array([0, 0, 1, 0, 0], np.int32),
    items=np.array([1, 0, 0, 2, 3], np.int32),
    timestamps=np.array([20, 10, 5, 30, 40]),
    values=np.array([3, 5, 1, NAN, 4], np.float32),
    user_ids=("a", "b"),
)
TRAIN = Histories.of([[0, 1, 2], [0]])


def test_ratings_stand_beside_their_events():
    ratings = Ratings.of(EVENTS, TRAIN)
    np.testing.assert_array_equal(ratings.train, np.array([5, 3, NAN, 1], np.float32))
    assert ratings.mean == 3.0
    assert ratings.later == {(0, 3): 4.0}
    # (5 + 3 + 5 · 3) / (2 + 5) and (1 + 5 · 3) / (1 + 5)
    assert ratings.by_user.tolist() == pytest.approx([23 / 7, 16 / 6])


def test_an_expected_rating_knows_only_what_came_before():
    generator = np.random.default_rng(0)
    examples = Examples.of(TRAIN, per_user=5, limit=9, generator=generator)
    assert examples.positives.tolist() == [1, 2]
    rated = Ratings.of(EVENTS, TRAIN).beside(examples)
    assert rated.positives.tolist() == [1]  # item 2 was not rated
    assert rated.ratings.tolist() == [3.0]
    assert rated.expected.tolist() == pytest.approx([20 / 6])


def test_targets_are_rated_after_training():
    ratings = Ratings.of(EVENTS, TRAIN)
    targets = replace(Histories.of([[3], [2]]), timestamps=np.array([40, 50]))
    found = ratings.targets(np.array([0, 1]), targets)
    assert [each.tolist() for each in found] == [[0], [3], [40], [4.0]]


def test_implicit_feedback_has_no_ratings():
    nothing = replace(EVENTS, values=np.full(5, NAN, np.float32))
    with pytest.raises(TrainingError, match="no training event has a value"):
        Ratings.of(nothing, TRAIN)


def test_loss_is_the_error_in_units_of_the_spread(still_encoder, catalogue, examples, tmp_path):
    rated = replace(
        examples,
        ratings=np.array([1, 2, 3, 4, 5, 4, 3, 2], np.float32),
        expected=np.full(8, 3.0, np.float32),
    )
    task = RatingTask(RatingSettings(encoder=str(still_encoder)), catalogue, rated)
    model = task.build_model()
    torch.nn.init.zeros_(model.classifier.weight)
    # A model that says 0 everywhere is wrong by the spread, and where the mean is 3, by 1 · σ².
    assert task.loss(model, task.batch(np.arange(8))).item() == pytest.approx(1.0, rel=1e-5)
    task.save(model, tmp_path)
    scale = RaterConfig.model_validate_json((tmp_path / RATER).read_bytes()).scale
    assert scale == pytest.approx(np.sqrt(12 / 8))
    assert Reranker.load(tmp_path, device="cpu").score(["space"], [["love"]])[0].tolist() == [0.0]


def test_reviews_are_read_behind_history_and_item(still_encoder, catalogue, examples):
    read = np.full((8, 2, 2), -1, np.int32)
    read[0] = [[1, -1], [0, 2]]
    rated = replace(
        examples,
        ratings=np.ones(8, np.float32),
        expected=np.zeros(8, np.float32),
        reviews=read,
        review_texts=("love it", "so  long", "a good night!"),
    )
    settings = RatingSettings(encoder=str(still_encoder), num_reviews=2)
    task = RatingTask(settings, catalogue, rated)
    first, second = task.describe(np.array([0, 1]))
    assert first["history"].endswith(". so long.")
    assert first["item"].endswith(". love it. a good night!")
    bare = RatingTask(settings, catalogue, replace(rated, reviews=None)).describe(np.array([1]))[0]
    assert second == bare
