"""Boosted trees as sums of terms: what each feature adds to each row, exactly.

A leaf's value is spread over the features on the way to it: each split is credited with the change
that it makes to the node's value (Saabas, 2014). What a row's leaves say of its features is then a
table look-up, and its sum is the output of the trees. TreeSHAP, LightGBM's ``pred_contrib``, adds
up as well and treats splits near the root and near the leaf alike, but costs far more than the
prediction itself: too much for every candidate of every request.

Shape legend: R rows, F features, G terms, L leaves of all trees, T trees.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import lightgbm
import numpy as np
import numpy.typing as npt
import scipy.sparse

from fusionrec.data.histories import FloatArray, IntArray

_BLOCK = 16_384
"""Rows whose leaves are held at a time."""


@dataclass(frozen=True, slots=True)
class Trees:
    """Trees and what each of their leaves adds to each term. Threads may share it."""

    booster: lightgbm.Booster
    leaf_terms: FloatArray
    """[L, G] of the leaves of all trees, tree after tree."""
    first_leaves: IntArray
    """[T] row of each tree's first leaf."""

    @classmethod
    def of(cls, booster: lightgbm.Booster, term_of: IntArray, num_terms: int) -> Self:
        """From trained trees; ``term_of`` [F] is the term that each feature belongs to."""
        dumped = booster.dump_model()["tree_info"]
        sizes = np.array([tree["num_leaves"] for tree in dumped], dtype=np.int64)
        first = np.cumsum(sizes) - sizes
        table = np.zeros((int(sizes.sum()), num_terms), dtype=np.float32)
        for tree, start in zip(dumped, first.tolist(), strict=True):
            nothing = np.zeros(num_terms)
            for leaf, terms in _paths(tree["tree_structure"], term_of, nothing):
                table[start + leaf] = terms
        return cls(booster, table, first)

    def terms(self, rows: FloatArray) -> FloatArray:
        """[R, G] what the trees add to each term of [R, F] ``rows``; over G, their output.

        Their output but for a constant, the sum of the values at the roots. One thread: requests
        come side by side.
        """
        found = np.zeros((len(rows), self.leaf_terms.shape[1]), dtype=np.float32)
        num_trees, num_leaves = len(self.first_leaves), len(self.leaf_terms)
        for start in range(0, len(rows), _BLOCK):
            block = rows[start : start + _BLOCK]
            leaves = self.booster.predict(block, pred_leaf=True, num_threads=1)
            chosen = np.asarray(leaves, dtype=np.int64).reshape(len(block), num_trees)
            chosen += self.first_leaves
            which = scipy.sparse.csr_array(
                (
                    np.ones(chosen.size, dtype=np.float32),
                    chosen.ravel(),
                    np.arange(len(block) + 1) * num_trees,
                ),
                shape=(len(block), num_leaves),
            )
            found[start : start + len(block)] = which @ self.leaf_terms
        return found

    @classmethod
    def load(cls, path: Path, term_of: IntArray, num_terms: int) -> Self:
        """The inverse of :meth:`save`."""
        return cls.of(lightgbm.Booster(model_file=path), term_of, num_terms)

    def save(self, path: Path) -> None:
        """Write ``path``, LightGBM's text."""
        self.booster.save_model(path)


def _paths(
    node: dict[str, Any], term_of: IntArray, terms: npt.NDArray[np.float64]
) -> Iterator[tuple[int, npt.NDArray[np.float64]]]:
    """Each leaf under ``node`` with [G] what the splits on the way to it add up to."""
    if "split_feature" not in node:
        yield node.get("leaf_index", 0), terms
        return
    for side in ("left_child", "right_child"):
        child = node[side]
        changed = terms.copy()
        value = child.get("internal_value", child.get("leaf_value"))
        changed[term_of[node["split_feature"]]] += value - node["internal_value"]
        yield from _paths(child, term_of, changed)
