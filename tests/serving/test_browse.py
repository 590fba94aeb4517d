import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fusionrec.data.catalogue import Catalogue
from fusionrec.data.histories import Histories
from fusionrec.serving.browse import Browser, TitleIndex, spread, words
from fusionrec.serving.schemas import MAX_HISTORY, ItemsRequest, UsersRequest
from fusionrec.serving.service import KnownUsers

TITLES = [
    "Star Wars: Episode IV – A New Hope (1977)",
    "Stardust",
    "A Star Is Born",
    "Amélie (Le Fabuleux Destin d'Amélie Poulain)",
    "",
    "STAR TREK",
    "Straße der Sterne",
    "東京物語",
    "The Wars of the Stars",
]
HISTORIES = [[0, 1, 2], [3], [], [4], [0, 5], [8]]


@pytest.fixture
def browser() -> Browser:
    count = len(TITLES)
    catalogue = Catalogue(
        item_ids=tuple(f"i{n}" for n in range(count)),
        titles=tuple(TITLES),
        texts=("",) * count,
        categories=(("Space", "Old"),) + ((),) * (count - 1),
        domains=("films",) * count,
    )
    times = [[10 * (n + 1) for n in range(len(row))] for row in HISTORIES]
    rows = {f"u{n}": n for n in range(len(HISTORIES))}
    return Browser(catalogue, KnownUsers(rows, Histories.of(HISTORIES, times), newest=30))


def found(browser: Browser, query: str, k: int = 10) -> list[int]:
    answer = browser.find_items(ItemsRequest(query=query, k=k))
    return [int(item.item_id[1:]) for item in answer.items]


@pytest.mark.parametrize(
    ("query", "expected"),
    [
        ("star", [5, 0, 2, 1, 8]),  # the whole word first, of those the titles that begin with it
        ("STAR W", [0, 8]),
        ("wars star", [0, 8]),
        ("sta", [1, 5, 0, 2, 8]),
        ("amelie", [3]),
        ("AMÉLIE poul", [3]),
        ("strasse", [6]),
        ("東京", [7]),
        ("1977", [0]),
        ("star tulip", []),
        ("star star", [5, 0, 2, 1, 8]),
        ("!?", []),
        ("i4", [4]),
        ("\U0010ffff", []),
    ],
)
def test_titles_by_their_words(browser: Browser, query: str, expected: list[int]):
    assert found(browser, query) == expected
    assert found(browser, query, k=1) == expected[:1]


def test_an_item_comes_with_what_is_known_of_it(browser: Browser):
    (item,) = browser.find_items(ItemsRequest(query="hope")).items
    assert item.model_dump() == {
        "item_id": "i0",
        "title": TITLES[0],
        "domain": "films",
        "categories": ["Space", "Old"],
    }


TEXT = st.text(alphabet="abAB é-", max_size=8)


@settings(deadline=None)
@given(st.lists(TEXT, max_size=12), TEXT)
def test_the_index_finds_what_a_scan_finds(titles: list[str], query: str):
    asked = words(query)
    scanned = {
        code
        for code, title in enumerate(titles)
        if asked and all(any(w.startswith(a) for w in words(title)) for a in asked)
    }
    answer = TitleIndex.of(titles).find(query).tolist()
    assert len(answer) == len(set(answer))
    assert set(answer) == scanned


def test_a_hundred_thousand_titles_are_searched_in_no_time():
    generator = np.random.default_rng(3)
    vocabulary = ["".join(chr(97 + c) for c in row) for row in generator.integers(0, 26, (5000, 6))]
    chosen = generator.integers(0, len(vocabulary), (100_000, 4))
    titles = [" ".join(vocabulary[w] for w in row) for row in chosen]
    index = TitleIndex.of(titles)
    start = time.perf_counter()
    for query in ("a", "a b", titles[77_777]):
        assert len(index.find(query))
    assert time.perf_counter() - start < 1
    assert index.find(titles[77_777])[0] == 77_777


def test_some_users_over_all_lengths(browser: Browser):
    users = browser.find_users(UsersRequest(k=4)).users
    assert [(user.user_id, user.events) for user in users] == [
        ("u1", 1),
        ("u3", 1),
        ("u4", 2),
        ("u0", 3),
    ]
    assert all(user.history is None for user in users)


@pytest.mark.parametrize(
    ("lengths", "k", "rows"),
    [
        ([], 3, []),
        ([0, 0], 3, []),
        ([5, 1, 3, 2, 4], 3, [1, 2, 0]),
        ([5, 1, 3, 2, 4], 1, [1]),
        ([1, 1, 1, 9], 3, [0, 1, 3]),
        ([2, 2], 5, [0, 1]),
    ],
)
def test_spread(lengths: list[int], k: int, rows: list[int]):
    assert spread(np.array(lengths, dtype=np.int64), k) == rows


def test_one_user_with_the_history(browser: Browser):
    (user,) = browser.find_users(UsersRequest(user_id="u4")).users
    assert (user.user_id, user.events) == ("u4", 2)
    assert user.history is not None
    assert [(event.item_id, event.timestamp) for event in user.history] == [("i0", 10), ("i5", 20)]
    assert user.history[1].title == "STAR TREK"
    assert browser.find_users(UsersRequest(user_id="nobody")).users == []


def test_of_a_long_history_the_newest_part_is_told():
    items = [[n % 2 for n in range(MAX_HISTORY + 5)]]
    catalogue = Catalogue(("a", "b"), ("A", "B"), ("", ""), ((), ()), ("", ""))
    users = KnownUsers({"u": 0}, Histories.of(items), newest=0)
    (user,) = Browser(catalogue, users).find_users(UsersRequest(user_id="u")).users
    assert user.events == MAX_HISTORY + 5
    assert user.history is not None
    assert len(user.history) == MAX_HISTORY
    assert user.history[0].timestamp == 5
