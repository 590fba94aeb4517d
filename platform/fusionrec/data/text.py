"""What a language model reads: the text of an item, and the text of a history.

An item is its title, categories and description. A history is the titles and categories of its
newest items, newest first, because a model truncates what is long and the newest says most;
descriptions would leave room for one or two items only. What somebody asks for in words goes in
front. Where nothing is known the text is empty, and an encoder gives such a text a zero vector.
"""

from __future__ import annotations

from collections.abc import Sequence

from fusionrec.data.catalogue import Catalogue
from fusionrec.data.histories import Histories


def item_text(catalogue: Catalogue, code: int) -> str:
    """Title, categories and description of one item, each ending in a full stop."""
    return _sentences(
        catalogue.titles[code], ", ".join(catalogue.categories[code]), catalogue.texts[code]
    )


def item_texts(catalogue: Catalogue) -> list[str]:
    """I texts, one an item, in the order of the catalogue."""
    return [item_text(catalogue, code) for code in range(len(catalogue))]


def history_texts(catalogue: Catalogue, histories: Histories, history_items: int = 5) -> list[str]:
    """B texts: the free text, where there is one, then the newest ``history_items`` items."""
    newest = histories.newest(history_items)
    cache: dict[int, str] = {}
    texts = []
    for index in range(len(newest)):
        parts = []
        for code in newest.row(index)[::-1].tolist():
            if code not in cache:
                title, categories = catalogue.titles[code], ", ".join(catalogue.categories[code])
                cache[code] = (
                    f"{title} ({categories})" if title and categories else title or categories
                )
            parts.append(cache[code])
        wish = None if histories.texts is None else histories.texts[index]
        texts.append(_sentences(wish or "", "; ".join(part for part in parts if part)))
    return texts


def with_reviews(texts: Sequence[str], reviews: Sequence[Sequence[str]]) -> list[str]:
    """B texts, each with its own reviews behind it."""
    return [_sentences(text, *own) for text, own in zip(texts, reviews, strict=True)]


def _sentences(*parts: str) -> str:
    stripped = (" ".join(part.split()) for part in parts)
    return " ".join(p if p[-1] in ".!?…" else p + "." for p in stripped if p)
