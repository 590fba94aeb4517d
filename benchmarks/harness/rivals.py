"""Other programs' models beside ours; one that fails is told of, and costs no other result."""

from __future__ import annotations

from concurrent.futures.process import BrokenProcessPool
from pathlib import Path

from benchmarks.harness import ranking, recbole
from benchmarks.harness.fits import Fit
from benchmarks.harness.memory import alone
from fusionrec.data.splits import Split
from fusionrec.errors import ServingError
from fusionrec.evaluation.systems import Measured
from fusionrec.sources.protocol import TrainingData
from fusionrec.sources.sequential.config import SASRecConfig


def measured(
    parts: Split,
    data: TrainingData,
    config: SASRecConfig,
    folder: Path,
    recbole_minutes: float,
    seed: int,
) -> tuple[list[tuple[Measured, Fit]], list[str]]:
    """Models of implicit and of RecBole on the same split, asked the same test cases.

    Args:
        parts: the split.
        data: its training part, as our sources get it.
        config: our SASRec, whose epoch is held to RecBole's.
        folder: for what RecBole's processes leave.
        recbole_minutes: RecBole's SASRec begins epochs for so long; 0 leaves RecBole out.
        seed: of everything.

    Returns:
        What each did and took, and sentences on them: how long epochs took, and what failed.
    """
    found: list[tuple[Measured, Fit]] = []
    told = []
    for name in ranking.MODELS:
        try:
            found.append(alone(ranking.peer, name, parts, seed))
        except (BrokenProcessPool, MemoryError):
            told.append(f"implicit's {name} ended early: it may want more memory than is here.\n")
    if not recbole_minutes:
        return found, told
    if not recbole.FOLDER.is_dir():
        return found, [*told, recbole.MISSING]
    for name in recbole.MODELS:
        try:
            their = recbole.recbole_peer(name, parts, folder, recbole_minutes, seed)
        except ServingError as error:
            told.append(f"{error}.\n")
            continue
        found.append((their.measured, their.fit))
        if name == "SASRec":
            told.append(recbole.epochs_told(their.epochs_s, data, config))
    return found, told
