"""The union of what the sources propose, with every source's score for every candidate.

Shape legend: B histories, S sources, K items a source proposes, C candidates after the union.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from fusionrec.data.histories import BoolArray, CodeArray, FloatArray, Histories, IntArray
from fusionrec.fusion.rules import Rules
from fusionrec.sources.protocol import Source

_BLOCK = 32
"""Histories asked about at a time: an answer may hold a score of every item for each."""


@dataclass(frozen=True, slots=True)
class Candidates:
    """Up to C candidates for each of B histories."""

    items: CodeArray
    """[B, C] item codes in ascending order, −1 behind them."""
    scores: FloatArray
    """[S, B, C] each source's score, as it came; 0 where the item is −1."""
    lengths: IntArray
    """[B] number of events of each history."""

    def __len__(self) -> int:
        return len(self.items)

    def take(self, rows: IntArray | BoolArray) -> Candidates:
        """The candidates of some histories, by number or by mask."""
        return Candidates(self.items[rows], self.scores[:, rows], self.lengths[rows])


def union(rankings: Sequence[CodeArray]) -> CodeArray:
    """[B, C] the distinct codes ≥ 0 of several [B, K] arrays, ascending, padded with −1 behind."""
    codes = np.concatenate(rankings, axis=1)
    codes = np.where(codes < 0, np.iinfo(np.int32).max, codes)
    codes.sort(axis=1)
    repeated = np.zeros(codes.shape, dtype=np.bool_)
    repeated[:, 1:] = codes[:, 1:] == codes[:, :-1]
    codes[repeated] = np.iinfo(np.int32).max
    codes.sort(axis=1)
    width = max(1, int((codes < np.iinfo(np.int32).max).sum(axis=1).max(initial=0)))
    codes = codes[:, :width]
    return np.where(codes == np.iinfo(np.int32).max, -1, codes).astype(np.int32)


def candidates(
    sources: Sequence[Source],
    histories: Histories,
    k: int,
    rules: Rules | None = None,
    fallback: str | None = None,
) -> Candidates:
    """The union of the top ``k`` of every source that ``rules`` permit, scored by every source.

    The source named ``fallback`` is asked only for histories of which the others propose fewer than
    ``k``; its scores for all others are 0.
    """
    blocks = [
        _candidates(
            sources, histories.slice(start, min(start + _BLOCK, len(histories))), k, rules, fallback
        )
        for start in range(0, max(len(histories), 1), _BLOCK)
    ]
    return blocks[0] if len(blocks) == 1 else stack(blocks)


def _candidates(
    sources: Sequence[Source],
    histories: Histories,
    k: int,
    rules: Rules | None,
    fallback: str | None,
) -> Candidates:
    rows = np.arange(len(histories))
    answers = {s.name: (rows, s.ask(histories)) for s in sources if s.name != fallback}
    items = union([answer.top(k).items for _, answer in answers.values()])
    if fallback is not None:
        (short,) = np.nonzero(
            (items >= 0 if rules is None else rules.allows(items)).sum(axis=1) < k
        )
        if len(short):
            [source] = (source for source in sources if source.name == fallback)
            answer = source.ask(histories.take(short))
            answers[fallback] = short, answer
            more = np.full((len(items), k), -1, dtype=np.int32)
            top = answer.top(k).items
            more[short, : top.shape[1]] = top
            items = union([items, more])
    if rules is not None:
        items = union([rules.keep(items, histories, k)])
    scores = np.zeros((len(sources), *items.shape), dtype=np.float32)
    for number, source in enumerate(sources):
        if source.name in answers:
            asked, answer = answers[source.name]
            scores[number, asked] = answer.score(items[asked])
    return Candidates(items, scores, histories.lengths)


def stack(parts: Sequence[Candidates]) -> Candidates:
    """One batch out of several, padded to the widest."""
    width = max(part.items.shape[1] for part in parts)

    def wide(array: Any, fill: int) -> Any:
        padding = [(0, 0)] * (array.ndim - 1) + [(0, width - array.shape[-1])]
        return np.pad(array, padding, constant_values=fill)

    return Candidates(
        np.concatenate([wide(part.items, -1) for part in parts]),
        np.concatenate([wide(part.scores, 0) for part in parts], axis=1),
        np.concatenate([part.lengths for part in parts]),
    )
