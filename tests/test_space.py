import pytest
from pydantic import ValidationError

from fusionrec.sources.bm25 import BM25Config
from fusionrec.sources.ease import EASE
from fusionrec.sources.item_item import ItemItemConfig
from fusionrec.sources.item_knn import ItemKNN
from fusionrec.sources.sequential.config import SASRecConfig
from fusionrec.space import Choice, Range, replaced, searched, setting
from tuning.search import distributions


def test_ranges_are_found_in_a_config_and_in_those_within():
    space = searched(ItemItemConfig(learner=EASE()))
    assert space == {
        "learner.regularisation": Range(1, 5000, log=True),
        "learner.support": Range(10, 200, log=True, whole=True),
        "recency": Range(0.2, 1),
        "neighbours": Range(50, 1000, log=True, whole=True),
    }


def test_whole_numbers_are_known_by_their_type():
    space = searched(BM25Config())
    assert space["history_items"].whole
    assert not space["k1"].whole


def test_choices_are_the_names_of_the_type():
    space = searched(ItemItemConfig(learner=ItemKNN()))
    assert space["learner.weighting"] == Choice(("length", "idf"))
    assert {"cosine", "jaccard"} < set(space["learner.similarity"].names)
    assert "learner.kind" not in space


def test_what_matters_for_sasrec_is_searched():
    space = searched(SASRecConfig())
    assert space["block"] == Choice(("sasrec", "ligr"))
    assert space["target"] == Choice(("shifted", "last"))
    assert space["text"] == Choice((False, True))
    assert {"num_negatives", "max_length", "averaging", "dropout"} < set(space)
    asked = replaced(SASRecConfig(), {"text": False, "block": "sasrec", "max_length": 20})
    assert (asked.text, asked.block, asked.max_length) == (False, "sasrec", 20)
    assert distributions(space)["text"].choices == (False, True)


def test_a_range_holds_the_present_value():
    assert searched(BM25Config(k1=9.0))["k1"].high == 9
    assert searched(BM25Config(history_items=60))["history_items"].high == 60


def test_settings_are_read_and_replaced_by_dotted_name():
    config = ItemItemConfig(learner=EASE(), recency=0.5)
    found = replaced(config, {"learner.regularisation": 7.0})
    assert found == ItemItemConfig(learner=EASE(regularisation=7.0), recency=0.5)
    assert setting(found, "learner.regularisation") == 7
    assert setting(config, "learner.regularisation") == 50


def test_a_replaced_setting_is_validated():
    with pytest.raises(ValidationError, match="greater than 0"):
        replaced(ItemItemConfig(learner=EASE()), {"learner.regularisation": -1.0})
