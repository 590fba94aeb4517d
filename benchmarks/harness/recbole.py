"""RecBole's SASRec and EASE beside ours, where ``make recbole`` has put it."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from statistics import median

import numpy as np

from benchmarks.harness.fits import Fit
from benchmarks.harness.tables import spread
from fusionrec.data.splits import Split
from fusionrec.errors import ServingError
from fusionrec.evaluation.systems import Kind, ListMeter, Measured
from fusionrec.sources.protocol import TrainingData
from fusionrec.sources.sequential.config import SASRecConfig

FOLDER = Path("artifacts/recbole")
"""Where ``make recbole`` puts it."""
MISSING = "RecBole is not here: `make recbole` brings it.\n"
MODELS = ("EASE", "SASRec")
DEPTH = 100
EPOCHS = 3
"""Of ours, that its time is measured by."""
BOUND = 0.1
"""Of our epoch to theirs."""


@dataclass(frozen=True, slots=True)
class Peer:
    """What became of one of its models."""

    measured: Measured
    fit: Fit
    epochs_s: tuple[float, ...]
    """Seconds of each epoch; of EASE, of its one fit."""


def recbole_peer(name: str, parts: Split, folder: Path, minutes: float, seed: int) -> Peer:
    """A model fitted on the same training histories and asked the same test cases.

    Args:
        name: one of ``MODELS``.
        parts: the split.
        folder: for what its process leaves.
        minutes: SASRec begins epochs for so long.
        seed: of everything.

    Raises:
        ServingError: its process failed; its log says why.
    """
    out = folder / name
    out.mkdir(parents=True, exist_ok=True)
    material = folder / "material.npz"
    histories = {"train": parts.train, "asked": parts.test.histories}
    arrays = {
        f"{name}_{part}": getattr(each, part)
        for name, each in histories.items()
        for part in ("items", "timestamps", "offsets")
    }
    np.savez(material, allow_pickle=False, **arrays)
    threads = len(os.sched_getaffinity(0))
    values = {"model": name, "material": material.resolve(), "out": out.resolve(), "depth": DEPTH}
    values |= {"minutes": minutes, "threads": threads, "seed": seed}
    words = [str(word) for flag, value in values.items() for word in (f"--{flag}", value)]
    path = os.pathsep.join((str(FOLDER.resolve()), *filter(None, [os.environ.get("PYTHONPATH")])))
    with (out / "log").open("w") as log:
        done = subprocess.run(
            [sys.executable, "-m", "benchmarks.peers.recbole_models", *words],
            env={**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": str(threads)},
            stdout=log,
            stderr=log,
            check=False,
        )
    if done.returncode:
        raise ServingError(f"RecBole's {name} failed: {out / 'log'} says why")
    with np.load(out / "lists.npz", allow_pickle=False) as found:
        spent = tuple(map(float, found["spent_s"]))
        passes = f", {len(spent)} epochs" if name == "SASRec" else ""
        meter = ListMeter(f"RecBole {name}{passes}", Kind.RUN, parts.test, DEPTH, 10)
        meter.add(found["items"], found["scores"], float(found["seconds"]))
        fit = Fit(sum(spent), float(found["before_mib"]), float(found["peak_mib"]))
    return Peer(meter.measured(), fit, spent)


def epochs_told(theirs_s: tuple[float, ...], data: TrainingData, config: SASRecConfig) -> str:
    """How long an epoch takes theirs, and ours over the same events, one after the other."""
    from fusionrec.sources.epochs import Training
    from fusionrec.sources.sequential.training import SequentialLearner

    training = Training(SequentialLearner(data, config), config)
    ours_s = []
    for _ in range(EPOCHS):
        began = time.perf_counter()
        training.epoch()
        ours_s.append(time.perf_counter() - began)
    share = median(ours_s) / median(theirs_s)
    return (
        f"An epoch of SASRec over {len(data.histories.items):,} training events (ours without the "
        f"up to {config.held_out:.0%} that it watches its learning by) takes RecBole "
        f"{spread(theirs_s, 1)} s (its own settings, anomaly mode off) and ours "
        f"{spread(ours_s, 1)} s (as jobs.fit trains it, measured after each): {share:.3f} of it. "
        f"At most {BOUND:g}: {'held' if share <= BOUND else 'missed'}.\n"
    )
