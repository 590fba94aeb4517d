"""A trial of one setting of the encoder's fine-tuning: a run of Ray Train under Ray Tune.

The trial's own actor computes nothing and takes no CPU. It has a run started
(:mod:`fusionrec.training.worker`, :mod:`tuning.workers`), whose workers train, measure the lists
together after some epochs and hand on what they found, for Tune to decide. A run whose trial is
behind, or that nobody waits for any more, ends by itself at its next report.

Shape legend: B cases, I items, D dimensions.
"""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import ray
import torch
import torch.distributed as dist
from ray import tune

from fusionrec.config import Config
from fusionrec.data.catalogue import Catalogue
from fusionrec.data.histories import FloatArray
from fusionrec.data.splits import Cases
from fusionrec.data.text import history_texts, item_texts
from fusionrec.errors import Preempted
from fusionrec.evaluation.ranks import RealArray
from fusionrec.language.encoder import Encoder
from fusionrec.sources.protocol import TrainingData
from fusionrec.sources.semantic import Semantic
from fusionrec.space import replaced
from fusionrec.training import worker
from fusionrec.training.config import TrainingConfig
from fusionrec.training.engine import TrainingResult, train
from fusionrec.training.examples import Examples
from fusionrec.training.objectives.encoder import EncoderSettings, EncoderTask
from fusionrec.training.task import Batch, Forward, Refreshed
from fusionrec.training.tracking import Report, of_all
from tuning.population import Pass, lineage
from tuning.search import rungs
from tuning.source_trial import gains

MEMBERS = "members"
"""Folder, in that of the models, of those that members of a population go on from."""
RUNS = "runs"
"""Folder of the campaign: runs that are under way."""


class EncoderRun(Config):
    """Everything that decides what is learned."""

    task: EncoderSettings = EncoderSettings()
    """What is trained, from which weights; without mining, in whose place trials are measured."""
    training: TrainingConfig = TrainingConfig()
    """How."""


@dataclass(frozen=True, slots=True)
class FinetuneData:
    """What the workers of all trials read."""

    catalogue: Catalogue
    examples: Examples
    cases: Cases
    k: int


@dataclass(frozen=True, slots=True)
class FinetuneTask:
    """What the trials of a search have in common."""

    settings: EncoderRun
    """What a trial's parameters replace a part of."""
    data: Any
    """Of :class:`FinetuneData`, in Ray's object store, whence each worker fetches it."""
    runs: Any
    """The actor :class:`~tuning.workers.Runs`, which drives them."""
    out: Path
    """Of the campaign, on storage that all nodes see: runs under way, the best model so far."""
    num_workers: int
    """Of a trial."""
    cpus: int
    """Of a worker; and its threads."""

    @property
    def models(self) -> Path:
        """Folder in which the best model so far is kept."""
        return self.out / "models"


class FinetuneTrial(tune.Trainable):
    """One setting. The actor lives on from trial to trial."""

    def setup(self, config: dict[str, Any], task: FinetuneTask | None = None) -> None:
        """Take hold of the task."""
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
        """Wait for what is measured at the next rung."""
        epochs, last, value = next(self._steps)
        return {"ndcg": value, "epochs": epochs, "done": last}

    def cleanup(self) -> None:
        """End a run that was stopped on the way."""
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
    folder = task.out / RUNS
    folder.mkdir(parents=True, exist_ok=True)
    directory = Path(tempfile.mkdtemp(dir=folder))
    name, runs, done = directory.name, task.runs, 0
    ray.get(runs.start.remote(name, _fit(task, settings, directory)))
    try:
        while (said := ray.get(runs.hear.remote(name))) is not None:
            if isinstance(said, BaseException):
                raise said
            epochs, value = said
            if epochs <= done:
                continue  # a worker died, and the run went over it again
            done, last = epochs, epochs == settings.training.epochs
            if last:
                keep(directory / "model", value, task.models)
                if member is not None:
                    place(directory / "model", members / member.name)
            yield epochs, last, value
    finally:
        ray.get(runs.stop.remote(name))
        shutil.rmtree(directory, ignore_errors=True)


def _fit(task: FinetuneTask, settings: EncoderRun, directory: Path) -> Callable[[], TrainingResult]:
    return partial(
        worker.fit,
        partial(_task, settings.task, task.data),
        settings.training.model_copy(
            update={
                "num_threads": task.cpus,
                "trackers": (),
                "checkpoint_every": 10**9,  # the last step leaves one, and goes with the folder
            }
        ),
        directory,
        num_workers=task.num_workers,
        cpus=task.cpus,
        train=partial(
            _train,
            settings=settings.task,
            data=task.data,
            say=partial(_say, task.runs, directory.name),
            stopped=partial(_stopped, task.runs, directory.name),
        ),
    )


def _say(runs: Any, name: str, epochs: int, value: float) -> None:
    ray.get(runs.say.remote(name, (epochs, value)))


def _stopped(runs: Any, name: str) -> bool:
    found: bool = ray.get(runs.stopped.remote(name))
    return found


def _task(settings: EncoderSettings, reference: Any) -> EncoderTask:
    data: FinetuneData = ray.get(reference)
    return EncoderTask(settings, data.catalogue, data.examples)


def _train(
    task: EncoderTask,
    config: TrainingConfig,
    directory: Path,
    *,
    on_report: Callable[[Report], None],
    noticed: Callable[[], bool],
    settings: EncoderSettings,
    data: Any,
    say: Callable[[int, float], None],
    stopped: Callable[[], bool],
) -> TrainingResult:
    """What every worker runs in place of the engine: it, and a look at the model at each rung."""
    base = Encoder.load(settings.encoder, revision=settings.revision, device="cpu")
    limits = base.config.model_copy(update=settings.limits)
    found: FinetuneData = ray.get(data)
    first = dist.get_rank() == 0

    def look(epochs: int, encoder: Encoder) -> None:
        value = shared_gain(encoder, found)
        if first:
            say(epochs, value)

    def reported(report: Report) -> None:
        on_report(report)
        if any(of_all(first and stopped())):
            raise Preempted("the trial was given up: nobody waits for the rest of it")

    stops = [epoch for epoch in rungs(config.epochs) if epoch < config.epochs]
    watched = _Watched(
        task, config, stops, lambda n, model: look(n, Encoder(model, base.tokenizer, limits))
    )
    result = train(watched, config, directory, on_report=reported, noticed=noticed)
    look(config.epochs, Encoder.load(result.model))
    return result


class _Watched(Refreshed):
    """An encoder's task that is looked at after some epochs, in place of mining.

    By inheritance, so that its methods are checked to be those that the engine calls.
    """

    def __init__(
        self,
        task: EncoderTask,
        config: TrainingConfig,
        after: Collection[int],
        look: Callable[[int, torch.nn.Module], None],
    ) -> None:
        self._task, self._after, self._look = task, after, look
        plan = task.plan(config.batch_size, np.random.default_rng(0))
        a_step = config.accumulation * dist.get_world_size()
        self._epoch = max(1, len(plan) // a_step)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._task, name)

    @property
    def refresh_every(self) -> int:
        """Steps of an epoch; 0 where nothing is looked at."""
        return self._epoch if self._after else 0

    def refresh(self, forward: Forward, step: int) -> None:
        """Look at the model, which the engine gives to what it runs."""
        epoch = step // self._epoch
        if epoch not in self._after:
            return

        def look(model: torch.nn.Module, _: Batch) -> torch.Tensor:
            self._look(epoch, model)
            return torch.zeros(0)

        forward(look, {})

    def chosen(self) -> Batch:
        """Nothing is chosen by what was seen."""
        return {}

    def restore(self, chosen: Batch) -> None:
        """The inverse of :meth:`chosen`."""


def shared_gain(encoder: Encoder, data: FinetuneData) -> float:
    """Mean NDCG@k; each rank encodes a part of the items, and measures a part of the cases."""
    rank, world = dist.get_rank(), dist.get_world_size()
    texts = item_texts(data.catalogue)
    vectors = np.empty((len(texts), encoder.dimension), dtype=np.float32)
    for each, part in enumerate(of_all(encoder.encode(texts[rank::world]))):
        vectors[each::world] = part
    cases = data.cases.take(np.arange(rank, len(data.cases), world))
    own = lists_gain(encoder, vectors, data.catalogue, cases, data.k).sum() if len(cases) else 0.0
    return float(sum(of_all(float(own))) / len(data.cases))


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
