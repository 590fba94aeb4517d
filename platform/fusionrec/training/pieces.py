"""The texts of a batch in a few passes of similar length: less padding, the same loss.

For what cannot be packed (:mod:`fusionrec.training.packed`): the texts are sorted by length and cut
where the least padding is left; each piece is padded to its own longest text and goes through the
model by itself. What comes out is put back in order before the loss is taken, so that every loss,
those of whole lists too, and its gradient are what one padded batch gives; what dropout draws is
another thing. The batch, its one backward pass and so the order of the examples stay as they are.

Shape legend: P texts, L tokens of the longest text of a piece.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fusionrec.data.histories import IntArray
from fusionrec.language.inference import pad
from fusionrec.language.tokens import Row
from fusionrec.training.objectives.settings import named, part
from fusionrec.training.task import Batch

_PIECES = 4
_PLACE = "place"


def cut(tokenizer: Any, texts: Sequence[Row], at_least: int) -> Batch:
    """[·, L] tensors of each piece under its number, and [P] where each text is among all of them.

    Args:
        tokenizer: That made the rows.
        texts: P rows of tokens.
        at_least: Texts of the same batch of any worker: under ZeRO-3 all of them must call the
            model equally often, whatever their texts are.
    """
    lengths = np.array([len(text["input_ids"]) for text in texts])
    order = np.argsort(lengths, kind="stable")
    ends = _ends(lengths[order], min(_PIECES, at_least))
    found: Batch = {_PLACE: torch.from_numpy(np.argsort(order))}
    for number, rows in enumerate(np.split(order, ends[:-1])):
        found |= named(str(number), pad(tokenizer, [texts[row] for row in rows]))
    return found


def sizes(count: int, at_least: int) -> list[int]:
    """Texts of each piece of ``count`` that are all as long: the most memory that they take."""
    ends = _ends(np.ones(count, dtype=np.int64), min(_PIECES, at_least))
    return [end - begin for begin, end in pairwise([0, *ends])]


def joined(function: Callable[[Batch], Tensor], pieces: Batch) -> Tensor:
    """[P, …] what ``function`` makes of the rows of each piece, in the order of the texts."""
    count = sum(name.endswith(".input_ids") for name in pieces)
    outputs = [function(part(pieces, str(number))) for number in range(count)]
    return torch.cat(outputs)[pieces[_PLACE]]


def _ends(lengths: IntArray, count: int) -> list[int]:
    """Where each of ``count`` pieces of ascending ``lengths`` ends, with the fewest padded tokens.

    Dynamic programming over the place of the last cut.
    """
    assert 0 < count <= len(lengths)
    places = np.arange(len(lengths) + 1)
    # [i, j]: tokens of a piece from text i to before text j, padded; it has a text or more.
    tokens = (places - places[:, None]) * np.concatenate([[0], lengths]).astype(np.float64)
    tokens[places <= places[:, None]] = np.inf
    best = tokens[0]
    cuts: list[IntArray] = []
    for _ in range(count - 1):
        every = best[:, None] + tokens
        cuts.append(every.argmin(axis=0))
        best = every.min(axis=0)
    ends = [len(lengths)]
    for before in reversed(cuts):
        ends.append(int(before[ends[-1]]))
    return ends[::-1]
