"""A trial of one setting of the encoder's fine-tuning: train it, measure its lists on the way.

The engine runs in the trial's own process, alone in its group, on no more threads than the trial
has CPUs. Workers of Ray Train in each trial would take longer to start than an epoch of such data
takes, and trials that hold CPUs while their workers wait for others would hang a small machine.

Shape legend: B cases, I items, D dimensions.
"""

from __future__ import annotations

import os
import queue
import shutil
import tempfile
import threading
from collections.abc import Collection, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from ray import tune

from fusionrec.config import Config
from fusionrec.data.catalogue import Catalogue
from fusionrec.data.histories import FloatArray
from fusionrec.data.splits import Cases
from fusionrec.data.text import history_texts, item_texts
from fusionrec.evaluation.ranks import RealArray
from fusionrec.language.encoder import Encoder
from fusionrec.sources.protocol import TrainingData
from fusionrec.sources.semantic import Semantic
from fusionrec.space import replaced
from fusionrec.training.config import TrainingConfig
from fusionrec.training.engine import TrainingResult, train
from fusionrec.training.examples import Examples
from fusionrec.training.objectives.encoder import EncoderSettings, EncoderTask
from fusionrec.training.task import Batch, Forward
from tuning.population import Pass, lineage
from tuning.search import rungs
from tuning.source_trial import gains

MEMBERS = "members"
"""Folder, in that of the models, of those that members of a population go on from."""


class EncoderRun(Config):
    """Everything that decides what is learned."""

    task: EncoderSettings = EncoderSettings()
    """What is trained, from which weights; without mining, in whose place trials are measured."""
    training: TrainingConfig = TrainingConfig()
    """How."""


@dataclass(frozen=True, slots=True)
class FinetuneTask:
    """What the trials of a search have in common."""

    settings: EncoderRun
    """What a trial's parameters replace a part of."""
    catalogue: Catalogue
    examples: Examples
    cases: Cases
    k: int
    models: Path
    """Folder in which the best model so far is kept, on storage that all nodes see."""
    threads: int


class FinetuneTrial(tune.Trainable):
    """One setting. The actor and the data live on from trial to trial."""

    def setup(self, config: dict[str, Any], task: FinetuneTask | None = None) -> None:
        """Take hold of the task; Ray fetches it from the object store once an actor."""
        self._steps: Iterator[tuple[int, bool, float]] = iter(())
        if task is not None:  # Tune's signature has to be kept; a search always gives one
            self._task = task
        self.reset_config(config)

    def reset_config(self, new_config: dict[str, Any]) -> bool:
        """The next trial, in the same actor."""
        self.cleanup()
        settings = {n: value for n, value in new_config.items() if n not in Pass._fields}
        run = replaced(self._task.settings, settings)
        self._steps = measured(self._task, run, lineage(new_config))
        return True

    def step(self) -> dict[str, float]:
        """Train up to the next rung, and measure."""
        epochs, last, value = next(self._steps)
        return {"ndcg": value, "epochs": epochs, "done": last}

    def cleanup(self) -> None:
        """End a training that was stopped on the way."""
        if close := getattr(self._steps, "close", None):
            close()

    def save_checkpoint(self, checkpoint_dir: str) -> None:
        """A trial that was interrupted begins anew: there is nothing to keep."""

    def load_checkpoint(self, checkpoint: Any) -> None:
        """See :meth:`save_checkpoint`."""


def measured(
    task: FinetuneTask, settings: EncoderRun, member: Pass | None = None
) -> Iterator[tuple[int, bool, float]]:
    """Epochs done, whether they are all, and NDCG@k then; the last model is kept if it is the best.

    Args:
        task: what all trials share.
        settings: of this one.
        member: for one pass of a member of a population, whose model stays for the passes to come.
    """
    members = task.models / MEMBERS
    if member is not None:
        changes: dict[str, Any] = {"training.epochs": 1}
        if member.parent is not None:
            changes |= {"task.encoder": str(members / member.parent), "task.revision": None}
        settings = replaced(settings, changes)
    directory = Path(tempfile.mkdtemp(prefix="finetune-"))
    training = _Training(task, settings, directory)
    try:
        for epochs, last, value in training.values():
            if last:
                keep(directory / "model", value, task.models)
                if member is not None:
                    place(directory / "model", members / member.name)
            yield epochs, last, value
    finally:
        training.stop()
        shutil.rmtree(directory, ignore_errors=True)


class _Stopped(Exception):
    """The trial is behind: nobody waits for the rest of it."""


class _Training:
    """The engine in a thread, which waits after each rung until it is asked for the next."""

    def __init__(self, task: FinetuneTask, settings: EncoderRun, directory: Path) -> None:
        self._task, self._settings, self._directory = task, settings, directory
        self._said: queue.SimpleQueue[tuple[int, float] | TrainingResult | BaseException]
        self._said = queue.SimpleQueue()
        self._asked, self._stopping = threading.Semaphore(0), False
        self._thread = threading.Thread(target=self._train, name="training", daemon=True)

    def values(self) -> Iterator[tuple[int, bool, float]]:
        """See :func:`measured`."""
        self._thread.start()
        while True:
            said = self._said.get()
            if isinstance(said, BaseException):
                raise said
            if isinstance(said, TrainingResult):
                break
            yield said[0], False, said[1]
            self._asked.release()
        yield self._settings.training.epochs, True, self._value(Encoder.load(said.model))

    def stop(self) -> None:
        """End the thread."""
        self._stopping = True
        self._asked.release()
        if self._thread.is_alive():
            self._thread.join()

    def _train(self) -> None:
        settings = self._settings
        config = settings.training.model_copy(
            update={
                "num_threads": self._task.threads,
                "trackers": (),
                "checkpoint_every": 10**9,  # the last step leaves one, and goes with the folder
            }
        )
        stops = [epoch for epoch in rungs(config.epochs) if epoch < config.epochs]
        try:
            _alone()
            base = Encoder.load(
                settings.task.encoder, revision=settings.task.revision, device="cpu"
            )
            limits = base.config.model_copy(update=settings.task.limits)
            self._base = Encoder(base.model, base.tokenizer, limits)
            inner = EncoderTask(settings.task, self._task.catalogue, self._task.examples)
            self._said.put(
                train(_Watched(inner, config, stops, self._look), config, self._directory)
            )
        except BaseException as error:  # told to the thread that waits
            self._said.put(error)

    def _look(self, epoch: int, model: torch.nn.Module) -> None:
        encoder = Encoder(model, self._base.tokenizer, self._base.config)
        self._said.put((epoch, self._value(encoder)))
        self._asked.acquire()
        if self._stopping:
            raise _Stopped

    def _value(self, encoder: Encoder) -> float:
        torch.set_num_threads(self._task.threads)  # of this thread
        vectors = encoder.encode(item_texts(self._task.catalogue))
        task = self._task
        return float(lists_gain(encoder, vectors, task.catalogue, task.cases, task.k).mean())


class _Watched:
    """An encoder's task that is looked at after some epochs; see ``Refreshed`` for how."""

    def __init__(
        self, task: EncoderTask, config: TrainingConfig, after: Collection[int], look: Any
    ) -> None:
        self._task, self._after, self._look = task, after, look
        plan = task.plan(config.batch_size, np.random.default_rng(0))
        self.refresh_every = max(1, len(plan) // config.accumulation) if after else 0

    def __getattr__(self, name: str) -> Any:
        return getattr(self._task, name)

    def refresh(self, forward: Forward, path: Path, step: int) -> None:  # noqa: ARG002
        """Look at the model, which the engine gives to what it runs."""
        epoch = step // self.refresh_every
        if epoch not in self._after:
            return

        def look(model: torch.nn.Module, _: Batch) -> torch.Tensor:
            self._look(epoch, model)
            return torch.zeros(0)

        forward(look, {})

    def restore(self, path: Path) -> None:
        """Nothing is chosen by what was seen."""


def lists_gain(
    encoder: Encoder, vectors: FloatArray, catalogue: Catalogue, cases: Cases, k: int
) -> RealArray:
    """[B] NDCG@k of the items whose ``vectors`` [I, D] are nearest to those of the histories."""
    texts = history_texts(catalogue, cases.histories, encoder.config.history_items)
    histories = replace(cases.histories, vectors=encoder.encode(texts))
    source = Semantic().fit(TrainingData(catalogue, histories, item_vectors=vectors))
    return gains(source, Cases(cases.users, histories, cases.targets), k)


def keep(model: Path, value: float, models: Path) -> None:
    """Keep ``model`` in ``models`` if no better one is there, and no worse one beside it."""
    place(model, models / f"{value:.9f}")
    for worse in sorted(models.glob("[0-9]*"), key=lambda path: float(path.name))[:-1]:
        shutil.rmtree(worse, ignore_errors=True)


def place(model: Path, folder: Path) -> None:
    """Copy ``model`` beside ``folder``, then rename it; one that is there is of the same trial."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    partial = Path(tempfile.mkdtemp(prefix=".", dir=folder.parent))
    shutil.copytree(model, partial, dirs_exist_ok=True)
    shutil.rmtree(folder, ignore_errors=True)
    partial.rename(folder)


def _alone() -> None:
    """A group of this process, as a launcher would have told it."""
    os.environ.update(RANK="0", LOCAL_RANK="0", WORLD_SIZE="1")
    if not dist.is_initialized():
        backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
        store: Any = dist.HashStore  # type: ignore[attr-defined]
        dist.init_process_group(backend, store=store(), rank=0, world_size=1)
