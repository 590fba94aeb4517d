from fusionrec.data.catalogue import Catalogue
from fusionrec.data.histories import Histories
from fusionrec.data.text import history_texts, item_text, item_texts

CATALOGUE = Catalogue(
    item_ids=("a", "b", "c", "d"),
    titles=("Alien (1979)", "Up!", "", ""),
    texts=("In space\nno one  hears.", "", "Only a description", ""),
    categories=(("Horror", "Sci-Fi"), (), ("Drama",), ()),
    domains=("", "", "", ""),
)


def test_an_item_is_its_title_categories_and_description():
    assert item_texts(CATALOGUE) == [
        "Alien (1979). Horror, Sci-Fi. In space no one hears.",
        "Up!",
        "Drama. Only a description.",
        "",
    ]
    assert item_text(CATALOGUE, 1) == "Up!"


def test_a_history_is_its_newest_items_newest_first():
    histories = Histories.of([[2, 0, 1], [1, 0], []])
    assert history_texts(CATALOGUE, histories, history_items=2) == [
        "Up!; Alien (1979) (Horror, Sci-Fi).",
        "Alien (1979) (Horror, Sci-Fi); Up!",
        "",
    ]


def test_items_without_a_title_stand_by_their_categories_or_not_at_all():
    assert history_texts(CATALOGUE, Histories.of([[2], [3], [3, 2]])) == ["Drama.", "", "Drama."]


def test_a_wish_goes_in_front():
    histories = Histories.of([[1], [], [1]], texts=["something quiet", "a film?", None])
    assert history_texts(CATALOGUE, histories) == ["something quiet. Up!", "a film?", "Up!"]
