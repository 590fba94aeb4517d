"""Looking around in a bundle: items by words of their titles, and a handful of its users.

For people at the page, not for the path of a recommendation. The index of the words is made when it
is first asked for, at about 4 µs and 30 bytes a title: call it from a thread. A question then takes
milliseconds.

Shape legend: I items, W distinct words, P words of all titles.
"""

from __future__ import annotations

import re
import threading
import unicodedata
from array import array
from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Self

import numpy as np

from fusionrec.data.catalogue import Catalogue
from fusionrec.data.histories import CodeArray, IntArray
from fusionrec.serving.schemas import (
    MAX_HISTORY,
    Item,
    ItemsRequest,
    ItemsResponse,
    KnownEvent,
    KnownUser,
    UsersRequest,
    UsersResponse,
)
from fusionrec.serving.service import KnownUsers

_WORD = re.compile(r"\w+")
_LAST = "\U0010ffff"
"""Sorts behind every character that a word can go on with."""


def words(text: str) -> list[str]:
    """The words of ``text`` without case and accents."""
    if not text.isascii():
        decomposed = unicodedata.normalize("NFKD", text)
        text = "".join(c for c in decomposed if not unicodedata.combining(c))
    return _WORD.findall(text.casefold())


@dataclass(frozen=True, slots=True)
class TitleIndex:
    """Which titles hold a word: an inverted index whose words are sorted."""

    words: Sequence[str]
    """W words, sorted."""
    offsets: IntArray
    """[W+1]; word w is in the titles of ``codes[offsets[w]:offsets[w+1]]``."""
    codes: CodeArray
    """[P] codes, ascending for each word."""
    first: CodeArray
    """[I] the word that a title begins with; −1 for a title without words."""
    lengths: CodeArray
    """[I] number of words of a title."""

    @classmethod
    def of(cls, titles: Sequence[str]) -> Self:
        """Index ``titles``."""
        numbers: dict[str, int] = {}
        found, lengths = array("i"), array("i")
        for title in titles:
            those = words(title)
            found.extend(numbers.setdefault(word, len(numbers)) for word in those)
            lengths.append(len(those))
        counts = np.frombuffer(lengths, dtype=np.int32)
        vocabulary = sorted(numbers)
        place = np.empty(len(vocabulary), dtype=np.int32)  # number of a word → its sorted place
        place[[numbers[word] for word in vocabulary]] = np.arange(len(vocabulary))
        placed = place[np.frombuffer(found, dtype=np.int32)]
        codes = np.repeat(np.arange(len(titles), dtype=np.int32), counts)
        starts = np.cumsum(counts) - counts
        first = np.full(len(titles), -1, dtype=np.int32)
        first[counts > 0] = placed[starts[counts > 0]]
        return cls(
            words=vocabulary,
            offsets=np.concatenate(
                [[0], np.cumsum(np.bincount(placed, minlength=len(vocabulary)))]
            ),
            codes=codes[np.argsort(placed, kind="stable")],
            first=first,
            lengths=counts,
        )

    def find(self, query: str) -> CodeArray:
        """Titles that hold every word of ``query``, or a longer word that begins with it.

        Whole words come before beginnings of words, then titles that begin with the first word of
        ``query``, then titles of few words, then low codes. Nothing, without a word.
        """
        ranges = [self._beginning_with(word) for word in words(query)]
        if not ranges:
            return np.empty(0, dtype=np.int32)
        held = sorted((self._codes(low, high) for low, high, _ in ranges), key=len)
        found = np.unique(held[0])
        for codes in held[1:]:
            found = found[np.isin(found, codes)]
        whole = np.zeros(len(found), dtype=np.int32)
        for low, _, exact in ranges:
            if exact:
                whole += np.isin(found, self._codes(low, low + 1))
        low, high, _ = ranges[0]
        begins = (self.first[found] >= low) & (self.first[found] < high)
        return found[np.lexsort((found, self.lengths[found], ~begins, -whole))]

    def _beginning_with(self, word: str) -> tuple[int, int, bool]:
        """The places of the words that begin with ``word``, and whether the first one is it."""
        low = bisect_left(self.words, word)
        high = bisect_left(self.words, word + _LAST, lo=low)
        return low, high, low < high and self.words[low] == word

    def _codes(self, low: int, high: int) -> CodeArray:
        return self.codes[self.offsets[low] : self.offsets[high]]


class Browser:
    """Answers what the page asks of one bundle. Threads may share it."""

    def __init__(self, catalogue: Catalogue, users: KnownUsers) -> None:
        self._catalogue = catalogue
        self._users = users
        self._index: TitleIndex | None = None
        self._building = threading.Lock()

    def find_items(self, request: ItemsRequest) -> ItemsResponse:
        """Items by the words of their titles; an item whose id is the query comes first."""
        with self._building:
            if self._index is None:
                self._index = TitleIndex.of(self._catalogue.titles)
        codes = self._index.find(request.query)[: request.k].tolist()
        named = self._catalogue.code_of.get(request.query)
        if named is not None:
            codes = [named, *(code for code in codes if code != named)][: request.k]
        return ItemsResponse(items=[Item(**self._describe(code)) for code in codes])

    def find_users(self, request: UsersRequest) -> UsersResponse:
        """The user who is named, with the history; or some, over all lengths of histories."""
        if request.user_id is None:
            lengths = self._users.histories.lengths
            ids = list(self._users.rows)
            return UsersResponse(
                users=[
                    KnownUser(user_id=ids[row], events=int(lengths[row]))
                    for row in spread(lengths, request.k)
                ]
            )
        found = self._users.find(request.user_id)
        if found is None:
            return UsersResponse(users=[])
        items, times = (array[-MAX_HISTORY:].tolist() for array in found)
        history = [
            KnownEvent(**self._describe(code), timestamp=time)
            for code, time in zip(items, times, strict=True)
        ]
        user = KnownUser(user_id=request.user_id, events=len(found[0]), history=history)
        return UsersResponse(users=[user])

    def _describe(self, code: int) -> dict[str, str | list[str]]:
        return {
            "item_id": self._catalogue.item_ids[code],
            "title": self._catalogue.titles[code],
            "domain": self._catalogue.domains[code],
            "categories": list(self._catalogue.categories[code]),
        }


def spread(lengths: IntArray, k: int) -> list[int]:
    """At most ``k`` rows with something in them, shortest first, over all the lengths there are.

    Evenly spaced over the distinct lengths, and in turn where there are fewer of those than ``k``;
    of rows that are equally long, the lower ones.
    """
    (rows,) = np.nonzero(lengths)
    distinct, group = np.unique(lengths[rows], return_inverse=True)
    if not len(distinct):
        return []
    chosen = np.linspace(0, len(distinct) - 1, min(k, len(distinct))).round().astype(np.int64)
    keep = np.isin(group, chosen)
    rows, group = rows[keep], group[keep]
    by_length = np.argsort(group, kind="stable")
    rows, group = rows[by_length], group[by_length]
    turn = np.arange(len(rows)) - np.searchsorted(group, group)  # 0 for the first of its length
    taken = np.sort(np.lexsort((group, turn))[:k])
    return [int(row) for row in rows[taken]]
