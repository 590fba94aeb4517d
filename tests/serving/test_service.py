from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from fusionrec.data.catalogue import Catalogue
from fusionrec.fusion.model import Fused, Fusion, Segment
from fusionrec.serving.schemas import RecommendRequest
from fusionrec.serving.service import KnownUsers, Service, Trace

NUM_ITEMS = 6
TERMS = ("popularity", "ease", "reranker")


@pytest.fixture
def service(tmp_path: Path) -> Service:
    """Items i0 … i5: even ones are films, odd ones books; category c of its number modulo 3."""
    numbers = range(NUM_ITEMS)
    Catalogue(
        item_ids=tuple(f"i{n}" for n in numbers),
        titles=tuple(f"Title {n}" for n in numbers),
        texts=("",) * NUM_ITEMS,
        categories=tuple((f"c{n % 3}", "all") for n in numbers),
        domains=tuple(("films", "books")[n % 2] for n in numbers),
    ).save(tmp_path / "catalogue.parquet")
    users = {
        "user_id": ["ann", "bob", "new"],
        "item_codes": pa.array([[3, 1], [2], []], pa.list_(pa.int32())),
        "timestamps": pa.array([[10, 20], [30], []], pa.list_(pa.int64())),
    }
    pq.write_table(pa.table(users), tmp_path / "users.parquet")
    weights = dict.fromkeys(TERMS[:2], 1.0)
    segments = (Segment(max_events=0, weights=weights), Segment(weights=weights, reranker=1.0))
    Fusion(sources=TERMS[:2], scales=weights, segments=segments).save(tmp_path / "fusion.json")
    return Service.load(tmp_path)


def ask(service: Service, *requests: dict):
    return service.ask([RecommendRequest.model_validate(request) for request in requests])


def fused(*rows: list[int]) -> Fused:
    """Ranked candidates with the terms (.5, .25, .125) / rank."""
    items = np.full((len(rows), max(map(len, rows))), -1, dtype=np.int32)
    terms = np.zeros((len(rows), len(TERMS), items.shape[1]), dtype=np.float32)
    for b, row in enumerate(rows):
        items[b, : len(row)] = row
        terms[b, :, : len(row)] = np.outer([0.5, 0.25, 0.125], 1 / np.arange(1, len(row) + 1))
    return Fused(items=items, scores=terms.sum(axis=1), terms=terms, term_names=TERMS)


def ids(service: Service, request: dict, row: list[int]) -> list[str]:
    (answer,) = service.answer(ask(service, request), fused(row), Trace())
    return [item.item_id for item in answer.items]


def test_a_batch_of_every_kind(service: Service):
    questions = ask(
        service,
        {"user_id": "ann"},
        {"user_id": "zoe"},
        {"user_id": "new"},
        {"history": ["i4", "unknown", "i0"]},
        {"history": ["unknown"]},
        {"history": ["unknown"], "text": "calm"},
        {"text": "  calm "},
        {"text": " \n"},
        {"history": []},
        {},
    )
    histories = questions.histories
    rows = [histories.row(b).tolist() for b in range(len(histories))]
    assert rows == [[3, 1], [], [], [4, 0], [], [], [], [], [], []]
    assert questions.fallbacks == (
        None,
        "unknown_user",
        "unknown_user",
        None,
        "unknown_items",
        None,
        None,
        "empty_request",
        "empty_request",
        "empty_request",
    )
    assert histories.texts == (None,) * 5 + ("calm", "  calm ") + (None,) * 3
    assert histories.timestamps[:2].tolist() == [10, 20]


def test_events_are_put_in_order_of_time(service: Service):
    events = [("i5", 30), ("i2", 10), ("x", 20), ("i1", 30)]
    history = [{"item_id": item, "timestamp": time} for item, time in events]
    histories = ask(service, {"history": history}).histories
    assert histories.row(0).tolist() == [2, 5, 1]
    assert histories.timestamps.tolist() == [10, 30, 30]


def test_events_without_times_happened_just_now(service: Service):
    histories = ask(service, {"history": ["i5", "i2"]}).histories
    assert histories.row(0).tolist() == [5, 2]
    assert histories.timestamps.tolist() == [30, 30]


def test_no_texts_are_carried_where_there_are_none(service: Service):
    assert ask(service, {"user_id": "ann"}, {}).histories.texts is None


def test_k_and_padding(service: Service):
    assert ids(service, {"k": 2}, [5, 3, 1]) == ["i5", "i3"]
    assert ids(service, {"k": 9}, [5, 3, 1]) == ["i5", "i3", "i1"]
    assert ids(service, {"k": 9}, []) == []


@pytest.mark.parametrize(
    ("filters", "expected"),
    [
        ({}, ["i5", "i4", "i3", "i2"]),
        ({"domains": ["films"]}, ["i4", "i2"]),
        ({"domains": ["films", "books"]}, ["i5", "i4", "i3", "i2"]),
        ({"domains": ["music"]}, []),
        ({"categories": ["c2"]}, ["i5", "i2"]),
        ({"categories": ["c2", "c0"]}, ["i5", "i3", "i2"]),
        ({"exclude_items": ["i4", "nothing"]}, ["i5", "i3", "i2"]),
        ({"domains": ["films"], "categories": ["c2"]}, ["i2"]),
    ],
)
def test_filters_keep_the_order(service: Service, filters: dict, expected: list[str]):
    assert ids(service, {"filters": filters}, [5, 4, 3, 2]) == expected
    assert ids(service, {"filters": filters, "k": 1}, [5, 4, 3, 2]) == expected[:1]


def test_explanations_sum_to_the_score(service: Service):
    questions = ask(service, {"history": ["i1"], "explain": True}, {})
    explained, plain = service.answer(questions, fused([2, 0], [2, 0]), Trace())
    for item in explained.items:
        assert item.terms is not None
        assert tuple(item.terms) == TERMS
        assert sum(item.terms.values()) == pytest.approx(item.score)
    assert explained.items[0].title == "Title 2"
    assert plain.items[0].terms is None
    assert "terms" not in plain.model_dump_json(exclude_unset=True)


def test_an_explanation_does_not_depend_on_the_rest_of_the_batch(service: Service):
    """An empty history is not reranked; next to one that is, its term is 0."""
    questions = ask(service, {"history": ["i1"], "explain": True}, {"explain": True})
    lists = fused([2], [2])
    lists.terms[1, 2] = 0
    reranked, other = service.answer(questions, lists, Trace())
    assert tuple(reranked.items[0].terms) == TERMS
    assert tuple(other.items[0].terms) == TERMS[:2]


def test_without_a_searched_fusion_nothing_is_reranked(service: Service, tmp_path: Path):
    (tmp_path / "fusion.json").unlink()
    plain = Service.load(tmp_path)
    assert not plain.rerank_weights(ask(plain, {"user_id": "ann"}).histories).any()


def test_answers_do_not_share_what_they_say_of_the_batch(service: Service):
    trace = Trace({"retrieve": 1.0}, ["rerank"])
    first, second = service.answer(ask(service, {}, {}), fused([1], [2]), trace)
    first.timings_ms["queue"] = 2.0
    assert second.timings_ms == {"retrieve": 1.0}
    assert second.degraded == ["rerank"]
    assert first.bundle == service.bundle


def test_users(service: Service, tmp_path: Path):
    users = KnownUsers.load(tmp_path / "users.parquet")
    assert users.find("zoe") is None
    items, times = users.find("bob")
    assert (items.tolist(), times.tolist()) == ([2], [30])
    assert items.dtype == np.int32
