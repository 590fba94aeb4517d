"""The parts of the ranking benchmark, on problems with known answers."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from benchmarks.harness import recbole
from benchmarks.harness.ranking import ablation, audit, peers, with_ties_reversed
from fusionrec.data.dataset import Dataset, DatasetInfo, Events
from fusionrec.data.histories import Histories
from fusionrec.data.splits import Cases, Protocol, split
from fusionrec.evaluation.metrics import METRICS
from fusionrec.evaluation.significance import BootstrapConfig
from fusionrec.fusion.candidates import Candidates
from fusionrec.fusion.normalisation import Normalisation
from fusionrec.sources.protocol import TrainingData


def dataset(users: list[int], items: list[int], times: list[int]) -> Any:
    events = Events(
        users=np.array(users, np.int32),
        items=np.array(items, np.int32),
        timestamps=np.array(times, np.int64),
        values=np.full(len(users), np.nan, np.float32),
        user_ids=tuple(map(str, range(max(users) + 1))),
    )
    info = DatasetInfo(
        name="paper",
        format="table",
        fingerprint="0" * 64,
        num_interactions=len(users),
        num_users=len(events.user_ids),
        num_items=max(items) + 1,
    )
    return SimpleNamespace(events=events, info=info)


def test_the_audit_counts_ties_repetitions_and_cold_items():
    data = dataset(
        users=[0, 0, 0, 1, 1, 1, 2, 2, 2],
        items=[0, 1, 2, 0, 1, 0, 1, 0, 3],
        times=[1, 2, 2, 1, 2, 3, 5, 6, 7],
    )
    found = audit(data, split(data))
    assert found.tied_events == pytest.approx(2 / 9)
    assert found.tied_targets == pytest.approx(1 / 3)  # user 0
    assert found.repeated_targets == pytest.approx(1 / 3)  # user 1
    assert found.cold_targets == pytest.approx(2 / 3)  # items 2 and 3


def test_reversed_ties_change_targets_and_nothing_else():
    data = dataset(users=[0, 0, 0, 0], items=[0, 1, 2, 3], times=[1, 2, 3, 3])
    turned = with_ties_reversed(data, Protocol.LEAVE_ONE_OUT)
    assert split(data).test.targets.items.tolist() == [3]
    assert turned.test.targets.items.tolist() == [2]
    assert turned.test.histories.items.tolist() == [0, 1, 3]
    assert turned.train.items.tolist() == split(data).train.items.tolist()


def test_peers_find_what_goes_together_and_recommend_nothing_twice(synthetic: Dataset):
    parts = split(synthetic)
    before = parts.train.items.copy(), parts.test.histories.items.copy()
    for found, fit_s in peers(parts, seed=0):
        assert found.seen_items == 0, found.name
        assert fit_s > 0
        ndcg = METRICS["ndcg"](found.ranks, 10).mean()
        assert ndcg > 10 / parts.num_items, found.name  # chance finds k of I
    assert np.array_equal(parts.train.items, before[0])  # nobody has put them in another order
    assert np.array_equal(parts.test.histories.items, before[1])


@pytest.mark.slow
def test_recbole_learns_from_the_same_events_and_finds_what_goes_together(
    synthetic: Dataset, tmp_path: Path
):
    if not recbole.FOLDER.is_dir():
        pytest.skip(recbole.MISSING)
    parts = split(synthetic)
    found = recbole.recbole_peers(parts, tmp_path, minutes=1e-6, seed=0)
    assert len(found["SASRec"].epochs_s) == 1
    for name, least in (("EASE", 10), ("SASRec", 2)):
        measured = found[name].measured
        assert measured.seen_items == 0
        assert METRICS["ndcg"](measured.ranks, 10).mean() > least / parts.num_items, name


def test_epochs_are_told_over_the_same_events(synthetic: Dataset):
    parts = split(synthetic)
    data = TrainingData(synthetic.catalogue, parts.train, has_timestamps=True)
    told = recbole.epochs_told((1e6, 2e6, 3e6), data)
    assert f"over {len(parts.train.items):,} training events takes RecBole 2000000.0 [" in told
    assert told.endswith("0.000 of it. At most 0.1: held.\n")
    assert recbole.epochs_told((1e-6,), data).endswith("missed.\n")


def test_what_is_lost_without_a_source():
    """The first source knows the target, the second says nothing."""
    cases = 60
    generator = np.random.default_rng(0)
    items = np.tile(np.arange(20, dtype=np.int32), (cases, 1))
    targets = generator.integers(0, 20, cases)
    knows = generator.random((cases, 20), dtype=np.float32)
    knows[np.arange(cases), targets] += 1
    found = Candidates(items, np.stack([knows, np.zeros_like(knows)]), np.full(cases, 3))
    one = Histories.of([[target] for target in targets])
    part = Cases(np.arange(cases), Histories.of([[0]] * cases), one)
    pipeline: Any = SimpleNamespace(
        config=SimpleNamespace(sources=("knows", "silent")),
        item_counts=np.ones(20, np.int64),
        fusion=SimpleNamespace(normalisation=Normalisation.SCALE),
        embed=lambda histories: histories,
        candidates=lambda histories: found.take(np.arange(len(histories))),
    )
    parts: Any = SimpleNamespace(validation=part, test=part)
    knowing, silent = ablation(pipeline, parts, BootstrapConfig(draws=200))
    assert (knowing.source, silent.source) == ("knows", "silent")
    assert knowing.weight == 1
    assert knowing.lost.mean_a == 1
    assert knowing.lost.difference.low > 0.5
    assert silent.lost.difference.mean == 0
