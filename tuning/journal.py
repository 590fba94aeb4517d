"""The journal of a search: an Optuna study on disk that a killed driver goes on from.

Every line is appended whole and handed to the system before the search goes on: what a trial is
asked and what came of it, so that nothing is lost with the process. What came of a trial is on disk
before the next is proposed, and so is all before it: a machine that loses power may forget what was
under way. Opened again, a line that a crash cut short is taken away, and a trial that was under way
is asked again, once, with the same parameters.

A campaign's directory belongs to one process at a time; the lock goes with the process, however it
ends.
"""

from __future__ import annotations

import fcntl
import json
import os
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import optuna
from optuna.distributions import BaseDistribution
from optuna.samplers import BaseSampler
from optuna.storages import JournalStorage
from optuna.storages.journal import BaseJournalBackend, JournalFileBackend
from optuna.study import StudyDirection
from optuna.trial import FrozenTrial, TrialState

from fusionrec.errors import ConfigError

JOURNAL = "journal.log"
AGAIN = "again"
"""Attribute of a trial: the number of the interrupted one that it takes the place of."""
TOGETHER = "together"
"""Attribute of a trial: how many were asked with it, to be evaluated one after another."""


class Lines(BaseJournalBackend):
    """Lines in a file that one process writes. Optuna's own waits for the disk after each."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._read = JournalFileBackend(str(path))
        self._waits = True

    def read_logs(self, log_number_from: int) -> Generator[dict[str, Any], None, None]:
        """The lines from this number on."""
        return self._read.read_logs(log_number_from)

    def append_logs(self, logs: list[dict[str, Any]]) -> None:
        """Write; wait for the disk once something came of a trial."""
        lines = "".join(json.dumps(log, separators=(",", ":")) + "\n" for log in logs)
        with self._path.open("ab") as file:
            file.write(lines.encode())
            file.flush()
            if self._waits and any("values" in log for log in logs):
                os.fsync(file.fileno())

    @contextmanager
    def together(self) -> Iterator[None]:
        """Wait for the disk once, behind all that is written in the block."""
        self._waits = False
        try:
            yield
        finally:
            self._waits = True
            with self._path.open("ab") as file:
                os.fsync(file.fileno())


@contextmanager
def owned(directory: Path) -> Iterator[None]:
    """Have ``directory``, made if missing, to oneself for the block.

    Raises:
        ConfigError: another process has it.
    """
    directory.mkdir(parents=True, exist_ok=True)
    with (directory / ".lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise ConfigError(
                f"--out {directory} is in use by a campaign that runs now: wait for it, stop it, "
                "or give another directory"
            ) from error
        yield


def claim(directory: Path, request: dict[str, Any]) -> None:
    """Note what the campaign in ``directory`` searches, or check that it is this.

    Raises:
        ConfigError: it is something else.
    """
    directory.mkdir(parents=True, exist_ok=True)
    path = directory / "campaign.json"
    request = json.loads(json.dumps(request))
    if path.is_file():
        known = json.loads(path.read_text(encoding="utf-8"))
        other = [name for name in request if known.get(name) != request[name]]
        if other:
            raise ConfigError(
                f"--out {directory} holds a campaign with another {other[0]}: give another "
                "directory or remove it"
            )
    write_json(path, request)


def write_json(path: Path, value: Any) -> None:
    """Write beside, then rename."""
    beside = path.with_suffix(".tmp")
    beside.write_text(json.dumps(value, indent=1) + "\n", encoding="utf-8")
    beside.replace(path)


def open_study(
    directory: Path,
    name: str,
    directions: Sequence[StudyDirection],
    start: Mapping[str, Any],
    sampler: Callable[[int], BaseSampler],
    seed: int,
) -> tuple[optuna.Study, JournalStorage, Lines]:
    """The study in ``directory``, whose first trial has the parameters ``start``.

    The caller owns the directory. ``sampler`` makes one of a seed, which moves with every trial
    that was ever asked: a study that is gone on with does not propose its beginning again.
    """
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    directory.mkdir(parents=True, exist_ok=True)
    path = directory / JOURNAL
    _mend(path)
    lines = Lines(path)
    storage = JournalStorage(lines)
    study = optuna.create_study(
        storage=storage,
        study_name=name,
        directions=directions,
        load_if_exists=True,
    )
    if not study.get_trials(deepcopy=False):
        study.enqueue_trial(dict(start))
    _ask_again(study)
    study.sampler = sampler(seed + len(study.get_trials(deepcopy=False)))
    return study, storage, lines


def ask(
    study: optuna.Study, space: dict[str, BaseDistribution], count: int
) -> list[optuna.trial.Trial]:
    """The next ``count`` trials, which are evaluated one after another."""
    trials = [study.ask(space) for _ in range(count)]
    for trial in trials:
        trial.set_user_attr(TOGETHER, count)
    return trials


def took_s(trial: FrozenTrial) -> float:
    """Seconds that an ended trial took: of trials that were asked together, each the same."""
    if trial.duration is None:
        return 0.0
    return trial.duration.total_seconds() / float(trial.user_attrs.get(TOGETHER, 1))


def _mend(path: Path) -> None:
    """Take away what a process that died while it wrote may have left."""
    if path.is_file():
        content = path.read_bytes()
        whole = content.rfind(b"\n") + 1
        if whole < len(content):
            os.truncate(path, whole)


def _ask_again(study: optuna.Study) -> None:
    trials = study.get_trials(deepcopy=False)
    replaced = {trial.user_attrs.get(AGAIN) for trial in trials}
    for trial in trials:
        if trial.state is TrialState.RUNNING:
            # One that was to be asked has all its parameters there, even if it was not begun.
            asked = {**trial.system_attrs.get("fixed_params", {}), **trial.params}
            # In this order: a process that dies in between asks once, too.
            if trial.number not in replaced and asked:
                study.enqueue_trial(asked, user_attrs={AGAIN: trial.number})
            study.tell(trial.number, state=TrialState.FAIL)


def ended(study: optuna.Study) -> list[FrozenTrial]:
    """The trials that came to an end, by number: with a value, or with an error of their own."""
    trials = study.get_trials(deepcopy=False)
    replaced = {trial.user_attrs.get(AGAIN) for trial in trials}
    return [
        trial
        for trial in trials
        if trial.state is TrialState.COMPLETE
        or (trial.state is TrialState.FAIL and trial.params and trial.number not in replaced)
    ]


def spent_s(study: optuna.Study) -> float:
    """Seconds that the ended trials took, one after another."""
    return sum(map(took_s, ended(study)))
