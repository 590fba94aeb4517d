"""The command of a report, and that of a job: what they name makes the same settings again."""

from __future__ import annotations

import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.harness.command import command_of, run_job
from benchmarks.ranking import RankingBenchmark
from fusionrec.config import parse
from fusionrec.data.splits import Protocol
from fusionrec.errors import FusionRecError


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


def test_a_job_has_the_settings_that_it_is_given(monkeypatch: pytest.MonkeyPatch):
    config = RankingBenchmark(data=Path("raw"), protocols=tuple(Protocol), text=False)
    status, commands = [0, 1], []

    def started(words: list[str], **_: object) -> subprocess.CompletedProcess[bytes]:
        commands.append(words)
        return subprocess.CompletedProcess(words, status.pop(0))

    monkeypatch.setattr(subprocess, "run", started)
    run_job("benchmarks.ranking", data="raw", protocols=tuple(Protocol), text=False)
    assert commands[0][:3] == [sys.executable, "-m", "benchmarks.ranking"]
    assert parse(RankingBenchmark, commands[0][3:]) == config
    with pytest.raises(FusionRecError, match=r"benchmarks.ranking failed: its reason stands above"):
        run_job("benchmarks.ranking")
