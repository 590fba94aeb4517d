"""Making the scores of different sources comparable, so that their weighted sum means something.

For the scores x of one source over the candidates of one history:

- ``scale``   x / scale, one constant a source: how sure a source is carries over between histories
- ``max``     x / max(x): every source is equally sure about every history
- ``zscore``  (x − mean(x)) / std(x), Montague & Aslam (2001)
- ``log``     log(1 + max(x, 0) / mean of the positive x): damps the few very large scores

A source that scores a history's candidates all 0 contributes 0 under each of them.

Shape legend: S sources, B histories, C candidates.
"""

from __future__ import annotations

from enum import StrEnum

import numpy as np

from fusionrec.data.histories import BoolArray, FloatArray
from fusionrec.fusion.candidates import Candidates

_SMALL = np.float32(1e-9)


class Normalisation(StrEnum):
    """How scores are made comparable; see the module."""

    SCALE = "scale"
    MAX = "max"
    ZSCORE = "zscore"
    LOG = "log"


def scales(candidates: Candidates) -> FloatArray:
    """[S] the mean of each source's positive scores; 1 where it has none."""
    found = np.ones(len(candidates.scores), dtype=np.float32)
    for source, scores in enumerate(candidates.scores):
        positive = scores[scores > 0]
        if positive.size:
            found[source] = positive.mean(dtype=np.float64)
    return found


def normalise(
    candidates: Candidates, method: Normalisation, source_scales: FloatArray
) -> FloatArray:
    """[S, B, C] normalised scores; 0 where the item is −1.

    Args:
        candidates: scores as they came.
        method: one for all sources.
        source_scales: [S] constants of ``scale``.
    """
    valid = candidates.items >= 0
    result = np.empty_like(candidates.scores)
    for source, scores in enumerate(candidates.scores):
        one = _normalise(np.where(valid, scores, 0), valid, method, source_scales[source])
        result[source] = np.where(valid, one, 0)
    return result


def _normalise(
    scores: FloatArray, valid: BoolArray, method: Normalisation, scale: np.float32
) -> FloatArray:
    if method is Normalisation.SCALE:
        return np.asarray(scores / scale)
    if method is Normalisation.MAX:
        return np.asarray(scores / np.maximum(scores.max(axis=1, keepdims=True), _SMALL))
    if method is Normalisation.ZSCORE:
        count = np.maximum(valid.sum(axis=1, keepdims=True), 1).astype(np.float32)
        centred = np.where(valid, scores - scores.sum(axis=1, keepdims=True) / count, 0)
        deviation = np.sqrt((centred**2).sum(axis=1, keepdims=True) / count)
        return np.asarray(centred / np.maximum(deviation, _SMALL) * (deviation > _SMALL))
    positive = np.maximum(scores, 0)
    count = np.maximum((positive > 0).sum(axis=1, keepdims=True), 1).astype(np.float32)
    mean = positive.sum(axis=1, keepdims=True) / count
    return np.asarray(np.log1p(positive / np.maximum(mean, _SMALL)))
