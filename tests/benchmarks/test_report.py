import json
from pathlib import Path

import numpy as np
import pytest

from benchmarks.harness.material import NEWEST, write_requests
from benchmarks.harness.report import (
    Claim,
    Sample,
    Samples,
    claims,
    keepers,
    plot,
    write,
)
from benchmarks.serving import ServingBenchmark
from fusionrec.data.catalogue import Catalogue
from fusionrec.serving.schemas import parse_request

RATES = {  # by system and connections, of three repetitions
    ("a", "bare, 1 thread", 1): (50, 50, 50),
    ("a", "bare, 1 thread", 32): (100, 110, 90),
    ("a", "bare, 2 threads", 32): (200, 210, 190),
    ("b", "FastAPI", 32): (100, 100, 110),
    ("c", "obvious", 32): (50, 40, 50),
    ("d", "endpoint, 1 a stage", 1): (40, 40, 40),
    ("d", "endpoint, 1 a stage", 32): (90, 90, 90),
    ("d", "endpoint, 2 a stage", 32): (120, 90, 110),
}


def samples(kind: str) -> list[Sample]:
    return [
        Sample(
            kind=kind,
            letter=letter,
            system=system,
            connections=connections,
            repetition=repetition,
            rate=rate,
            offered=rate * 0.8,
            p50_ms=1e3 / rate,
            p95_ms=2e3 / rate,
            p99_ms=3e3 / rate,
            generator_us=40.0,
            failed=0,
            degraded=1,
            rss_mib=100.0,
            cpu_ms_by={"Retriever": 5.0, "raylet": 0.04, "Gateway": repetition},
            idle=0.12,
        )
        for (letter, system, connections), rates in RATES.items()
        for repetition, rate in enumerate(rates)
    ]


ONE, TWO = "endpoint, 1 a stage", "endpoint, 2 a stage"


def test_each_configuration_is_held_to_the_best_of_the_others_by_repetition():
    found = claims(Samples([*samples("plain"), *samples("reranked")]))
    by_text = {claim.text: claim for claim in found if claim.system == TWO}
    peer, obvious, bare = by_text.values()
    assert peer.ratios == pytest.approx((1.2, 0.9, 1.0))
    assert peer.holds  # the median is 1.0
    assert obvious.ratios == pytest.approx((2.4, 2.25, 2.2))
    assert not obvious.holds
    assert "bare on all cores" in bare.text
    assert bare.ratios == pytest.approx((0.6, 90 / 210, 110 / 190))
    assert not bare.holds
    [p50] = [claim for claim in found if "p50" in claim.text]  # of two a stage it was not taken
    assert p50.system == ONE
    assert p50.ratios == pytest.approx((1.25, 1.25, 1.25))
    assert p50.holds


def test_without_a_system_there_is_no_claim_about_it():
    assert claims(Samples([s for s in samples("plain") if s.letter == "d"])) == []
    assert not Claim(ONE, "p50", (2.0, 2.1, 2.5), bound=2.0, at_least=False).holds


def test_only_who_holds_everything_at_once_is_said_to():
    def claim(system: str, text: str, ratio: float) -> Claim:
        return Claim(system, text, (ratio,), bound=1.0, at_least=True)

    best_in_turn = [claim(ONE, "x", 1), claim(ONE, "y", 0), claim(TWO, "x", 0), claim(TWO, "y", 1)]
    assert keepers(best_in_turn) == []
    assert keepers([*best_in_turn[:1], claim(ONE, "y", 2), *best_in_turn[2:]]) == [ONE]
    assert keepers([claim(ONE, "x", 1), claim(TWO, "x", 1), claim(TWO, "y", 1)]) == [TWO]


def test_a_report(tmp_path: Path):
    path, held = write(tmp_path, samples("plain"), "Hardware: a machine.", ServingBenchmark())
    text = path.read_text()
    assert len(held) == 5
    assert "| (d) endpoint, 2 a stage |  | 110.0 [90.0, 120.0] |" in text
    assert f"| of (d) | bound | {ONE} | {TWO} |" in text
    assert (
        "| plain, 32 connections: requests/s to best (c) | ≥ 3 | **1.80 [1.80, 2.25]** | "
        "**2.25 [2.20, 2.40]** |" in text
    )
    assert "| plain, 1 connection: p50 to bare | ≤ 2 | 1.25 [1.25, 1.25] |  |" in text
    assert "All at once is held by: none of them." in text
    assert f"| processes | obvious | {ONE} | {TWO} |" in text
    assert "| Gateway | 1.00 | 1.00 | 1.00 |\n| others | 0.04 | 0.04 | 0.04 |" in text
    assert "| while nobody asks, of a core | 12.0% | 12.0% | 12.0% |" in text
    assert "Hardware: a machine." in text
    assert f"{len(samples('plain'))} answers were degraded" in text
    assert len(json.loads(path.with_suffix(".json").read_text())) == len(samples("plain"))
    assert path.with_suffix(".svg").read_text().startswith("<?xml")


def test_a_plot_of_one_system(tmp_path: Path):
    plot(Samples([s for s in samples("plain") if s.system == "FastAPI"]), tmp_path / "plot.svg")
    assert (tmp_path / "plot.svg").stat().st_size > 1000


def test_no_two_requests_share_what_a_model_reads(tmp_path: Path):
    numbers = range(40)
    Catalogue(
        item_ids=tuple(f"i{n}" for n in numbers),
        titles=("",) * 40,
        texts=("",) * 40,
        categories=((),) * 40,
        domains=("",) * 40,
    ).save(tmp_path / "catalogue.parquet")
    np.save(tmp_path / "item_counts.npy", np.arange(40) ** 2)
    for name in ("one", "two"):
        write_requests(tmp_path, tmp_path / name, 3000, seed=5)
    assert (tmp_path / "one").read_bytes() == (tmp_path / "two").read_bytes()
    histories = [
        parse_request(line).history for line in (tmp_path / "one").read_bytes().splitlines()
    ]
    assert len(histories) == len({tuple(history[-NEWEST:]) for history in histories}) == 3000
    assert max(map(len, histories)) <= 30
