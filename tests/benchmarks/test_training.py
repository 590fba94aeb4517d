"""The parts of the benchmarks of training and fine-tuning, on problems with known answers."""

import numpy as np
import pytest

from benchmarks.harness.reranking import Lists, by_length
from benchmarks.harness.training import Sample, rates_table, stages_table
from benchmarks.peers import trainer
from benchmarks.training import claims
from fusionrec.data.histories import Histories
from fusionrec.data.splits import Cases
from fusionrec.evaluation.significance import BootstrapConfig
from fusionrec.fusion.model import Fused


def sample(system: str, repetition: int, rate: float, loss: float, threads: int = 2) -> Sample:
    return Sample(
        kind="encoder",
        system=system,
        precision="fp32",
        workers=1,
        threads=threads,
        repetition=repetition,
        rate=rate,
        seconds=32 / rate,
        cpu_ms=60.0,
        stages={"forward": 0.5, "rest": 0.25},
        loss_before=3.0,
        loss_after=loss,
        losses=(3.0, 2.5),
    )


SAMPLES = [
    sample("engine", 0, 30, 2.0),
    sample("sentence-transformers", 0, 20, 2.0),
    sample("engine", 0, 99, 2.0, threads=1),
    sample("engine", 1, 26, 2.2),
    sample("sentence-transformers", 1, 20, 2.0),
]


def test_claims_are_ratios_within_a_round_at_the_same_cores():
    speed, loss = claims(SAMPLES, "fp32")
    assert speed.ratios == pytest.approx((1.5, 1.3))
    assert loss.ratios == pytest.approx((1.0, 1.1))
    assert speed.holds
    assert not loss.holds
    assert claims(SAMPLES, "bf16") == []


def test_tables_tell_medians_and_spreads():
    rates = rates_table(SAMPLES, tokens=50)
    assert (
        "| engine | fp32 | 1 × 2 | 28.0 [26.0, 30.0] | 1400 [1300, 1500] | 60.0 [60.0, 60.0] |"
        in rates
    )
    assert "| engine | fp32 | 1 × 2 | 0 | 500 | 0 | 0 | 250 |" in stages_table(SAMPLES)


def test_the_clock_leaves_the_warm_up_out(monkeypatch):
    now = iter([0.0, 0.5, 1.0, 10.0, 11.0, 13.0, 20.0, 24.0, 30.0])
    monkeypatch.setattr(trainer.time, "perf_counter", lambda: next(now))
    monkeypatch.setattr(trainer.time, "process_time", iter([2.0, 3.0, 5.0]).__next__)
    clock = trainer.Clock(warm_up=1)
    forward = clock.timed("forward", lambda: None)
    forward()  # 0.0–0.5
    clock.step()  # 1.0
    for _ in range(2):  # 10–11, 13; 20–24, 30
        forward()
        clock.step()
    found = clock.summary()
    assert found["seconds_a_step"] == pytest.approx((30 - 1) / 2)
    assert found["cpu_seconds_a_step"] == pytest.approx(1.5)
    assert found["stages"] == pytest.approx({"forward": 2.5, "rest": 12.0})


def test_the_reranker_is_weighed_on_one_part_and_told_by_length_of_another():
    # Two cases, whose answers the fusion has second and the reranker first, and first and last.
    items = np.array([[0, 1, 2], [0, 1, 2]], dtype=np.int32)
    terms = np.array([[[3.0, 2.0, 1.0]], [[3.0, 2.0, 1.0]]], dtype=np.float32)
    fused = Fused(items, terms[:, 0], terms, ("popularity",))
    scores = np.array([[0.0, 1.0], [0.0, 1.0]], dtype=np.float32)

    def lists(first: int, second: int) -> Lists:
        histories, targets = Histories.of([[3], [3] * 20]), Histories.of([[first], [second]])
        return Lists(Cases(np.arange(2), histories, targets), (fused,), (scores,))

    assert lists(1, 1).spread == pytest.approx(1.0)
    config = BootstrapConfig(draws=100)
    weight, rows = by_length(lists(1, 1), lists(1, 0), config, 10)
    assert weight == 1.5  # the first of the grid that lifts the second item above the first
    second = 1 / np.log2(3)
    assert [row[:4] for row in rows] == [
        ("all", "2", f"{(1 + second) / 2:.4f}", f"{(1 + second) / 2:.4f}"),
        ("1–4", "1", f"{second:.4f}", "1.0000"),
        ("20–49", "1", "1.0000", f"{second:.4f}"),
    ]
