"""Transitions: what tends to follow an item, several steps on.

    W[a, b] = Σ over training histories with a at step i, b at step i + d, d ≤ steps:  decay^(d−1)
              / count(a)^from_power / count(b)^to_power

A first-order Markov chain is ``steps=1, from_power=1``. The wider window with decay is the
sequential rules of Ludewig & Jannach, "Evaluation of Session-based Recommendation Algorithms"
(2018), with counts damped by powers instead of normalised. The decay is set, or learned:
:mod:`fusionrec.sources.decays`.
"""

from __future__ import annotations

from typing import Annotated, Literal, TypeAlias

import numpy as np
import scipy.sparse as sp
from pydantic import Field

from fusionrec.config import Config
from fusionrec.retrieval.neighbours import top_neighbours
from fusionrec.retrieval.rows import SparseRows
from fusionrec.sources.protocol import TrainingData
from fusionrec.space import Range

Decay: TypeAlias = Annotated[float, Field(gt=0, le=1)] | Literal["learned"]
"""A setting: a factor, or that it is to be learned from the training events."""


class Transitions(Config):
    """Learns from the order of events."""

    kind: Literal["transitions"] = "transitions"
    steps: Annotated[int, Range(1, 50, log=True)] = Field(default=20, ge=1)
    """How many events apart two items may be."""
    decay: Annotated[Decay, Range(0.2, 1)] = 0.8
    """Weight of a step relative to the one before it; learned: that under which held-out training
    events are most likely."""
    from_power: Annotated[float, Range(0, 1)] = Field(default=0.5, ge=0, le=1)
    """Damping of frequent earlier items."""
    to_power: Annotated[float, Range(0, 1)] = Field(default=0.0, ge=0, le=1)
    """Damping of frequent later items; 0 lets popularity count."""

    def learn(self, data: TrainingData, neighbours: int) -> SparseRows:
        """Count, with a decay that is known. Cost: ``steps`` passes over the events."""
        assert isinstance(self.decay, float), "what is learned is put in before"
        items = data.histories.items
        end = np.repeat(data.histories.offsets[1:], data.histories.lengths)
        position = np.arange(len(items))
        shape = (data.num_items, data.num_items)
        weights = sp.csr_array(shape, dtype=np.float32)
        for step in range(1, self.steps + 1):
            (first,) = np.nonzero(position + step < end)
            value = np.full(len(first), self.decay ** (step - 1), dtype=np.float32)
            weights = weights + sp.csr_array((value, (items[first], items[first + step])), shape)
        weights.setdiag(0)
        counts = np.maximum(np.bincount(items, minlength=data.num_items), 1).astype(np.float32)
        rows = np.repeat(np.arange(data.num_items), np.diff(weights.indptr))
        weights.data *= counts[rows] ** -self.from_power
        weights.data *= counts[weights.indices] ** -self.to_power
        return top_neighbours(weights, neighbours)
