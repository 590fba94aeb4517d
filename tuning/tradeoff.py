"""What a point is worth beside NDCG: diversity, coverage, and what it costs.

A point is a *trust* in each source, the weights of the diversity of lists and the cap per category.
A trust multiplies a source's weights in every segment; below ``OFF`` the source is not asked at
all: what only it proposed is gone, and so is its time. Each point is fused and made diverse by the
very functions that the pipeline uses.

Shape legend: B cases, S sources, C candidates, I items, D dimensions of a text vector.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from fusionrec.data.histories import BoolArray, CodeArray, FloatArray, Histories
from fusionrec.evaluation.beyond import category_diversity, coverage, text_diversity
from fusionrec.evaluation.metrics import ndcg
from fusionrec.evaluation.ranks import list_ranks
from fusionrec.fusion.candidates import Candidates, stack, union
from fusionrec.fusion.diversity import DIVERSITY, Diversity, DiversityConfig
from fusionrec.fusion.model import Fusion, fuse
from fusionrec.fusion.rules import Rules
from fusionrec.serving.pipeline import Pipeline
from fusionrec.sources.protocol import Source
from fusionrec.sources.semantic import Semantic

TRUST, SPREAD = "trust.", "diversity."
"""What the names of a point's parameters begin with."""
CAP = f"{SPREAD}max_per_category"
"""The parameter that is no weight: a whole number, as many as there are places for no cap."""
EXPOSURE = f"{SPREAD}exposure"
"""The factor on the prices of exposure: 1 keeps the share that they were found for."""
OFF = 0.1
"""Trust below which a source is not asked."""
MOST = 2.0
"""Largest trust: twice the weights that were found."""
SPREAD_OFF, SPREAD_MOST = 0.05, 0.5
"""Weight of diversity below which it is 0, and the largest that is tried, in spreads of a list's
scores."""
BLOCK = 32
"""Histories asked about at a time."""


@dataclass(frozen=True, slots=True)
class Tradeoff:
    """The candidates of B cases, ready to be weighed in any way. Holds data alone."""

    fusion: Fusion
    """What trusts of 1 give."""
    diversity: Diversity
    """What the pipeline has; its weights are replaced."""
    histories: Histories
    candidates: Candidates
    proposed: BoolArray
    """[S, B, C] which source proposed which candidate."""
    targets: Histories
    cold: BoolArray
    """[I]"""
    vectors: FloatArray | None
    """[I, D] text vectors; None where there are none."""
    categories: Sequence[Sequence[str]]
    """Of the I items: what diversity is taken over without vectors."""
    cost_ms: dict[str, float]
    """What a source, and the diversity of lists, adds to the time of one history."""
    k: int = 10

    def start(self) -> dict[str, float]:
        """The parameters of the pipeline as it is, whose names are those of every point."""
        used = {n for segment in self.fusion.segments for n, w in segment.weights.items() if w > 0}
        trusts = {f"{TRUST}{n}": float(n in used) for n in self.fusion.sources}
        config, categorised = self.diversity.config, len(self.diversity.categories.codes) > 0
        names = ["similarity", "calibration"] if categorised else []
        names.append("popularity")
        if self.diversity.releases is not None:
            names.append("freshness")
        if self.diversity.prices is not None:
            names.append("exposure")
        weights = {f"{SPREAD}{name}": float(getattr(config, name)) for name in names}
        cap = min(config.max_per_category or config.places, config.places)
        return trusts | weights | ({CAP: float(cap)} if categorised else {})

    def measure(self, point: Mapping[str, float]) -> dict[str, float]:
        """ndcg, diversity (where items have text or categories), coverage and latency_ms."""
        fusion = weighed(self.fusion, point)
        on = [self.fusion.sources.index(name) for name in fusion.sources]
        kept = self.proposed[on].any(axis=0)
        fused = fuse(
            fusion,
            Candidates(
                np.where(kept, self.candidates.items, -1).astype(np.int32),
                self.candidates.scores[on],
                self.candidates.lengths,
            ),
            self.cold,
        )
        diverse = replace(self.diversity, config=diversified(self.diversity.config, point))
        fused = diverse.apply(self.histories, fused)
        lists = fused.items[:, : self.k]
        gains = ndcg(list_ranks(fused.items, fused.scores, self.targets), self.k)
        values = {"ndcg": float(gains.mean())}
        diversity = (
            category_diversity(lists, self.categories)
            if self.vectors is None
            else text_diversity(lists, self.vectors)
        )
        if diversity is not None:
            values["diversity"] = diversity
        values["coverage"] = coverage(lists, len(self.cold)) or 0.0
        asked = [*fusion.sources, *([DIVERSITY] if diverse.config.changes else [])]
        values["latency_ms"] = sum(self.cost_ms[name] for name in asked)
        return values


def diversified(config: DiversityConfig, point: Mapping[str, float]) -> DiversityConfig:
    """``config`` with the weights and the cap of ``point``."""
    weights = {n.removeprefix(SPREAD): w for n, w in point.items() if n.startswith(SPREAD)}
    update: dict[str, float | None] = {n: w if w >= SPREAD_OFF else 0.0 for n, w in weights.items()}
    if CAP in point:
        cap = int(point[CAP])
        update["max_per_category"] = cap if cap < config.places else None
    return config.model_copy(update=update)


def weighed(fusion: Fusion, point: Mapping[str, float]) -> Fusion:
    """``fusion`` with the trusts of ``point`` in its sources; those that are off are not in it.

    A source whose weights were all 0 gets a segment's mean weight where it is trusted after all.
    The reranker's weight was found for other scores and becomes 0.
    """
    trust = {name: point[f"{TRUST}{name}"] for name in fusion.sources}
    on = [name for name in fusion.sources if trust[name] >= OFF]
    on = on or [max(fusion.sources, key=lambda name: trust[name])]
    used = {n for segment in fusion.segments for n, w in segment.weights.items() if w > 0}
    segments = []
    for segment in fusion.segments:
        mean = float(np.mean([w for w in segment.weights.values() if w > 0] or [1.0]))
        weights = {n: trust[n] * (segment.weights[n] if n in used else mean) for n in on}
        segments.append(segment.model_copy(update={"weights": weights, "reranker": 0.0}))
    return fusion.model_copy(
        update={
            "sources": tuple(on),
            "scales": {name: fusion.scales[name] for name in on},
            "segments": tuple(segments),
        }
    )


def collect(
    sources: Sequence[Source], histories: Histories, k: int, rules: Rules | None = None
) -> tuple[Candidates, BoolArray]:
    """The candidates of all sources that ``rules`` permit, and [S, B, C] who proposed which.

    What the rules fill up with counts as proposed by all.
    """
    parts, marks = [], []
    for start in range(0, len(histories), BLOCK):
        block = histories.slice(start, min(start + BLOCK, len(histories)))
        answers = [source.ask(block) for source in sources]
        tops = [answer.top(k).items for answer in answers]
        items = union(tops)
        if rules is not None:
            items = union([rules.keep(items, block, k)])
        scores = np.stack([answer.score(items) for answer in answers])
        parts.append(Candidates(items, scores, block.lengths))
        mark = np.stack([_among(items, top) for top in tops])
        marks.append(mark | ((items >= 0) & ~mark.any(axis=0)))
    found = stack(parts)
    proposed = np.zeros(found.scores.shape, dtype=np.bool_)
    start = 0
    for mark in marks:
        proposed[:, start : start + mark.shape[1], : mark.shape[2]] = mark
        start += mark.shape[1]
    return found, proposed


def _among(items: CodeArray, top: CodeArray) -> BoolArray:
    """[B, C] whether each of ``items`` is in its row of ``top``."""
    stride = int(items.max(initial=0)) + 2  # −1 of a row is no item of the row before
    row = np.arange(len(items))[:, None] * stride + 1
    return np.isin(items + row, (top + row)[top >= 0]) & (items >= 0)


def cost_ms(pipeline: Pipeline, histories: Histories, diversity: Diversity) -> dict[str, float]:
    """Median milliseconds for one history, of each source and of making its list diverse.

    A source proposes, and scores what all have proposed; ``semantic`` needs the encoder for that.
    """
    every = {"similarity": 1.0, "calibration": 1.0, "popularity": 1.0}
    whole = replace(diversity, config=diversity.config.model_copy(update=every))
    names = [source.name for source in pipeline.sources]
    spent: dict[str, list[float]] = {name: [] for name in [*names, DIVERSITY]}

    def timed(name: str, start: float) -> None:
        spent[name].append(1000 * (time.perf_counter() - start))

    for row in range(len(histories)):
        asked = histories.slice(row, row + 1)
        start = time.perf_counter()
        alone = pipeline.embed(asked)
        embed_s = time.perf_counter() - start
        found = pipeline.candidates(alone)
        for source in pipeline.sources:
            start = time.perf_counter()
            if source.name == Semantic.name:
                start -= embed_s
            answer = source.ask(alone)
            answer.top(pipeline.config.candidates)
            answer.score(found.items)
            timed(source.name, start)
        fused = fuse(pipeline.fusion, found, pipeline.item_counts == 0)
        start = time.perf_counter()
        whole.apply(alone, fused)
        timed(DIVERSITY, start)
    return {name: round(float(np.median(times)), 4) for name, times in spent.items()}
