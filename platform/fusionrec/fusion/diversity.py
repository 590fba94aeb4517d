"""Diversity: the top of a list is filled place by place, each item weighed against those above it.

    score(i) = fused(i) + spread · (calibration · fit(i) − similarity · likeness(i)
                                    + freshness · fresh(i) − popularity · popular(i)
                                    − exposure · price(i) − over(i)) + constant

- ``likeness``: the largest Jaccard similarity of the item's categories to those of an item above;
  maximal marginal relevance, Carbonell & Goldstein (SIGIR 1998).
- ``fit``: Σ_g p(g) · log((ε + m(g) + q(g)) / (ε + m(g))), where p are the shares of categories in
  the history, m what the items above have of them, q what the item has, each item sharing 1 among
  its categories; greedy calibration in the submodular form of Steck (RecSys 2018).
- ``fresh``: 2^(−age / half-life), the age that at the time of the history's newest event; 0 of an
  item of which nobody knows when it came out.
- ``popular``: log(1 + training events), relative to the largest of the catalogue.
- ``price``: what keeps an item within its share of all lists; see :mod:`fusionrec.fusion.exposure`.
- ``over``: so much, once a category of the item has had its share of the places, that the item
  comes behind all that are looked at and have not.
- ``spread``: largest less smallest fused score of what is looked at, so that weights mean the same
  in every list.

Nothing gains while a list is filled, so scores descend, and what is added is one more term of the
score. The constant, where one is needed, keeps what was looked at above what was not.

Shape legend: B histories, D places that are looked at, K categories of an item, H categories of a
list, I items.
"""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Self

import numpy as np
from pydantic import Field, ValidationError

from fusionrec.config import Config
from fusionrec.data.histories import BoolArray, CodeArray, FloatArray, Histories, IntArray
from fusionrec.data.releases import Releases
from fusionrec.errors import ConfigError
from fusionrec.fusion.features import newest_times
from fusionrec.fusion.model import Fused, ordered

DIVERSITY = "diversity"
"""Name of its term, and of its directory in a pipeline's."""
_SETTINGS, _CATEGORIES, _PRICES = "diversity.json", "categories.npz", "prices.npy"
_FLOOR = 0.1
"""ε: what a category is taken to have had before it has anything."""
_BLOCK = 64
"""Lists whose similarities are held at a time."""
_SMALL = np.float32(1e-6)
_MARGIN = np.float32(1e-4)
"""Relative distance of what was looked at from what was not: more than float32 loses in sums."""
_MOST_FIT = float(np.log1p(1 / _FLOOR))


class DiversityConfig(Config):
    """What a list should be beside right; all weights are in spreads of the list's fused scores."""

    similarity: float = Field(default=0.0, ge=0)
    """What an item loses that has all categories of an item above it, and no others."""
    calibration: float = Field(default=0.0, ge=0)
    """Weight of showing the categories of the history in their shares."""
    popularity: float = Field(default=0.0, ge=0)
    """What the most popular item of the catalogue loses."""
    freshness: float = Field(default=0.0, ge=0)
    """What an item gains that comes out at the time of the history's newest event."""
    half_life_days: float = Field(default=90.0, gt=0)
    """Age at which it gains half of that."""
    max_exposure: float | None = Field(default=None, gt=0, le=1)
    """Share of the lists that an item may be in, as far as prices found on validation lists keep
    it; None: all."""
    exposure: float = Field(default=1.0, ge=0)
    """Factor on those prices, where there is such a share: 1 keeps it, less goes a part of the way
    there."""
    max_per_category: int | None = Field(default=None, ge=1)
    """Items of one category in the places that are filled; None: as many as there are. Others come
    behind them."""
    places: int = Field(default=20, ge=1)
    """Places that are filled one by one."""
    depth: int = Field(default=100, ge=1)
    """First places of the fused list from which they are filled."""

    @property
    def changes(self) -> bool:
        """Whether there is anything to do."""
        fixed = self.popularity + self.freshness > 0 or self.caps_exposure
        return fixed or self.looks_above

    @property
    def caps_exposure(self) -> bool:
        """Whether prices are paid."""
        return self.max_exposure is not None and self.exposure > 0

    @property
    def looks_above(self) -> bool:
        """Whether a place depends on what stands above it."""
        return self.similarity + self.calibration > 0 or self.max_per_category is not None


@dataclass(frozen=True, slots=True)
class ItemCategories:
    """The categories of each item, as CSR."""

    offsets: IntArray
    """[I+1]"""
    codes: CodeArray
    """Distinct categories of item i from ``offsets[i]`` on, as numbers from 0."""

    @classmethod
    def of(cls, categories: Sequence[Sequence[str]]) -> Self:
        """From their names."""
        names: dict[str, int] = {}
        rows = [sorted({names.setdefault(name, len(names)) for name in row}) for row in categories]
        offsets = np.zeros(len(rows) + 1, dtype=np.int64)
        np.cumsum([len(row) for row in rows], out=offsets[1:])
        return cls(offsets, np.array([code for row in rows for code in row], dtype=np.int32))

    def padded(self, items: IntArray) -> IntArray:
        """[..., K] the categories of ``items`` [...], padded with −1; of item −1, none."""
        first = self.offsets[np.maximum(items, 0)]
        counts = np.where(items >= 0, self.offsets[np.maximum(items, 0) + 1] - first, 0)
        steps = np.arange(max(1, int(counts.max(initial=0))))
        there = steps < counts[..., None]
        if not len(self.codes):
            return np.full(there.shape, -1, dtype=np.int64)
        places = np.where(there, first[..., None] + steps, 0)
        return np.where(there, self.codes[places], -1).astype(np.int64)


@dataclass(frozen=True, slots=True)
class Diversity:
    """One more term of fused lists. Threads may share it."""

    config: DiversityConfig
    categories: ItemCategories
    item_counts: IntArray
    """[I] training events."""
    releases: Releases | None = None
    """When the items came out; only freshness asks."""
    prices: FloatArray | None = None
    """[I] what an item pays for its exposure; there where a share is set."""

    def apply(self, histories: Histories, fused: Fused) -> Fused:
        """The lists of ``histories`` with the top in another order and the term ``diversity``."""
        if not self.config.changes:
            return fused
        added = np.zeros(fused.items.shape, dtype=np.float32)
        depth = min(self.config.depth, fused.items.shape[1])
        for start in range(0, len(fused.items), _BLOCK):
            rows = slice(start, min(start + _BLOCK, len(fused.items)))
            block = histories.slice(rows.start, rows.stop)
            scores, items = fused.scores[rows, :depth], fused.items[rows, :depth]
            term = self._terms(items.astype(np.int64), scores, block)
            # What was looked at stays above what was not.
            read = items >= 0
            if fused.items.shape[1] > depth:
                below = fused.scores[rows, depth]
                least = np.where(read, scores + term, np.inf).min(axis=1)
                missing = below + _MARGIN * (1 + np.abs(below)) - least
                behind = fused.items[rows, depth] >= 0
                term += np.where(behind, np.maximum(missing, 0), 0)[:, None]
            added[rows, :depth] = np.where(read, term, 0)
        terms = np.concatenate([fused.terms, added[:, None, :]], axis=1)
        return ordered(fused.items, terms, (*fused.term_names, DIVERSITY))

    @classmethod
    def load(cls, directory: Path, item_counts: IntArray, releases: Releases | None = None) -> Self:
        """The inverse of :meth:`save`.

        Args:
            directory: where it was saved.
            item_counts: [I] the items' training events.
            releases: when the items came out, where that is known.

        Raises:
            ConfigError: a part is missing or inconsistent.
        """
        path = directory / _SETTINGS
        try:
            config = DiversityConfig.model_validate_json(path.read_bytes())
            with np.load(directory / _CATEGORIES, allow_pickle=False) as arrays:
                categories = ItemCategories(arrays["offsets"], arrays["codes"])
            prices = None
            if config.caps_exposure:
                prices = np.load(directory / _PRICES, allow_pickle=False)
        except OSError as error:
            raise ConfigError(
                f"{directory} cannot be read: remove it and run `python -m tuning.diversity`"
            ) from error
        except ValidationError as error:
            raise ConfigError(f"{path} is wrong: {error.errors()[0]['msg']}") from error
        check_freshness(config, releases, str(path))
        return cls(config, categories, item_counts, releases, prices)

    def save(self, directory: Path) -> None:
        """Write beside, then rename."""
        beside = directory.with_suffix(".tmp")
        shutil.rmtree(beside, ignore_errors=True)
        beside.mkdir(parents=True)
        text = self.config.model_dump_json(indent=2)
        (beside / _SETTINGS).write_text(text, encoding="utf-8")
        categories = self.categories
        np.savez(beside / _CATEGORIES, offsets=categories.offsets, codes=categories.codes)
        if self.config.caps_exposure:
            assert self.prices is not None
            np.save(beside / _PRICES, self.prices, allow_pickle=False)
        shutil.rmtree(directory, ignore_errors=True)
        beside.replace(directory)

    def spread(self, items: CodeArray | IntArray, scores: FloatArray) -> FloatArray:
        """[B] largest less smallest of the fused ``scores`` [B, D] that are looked at."""
        read = items >= 0
        high = np.where(read, scores, -np.inf).max(axis=1, initial=-np.inf)
        low = np.where(read, scores, np.inf).min(axis=1, initial=np.inf)
        return np.asarray(np.maximum(np.where(read.any(axis=1), high - low, 0), _SMALL))

    def _terms(self, items: IntArray, scores: FloatArray, histories: Histories) -> FloatArray:
        """[B, D] what each place of [B, D] ``items`` gains or loses but for the constant."""
        config, rows, read = self.config, np.arange(len(items)), items >= 0
        spread = self.spread(items, scores)[:, None]
        fixed = self._fixed(np.maximum(items, 0), histories)
        if not config.looks_above:
            return np.where(read, spread * fixed, 0).astype(np.float32)
        reach = np.abs(np.where(read, fixed, 0)).max(axis=1, initial=0, keepdims=True)
        beyond_all = 2 + config.similarity + 2 * reach + config.calibration * _MOST_FIT
        top = _Top.of(self.categories, items, histories)
        term, open_ = np.zeros(items.shape), read.copy()
        for place in range(min(config.places, items.shape[1]) + 1):
            now = fixed + config.calibration * top.fit() - config.similarity * top.likeness
            if config.max_per_category is not None:
                now -= beyond_all * top.over(config.max_per_category)
            term = np.where(open_, spread * now, term)
            if place < config.places:
                column = np.where(open_, scores + term, -np.inf).argmax(axis=1)
                top.put(column, open_[rows, column])
                open_[rows, column] = False
        return term.astype(np.float32)

    def _fixed(self, items: IntArray, histories: Histories) -> FloatArray:
        """[B, D] what [B, D] ``items`` gain or lose wherever they stand, in spreads."""
        config = self.config
        popular = np.log1p(self.item_counts) / np.log1p(max(1, int(self.item_counts.max())))
        fixed = -config.popularity * popular[items]
        if config.freshness > 0:
            assert self.releases is not None
            asked = np.where(histories.lengths > 0, newest_times(histories), self.releases.newest)
            ages = self.releases.ages_days(items, asked[:, None])
            fixed = fixed + config.freshness * 2.0 ** (-ages / config.half_life_days)
        if config.caps_exposure:
            assert self.prices is not None
            fixed = fixed - config.exposure * self.prices[items]
        return np.asarray(fixed)


def check_freshness(config: DiversityConfig, releases: Releases | None, place: str) -> None:
    """See that freshness can be told where it is wanted.

    Raises:
        ConfigError: nobody knows when items came out; ``place`` is what the message calls it.
    """
    if config.freshness > 0 and releases is None:
        raise ConfigError(
            f"{place}: freshness = {config.freshness:g} needs to know when items came out, which "
            "this pipeline does not: set it to 0, or fit data with times again with "
            "`python -m jobs.fit`"
        )


@dataclass(frozen=True, slots=True)
class _Top:
    """Lists that are being filled: what stands in them, by the categories that they can have."""

    local: IntArray
    """[B, D, K] the categories of each item among the H of its list, −1 behind."""
    shares: FloatArray
    """[B, D] what an item gives to each of its categories; 0 without any."""
    similar: FloatArray
    """[B, D, D] Jaccard similarity."""
    wanted: FloatArray
    """[B, H] the shares of the history."""
    mass: FloatArray
    """[B, H] what the items that stand in the list give."""
    counts: IntArray
    """[B, H] how many of these have the category."""
    likeness: FloatArray
    """[B, D] similarity to the most similar of them."""

    @classmethod
    def of(cls, categories: ItemCategories, items: IntArray, histories: Histories) -> Self:
        """Empty lists for [B, D] ``items``."""
        own = categories.padded(items)
        num_lists, stride = len(items), int(categories.codes.max(initial=0)) + 1
        keys = own + np.arange(num_lists)[:, None, None] * stride
        known, where = np.unique(keys[own >= 0], return_inverse=True)
        first = np.searchsorted(known, np.arange(num_lists + 1) * stride)
        local = np.full(own.shape, -1, dtype=np.int64)
        local[own >= 0] = where - first[known[where] // stride]
        width = max(1, int(np.diff(first).max(initial=0)))
        number = (own >= 0).sum(axis=2)
        member = np.zeros((*items.shape, width + 1), dtype=np.float32)
        np.put_along_axis(member, local, 1, axis=2)  # −1 falls into the last, which is dropped
        member = member[:, :, :width]
        common = member @ member.transpose(0, 2, 1)
        union = number[:, :, None] + number[:, None, :] - common
        past = categories.padded(histories.items.astype(np.int64))
        key = past + histories.rows[:, None] * stride
        place = np.minimum(np.searchsorted(known, key), max(len(known) - 1, 0))
        number_past = (past >= 0).sum(axis=1)
        weights = np.where(past >= 0, 1 / np.maximum(number_past, 1)[:, None], 0)
        wanted = np.zeros((num_lists, width), dtype=np.float32)
        if len(known):
            found = (past >= 0) & (known[place] == key)
            row = np.broadcast_to(histories.rows[:, None], past.shape)[found]
            np.add.at(wanted, (row, place[found] - first[row]), weights[found])
        events = np.bincount(histories.rows[number_past > 0], minlength=num_lists)
        return cls(
            local=local,
            shares=np.where(number > 0, 1 / np.maximum(number, 1), 0).astype(np.float32),
            similar=np.where(union > 0, common / np.maximum(union, 1), 0).astype(np.float32),
            wanted=np.divide(wanted, np.maximum(events, 1)[:, None], dtype=np.float32),
            mass=np.zeros((num_lists, width), dtype=np.float32),
            counts=np.zeros((num_lists, width), dtype=np.int64),
            likeness=np.zeros(items.shape, dtype=np.float32),
        )

    def fit(self) -> FloatArray:
        """[B, D] how much each item adds to what the history wants."""
        before = _FLOOR + self._at(self.mass)
        gain = np.log1p(self.shares[:, :, None] / before)
        return np.asarray(np.where(self.local >= 0, self._at(self.wanted) * gain, 0).sum(axis=2))

    def over(self, cap: int) -> BoolArray:
        """[B, D] whether a category of the item has had its share."""
        return np.asarray(((self._at(self.counts) >= cap) & (self.local >= 0)).any(axis=2))

    def put(self, column: IntArray, there: BoolArray) -> None:
        """Put one item into each list: that of ``column`` [B], where ``there`` [B]."""
        (rows,) = np.nonzero(there)
        column = column[rows]
        np.maximum.at(self.likeness, rows, self.similar[rows, column])
        own = self.local[rows, column]
        row, step = np.nonzero(own >= 0)
        category = own[row, step]
        np.add.at(self.mass, (rows[row], category), self.shares[rows[row], column[row]])
        np.add.at(self.counts, (rows[row], category), 1)

    def _at(self, values: FloatArray | IntArray) -> FloatArray:
        """[B, D, K] what ``values`` [B, H] have for each category of each item."""
        return np.asarray(values[np.arange(len(values))[:, None, None], self.local])
