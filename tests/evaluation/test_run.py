import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from fusionrec.data.histories import Histories
from fusionrec.errors import DataError
from fusionrec.evaluation.metrics import METRICS
from fusionrec.evaluation.ranks import list_ranks
from fusionrec.evaluation.run import read_run, write_run

USERS = ["u1", "u2", "u3"]
ITEMS = np.array([[3, 1, 2], [4, -1, -1], [-1, -1, -1]], np.int32)
SCORES = np.array([[3.0, 2.0, 2.0], [1.0, 0, 0], [0, 0, 0]], np.float32)


def write(path, **columns):
    pq.write_table(pa.table(columns), path)
    return path


def test_round_trip(tmp_path, catalogue):
    path = tmp_path / "sub" / "run.parquet"
    write_run(path, USERS, ITEMS, SCORES, catalogue)
    assert pq.read_table(path).to_pylist() == [
        {"user_id": "u1", "item_id": "i3", "rank": 1, "score": 3.0},
        {"user_id": "u1", "item_id": "i1", "rank": 2, "score": 2.0},
        {"user_id": "u1", "item_id": "i2", "rank": 3, "score": 2.0},
        {"user_id": "u2", "item_id": "i4", "rank": 1, "score": 1.0},
    ]
    assert [p.name for p in path.parent.iterdir()] == ["run.parquet"]
    found = read_run(path, ["u2", "u1", "nobody"], catalogue)
    assert found.items.tolist() == [[4, -1, -1], [3, 1, 2], [-1, -1, -1]]
    # Only the order is kept, and that the last two are tied.
    assert found.scores[1].tolist() == [0, -1, -1]


def test_only_the_first_hundred_are_exported(tmp_path, catalogue):
    items = np.tile(np.arange(60, dtype=np.int32), (1, 2))[:, :110]
    write_run(tmp_path / "run.parquet", ["u"], items, items.astype(np.float32), catalogue)
    assert pq.read_table(tmp_path / "run.parquet")["rank"].to_pylist() == list(range(1, 101))


def test_ranks_survive_the_trip(tmp_path, catalogue):
    rng = np.random.default_rng(0)
    items = np.array([rng.permutation(60)[:40] for _ in range(50)], np.int32)
    scores = np.sort(rng.integers(0, 20, items.shape).astype(np.float32), axis=1)[:, ::-1].copy()
    targets = Histories.of([rng.permutation(60)[: 1 + b % 3] for b in range(50)])
    users = [f"u{b}" for b in range(50)]
    write_run(tmp_path / "run.parquet", users, items, scores, catalogue)
    found = read_run(tmp_path / "run.parquet", users, catalogue)
    np.testing.assert_array_equal(
        list_ranks(found.items, found.scores, targets).ranks,
        list_ranks(items, scores, targets).ranks,
    )


def test_a_run_without_scores_has_broken_its_ties(tmp_path, catalogue):
    path = write(
        tmp_path / "run.parquet",
        user_id=["u1", "u1", "u1"],
        item_id=["i5", "i6", "i7"],
        rank=pa.array([3, 1, 2], pa.int64()),
    )
    found = read_run(path, USERS, catalogue)
    assert found.items[0].tolist() == [6, 7, 5]
    assert found.scores[0].tolist() == [0, -1, -2]


def test_dictionary_encoded_and_numeric_ids_are_read(tmp_path, catalogue):
    path = write(
        tmp_path / "run.parquet",
        user_id=pa.array([7]),
        item_id=pa.array(["i5"]).dictionary_encode(),
        rank=[1],
        score=pa.array([None], pa.float64()),
    )
    assert read_run(path, ["7"], catalogue).items.tolist() == [[5]]


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"user_id": ["u1"], "rank": [1]}, "has no column item_id; it has user_id, rank"),
        ({"user_id": ["x"], "item_id": ["i1"], "rank": [1]}, "none of the 3 users"),
        ({"user_id": ["u1"], "item_id": ["x"], "rank": [1]}, "column item_id has 'x'"),
        ({"user_id": ["u1"], "item_id": ["i1"], "rank": ["first"]}, "column rank is string"),
        ({"user_id": ["u1"], "item_id": [None], "rank": [1]}, "item_id has an empty value"),
        (
            {"user_id": ["u1", "u1"], "item_id": ["i1", "i1"], "rank": [1, 2]},
            "user 'u1' the same item twice",
        ),
        (
            {"user_id": ["u1", "u1"], "item_id": ["i1", "i2"], "rank": [1, 1]},
            "user 'u1' the same rank twice",
        ),
    ],
)
def test_mistakes_are_one_sentence(tmp_path, catalogue, columns, message):
    path = write(tmp_path / "run.parquet", **columns)
    with pytest.raises(DataError, match=message):
        read_run(path, USERS, catalogue)


def test_no_run_at_all(tmp_path, catalogue):
    with pytest.raises(DataError, match="cannot be read"):
        read_run(tmp_path / "missing.parquet", USERS, catalogue)
    (tmp_path / "text.parquet").write_text("user_id,item_id,rank\n")
    with pytest.raises(DataError, match="not Parquet"):
        read_run(tmp_path / "text.parquet", USERS, catalogue)


def test_an_independent_program_scores_the_run_alike(tmp_path, shared_data, catalogue):
    """The shared score_run.py, on a made-up data set in one of the formats that it reads."""
    tool = shared_data.parent / "tools" / "score_run.py"
    if not tool.is_file():
        pytest.skip(f"{tool} not found")
    rng = np.random.default_rng(4)
    sequences = [rng.permutation(60)[: rng.integers(4, 9)] for _ in range(80)]
    folder = tmp_path / "raw"
    folder.mkdir()
    (folder / "events.txt").write_text(
        "".join(
            f"u{b} " + " ".join(f"i{code}" for code in row) + "\n"
            for b, row in enumerate(sequences)
        )
    )
    items = np.full((80, 30), -1, np.int32)
    for b, row in enumerate(sequences):
        new = [code for code in rng.permutation(60) if code not in row[:-1]]
        items[b] = new[:30]
    items[:5] = -1  # users without any recommendation
    scores = np.where(items >= 0, -np.arange(30.0), 0).astype(np.float32)
    users = [f"u{b}" for b in range(80)]
    write_run(tmp_path / "run.parquet", users, items, scores, catalogue)
    answer = subprocess.run(
        [sys.executable, Path(tool), folder, tmp_path / "run.parquet"],
        capture_output=True,
        text=True,
        check=True,
    )
    theirs = json.loads(answer.stdout)
    ranks = list_ranks(items, scores, Histories.of([row[-1:] for row in sequences]))
    assert theirs["missing_users"] == 5
    assert theirs["seen_items"] == 0
    assert theirs["hr@10"] == pytest.approx(METRICS["hr"](ranks, 10).mean(), abs=1e-5)
    assert theirs["ndcg@10"] == pytest.approx(METRICS["ndcg"](ranks, 10).mean(), abs=1e-5)
