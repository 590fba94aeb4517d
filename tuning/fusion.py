"""Search the fusion: how much to trust each source, for each segment, on the validation cases.

Ray Tune with Optuna draws a normalisation and weights; a trial weighs score tensors that every
trial actor holds since its start, so that it costs milliseconds, and is given 25 at a time. A
campaign whose driver is killed goes on from its journal, no trial lost or repeated. The weights of
the best trials are averaged and polished (:mod:`fusionrec.fusion.refine`). Sources that too many
samples of the cases give no weight are turned off, and the others are weighed over what they
propose themselves. Weights of a segment's own are kept where they hold on held-out cases, and so
are trees that order the top of the weighted lists again (:mod:`fusionrec.fusion.lambdarank`).

Leaves ``fusion.json`` and, where trees are kept, ``lambdarank/`` in the pipeline directory and
``trials.csv``, ``trials.svg`` and the journal in ``--out``.
"""

from __future__ import annotations

import hashlib
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import optuna
from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution
from pydantic import Field
from ray import tune

from fusionrec.bundles.gate import forget_measurements
from fusionrec.config import JobConfig, parse
from fusionrec.data.dataset import Dataset
from fusionrec.data.histories import FloatArray
from fusionrec.data.splits import Cases, split
from fusionrec.evaluation.evaluate import embedded
from fusionrec.evaluation.render import off_sentence
from fusionrec.fusion.candidates import Candidates, stack
from fusionrec.fusion.features import ItemStatistics
from fusionrec.fusion.lambdarank import LambdaRankConfig
from fusionrec.fusion.model import LAMBDARANK, Fusion, Segment
from fusionrec.fusion.normalisation import Normalisation, scales
from fusionrec.fusion.objective import Objective
from fusionrec.fusion.refine import (
    BAGGED,
    ONE_SIDED_5_PERCENT,
    Setting,
    bagged,
    distrust,
    polished,
    segment_settings,
    trusted,
)
from fusionrec.progress import bar
from fusionrec.serving.pipeline import Pipeline, Stage
from jobs.entry import run
from tuning.batches import BATCH, VALUES
from tuning.journal import claim, owned
from tuning.learned import FusionModel, choose, leave
from tuning.plots import plot_campaign
from tuning.search import Search, run_search
from tuning.trees import TreesTask, search_trees

STUDY = "fusion"
TOGETHER = 25
"""Trials of a batch: less than a second of an actor."""
BEST_TRIALS = 15
"""Trials whose weights are averaged."""
BLOCK = 256
"""Histories that travel through the pipeline together."""


class FusionCampaign(JobConfig):
    """Search the weights of the fusion on the validation cases."""

    pipeline: Path
    """Pipeline directory, as jobs.fit left it; fusion.json goes there."""
    dataset: Path
    """The data set that it was fitted on."""
    out: Path
    """Directory of the campaign; one that exists is gone on with."""
    trials: int = Field(default=300, ge=1)
    """Weight settings to evaluate, those of an earlier start of the campaign included."""
    workers: int | None = Field(default=None, ge=1)
    """Batches of trials at a time; each worker takes one CPU and the score tensors. By default as
    many as the cluster has room for, and never more."""
    segments: int = Field(default=3, ge=1)
    """Segments by history length, of about equally many validation cases."""
    model: FusionModel = FusionModel.AUTO
    """linear: a weighted sum; lambdarank: trees order the top of its lists again; auto: whichever
    is better on cases that it was not fitted on, linear unless lambdarank is so at the 5% level."""
    lambdarank: LambdaRankConfig = LambdaRankConfig()
    tree_trials: int = Field(default=0, ge=0)
    """Settings of lambdarank to try on half of the cases, the other half decides then; each trial
    grows trees four times. 0: those of lambdarank."""
    max_cases: int = Field(default=25_000, ge=100)
    """Validation cases to search on; more are sampled."""
    k: int = Field(default=10, ge=1)
    """Length of the lists whose NDCG is maximised."""
    seed: int = Field(default=0, ge=0)
    """Seed of the sampler and of every split of cases."""


def space(sources: tuple[str, ...]) -> dict[str, BaseDistribution]:
    """What a trial may be: the search space of ``fusionrec.fusion.model.Fusion``."""
    return {
        "normalisation": CategoricalDistribution([str(n) for n in Normalisation]),
        "cold_factor": FloatDistribution(0, 2),
        **{f"weight.{name}": FloatDistribution(0, 1) for name in sources},
    }


def equal(sources: tuple[str, ...]) -> dict[str, Any]:
    """The first trial: equal weights, what a team begins with."""
    ones = {f"weight.{name}": 1.0 for name in sources}
    return {"normalisation": str(Normalisation.SCALE), "cold_factor": 1.0, **ones}


def setting_of(config: dict[str, Any], sources: tuple[str, ...]) -> Setting:
    """The point that a trial's parameters name."""
    weights = np.array([config[f"weight.{name}"] for name in sources], dtype=np.float32)
    return Setting(weights, float(config["cold_factor"]))


def value(
    config: dict[str, Any], objectives: dict[str, Objective], sources: tuple[str, ...]
) -> float:
    """NDCG@k of what a trial's parameters name."""
    point = setting_of(config, sources)
    return objectives[config["normalisation"]].value(point.weights, point.cold_factor)


class FusionTrial(tune.Trainable):
    """A batch of weight settings. The actor and its tensors live on from one to the next."""

    def setup(
        self,
        config: dict[str, Any],
        objectives: dict[str, Objective] | None = None,
        sources: tuple[str, ...] = (),
    ) -> None:
        """Take hold of the tensors; Ray fetches them from the object store once an actor."""
        self._objectives, self._sources, self._batch = objectives or {}, sources, config[BATCH]

    def reset_config(self, new_config: dict[str, Any]) -> bool:
        """The next batch, in the same actor."""
        self._batch = new_config[BATCH]
        return True

    def step(self) -> dict[str, Any]:
        """Evaluate the settings."""
        values = [value(each, self._objectives, self._sources) for each in self._batch]
        return {VALUES: values, "done": True}

    def save_checkpoint(self, checkpoint_dir: str) -> None:
        """A batch is one step: there is nothing to keep."""

    def load_checkpoint(self, checkpoint: Any) -> None:
        """See :meth:`save_checkpoint`."""


def _sampler(seed: int) -> optuna.samplers.BaseSampler:
    # Not TPE: it settled on one normalisation within 30 trials, a different one for each seed, and
    # on 610 users followed the noise of the cases. What can be gained by going on from the best
    # trials is gained by polishing.
    return optuna.samplers.RandomSampler(seed=seed)


def agreed(
    study: optuna.Study, objectives: dict[str, Objective], sources: tuple[str, ...]
) -> tuple[Normalisation, Setting]:
    """What the best trials agree on: the mean of their weights, under one normalisation.

    The single best of hundreds of trials is the luckiest on the cases that it was measured on; the
    fewer the cases, the more so. The normalisation is ``scale`` unless another is better at the 5%
    level, one-sided and paired.
    """
    complete = study.get_trials(states=(optuna.trial.TrialState.COMPLETE,))
    best: dict[str, list[optuna.trial.FrozenTrial]] = {}
    for trial in sorted(complete, key=lambda trial: (-(trial.value or 0.0), trial.number)):
        of_one = best.setdefault(trial.params["normalisation"], [])
        if len(of_one) < BEST_TRIALS:
            of_one.append(trial)
    means = {
        name: Setting.mean([setting_of(t.params, sources) for t in ts]) for name, ts in best.items()
    }
    chosen = str(Normalisation.SCALE) if Normalisation.SCALE in means else min(means)
    gains = {name: _gains(objectives[name], setting) for name, setting in means.items()}
    for name in sorted(gains, key=lambda name: -gains[name].mean()):
        gained = gains[name] - gains[chosen]
        if gained.mean() > ONE_SIDED_5_PERCENT * gained.std(ddof=1) / len(gained) ** 0.5:
            chosen = name
    return Normalisation(chosen), means[chosen]


def _gains(objective: Objective, setting: Setting) -> FloatArray:
    """[B] NDCG of every case, 0 where no source proposed a target."""
    every = np.zeros(objective.num_cases, dtype=np.float32)
    every[objective.rows] = setting.gains(objective)
    return every


def collect(pipeline: Pipeline, cases: Cases) -> Candidates:
    """What the sources propose for every case, in blocks."""
    blocks = []
    with bar("scoring the validation cases", len(cases)) as advance:
        for start in range(0, len(cases), BLOCK):
            block = cases.histories.slice(start, min(start + BLOCK, len(cases)))
            blocks.append(pipeline.candidates(pipeline.embed(block)))
            advance(len(block))
    return stack(blocks)


def campaign(config: FusionCampaign) -> Fusion:
    """Search, refine, write; returns the fusion found.

    Raises:
        ConfigError: the data set is not the one that the pipeline was fitted on, or the campaign in
            ``out`` searches something else.
    """
    dataset = Dataset.open(config.dataset)
    stages = frozenset({Stage.EMBEDDER, Stage.RETRIEVER})
    pipeline = Pipeline.load(config.pipeline, stages=stages, weighed=False)
    pipeline.config.refuse_other_data(dataset, config.pipeline)
    sources = pipeline.config.sources
    parts = split(dataset, pipeline.config.protocol)
    cases = parts.validation.sample(config.max_cases, config.seed)
    cases = replace(cases, histories=embedded(pipeline, cases.histories))
    found = collect(pipeline.asking(pipeline.fusion), cases)
    request = {
        "dataset": dataset.info.fingerprint,
        "sources": sources,
        "scores": hashlib.sha256(found.scores.tobytes()).hexdigest(),
        **{name: getattr(config, name) for name in ("k", "seed")},
    }
    source_scales = scales(found)
    cold = pipeline.item_counts == 0
    objectives = {
        str(method): Objective.of(found, cases.targets, method, source_scales, cold, config.k)
        for method in Normalisation
    }
    with owned(config.out):
        claim(config.out, request)
        study = search(config, objectives, sources)
    normalisation, consensus = agreed(study, objectives, sources)
    with bar("polishing, all sources", BAGGED) as advance:
        every = polished(objectives[normalisation], consensus, config.seed, advance)
    keep, shares = trusted(every), distrust(every)
    off = {
        name: round(float(share), 4)
        for name, share, stays in zip(sources, shares, keep, strict=True)
        if not stays
    }
    asked = Fusion.uniform(sources, source_scales).without(off)
    if off:  # What only they proposed is gone.
        found = collect(pipeline.asking(asked), cases)
    kept = tuple(name for name in asked.sources if name != asked.fallback)
    objective = Objective.of(
        replace(found, scores=found.scores[: len(kept)]),
        cases.targets,
        normalisation,
        asked.scale_vector()[: len(kept)],
        cold,
        config.k,
    )
    bounds = segment_bounds(cases, config.segments)
    segment_of = np.searchsorted(bounds, cases.histories.lengths, side="left")
    with bar("polishing those asked, then by segment", None):
        start = consensus.of_sources(keep)
        common = bagged(objective, start, config.seed) if off else Setting.mean(every)
        settings = segment_settings(objective, common, segment_of, len(bounds) + 1, config.seed)
    fusion = Fusion(
        sources=kept,
        normalisation=normalisation,
        scales={name: asked.scales[name] for name in kept},
        segments=tuple(
            Segment(
                max_events=bound,
                weights=_as_weights(kept, setting.weights),
                cold_factor=round(setting.cold_factor, 6),
            )
            for bound, setting in zip([*map(int, bounds), None], settings, strict=True)
        ),
        off=off,
    )
    if asked.fallback is not None:
        fusion = fusion.with_fallback(asked.fallback, asked.scales[asked.fallback])
    items = ItemStatistics.of(
        parts.train, parts.num_items, has_timestamps=dataset.info.has_timestamps
    )
    trees, deciding = config.lambdarank, None
    if config.tree_trials and config.model is not FusionModel.LINEAR:
        task = TreesTask(trees, fusion, found, cases, items, config.k, config.seed)
        place = config.out / LAMBDARANK
        trees, deciding = search_trees(task, place, config.tree_trials, config.workers)
    learned = choose(
        config.model, fusion, found, cases, items, trees, config.k, config.seed, deciding
    )
    leave(learned, fusion, config.pipeline)
    forget_measurements(config.pipeline)
    study.trials_dataframe().to_csv(config.out / "trials.csv", index=False)
    plot_campaign(study, fusion, config.out / "trials.svg")
    own = sum(setting is not common for setting in settings)
    sys.stdout.write(
        f"validation NDCG@{config.k}: {study.best_value:.4f} best of {config.trials} trials, "
        f"{objective.value(common.weights, common.cold_factor):.4f} by the mean of the best, "
        f"polished; "
        f"{own} of {len(settings)} segments have weights of their own\n"
    )
    if off:
        sys.stdout.write(f"{off_sentence(off, fusion.fallback)}\n")
    return fusion


def segment_bounds(cases: Cases, num_segments: int) -> FloatArray:
    """Longest history of each segment but the last: quantiles of the cases' history lengths."""
    shares = np.arange(1, num_segments) / num_segments
    lengths = cases.histories.lengths
    bounds = np.unique(np.quantile(lengths, shares, method="lower")).astype(np.int64)
    return np.asarray(bounds[bounds < lengths.max(initial=0)])


def _as_weights(sources: tuple[str, ...], weights: FloatArray) -> dict[str, float]:
    """Scaled to a largest weight of 1, which changes no order."""
    scaled = weights / max(float(weights.max()), 1e-9)
    return {name: round(float(w), 6) for name, w in zip(sources, scaled, strict=True)}


def search(
    config: FusionCampaign, objectives: dict[str, Objective], sources: tuple[str, ...]
) -> optuna.Study:
    """Go on with the search in ``out`` until all its trials are done."""
    return run_search(
        Search(
            name=STUDY,
            directory=config.out,
            space=space(sources),
            start=equal(sources),
            metrics={"ndcg": "max"},
            sampler=_sampler,
            seed=config.seed,
            trials=config.trials,
            workers=config.workers,
            batch=TOGETHER,
        ),
        FusionTrial,
        objectives=objectives,
        sources=sources,
    )


def main() -> None:
    """Parse, search, report."""
    config = parse(FusionCampaign)
    campaign(config)
    sys.stdout.write(f"fusion: {config.pipeline / 'fusion.json'}\n")
    sys.stdout.write(f"campaign: {config.out}\n")


if __name__ == "__main__":
    run(main)
