"""The first command on a fresh machine: what it refuses, and in how much time."""

import ast
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def checkout(tmp_path) -> Path:
    """The few files that the bootstrap reads, without an environment."""
    for name in ("jobs/bootstrap.py", "Makefile", "pyproject.toml", "constraints.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        shutil.copy(ROOT / name, tmp_path / name)
    return tmp_path


def bootstrap(checkout: Path, *prelude: str, **environment: str) -> str:
    """Run it after ``prelude``, which stands for another machine; it must refuse, and at once."""
    code = [*prelude, "import runpy", "runpy.run_path('jobs/bootstrap.py', run_name='__main__')"]
    start = time.monotonic()
    done = subprocess.run(
        [sys.executable, "-c", "\n".join(code)],
        cwd=checkout,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=20,
    )
    assert done.returncode == 1, done.stderr
    assert time.monotonic() - start < 5
    assert not (checkout / ".venv").exists()
    assert "Traceback" not in done.stderr
    return done.stderr


def test_syntax_is_read_by_old_interpreters():
    ast.parse((ROOT / "jobs" / "bootstrap.py").read_text(), feature_version=(3, 6))


def test_old_python(checkout):
    prelude = ["import sys", "sys.version_info = (3, 8, 18, 'final', 0)"]
    message = bootstrap(checkout, *prelude)
    assert "Python 3.8.18 is too old" in message
    assert "make PYTHON=python3.11" in message


def test_missing_compiler_and_git(checkout, tmp_path):
    message = bootstrap(checkout, PATH=str(tmp_path), CXX="c++")
    assert "no C++ compiler" in message
    assert "apt install g++" in message
    assert "apt install git" in message


def test_full_disk(checkout):
    prelude = [
        "import shutil",
        "shutil.disk_usage = lambda path: shutil._ntuple_diskusage(10**11, 10**11 - 10**8, 10**8)",
    ]
    message = bootstrap(checkout, *prelude)
    assert "0.1 GB free and 10 GB are needed" in message


def test_python_without_venv(checkout):
    prelude = [
        "import importlib.util",
        "find = importlib.util.find_spec",
        "without = lambda name, *a: None if name == 'ensurepip' else find(name, *a)",
        "importlib.util.find_spec = without",
    ]
    assert "apt install python3" in bootstrap(checkout, *prelude)


def test_make_names_a_python_that_is_not_there(checkout):
    done = subprocess.run(
        ["make", "test", "PYTHON=python3.absent"], cwd=checkout, capture_output=True, text=True
    )
    assert done.returncode == 2
    assert "no python3.absent" in done.stderr


def test_help_lists_every_target():
    done = subprocess.run(["make"], cwd=ROOT, capture_output=True, text=True, check=True)
    for target in ("quickstart", "check", "test", "bench", "serve"):
        assert f"make {target} " in done.stdout


def test_nothing_is_done_twice(checkout):
    """With a stamp that matches, the command ends at once and installs nothing."""
    (checkout / ".venv" / "bin").mkdir(parents=True)
    (checkout / ".venv" / "bin" / "python").symlink_to(sys.executable)
    code = "import runpy; print(runpy.run_path('jobs/bootstrap.py')['fingerprint']())"
    command = [sys.executable, "-c", code]
    stamp = subprocess.run(command, cwd=checkout, capture_output=True, text=True, check=True)
    (checkout / ".venv" / "installed.sha256").write_text(stamp.stdout.strip())
    command = [sys.executable, "jobs/bootstrap.py"]
    done = subprocess.run(command, cwd=checkout, capture_output=True, text=True, timeout=20)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_an_installation_that_fails_leaves_no_stamp(checkout):
    """Even where the last one that was good had left the same stamp."""
    (checkout / ".venv" / "bin").mkdir(parents=True)
    for name in ("python", "pip"):
        (checkout / ".venv" / "bin" / name).symlink_to("/bin/false")
    stamp = checkout / ".venv" / "installed.sha256"
    stamp.write_text("of other pins")
    code = "import runpy; runpy.run_path('jobs/bootstrap.py')['install']('new')"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=checkout, capture_output=True, text=True
    )
    assert "pip ended with status 1" in done.stderr
    assert not stamp.exists()
