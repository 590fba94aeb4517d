"""Settings of the source SASRec."""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from fusionrec.config import Config
from fusionrec.retrieval.index import IndexConfig
from fusionrec.space import Choice, Range


class SASRecConfig(Config):
    """Settings of :class:`fusionrec.sources.sasrec.SASRec`."""

    width: int = Field(default=128, ge=1)
    """Width of the vectors, a multiple of num_heads."""
    num_blocks: Annotated[int, Range(1, 3)] = Field(default=2, ge=1)
    """Blocks of attention and feed-forward network, one after the other."""
    num_heads: int = Field(default=2, ge=1)
    """Heads that attention is shared among."""
    block: Annotated[Literal["sasrec", "ligr"], Choice()] = "ligr"
    """sasrec: GELU in the feed-forward network, its output added to its input; ligr: SwiGLU, and a
    learned share of each output let through."""
    max_length: Annotated[int, Range(20, 100, log=True)] = Field(default=50, ge=1)
    """Newest events that are read of a history; in training, longer ones are cut into so many."""
    target: Annotated[Literal["shifted", "last"], Choice()] = "shifted"
    """shifted: every event is asked for the one after it; last: only the newest but one."""
    text: Annotated[bool, Choice()] = True
    """Whether an item's vector is what is learned of it plus a learned map of its text vector, once
    jobs.embed has run; so items are found of which there is text and no event."""
    num_negatives: Annotated[int, Range(128, 2048, log=True)] = Field(default=1024, ge=1)
    """Items drawn for each batch that the next ones are told from; all where there are no more."""
    popularity_share: Annotated[float, Range(0, 1)] = Field(default=0.9, ge=0, le=1)
    """Share of them drawn as often as they are popular, the others uniformly; corrected for."""
    dropout: Annotated[float, Range(0, 0.6)] = Field(default=0.4, ge=0, lt=1)
    """Share of the numbers between layers that training sets to zero."""
    learning_rate: Annotated[float, Range(3e-4, 3e-3, log=True)] = Field(default=1e-3, gt=0)
    """Step size of AdamW."""
    weight_decay: Annotated[float, Range(1e-4, 1, log=True)] = Field(default=0.01, ge=0)
    """AdamW's decay, of all that is learned."""
    averaging: Annotated[float, Range(0.9, 0.999)] = Field(default=0.99, ge=0, lt=1)
    """Weight of the past in the running mean of what is learned, over the steps; the mean is served
    and says when training ends. 0: the parameters of the last step."""
    batch_events: int = Field(default=2048, ge=1)
    """Events of a batch, of histories of about equal length; fewer where there are few in all."""
    epochs: int = Field(default=60, ge=1)
    """Passes over the training events, at most."""
    patience: int = Field(default=5, ge=1)
    """Epochs without a better NDCG@10 of the held-out events after which training ends."""
    held_out: float = Field(default=0.02, gt=0, lt=1)
    """Share of the events that is held out to end training by, the newest of their users."""
    seed: int = Field(default=0, ge=0)
    """Of new weights, order, negatives and dropout."""
    index: IndexConfig = IndexConfig()

    @model_validator(mode="after")
    def _heads_share_the_width(self) -> Self:
        if self.width % self.num_heads:
            raise ValueError(
                f"num_heads = {self.num_heads} cannot share width = {self.width}: "
                "give a width that is a multiple of num_heads"
            )
        return self
