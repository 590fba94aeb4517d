r"""The encoder: vectors of histories near the vectors of what came next.

The loss is InfoNCE (see :mod:`fusionrec.training.losses.info_nce`) of a history q_i against the
items d_j of the batch, of all workers' batches, and mined ones. Items that the history's user had
are masked. With dimensions d_1, d_2, … the vectors' beginnings are trained to be vectors too,

    loss = mean over d in {D, d_1, …} of InfoNCE(normalize(q[:d]), normalize(item[:d])),

after Kusupati et al., Matryoshka representation learning (NeurIPS 2022).

Large batches mean many negatives and much memory. GradCache (Gao et al., Scaling deep contrastive
learning batch size under memory limited setup, RepL4NLP 2021) holds the activations of one chunk of
texts at a time: vectors are computed without, the loss gives the gradient of each vector, and each
chunk is computed once more to pass its vectors' gradients on. That is what checkpointing each chunk
does. It costs one more forward pass, a third of the step, and changes no gradient.

Negatives from all workers: as in Radford et al. (CLIP, 2021), with gradients through the gathered
vectors, so that W workers with batches of B do what one with a batch of W·B would.

One tower, a transformer for all texts, is the default: it learns from both sides of every pair.
With two (Huang et al., Learning deep structured semantic models for web search using clickthrough
data, CIKM 2013) histories have a transformer of their own, and items another.

Shape legend: B examples of a batch, M mined negatives an example, W workers, N = W·B·(1 + M) items,
S items of the longest training history of the batch, I items, D dimensions.
"""

from __future__ import annotations

from functools import cached_property, partial
from pathlib import Path
from typing import Annotated, Any, Literal, cast

import numpy as np
import torch
from pydantic import Field
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from fusionrec.data.catalogue import Catalogue
from fusionrec.data.histories import CodeArray, IntArray
from fusionrec.data.text import history_texts, item_text, item_texts
from fusionrec.errors import ConfigError
from fusionrec.language.encoder import ITEM_TOWER, Encoder, vectors
from fusionrec.language.inference import pad
from fusionrec.language.tokens import tokenize
from fusionrec.space import Range
from fusionrec.training import packed, pieces
from fusionrec.training.examples import Examples, lists
from fusionrec.training.gather import own_first
from fusionrec.training.losses.info_nce import info_nce
from fusionrec.training.mining import encode_all, mine
from fusionrec.training.objectives.settings import (
    HistorySettings,
    identity,
    named,
    part,
    refuse_two_towers,
)
from fusionrec.training.task import Batch, Forward, shuffled

Tower = Literal["history", "item"]

_NOBODY = torch.iinfo(torch.int64).max


class EncoderSettings(HistorySettings):
    """How the encoder is trained."""

    temperature: Annotated[float, Range(0.01, 0.2, log=True)] = Field(0.05, gt=0)
    """Divides the cosines of the encoder before the softmax."""
    popularity_correction: bool = False
    """Whether the encoder's loss undoes that popular items are drawn as negatives more often. Off,
    because popularity is a source of its own in the fusion, and text should say something else."""
    gather_negatives: bool = True
    """Whether the items of all workers' batches are negatives of each (encoder)."""
    grad_cache: int | None = Field(None, ge=1)
    """Texts whose activations are held at a time (encoder): less memory for a third more time; by
    default all of the batch."""
    towers: int = Field(1, ge=1, le=2)
    """Transformers of the encoder: one for all texts, or one for histories and one for items, which
    takes twice the memory of the weights."""
    dimensions: tuple[int, ...] = ()
    """Matryoshka: the first so many dimensions are trained to be a vector as well (encoder)."""
    mined_negatives: int = Field(0, ge=0)
    """Hard negatives of an example that the current model finds (encoder); 0: only the batch's."""
    mine_every: int = Field(100, ge=1)
    """Optimizer steps between searches for mined negatives: each encodes all items and histories of
    the examples."""
    mine_from: int = Field(50, ge=1)
    """Mined negatives are drawn from so many unseen items nearest to the history."""

    @property
    def compares_batch(self) -> bool:
        """The others' items are its negatives."""
        return True


class EncoderTask:
    """See the module."""

    name = "encoder"
    head: tuple[str, ...] = ()

    def __init__(self, settings: EncoderSettings, catalogue: Catalogue, examples: Examples) -> None:
        self._settings, self._catalogue, self._examples = settings, catalogue, examples
        self._mined: CodeArray = np.empty((len(examples), 0), dtype=np.int32)

    @cached_property
    def identity(self) -> dict[str, Any]:
        """See :class:`~fusionrec.training.task.Task`."""
        return identity(self.name, self._settings, self._examples.fingerprint)

    def build_model(self) -> torch.nn.Module:
        """The transformer; pooling is part of the loss.

        Raises:
            ConfigError: a Matryoshka dimension is larger than the model's, or the model has two
                towers and the settings have one.
        """
        refuse_two_towers(self._settings)
        found = Encoder.load(self._settings.encoder, revision=self._settings.revision, device="cpu")
        size = found.model.config.hidden_size
        for dimension in self._settings.dimensions:
            if not 0 < dimension < size:
                raise ConfigError(
                    f"setting dimensions = {dimension} is wrong: {self._settings.encoder} has "
                    f"{size} dimensions; set --dimensions to less, and above 0"
                )
        # Not the encoder itself: the engine alone decides how many copies of the weights there are.
        self._tokenizer = found.tokenizer
        self._config = found.config.model_copy(update=self._settings.limits)
        # GradCache holds a chunk of the texts at a time: they are not to be in one pass.
        self._packs = self._settings.grad_cache is None and packed.packs(found.model)
        model: torch.nn.Module = found.model
        if self._settings.towers == 2:
            items = Encoder.load(
                self._settings.encoder,
                revision=self._settings.revision,
                device="cpu",
                items=True,
            )
            model = torch.nn.ModuleDict({"history": model, "item": items.model})
        return model

    def plan(self, batch_size: int, generator: np.random.Generator) -> list[IntArray]:
        """Random batches."""
        return shuffled(len(self._examples), batch_size, generator)

    def batch(self, examples: IntArray) -> Batch:
        """Tokens of B histories and B·(1+M) items, these items' codes, [B, S] what users had.

        Where the model can read packed rows, the tokens of all texts of a tower are ``packed``.
        """
        rows = self._examples.take(examples)
        codes = np.concatenate([rows.positives, self._mined[examples].ravel()])
        had = [np.unique(self._examples.seen.row(int(user))) for user in rows.users]
        seen = np.full((len(had), max(map(len, had))), _NOBODY, dtype=np.int64)
        for row, own in enumerate(had):
            seen[row, : len(own)] = own
        batch = {"codes": torch.from_numpy(codes.astype(np.int64)), "seen": torch.from_numpy(seen)}
        histories = self._histories(rows)
        items = [item_text(self._catalogue, int(code)) for code in codes]
        if self._packs and self._settings.towers == 1:
            return batch | named("packed", self._packed([*histories, *items]))
        tokens = self._packed if self._packs else self._sorted
        for name, texts in (("history", histories), ("item", items)):
            batch |= named(name, tokens(texts))
        return batch

    def loss(self, model: torch.nn.Module, batch: Batch) -> Tensor:
        """InfoNCE; an item that a history's user had anyway is no negative of that history."""
        histories, items = self._towers(model, batch)
        codes, num_drawn = batch["codes"], len(histories)
        drawn = torch.arange(len(codes), device=codes.device) < num_drawn
        if self._settings.gather_negatives:
            items, codes, drawn = own_first(items), own_first(codes), own_first(drawn)
        had = among(batch["seen"], codes) | (codes < 0)
        correction = (
            self._correction(codes, drawn) if self._settings.popularity_correction else None
        )
        losses = [
            info_nce(
                *(histories, items) if cut is None else (_cut(histories, cut), _cut(items, cut)),
                had,
                temperature=self._settings.temperature,
                log_popularity=correction,
            )
            for cut in (None, *self._settings.dimensions)
        ]
        return torch.stack(losses).mean()

    def lists(self, examples: IntArray) -> Batch:
        """Tokens of B histories and of each one's list of items, and which of [B, C] exist."""
        rows = self._examples.take(examples)
        codes, exists = lists(rows)
        items = [item_text(self._catalogue, int(code)) for code in codes[exists]]
        tokens = named("item", self._sorted(items, 2 * len(rows)))
        tokens |= named("history", self._sorted(self._histories(rows)))
        return tokens | {"exists": torch.from_numpy(exists)}

    def scores(self, model: torch.nn.Module, batch: Batch) -> Tensor:
        """[B, C] cosines over the temperature of each history with its own list; 0 beyond it."""
        exists = batch["exists"]
        histories = self._vectors(model, part(batch, "history"), "history")
        items = self._vectors(model, part(batch, "item"), "item")
        owners = exists.nonzero()[:, 0]
        cosines = (histories[owners] * items).sum(dim=1) / self._settings.temperature
        return torch.zeros(exists.shape, device=cosines.device).masked_scatter(exists, cosines)

    def describe(self, examples: IntArray) -> list[dict[str, Any]]:
        """The texts."""
        rows = self._examples.take(examples)
        return [
            {"example": int(example), "history": history, "item": item}
            | {"mined": [item_text(self._catalogue, int(c)) for c in mined if c >= 0]}
            for example, history, item, mined in zip(
                examples,
                self._histories(rows),
                [item_text(self._catalogue, int(code)) for code in rows.positives],
                self._mined[examples],
                strict=True,
            )
        ]

    def save(self, model: torch.nn.Module, directory: Path) -> None:
        """What ``Encoder.load`` reads."""
        folders: dict[Tower, Path] = {"history": directory}
        if self._settings.towers == 2:
            folders["item"] = directory / ITEM_TOWER
        for tower, folder in folders.items():
            Encoder(self._tower(model, tower), self._tokenizer, self._config).save(folder)

    @property
    def refresh_every(self) -> int:
        """See :class:`~fusionrec.training.task.Refreshed`."""
        return self._settings.mine_every if self._settings.mined_negatives else 0

    def refresh(self, forward: Forward, step: int) -> None:
        """Find hard negatives with the current model."""
        settings, texts = self._settings, item_texts(self._catalogue)
        sides: dict[Tower, list[str]] = {
            "item": texts,
            "history": self._histories(self._examples),
        }
        items, queries = (
            encode_all(forward, partial(self._encode, tower=tower), self._tokens, read)
            for tower, read in sides.items()
        )
        self._mined = mine(
            queries,
            items,
            self._examples,
            np.array([bool(text) for text in texts]),
            count=settings.mined_negatives,
            nearest=settings.mine_from,
            seed=step,
        )

    def chosen(self) -> Batch:
        """The [P, M] mined negatives; see :class:`~fusionrec.training.task.Refreshed`."""
        return {"mined": torch.from_numpy(self._mined)}

    def restore(self, chosen: Batch) -> None:
        """The inverse of :meth:`chosen`."""
        self._mined = chosen["mined"].numpy()

    def _tower(self, model: torch.nn.Module, tower: Tower) -> torch.nn.Module:
        # By its name, which is found through adapters around both towers too.
        return (
            model if self._settings.towers == 1 else cast("torch.nn.Module", getattr(model, tower))
        )

    def _encode(self, model: torch.nn.Module, batch: Batch, tower: Tower) -> Tensor:
        return vectors(self._tower(model, tower), batch, self._config.pooling)

    def _towers(self, model: torch.nn.Module, batch: Batch) -> tuple[Tensor, Tensor]:
        """[B, D] vectors of the histories, [B·(1+M), D] of the items."""
        counts: dict[Tower, int] = {"history": len(batch["seen"]), "item": len(batch["codes"])}
        pooling = self._config.pooling
        if self._packs and self._settings.towers == 1:
            found = packed.vectors(model, part(batch, "packed"), pooling, sum(counts.values()))
            return found[: counts["history"]], found[counts["history"] :]
        histories, items = (
            packed.vectors(self._tower(model, tower), part(batch, tower), pooling, count)
            if self._packs
            else self._vectors(model, part(batch, tower), tower)
            for tower, count in counts.items()
        )
        return histories, items

    def _vectors(self, model: torch.nn.Module, inputs: Batch, tower: Tower) -> Tensor:
        """[B, D]; with GradCache a chunk's activations are not kept but computed again."""
        chunk = self._settings.grad_cache
        if chunk is None:
            return pieces.joined(lambda own: self._encode(model, own, tower), inputs)
        count, found = len(inputs["input_ids"]), []
        if chunk >= count:
            return self._encode(model, inputs, tower)
        for start in range(0, count, chunk):
            piece = {name: tensor[start : start + chunk] for name, tensor in inputs.items()}
            # Under ZeRO-3 a weight is whole in one pass and a shard in the other: shapes differ.
            found.append(
                checkpoint(
                    self._encode, model, piece, tower, use_reentrant=False, determinism_check="none"
                )
            )
        return torch.cat(found)

    def _correction(self, codes: Tensor, drawn: Tensor) -> Tensor:
        """[N] log of how often each item is expected among the negatives; mined ones are there."""
        expected = self._log_popularity.to(codes.device)[codes.clamp(min=0)] + drawn.sum().log()
        return torch.where(drawn, expected, 0.0)

    @cached_property
    def _log_popularity(self) -> Tensor:
        """[I] log of each item's share of the training events, one event added to each."""
        counts = np.bincount(self._examples.seen.items, minlength=len(self._catalogue)) + 1
        return torch.from_numpy(np.log(counts / counts.sum())).float()

    def _histories(self, rows: Examples) -> list[str]:
        return history_texts(self._catalogue, rows.histories, self._settings.history_items)

    def _packed(self, texts: list[str]) -> Batch:
        tokens = tokenize(self._tokenizer, self._config.max_tokens, texts)
        return packed.pack(tokens, self._tokenizer.pad_token_id)

    def _sorted(self, texts: list[str], at_least: int | None = None) -> Batch:
        """Pieces of texts, of which there are as many for every worker, or ``at_least`` so many."""
        if self._settings.grad_cache is not None:  # which has chunks of its own
            return self._tokens(texts)
        rows = tokenize(self._tokenizer, self._config.max_tokens, texts)
        return pieces.cut(self._tokenizer, rows, at_least or len(rows))

    def _tokens(self, texts: list[str]) -> Batch:
        return pad(self._tokenizer, tokenize(self._tokenizer, self._config.max_tokens, texts))


def among(seen: Tensor, codes: Tensor) -> Tensor:
    """[B, N] whether each of N ``codes`` is in each of the ascending rows of [B, S] ``seen``."""
    asked = codes.expand(len(seen), -1).contiguous()
    found = torch.searchsorted(seen, asked).clamp(max=seen.shape[1] - 1)
    return seen.gather(1, found) == asked


def _cut(unit: Tensor, dimension: int) -> Tensor:
    return torch.nn.functional.normalize(unit[:, :dimension], dim=-1)
