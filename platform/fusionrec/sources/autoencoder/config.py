"""Settings of the source RecVAE."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from fusionrec.config import Config
from fusionrec.retrieval.index import IndexConfig
from fusionrec.space import Range


class RecVAEConfig(Config):
    """Settings of :class:`fusionrec.sources.recvae.RecVAE`."""

    factors: Annotated[int, Range(32, 256, log=True)] = Field(default=128, ge=1)
    """Width of the vectors of histories and items."""
    hidden: int = Field(default=256, ge=1)
    """Width of the encoder's layers."""
    num_layers: Annotated[int, Range(1, 5)] = Field(default=3, ge=1)
    """Layers of the encoder, each of which reads all before it."""
    recency: Annotated[float, Range(0.3, 1)] = Field(default=0.8, gt=0, le=1)
    """Weight of an event relative to the next newer one of its history; 1 forgets the order."""
    dropout: Annotated[float, Range(0.1, 0.8)] = Field(default=0.5, ge=0, lt=1)
    """Share of the items of a history that the encoder does not see in training."""
    gamma: Annotated[float, Range(1e-3, 0.05, log=True)] = Field(default=0.005, ge=0)
    """Weight of the divergence from the prior, for each item of the history."""
    learning_rate: Annotated[float, Range(2e-4, 5e-3, log=True)] = Field(default=1e-3, gt=0)
    """Step size of Adam."""
    batch_size: int = Field(default=256, ge=1)
    """Histories of a batch; fewer where there are few in all."""
    encoder_passes: int = Field(default=3, ge=1)
    """Passes over the histories in which the encoder learns, before each in which the decoder
    does; the two together are an epoch."""
    epochs: int = Field(default=50, ge=1)
    """Epochs, at most."""
    patience: int = Field(default=4, ge=1)
    """Epochs without a better NDCG@10 of the held-out events after which training ends."""
    held_out: float = Field(default=0.02, gt=0, lt=1)
    """Share of the events that is held out to end training by, the newest of their users."""
    seed: int = Field(default=0, ge=0)
    """Of new weights, order, dropout and what is drawn."""
    index: IndexConfig = IndexConfig()
