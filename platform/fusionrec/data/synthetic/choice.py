"""How users choose: the probability of every item as the next event, and the events drawn from it.

The simulation and the oracle call the same function, so the oracle is exact by construction.

Shape legend: B users at one moment each, I items, R recent items, U users, T events of the longest
history.
"""

from __future__ import annotations

import numpy as np

from fusionrec.data.histories import BoolArray, CodeArray, IntArray
from fusionrec.data.synthetic.calendar import DAY, START
from fusionrec.data.synthetic.world import TOPIC_COLUMNS, DoubleArray, World

NUM_RECENT = 3
"""How many of the newest events set the mood of the next."""
MOOD = 1.5
"""Logit of a topic for its mean weight in the recent events."""
CREATOR = 1.5
"""Logit of an item by the creator of a recent one."""
SEQUEL = 4.0
"""Logit of an item that continues the series of a recent one."""
MID_SERIES = 2.0
"""Logit that an item loses while the one before it in its series is unknown to the user."""
NOVELTY = 2.5
"""Logit of an item on the day of its release; it halves every 42 days."""
NOVELTY_S = 60 * DAY


def probabilities(
    world: World, users: IntArray, times: IntArray, recent: CodeArray, seen: BoolArray
) -> DoubleArray:
    """[B, I] the probability of each item as the next event of ``users`` at ``times``.

    Args:
        world: the latent world.
        users: [B] positions in ``world.tastes``.
        times: [B] seconds since the epoch.
        recent: [B, R] the newest items; −1 where there are fewer.
        seen: [B, I] the items that a user knows already: their probability is 0.
    """
    rows, columns = np.nonzero(recent >= 0)
    known = recent[rows, columns]

    drift = 1.0 / (1.0 + np.exp(-(times - world.turns[users]) / world.paces[users]))[:, None]
    taste = (1.0 - drift) * world.tastes[users, 0] + drift * world.tastes[users, 1]
    topics = np.zeros((len(users), TOPIC_COLUMNS.stop))
    np.add.at(topics, rows, world.features[known, TOPIC_COLUMNS])
    count = np.maximum((recent >= 0).sum(axis=1, keepdims=True), 1)
    taste[:, TOPIC_COLUMNS] += MOOD * topics / count

    # exp(−(now − released) / scale) as an outer product: one exponential an item, not B × I.
    now, release = (times - START) / NOVELTY_S, (world.released - START) / NOVELTY_S
    novelty = NOVELTY * np.exp(-now)[:, None] * np.exp(release)
    common = world.appeal + novelty

    own = taste @ world.features.T
    by_creator = np.zeros((len(users), int(world.creators.max()) + 1))
    by_creator[rows, world.creators[known]] = CREATOR
    own += by_creator[:, world.creators]
    sequel = np.zeros_like(own)
    following = world.following[known]
    sequel[rows[following >= 0], following[following >= 0]] = SEQUEL
    own += sequel
    (later,) = np.nonzero(world.previous >= 0)
    own[:, later] -= MID_SERIES * ~seen[:, world.previous[later]]

    open_to = ~seen & (world.released <= times[:, None])
    return (1.0 - world.noise) * _softmax(common + own, open_to) + world.noise * _softmax(
        common, open_to
    )


def _softmax(logits: DoubleArray, open_to: BoolArray) -> DoubleArray:
    logits = np.where(open_to, logits, -np.inf)
    weights = np.exp(logits - logits.max(axis=1, keepdims=True))
    return np.asarray(weights / weights.sum(axis=1, keepdims=True))


def simulate(
    world: World, lengths: IntArray, times: IntArray, rng: np.random.Generator
) -> CodeArray:
    """Draw every event, all users side by side: [U, T] items, −1 behind a user's last event."""
    num_users, longest = times.shape
    items = np.full((num_users, longest), -1, dtype=np.int32)
    seen = np.zeros((num_users, len(world)), dtype=np.bool_)
    for step in range(longest):
        (active,) = np.nonzero(lengths > step)
        recent = items[active, max(0, step - NUM_RECENT) : step]
        chances = probabilities(world, active, times[active, step], recent, seen[active])
        ceiling = chances.cumsum(axis=1)
        ticket = rng.random(len(active)) * ceiling[:, -1]
        chosen = (ceiling <= ticket[:, None]).sum(axis=1)
        items[active, step] = chosen
        seen[active, chosen] = True
    return items
