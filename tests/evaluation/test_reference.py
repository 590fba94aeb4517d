"""Figures of the shared data's README, and a second opinion, on real ratings."""

import json
import subprocess
import sys

import numpy as np
import pandas as pd
import pytest

from fusionrec.data.catalogue import Catalogue
from fusionrec.data.histories import Histories
from fusionrec.evaluation.metrics import METRICS
from fusionrec.evaluation.ranks import dense_ranks, full_ranks, list_ranks, seen_items
from fusionrec.evaluation.run import read_run, write_run


class MovieLens:
    """Leave-one-out on ml-latest-small, read with pandas and nothing of the library."""

    def __init__(self, folder):
        ids = pd.read_csv(folder / "movies.csv").movieId
        code = {movie: code for code, movie in enumerate(ids)}
        ratings = pd.read_csv(folder / "ratings.csv").sort_values("timestamp", kind="stable")
        rows = ratings.movieId.map(code).groupby(ratings.userId).apply(list)
        self.users = [str(user) for user in rows.index]
        self.histories = Histories.of([row[:-1] for row in rows])
        self.targets = Histories.of([row[-1:] for row in rows])
        self.num_items = len(ids)
        train = np.concatenate([row[:-2] for row in rows])
        self.counts = np.bincount(train, minlength=self.num_items)
        blank = ("",) * self.num_items
        self.catalogue = Catalogue(
            tuple(str(i) for i in ids), blank, blank, ((),) * self.num_items, blank
        )


class Popularity:
    def __init__(self, counts):
        self.counts = counts.astype(np.float32)

    def score(self, _histories, candidates, /):
        return self.counts[candidates]


@pytest.fixture(scope="module")
def movielens(shared_data):
    return MovieLens(shared_data / "ml-latest-small")


def test_popularity_has_the_figures_of_the_readme(movielens):
    ranks = full_ranks(
        Popularity(movielens.counts), movielens.histories, movielens.targets, movielens.num_items
    )
    assert METRICS["hr"](ranks, 10).mean() == pytest.approx(0.0377, abs=5e-5)
    assert METRICS["ndcg"](ranks, 10).mean() == pytest.approx(0.0178, abs=5e-5)


def test_an_independent_program_agrees_on_an_exported_run(movielens, tmp_path, shared_data):
    tool = shared_data.parent / "tools" / "score_run.py"
    # No ties: the program reads whole ranks, and whoever writes a run has broken its ties.
    scores = (movielens.counts + np.linspace(0, 0.5, movielens.num_items)).astype(np.float32)
    dense = np.tile(scores, (len(movielens.users), 1))
    expected = dense_ranks(dense, movielens.histories, movielens.targets)
    dense[movielens.histories.rows, movielens.histories.items] = -np.inf
    items = np.argsort(-dense, axis=1)[:, :150].astype(np.int32)
    write_run(
        tmp_path / "run.parquet",
        movielens.users,
        items,
        np.take_along_axis(dense, items, axis=1),
        movielens.catalogue,
    )
    answer = subprocess.run(
        [sys.executable, tool, shared_data / "ml-latest-small", tmp_path / "run.parquet"],
        capture_output=True,
        text=True,
        check=True,
    )
    theirs = json.loads(answer.stdout)
    lists = read_run(tmp_path / "run.parquet", movielens.users, movielens.catalogue)
    ranks = list_ranks(lists.items, lists.scores, movielens.targets)
    assert theirs["users"] == 610
    assert theirs["missing_users"] == 0
    assert theirs["seen_items"] == seen_items(lists.items, movielens.histories) == 0
    for ours in (expected, ranks):
        assert METRICS["hr"](ours, 10).mean() == pytest.approx(theirs["hr@10"], abs=6e-6)
        assert METRICS["ndcg"](ours, 10).mean() == pytest.approx(theirs["ndcg@10"], abs=6e-6)
