"""The model that is trained: a causal transformer over the items of histories.

SASRec's block (Kang & McAuley, "Self-Attentive Sequential Recommendation", ICDM 2018, with the
normalisation in front of each branch), or LiGR's (Borisyuk et al., "From Features to Transformers:
Redefining Ranking for Scalable Impact", 2025), which lets a learned share of each branch through
and has SwiGLU for its feed-forward network: one of the choices of eSASRec (Tikhonovich et al.,
RecSys 2025).

Where an event stands is said by its distance from the event that asks: a learned number for each
head and distance is added to the attention (as in T5, a bucket for each distance). So the model
does not know how long a history is, and a history that grows by an event is one like the others.

Serving knows nothing of this file: :mod:`fusionrec.sources.sequential.forward` is its twin.

Shape legend: B histories, L events of the longest of them, D the width, H heads, E the width of a
head, T dimensions of a text vector.
"""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from fusionrec.data.histories import FloatArray
from fusionrec.sources.sequential.config import SASRecConfig

_SPREAD = 0.02
"""Standard deviation of new weights, and of the entries of new item vectors."""
_BLOCK = 65_536
"""Items whose texts are mapped at a time."""
_SAMPLE = 20_000
"""Texts, about, whose principal components are looked for."""
_TEXT_ALONE = 0.25
"""How often, in training, an item with a text vector is placed by that alone."""


class ItemVectors(nn.Module):
    """Vectors of items: free ones, plus a learned map of their text vectors where there are any.

    The map begins as the principal components of the texts, so that items of similar text begin as
    neighbours. In training, the free part is left out now and then, so that the map learns to place
    an item alone, as it must one that has text but no events (Volkovs et al., "DropoutNet", 2017).
    """

    def __init__(self, num_items: int, width: int, texts: FloatArray | None) -> None:
        super().__init__()
        self.free = nn.Embedding(num_items, width)
        nn.init.normal_(self.free.weight, std=_SPREAD)
        self._texts = texts
        if texts is not None:
            self.of_text = nn.Linear(texts.shape[1], width)
            with torch.no_grad():
                weight, bias = _principal(texts, width)
                self.of_text.weight.copy_(torch.from_numpy(weight))
                self.of_text.bias.copy_(torch.from_numpy(bias))

    def forward(self, codes: Tensor) -> Tensor:
        """[…, D] vectors of the items ``codes`` […]."""
        free: Tensor = self.free(codes)
        if self._texts is None:
            return free
        if self.training:
            free = free * (torch.rand(*codes.shape, 1) >= _TEXT_ALONE)
        return free + self.from_text(codes)

    def known(self, warm: Tensor) -> Tensor:
        """[I, D] of all items; of those that are not ``warm`` [I], what their text says."""
        parts = []
        for codes in torch.split(torch.arange(len(warm)), _BLOCK):
            text = self.from_text(codes)
            parts.append(torch.where(warm[codes, None], self.free(codes) + text, text))
        return torch.cat(parts)

    def from_text(self, codes: Tensor) -> Tensor:
        """[…, D] what the texts of the items ``codes`` say; 0 where there is none."""
        if self._texts is None:
            return torch.zeros(*codes.shape, self.free.embedding_dim)
        texts = torch.from_numpy(np.array(self._texts[codes.numpy()]))
        mapped: Tensor = self.of_text(texts)
        return mapped * texts.any(dim=-1, keepdim=True)


class Block(nn.Module):
    """Attention to what came before, then a feed-forward network, each added to its input."""

    def __init__(self, config: SASRecConfig) -> None:
        super().__init__()
        width, self._num_heads = config.width, config.num_heads
        self._gated = config.block == "ligr"
        self.distance = nn.Parameter(torch.zeros(config.num_heads, config.max_length))
        self.attention_norm = nn.LayerNorm(width)
        self.query_key_value = _linear(width, 3 * width)
        self.attended = _linear(width, width)
        self.feed_norm = nn.LayerNorm(width)
        self.up = _linear(width, 4 * width * (2 if self._gated else 1))
        self.down = _linear(4 * width, width)
        if self._gated:
            self.attention_gate = _linear(width, width)
            self.feed_gate = _linear(width, width)
        self._dropout = nn.Dropout(config.dropout)

    def forward(self, x: Tensor, back: Tensor) -> Tensor:
        """[B, L, D] of ``x`` [B, L, D]; ``back`` [L, L]: how much older the second event is."""
        step = self._dropout(self.attended(self._attend(self.attention_norm(x), back)))
        if self._gated:
            step = step * torch.sigmoid(self.attention_gate(x))
        x = x + step
        step = self._dropout(self.down(self._activate(self.up(self.feed_norm(x)))))
        if self._gated:
            step = step * torch.sigmoid(self.feed_gate(x))
        result: Tensor = x + step
        return result

    def _attend(self, x: Tensor, back: Tensor) -> Tensor:
        rows, length, width = x.shape
        split = self.query_key_value(x).view(rows, length, 3, self._num_heads, -1)
        query, key, value = split.permute(2, 0, 3, 1, 4)  # each [B, H, L, E]
        scores = query @ key.transpose(-1, -2) / math.sqrt(query.shape[-1])
        scores = scores + self.distance[:, back.clamp(min=0)]
        shares = scores.masked_fill(back < 0, -torch.inf).softmax(dim=-1)
        result: Tensor = (shares @ value).transpose(1, 2).reshape(rows, length, width)
        return result

    def _activate(self, x: Tensor) -> Tensor:
        if not self._gated:
            return functional.gelu(x)
        gate, value = x.chunk(2, dim=-1)
        result: Tensor = functional.silu(gate) * value
        return result


class SequentialModel(nn.Module):
    """Item codes of histories → a vector for each event: what comes after it has a similar one."""

    def __init__(self, config: SASRecConfig, num_items: int, texts: FloatArray | None) -> None:
        super().__init__()
        self.items = ItemVectors(num_items, config.width, texts)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.num_blocks))
        self.norm = nn.LayerNorm(config.width)
        self._dropout = nn.Dropout(config.dropout)

    def forward(self, codes: Tensor) -> Tensor:
        """[B, L, D] of ``codes`` [B, L].

        Rows are padded behind, with any code: no event sees what comes after it.
        """
        x = self.items(codes)
        x = self._dropout(x * math.sqrt(x.shape[-1]))
        place = torch.arange(codes.shape[1])
        back = place[:, None] - place
        for block in self.blocks:
            x = block(x, back)
        result: Tensor = self.norm(x)
        return result


def _linear(inputs: int, outputs: int) -> nn.Linear:
    layer = nn.Linear(inputs, outputs)
    nn.init.normal_(layer.weight, std=_SPREAD)
    nn.init.zeros_(layer.bias)
    return layer


def _principal(texts: FloatArray, width: int) -> tuple[FloatArray, FloatArray]:
    """Weight [D, T] and bias [D] of the map onto the first principal components of the texts.

    The mapped vectors have entries as large as free ones; components that are not there are 0.
    """
    sample = texts[:: max(1, len(texts) // _SAMPLE)]
    written = sample[sample.any(axis=1)].astype(np.float64)
    weight = np.zeros((width, texts.shape[1]))
    if not len(written):
        return weight.astype(np.float32), np.zeros(width, dtype=np.float32)
    mean = written.mean(axis=0)
    _, directions = np.linalg.eigh(np.cov(written, rowvar=False, bias=True))
    found = directions[:, ::-1][:, :width].T
    weight[: len(found)] = found
    size = np.sqrt(np.square((written - mean) @ weight.T).mean())
    weight *= _SPREAD / max(float(size), 1e-12)
    return weight.astype(np.float32), (-weight @ mean).astype(np.float32)
