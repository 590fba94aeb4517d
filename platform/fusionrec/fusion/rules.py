"""Hard rules: what may be recommended at all, to anybody.

They hold where candidates are united, before anything is scored, so that every answer keeps them:
personal, degraded or of popular items. A history of which the rules leave fewer candidates than a
source proposes gets the most popular of the permitted items that are not in it, so that a short
allow list still fills a list.

Item ids are those of the catalogue; an age is counted to the newest training event, the last moment
that the pipeline knows of.

Shape legend: B histories, C candidates, I items.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Self

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from pydantic import Field, ValidationError

from fusionrec.config import Config
from fusionrec.data.histories import BoolArray, CodeArray, Histories, IntArray
from fusionrec.data.releases import Releases
from fusionrec.errors import ConfigError

RULES = "rules.json"
"""Their file in a pipeline directory."""


class RulesConfig(Config):
    """What ``rules.json`` says."""

    allow: tuple[str, ...] | None = Field(default=None, min_length=1)
    """Ids of the only items that may be recommended; None: of all."""
    deny: tuple[str, ...] = ()
    """Ids of items that are never recommended, whatever allow says."""
    deny_categories: tuple[str, ...] = ()
    """Categories of which no item is recommended."""
    max_age_days: float | None = Field(default=None, gt=0)
    """Days before the newest training event: what came out earlier is not recommended. An item of
    which nobody knows when may be."""

    @property
    def changes(self) -> bool:
        """Whether there is any rule."""
        return self != RulesConfig()


@dataclass(frozen=True, slots=True)
class Rules:
    """Rules as the pipeline applies them. Threads may share them."""

    permitted: BoolArray
    """[I] whether an item may be recommended."""
    popular: CodeArray
    """Codes of the permitted items, those with most training events first."""

    @classmethod
    def of(cls, permitted: BoolArray, item_counts: IntArray) -> Self:
        """From what is permitted [I] and the training events of each item [I]."""
        (codes,) = np.nonzero(permitted)
        order = np.argsort(-item_counts[codes], kind="stable")
        return cls(permitted, codes[order].astype(np.int32))

    def allows(self, items: CodeArray) -> BoolArray:
        """[B, C] which of ``items`` are items, and permitted."""
        return (items >= 0) & self.permitted[np.maximum(items, 0)]

    def keep(self, items: CodeArray, histories: Histories, k: int) -> CodeArray:
        """The permitted of [B, C] ``items``, filled up to ``k`` a history.

        Wider than before where something was filled up; in no order, with −1 anywhere.
        """
        kept = np.where(self.allows(items), items, -1)
        (short,) = np.nonzero((kept >= 0).sum(axis=1) < k)
        if not len(short):
            return kept.astype(np.int32)
        more = np.full((len(items), k), -1, dtype=np.int32)
        for row in short.tolist():
            seen = histories.row(row)
            first = self.popular[: k + len(seen)]
            new = first[~np.isin(first, seen)][:k]
            lacking = k - int((kept[row] >= 0).sum())
            new = new[~np.isin(new, kept[row])][:lacking]
            more[row, : len(new)] = new
        return np.concatenate([kept, more], axis=1, dtype=np.int32)


def load_rules(directory: Path, item_counts: IntArray, releases: Releases | None) -> Rules | None:
    """The rules of a pipeline directory; None where it has none.

    Raises:
        ConfigError: the file is malformed, names what the catalogue does not have, asks for a time
            that is not known, or leaves nothing to recommend.
    """
    path = directory / RULES
    if not path.is_file():
        return None
    try:
        config = RulesConfig.model_validate_json(path.read_bytes())
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(map(str, first["loc"])) or "the whole"
        raise ConfigError(f"{path} is wrong: {place}: {first['msg']}") from error
    return build_rules(config, directory / "catalogue.parquet", item_counts, releases, str(path))


def build_rules(
    config: RulesConfig,
    catalogue: Path,
    item_counts: IntArray,
    releases: Releases | None,
    place: str,
) -> Rules:
    """Check ``config`` against a catalogue.

    Args:
        config: the rules.
        catalogue: Parquet file of the items; only ids and categories are read.
        item_counts: [I] training events.
        releases: when the items came out, where that is known.
        place: what errors call the rules.

    Raises:
        ConfigError: see :func:`load_rules`.
    """
    table = pq.read_table(catalogue, columns=["item_id", "categories"]).combine_chunks()
    ids = table.column("item_id").combine_chunks()
    permitted = np.ones(len(table), dtype=np.bool_)
    if config.allow is not None:
        permitted[:] = False
        permitted[_codes(config.allow, ids, f"{place}: allow")] = True
    permitted[_codes(config.deny, ids, f"{place}: deny")] = False
    if config.deny_categories:
        lists = table.column("categories").combine_chunks()
        names = pc.list_flatten(lists)
        _check(config.deny_categories, names, f"{place}: deny_categories", "category")
        denied = pc.is_in(names, pa.array(config.deny_categories)).to_numpy(zero_copy_only=False)
        permitted[pc.list_parent_indices(lists).to_numpy()[denied]] = False
    if config.max_age_days is not None:
        if releases is None:
            raise ConfigError(
                f"{place}: max_age_days = {config.max_age_days:g} needs to know when items came "
                "out, which this pipeline does not: leave it out, or fit data with times again "
                "with `python -m jobs.fit`"
            )
        every = np.arange(len(table))
        ages = releases.ages_days(every, np.full(len(table), releases.newest))
        permitted &= ~np.isfinite(ages) | (ages <= config.max_age_days)
    if not permitted.any():
        raise ConfigError(f"{place} leaves none of {len(table)} items to recommend: relax it")
    return Rules.of(permitted, item_counts)


def _codes(named: Sequence[str], ids: pa.Array, place: str) -> IntArray:
    _check(named, ids, place, "item")
    return np.asarray(pc.index_in(pa.array(named, pa.string()), ids)).astype(np.int64)


def _check(named: Sequence[str], known: pa.Array, place: str, kind: str) -> None:
    there = pc.is_in(pa.array(named, pa.string()), known).to_pylist()
    unknown = [name for name, is_known in zip(named, there, strict=True) if not is_known]
    if unknown:
        more = f" and {len(unknown) - 1} more" if len(unknown) > 1 else ""
        raise ConfigError(
            f"{place} names {kind} {unknown[0]!r}{more}, which the catalogue does not have: "
            "correct or remove it"
        )
