from itertools import permutations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fusionrec.data.histories import Histories
from fusionrec.evaluation.ranks import (
    Ranks,
    dense_ranks,
    full_ranks,
    hit_lists,
    list_ranks,
    seen_items,
)


def ranks_of(scores, history, *targets):
    found = dense_ranks(
        np.array([scores], dtype=np.float32), Histories.of([history]), Histories.of([targets])
    )
    return found.ranks.tolist()


def test_one_more_than_the_items_scored_higher():
    assert ranks_of([0.1, 0.9, 0.5], [], 1) == [1]
    assert ranks_of([0.1, 0.9, 0.5], [], 2) == [2]
    assert ranks_of([0.1, 0.9, 0.5], [], 0) == [3]


def test_a_tied_block_gives_its_mean_rank_and_not_its_first():
    assert ranks_of([5, 1, 1, 1, 0], [], 2) == [3]
    assert ranks_of([1, 1], [], 0) == [1.5]


def test_a_source_that_scores_everything_alike_gains_nothing():
    # The optimistic rule would put every target on rank 1.
    assert ranks_of(np.zeros(1001), [], 17) == [501]


def test_the_items_of_the_history_are_excluded():
    assert ranks_of([3, 2, 1], [0], 1) == [1]
    assert ranks_of([3, 2, 2, 1], [0, 1], 2) == [1]


def test_a_target_in_the_history_is_not_ranked():
    assert ranks_of([3, 2, 1], [0], 0) == [np.inf]
    assert ranks_of([3, 2, 1], [0, 1, 2], 1) == [np.inf]


def test_minus_infinity_is_not_ranked():
    assert ranks_of([3, -np.inf, -np.inf], [], 1) == [np.inf]


def test_targets_of_one_block_share_it_out():
    # Two of the three places 1, 2, 3 at random: on average they are 4/3 and 8/3.
    assert ranks_of([1, 1, 1], [], 0, 2) == pytest.approx([4 / 3, 8 / 3])
    assert ranks_of([1, 1, 1], [], 0, 1, 2) == [1, 2, 3]


def test_several_targets_of_several_cases():
    scores = np.array([[4, 3, 2, 1], [1, 2, 3, 4]], dtype=np.float32)
    found = dense_ranks(scores, Histories.of([[0], []]), Histories.of([[3, 1], [0]]))
    assert found.ranks.tolist() == [3, 1, 4]
    assert found.offsets.tolist() == [0, 2, 3]
    assert found.where(np.array([True, False, False])).ranks.tolist() == [3]
    assert found.where(np.array([False, True, True])).offsets.tolist() == [0, 1, 2]


def test_scores_are_left_as_they_were():
    scores = np.ones((1, 3), dtype=np.float32)
    scores.flags.writeable = False
    dense_ranks(scores, Histories.of([[0]]), Histories.of([[1]]))
    assert scores.all()


def test_nan_is_refused():
    with pytest.raises(AssertionError, match="NaN"):
        ranks_of([1, np.nan], [], 0)


def test_no_cases():
    empty = Histories.of([])
    assert len(dense_ranks(np.empty((0, 4), np.float32), empty, empty)) == 0


class TestLists:
    def rank(self, items, scores, *targets):
        found = list_ranks(
            np.array([items], np.int32), np.array([scores], np.float32), Histories.of([targets])
        )
        return found.ranks.tolist()

    def test_a_target_outside_the_list_has_no_rank(self):
        assert self.rank([5, 7, 9], [3, 2, 1], 7, 8) == [2, np.inf]

    def test_padding_is_no_item(self):
        assert self.rank([5, 7, -1, -1], [-3, -4, 0, 0], 7) == [2]
        assert self.rank([-1, -1], [0, 0], 7) == [np.inf]
        assert self.rank([], [], 7) == [np.inf]

    def test_ties_have_their_mean_rank(self):
        assert self.rank([5, 7, 9, 11], [3, 1, 1, 0], 7) == [2.5]

    def test_seen_items_are_counted(self):
        items = np.array([[1, 2, -1], [0, 1, 2]], np.int32)
        assert seen_items(items, Histories.of([[2], [7, 0, 2]])) == 3
        assert seen_items(items, Histories.of([[], []])) == 0


@st.composite
def problems(draw, most_items=12):
    num_cases, num_items = draw(st.integers(1, 4)), draw(st.integers(2, most_items))
    levels = draw(st.integers(1, 3))  # few levels: many ties
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    scores = rng.integers(levels, size=(num_cases, num_items)).astype(np.float32)
    histories = [rng.permutation(num_items)[: rng.integers(0, 3)] for _ in scores]
    targets = [rng.permutation(num_items)[: rng.integers(1, num_items)] for _ in scores]
    return scores, histories, targets, rng


@given(problems(most_items=5))
@settings(max_examples=40, deadline=None)
def test_ranks_are_the_mean_over_all_ways_to_break_the_ties(problem):
    scores, histories, targets, _ = problem
    found = dense_ranks(scores, Histories.of(histories), Histories.of(targets))
    for b, (row, history, wanted) in enumerate(zip(scores, histories, targets, strict=True)):
        mine = np.sort(found.ranks[found.offsets[b] : found.offsets[b + 1]])
        ranked = [item for item in wanted if item not in history]
        assert np.isinf(mine[len(ranked) :]).all()
        places = []
        for tie_break in permutations(range(len(row))):
            order = [item for item in np.lexsort((tie_break, -row)) if item not in history]
            places.append(sorted(order.index(item) + 1 for item in ranked))
        np.testing.assert_allclose(mine[: len(ranked)], np.mean(places, axis=0))
        # At least 1 apart, so that no metric can leave [0, 1].
        assert (np.diff(mine[: len(ranked)]) >= 1 - 1e-9).all()


@given(problems())
@settings(max_examples=60, deadline=None)
def test_a_list_of_everything_ranks_like_the_dense_scores(problem):
    scores, _, targets, rng = problem
    order = np.array([rng.permutation(scores.shape[1]) for _ in scores])
    wanted = Histories.of(targets)
    listed = list_ranks(order.astype(np.int32), np.take_along_axis(scores, order, 1), wanted)
    dense = dense_ranks(scores, Histories.of([[]] * len(scores)), wanted)
    np.testing.assert_allclose(listed.ranks, dense.ranks)


class Recency:
    """Scores an item by its code, and counts how it was asked."""

    def __init__(self):
        self.blocks = []

    def score(self, _histories, candidates, /):
        self.blocks.append(candidates.shape)
        return candidates.astype(np.float32) % 7


def test_the_catalogue_is_scored_in_blocks_of_bounded_size():
    rng = np.random.default_rng(0)
    histories = Histories.of([rng.permutation(50)[:3] for _ in range(101)])
    targets = Histories.of([rng.permutation(50)[: 1 + b % 3] for b in range(101)])
    small, large, advanced = Recency(), Recency(), []
    blocks = full_ranks(
        small, histories, targets, 50, block_bytes=50 * 4 * 10, advance=advanced.append
    )
    whole = full_ranks(large, histories, targets, 50)
    assert small.blocks == [(10, 50)] * 10 + [(1, 50)]
    assert large.blocks == [(101, 50)]
    assert sum(advanced) == 101
    np.testing.assert_array_equal(blocks.ranks, whole.ranks)


def test_ranks_from_nested_lists():
    ranks = Ranks.of([[1, np.inf], [2.5]])
    assert ranks.rows.tolist() == [0, 0, 1]
    assert ranks.lengths.tolist() == [2, 1]
    with pytest.raises(AssertionError):
        Ranks.of([[0.5]])


def test_lists_that_hold_a_target():
    items = np.array([[3, 1, -1], [2, 0, 4], [5, -1, -1], [6, 7, 8]], dtype=np.int32)
    targets = Histories.of([[1], [3], [5, 9], [8, 6]])
    assert hit_lists(items, targets).tolist() == [0, 2, 3]
