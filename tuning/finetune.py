"""Search the settings of the encoder's fine-tuning, by the lists that its vectors make.

The ranges stand in the annotations of ``EncoderSettings`` and ``TrainingConfig``; Optuna's TPE
proposes, a trial fine-tunes on the training part in workers of Ray Train
(:mod:`tuning.finetune_trial`), encodes the catalogue and measures the nearest items on validation
cases, on the way too, and ASHA stops the trials that are behind. With ``--population`` it is
population-based training instead (:mod:`tuning.population`). The first trial has the settings that
the search starts from.

The best model takes the place of the pipeline's encoder only if its lists are better on validation
cases that were not searched on; then the text vectors and the sources that read them are made anew
under the settings that they have, and the fusion is removed, whose weights were found for other
scores.

Every trial is in the journal in ``--out``, and the same command goes on with a campaign that was
stopped or killed.
"""

from __future__ import annotations

import shutil
import sys
from functools import partial
from pathlib import Path

import numpy as np
import optuna
import ray
from pydantic import Field

from fusionrec.config import Config, JobConfig, parse
from fusionrec.data.dataset import Dataset
from fusionrec.data.histories import FloatArray
from fusionrec.data.splits import Cases, Split, split
from fusionrec.data.text import item_texts
from fusionrec.errors import ConfigError
from fusionrec.evaluation.significance import BootstrapConfig, bootstrap_means, estimate
from fusionrec.language.encoder import Encoder
from fusionrec.language.models import DEFAULT_MODEL
from fusionrec.progress import bar
from fusionrec.serving.installing import (
    forget_weights,
    install,
    replace,
    settle,
    training_data,
    whole,
)
from fusionrec.serving.pipeline import read_config
from fusionrec.sources.load import load_source
from fusionrec.sources.protocol import ReadsItemVectors
from fusionrec.sources.semantic import Semantic
from fusionrec.space import Space, replaced, searched, setting
from fusionrec.training import quantization
from fusionrec.training.config import Method, TrainingConfig
from fusionrec.training.examples import Examples
from fusionrec.training.objectives.encoder import EncoderSettings
from jobs import cluster
from jobs.entry import run
from tuning.finetune_trial import (
    MEMBERS,
    RUNS,
    EncoderRun,
    FinetuneData,
    FinetuneTask,
    FinetuneTrial,
    lists_gain,
)
from tuning.journal import claim, ended, owned, write_json
from tuning.population import FIRST, PopulationSampler, passes
from tuning.search import Search, distributions, run_search, rungs
from tuning.source_trial import built
from tuning.sources import WINNER, Winner, settings_of
from tuning.workers import Room, Runs, room

NAME = "finetune"
CLAIMED = ("k", "seed", "population", "num_workers", "max_cases", "max_examples", "per_user")
LEARNING_RATE = 1e-4
"""Of the first trial, as jobs.finetune has it for encoders."""


class FinetuneSettings(Config):
    """What is searched of the encoder's fine-tuning, and how much of it."""

    encoder: str = DEFAULT_MODEL
    """Weights that every trial starts from: package:NAME, a folder, or a name on the hub."""
    revision: str | None = None
    """Commit of a hub model."""
    method: Method = Method.FULL
    """full: every weight is trained; lora, dora, qlora: adapters, whose rank is searched too."""
    epochs: int = Field(default=3, ge=1)
    """Passes of a whole trial over the examples."""
    batch_size: int = Field(default=64, ge=2)
    """Examples of a step of one worker; those of all workers are negatives of each other."""
    max_tokens: int = Field(default=64, ge=8)
    """Tokens that are read of a text."""
    history_items: int = Field(default=5, ge=1)
    """Newest items that make the text of a history."""
    population: int | None = Field(default=None, ge=2)
    """Members of population-based training instead of ASHA: each makes all epochs, and goes on
    from one of the best where it is among the worst."""
    trials: int = Field(default=12, ge=1)
    """Settings to evaluate, those of an earlier start included; a population has a trial for every
    pass of every member instead."""
    minutes: float | None = Field(default=None, gt=0)
    """Time for the search, earlier starts included; default: as long as it takes."""
    num_workers: int = Field(default=1, ge=1)
    """Workers of Ray Train in a trial, each with a GPU where the cluster has any."""
    cpus: int | None = Field(default=None, ge=1)
    """CPUs, and threads, of each worker; default: two, or one where a trial would not fit
    otherwise."""
    max_examples: int = Field(default=20_000, ge=1)
    """Training examples; more are sampled."""
    per_user: int = Field(default=10, ge=1)
    """Newest training events of each user that become examples."""
    max_cases: int = Field(default=4000, ge=20)
    """Validation cases; half of them are searched on, the others decide. More are sampled."""

    @property
    def start(self) -> EncoderRun:
        """Of the first trial; what has a range is searched, the rest is the same in all."""
        names = ("encoder", "revision", "max_tokens", "history_items")
        return EncoderRun(
            task=EncoderSettings(**{name: getattr(self, name) for name in names}),
            training=TrainingConfig(
                method=self.method,
                epochs=self.epochs,
                batch_size=self.batch_size,
                learning_rate=LEARNING_RATE,
            ),
        )


class FinetuneCampaign(JobConfig, FinetuneSettings):  # type: ignore[misc]
    """Search the settings of the encoder's fine-tuning on the validation cases."""

    pipeline: Path
    """Pipeline directory with an encoder, as jobs.embed and jobs.fit left it; a better encoder is
    put in its place."""
    dataset: Path
    """The data set that it was fitted on."""
    out: Path
    """Directory of the campaign; one that exists is gone on with."""
    workers: int | None = Field(default=None, ge=1)
    """Trials at a time; by default as many as the cluster has room for, and never more."""
    k: int = Field(default=10, ge=1, le=100)
    """Length of the lists whose NDCG is maximised."""
    seed: int = Field(default=0, ge=0)
    """Seed of the sampler, of the examples and of the sample of cases."""


def campaign(config: FinetuneCampaign) -> Winner:
    """Search, decide, install; returns what was found.

    Raises:
        ConfigError: the pipeline has no encoder or was fitted on another data set, or the campaign
            in ``out`` searches something else, or a package is missing, or no trial would ever
            start on this cluster.
    """
    if config.method is Method.QLORA:
        quantization.require()
    dataset, parts = material(config)
    cases = parts.validation.sample(config.max_cases, config.seed)
    half = np.random.default_rng(config.seed).permutation(len(cases)) < len(cases) // 2
    chosen, held_out = cases.take(np.flatnonzero(half)), cases.take(np.flatnonzero(~half))
    with owned(config.out), cluster.start():
        place = room_for(config)
        claim(
            config.out,
            {
                "dataset": dataset.info.fingerprint,
                "start": config.start.model_dump(mode="json"),
                **{name: getattr(config, name) for name in CLAIMED},
            },
        )
        if place is not None:
            study = _search(config, dataset, parts, chosen, place)
            _decide(config, dataset, study, held_out)
        winner = Winner.model_validate_json((config.out / WINNER).read_bytes())
        if winner.taken and not (config.out / "installed").is_file():
            _install(config, dataset, parts)
            (config.out / "installed").touch()
    return winner


def room_for(config: FinetuneCampaign) -> Room | None:
    """How the trials fit the cluster that this process is connected to; None once it is decided.

    Raises:
        ConfigError: not one of them does.
    """
    if (config.out / WINNER).is_file():
        return None
    return room(config.num_workers, config.cpus, config.workers)


def space_of(start: EncoderRun) -> Space:
    """What is searched: adapters only where adapters are trained."""
    found = searched(start)
    if not start.training.method.adapts:
        found = {name: each for name, each in found.items() if ".lora." not in name}
    return found


def material(config: FinetuneCampaign) -> tuple[Dataset, Split]:
    """The data set and its split, where the campaign can be made on them.

    Raises:
        ConfigError: it cannot.
    """
    dataset = Dataset.open(config.dataset)
    fitted = read_config(config.pipeline)
    fitted.refuse_other_data(dataset, config.pipeline)
    if Semantic.name not in fitted.sources or not whole(config.pipeline / "encoder").is_dir():
        raise ConfigError(
            f"--pipeline {config.pipeline} has no encoder to be better than: run "
            "`python -m jobs.embed`, then jobs.fit once more"
        )
    return dataset, split(dataset, fitted.protocol)


def _search(
    config: FinetuneCampaign, dataset: Dataset, parts: Split, cases: Cases, place: Room
) -> optuna.Study:
    start = config.start
    examples = Examples.of(
        parts.train,
        per_user=config.per_user,
        limit=config.max_examples,
        generator=np.random.default_rng([config.seed, 0]),
        with_text=np.array([bool(text) for text in item_texts(dataset.catalogue)]),
    )
    space = distributions(space_of(start))
    begin = {name: setting(start, name) for name in space}
    members = config.population
    if members is not None:
        space |= passes(members, start.training.epochs)
        begin |= FIRST._asdict()
    data = FinetuneData(
        catalogue=dataset.catalogue,
        examples=examples.newest(start.task.history_items),
        cases=cases,
        k=config.k,
    )
    shutil.rmtree(config.out / RUNS, ignore_errors=True)  # of trials that were interrupted
    runs = Runs.actor(place.trials)
    study = run_search(
        Search(
            name=NAME,
            directory=config.out,
            space=space,
            start=begin,
            metrics={"ndcg": "max"},
            sampler=_tpe if members is None else partial(PopulationSampler, space, members),
            seed=config.seed,
            trials=config.trials if members is None else members * start.training.epochs,
            seconds=config.minutes and 60 * config.minutes,
            workers=min(place.trials, members or place.trials),
            cpus=0,
            epochs=_passes_of_a_trial(config),
        ),
        FinetuneTrial,
        task=FinetuneTask(
            settings=start,
            data=ray.put(data),
            runs=runs,
            out=config.out.resolve(),
            num_workers=config.num_workers,
            cpus=place.cpus,
        ),
    )
    ray.get(runs.close.remote())  # of trials that Tune gave up, whose time was over
    ray.kill(runs)
    return study


def _passes_of_a_trial(config: FinetuneCampaign) -> int:
    return config.epochs if config.population is None else 1


def _tpe(seed: int) -> optuna.samplers.BaseSampler:
    # Few trials are affordable: the model of what is good begins to propose early.
    return optuna.samplers.TPESampler(
        seed=seed, multivariate=True, constant_liar=True, n_startup_trials=4
    )


def _decide(
    config: FinetuneCampaign, dataset: Dataset, study: optuna.Study, held_out: Cases
) -> None:
    """Note what won; the model that was kept is that of the best whole trial."""
    num_rungs = len(rungs(_passes_of_a_trial(config)))
    whole = [t for t in ended(study) if t.value is not None]
    whole = [t for t in whole if len(t.intermediate_values) == num_rungs - 1]
    best = max(whole, key=lambda trial: (trial.value, -trial.number), default=None)
    first = next((t for t in whole if t.number == 0), None)
    kept = kept_model(config.out)
    now = Encoder.load(config.pipeline / "encoder")
    vectors = np.load(config.pipeline / "vectors.npy", mmap_mode="r")
    gain = np.zeros(len(held_out))
    if best is not None and kept is not None:
        catalogue = dataset.catalogue
        with bar("measuring the best encoder on held-out cases", None):
            before = lists_gain(now, np.asarray(vectors), catalogue, held_out, config.k)
            encoder = Encoder.load(kept)
            gain = -before
            gain += lists_gain(encoder, _encoded(encoder, dataset), catalogue, held_out, config.k)
    holds = best is not None and gain.mean() > 0
    space, after = space_of(config.start), config.start
    if best is not None and holds:
        after = replaced(after, {name: best.params[name] for name in space})
    bootstrap = BootstrapConfig(seed=config.seed)
    winner = Winner(
        name=NAME,
        before=config.start.model_dump(mode="json"),
        after=after.model_dump(mode="json"),
        changed=tuple(n for n in space if setting(after, n) != setting(config.start, n)),
        value_before=None if first is None else first.value,
        value_best=None if best is None else best.value,
        held_out=estimate(
            gain.mean(), bootstrap_means(gain[:, None], bootstrap)[:, 0], bootstrap.level
        ),
        num_held_out=len(gain),
    )
    write_json(config.out / WINNER, winner.model_dump(mode="json"))
    for folder in (config.out / "models" / MEMBERS, config.out / RUNS):
        shutil.rmtree(folder, ignore_errors=True)


def kept_model(out: Path) -> Path | None:
    """The model of the best trial of the campaign in ``out``."""
    models = sorted((out / "models").glob("[0-9]*"), key=lambda path: float(path.name))
    return models[-1] if models else None


def _encoded(encoder: Encoder, dataset: Dataset) -> FloatArray:
    return encoder.encode(item_texts(dataset.catalogue))


def _install(config: FinetuneCampaign, dataset: Dataset, parts: Split) -> None:
    """Put the kept encoder into the pipeline, with its vectors and the sources that read them.

    Interrupted, it is done again from its beginning.
    """
    kept = kept_model(config.out)
    if kept is None:
        raise ConfigError(
            f"--out {config.out} has a winner and no model of it: give another directory, so that "
            "it is searched again"
        )
    pipeline = config.pipeline
    places = [pipeline / "sources" / name for name in read_config(pipeline).sources]
    for place in (pipeline / "encoder", *places):
        settle(place)
    encoder = Encoder.load(kept)
    with bar("encoding the catalogue with the best encoder", None):
        vectors = _encoded(encoder, dataset)
    forget_weights(pipeline)  # with two towers, the vectors of items may stay as they were
    replace(pipeline / "encoder", lambda new: shutil.copytree(kept, new))
    new_vectors = pipeline / ".vectors.npy.partial"
    with new_vectors.open("wb") as file:
        np.save(file, vectors, allow_pickle=False)
    new_vectors.replace(pipeline / "vectors.npy")
    sources = [load_source(place) for place in places]
    [seed] = (source.config.seed for source in sources if isinstance(source, Semantic))
    data = training_data(pipeline, dataset, parts, seed)
    readers = [s for s in sources if isinstance(s, ReadsItemVectors) and s.reads_item_vectors]
    with bar("fitting what reads its vectors", len(readers)) as advance:
        for source in readers:
            fitted = built(type(source), settings_of(source)).fit(data)
            install(pipeline, source.name, fitted.save)
            advance(note=source.name)


def main() -> None:
    """Parse, search, report."""
    config = parse(FinetuneCampaign)
    winner = campaign(config)
    low, high = winner.held_out.low, winner.held_out.high
    sys.stdout.write(
        f"NDCG@{config.k} on cases not searched on: {winner.held_out.mean:+.4f} "
        f"[{low:+.4f}, {high:+.4f}] against the pipeline's encoder; "
        f"{'its place was taken' if winner.taken else 'it stays'}\n"
    )
    if winner.taken:
        sys.stdout.write(f"now: python -m tuning.fusion --pipeline {config.pipeline} …\n")


if __name__ == "__main__":
    run(main)
