"""Texts of different lengths side by side in rows: next to no padding to compute on.

Rows are as long as the longest text, and every text goes into the fullest row that has room for it
(best-fit decreasing). Tokens attend to those of their own text only and count positions from its
beginning, so that the vectors are those of padded texts; what dropout draws is another thing. One
pass of the model then does what takes one of each tower otherwise, and each weight has its gradient
summed once. Krell et al., Efficient sequence packing without cross-contamination (2021).

Shape legend: T texts, R rows, L tokens of a row, D dimensions.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fusionrec.language.encoder import Pooling
from fusionrec.language.tokens import Row
from fusionrec.training.task import Batch

_KNOWN = frozenset({"bert"})
"""Architectures that count positions from 0 and take masks of pairs of tokens."""


def packs(model: Any) -> bool:
    """Whether :func:`vectors` knows how to ask ``model``."""
    # Eager attention would add the mask instead of asking it.
    attention = getattr(model.config, "_attn_implementation", None)
    return model.config.model_type in _KNOWN and attention == "sdpa"


def pack(texts: Sequence[Row], padding: int) -> Batch:
    """[R, L] ``input_ids`` and what else the model takes, ``position_ids``, ``attention_mask``.

    Also ``text``, the text that a token is of, −1 for padding. ``padding`` is the token's id.
    """
    lengths = [len(text["input_ids"]) for text in texts]
    width = max(lengths)
    free: list[list[int]] = [[] for _ in range(width + 1)]
    """Rows by the number of tokens that fit in them still."""
    begins = np.empty((len(texts), 2), dtype=np.int64)
    count = 0
    for index in sorted(range(len(texts)), key=lambda each: -lengths[each]):
        length = lengths[index]
        room = next((size for size in range(length, width) if free[size]), width)
        if room == width:
            row, count = count, count + 1
        else:
            row = free[room].pop()
        begins[index] = row, width - room
        free[room - length].append(row)
    names = [name for name in texts[0] if name != "attention_mask"]
    found = {name: np.zeros((count, width), dtype=np.int64) for name in (*names, "position_ids")}
    found["input_ids"][:] = padding
    found["text"] = np.full((count, width), -1, dtype=np.int64)
    for index, (row, begin) in enumerate(begins.tolist()):
        place = slice(begin, begin + lengths[index])
        for name in names:
            found[name][row, place] = texts[index][name]
        found["position_ids"][row, place] = np.arange(lengths[index])
        found["text"][row, place] = index
    found["attention_mask"] = (found["text"] >= 0).astype(np.int64)
    return {name: torch.from_numpy(array) for name, array in found.items()}


def vectors(model: torch.nn.Module, inputs: Batch, pooling: Pooling, count: int) -> Tensor:
    """[T, D] L2-normalised float32 vectors of the ``count`` texts of :func:`pack`.

    What ``fusionrec.language.encoder.vectors`` gives for the same texts in rows of their own.
    """
    given = {name: inputs[name] for name in inputs.keys() - {"text", "attention_mask"}}
    text = inputs["text"]
    # [R, 1, L, L]; padding attends to padding, because a row without any would be NaN.
    together = (text[:, :, None] == text[:, None, :]).unsqueeze(1)
    hidden = model(**given, attention_mask=together).last_hidden_state.float()
    chosen = text.flatten() == torch.arange(count, device=text.device).unsqueeze(1)
    if pooling == "cls":
        chosen = chosen & (inputs["position_ids"].flatten() == 0)
    shares = chosen / chosen.sum(dim=1, keepdim=True).clamp(min=1)
    return torch.nn.functional.normalize(shares @ hidden.flatten(0, 1), dim=-1)
