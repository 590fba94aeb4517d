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
from fusionrec.fusion.model import Fusion, Segment
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
    """The first source knows the target, the second knows it of short histories, the third not."""
    cases = 60
    generator = np.random.default_rng(0)
    items = np.tile(np.arange(20, dtype=np.int32), (cases, 1))
    targets, lengths = generator.integers(0, 20, cases), np.repeat([1, 2], cases // 2)
    scores = generator.random((3, cases, 20), dtype=np.float32)
    scores[0, np.arange(cases), targets] += 1
    scores[1, np.arange(30), targets[:30]] += 1
    found = Candidates(items, scores, lengths)
    histories = Histories.of([[0] * length for length in lengths])
    part = Cases(np.arange(cases), histories, Histories.of([[target] for target in targets]))
    sources = ("knows", "short", "noise")
    pipeline: Any = SimpleNamespace(
        item_counts=np.ones(20, np.int64),
        fusion=Fusion(
            sources=sources,
            scales=dict.fromkeys(sources, 1.0),
            segments=tuple(
                Segment(max_events=longest, weights=dict(zip(sources, weights, strict=True)))
                for longest, weights in ((1, (0.5, 0.5, 0)), (None, (1, 0, 0.25)))
            ),
        ),
        embed=lambda histories: histories,
        candidates=lambda histories: found.take(np.arange(len(histories))),
    )
    parts: Any = SimpleNamespace(validation=part, test=part)
    left_out = ablation(pipeline, parts, BootstrapConfig(draws=200))
    assert [each.source for each in left_out] == list(sources)
    # Those served, of which each half of the cases has one: (0.75, 0.25, 0.125).
    assert [each.weight for each in left_out] == pytest.approx([1, 1 / 3, 1 / 6])
    knows, short, noise = (each.lost for each in left_out)
    served = [0.5 * scores[0, :30] + 0.5 * scores[1, :30], scores[0, 30:] + 0.25 * scores[2, 30:]]
    rank = (np.concatenate(served) > np.concatenate(served)[np.arange(cases), targets, None]).sum(1)
    gains = np.where(rank < 10, 1 / np.log2(rank + 2), 0)
    assert [each.mean_a for each in (knows, short, noise)] == pytest.approx([gains.mean()] * 3)
    assert knows.difference.low > 0.2  # half of the cases have no other that knows
    assert short.difference.mean == pytest.approx(0, abs=0.01)
    assert noise.difference.mean <= 0
