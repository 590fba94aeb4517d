"""Titles, descriptions and reviews: the text that carries what an item is about.

Text shows an item's topics (mostly; one mention in ten is of another topic), its era, its creator
and its series, and hints at its style by the tone of an adjective. It says nothing of popularity:
that only the events tell.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeVar

import numpy as np

from fusionrec.data.histories import CodeArray, IntArray
from fusionrec.data.synthetic.words import (
    ADJECTIVES,
    BANDS,
    DOMAINS,
    ERA_LABELS,
    ERAS,
    FILLERS,
    FIRST_NAMES,
    LAST_NAMES,
    PLACES,
    ROLES,
    STYLES,
    TOPICS,
    Topic,
)
from fusionrec.data.synthetic.world import (
    DOMAIN_COLUMNS,
    ERA_COLUMNS,
    STYLE_COLUMNS,
    TOPIC_COLUMNS,
    World,
)

T = TypeVar("T")

MISLEADING = 0.1
"""Probability that a mention is of a topic the item is not about."""
IN_STYLE = 0.8
"""Probability that an adjective is one of the item's style."""
NO_DESCRIPTION = 0.04
"""Probability that an item has a title alone."""

_VOLUMES = {
    "film": ("Part Two", "Part Three", "Part Four", "Part Five"),
    "book": ("Book Two", "Book Three", "Book Four", "Book Five"),
    "music": ("Vol. 2", "Vol. 3", "Vol. 4", "Vol. 5"),
}
_CREDITS = {"film": "Directed by {}.", "book": "Written by {}.", "music": "The new record by {}."}
_LABELS = {"film": "Film", "book": "Novel", "music": "Album"}
_PRAISE = (
    "Exactly what I hoped for: {}.",
    "Could not stop. I came for {} and stayed to the end.",
    "I will come back to this one. Rarely has anyone handled {} better.",
    "If you love {}, look no further.",
)
_SHRUGS = (
    "Decent, but long on {}.",
    "Some good moments with {}, then it drags.",
    "Fine for one evening. I have met {} before.",
)
_PANS = (
    "Not for me. I do not care about {}.",
    "Gave up halfway: {}, once again.",
    "Everyone recommended it, but I have no patience for {}.",
)


@dataclass(frozen=True, slots=True)
class Prose:
    """The text of I items, in the order of their codes."""

    titles: list[str]
    texts: list[str]
    categories: list[list[str]]
    creators: list[str]


def write_items(world: World, rng: np.random.Generator) -> Prose:
    """Titles, descriptions, categories and creators' names of all items."""
    topics = _topics(world)
    domains = [DOMAINS[d] for d in world.features[:, DOMAIN_COLUMNS].argmax(axis=1)]
    eras = world.features[:, ERA_COLUMNS].argmax(axis=1).tolist()
    styles = world.features[:, STYLE_COLUMNS].argmax(axis=1).tolist()
    names = _names(world, domains, rng)
    creators = [names[creator] for creator in world.creators]
    bases, titles = _titles(world, topics, styles, domains, rng)
    texts, categories = [], []
    for code, (domain, own) in enumerate(zip(domains, topics, strict=True)):
        text = ""
        if rng.random() >= NO_DESCRIPTION:
            facts = (ERAS[eras[code]], _adjective(1, styles[code], rng), creators[code])
            text = _description(domain, own, *facts, rng)
            if world.previous[code] >= 0 and rng.random() < 0.7:
                text += f" It continues {bases[code]}."
        texts.append(text)
        genre = own[0] if rng.random() >= MISLEADING else _pick(TOPICS, rng)
        labels = [genre.genre, _LABELS[domain]]
        if rng.random() < 0.7:
            labels.append(ERA_LABELS[eras[code]])
        categories.append(labels)
    return Prose(titles, texts, categories, creators)


def write_reviews(
    world: World, items: CodeArray, ratings: IntArray, share: float, rng: np.random.Generator
) -> list[str | None]:
    """[N] a sentence or two for about ``share`` of the events; None for the others.

    The sentence mentions a topic of the item; the rating (1–5) says whether as praise or as blame.
    """
    topics = _topics(world)
    reviews: list[str | None] = [None] * len(items)
    for event in np.flatnonzero(rng.random(len(items)) < share):
        rating = ratings[event]
        moulds = _PRAISE if rating >= 4 else _SHRUGS if rating == 3 else _PANS
        matter = _pick(_mentioned(topics[items[event]], rng).matters, rng)
        sentence = _pick(moulds, rng).format(matter)
        reviews[event] = _capital(sentence)
    return reviews


def _pick(options: Sequence[T], rng: np.random.Generator) -> T:
    return options[int(rng.random() * len(options))]


def _adjective(kind: int, style: int, rng: np.random.Generator) -> str:
    """A word for titles (``kind`` 0) or for the tone (1), mostly one of the style."""
    return _pick((STYLES[style] if rng.random() < IN_STYLE else _pick(STYLES, rng))[kind], rng)


def _topics(world: World) -> list[list[Topic]]:
    """The topics of each item, the main one first."""
    weights = world.features[:, TOPIC_COLUMNS]
    order = np.argsort(-weights, axis=1, kind="stable")[:, :2]
    return [[TOPICS[k] for k in row if weights[i, k] > 0] for i, row in enumerate(order)]


def _mentioned(own: list[Topic], rng: np.random.Generator) -> Topic:
    """A topic to mention: mostly the main one, now and then a wrong one."""
    draw = rng.random()
    if draw < MISLEADING:
        return _pick(TOPICS, rng)
    return own[0] if draw < 0.7 else own[-1]


def _names(world: World, domains: list[str], rng: np.random.Generator) -> dict[int, str]:
    """A name for every creator: people write and direct, bands play."""
    people = rng.permutation(len(FIRST_NAMES) * len(LAST_NAMES))
    bands = rng.permutation(len(ADJECTIVES) * len(BANDS))
    names: dict[int, str] = {}
    for creator, domain in zip(world.creators.tolist(), domains, strict=True):
        if creator in names:
            continue
        # Where a huge catalogue uses the names up, they come again.
        if domain == "music":
            first, last = divmod(int(bands[len(names) % len(bands)]), len(BANDS))
            names[creator] = f"The {ADJECTIVES[first]} {BANDS[last]}"
        else:
            first, last = divmod(int(people[len(names) % len(people)]), len(LAST_NAMES))
            names[creator] = f"{FIRST_NAMES[first]} {LAST_NAMES[last]}"
    return names


def _titles(
    world: World,
    topics: list[list[Topic]],
    styles: list[int],
    domains: list[str],
    rng: np.random.Generator,
) -> tuple[list[str], list[str]]:
    """The base title of each item's series, and the titles: series share the base."""
    bases, titles, taken = [""] * len(world), [""] * len(world), set[str]()
    for first in np.flatnonzero(world.previous < 0):
        base = _base_title(topics[first], styles[first], rng)
        for _ in range(20):
            if base not in taken:
                break
            base = _base_title(topics[first], styles[first], rng)
        taken.add(base)
        code, volumes = int(first), dict.fromkeys(DOMAINS, 0)
        while code >= 0:
            domain = domains[code]
            bases[code] = base
            if volumes[domain]:
                titles[code] = f"{base}, {_VOLUMES[domain][volumes[domain] - 1]}"
            elif code == first:
                titles[code] = base
            else:  # the series has come from another domain
                mould = {"film": "{}: The Film", "book": "{}: The Novel"}
                titles[code] = mould.get(domain, "Songs from {}").format(base)
            volumes[domain] += 1
            code = int(world.following[code])
    return bases, titles


def _base_title(own: list[Topic], style: int, rng: np.random.Generator) -> str:
    noun = _pick(_mentioned(own, rng).nouns, rng)
    mould = rng.integers(8)
    if mould == 0:
        return f"The {noun} of {_pick(PLACES, rng)}"
    if mould == 1:
        return f"{_pick(FIRST_NAMES, rng)} and the {noun}"
    if mould == 2:
        return f"{_pick(PLACES, rng)} {noun}"
    if mould == 3:
        return f"{noun} and {_pick(own[-1].nouns, rng)}"
    return f"The {_adjective(0, style, rng)} {noun}"


def _description(
    domain: str, own: list[Topic], era: str, tone: str, creator: str, rng: np.random.Generator
) -> str:
    said = {""}

    def matter() -> str:
        """Something that the description has not said yet."""
        phrase = ""
        while phrase in said:
            phrase = _pick(_mentioned(own, rng).matters, rng)
        said.add(phrase)
        return phrase

    if domain == "music":
        one = two = _pick(own[0].sounds, rng)
        while two == one:
            two = _pick(_mentioned(own, rng).sounds, rng)
        sentences = [
            _pick(
                (
                    f"{_capital(one)}, {two}: that is how it opens.",
                    f"Listen for {one} and, later, {two}.",
                    f"{creator} build these {tone} songs on {one}.",
                ),
                rng,
            )
        ]
        if rng.random() < 0.6:
            sentences.append(f"The words circle around {matter()}; the mood is {tone}.")
        if rng.random() < 0.5:
            sentences.append(f"Its sleeve and its manners are from {era}.")
    else:
        hero = f"{_pick(FIRST_NAMES, rng)}, {_pick(ROLES, rng)},"
        sentences = [f"{hero} {_pick(own[0].acts, rng)}."]
        story = "film" if domain == "film" else "novel"
        one = matter()
        sentences.append(
            _pick(
                (
                    f"At its heart: {one}.",
                    f"{_article(tone)} {story} about {one}.",
                    f"What begins with {one} ends, in {tone} scenes, with {matter()}.",
                    f"{_capital(one)}, and nobody to talk to about it.",
                ),
                rng,
            )
        )
        if rng.random() < 0.5:
            sentences.append(f"Along the way: {matter()}.")
        if rng.random() < 0.6:
            sentences.append(f"The story is set in {era}.")
    if rng.random() < 0.7:
        sentences.append(_CREDITS[domain].format(creator))
    if rng.random() < 0.5:
        sentences.append(_pick(FILLERS[domain], rng))
    return " ".join(sentences)


def _article(adjective: str) -> str:
    return f"{'An' if adjective[0] in 'aeiou' else 'A'} {adjective}"


def _capital(phrase: str) -> str:
    return phrase[0].upper() + phrase[1:]
