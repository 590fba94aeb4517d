import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from fusionrec.serving.schemas import (
    MAX_HISTORY,
    ErrorResponse,
    RecommendRequest,
    describe,
    parse_request,
)


def fields(body: bytes) -> list[str]:
    with pytest.raises(ValidationError) as caught:
        parse_request(body)
    return [error.field for error in describe(caught.value).detail]


@pytest.mark.parametrize(
    "body",
    [
        {},
        {"user_id": "7"},
        {"user_id": None, "history": None, "text": None, "filters": None},
        {"history": []},
        {"history": ["a", "b"], "text": "something calm", "k": 100},
        {"history": [{"item_id": "a", "timestamp": 0}]},
        {"text": "\x00 \U0001f600", "explain": True},
        {"filters": {"domains": ["films"], "categories": ["Drama"], "exclude_items": ["a"]}},
    ],
)
def test_what_is_understood(body: dict):
    request = parse_request(json.dumps(body).encode())
    assert parse_request(request.model_dump_json().encode()) == request


@pytest.mark.parametrize(
    ("body", "field"),
    [
        ({"k": 0}, "k"),
        ({"k": 101}, "k"),
        ({"k": True}, "k"),
        ({"k": 5.5}, "k"),
        ({"k": "5"}, "k"),
        ({"k": 10**300}, "k"),
        ({"k": float("nan")}, "k"),
        ({"k": float("inf")}, "k"),
        ({"explain": 1}, "explain"),
        ({"user_id": ""}, "user_id"),
        ({"user_id": 7}, "user_id"),
        ({"user_id": "u" * 257}, "user_id"),
        ({"user_id": "u", "history": []}, "history"),
        ({"user_id": "u", "text": "t"}, "text"),
        ({"text": "t" * 4001}, "text"),
        ({"history": "abc"}, "history"),
        ({"history": ["a"] * (MAX_HISTORY + 1)}, "history"),
        ({"history": ["a", 3]}, "history.1"),
        ({"history": ["a", None]}, "history.1"),
        ({"history": [["a"]]}, "history.0"),
        ({"history": ["a", {"item_id": "a", "timestamp": 1}]}, "history"),
        ({"history": [{"item_id": "a"}]}, "history.0.timestamp"),
        ({"history": [{"item_id": "a", "timestamp": -1}]}, "history.0.timestamp"),
        ({"history": [{"item_id": "a", "timestamp": 10**15}]}, "history.0.timestamp"),
        ({"history": [{"item_id": "a", "timestamp": 1, "x": 1}]}, "history.0.x"),
        ({"filters": {"domain": ["films"]}}, "filters.domain"),
        ({"filters": {"domains": []}}, "filters.domains"),
        ({"filters": {"exclude_items": [1]}}, "filters.exclude_items.0"),
        ({"users": "u"}, "users"),
        ([], "body"),
        (None, "body"),
        ("text", "body"),
    ],
)
def test_what_is_wrong_is_named(body: object, field: str):
    assert fields(json.dumps(body).encode()) == [field]


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"{",
        b"\xff\xfe",
        b'{"text":"\xff"}',
        b'{"text":"\\ud800"}',
        b'{"\\udfff":1}',
        b'{"k":' + b"9" * 100_000 + b"}",
        b"[" * 100_000,
        b'{"filters":' * 100_000,
        b"\xef\xbb\xbf{}",
        b"{}{}",
    ],
)
def test_what_is_not_json_is_named_body(body: bytes):
    assert fields(body) == ["body"]


def test_many_errors_are_not_all_told():
    body = json.dumps({"history": [1] * MAX_HISTORY}).encode()
    assert len(fields(body)) == 20


def test_an_unknown_field_of_any_length_is_told_in_short():
    assert len(fields(json.dumps({"x" * 100_000: 1}).encode())[0]) < 300


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
    max_leaves=20,
)
FIELDS = st.sampled_from([*RecommendRequest.model_fields, "item_id", "x"])


@settings(deadline=None)
@given(st.dictionaries(FIELDS, JSON) | JSON)
def test_any_json_is_understood_or_described(document: object):
    try:
        parse_request(json.dumps(document).encode())
    except ValidationError as error:
        answer = describe(error).model_dump_json()
        assert ErrorResponse.model_validate_json(answer).detail


@settings(deadline=None)
@given(st.binary(max_size=200))
def test_any_bytes_are_understood_or_described(body: bytes):
    try:
        parse_request(body)
    except ValidationError as error:
        answer = describe(error).model_dump_json()
        assert ErrorResponse.model_validate_json(answer).detail
