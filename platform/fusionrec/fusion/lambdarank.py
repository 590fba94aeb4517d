"""A learned fusion: trees by LambdaMART order the top of the linear fusion's lists again.

    score(h, c) = trees(features(h, c)) + constant(h)    in the first ``depth`` places of the list,
                  linear(h, c)                            behind them,

where ``linear`` is the score of :class:`fusionrec.fusion.model.Fusion`, itself a feature. Trees see
what a weighted sum cannot: that one source is right where another is silent, or about popular items
alone. The constant, one a list, keeps what was read above what was not.

A score is still the sum of its terms. What the trees owe to a source's features is the source's
term, what they owe to the linear score is shared among the sources as its own terms are, and what
they owe to the rest makes the terms ``history``, with the constant, and ``item``.

Burges, From RankNet to LambdaRank to LambdaMART: an overview, MSR-TR-2010-82; the implementation is
LightGBM's, Ke et al., NeurIPS 2017.

Shape legend: B histories, S sources, C candidates, D places that are read, F features, I items,
G = S + 2 terms, R rows: all candidates that are read.
"""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Self

import lightgbm
import numpy as np
from pydantic import Field, ValidationError

from fusionrec.config import Config
from fusionrec.data.histories import BoolArray, FloatArray, Histories, IntArray
from fusionrec.errors import ConfigError
from fusionrec.fusion.candidates import Candidates
from fusionrec.fusion.features import HISTORY, ITEM, LINEAR, ItemStatistics, feature_names, features
from fusionrec.fusion.model import Fused, Fusion, descending, ordered, weigh
from fusionrec.fusion.objective import hits
from fusionrec.fusion.trees import Trees
from fusionrec.space import Range

_MODEL, _SETTINGS, _TIMES = "model.txt", "lambdarank.json", "first_times.npy"
_SMALL = np.float32(1e-9)
_MARGIN = np.float32(1e-4)
"""Relative distance of what was read from what was not: more than float32 can lose in the sums."""


class NothingToLearn(ConfigError):
    """No case has a target in the places that the trees read."""


class LambdaRankConfig(Config):
    """How the trees are grown."""

    trees: Annotated[int, Range(50, 400, log=True)] = Field(default=200, ge=1)
    """Number of trees."""
    learning_rate: Annotated[float, Range(0.02, 0.2, log=True)] = Field(default=0.05, gt=0)
    """Share of each tree that is added."""
    leaves: Annotated[int, Range(4, 64, log=True)] = Field(default=15, ge=2)
    """Leaves of a tree, at most."""
    min_leaf_rows: Annotated[int, Range(20, 2000, log=True)] = Field(default=200, ge=1)
    """Candidates in a leaf, at least."""
    depth: int = Field(default=100, ge=2)
    """Places of the linear list that the trees read."""

    def parameters(self, seed: int) -> dict[str, Any]:
        """In LightGBM's words."""
        return {
            "objective": "lambdarank",
            "learning_rate": self.learning_rate,
            "num_leaves": self.leaves,
            "min_data_in_leaf": self.min_leaf_rows,
            "feature_fraction": 0.7,
            "bagging_fraction": 0.8,
            "bagging_freq": 1,
            "seed": seed,
            "deterministic": True,
            "force_row_wise": True,
            "verbosity": -1,
        }


class _Settings(Config):
    """What ``lambdarank.json`` says."""

    linear: Fusion
    """The weights that the trees were grown over."""
    depth: int = Field(ge=2)
    """Places of the linear list that the trees read."""


@dataclass(frozen=True, slots=True)
class _Head:
    """The first D places of B linear lists, and the rows that the trees see of them."""

    columns: IntArray
    """[B, D] the candidates in these places, best first."""
    read: BoolArray
    """[B, D] whether there is one; R of them."""
    parts: FloatArray
    """[B, S, D] their linear terms."""
    rows: FloatArray
    """[R, F] their features."""
    below: FloatArray
    """[B] the linear score of the best candidate behind them; 0 where there is none."""

    @classmethod
    def of(
        cls,
        linear: Fusion,
        terms: FloatArray,
        candidates: Candidates,
        newest: IntArray,
        items: ItemStatistics,
        depth: int,
    ) -> Self:
        """From the linear ``terms`` [B, S, C] of ``candidates``; the rest as in ``LambdaRank``."""
        scores = terms.sum(axis=1)
        order = descending(candidates.items, scores)
        columns = order[:, :depth]
        read = np.take_along_axis(candidates.items, columns, axis=1) >= 0
        best = np.take_along_axis(scores, columns, axis=1)
        found = features(candidates, columns, best, linear.scale_vector(), items, newest)
        below = np.zeros(len(scores), dtype=np.float32)
        if order.shape[1] > depth:
            behind = np.arange(len(scores)), order[:, depth]
            below = np.where(candidates.items[behind] >= 0, scores[behind], below)
        parts = np.take_along_axis(terms, columns[:, None, :], axis=2)
        return cls(columns, read, parts, found[read], below)


@dataclass(frozen=True, slots=True)
class LambdaRank:
    """Trees over a linear fusion. Threads may share it."""

    linear: Fusion
    depth: int
    items: ItemStatistics
    trees: Trees

    @classmethod
    def fit(
        cls,
        linear: Fusion,
        candidates: Candidates,
        targets: Histories,
        newest: IntArray,
        items: ItemStatistics,
        config: LambdaRankConfig,
        seed: int,
    ) -> Self:
        """Grow the trees on B cases.

        Only cases with a target in the first ``depth`` places of their linear list teach anything.

        Args:
            linear: the fusion whose lists are ordered again.
            candidates: of the cases' histories.
            targets: of the cases.
            newest: [B] time of the newest event of each history.
            items: what training says of the items.
            config: of the trees.
            seed: of the rows and features that each tree sees.

        Raises:
            NothingToLearn: no case has a target in the places that are read.
        """
        (taught,) = np.nonzero(hits(candidates.items, targets).any(axis=1))
        candidates, newest = candidates.take(taught), newest[taught]
        terms = weigh(linear, candidates, items.counts == 0)
        head = _Head.of(linear, terms, candidates, newest, items, config.depth)
        hit = hits(candidates.items, targets.take(taught))
        labels = np.take_along_axis(hit, head.columns, axis=1)
        if not labels.any():
            raise NothingToLearn(
                f"no case has a target among the first {config.depth} places of its list: there is "
                "nothing that lambdarank could learn from; use --model linear"
            )
        # A list without a target in it has no pair to learn from; left in, it would only cost.
        useful = np.repeat(labels.any(axis=1), labels.shape[1]).reshape(labels.shape) & head.read
        data = lightgbm.Dataset(
            head.rows[useful[head.read]],
            labels[useful].astype(np.int8),
            group=useful.sum(axis=1)[labels.any(axis=1)],
            feature_name=list(_features_of(linear, items)),
        )
        booster = lightgbm.train(config.parameters(seed), data, config.trees)
        trees = Trees.of(booster, *_terms_of(linear, items))
        return cls(linear, config.depth, items, trees)

    def fuse(self, candidates: Candidates, newest: IntArray, cold: BoolArray) -> Fused:
        """Weigh and order ``candidates``; ties go to the lower item code.

        Args:
            candidates: scores of S sources, in the order of ``linear.sources``.
            newest: [B] time of the newest event of each history.
            cold: [I] whether an item has no training events.
        """
        terms = weigh(self.linear, candidates, cold)
        head = _Head.of(self.linear, terms, candidates, newest, self.items, self.depth)
        num_sources = len(self.linear.sources)
        grown = np.zeros((*head.read.shape, num_sources + 3), dtype=np.float32)
        grown[head.read] = self.trees.terms(head.rows)
        grown = np.moveaxis(grown, -1, 1)  # [B, sources, history, item, linear; D]
        learned = grown[:, :-1]
        learned[:, :num_sources] += grown[:, -1:] * _shares(head.parts)
        least = np.where(head.read, learned.sum(axis=1), np.inf).min(axis=1, initial=np.inf)
        lowest = head.below + _MARGIN * (1 + np.abs(head.below))
        constant = lowest - np.where(np.isfinite(least), least, 0)
        learned[:, num_sources] += np.where(head.read, constant[:, None], 0)
        every = np.zeros((len(terms), num_sources + 2, terms.shape[2]), dtype=np.float32)
        every[:, :num_sources] = terms
        np.put_along_axis(every, head.columns[:, None, :], learned, axis=2)
        return ordered(candidates.items, every, (*self.linear.sources, HISTORY, ITEM))

    @classmethod
    def load(cls, directory: Path, counts: IntArray) -> Self:
        """The inverse of :meth:`save`; ``counts`` [I] are the training events of each item.

        Raises:
            ConfigError: a part is missing or inconsistent.
        """
        path = directory / _SETTINGS
        try:
            settings = _Settings.model_validate_json(path.read_bytes())
            times = directory / _TIMES
            first = np.load(times, allow_pickle=False) if times.is_file() else None
            items = ItemStatistics(counts, first)
            terms = _terms_of(settings.linear, items)
            trees = Trees.load(directory / _MODEL, *terms)
        except (OSError, lightgbm.basic.LightGBMError) as error:
            raise ConfigError(
                f"{directory} cannot be read: remove it and run `python -m tuning.fusion`"
            ) from error
        except ValidationError as error:
            raise ConfigError(f"{path} is wrong: {error.errors()[0]['msg']}") from error
        return cls(settings.linear, settings.depth, items, trees)

    def save(self, directory: Path) -> None:
        """Write beside, then rename."""
        beside = directory.with_suffix(".tmp")
        shutil.rmtree(beside, ignore_errors=True)
        beside.mkdir(parents=True)
        settings = _Settings(linear=self.linear, depth=self.depth)
        (beside / _SETTINGS).write_text(settings.model_dump_json(indent=2), encoding="utf-8")
        if self.items.first_times is not None:
            np.save(beside / _TIMES, self.items.first_times, allow_pickle=False)
        self.trees.save(beside / _MODEL)
        shutil.rmtree(directory, ignore_errors=True)
        beside.replace(directory)

    def table(self) -> dict[str, dict[str, float]]:
        """The share of each term's features in what the trees gained, for people."""
        gains = self.trees.booster.feature_importance("gain")
        found = dict.fromkeys((*self.linear.sources, HISTORY, ITEM, LINEAR), 0.0)
        for name, gain in zip(_features_of(self.linear, self.items), gains, strict=True):
            found[name.rpartition(".")[0]] += float(gain)
        total = sum(found.values())
        return {"trees, share of gain": {name: gain / total for name, gain in found.items()}}

    def grown_over(self, linear: Fusion) -> bool:
        """Whether ``linear`` is what the trees were grown over, the reranker's weights aside."""
        return _without_reranker(self.linear) == _without_reranker(linear)


def _features_of(linear: Fusion, items: ItemStatistics) -> tuple[str, ...]:
    return feature_names(linear.sources, has_timestamps=items.first_times is not None)


def _terms_of(linear: Fusion, items: ItemStatistics) -> tuple[IntArray, int]:
    """[F] the term of each feature: S sources, history, item, linear; and how many terms."""
    terms = (*linear.sources, HISTORY, ITEM, LINEAR)
    found = [terms.index(name.rpartition(".")[0]) for name in _features_of(linear, items)]
    return np.array(found, dtype=np.int64), len(terms)


def _shares(parts: FloatArray) -> FloatArray:
    """[B, S, D] what each source contributes to linear terms [B, S, D]; equal where all are 0."""
    sizes = np.abs(parts)
    total = sizes.sum(axis=1, keepdims=True)
    equal = np.float32(1 / parts.shape[1])
    return np.where(total > _SMALL, sizes / np.maximum(total, _SMALL), equal)


def _without_reranker(fusion: Fusion) -> Fusion:
    plain = tuple(segment.model_copy(update={"reranker": 0.0}) for segment in fusion.segments)
    return fusion.model_copy(update={"segments": plain})
