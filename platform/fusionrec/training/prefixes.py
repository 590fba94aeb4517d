"""Prompts with a beginning in common, side by side in one row: what they share is read once.

A row holds the prefix and then all of its suffixes. A suffix's tokens attend to the prefix and to
themselves, and count positions from the prefix's end, so that its logits and their gradients are
those of a prompt of its own; dropout, where a decoder has any, draws otherwise. Of C candidates the
history is computed once instead of C times. The same in serving: fusionrec.language.decoder.

Shape legend: B rows, L tokens of a row, P prompts of all rows, A answers.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fusionrec.training.task import Batch
from fusionrec.training.vocabulary import guesses

_KNOWN = frozenset({"llama", "mistral", "qwen2", "qwen3"})
"""Architectures that take positions and masks of pairs of tokens."""


def shares(model: Any) -> bool:
    """Whether :func:`logits` knows how to ask ``model``: one whose tokens attend to all before."""
    config = model.config
    attention = getattr(config, "_attn_implementation", None)
    window = getattr(config, "sliding_window", None)
    return config.model_type in _KNOWN and attention == "sdpa" and window is None


def rows(
    prefixes: Sequence[Sequence[int]], suffixes: Sequence[Sequence[Sequence[int]]], padding: int
) -> Batch:
    """[B, L] ``input_ids``, ``position_ids`` and ``attention_mask`` of B prefixes with suffixes.

    Also ``branch`` [B, L]: 0 in the prefix, n in its n-th suffix, −1 in padding; and ``row`` and
    ``end`` [P]: where each prompt ends. ``padding`` is the token's id.
    """
    pairs = list(zip(prefixes, suffixes, strict=True))
    width = max(len(prefix) + sum(map(len, each)) for prefix, each in pairs)
    ids = np.full((len(pairs), width), padding, dtype=np.int64)
    positions = np.zeros_like(ids)
    branch = np.full_like(ids, -1)
    ends = []
    for row, (prefix, each) in enumerate(pairs):
        begin = 0
        for number, tokens in enumerate((prefix, *each)):
            place = slice(begin, begin + len(tokens))
            first = len(prefix) if number else 0
            ids[row, place], branch[row, place] = tokens, number
            positions[row, place] = np.arange(first, first + len(tokens))
            begin = place.stop
            if number:
                ends.append((row, begin - 1))
    found = {"input_ids": ids, "position_ids": positions, "branch": branch}
    found["attention_mask"] = (branch >= 0).astype(np.int64)
    found["row"], found["end"] = np.array(ends, dtype=np.int64).T.copy()
    return {name: torch.from_numpy(array) for name, array in found.items()}


def logits(model: torch.nn.Module, inputs: Batch, answers: Tensor) -> Tensor:
    """[P, A] float32 logits of ``answers`` after each prompt of :func:`rows`, in their order."""
    branch = inputs["branch"]
    of_prefix = branch[:, None, :] == 0
    own = branch[:, :, None] == branch[:, None, :]  # padding, too: a row without any would be NaN
    before = torch.ones_like(own[0]).tril()
    asked: dict[str, Any] = {name: inputs[name] for name in ("input_ids", "position_ids")}
    asked |= {"attention_mask": ((of_prefix | own) & before).unsqueeze(1), "use_cache": False}
    found: Tensor = guesses(model, asked, (inputs["row"], inputs["end"])).logits[0]
    return found[:, answers.to(found.device)].float()
