"""The objective of the search: NDCG@k of a weighted sum, over all cases at once.

What does not depend on the weights is done once: normalisation, and leaving out the cases whose
targets no source proposed (they are 0 under every weight). The candidates of a case are put in the
order of equal weights, its targets first, and cut into tiles. An evaluation weighs the tiles that
hold targets, and most cases are decided: k candidates stand above the target. For the others, the
largest scores in a tile, weighed, bound what the tile holds, and only tiles that may hold something
as good as the target are weighed too.

Nothing is estimated. A bound takes the operations of a score in the same order, and rounding is
monotone, so that no score exceeds its tile's bound. The order is that of
:func:`fusionrec.fusion.model.fuse` as well: what is tied there is tied here.

Shape legend: S sources, B all cases, M cases with a target among their candidates, C candidates,
P pairs of a case and one of its targets, A tiles, W candidates of a tile, Q pairs of a target and a
tile of its case.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt

from fusionrec.data.histories import BoolArray, CodeArray, FloatArray, Histories, IntArray
from fusionrec.data.ties import tied_targets
from fusionrec.fusion.candidates import Candidates
from fusionrec.fusion.normalisation import Normalisation, normalise

_WIDTH = 32
"""W is a multiple: wide enough that one tile decides most cases, narrow enough to read little."""
_BLOCK = 1024
"""Tiles weighed together: their scores stay in the processor's cache."""


def hits(items: CodeArray, targets: Histories) -> BoolArray:
    """[B, C] which of ``items`` [B, C] are among the targets of their case."""
    hit = np.zeros(items.shape, dtype=np.bool_)
    for position in range(int(targets.lengths.max(initial=0))):
        (having,) = np.nonzero(targets.lengths > position)
        target = targets.items[targets.offsets[having] + position]
        hit[having] |= items[having] == target[:, None]
    return hit


@dataclass(frozen=True, slots=True)
class Objective:
    """Scores of one normalisation, ready to be weighed. Holds arrays alone: cheap to share."""

    terms: FloatArray
    """[S, A, W] normalised scores; NaN, which compares with nothing, where there is no candidate.
    Tiles with a target come first."""
    bounds: FloatArray
    """[S, A] the largest of each tile."""
    cold: BoolArray
    """[A, W] whether the candidate has no training events."""
    tile_rows: IntArray
    """[A] row in M."""
    rows: IntArray
    """[M] the case of each row, of B."""
    pair_rows: IntArray
    """[P] row in M."""
    pair_places: IntArray
    """[P] place in A · W."""
    near: IntArray
    """[2, Q] pair and tile, of the tiles with a target."""
    far: IntArray
    """[2, Q] pair and tile, of the others."""
    ideal: npt.NDArray[np.float64]
    """[M] the best DCG a case could have, all its targets counted."""
    num_cases: int
    """B."""
    k: int = 10

    @classmethod
    def of(
        cls,
        candidates: Candidates,
        targets: Histories,
        normalisation: Normalisation,
        scales: FloatArray,
        cold: BoolArray,
        k: int = 10,
    ) -> Objective:
        """From the candidates of B cases and their targets; ``cold`` is [I]."""
        hit = hits(candidates.items, targets)
        (rows,) = np.nonzero(hit.any(axis=1))
        kept, hit = candidates.take(rows), hit[rows]
        terms = normalise(kept, normalisation, scales)
        terms[:, kept.items < 0] = np.nan  # NaN is sorted to the end
        order = np.argsort(np.where(hit, -np.inf, -terms.sum(axis=0)), axis=1)
        width = _WIDTH * -(-2 * k // _WIDTH)
        padding = ((0, 0), (0, -order.shape[1] % width))

        def cut(array: npt.NDArray[Any], empty: Any) -> npt.NDArray[Any]:
            """[M, C] as [M · tiles of a row, W]."""
            ordered = np.take_along_axis(array, order, axis=1)
            return np.pad(ordered, padding, constant_values=empty).reshape(-1, width)

        is_target, items = cut(hit, False), cut(kept.items, -1)
        has_target, has_any = is_target.any(axis=1), items[:, 0] >= 0
        tiles = np.concatenate([np.flatnonzero(has_target), np.flatnonzero(has_any & ~has_target)])
        tile_rows = tiles // ((order.shape[1] + padding[1][1]) // width)
        tiled = np.stack([cut(one, np.nan)[tiles] for one in terms])
        places = np.flatnonzero(is_target[tiles])
        pair_rows = tile_rows[places // width]
        near, far = _meetings(pair_rows, tile_rows, int(has_target.sum()))
        discounts = np.cumsum(1 / np.log2(np.arange(2, k + 2)))
        return cls(
            terms=tiled,
            bounds=np.fmax.reduce(tiled, axis=2),
            cold=cold[np.maximum(items[tiles], 0)],
            tile_rows=tile_rows,
            rows=rows,
            pair_rows=pair_rows,
            pair_places=places,
            near=near,
            far=far,
            ideal=discounts[np.minimum(targets.lengths[rows], k) - 1],
            num_cases=len(candidates),
            k=k,
        )

    def take(self, keep: BoolArray) -> Objective:
        """The objective over the cases of ``keep`` [B] alone; rows keep their numbers."""
        width = self.terms.shape[2]
        rows = keep[self.rows]
        tiles, pairs = rows[self.tile_rows], rows[self.pair_rows]
        new_row, new_tile = np.cumsum(rows) - 1, np.cumsum(tiles) - 1
        tile_rows, pair_rows = new_row[self.tile_rows[tiles]], new_row[self.pair_rows[pairs]]
        place = self.pair_places[pairs]
        places = new_tile[place // width] * width + place % width
        near, far = _meetings(pair_rows, tile_rows, int(tiles[: self._num_near].sum()))
        return replace(
            self,
            terms=self.terms[:, tiles],
            bounds=self.bounds[:, tiles],
            cold=self.cold[tiles],
            tile_rows=tile_rows,
            rows=self.rows[rows],
            pair_rows=pair_rows,
            pair_places=places,
            near=near,
            far=far,
            ideal=self.ideal[rows],
        )

    def of_sources(self, keep: BoolArray) -> Objective:
        """The objective with the sources of ``keep`` [S] alone, over the same candidates."""
        return replace(self, terms=self.terms[keep], bounds=self.bounds[keep])

    def gains(self, weights: FloatArray, cold_factor: float = 1.0) -> FloatArray:
        """[M] NDCG@k of each kept case under [S] ``weights`` ≥ 0; ties take their mean rank."""
        weights, factor = weights.astype(np.float32), np.float32(cold_factor)
        assert weights.min() >= 0, "the largest scores of a tile bound it under weights ≥ 0 alone"
        assert factor >= 0
        num_pairs = len(self.pair_rows)
        blocks = [self._fused(weights, factor, tiles) for tiles in _blocks(self._num_near)]
        fused = np.concatenate([np.empty((0, self.terms.shape[2]), np.float32), *blocks])
        target = fused.reshape(-1)[self.pair_places]
        above, level = np.zeros(num_pairs), np.zeros(num_pairs)

        def count(pairs: IntArray, scores: FloatArray) -> None:
            """Of each pair: who in ``scores`` [len(pairs), W] stands above it, or level."""
            own = target[pairs, None]
            for total, found in ((above, scores > own), (level, scores == own)):
                total += np.bincount(pairs, np.count_nonzero(found, axis=1), num_pairs)

        count(self.near[0], fused[self.near[1]])
        pairs, tiles = self.far[:, (above < self.k)[self.far[0]]]
        bound = _weighed(self.bounds, weights, tiles)
        may_reach = np.maximum(bound, bound * factor) >= target[pairs]
        pairs, tiles = pairs[may_reach], tiles[may_reach]
        for block in _blocks(len(tiles)):
            count(pairs[block], self._fused(weights, factor, tiles[block]))

        rank = above + (level + 1) / 2
        if num_pairs > len(self.rows):  # several targets of a case may be level
            order, share = tied_targets(self.pair_rows, target)
            rank = above + order * (level + 1) / (share + 1)
        gain = np.where(rank <= self.k, 1 / np.log2(rank + 1), 0)
        total = np.bincount(self.pair_rows, gain, minlength=len(self.rows))
        return np.asarray(total / self.ideal, dtype=np.float32)

    def value(self, weights: FloatArray, cold_factor: float = 1.0) -> float:
        """Mean NDCG@k over all B cases."""
        return float(self.gains(weights, cold_factor).sum(dtype=np.float64)) / self.num_cases

    @property
    def _num_near(self) -> int:
        return int(self.near[1].max(initial=-1)) + 1

    def _fused(
        self, weights: FloatArray, factor: np.float32, tiles: slice | IntArray
    ) -> FloatArray:
        """[number of ``tiles``, W] fused scores."""
        fused = _weighed(self.terms, weights, tiles)
        fused.reshape(-1)[np.flatnonzero(self.cold[tiles])] *= factor
        return fused


def _weighed(terms: FloatArray, weights: FloatArray, tiles: slice | IntArray) -> FloatArray:
    """[number of ``tiles``, …] weighted sums of ``terms`` [S, A, …], source after source."""
    total: FloatArray = terms[0, tiles] * weights[0]
    for source in range(1, len(weights)):
        if weights[source]:
            total += terms[source, tiles] * weights[source]
    return total


def _meetings(pair_rows: IntArray, tile_rows: IntArray, num_near: int) -> tuple[IntArray, IntArray]:
    """[2, Q] every pair with every tile of its row: those before ``num_near``, and the others."""
    by_row = np.argsort(tile_rows, kind="stable")
    first = np.searchsorted(tile_rows[by_row], pair_rows, side="left")
    last = np.searchsorted(tile_rows[by_row], pair_rows, side="right")
    pairs = np.repeat(np.arange(len(pair_rows)), last - first)
    begins = np.cumsum(last - first) - (last - first)  # in the result
    tiles = by_row[np.arange(len(pairs)) + (first - begins)[pairs]]
    both, near = np.stack([pairs, tiles]), tiles < num_near
    return both[:, near], both[:, ~near]


def _blocks(count: int) -> Iterator[slice]:
    return (slice(start, min(start + _BLOCK, count)) for start in range(0, count, _BLOCK))
