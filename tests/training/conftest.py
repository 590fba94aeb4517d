import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.harness.processes import free_port
from fusionrec.config import parse
from fusionrec.training.config import TrainingConfig
from jobs.finetune import FinetuneConfig
from tests.training.tiny import write_dataset

RANK = Path(__file__).with_name("rank.py")


class Workers:
    """Runs scenarios (see rank.py) in processes, by default two, that talk gloo."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory

    def run(self, *scenarios: dict, count: int = 2, may_die: bool = False) -> list[dict]:
        """The answers of rank 0; the last scenario has none where it ended in a kill."""
        port = free_port()
        answers = []
        for number, scenario in enumerate(scenarios):
            answers.append(self.directory / f"answer-{port}-{number}")
            scenario["answer"] = str(answers[-1])
        file = self.directory / f"scenarios-{port}.json"
        file.write_text(json.dumps(scenarios))
        shared = {
            "WORLD_SIZE": str(count),
            "LOCAL_WORLD_SIZE": str(count),
            "MASTER_ADDR": "127.0.0.1",
        }
        shared |= {"MASTER_PORT": str(port), "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"}
        logs = [self.directory / f"log-{port}-{rank}.txt" for rank in range(count)]
        processes = []
        for rank, log in enumerate(logs):
            own = {"RANK": str(rank), "LOCAL_RANK": str(rank)}
            with log.open("wb") as stream:
                processes.append(
                    subprocess.Popen(
                        [sys.executable, str(RANK), str(file)],
                        env=os.environ | shared | own,
                        stdout=stream,
                        stderr=subprocess.STDOUT,
                    )
                )
        try:
            # The last is the one that is killed; its peer may wait for it for minutes.
            status = processes[-1].wait(timeout=300 + 15 * len(scenarios))
            if may_die:
                assert status == -9, logs[-1].read_text()[-3000:]
                answers.pop()
            else:
                assert status == 0, logs[-1].read_text()[-3000:]
                assert processes[0].wait(timeout=60) == 0, logs[0].read_text()[-3000:]
        finally:
            for process in processes:
                process.kill()
                process.wait()
        return [json.loads(answer.with_suffix(".0.json").read_text()) for answer in answers]

    def peaks(self, first: dict, variants: dict, count: int) -> dict[str, int]:
        """{name: bytes that each of ``variants``, {name: scenario}, took at its peak}.

        A process runs those of ``first`` before any: what libraries make once is in theirs. What
        changes the allocator for as long as a process lives has one of its own.
        """
        found = {}
        for sparing in (False, True):
            chosen = {
                name: scenario
                for name, scenario in variants.items()
                if TrainingConfig(**scenario["config"]).is_sparing is sparing
            }
            if not chosen:
                continue
            scenarios = {f"first {name}": s for name, s in first.items()} | chosen
            asked = [
                scenario | {"directory": str(self.directory / f"{count} {sparing} {name}")}
                for name, scenario in scenarios.items()
            ]
            answers = dict(zip(scenarios, self.run(*asked, count=count), strict=True))
            found |= {name: answers[name]["result"]["peak_memory_bytes"] for name in chosen}
        return found


@pytest.fixture(scope="module")
def workers(tmp_path_factory: pytest.TempPathFactory) -> Workers:
    return Workers(tmp_path_factory.mktemp("workers"))


@pytest.fixture(scope="module")
def dataset(tmp_path_factory) -> Path:
    """Twelve users with eight random events each, twenty items with titles."""
    return write_dataset(tmp_path_factory.mktemp("data") / "dataset", None)


@pytest.fixture
def configure(dataset, tiny_encoder, tmp_path):
    def make(task: str, *flags: str, out: Path = tmp_path / "run") -> FinetuneConfig:
        common = ["--dataset", str(dataset), "--out", str(out), "--encoder", str(tiny_encoder)]
        small = ["--max-tokens", "48", "--num-threads", "1", "--report-every", "1"]
        return parse(FinetuneConfig, ["--task", task, *common, *small, *flags])

    return make
