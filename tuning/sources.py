"""Search the settings of every source: the list of each alone, on validation cases.

A source's space stands in the annotations of its config; Optuna's TPE proposes, and a trial fits
the source on the training part and measures the lists that it proposes. A source that learns in
passes is measured on the way, and ASHA stops the trials that are behind. The first trial is the
setting that the pipeline has; another takes its place only if it is better on validation cases that
were not searched on.

A changed source is written into the pipeline directory, whose fusion is removed: weights found for
other scores mean nothing. Every trial is in the source's journal in ``--out``, and the same command
goes on with a campaign that was stopped or killed.
"""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import optuna
import yaml
from pydantic import Field
from rich.table import Table

from fusionrec.config import Config, JobConfig, parse
from fusionrec.data.dataset import Dataset
from fusionrec.data.splits import Cases, split
from fusionrec.errors import ConfigError
from fusionrec.evaluation.significance import BootstrapConfig, Estimate, bootstrap_means, estimate
from fusionrec.progress import bar, console
from fusionrec.serving.installing import install, settle, whole
from fusionrec.serving.pipeline import PipelineConfig, read_config
from fusionrec.sources.load import SOURCES, load_source
from fusionrec.sources.protocol import Iterative, Source, TrainingData
from fusionrec.space import replaced, searched, setting
from jobs import cluster
from jobs.entry import run
from tuning.journal import claim, ended, owned, spent_s
from tuning.search import Search, distributions, run_search, rungs
from tuning.source_trial import DEPTH, SourceTrial, Task, built, gains

WINNER = "winner.json"


class SourcesSettings(Config):
    """What is searched of the sources."""

    names: tuple[str, ...] | None = None
    """Sources to search, by name; by default all of the pipeline that have anything to search."""
    trials: int = Field(default=20, ge=1)
    """Settings to evaluate of each source, those of an earlier start included."""
    max_cases: int = Field(default=10_000, ge=20)
    """Validation cases; half of them are searched on, the others decide. More are sampled."""


class SourcesCampaign(JobConfig, SourcesSettings):  # type: ignore[misc]
    """Search the settings of the sources on the validation cases."""

    pipeline: Path
    """Pipeline directory, as jobs.fit left it; sources that get better are replaced there."""
    dataset: Path
    """The data set that it was fitted on."""
    out: Path
    """Directory of the campaign; one that exists is gone on with."""
    minutes: float | None = Field(default=None, gt=0)
    """Time for all searches together, earlier starts included; default: as long as it takes."""
    workers: int | None = Field(default=None, ge=1)
    """Trials at a time; by default as many as the cluster has CPUs for."""
    cpus: int = Field(default=1, ge=1)
    """CPUs of a trial; no more than a machine of the cluster has."""
    k: int = Field(default=10, ge=1, le=DEPTH)
    """Length of the lists whose NDCG is maximised."""
    seed: int = Field(default=0, ge=0)
    """Seed of the sampler and of the sample of cases."""


class Winner(Config):
    """What came of the search of one source."""

    name: str
    before: dict[str, Any]
    """The settings that the search began with: of a source, the pipeline's; of the encoder's
    fine-tuning, the first trial's."""
    after: dict[str, Any]
    """Those that won: of the best trial where it holds, else as before."""
    changed: tuple[str, ...]
    """Dotted names of the settings that differ."""
    value_before: float | None
    """NDCG@k of the first trial on the cases that were searched on; null if it failed."""
    value_best: float | None
    """NDCG@k of the best trial on the same cases: the largest of many, so it flatters."""
    held_out: Estimate
    """Gain of the best trial over what the pipeline had on the other cases."""
    num_held_out: int

    @property
    def taken(self) -> bool:
        """Whether the best trial took the place of what the pipeline had."""
        return self.held_out.mean > 0


@dataclass(frozen=True, slots=True)
class Material:
    """What a search is made on."""

    data: TrainingData
    searched: Cases
    held_out: Cases


def campaign(config: SourcesCampaign) -> list[Winner]:
    """Search every source, replace those that got better; returns what was found.

    Raises:
        ConfigError: a source is unknown, the data set is not the one that the pipeline was fitted
            on, or the campaign in ``out`` searches something else.
    """
    dataset = Dataset.open(config.dataset)
    fitted = read_config(config.pipeline)
    fitted.refuse_other_data(dataset, config.pipeline)
    names = names_of(config)
    material = _material(config, dataset, fitted)
    with owned(config.out), cluster.start():
        claim(config.out, {"names": names})
        for name in names:
            settle(config.pipeline / "sources" / name)
        winners = [
            _tune_source(config, name, material, len(names) - index)
            for index, name in enumerate(names)
        ]
    write_fit_settings(config.pipeline, config.dataset, config.out / "fit.yaml")
    return winners


def names_of(config: SourcesCampaign) -> tuple[str, ...]:
    """The names of the sources to search: those of the campaign in ``out`` where there is one.

    Raises:
        ConfigError: one that is asked for is no source of the pipeline, or has no settings to
            search.
    """
    begun = config.out / "campaign.json"
    if begun.is_file() and config.names is None:  # the pipeline may have fewer since
        return tuple(json.loads(begun.read_text(encoding="utf-8"))["names"])
    having = tuple(
        name
        for name in read_config(config.pipeline).sources
        if searched(settings_of(SOURCES[name].load(whole(config.pipeline / "sources" / name))))
    )
    unknown = [name for name in config.names or () if name not in having]
    if unknown and not begun.is_file():
        raise ConfigError(
            f"setting names = {unknown[0]!r} is no source of {config.pipeline} that has settings "
            f"to search: choose among {', '.join(having)}"
        )
    return having if config.names is None else config.names


def write_fit_settings(pipeline: Path, dataset: Path, path: Path) -> dict[str, Any]:
    """Write the YAML with which ``jobs.fit --config`` fits these sources again; returns it."""
    fitted = read_config(pipeline)
    values: dict[str, Any] = {
        "dataset": str(dataset),
        "pipeline": str(pipeline),
        "protocol": str(fitted.protocol),
        "candidates": fitted.candidates,
        "rerank_top": fitted.rerank_top,
        "sources": list(fitted.sources),
    }
    for name in fitted.sources:
        settings = settings_of(load_source(pipeline / "sources" / name))
        values[name.replace("-", "_")] = settings.model_dump(mode="json")
    path.write_text(yaml.safe_dump(values, sort_keys=False), encoding="utf-8")
    return values


def settings_of(source: Source) -> Config:
    """The config that ``source`` was made from."""
    settings: Config = getattr(source, "config")  # noqa: B009 - no part of the protocol
    return settings


def _material(config: SourcesCampaign, dataset: Dataset, fitted: PipelineConfig) -> Material:
    parts = split(dataset, fitted.protocol)
    generator = np.random.default_rng(config.seed)
    chosen = generator.permutation(len(parts.validation))[: config.max_cases]
    half = len(chosen) // 2
    vectors = config.pipeline / "vectors.npy"
    return Material(
        TrainingData(
            catalogue=dataset.catalogue,
            histories=parts.train,
            has_timestamps=dataset.info.has_timestamps,
            item_vectors=np.load(vectors) if vectors.is_file() else None,
        ),
        parts.validation.take(np.sort(chosen[:half])),
        parts.validation.take(np.sort(chosen[half:])),
    )


def _tune_source(config: SourcesCampaign, name: str, material: Material, to_come: int) -> Winner:
    """Search ``name``, decide, replace; ``to_come`` searches share the time that is left."""
    directory, place = config.out / name, config.pipeline / "sources" / name
    source = load_source(place)
    now = settings_of(source)
    if (directory / WINNER).is_file():
        winner = Winner.model_validate_json((directory / WINNER).read_bytes())
        settings = type(now).model_validate(winner.after)
        if now.model_dump(mode="json") not in (winner.before, winner.after):
            raise ConfigError(
                f"--out {config.out} holds a campaign over other settings of {name} than "
                f"{config.pipeline} has: give another directory or remove it"
            )
        if settings != now:  # it was interrupted after the decision
            install(config.pipeline, name, built(type(source), settings).fit(material.data).save)
        return winner
    claim(
        directory,
        {
            "dataset": read_config(config.pipeline).dataset.fingerprint,
            "settings": now.model_dump(mode="json"),
            **{each: getattr(config, each) for each in ("k", "seed", "max_cases")},
        },
    )
    space = searched(now)
    epochs = source.epochs if isinstance(source, Iterative) else 1
    study = run_search(
        Search(
            name=name,
            directory=directory,
            space=distributions(space),
            start={each: setting(now, each) for each in space},
            metrics={"ndcg": "max"},
            sampler=_sampler,
            seed=config.seed,
            trials=config.trials,
            seconds=_seconds(config, name, to_come),
            workers=config.workers,
            cpus=config.cpus,
            epochs=epochs,
        ),
        SourceTrial,
        task=Task(type(source), now, material.data, material.searched, config.k),
    )
    return _decide(config, source, study, material, len(rungs(epochs)))


def _sampler(seed: int) -> optuna.samplers.BaseSampler:
    # Trials that run count as bad until they are known, so that two workers look at two places.
    return optuna.samplers.TPESampler(seed=seed, multivariate=True, constant_liar=True)


def _seconds(config: SourcesCampaign, name: str, to_come: int) -> float | None:
    """Time for the whole search of ``name``: its own and its share of what is left, in seconds."""
    if config.minutes is None:
        return None
    spent = {path.parent.name: _spent(path) for path in config.out.glob("*/journal.log")}
    left = max(60 * config.minutes - sum(spent.values()), 0)
    own = spent.get(name, 0)
    return own + left / to_come


def _decide(
    config: SourcesCampaign,
    source: Source,
    study: optuna.Study,
    material: Material,
    num_rungs: int,
) -> Winner:
    """Install the best trial's settings if they hold on the cases that were not searched on."""
    now = settings_of(source)
    # A trial that ASHA stopped was worth less than its value after as many passes says.
    whole = [t for t in ended(study) if t.value is not None]
    whole = [t for t in whole if len(t.intermediate_values) == num_rungs - 1]
    best = max(whole, key=lambda trial: (trial.value, -trial.number), default=None)
    first = next((t for t in whole if t.number == 0), None)
    settings = now if best is None else replaced(now, best.params)
    before = gains(source, material.held_out, config.k)
    name, gain, fitted = source.name, np.zeros_like(before), None
    if settings != now:
        with bar(f"fitting {name} with the best settings", None):
            fitted = built(type(source), settings).fit(material.data)
        gain = gains(fitted, material.held_out, config.k) - before
    bootstrap = BootstrapConfig(seed=config.seed)
    holds = bool(gain.mean() > 0)
    after = settings if holds else now
    winner = Winner(
        name=name,
        before=now.model_dump(mode="json"),
        after=after.model_dump(mode="json"),
        changed=tuple(n for n in searched(now) if setting(after, n) != setting(now, n)),
        value_before=None if first is None else first.value,
        value_best=None if best is None else best.value,
        held_out=estimate(
            gain.mean(), bootstrap_means(gain[:, None], bootstrap)[:, 0], bootstrap.level
        ),
        num_held_out=len(gain),
    )
    path = config.out / name / WINNER
    path.with_suffix(".tmp").write_text(winner.model_dump_json(indent=1), encoding="utf-8")
    path.with_suffix(".tmp").replace(path)
    if holds and fitted is not None:
        install(config.pipeline, name, fitted.save)
    return winner


def _spent(journal: Path) -> float:
    storage = optuna.storages.JournalStorage(
        optuna.storages.journal.JournalFileBackend(str(journal))
    )
    return spent_s(optuna.load_study(storage=storage, study_name=journal.parent.name))


def main() -> None:
    """Parse, search, report."""
    config = parse(SourcesCampaign)
    table = Table("source", "before", "best", "on held-out cases", "changed")
    for winner in campaign(config):
        table.add_row(
            winner.name,
            "–" if winner.value_before is None else f"{winner.value_before:.4f}",
            "–" if winner.value_best is None else f"{winner.value_best:.4f}",
            f"{winner.held_out.mean:+.4f}",
            ", ".join(winner.changed) or "nothing",
        )
    console.print(table)
    sys.stdout.write(f"fit again: python -m jobs.fit --config {config.out / 'fit.yaml'}\n")


if __name__ == "__main__":
    run(main)
