"""The fusion: how much each source is trusted, for each segment.

    score(h, c) = Σ_s  weight[segment(h), s] · cold(c, segment(h)) · normalised(score_s(h, c))

A segment is a range of history lengths; ``cold`` is a factor on items without training events. The
reranker's score is one more term over the top of the list. Since the score is a sum, its terms
explain it exactly.

A source of the pipeline that is not in the fusion is *off*: it is not asked. The *fallback* is in
it, and is asked only for a history of which the others propose too few: popularity for people of
whom nothing is known, where it adds nothing to anybody else's list.

Shape legend: B histories, S sources, C candidates, T terms.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import numpy as np
from pydantic import Field, ValidationError, model_validator

from fusionrec.config import Config
from fusionrec.data.histories import BoolArray, CodeArray, FloatArray, IntArray
from fusionrec.errors import ConfigError
from fusionrec.fusion.candidates import Candidates
from fusionrec.fusion.normalisation import Normalisation, normalise

RERANKER = "reranker"
"""Name of the reranker's term."""
LAMBDARANK = "lambdarank"
"""Directory of the learned fusion in a pipeline's, beside ``fusion.json``."""
FALLBACK = "popularity"
"""The source that knows something for everybody, those of whom nothing is known among them."""
_FALLBACK_WEIGHT = 1e-3
"""Relative to the largest: it orders what the others say nothing of, and little else."""


class Segment(Config):
    """Weights for histories of up to ``max_events`` events."""

    max_events: int | None = None
    """Longest history of the segment, in events; None has no bound."""
    weights: dict[str, float]
    """Source → weight; every source of the fusion has one."""
    cold_factor: float = Field(default=1.0, ge=0)
    """Factor on the terms of items without training events."""
    reranker: float = Field(default=0.0, ge=0)
    """Weight of the reranker's term; at 0 the segment is not reranked."""


class Fusion(Config):
    """Everything that ``fusion.json`` holds."""

    sources: tuple[str, ...]
    """Names in the order of the score tensors."""
    normalisation: Normalisation = Normalisation.SCALE
    """Common to all sources."""
    scales: dict[str, float]
    """Source → the constant of the normalisation ``scale``."""
    segments: tuple[Segment, ...] = Field(min_length=1)
    """By ascending ``max_events``; the last one has no bound."""
    fallback: str | None = None
    """The one of ``sources`` that is asked only where the others propose too few; None: all are
    always asked."""
    off: dict[str, float] = Field(default_factory=dict)
    """Source that a search turned off, or made the fallback → the share of the samples of the cases
    in which its weight was 0; see :func:`fusionrec.fusion.refine.trusted`."""

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        bounds = [s.max_events for s in self.segments[:-1] if s.max_events is not None]
        last = self.segments[-1].max_events
        ascending = len(bounds) == len(self.segments) - 1 and bounds == sorted(set(bounds))
        if last is not None or not ascending:
            raise ValueError("segments must ascend in max_events, and the last one have none")
        for named in (self.scales, *(segment.weights for segment in self.segments)):
            if set(named) != set(self.sources):
                raise ValueError(f"weights and scales must name exactly {list(self.sources)}")
        if self.fallback is not None and (
            self.fallback not in self.sources or len(self.sources) == 1
        ):
            raise ValueError(f"fallback {self.fallback!r} must be one of several sources")
        return self

    @classmethod
    def uniform(cls, sources: tuple[str, ...], scales: FloatArray) -> Self:
        """Equal trust in every source, everywhere: where a search starts from."""
        return cls(
            sources=sources,
            scales=dict(zip(sources, map(float, scales), strict=True)),
            segments=(Segment(weights=dict.fromkeys(sources, 1.0)),),
        )

    def of_sources(self, names: Sequence[str]) -> Self:
        """The same over the sources ``names`` alone, in that order."""
        return self.model_copy(
            update={
                "sources": tuple(names),
                "scales": {name: self.scales[name] for name in names},
                "segments": tuple(
                    segment.model_copy(update={"weights": {n: segment.weights[n] for n in names}})
                    for segment in self.segments
                ),
                "fallback": self.fallback if self.fallback in names else None,
            }
        )

    def with_fallback(self, name: str, scale: float) -> Self:
        """With one more source, asked only where the others propose too few."""
        segments = []
        for segment in self.segments:
            weight = _FALLBACK_WEIGHT * max(segment.weights.values())
            weights = {**segment.weights, name: weight}
            segments.append(segment.model_copy(update={"weights": weights}))
        return self.model_copy(
            update={
                "sources": (*self.sources, name),
                "scales": {**self.scales, name: scale},
                "segments": tuple(segments),
                "fallback": name,
            }
        )

    def without(self, names: Collection[str]) -> Self:
        """Without the sources ``names``, which are off; popularity stays as the fallback."""
        kept = self.of_sources([name for name in self.sources if name not in names])
        if FALLBACK not in names or FALLBACK not in self.sources:
            return kept
        return kept.with_fallback(FALLBACK, self.scales[FALLBACK])

    @property
    def personal(self) -> Self:
        """Without the fallback."""
        return self.of_sources([name for name in self.sources if name != self.fallback])

    def asked(self) -> Self:
        """Without the sources that have weight 0 in every segment, unless all have."""
        used = {n for segment in self.segments for n, w in segment.weights.items() if w > 0}
        unused = set(self.sources) - used
        return self.without(unused) if used and unused else self

    def unasked(self, fitted: Sequence[str]) -> dict[str, float | None]:
        """Which of the sources ``fitted`` are not always asked → why, as :attr:`off` says."""
        names = [name for name in fitted if name not in self.sources or name == self.fallback]
        return {name: self.off.get(name) for name in names}

    def segment_of(self, lengths: IntArray) -> IntArray:
        """[B] the segment of histories of these lengths."""
        bounds = [s.max_events for s in self.segments if s.max_events is not None]
        return np.searchsorted(np.array(bounds, dtype=np.int64), lengths, side="left")

    def scale_vector(self) -> FloatArray:
        """[S] the constants of the normalisation ``scale``."""
        return np.array([self.scales[name] for name in self.sources], dtype=np.float32)

    def weight_matrix(self) -> FloatArray:
        """[segments, S] weights."""
        rows = [[segment.weights[name] for name in self.sources] for segment in self.segments]
        return np.array(rows, dtype=np.float32)

    def reranked(self, lengths: IntArray) -> FloatArray:
        """[B] the reranker's weight for histories of these lengths."""
        weights = np.array([segment.reranker for segment in self.segments], dtype=np.float32)
        return np.asarray(weights[self.segment_of(lengths)])

    def table(self) -> dict[str, dict[str, float]]:
        """Segment → term → weight, for people: "≤ 5 events", "more"."""
        names = [f"≤ {s.max_events} events" for s in self.segments[:-1]]
        names.append("more" if names else "all")
        return {
            name: {**s.weights, "cold factor": s.cold_factor, "reranker": s.reranker}
            for name, s in zip(names, self.segments, strict=True)
        }

    @classmethod
    def load(cls, path: Path) -> Self:
        """Read ``fusion.json``.

        Raises:
            ConfigError: the file is missing or inconsistent.
        """
        try:
            return cls.model_validate_json(path.read_bytes())
        except OSError as error:
            raise ConfigError(f"{path} cannot be read: run `python -m tuning.fusion`") from error
        except ValidationError as error:
            raise ConfigError(f"{path} is wrong: {error.errors()[0]['msg']}") from error

    @classmethod
    def served(cls, directory: Path) -> Self | None:
        """What a pipeline directory is served with; None where nothing has been searched.

        Trees were grown over a fusion as it stands; else what has no weight is not asked.

        Raises:
            ConfigError: the file is inconsistent.
        """
        path = directory / "fusion.json"
        if not path.is_file():
            return None
        fusion = cls.load(path)
        return fusion if (directory / LAMBDARANK).is_dir() else fusion.asked()

    def save(self, path: Path) -> None:
        """Write beside, then rename."""
        beside = path.with_suffix(".tmp")
        beside.write_text(self.model_dump_json(indent=2), encoding="utf-8")
        beside.replace(path)


@dataclass(frozen=True, slots=True)
class Fused:
    """B lists of up to C candidates, best first, with the terms of each score."""

    items: CodeArray
    """[B, C] item codes; −1 behind the end of a list."""
    scores: FloatArray
    """[B, C] descending."""
    terms: FloatArray
    """[B, T, C] weighted terms; their sum over T is the score."""
    term_names: tuple[str, ...]
    """T names: the sources, then ``reranker`` where there is one."""

    def head(self, depth: int | None) -> Fused:
        """The first ``depth`` places of each list; all of them for None."""
        if depth is None or depth >= self.items.shape[1]:
            return self
        return Fused(
            # Copies: a view would keep all the rest alive, and be sent along with it.
            items=self.items[:, :depth].copy(),
            scores=self.scores[:, :depth].copy(),
            terms=self.terms[:, :, :depth].copy(),
            term_names=self.term_names,
        )

    @classmethod
    def join(cls, parts: Sequence[Self]) -> Self:
        """The lists of all ``parts``, in their order; shorter ones are filled up with −1."""
        width = max(part.items.shape[1] for part in parts)

        def filled(name: str, value: float) -> Any:
            arrays = [getattr(part, name) for part in parts]
            missing = [((0, 0),) * (a.ndim - 1) + ((0, width - a.shape[-1]),) for a in arrays]
            return np.concatenate(
                [np.pad(a, m, constant_values=value) for a, m in zip(arrays, missing, strict=True)]
            )

        names = parts[0].term_names
        return cls(filled("items", -1), filled("scores", 0), filled("terms", 0), names)

    def reranked(self, rows: IntArray, terms: FloatArray) -> Fused:
        """The lists sorted again, with one more term.

        Args:
            rows: the lists that it is not 0 in.
            terms: [rows, R] the term in the first R places of these.
        """
        added = np.zeros(self.items.shape, dtype=np.float32)
        added[rows, : terms.shape[1]] = terms
        return ordered(
            self.items,
            np.concatenate([self.terms, added[:, None, :]], axis=1),
            (*self.term_names, RERANKER),
        )


def fuse(fusion: Fusion, candidates: Candidates, cold: BoolArray) -> Fused:
    """Weigh and order ``candidates``; ties go to the lower item code.

    Args:
        fusion: the weights.
        candidates: scores of S sources, in the order of ``fusion.sources``.
        cold: [I] whether an item has no training events.
    """
    return ordered(candidates.items, weigh(fusion, candidates, cold), fusion.sources)


def weigh(fusion: Fusion, candidates: Candidates, cold: BoolArray) -> FloatArray:
    """[B, S, C] the weighted terms of ``candidates`` as they stand; see :func:`fuse`."""
    segment = fusion.segment_of(candidates.lengths)
    terms = normalise(candidates, fusion.normalisation, fusion.scale_vector())
    terms *= fusion.weight_matrix()[segment].T[:, :, None]
    factors = np.array([s.cold_factor for s in fusion.segments], dtype=np.float32)[segment]
    is_cold = cold[np.maximum(candidates.items, 0)]
    terms *= np.where(is_cold, factors[:, None], np.float32(1))
    return np.moveaxis(terms, 0, 1)


def descending(items: CodeArray, scores: FloatArray) -> IntArray:
    """[B, C] the columns of each row by descending score, ties by the item code, −1 at the end."""
    key = np.where(items >= 0, -scores, np.inf)
    return np.lexsort((items, key), axis=1)


def ordered(items: CodeArray, terms: FloatArray, term_names: tuple[str, ...]) -> Fused:
    """Sum [B, T, C] ``terms`` and put each row in descending order, −1 at the end."""
    scores = terms.sum(axis=1)
    order = descending(items, scores)
    return Fused(
        items=np.take_along_axis(items, order, axis=1),
        scores=np.take_along_axis(scores, order, axis=1),
        terms=np.take_along_axis(terms, order[:, None, :], axis=2),
        term_names=term_names,
    )
