"""The oracle: the true probability of every item as the next event of a user.

No model can rank better than it on average; how far one stays behind says what is left to learn.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Self

import numpy as np

from fusionrec.data.histories import FloatArray, Histories
from fusionrec.data.splits import Cases
from fusionrec.data.synthetic.choice import NUM_RECENT, probabilities
from fusionrec.data.synthetic.world import World
from fusionrec.errors import DataError

FILE = "oracle.npz"
_BATCH = 512


@dataclass(frozen=True, slots=True)
class Oracle:
    """Knows the latent world that a synthetic data set was drawn from."""

    world: World
    user_ids: tuple[str, ...]
    """Ids of the users, in the order of ``world.tastes``."""

    @classmethod
    def load(cls, directory: Path) -> Self:
        """Read the oracle that lies beside a synthetic data set.

        Raises:
            DataError: there is none in ``directory``.
        """
        path = Path(directory) / FILE
        if not path.is_file():
            raise DataError(
                f"{directory} has no {FILE}: only a synthetic data set has an oracle; "
                "generate one with fusionrec.data.synthetic.generate"
            )
        with np.load(path, allow_pickle=False) as arrays:
            world = {field.name: arrays[field.name] for field in fields(World)}
            world["noise"] = float(world["noise"])
            return cls(World(**world), tuple(arrays["user_ids"].tolist()))

    def save(self, directory: Path) -> None:
        """Write the oracle beside the data set in ``directory``."""
        arrays = {field.name: getattr(self.world, field.name) for field in fields(World)}
        np.savez(Path(directory) / FILE, user_ids=np.array(self.user_ids), **arrays)

    def scores(self, cases: Cases, user_ids: Sequence[str]) -> FloatArray:
        """[B, I] the probability of each item as the next event of each case.

        An item of the history, or one that is not released yet, has probability 0. The moment is
        that of the first target; where a case has several, the scores are those of the first.

        Args:
            cases: cases of a split of the data set.
            user_ids: ``Split.user_ids``: what ``cases.users`` are positions in.
        """
        row_of = {user_id: row for row, user_id in enumerate(self.user_ids)}
        users = np.array([row_of[user_ids[user]] for user in cases.users], dtype=np.int64)
        times = cases.targets.timestamps[cases.targets.offsets[:-1]]
        scores = np.empty((len(cases), len(self.world)), dtype=np.float32)
        for start in range(0, len(cases), _BATCH):
            batch = slice(start, start + _BATCH)
            histories = cases.histories.slice(start, min(start + _BATCH, len(cases)))
            seen = np.zeros((len(histories), len(self.world)), dtype=np.bool_)
            seen[histories.rows, histories.items] = True
            recent = _recent(histories)
            scores[batch] = probabilities(self.world, users[batch], times[batch], recent, seen)
        return scores


def _recent(histories: Histories) -> np.ndarray:
    """[B, R] the newest items of each history; −1 where there are fewer."""
    newest = histories.newest(NUM_RECENT)
    recent = np.full((len(histories), NUM_RECENT), -1, dtype=np.int32)
    recent[newest.rows, newest.ages] = newest.items
    return recent
