"""A whole campaign from one YAML file: encoder, sources, fusion, the front, the reranker.

::

    python -m tuning.campaign --config tuning/campaign.yaml --pipeline P --dataset D --out C

The pipeline directory that jobs.fit left is measured as it is, each stage then improves it in
place, and it is measured again: on the test cases, which no stage looks at, and on the validation
cases, on which everything is chosen. ``report.html`` in ``--out`` says what came of it.

Every trial is in a journal in ``--out`` before the next is proposed, and every decision is noted
before it is carried out. A campaign that was stopped or killed goes on by the same command: no
trial is lost, none evaluated twice but those that were under way.
"""

from __future__ import annotations

import shlex
import shutil
import signal
import sys
from enum import StrEnum
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import Field

from fusionrec.config import Config, JobConfig, parse
from fusionrec.data.dataset import Dataset
from fusionrec.data.splits import Cases, split
from fusionrec.errors import ConfigError
from fusionrec.evaluation.metrics import ndcg
from fusionrec.evaluation.ranks import RealArray, list_ranks
from fusionrec.evaluation.significance import BootstrapConfig, Comparison, compare
from fusionrec.fusion.diversity import DIVERSITY
from fusionrec.fusion.model import LAMBDARANK, Fusion
from fusionrec.fusion.normalisation import scales
from fusionrec.fusion.rules import RULES
from fusionrec.language.precision import INFERENCE
from fusionrec.progress import Advance, bar
from fusionrec.serving.pipeline import Pipeline, read_config
from jobs import cluster
from jobs.entry import run
from tuning import history, report
from tuning.finetune import FinetuneCampaign, FinetuneSettings, room_for
from tuning.finetune import campaign as search_encoder
from tuning.finetune import material as encoder_data
from tuning.front import FRONT, Front
from tuning.fusion import FusionCampaign
from tuning.fusion import campaign as search_fusion
from tuning.journal import JOURNAL, claim, owned
from tuning.learned import FusionModel
from tuning.pareto import ParetoCampaign, ParetoSettings
from tuning.pareto import campaign as search_front
from tuning.reranking import RerankingCampaign, weigh
from tuning.sources import SourcesCampaign, SourcesSettings, Winner, names_of, write_fit_settings
from tuning.sources import campaign as search_sources

BLOCK = 256
"""Histories that travel through the pipeline together."""


class CampaignStage(StrEnum):
    """A part of a campaign."""

    FINETUNE = "finetune"
    SOURCES = "sources"
    FUSION = "fusion"
    PARETO = "pareto"
    RERANKING = "reranking"


SHARES = {CampaignStage.FINETUNE: 2, CampaignStage.SOURCES: 4, CampaignStage.PARETO: 1}
"""Of the minutes, what each search that takes long gets in proportion to the others."""


class FusionSettings(Config):
    """How the fusion is searched."""

    trials: int = Field(default=300, ge=1)
    """Weight settings to evaluate, those of an earlier start included."""
    segments: int = Field(default=3, ge=1)
    """Segments by history length, of about equally many validation cases."""
    tree_trials: int = Field(default=0, ge=0)
    """Settings of lambdarank to try; 0: its defaults. With pareto the fusion stays linear."""
    max_cases: int = Field(default=25_000, ge=100)
    """Validation cases to search on; more are sampled."""


class RerankingSettings(Config):
    """How the reranker is weighed."""

    max_cases: int = Field(default=600, ge=50)
    """Validation cases that are reranked; more are sampled."""


class CampaignConfig(JobConfig):
    """Tune a pipeline: its sources, its fusion, and what else the stages name."""

    pipeline: Path
    """Pipeline directory, as jobs.fit left it; every stage improves it in place."""
    dataset: Path
    """The data set that it was fitted on."""
    out: Path
    """Directory of the campaign: journals and report; one that exists is gone on with."""
    stages: tuple[CampaignStage, ...] = (CampaignStage.SOURCES, CampaignStage.FUSION)
    """Any of finetune, sources, fusion, pareto and reranking; they run in this order."""
    minutes: float | None = Field(default=None, gt=0)
    """Time for the searches of the encoder's fine-tuning, the sources and the front together,
    earlier starts included, shared two to four to one; finetune.minutes is taken off first. Their
    last fits, fusion and reranking are bounded by cases and trials, and come on top. Default: until
    the trials are done."""
    finetune: FinetuneSettings = FinetuneSettings()
    sources: SourcesSettings = SourcesSettings()
    fusion: FusionSettings = FusionSettings()
    pareto: ParetoSettings = ParetoSettings()
    reranking: RerankingSettings = RerankingSettings()
    max_cases: int = Field(default=25_000, ge=20)
    """Test cases, and validation cases, to measure on before and after; more are sampled."""
    workers: int | None = Field(default=None, ge=1)
    """Trials at a time; by default as many as the cluster has room for, and never more."""
    cpus: int = Field(default=1, ge=1)
    """CPUs of a trial of a source; no more than a machine of the cluster has."""
    k: int = Field(default=10, ge=1, le=100)
    """Length of the lists that are measured."""
    seed: int = Field(default=0, ge=0)
    """Seed of samplers, samples of cases and bootstrap."""


def campaign(config: CampaignConfig) -> report.CampaignReport:
    """Run the stages that have not been run, measure, write the report.

    Raises:
        ConfigError: a setting contradicts the pipeline, or the campaign in ``out`` is another.
    """
    minutes_of(config)
    if not config.stages:
        raise ConfigError(
            f"setting stages is empty: name any of {', '.join(CampaignStage)} under stages"
        )
    for stage in (CampaignStage.FINETUNE, CampaignStage.SOURCES):
        if stage in config.stages and CampaignStage.FUSION not in config.stages:
            raise ConfigError(
                f"setting stages names {stage} without fusion, whose weights mean nothing once a "
                f"source has changed: add fusion, or run tuning.{stage} alone"
            )
    dataset = Dataset.open(config.dataset)
    fitted = read_config(config.pipeline)
    fitted.refuse_other_data(dataset, config.pipeline)
    if CampaignStage.FINETUNE in config.stages:
        encoder_data(_finetune_campaign(config))
    if CampaignStage.SOURCES in config.stages:
        names_of(_source_campaign(config))
    if CampaignStage.RERANKING in config.stages and not (config.pipeline / "reranker").is_dir():
        raise ConfigError(
            f"setting stages names reranking, but {config.pipeline} has no reranker: run "
            "`python -m jobs.finetune --task reranker` first, or leave reranking out"
        )
    with owned(config.out), cluster.start():
        if CampaignStage.FINETUNE in config.stages:
            room_for(_finetune_campaign(config))
        request = {"dataset": dataset.info.fingerprint, "pipeline": str(config.pipeline.resolve())}
        claim(
            config.out,
            {**request, **{name: getattr(config, name) for name in ("k", "seed", "max_cases")}},
        )
        before = _noted(config, dataset, "before")
        winners = _stages(config)
        after = _noted(config, dataset, "after")
        found = _report(config, dataset, winners, before, after)
        report.write(found, config.out)
    return found


def minutes_of(config: CampaignConfig) -> dict[CampaignStage, float | None]:
    """Minutes of each of the stages that are timed; None: until its trials are done.

    Raises:
        ConfigError: one stage is given more than all have.
    """
    given, total = config.finetune.minutes, config.minutes
    timed: dict[CampaignStage, float | None] = {s: None for s in SHARES if s in config.stages}
    if CampaignStage.FINETUNE in timed:
        timed[CampaignStage.FINETUNE] = given
    if total is None:
        return timed
    taken = sum(filter(None, timed.values()))
    others = [stage for stage, minutes in timed.items() if minutes is None]
    if taken > total or (others and taken == total):
        raise ConfigError(
            f"setting finetune.minutes = {given:g} leaves nothing of minutes = {total:g} for the "
            "other searches: give it less, or more in all"
        )
    parts = sum(SHARES[stage] for stage in others)
    return timed | {stage: (total - taken) * SHARES[stage] / parts for stage in others}


def _stages(config: CampaignConfig) -> tuple[Winner, ...]:
    """Each stage in its order; returns what came of each source."""
    names = ("pipeline", "dataset", "seed", "k")
    common: dict[str, Any] = {name: getattr(config, name) for name in names}
    winners: list[Winner] = []
    if CampaignStage.FINETUNE in config.stages:
        winners.append(search_encoder(_finetune_campaign(config)))
    if CampaignStage.SOURCES in config.stages:
        winners += search_sources(_source_campaign(config))
    if _to_do(config, CampaignStage.FUSION):
        # The front weighs sums: trees would have been grown over other weights.
        linear = CampaignStage.PARETO in config.stages
        settings = {**config.fusion.model_dump(), "workers": config.workers}
        settings["model"] = FusionModel.LINEAR if linear else FusionModel.AUTO
        search_fusion(FusionCampaign(**common, **settings, out=config.out / "fusion"))
        _mark(config, CampaignStage.FUSION)
    if _to_do(config, CampaignStage.PARETO):
        settings = {**config.pareto.model_dump(), "workers": config.workers}
        settings["minutes"] = minutes_of(config)[CampaignStage.PARETO]
        search_front(ParetoCampaign(**common, **settings, out=config.out / "pareto"))
        _mark(config, CampaignStage.PARETO)
    if _to_do(config, CampaignStage.RERANKING):
        weigh(RerankingCampaign(**common, **config.reranking.model_dump()))
        _mark(config, CampaignStage.RERANKING)
    return tuple(winners)


def _finetune_campaign(config: CampaignConfig) -> FinetuneCampaign:
    minutes = minutes_of(config).get(CampaignStage.FINETUNE)
    return FinetuneCampaign(
        **{**config.finetune.model_dump(), "minutes": minutes},
        **{name: getattr(config, name) for name in ("pipeline", "dataset", "seed", "k")},
        out=config.out / CampaignStage.FINETUNE,
        workers=config.workers,
    )


def _source_campaign(config: CampaignConfig) -> SourcesCampaign:
    return SourcesCampaign(
        **config.sources.model_dump(),
        **{name: getattr(config, name) for name in ("pipeline", "dataset", "seed", "k")},
        out=config.out / "sources",
        minutes=minutes_of(config)[CampaignStage.SOURCES],
        workers=config.workers,
        cpus=config.cpus,
    )


def _to_do(config: CampaignConfig, stage: CampaignStage) -> bool:
    return stage in config.stages and not (config.out / f"{stage}.done").is_file()


def _mark(config: CampaignConfig, stage: CampaignStage) -> None:
    (config.out / f"{stage}.done").touch()


def _noted(config: CampaignConfig, dataset: Dataset, name: str) -> dict[str, RealArray]:
    """Test and validation NDCG@k of each case; measured once, and then read.

    ``equal`` is 1 where there were no weights yet, and all sources got the same.
    """
    path = config.out / f"{name}.npz"
    if not path.is_file():
        parts = split(dataset, read_config(config.pipeline).protocol)
        pipeline = Pipeline.load(config.pipeline)
        equal = not (config.pipeline / "fusion.json").is_file()
        if equal:
            pipeline.fusion = _equal(pipeline, parts.validation)
        values = {"equal": np.array([float(equal)])}
        for part, cases in (("test", parts.test), ("validation", parts.validation)):
            chosen = np.random.default_rng(config.seed).permutation(len(cases))
            some = cases.take(np.sort(chosen[: config.max_cases]))
            with bar(f"measuring {name}, {part} part", len(some)) as advance:
                values[part] = _gains(pipeline, some, config.k, advance)
        with path.with_suffix(".tmp").open("wb") as file:
            np.savez(file, allow_pickle=False, **values)
        path.with_suffix(".tmp").replace(path)
    with np.load(path, allow_pickle=False) as known:
        return {part: known[part] for part in ("equal", "test", "validation")}


def _equal(pipeline: Pipeline, cases: Cases) -> Fusion:
    """Equal weights, each source's scores in units of their mean: what a team begins with."""
    some = cases.take(np.arange(min(len(cases), 4 * BLOCK)))
    found = pipeline.candidates(pipeline.embed(some.histories))
    return Fusion.uniform(pipeline.config.sources, scales(found))


def _gains(pipeline: Pipeline, cases: Cases, k: int, advance: Advance) -> RealArray:
    """[B] NDCG@k of the lists that the pipeline answers with."""
    values = []
    for start in range(0, len(cases), BLOCK):
        block = cases.take(np.arange(start, min(start + BLOCK, len(cases))))
        lists = pipeline.recommend(block.histories)
        values.append(ndcg(list_ranks(lists.items, lists.scores, block.targets), k))
        advance(len(block))
    return np.concatenate(values)


def _report(
    config: CampaignConfig,
    dataset: Dataset,
    winners: tuple[Winner, ...],
    before: dict[str, RealArray],
    after: dict[str, RealArray],
) -> report.CampaignReport:
    fitted = read_config(config.pipeline)
    fusion = Fusion.served(config.pipeline) or Fusion.load(config.pipeline / "fusion.json")
    bootstrap = BootstrapConfig(seed=config.seed)

    def compared(part: str) -> Comparison:
        values = np.stack([after[part], before[part]], axis=1)
        return compare("ndcg", ("tuned", "before"), values, bootstrap)

    beside = config.out / "sources"
    named = [(config.out if w.name == CampaignStage.FINETUNE else beside, w.name) for w in winners]
    alone = (CampaignStage.FUSION, CampaignStage.PARETO)
    named += [(config.out, str(name)) for name in alone if name in config.stages]
    trees = config.out / CampaignStage.FUSION / LAMBDARANK
    if (trees / JOURNAL).is_file():
        named.append((trees.parent, LAMBDARANK))
    searches = [history.read(place / name, name, "ndcg") for place, name in named]
    front = config.out / "pareto" / FRONT
    settings = write_fit_settings(config.pipeline, config.dataset, config.out / "winner.yaml")
    return report.CampaignReport(
        dataset=dataset.info,
        protocol=fitted.protocol,
        k=config.k,
        seed=config.seed,
        stages=tuple(stage for stage in CampaignStage if stage in config.stages),
        equal_before=bool(before["equal"][0]),
        test=compared("test"),
        validation=compared("validation"),
        bootstrap=bootstrap,
        winners=winners,
        settings=settings,
        normalisation=str(fusion.normalisation),
        weights=fusion.table(),
        off=fusion.unasked(fitted.sources),
        fallback=fusion.fallback,
        learned=(config.pipeline / LAMBDARANK).is_dir(),
        searches=tuple(searches),
        front=Front.model_validate_json(front.read_bytes()) if front.is_file() else None,
        commands=_commands(config),
    )


def _commands(config: CampaignConfig) -> tuple[str, ...]:
    """What makes the tuned pipeline anew beside itself; keeps what was searched in ``out``."""
    again = config.pipeline.with_name(f"{config.pipeline.name}-again")
    kept = config.out / "winner"
    shutil.rmtree(kept, ignore_errors=True)
    kept.mkdir()
    for name in ("fusion.json", RULES, INFERENCE):
        if (config.pipeline / name).is_file():
            shutil.copy(config.pipeline / name, kept)
    for name in (LAMBDARANK, DIVERSITY, "encoder", "reranker"):
        if (config.pipeline / name).is_dir():
            shutil.copytree(config.pipeline / name, kept / name)
    make = ("jobs.fit", "--config", config.out / "winner.yaml", "--pipeline", again)
    lines: list[tuple[object, ...]] = []
    if (kept / "encoder").is_dir():
        embed = ("jobs.embed", "--pipeline", again, "--encoder", kept / "encoder")
        lines += [("python", "-m", *make, "--prepare"), ("python", "-m", *embed)]
    lines.append(("python", "-m", *make))
    lines.append(("cp", "-r", f"{kept}/.", again))
    lines.append(
        ("python", "-m", "jobs.evaluate", "--pipeline", again, "--dataset", config.dataset)
    )
    return tuple(shlex.join(map(str, line)) for line in lines)


def main() -> None:
    """Parse, run the stages, say what was gained."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # so that Ray is ended, too
    config = parse(CampaignConfig)
    found = campaign(config)
    for part, gain in (("test", found.test), ("validation", found.validation)):
        low, high = gain.difference.low, gain.difference.high
        sys.stdout.write(
            f"{part} NDCG@{config.k}: {gain.mean_b:.4f} before, {gain.mean_a:.4f} tuned, "
            f"gain {gain.difference.mean:+.4f} [{low:+.4f}, {high:+.4f}]\n"
        )
    sys.stdout.write(f"report: {config.out / 'report.html'}\n")


if __name__ == "__main__":
    run(main)
