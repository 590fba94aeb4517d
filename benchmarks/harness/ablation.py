"""What each source, and the language model, adds to the lists that are served.

What is left out takes its weight along, so the others are weighed anew on validation, and where
trees order the lists, trees are grown anew on validation without its features. Both are compared on
test, case by case.

Shape legend: B cases, S sources.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Self

import numpy as np

from fusionrec.data.histories import BoolArray, IntArray
from fusionrec.data.splits import Cases, Split
from fusionrec.evaluation.metrics import ndcg
from fusionrec.evaluation.ranks import RealArray, list_ranks
from fusionrec.evaluation.significance import BootstrapConfig, Comparison, compare
from fusionrec.fusion.candidates import Candidates
from fusionrec.fusion.features import newest_times
from fusionrec.fusion.lambdarank import LambdaRank, LambdaRankConfig
from fusionrec.fusion.model import Fusion
from fusionrec.fusion.objective import Objective
from fusionrec.fusion.refine import Setting, bagged
from fusionrec.progress import bar
from fusionrec.serving.pipeline import Pipeline
from tuning.fusion import collect

BLOCK = 512
"""Cases whose lists are held at a time."""
_SMALL = 1e-9


@dataclass(frozen=True, slots=True)
class LeftOut:
    """What is lost without something."""

    name: str
    weight: float | None
    """Of a source as it is served, the mean over the test cases, relative to the largest."""
    lost: Comparison
    """NDCG@k on the test cases: with it against without it."""


@dataclass(frozen=True, slots=True)
class Part:
    """Validation or test: cases, what the sources propose for them, and linear weights of that."""

    cases: Cases
    candidates: Candidates
    objective: Objective

    @classmethod
    def of(cls, pipeline: Pipeline, fusion: Fusion, cases: Cases, k: int) -> Self:
        """Ask the sources of ``pipeline``, which are those of ``fusion``."""
        found, cold = collect(pipeline, cases), pipeline.item_counts == 0
        scales = fusion.scale_vector()
        objective = Objective.of(found, cases.targets, fusion.normalisation, scales, cold, k)
        return cls(cases, found, objective)

    def of_sources(self, keep: BoolArray) -> Self:
        """Of the sources ``keep`` [S] alone; what only the others proposed stays."""
        candidates = replace(self.candidates, scores=self.candidates.scores[keep])
        return replace(self, candidates=candidates, objective=self.objective.of_sources(keep))

    def trees_gain(self, trees: LambdaRank, cold: BoolArray) -> RealArray:
        """[B] NDCG of the lists that ``trees`` order."""
        newest, values = newest_times(self.cases.histories), []
        for start in range(0, len(self.cases), BLOCK):
            rows = np.arange(start, min(start + BLOCK, len(self.cases)))
            lists = trees.fuse(self.candidates.take(rows), newest[rows], cold)
            ranks = list_ranks(lists.items, lists.scores, self.cases.targets.take(rows))
            values.append(ndcg(ranks, self.objective.k))
        return np.concatenate(values)


@dataclass(frozen=True, slots=True)
class Parts:
    """Both parts, of the same sources."""

    validation: Part
    test: Part

    @classmethod
    def of(cls, pipeline: Pipeline, fusion: Fusion, parts: Split, k: int) -> Self:
        """Ask the sources of ``pipeline`` for the cases of both."""
        validation, test = (
            Part.of(pipeline, fusion, cases, k) for cases in (parts.validation, parts.test)
        )
        return cls(validation, test)

    def of_sources(self, keep: BoolArray) -> Self:
        """Of the sources ``keep`` [S] alone."""
        return replace(
            self, validation=self.validation.of_sources(keep), test=self.test.of_sources(keep)
        )


class Ablation:
    """The lists that a pipeline serves, against those without a part of it.

    Costs a search from the served weights for each thing left out and, under trees, growing them.
    """

    def __init__(
        self, pipeline: Pipeline, parts: Split, config: BootstrapConfig, k: int = 10
    ) -> None:
        self._pipeline, self._parts, self._config, self._k = pipeline, parts, config, k
        self._cold = pipeline.item_counts == 0
        fusion = pipeline.fusion
        self._material = Parts.of(pipeline, fusion, parts, k)
        # Segments without weights of their own have the same: what is found for one holds for all.
        factors = np.array([segment.cold_factor for segment in fusion.segments], dtype=np.float32)
        points = np.column_stack([fusion.weight_matrix(), factors])
        self._points, self._point_of = np.unique(points, axis=0, return_inverse=True)
        self._served = [Setting(point[:-1], float(point[-1])) for point in self._points]
        test = self._material.test
        if pipeline.learned is None:
            self._whole = _every(test.objective, self._served, self._of_cases(parts.test))
        else:
            self._whole = test.trees_gain(pipeline.learned, self._cold)

    def without_each(self, groups: Mapping[str, Sequence[str]]) -> list[LeftOut]:
        """Leave out the sources of each group; name of the group → names of its sources."""
        sources = self._pipeline.fusion.sources
        of_cases = self._of_cases(self._parts.test)
        weights = np.bincount(of_cases, minlength=len(self._points)) @ self._points[:, :-1]
        weights /= max(float(weights.max()), _SMALL)
        found = []
        with bar("leaving out", len(groups)) as advance:
            for name, group in groups.items():
                keep = np.array([source not in group for source in sources])
                weight = float(weights[sources.index(group[0])]) if len(group) == 1 else None
                found.append(self._left_out(name, weight, self._material.of_sources(keep), keep))
                advance(note=name)
        return found

    def instead(self, pipeline: Pipeline, names: Mapping[str, Sequence[str]]) -> list[LeftOut]:
        """Let the sources of ``pipeline`` take the place of those of their names.

        ``names``: what is left out → the sources that stay.
        """
        others = pipeline.config.sources
        fusion = self._pipeline.fusion.of_sources(others)
        material = Parts.of(pipeline, fusion, self._parts, self._k)
        found = []
        for name, staying in names.items():
            keep = np.array([source in staying for source in self._pipeline.fusion.sources])
            mine = material.of_sources(np.array([source in staying for source in fusion.sources]))
            found.append(self._left_out(name, None, mine, keep))
        return found

    def _left_out(
        self, name: str, weight: float | None, material: Parts, keep: BoolArray
    ) -> LeftOut:
        seed, among = self._config.seed, self._of_cases(self._parts.validation)
        settings = [
            bagged(
                material.validation.objective.take(among == number), setting.of_sources(keep), seed
            )
            for number, setting in enumerate(self._served)
        ]
        learned, test = self._pipeline.learned, material.test
        if learned is None:
            values = _every(test.objective, settings, self._of_cases(self._parts.test))
        else:
            validation = material.validation
            trees = LambdaRank.fit(
                self._linear(settings, keep),
                validation.candidates,
                validation.cases.targets,
                newest_times(validation.cases.histories),
                learned.items,
                LambdaRankConfig(depth=learned.depth),
                seed,
            )
            values = test.trees_gain(trees, self._cold)
        both = np.stack([self._whole, values], axis=1)
        names = ("as served", f"without {name}")
        return LeftOut(name, weight, compare("ndcg", names, both, self._config))

    def _linear(self, settings: Sequence[Setting], keep: BoolArray) -> Fusion:
        """The fusion of the sources ``keep`` [S] under one of ``settings`` a point."""
        fusion = self._pipeline.fusion
        names = [name for name, kept in zip(fusion.sources, keep, strict=True) if kept]
        segments = []
        for segment, point in zip(fusion.segments, self._point_of.tolist(), strict=True):
            weights = dict(zip(names, settings[point].weights.tolist(), strict=True))
            factor = settings[point].cold_factor
            segments.append(segment.model_copy(update={"weights": weights, "cold_factor": factor}))
        return fusion.of_sources(names).model_copy(update={"segments": tuple(segments)})

    def _of_cases(self, cases: Cases) -> IntArray:
        """[B] the point of the weights that each case is served with."""
        found: IntArray = self._point_of[self._pipeline.fusion.segment_of(cases.histories.lengths)]
        return found


def _every(objective: Objective, settings: Sequence[Setting], setting_of: IntArray) -> RealArray:
    """[B] NDCG of every case under the setting that it has; 0 where no source proposed a target."""
    every = np.zeros(objective.num_cases)
    for number, setting in enumerate(settings):
        part = objective.take(setting_of == number)
        every[part.rows] = setting.gains(part)
    return every
