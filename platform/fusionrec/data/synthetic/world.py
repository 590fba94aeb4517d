"""The latent world: what items are about and what users like, before any event happens.

Shape legend: U users, I items, F features of an item, K topics.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt
from pydantic import Field

from fusionrec.config import Config
from fusionrec.data.histories import CodeArray, IntArray
from fusionrec.data.synthetic.calendar import DAY, END, START
from fusionrec.data.synthetic.words import DOMAINS, ERAS, STYLES, TOPICS

DoubleArray: TypeAlias = npt.NDArray[np.float64]

TOPIC_COLUMNS = slice(0, len(TOPICS))
ERA_COLUMNS = slice(TOPIC_COLUMNS.stop, TOPIC_COLUMNS.stop + len(ERAS))
STYLE_COLUMNS = slice(ERA_COLUMNS.stop, ERA_COLUMNS.stop + len(STYLES))
DOMAIN_COLUMNS = slice(STYLE_COLUMNS.stop, STYLE_COLUMNS.stop + len(DOMAINS))
NUM_FEATURES = DOMAIN_COLUMNS.stop

TOPIC_STRENGTH, ERA_STRENGTH, STYLE_STRENGTH = 6.0, 1.5, 2.0
"""Logits between an item that a user loves and one that says nothing to them."""
APPEAL_SPREAD = 1.0
"""Standard deviation of the logit of an item's popularity."""


class SyntheticConfig(Config):
    """What to generate. The defaults fit the quickstart: small enough for two cores."""

    seed: int = 0
    """Seed of everything that is drawn."""
    num_users: int = Field(default=1_300, ge=2, le=100_000)
    """Users, each with at least three events."""
    num_items: int = Field(default=2_400, ge=50, le=100_000)
    """Items of the three domains together."""
    median_events: float = Field(default=15.0, ge=3.0, le=1_000.0)
    """Median number of events of a user; the lengths are log-normal, so their mean is higher."""
    noise: float = Field(default=0.1, ge=0.0, le=1.0)
    """Probability that an event follows popularity alone and says nothing about its user."""
    drift: float = Field(default=0.6, ge=0.0, le=1.0)
    """Share of a user's taste that has been replaced at the end; 0 makes tastes stand still."""
    cold_fraction: float = Field(default=0.12, ge=0.0, le=0.5)
    """Share of the items that appear in the last days, or only after the last event."""


@dataclass(frozen=True, slots=True)
class World:
    """Everything that determines how probable an event is."""

    features: DoubleArray
    """[I, F] topic weights (they sum to 1), then era, style and domain, one-hot."""
    appeal: DoubleArray
    """[I] popularity, in logits."""
    released: IntArray
    """[I] when the item appears, seconds since the epoch."""
    creators: CodeArray
    """[I] who made it; a creator works in one domain."""
    previous: CodeArray
    """[I] the item of the same series that comes before; −1 where there is none."""
    following: CodeArray
    """[I] the inverse of ``previous``."""
    tastes: DoubleArray
    """[U, 2, F] logits that a feature adds, before and after the drift."""
    turns: IntArray
    """[U] when a user is halfway from the old taste to the new one."""
    paces: IntArray
    """[U] how slow the turn is, in seconds: days for a switch, a sixth of the stay for a drift."""
    noise: float

    def __len__(self) -> int:
        return len(self.features)


def make_world(
    config: SyntheticConfig, begins: IntArray, ends: IntArray, rng: np.random.Generator
) -> World:
    """Draw items, and users who act from ``begins`` to ``ends``, [U] seconds since the epoch."""
    spans = ends - begins
    items = _draw_items(config, rng)
    tastes = _draw_tastes(config, rng)
    return World(
        **items,
        tastes=tastes,
        turns=begins + (spans * rng.uniform(0.2, 0.8, config.num_users)).astype(np.int64),
        paces=np.where(rng.random(config.num_users) < 0.5, 3 * DAY, 3 * DAY + spans // 6),
        noise=config.noise,
    )


def _draw_items(config: SyntheticConfig, rng: np.random.Generator) -> dict[str, npt.NDArray[Any]]:
    num_items, num_topics = config.num_items, len(TOPICS)
    domains = rng.choice(len(DOMAINS), num_items, p=(0.4, 0.35, 0.25))
    creators = np.empty(num_items, dtype=np.int32)
    num_creators = 0
    for domain in range(len(DOMAINS)):
        (members,) = np.nonzero(domains == domain)
        count = max(2, len(members) // 6)
        weights = 1.0 / (np.arange(count) + 5.0)  # a few creators made much, most made little
        creators[members] = num_creators + rng.choice(
            count, len(members), p=weights / weights.sum()
        )
        num_creators += count

    def mostly_of_creator(low: int, share: float) -> IntArray:
        """A property that ``share`` of a creator's works have in common."""
        usual = rng.integers(low, size=num_creators)[creators]
        return np.where(rng.random(num_items) < share, usual, rng.integers(low, size=num_items))

    primary = mostly_of_creator(num_topics, 0.65)
    secondary = rng.integers(num_topics, size=num_items)
    eras, styles = mostly_of_creator(len(ERAS), 0.6), mostly_of_creator(len(STYLES), 0.5)
    appeal = rng.normal(0.0, APPEAL_SPREAD, num_items)
    released = START - (rng.exponential(4 * 365 * DAY, num_items)).astype(np.int64)
    recent = rng.random(num_items) < 0.3
    released[recent] = rng.integers(START, END, recent.sum())
    late = rng.random(num_items) < config.cold_fraction
    released[late] = rng.integers(END - 3 * DAY, END + DAY, late.sum())

    previous = np.full(num_items, -1, dtype=np.int32)
    for chain in _draw_series(domains, rng):
        leader = chain[0]
        for values in (primary, secondary, eras, styles):
            values[chain] = values[leader]
        same_domain = chain[domains[chain] == domains[leader]]
        creators[same_domain] = creators[leader]
        appeal[chain] = appeal[leader] + rng.normal(0.0, 0.2, len(chain))
        released[chain] = np.sort(released[chain])
        previous[chain[1:]] = chain[:-1]
    following = np.full(num_items, -1, dtype=np.int32)
    (later,) = np.nonzero(previous >= 0)
    following[previous[later]] = later

    features = np.zeros((num_items, NUM_FEATURES))
    every = np.arange(num_items)
    features[every, primary] += 0.7
    features[every, secondary] += 0.3
    for values, columns in (
        (eras, ERA_COLUMNS),
        (styles, STYLE_COLUMNS),
        (domains, DOMAIN_COLUMNS),
    ):
        features[every, columns.start + values] = 1.0
    return {
        "features": features,
        "appeal": appeal,
        "released": released,
        "creators": creators,
        "previous": previous,
        "following": following,
    }


def _draw_series(domains: IntArray, rng: np.random.Generator) -> list[IntArray]:
    """Chains of 2–5 items, 30% of the catalogue; a quarter of them cross the domains."""
    free = rng.permutation(len(domains))
    budget, chains = int(0.3 * len(domains)), []
    while budget >= 2:
        length = int(rng.integers(2, 6))
        crossing = rng.random() < 0.25
        (same,) = np.nonzero(domains[free] == domains[free[0]])
        picked = np.arange(length) if crossing else same[:length]
        if len(picked) > 1:
            chains.append(free[picked])
        free = np.delete(free, picked)
        budget -= len(picked)
    return chains


def _draw_tastes(config: SyntheticConfig, rng: np.random.Generator) -> DoubleArray:
    """Before and after the drift: after = (1 − drift) · before + drift · a new draw."""
    num_users = config.num_users

    def draw(count: int, concentration: float) -> DoubleArray:
        old, new = rng.dirichlet(np.full(count, concentration), (2, num_users))
        return np.stack([old, (1.0 - config.drift) * old + config.drift * new], axis=1)

    def relative(shares: DoubleArray) -> DoubleArray:
        """Shares as multiples of the largest one: 1 for what a user likes most."""
        return np.asarray(shares / shares.max(axis=-1, keepdims=True))

    tastes = np.empty((num_users, 2, NUM_FEATURES))
    tastes[:, :, TOPIC_COLUMNS] = TOPIC_STRENGTH * relative(draw(len(TOPICS), 0.12))
    tastes[:, :, ERA_COLUMNS] = ERA_STRENGTH * relative(draw(len(ERAS), 0.5))
    tastes[:, :, STYLE_COLUMNS] = STYLE_STRENGTH * relative(draw(len(STYLES), 0.3))
    # Nobody is closed to a domain altogether: a twentieth is the least.
    tastes[:, :, DOMAIN_COLUMNS] = np.log(0.05 + 0.85 * draw(len(DOMAINS), 0.8))
    return tastes
