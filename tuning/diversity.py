"""Buy diversity with a given share of NDCG, or set it: the pipeline's diversity term.

The weights that are given say what is wanted relative to each other; the search finds the largest
factor on all of them at which the mean NDCG of the validation cases keeps 1 − ``--max-loss`` of
what it has without them. Caps are not searched: they are rules, and hold whatever they cost; the
prices that keep an item within its share of the lists are found anew for every factor. Leaves
``diversity/`` in the pipeline directory; with every weight 0 and no cap it removes it.
"""

from __future__ import annotations

import shutil
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Self

import numpy as np
from pydantic import Field
from rich.table import Table

from fusionrec.bundles.gate import forget_measurements
from fusionrec.config import JobConfig, parse
from fusionrec.data.dataset import Dataset
from fusionrec.data.histories import CodeArray, FloatArray, Histories
from fusionrec.data.releases import RELEASES, Releases
from fusionrec.data.splits import Cases, split
from fusionrec.evaluation.beyond import category_diversity, coverage, gini
from fusionrec.evaluation.metrics import ndcg
from fusionrec.evaluation.ranks import list_ranks
from fusionrec.fusion.diversity import (
    DIVERSITY,
    Diversity,
    DiversityConfig,
    ItemCategories,
    check_freshness,
)
from fusionrec.fusion.exposure import capped_prices, exposures
from fusionrec.fusion.model import Fused
from fusionrec.progress import bar, console
from fusionrec.serving.pipeline import Pipeline, Stage
from jobs.entry import run

WEIGHTS = ("similarity", "calibration", "popularity", "freshness")
FACTORS = (0.0, 0.02, 0.05, 0.1, 0.2, 0.3, 0.5, 0.75, 1.0, 1.5, 2.0, 3.0)
"""Factors on the weights that are tried; 0 leaves the caps alone."""
BLOCK = 256
"""Histories that travel through the pipeline together."""


@dataclass(frozen=True, slots=True)
class Measured:
    """What the lists of one setting are."""

    term: Diversity
    ndcg: float
    diversity: float
    """1 − Jaccard of the categories of two items of a list; 0 where items have no categories."""
    coverage: float
    """Share of the catalogue that is recommended to anybody."""
    gini: float
    """Of exposure: 0 is even."""
    most: float
    """Share of the lists that the item is in which is in most."""

    @classmethod
    def of(
        cls,
        term: Diversity,
        fused: Fused,
        cases: Cases,
        categories: Sequence[Sequence[str]],
        k: int,
    ) -> Self:
        """Measure the lists of ``cases``."""
        lists = fused.items[:, :k]
        return cls(
            term,
            float(ndcg(list_ranks(fused.items, fused.scores, cases.targets), k).mean()),
            category_diversity(lists, categories) or 0.0,
            coverage(lists, len(categories)) or 0.0,
            gini(lists, len(categories)) or 0.0,
            float(exposures(lists, k, len(categories)).max() / len(lists)),
        )

    @property
    def settings(self) -> DiversityConfig:
        """What the lists were made with."""
        return self.term.config


class DiversityCampaign(JobConfig):
    """Find how much diversity a share of NDCG buys, on the validation cases."""

    pipeline: Path
    """Pipeline directory, as tuning.fusion left it; diversity/ goes there."""
    dataset: Path
    """The data set that it was fitted on."""
    diversity: DiversityConfig = DiversityConfig(similarity=1.0)
    """What is wanted; weights are relative to each other."""
    search: bool = True
    """Whether a factor on the weights is searched; otherwise they are taken as they are."""
    max_loss: float = Field(default=0.01, ge=0, lt=1)
    """Share of NDCG that a searched factor may give up."""
    max_cases: int = Field(default=2_000, ge=20)
    """Validation cases to measure on; more are sampled."""
    k: int = Field(default=10, ge=1)
    """Length of the lists that are measured."""
    seed: int = Field(default=0, ge=0)
    """Seed of the sample of cases."""


def diversify(config: DiversityCampaign) -> tuple[DiversityConfig, list[Measured]]:
    """Search, write; returns what was chosen and all that was measured, without the term first.

    Raises:
        ConfigError: the pipeline was fitted on another data set, or does not know how fresh items
            are where that is wanted.
    """
    if not config.diversity.changes:
        shutil.rmtree(config.pipeline / DIVERSITY, ignore_errors=True)
        forget_measurements(config.pipeline)
        return config.diversity, []
    dataset = Dataset.open(config.dataset)
    pipeline = Pipeline.load(config.pipeline, stages=frozenset({Stage.EMBEDDER, Stage.RETRIEVER}))
    pipeline.config.refuse_other_data(dataset, config.pipeline)
    validation = split(dataset, pipeline.config.protocol).validation
    cases = validation.sample(config.max_cases, config.seed)
    categories = dataset.catalogue.categories
    plain, releases = DiversityConfig(), Releases.load(config.pipeline / RELEASES)
    check_freshness(config.diversity, releases, "--diversity")
    term = Diversity(plain, ItemCategories.of(categories), pipeline.item_counts, releases)
    lists = _fused(pipeline, cases)

    def measure(wanted: DiversityConfig) -> Measured:
        made = priced(replace(term, config=wanted), lists, config.k)
        return Measured.of(made, _filled(made, lists), cases, categories, config.k)

    measured = [measure(plain)]
    factors = FACTORS if config.search else (1.0,)
    with bar("filling the lists", len(factors)) as advance:
        for factor in factors:
            measured.append(measure(scaled(config.diversity, factor)))
            advance()
    # The first factor leaves no weight: what the cap alone costs is not given up for them.
    least = measured[1].ndcg * (1 - config.max_loss)
    chosen = [each for each in measured[1:] if each.ndcg >= least][-1]
    chosen.term.save(config.pipeline / DIVERSITY)
    forget_measurements(config.pipeline)
    return chosen.settings, measured


def scaled(wanted: DiversityConfig, factor: float) -> DiversityConfig:
    """``wanted`` with all weights times ``factor``."""
    weights = {name: factor * getattr(wanted, name) for name in WEIGHTS}
    return wanted.model_copy(update=weights)


def priced(term: Diversity, lists: Sequence[tuple[Histories, Fused]], k: int) -> Diversity:
    """``term`` with the prices under which it keeps its cap on exposure in these lists, if any.

    Args:
        term: what fills the lists.
        lists: blocks of histories with their lists, as they are without it.
        k: places of a list that count.
    """
    config = term.config
    if config.max_exposure is None:
        return term
    whole = replace(term, config=config.model_copy(update={"exposure": 1.0}))
    heads = [(histories, fused.head(config.depth)) for histories, fused in lists]
    spread = np.concatenate([term.spread(head.items, head.scores) for _, head in heads])

    def fill(prices: FloatArray) -> tuple[CodeArray, FloatArray]:
        fused = _filled(replace(whole, prices=prices), heads)
        return fused.items, fused.scores / spread[:, None]

    return replace(term, prices=capped_prices(fill, len(term.item_counts), config.max_exposure, k))


def _filled(term: Diversity, lists: Sequence[tuple[Histories, Fused]]) -> Fused:
    return Fused.join([term.apply(histories, fused) for histories, fused in lists])


def _fused(pipeline: Pipeline, cases: Cases) -> list[tuple[Histories, Fused]]:
    """Blocks of histories with their lists, as they are without the term."""
    pipeline.diversity = None
    found = []
    with bar("making the lists", len(cases)) as advance:
        for start in range(0, len(cases), BLOCK):
            block = cases.histories.slice(start, min(start + BLOCK, len(cases)))
            found.append((block, pipeline.retrieve(pipeline.embed(block))))
            advance(len(block))
    return found


def main() -> None:
    """Parse, search, report."""
    config = parse(DiversityCampaign)
    chosen, measured = diversify(config)
    if not measured:
        sys.stdout.write("nothing is wanted: the lists stay as they are\n")
        return
    columns = ("NDCG", "diversity", "coverage", "Gini", "most exposed")
    table = Table(*WEIGHTS, *columns, title=f"Lists of {config.k}")
    for each in measured:
        marked = each is not measured[0] and each.settings == chosen
        weights = [f"{getattr(each.settings, name):.3g}" for name in WEIGHTS]
        values = (each.ndcg, each.diversity, each.coverage, each.gini, each.most)
        shown = [f"{value:.4f}" for value in values]
        table.add_row(*weights, *shown, style="bold" if marked else None)
    console.print(table)
    sys.stdout.write(f"diversity: {config.pipeline / DIVERSITY}\n")


if __name__ == "__main__":
    run(main)
