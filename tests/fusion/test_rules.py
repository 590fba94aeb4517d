import numpy as np
import pytest

from fusionrec.data.catalogue import Catalogue
from fusionrec.data.histories import Histories
from fusionrec.data.releases import Releases
from fusionrec.errors import ConfigError
from fusionrec.fusion.rules import RULES, Rules, RulesConfig, build_rules, load_rules

COUNTS = np.array([1, 5, 3, 0])
CATALOGUE = Catalogue(
    item_ids=("a", "b", "c", "d"),
    titles=("",) * 4,
    texts=("",) * 4,
    categories=(("x", "y"), ("y",), (), ("z",)),
    domains=("",) * 4,
)
DAY = 86_400
RELEASES = Releases(np.array([DAY, 9 * DAY, 10 * DAY, np.iinfo(np.int64).max]), 10 * DAY)


@pytest.fixture
def place(tmp_path):
    CATALOGUE.save(tmp_path / "catalogue.parquet")
    return tmp_path


def permitted(place, **rules):
    config = RulesConfig(**rules)
    found = build_rules(config, place / "catalogue.parquet", COUNTS, RELEASES, "rules")
    return [CATALOGUE.item_ids[code] for code in np.nonzero(found.permitted)[0]]


def test_each_rule_takes_out_what_it_says(place):
    assert permitted(place) == ["a", "b", "c", "d"]
    assert permitted(place, allow=["c", "a"]) == ["a", "c"]
    assert permitted(place, allow=["c", "a"], deny=["a"]) == ["c"]
    assert permitted(place, deny_categories=["y"]) == ["c", "d"]
    # d is kept: nobody knows when it came out.
    assert permitted(place, max_age_days=1) == ["b", "c", "d"]


def test_what_is_missing_is_filled_up_by_popular_items_that_are_new():
    rules = Rules.of(np.array([True, True, True, False]), COUNTS)
    assert rules.popular.tolist() == [1, 2, 0]
    items = np.array([[0, 3, -1], [0, 1, 2]], dtype=np.int32)
    found = rules.keep(items, Histories.of([[1], []]), k=2)
    assert found.dtype == np.int32
    assert [sorted({*row} - {-1}) for row in found.tolist()] == [[0, 2], [0, 1, 2]]
    enough = rules.keep(items, Histories.of([[1], []]), k=1)
    assert enough.tolist() == [[0, -1, -1], [0, 1, 2]]


@pytest.mark.parametrize(
    ("rules", "message"),
    [
        ('{"deny": ["b", "e", "f"]}', r"rules.json: deny names item 'e' and 1 more, which the cat"),
        ('{"allow": ["e"]}', r"allow names item 'e', which the catalogue does not have"),
        ('{"deny_categories": ["w"]}', r"deny_categories names category 'w'"),
        ('{"allow": ["a"], "deny": ["a"]}', r"leaves none of 4 items to recommend"),
        ('{"allow": []}', r"rules.json is wrong: allow: "),
        ('{"alow": ["a"]}', r"rules.json is wrong: alow: "),
        ('{"deny": "a"', r"rules.json is wrong: the whole: "),
    ],
)
def test_mistakes_are_named(place, rules, message):
    (place / RULES).write_text(rules)
    with pytest.raises(ConfigError, match=message):
        load_rules(place, COUNTS, RELEASES)


def test_age_needs_a_time(place):
    assert load_rules(place, COUNTS, None) is None
    (place / RULES).write_text('{"max_age_days": 3}')
    assert load_rules(place, COUNTS, RELEASES).permitted.tolist() == [False, True, True, True]
    with pytest.raises(ConfigError, match=r"max_age_days = 3 needs to know when items came out"):
        load_rules(place, COUNTS, None)
