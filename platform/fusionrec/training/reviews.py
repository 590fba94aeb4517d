"""Reviews of training events, for a rater to read beside history and item, or to pretrain on.

Events of validation and test tell nothing to either. What is read for a rating was written before
it, by strictly earlier times; and of the item only what others wrote. The rated event's own review
would tell the rating (Catherine & Cohen, TransNets, RecSys 2017, measure how much), so it is never
among them. Where the raw files give no times, an item's reviews are all that others wrote in
training.

Shape legend: P ratings, R reviews of each side, W reviews of all training events.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Self

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from fusionrec.data.dataset import Dataset
from fusionrec.data.histories import CodeArray, Histories, IntArray
from fusionrec.errors import TrainingError
from fusionrec.training.examples import Examples
from fusionrec.training.ratings import training_events


@dataclass(frozen=True, slots=True)
class Reviews:
    """W reviews, oldest first."""

    texts: pa.ChunkedArray
    """[W]"""
    users: CodeArray
    """[W]"""
    items: CodeArray
    """[W]"""
    times: IntArray
    """[W] seconds since the epoch, or the position among the user's events."""
    timed: bool
    """Whether the times of different users can be compared."""

    @classmethod
    def of(cls, dataset: Dataset, train: Histories) -> Self:
        """Of the events that ``train`` holds."""
        events = dataset.events
        texts = pc.utf8_trim_whitespace(dataset.interactions(["text"]).column("text"))
        written = np.asarray(pc.fill_null(pc.greater(pc.utf8_length(texts), 0), False))
        chosen = training_events(events, train)
        chosen = chosen[written[chosen]]
        chosen = chosen[np.lexsort((chosen, events.timestamps[chosen]))]
        return cls(
            texts.take(pa.array(chosen)),
            events.users[chosen],
            events.items[chosen],
            events.timestamps[chosen],
            dataset.info.has_timestamps,
        )

    def before(
        self, users: CodeArray | IntArray, items: CodeArray, times: IntArray, count: int
    ) -> CodeArray:
        """[P, 2, R] the newest ``count`` reviews by each user, and by others of each item.

        Args:
            users: [P] who rates.
            items: [P] what is rated.
            times: [P] when; only what is older is found.
            count: R; −1 behind where there are fewer.
        """
        found = np.full((len(users), 2, count), -1, dtype=np.int32)
        by_user, by_item = _grouped(self.users), _grouped(self.items)
        for row in range(len(users)):
            user, item, time = int(users[row]), int(items[row]), int(times[row])
            own = by_user.get(user, _NONE)
            own = own[: np.searchsorted(self.times[own], time)]
            others = by_item.get(item, _NONE)
            if self.timed:
                others = others[: np.searchsorted(self.times[others], time)]
            others = others[self.users[others] != user]
            for side, reviews in enumerate((own, others)):
                newest = reviews[::-1][:count]
                found[row, side, : len(newest)] = newest
        return found

    def beside(self, examples: Examples, count: int) -> Examples:
        """``examples`` with ``count`` reviews of each side, and the texts of those.

        Args:
            examples: Made from the training histories, these still whole.
            count: R.

        Raises:
            TrainingError: there are no reviews.
        """
        if not len(self.users):
            raise TrainingError(
                f"setting num_reviews = {count} is wrong: the data set has no reviews in its "
                "training events; leave --num-reviews out"
            )
        train = examples.seen
        times = train.timestamps[train.offsets[examples.users] + examples.histories.lengths]
        found = self.before(examples.users, examples.positives, times, count)
        used, places = np.unique(found, return_inverse=True)
        used = used[used >= 0]
        # −1 comes first where it is there at all.
        codes = places.reshape(found.shape) - int((found < 0).any())
        return replace(
            examples, reviews=codes.astype(np.int32), review_texts=tuple(self.text_of(used))
        )

    def text_of(self, codes: CodeArray | IntArray) -> list[str]:
        """The texts of reviews."""
        texts: list[str] = self.texts.take(pa.array(codes, pa.int64())).to_pylist()
        return texts


_NONE = np.empty(0, dtype=np.int64)


def _grouped(keys: CodeArray) -> dict[int, IntArray]:
    """Key → its positions, ascending."""
    order = np.argsort(keys, kind="stable")
    distinct, starts = np.unique(keys[order], return_index=True)
    return dict(zip(distinct.tolist(), np.split(order, starts[1:]), strict=True))
