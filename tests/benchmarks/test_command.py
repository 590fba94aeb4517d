"""The command of a report: what it names makes the same settings again."""

from __future__ import annotations

import shlex
from pathlib import Path

import pytest

from benchmarks.harness.command import command_of
from benchmarks.ranking import RankingBenchmark
from fusionrec.config import parse
from fusionrec.data.splits import Protocol


@pytest.mark.parametrize(
    "config",
    [
        RankingBenchmark(data=Path("raw")),
        RankingBenchmark(
            data=Path("raw"), protocols=(Protocol.LEAVE_ONE_OUT,), text=False, trials=7, seed=3
        ),
    ],
)
def test_the_command_makes_the_settings_again(config: RankingBenchmark):
    words = shlex.split(command_of("benchmarks.ranking", config))
    assert words[:3] == ["python", "-m", "benchmarks.ranking"]
    assert parse(RankingBenchmark, words[3:]) == config


def test_defaults_and_places_are_left_out():
    config = RankingBenchmark(data=Path("raw"), out=Path("elsewhere"))
    assert command_of("benchmarks.ranking", config) == "python -m benchmarks.ranking --data raw"
