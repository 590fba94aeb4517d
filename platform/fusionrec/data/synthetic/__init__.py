"""The embedded default data set: films, books and music, and users whose tastes the text carries.

Everything is drawn from one seed: the same configuration gives the same files, bit for bit.

**Items.** Item *i* has a main and a second topic (weights φ_i, .7 and .3, over the topics of
:mod:`~fusionrec.data.synthetic.words`, shared by all domains), an era, a style, a domain, a
creator (whose works are alike), a popularity a_i ~ N(0, 1) and a date of release r_i; 30% belong
to series, some of which go from a book to its film to its songs. f_i is the vector of all of these
but creator, popularity and date. A share of the items appears in the last days or never: *cold*.

**Text.** Titles, descriptions and reviews speak of φ_i in words that differ from domain to domain
and are partly oblique, of the era, the creator and the series; one mention in ten misleads. The
tone of an adjective hints at the style; popularity is not told: neither text nor events know all.

**Tastes.** User *u* has two vectors of logits over the features, before and after: a few loved
topics (sparse Dirichlet), eras, styles, and the logarithms of their shares of the domains. Topics
do not depend on the domain: who loves heist films loves heist novels. The taste drifts by
w_u(t) = σ((t − turn_u) / pace_u): at once for half of the users, slowly for the others::

    θ_u(t) = (1 − w_u(t)) · before_u + w_u(t) · after_u

**Events.** At time t, after the history h of which R are the three newest items, the next item is
drawn without return, among those released, from::

    c_i(t) = a_i + 2.5 · exp(−(t − r_i) / 60 days)
    z_ui   = c_i(t) + θ_u(t)·f_i + 1.5 · φ_i·mean(φ_R) + 1.5 · [creator of i made one of R]
             + 4 · [i continues the series of one of R] − 2 · [the part before i is not in h]
    p(i | u, t, h) = (1 − noise) · softmax(z_u) + noise · softmax(c)

**Ratings and reviews.** A rating from 1 to 5 rises with how well topics and style fit the taste; a
third of the events have a review, which mentions a topic and praises or blames it by the rating.

**Oracle.** p(i | u, t, h) itself, in ``oracle.npz`` beside the data set: :class:`Oracle`.

Costs at the default size: a few seconds and under 400 MB.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa

from fusionrec.data.catalogue import ITEM_SCHEMA
from fusionrec.data.dataset import INTERACTION_SCHEMA, Dataset
from fusionrec.data.histories import CodeArray, IntArray
from fusionrec.data.ingest import DatasetWriter
from fusionrec.data.synthetic.calendar import draw_lengths, draw_times
from fusionrec.data.synthetic.choice import simulate
from fusionrec.data.synthetic.oracle import Oracle
from fusionrec.data.synthetic.prose import Prose, write_items, write_reviews
from fusionrec.data.synthetic.words import DOMAINS
from fusionrec.data.synthetic.world import (
    DOMAIN_COLUMNS,
    STYLE_COLUMNS,
    STYLE_STRENGTH,
    TOPIC_COLUMNS,
    TOPIC_STRENGTH,
    SyntheticConfig,
    World,
    make_world,
)

__all__ = ["Oracle", "SyntheticConfig", "generate"]

REVIEWED = 0.35
"""Share of the events with a review."""


def generate(config: SyntheticConfig, directory: Path) -> Dataset:
    """Write the data set that ``config`` describes into ``directory``, with its oracle.

    Raises:
        DataError: the directory is taken by something else, or cannot be written.
    """
    # One generator a part: a change in how the prose is drawn leaves the events as they are.
    of_times, of_world, of_events, of_prose, of_ratings = np.random.default_rng(config.seed).spawn(
        5
    )
    lengths = draw_lengths(config.num_users, config.num_items, config.median_events, of_times)
    times = draw_times(lengths, of_times)
    world = make_world(config, times[:, 0], times[:, -1], of_world)
    chosen = simulate(world, lengths, times, of_events)
    prose = write_items(world, of_prose)

    # In the order of time, as a log is; users are numbered by their first event.
    users, steps = np.nonzero(chosen >= 0)
    order = np.lexsort((steps, users, times[users, steps]))
    users, steps = users[order], steps[order]
    items, moments = chosen[users, steps], times[users, steps]
    number = np.empty(config.num_users, dtype=np.int64)
    number[users[np.sort(np.unique(users, return_index=True)[1])]] = np.arange(config.num_users)
    user_ids = tuple(f"u{n:05d}" for n in number)
    item_table = _item_table(world, prose)
    ratings = _rate(world, users, items, of_ratings)
    reviews = write_reviews(world, items, ratings, REVIEWED, of_ratings)
    events = pa.table(
        {
            "user_id": pa.array(user_ids).take(pa.array(users)),
            "item_id": item_table.column("item_id").take(pa.array(items)),
            "timestamp": moments,
            "event": ["rating" if review is None else "review" for review in reviews],
            "value": ratings.astype(np.float32),
            "text": reviews,
            "domain": item_table.column("domain").take(pa.array(items)),
        },
        schema=INTERACTION_SCHEMA,
    )
    with DatasetWriter(directory, name="synthetic", format="synthetic") as writer:
        writer.write_items(item_table)
        writer.write_interactions(events)
        writer.finish()
    Oracle(world, user_ids).save(directory)
    return Dataset.open(directory)


def _item_table(world: World, prose: Prose) -> pa.Table:
    domains = [DOMAINS[d] for d in world.features[:, DOMAIN_COLUMNS].argmax(axis=1)]
    return pa.table(
        {
            "item_id": [f"{domain}-{code:05d}" for code, domain in enumerate(domains)],
            "title": prose.titles,
            "text": prose.texts,
            "categories": prose.categories,
            "domain": domains,
            "creator": prose.creators,
            "released": world.released,
        },
        schema=pa.schema([*ITEM_SCHEMA, ("creator", pa.string()), ("released", pa.int64())]),
    )


def _rate(world: World, users: IntArray, items: CodeArray, rng: np.random.Generator) -> IntArray:
    """[N] ratings: 1 for no fit at all, 5 for a perfect one, with a bias a user and noise."""
    taste = world.tastes.mean(axis=1)
    features = world.features
    topics = (taste[users, TOPIC_COLUMNS] * features[items, TOPIC_COLUMNS]).sum(axis=1)
    styles = (taste[users, STYLE_COLUMNS] * features[items, STYLE_COLUMNS]).sum(axis=1)
    fit = 0.75 * topics / TOPIC_STRENGTH + 0.25 * styles / STYLE_STRENGTH
    bias = rng.normal(0.0, 0.4, len(taste))[users]
    ratings = 2.3 + 3.0 * fit + bias + rng.normal(0.0, 0.6, len(items))
    return np.asarray(np.clip(np.round(ratings), 1, 5), dtype=np.int64)
