"""What must hold of the repository's shape."""

import re
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from hatchling.builders.wheel import WheelBuilder

ROOT = Path(__file__).resolve().parents[1]


def tracked() -> list[Path]:
    """The files of the project, as git lists them: also new ones, not the ignored."""
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard", "-z"]
    names = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    return [path for name in names.split("\0") if name and (path := ROOT / name).is_file()]


@pytest.fixture(scope="module")
def files() -> list[Path]:
    return tracked()


def test_platform_is_a_source_root_and_nothing_else():
    # With an __init__.py, the root on sys.path would shadow the standard library's module.
    entries = {entry.name for entry in (ROOT / "platform").iterdir()} - {"__pycache__"}
    assert entries == {"fusionrec"}
    code = "import platform; print(platform.system())"
    found = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert found.stdout.strip() == sys.platform.capitalize().removesuffix("32")


def test_a_file_is_one_idea(files):
    lengths = {
        str(path.relative_to(ROOT)): len(path.read_text(encoding="utf-8").splitlines())
        for path in files
        if path.suffix == ".py"
    }
    assert {name: length for name, length in lengths.items() if length > 400} == {}


def test_the_library_has_a_docstring_in_every_module(files):
    for path in files:
        if path.suffix == ".py" and path.is_relative_to(ROOT / "platform"):
            assert path.read_text(encoding="utf-8").startswith(('"""', 'r"""')), path


def test_no_file_knows_the_machine_it_was_written_on(files):
    known = re.compile(rb"/work/|/home/(?!ray/)[a-z]+/|/root/|/Users/")
    for path in files:
        if path != Path(__file__):
            found = known.search(path.read_bytes())
            assert not found, f"{path}: {found.group()!r}"


def test_nothing_is_pickled(files):
    # Artifacts come from elsewhere sooner or later, and loading a pickle runs what is in it.
    forbidden = re.compile(r"\bimport (?:cloud)?pickle\b|\ballow_pickle=True|\bjoblib\b")
    for path in files:
        if path.suffix == ".py" and not path.is_relative_to(ROOT / "tests"):
            found = forbidden.search(path.read_text(encoding="utf-8"))
            assert not found, f"{path}: {found.group()}"


def test_entry_points_stay_out_of_the_wheel_and_the_library_is_whole_in_it(tmp_path, files):
    [wheel] = WheelBuilder(str(ROOT)).build(directory=str(tmp_path), versions=["standard"])
    names = set(zipfile.ZipFile(wheel).namelist())
    assert {name.split("/")[0].split("-")[0] for name in names} == {"fusionrec"}
    library = {
        str(path.relative_to(ROOT / "platform"))
        for path in files
        if path.is_relative_to(ROOT / "platform")
    }
    assert library <= names
    assert "fusionrec/py.typed" in names


def test_imports_point_one_way():
    linter = Path(sys.executable).parent / "lint-imports"
    found = subprocess.run([linter], cwd=ROOT, capture_output=True, text=True)
    assert found.returncode == 0, found.stdout


def test_continuous_integration_runs_what_the_readme_says():
    script = ROOT / ".ci" / "run"
    assert script.stat().st_mode & 0o111
    lines = re.findall(r"^make .*?(\w+)$", script.read_text(), flags=re.MULTILINE)
    assert lines == ["browser", "promtool", "check", "test"]
    assert "make test" in (ROOT / "README.md").read_text()
