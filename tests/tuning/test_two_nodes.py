"""On a cluster a campaign spreads: what it evaluates, it evaluates on every node."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tuning import history

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.slow
def test_trials_run_on_both_nodes(fitted, synthetic, tmp_path):
    (tmp_path / "notes").mkdir()
    pipeline = shutil.copytree(fitted, tmp_path / "pipeline")
    places = (pipeline, synthetic.directory, tmp_path / "out", tmp_path / "notes")
    done = subprocess.run(
        [sys.executable, "-m", "tests.tuning.two_nodes", *map(str, places)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=500,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    evaluated = {path.name: path.read_text().split() for path in (tmp_path / "notes").iterdir()}
    assert len(evaluated) == 2, done.stderr
    assert sum(int(size) for sizes in evaluated.values() for size in sizes) == 200
    found = history.read(tmp_path / "out", "fusion", "ndcg")
    assert len(found.trials) == 200
    assert (pipeline / "fusion.json").is_file()
