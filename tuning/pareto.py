"""Search the trade between NDCG, diversity, coverage and latency.

What is searched is the trust in each source, a factor on its weights, and how diverse lists are
made: the weights of that, the cap per category, and how much of the
prices is paid that keep every item within ``--max-exposure`` of the lists.

NSGA-II (Deb et al., IEEE TEC 2002) proposes; what no other point beats in everything is the front.
The chosen point is the one of the front that lies nearest to having the best of everything, among
those that keep all but ``--max-loss`` of the best NDCG. It goes into the pipeline directory:
``fusion.json``, ``pipeline.json`` without the sources that are off (popularity becomes the fallback
instead, of which nothing is measured), and ``diversity/``. All is measured on validation cases;
latency is the sum of what the parts take for one history, measured once.

Leaves ``front.json`` and the journal in ``--out``; the same command goes on with a campaign that
was stopped or killed.
"""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import optuna
from optuna.distributions import BaseDistribution, FloatDistribution, IntDistribution
from pydantic import Field
from ray import tune
from rich.table import Table

from fusionrec.bundles.gate import forget_measurements
from fusionrec.config import Config, JobConfig, parse
from fusionrec.data.dataset import Dataset
from fusionrec.data.histories import FloatArray, Histories
from fusionrec.data.releases import RELEASES, Releases
from fusionrec.data.splits import split
from fusionrec.errors import ConfigError
from fusionrec.fusion.candidates import Candidates
from fusionrec.fusion.diversity import DIVERSITY, Diversity, DiversityConfig, ItemCategories
from fusionrec.fusion.model import FALLBACK, LAMBDARANK, Fusion, fuse
from fusionrec.progress import bar, console
from fusionrec.serving.pipeline import Pipeline, PipelineConfig, Stage, read_config
from jobs.entry import run
from tuning.diversity import priced
from tuning.front import FRONT, Front, Point, choose
from tuning.journal import claim, owned, write_json
from tuning.search import Search, run_search
from tuning.tradeoff import (
    CAP,
    EXPOSURE,
    MOST,
    SPREAD_MOST,
    TRUST,
    Tradeoff,
    collect,
    cost_ms,
    diversified,
    weighed,
)

PRICES = "prices.npy"
"""What an item pays for its exposure at every point of a search, in ``--out``."""
COST_CASES = 50
"""Histories that the sources are timed on."""


class ParetoSettings(Config):
    """How the front is searched."""

    trials: int = Field(default=200, ge=1)
    """Points to evaluate, those of an earlier start included."""
    max_cases: int = Field(default=1_000, ge=20)
    """Validation cases to measure on; more are sampled."""
    max_loss: float = Field(default=0.01, ge=0, lt=1)
    """Share of the best NDCG that the chosen point may give up for the rest."""
    max_exposure: float | None = Field(default=None, gt=0, le=1)
    """Share of the lists that an item may be in: the prices that keep it are found when the search
    begins, and how much of them is paid is traded. Default: the share that the pipeline has, if
    any."""


class ParetoCampaign(JobConfig, ParetoSettings):  # type: ignore[misc]
    """Search the front of NDCG, diversity, coverage and latency; choose a point of it."""

    pipeline: Path
    """Pipeline directory, as tuning.fusion left it; the chosen point goes there."""
    dataset: Path
    """The data set that it was fitted on."""
    out: Path
    """Directory of the campaign; one that exists is gone on with."""
    minutes: float | None = Field(default=None, gt=0)
    """Time for the search, earlier starts included; default: as long as the trials take."""
    workers: int | None = Field(default=None, ge=1)
    """Trials at a time; by default as many as the cluster has CPUs for."""
    k: int = Field(default=10, ge=1, le=100)
    """Length of the lists that are measured."""
    seed: int = Field(default=0, ge=0)
    """Seed of the sampler and of the sample of cases."""


class ParetoTrial(tune.Trainable):
    """One point. The actor and the candidates live on from trial to trial."""

    def setup(self, config: dict[str, Any], tradeoff: Tradeoff | None = None) -> None:
        """Take hold of the candidates; Ray fetches them from the object store once an actor."""
        if tradeoff is not None:  # Tune's signature has to be kept; a search always gives one
            self._tradeoff = tradeoff
        self._point = config

    def reset_config(self, new_config: dict[str, Any]) -> bool:
        """The next trial, in the same actor."""
        self._point = new_config
        return True

    def step(self) -> dict[str, float]:
        """Measure the point."""
        return {**self._tradeoff.measure(self._point), "done": True}

    def save_checkpoint(self, checkpoint_dir: str) -> None:
        """A trial is one step: there is nothing to keep."""

    def load_checkpoint(self, checkpoint: Any) -> None:
        """See :meth:`save_checkpoint`."""


def campaign(config: ParetoCampaign) -> Front:
    """Search, choose, write; returns the front.

    Raises:
        ConfigError: the pipeline has no fusion, or a learned one, or was fitted on another data
            set, or the campaign in ``out`` searches something else.
    """
    dataset = Dataset.open(config.dataset)
    now = read_config(config.pipeline)
    now.refuse_other_data(dataset, config.pipeline)
    _refuse_other_share(config)
    if (config.pipeline / LAMBDARANK).is_dir():
        raise ConfigError(
            f"--pipeline {config.pipeline} has trees over its weights, which only they were grown "
            "for: run `python -m tuning.fusion --model linear` first"
        )
    with owned(config.out):
        path = config.out / FRONT
        begun = _begun(config, now)
        if path.is_file():
            front = Front.model_validate_json(path.read_bytes())
        else:
            front = _search(config, dataset, begun)
            write_json(path, front.model_dump(mode="json"))
        _install(config.pipeline, dataset, begun, front, config.out / PRICES)
    return front


def _refuse_other_share(config: ParetoCampaign) -> None:
    known = _settings(config.pipeline).max_exposure
    if (config.out / FRONT).is_file() or config.max_exposure in (None, known) or known is None:
        return
    raise ConfigError(
        f"setting max_exposure = {config.max_exposure:g} is not the {known:g} that the diversity "
        f"of {config.pipeline} has prices for: leave it out, or remove its {DIVERSITY}/"
    )


def _settings(pipeline: Path) -> DiversityConfig:
    """The diversity that the pipeline's lists have."""
    path = pipeline / DIVERSITY / "diversity.json"
    if not path.is_file():
        return DiversityConfig()
    return DiversityConfig.model_validate_json(path.read_bytes())


class Begun(Config):
    """The parts of the pipeline that a point replaces, as they were when the search began."""

    fusion: Fusion
    pipeline: PipelineConfig
    diversity: DiversityConfig

    def at(self, point: Point) -> Begun:
        """What ``point`` makes of them; the first point is what they were."""
        if point.number == 0:
            return self
        fusion, whole = weighed(self.fusion.personal, point.params), self.fusion
        if FALLBACK in whole.sources and FALLBACK not in fusion.sources:
            fusion = fusion.with_fallback(FALLBACK, whole.scales[FALLBACK])
        left = [n for n in self.pipeline.sources if n in fusion.sources or n in fusion.off]
        return Begun(
            fusion=fusion,
            pipeline=self.pipeline.model_copy(update={"sources": tuple(left)}),
            diversity=diversified(self.diversity, point.params),
        )


def _begun(config: ParetoCampaign, pipeline: PipelineConfig) -> Begun:
    """As it was when the campaign in ``out`` began; checks that the pipeline still has it.

    Raises:
        ConfigError: it has neither that nor the chosen point.
    """
    fusion = Fusion.load(config.pipeline / "fusion.json")
    diversity = _settings(config.pipeline)
    if config.max_exposure is not None and not diversity.caps_exposure:
        update = {"max_exposure": config.max_exposure, "exposure": 0.0}
        diversity = diversity.model_copy(update=update)
    now = Begun(fusion=fusion, pipeline=pipeline, diversity=diversity)
    path = config.out / "campaign.json"
    if path.is_file() and (config.out / FRONT).is_file():
        known = Begun.model_validate(json.loads(path.read_text(encoding="utf-8"))["begun"])
        front = Front.model_validate_json((config.out / FRONT).read_bytes())
        if fusion in (known.fusion, known.at(front.point).fusion):
            now = known
    names = ("k", "seed", "max_cases", "max_exposure")
    request = {name: getattr(config, name) for name in names}
    claim(config.out, {"begun": now.model_dump(mode="json"), **request})
    return now


def _search(config: ParetoCampaign, dataset: Dataset, begun: Begun) -> Front:
    cases = split(dataset, begun.pipeline.protocol).validation
    if len(cases) > config.max_cases:
        generator = np.random.default_rng(config.seed)
        chosen = generator.choice(len(cases), config.max_cases, replace=False)
        cases = cases.take(np.sort(chosen))
    stages, fusion = frozenset({Stage.EMBEDDER, Stage.RETRIEVER}), begun.fusion.personal
    pipeline = Pipeline.load(config.pipeline, stages=stages, weighed=False)
    with bar("scoring the validation cases", None):
        histories = pipeline.embed(cases.histories)
        candidates, proposed = collect(
            pipeline.asking(fusion).sources, histories, begun.pipeline.candidates, pipeline.rules
        )
        diversity = _with_prices(config, dataset, begun, cases.histories, candidates)
        some = cases.histories.slice(0, min(COST_CASES, len(cases)))
        # Noted: a campaign that goes on must not measure by another clock.
        costs = _noted(config.out / "cost_ms.json", lambda: cost_ms(pipeline, some, diversity))
    vectors = config.pipeline / "vectors.npy"
    tradeoff = Tradeoff(
        fusion=fusion,
        diversity=diversity,
        histories=cases.histories,
        candidates=candidates,
        proposed=proposed,
        targets=cases.targets,
        cold=pipeline.item_counts == 0,
        vectors=np.load(vectors) if vectors.is_file() else None,
        categories=dataset.catalogue.categories,
        cost_ms=costs,
        k=config.k,
    )
    start = tradeoff.start()
    as_it_was = Point(number=0, params=start, values=tradeoff.measure(start))
    metrics = list(as_it_was.values)
    modes: dict[str, Literal["max", "min"]] = {
        name: "min" if name == "latency_ms" else "max" for name in metrics
    }
    study = run_search(
        Search(
            name="pareto",
            directory=config.out,
            space={name: _distribution(name, value, diversity) for name, value in start.items()},
            start=start,
            metrics=modes,
            sampler=_sampler,
            seed=config.seed,
            trials=config.trials,
            seconds=None if config.minutes is None else 60 * config.minutes,
            workers=config.workers,
        ),
        ParetoTrial,
        tradeoff=tradeoff,
    )
    points = [
        Point(
            number=trial.number,
            params=trial.params,
            values=dict(zip(metrics, trial.values, strict=True)),
        )
        for trial in study.best_trials
    ]
    points = points or [as_it_was]  # the time was up before anything ended
    return Front(
        start=as_it_was,
        points=tuple(sorted(points, key=lambda point: (-point.values["ndcg"], point.number))),
        chosen=choose(points, modes, config.max_loss),
        max_loss=config.max_loss,
        num_cases=len(cases),
        num_trials=len(
            study.get_trials(deepcopy=False, states=(optuna.trial.TrialState.COMPLETE,))
        ),
        cost_ms=costs,
    )


def _sampler(seed: int) -> optuna.samplers.BaseSampler:
    return optuna.samplers.NSGAIISampler(seed=seed, population_size=30)


def _distribution(name: str, value: float, diversity: Diversity) -> BaseDistribution:
    """What a parameter may become that is ``value`` now."""
    if name == CAP:
        return IntDistribution(1, diversity.config.places)
    most = 1.0 if name == EXPOSURE else MOST if TRUST in name else SPREAD_MOST
    return FloatDistribution(0, max(value, most))


def _noted(path: Path, measure: Callable[[], dict[str, float]]) -> dict[str, float]:
    if not path.is_file():
        write_json(path, measure())
    found: dict[str, float] = json.loads(path.read_text(encoding="utf-8"))
    return found


def _diversity(
    directory: Path, dataset: Dataset, config: DiversityConfig, prices: FloatArray | None
) -> Diversity:
    """The term of ``config``; ``prices`` [I] are those of its share of the lists."""
    counts = np.load(directory / "item_counts.npy", allow_pickle=False)
    releases = Releases.load(directory / RELEASES)
    categories = ItemCategories.of(dataset.catalogue.categories)
    return Diversity(config, categories, counts, releases, prices)


def _with_prices(
    config: ParetoCampaign,
    dataset: Dataset,
    begun: Begun,
    histories: Histories,
    candidates: Candidates,
) -> Diversity:
    """The term that points are measured with; what an item pays is noted in ``out``.

    It pays the pipeline's prices, or such as keep the campaign's share in the lists as they are.
    """
    path, settings = config.out / PRICES, begun.diversity
    term = _diversity(config.pipeline, dataset, settings, None)
    if settings.max_exposure is None:
        return term
    if not path.is_file():
        if settings.caps_exposure:
            place = config.pipeline / DIVERSITY
            found = Diversity.load(place, term.item_counts, term.releases)
        else:
            lists = fuse(begun.fusion.personal, candidates, term.item_counts == 0)
            found = priced(term, [(histories, lists)], config.k)
        with path.with_suffix(".tmp").open("wb") as file:
            np.save(file, np.asarray(found.prices), allow_pickle=False)
        path.with_suffix(".tmp").replace(path)
    return replace(term, prices=np.load(path, allow_pickle=False))


def _install(
    directory: Path, dataset: Dataset, begun: Begun, front: Front, noted_prices: Path
) -> None:
    """Leave the chosen point in the pipeline directory; done twice it is the same."""
    chosen = begun.at(front.point)
    chosen.fusion.save(directory / "fusion.json")
    if chosen.pipeline != read_config(directory):
        write_json(directory / "pipeline.json", chosen.pipeline.model_dump(mode="json"))
    if chosen.diversity.changes:
        paid = chosen.diversity.caps_exposure
        prices = np.load(noted_prices, allow_pickle=False) if paid else None
        _diversity(directory, dataset, chosen.diversity, prices).save(directory / DIVERSITY)
    else:
        shutil.rmtree(directory / DIVERSITY, ignore_errors=True)
    forget_measurements(directory)


def main() -> None:
    """Parse, search, report."""
    config = parse(ParetoCampaign)
    front = campaign(config)
    metrics = list(front.start.values)
    table = Table("", *metrics, title=f"the front: {len(front.points)} points")
    for point in front.points:
        mark = "chosen" if point.number == front.chosen else "as it was" if not point.number else ""
        table.add_row(mark, *(f"{point.values[name]:.4f}" for name in metrics))
    console.print(table)
    sys.stdout.write(f"fusion: {config.pipeline / 'fusion.json'}\n")
    sys.stdout.write(f"front: {config.out / FRONT}\n")


if __name__ == "__main__":
    run(main)
