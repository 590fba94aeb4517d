import pytest

from fusionrec.errors import DataError

INTER = (
    "user_id:token\titem_id:token\trating:float\ttimestamp:float\n"
    "a\tx\t4.5\t978300760\nb\ty\t1\t978300761.0\n"
)
ITEM = (
    "item_id:token\tmovie_title:token_seq\trelease_year:token\tclass:token_seq\tprice:float\n"
    'x\tThe "Best" of\t1999\tAction Drama\t3.5\ny\tOther\t2001\t\t\n'
)


def test_atomic_files(raw, ingested):
    data = ingested(raw({"ml.inter": INTER, "ml.item": ITEM, "ml.user": "user_id:token\na\n"}))
    assert data.info.format == "recbole"
    table = data.interactions()
    assert table.column("timestamp").to_pylist() == [978300760, 978300761]
    assert table.column("value").to_pylist() == [4.5, 1.0]
    assert set(table.column("event").to_pylist()) == {"rating"}
    assert set(table.column("domain").to_pylist()) == {"ml"}
    assert data.catalogue.titles == ('The "Best" of', "Other")
    assert data.catalogue.categories == (("Action", "Drama"), ())
    assert data.items.column("price").to_pylist() == [3.5, None]
    assert data.items.column("release_year").to_pylist() == ["1999", "2001"]


def test_without_times_and_items(raw, ingested):
    data = ingested(raw({"d.inter": "user_id:token\titem_id:token\na\tx\nb\ty\na\ty\n"}))
    assert not data.info.has_timestamps
    assert data.interactions().column("timestamp").to_pylist() == [0, 0, 1]
    assert set(data.interactions().column("event").to_pylist()) == {"interaction"}
    assert data.catalogue.item_ids == ("x", "y")


def test_mapped_column(raw, ingested):
    folder = raw({"d.inter": "session_id:token\titem_id:token\na\tx\n"})
    assert ingested(folder, columns={"user_id": "session_id"}).events.user_ids == ("a",)
    with pytest.raises(DataError, match=r"d\.inter has no column 'user_id'.* session_id, item_id"):
        ingested(folder)


def test_header_without_type(raw, ingested):
    with pytest.raises(DataError, match=r"d\.inter: column 'item_id' has no type.*item_id:token"):
        ingested(raw({"d.inter": "user_id:token\titem_id\na\tx\n"}))


def test_two_files(raw, ingested):
    with pytest.raises(DataError, match=r"a\.inter, b\.inter"):
        ingested(raw({"a.inter": INTER, "b.inter": INTER}))
