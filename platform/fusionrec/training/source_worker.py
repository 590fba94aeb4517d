"""Ray Train around the fit of a source: starts the processes in which it learns together.

What a rank does is the source's business (:mod:`fusionrec.sources.sequential.training`). Every
worker gets all of the training data through Ray's object store and begins from nothing: there are
no checkpoints, and a worker that dies ends the fit.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import ray
import ray.train
import ray.train.torch
import torch

from fusionrec.errors import TrainingError
from fusionrec.progress import bar
from fusionrec.sources.protocol import TrainingData
from fusionrec.sources.sasrec import SASRec
from fusionrec.training.worker import share_of_cpus


def fit(source: SASRec, data: TrainingData, directory: Path, *, num_workers: int) -> None:
    """Fit ``source`` in ``num_workers`` processes on the Ray that this process is connected to.

    Args:
        source: unfitted.
        data: what it learns from.
        directory: where the fitted source is saved; on storage that all nodes see.
        num_workers: processes, on CPUs.

    Raises:
        TrainingError: a worker failed.
    """
    directory = directory.resolve()
    storage = directory.with_name(f".{directory.name}-workers")
    cluster: Any = ray  # Ray's own annotations are partial
    trainer: Any = ray.train.torch.TorchTrainer(
        cast("Callable[[dict[str, Any]], None]", _loop),
        train_loop_config={
            "source": source,
            # Vectors of histories come from a model of this process, and no source learns from them
            # while it trains.
            "data": cluster.put(replace(data, history_vectors=_none)),
            "directory": str(directory),
        },
        scaling_config=ray.train.ScalingConfig(
            num_workers=num_workers,
            resources_per_worker={"CPU": share_of_cpus(num_workers)},
        ),
        run_config=ray.train.RunConfig(name="ray", storage_path=str(storage)),
    )
    try:
        with bar(f"training {source.name} in {num_workers} processes", None):
            trainer.fit()
    except ray.train.TrainingFailedError as error:
        reason = str(error).strip().splitlines()[-1]
        raise TrainingError(
            f"a worker failed in the fit of {source.name}, with: {reason}; run the same command "
            "again, or with --num-workers 1"
        ) from error
    finally:
        shutil.rmtree(storage, ignore_errors=True)


def _none(_: int) -> None:
    return None


def _loop(settings: dict[str, Any]) -> None:
    """What every worker runs."""
    cluster: Any = ray
    context = ray.train.get_context()
    # A Ray worker with a fraction of a CPU has OMP_NUM_THREADS=1, so the number is always set.
    torch.set_num_threads(max(1, (os.cpu_count() or 1) // context.get_local_world_size()))
    fitted = settings["source"].fit(cluster.get(settings["data"]))
    if context.get_world_rank() == 0:
        fitted.save(Path(settings["directory"]))
