"""On a cluster a campaign spreads: what it evaluates, it evaluates on every node."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tuning import history


@pytest.mark.slow
def test_trials_run_on_both_nodes(fitted, synthetic, tmp_path):
    (tmp_path / "notes").mkdir()
    pipeline = shutil.copytree(fitted, tmp_path / "pipeline")
    script = Path(__file__).with_name("two_nodes.py")
    command = [sys.executable, script, pipeline, synthetic.directory, tmp_path / "out"]
    done = subprocess.run(
        [*map(str, command), str(tmp_path / "notes")],
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
