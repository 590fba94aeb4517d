"""Losses over a vocabulary without their largest tensor: the logits of all tokens of a batch.

In masked language modelling a few tokens are guessed: the hidden states of these alone go into the
head. In causal language modelling all are, and their logits are made, compared and forgotten piece
by piece; the backward pass makes each piece again, for one more product with the head's weights
(Hsu et al., Liger kernel, 2024, and Wijmans et al., Cut your losses in large-vocabulary language
models, 2025, show what these logits take otherwise).

Shape legend: B texts, L tokens, M guessed tokens, V words of the vocabulary, D dimensions.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, pad
from torch.utils.checkpoint import checkpoint

from fusionrec.training.task import Batch

UNPREDICTED = -100
"""Label of a token that is not predicted."""

_PIECE = 2**24
"""Logits that are alive at a time; fewer than these are kept for the backward pass."""
_OWN_LOGITS = ("final_logit_softcapping", "logits_scaling", "logit_scale")
"""Of configs whose models do more to their logits than the head, which is asked for pieces."""


def guesses(model: torch.nn.Module, inputs: Batch, places: tuple[Tensor, Tensor]) -> Any:
    """What a language model gives, with logits [1, M, V] for the tokens at ``places`` alone.

    Args:
        model: With a head on what transformers calls its base model; adapters may be around it.
        inputs: [B, L] tensors.
        places: [M] rows and [M] columns of the tokens.
    """
    whole = _plain(model)

    def narrow(_: torch.nn.Module, __: Any, found: Any) -> Any:
        found.last_hidden_state = found.last_hidden_state[places].unsqueeze(0)
        return found

    hook = whole.base_model.register_forward_hook(narrow)
    try:
        return whole(**inputs)
    finally:
        hook.remove()


def causal_loss(model: torch.nn.Module, inputs: Batch, labels: Tensor) -> Tensor:
    """Mean of −log p(label | tokens before it), over [B, L] labels but the first of each text.

    Labels of ``UNPREDICTED`` do not count; 0 where none does.
    """
    whole = _plain(model)
    labels = pad(labels[:, 1:], (0, 1), value=UNPREDICTED).flatten()
    count = (labels != UNPREDICTED).sum().clamp(min=1)
    # Keys and values, which nobody reads, would be copied.
    asked: dict[str, Any] = inputs | {"use_cache": False}
    if any(getattr(whole.config, name, None) is not None for name in _OWN_LOGITS):
        return _sum(torch.nn.Identity(), whole(**asked).logits.flatten(0, 1), labels) / count
    states = whole.base_model(**asked).last_hidden_state.flatten(0, 1)
    head = whole.get_output_embeddings()
    size = max(1, _PIECE // whole.config.vocab_size)
    if len(states) <= size:
        return _sum(head, states, labels) / count
    pieces = zip(torch.split(states, size), torch.split(labels, size), strict=True)
    # Under ZeRO-3 a weight is whole in one pass and a shard in the other: shapes differ.
    losses = [
        checkpoint(_sum, head, *piece, use_reentrant=False, determinism_check="none")
        for piece in pieces
    ]
    return torch.stack(losses).sum() / count


def _sum(head: torch.nn.Module, states: Tensor, labels: Tensor) -> Tensor:
    """Summed cross-entropy of [N, D] states and [N] labels."""
    return cross_entropy(head(states).float(), labels, ignore_index=UNPREDICTED, reduction="sum")


def _plain(model: torch.nn.Module) -> Any:
    """The model that adapters are around."""
    inside = getattr(model, "get_base_model", None)
    return model if inside is None else inside()
