"""The objective of the search: NDCG@k of a weighted sum, over all cases at once.

What does not depend on the weights is done once: normalisation, and leaving out the cases whose
targets no source proposed (they are 0 under every weight). One evaluation is then one matrix–vector
product over the candidate tensors and a count of who stands above the target.

Shape legend: S sources, M cases with a target among their candidates, C candidates, P pairs of a
case and one of its targets, B all cases.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from fusionrec.data.histories import BoolArray, CodeArray, FloatArray, Histories, IntArray
from fusionrec.fusion.candidates import Candidates
from fusionrec.fusion.normalisation import Normalisation, normalise

_NEVER = np.float32(-1e9)


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
    """[S, M, C] normalised scores."""
    cold: BoolArray
    """[M, C] whether the candidate has no training events."""
    rows: IntArray
    """[M] the case of each row, of B."""
    pair_rows: IntArray
    """[P] row in M."""
    pair_columns: IntArray
    """[P] column in C."""
    ideal: npt.NDArray[np.float64]
    """[M] the best DCG a case could have, all its targets counted."""
    num_cases: int
    """B."""
    padded: BoolArray
    """[M, C] places without a candidate."""
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
        kept = Candidates(candidates.items[rows], candidates.scores[:, rows], candidates.lengths)
        pair_rows, pair_columns = np.nonzero(hit[rows])
        discounts = np.cumsum(1 / np.log2(np.arange(2, k + 2)))
        ideal = discounts[np.minimum(targets.lengths[rows], k) - 1]
        return cls(
            terms=normalise(kept, normalisation, scales),
            cold=cold[np.maximum(kept.items, 0)],
            rows=rows,
            pair_rows=pair_rows,
            pair_columns=pair_columns,
            ideal=ideal,
            num_cases=len(candidates),
            padded=kept.items < 0,
            k=k,
        )

    def take(self, keep: BoolArray) -> Objective:
        """The objective over the cases of ``keep`` [B] alone; rows keep their numbers."""
        mask = keep[self.rows]
        new_row = np.cumsum(mask) - 1
        pairs = mask[self.pair_rows]
        return Objective(
            terms=self.terms[:, mask],
            cold=self.cold[mask],
            rows=self.rows[mask],
            pair_rows=new_row[self.pair_rows[pairs]],
            pair_columns=self.pair_columns[pairs],
            ideal=self.ideal[mask],
            num_cases=self.num_cases,
            padded=self.padded[mask],
            k=self.k,
        )

    def gains(self, weights: FloatArray, cold_factor: float = 1.0) -> FloatArray:
        """[M] NDCG@k of each kept case under [S] ``weights``; ties take their mean rank."""
        num_sources, num_rows, width = self.terms.shape
        flat = self.terms.reshape(num_sources, num_rows * width)
        fused = (weights.astype(np.float32) @ flat).reshape(num_rows, width)
        if cold_factor != 1.0:
            np.multiply(fused, np.float32(cold_factor), out=fused, where=self.cold)
        fused[self.padded] = _NEVER
        target = fused[self.pair_rows, self.pair_columns]
        others = fused if len(target) == num_rows else fused[self.pair_rows]
        above = (others > target[:, None]).sum(axis=1)
        tied = (others == target[:, None]).sum(axis=1) - 1
        rank = 1 + above + tied / 2
        gain = np.where(rank <= self.k, 1 / np.log2(rank + 1), 0)
        total = np.bincount(self.pair_rows, gain, minlength=num_rows)
        return np.asarray(total / self.ideal, dtype=np.float32)

    def value(self, weights: FloatArray, cold_factor: float = 1.0) -> float:
        """Mean NDCG@k over all B cases."""
        return float(self.gains(weights, cold_factor).sum(dtype=np.float64)) / self.num_cases
