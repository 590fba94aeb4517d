import gzip
import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from fusionrec.errors import DataError

EVENTS = [
    {"visitor": "1", "sku": "a", "at": 1_600_000_000, "kind": "view", "stars": None},
    {"visitor": "2", "sku": "b", "at": 1_600_000_001, "kind": "rate", "stars": 4.5},
]
COLUMNS = {"user_id": "visitor", "item_id": "sku", "timestamp": "at", "event": "kind"}


def as_csv(rows, delimiter=","):
    lines = [delimiter.join(rows[0])]
    lines += [delimiter.join("" if v is None else str(v) for v in row.values()) for row in rows]
    return "\n".join(lines) + "\n"


def as_jsonl(rows):
    return "".join(json.dumps(row) + "\n" for row in rows)


def as_parquet(rows):
    sink = pa.BufferOutputStream()
    pq.write_table(pa.Table.from_pylist(rows), sink)
    return sink.getvalue().to_pybytes()


FORMATS = {
    "csv": lambda rows: as_csv(rows).encode(),
    "csv.gz": lambda rows: gzip.compress(as_csv(rows).encode()),
    "tsv": lambda rows: as_csv(rows, "\t").encode(),
    "jsonl": lambda rows: as_jsonl(rows).encode(),
    "jsonl.gz": lambda rows: gzip.compress(as_jsonl(rows).encode()),
    "parquet": as_parquet,
}


@pytest.mark.parametrize("suffix", FORMATS)
def test_every_suffix_gives_the_same_data(raw, ingested, suffix):
    folder = raw({f"log.{suffix}": FORMATS[suffix](EVENTS)})
    data = ingested(folder, columns=COLUMNS | {"value": "stars"})
    assert data.info.format == "table"
    assert data.interactions().select(["user_id", "item_id", "timestamp", "event", "value"]) == (
        pa.table(
            {
                "user_id": ["1", "2"],
                "item_id": ["a", "b"],
                "timestamp": [1_600_000_000, 1_600_000_001],
                "event": ["view", "rate"],
                "value": pa.array([None, 4.5], pa.float32()),
            },
            schema=data.interactions().schema.remove(6).remove(5),
        )
    )
    assert data.catalogue.item_ids == ("a", "b")


@pytest.mark.parametrize("suffix", FORMATS)
def test_items_keep_their_columns(raw, ingested, suffix):
    items = [
        {"sku": "b", "name": "Über", "title": "raw", "tags": "x| y|", "stock": 3},
        {"sku": "c", "name": "C", "title": "raw", "tags": "", "stock": 4},
    ]
    folder = raw({f"events.{suffix}": FORMATS[suffix](EVENTS), "items.csv": as_csv(items)})
    (folder / "items.csv").unlink()
    (folder / f"items.{suffix}").write_bytes(FORMATS[suffix](items))
    data = ingested(
        folder,
        columns=COLUMNS,
        item_columns={"item_id": "sku", "title": "name", "categories": "tags"},
    )
    assert data.catalogue.titles == ("Über", "C")
    assert data.catalogue.categories == (("x", "y"), ())
    assert data.items.column("raw_title").to_pylist() == ["raw", "raw"]
    assert [str(s) for s in data.items.column("stock").to_pylist()] == ["3", "4"]
    assert data.info.num_interactions == 1  # item a is unknown
    assert data.info.num_quarantined == 1


def test_jsonl_items_of_mixed_types(raw, ingested):
    items = [
        {"item_id": 1, "categories": ["x"], "size": 3, "more": {"a": 1}},
        {"item_id": "2", "size": "big", "weight": 1, "flag": True, "huge": 2**70},
        {"item_id": "3", "weight": 1.5},
    ]
    events = [{"user_id": 1, "item_id": 1}, {"user_id": 1, "item_id": "2"}]
    data = ingested(raw({"events.jsonl": as_jsonl(events), "items.jsonl": as_jsonl(items)}))
    assert data.catalogue.item_ids == ("1", "2", "3")
    assert data.catalogue.categories == (("x",), (), ())
    assert data.items.column("size").to_pylist() == ["3", "big", None]
    assert data.items.column("weight").to_pylist() == [None, 1.0, 1.5]
    assert data.items.column("more").to_pylist() == ['{"a": 1}', None, None]
    assert data.items.column("huge").to_pylist() == [None, str(2**70), None]


def test_parquet_types(raw, ingested):
    table = pa.table(
        {
            "user_id": pa.array([1, 2]),
            "item_id": pa.array(["a", "b"]).dictionary_encode(),
            "timestamp": pa.array([1_600_000_000_500, 1_600_000_001_000], pa.timestamp("ms")),
            "rating": pa.array([1.5, 2], pa.float64()),
            "text": pa.array(["ü", None], pa.large_string()),
        }
    )
    folder = raw({})
    pq.write_table(table, folder / "x.parquet")
    data = ingested(folder)
    assert data.interactions().column("timestamp").to_pylist() == [1_600_000_000, 1_600_000_001]
    assert data.interactions().column("text").to_pylist() == ["ü", None]
    assert data.events.user_ids == ("1", "2")


@pytest.mark.parametrize(
    ("unit", "text"),
    [
        ("s", "1600000000"),
        ("ms", "1600000000000"),
        ("us", "1600000000000000"),
        ("ns", "1600000000000000000"),
        ("s", "2020-09-13 12:26:40"),
        ("s", "2020-09-13T12:26:40.000Z"),
        ("s", "2020-09-13T14:26:40+02:00"),
    ],
)
def test_times(raw, ingested, unit, text):
    content = f"user_id,item_id,timestamp\na,x,{text}\n"
    data = ingested(raw({"events.csv": content}), timestamp_unit=unit)
    assert data.interactions().column("timestamp").to_pylist() == [1_600_000_000]


@pytest.mark.parametrize("suffix", FORMATS)
def test_wrong_column(raw, ingested, suffix):
    folder = raw({f"log.{suffix}": FORMATS[suffix](EVENTS)})
    with pytest.raises(DataError) as error:
        ingested(folder, columns={"user_id": "visiter", "item_id": "sku"})
    assert f"log.{suffix} has no column 'visiter' for user_id" in str(error.value)
    assert "visitor, sku, at, kind, stars" in str(error.value)
    assert "--columns.user-id" in str(error.value)


def test_wrong_optional_column(raw, ingested):
    folder = raw({"log.csv": as_csv(EVENTS)})
    with pytest.raises(DataError, match=r"no column 'when' for timestamp.*--columns.timestamp"):
        ingested(folder, columns=COLUMNS | {"timestamp": "when"})


def test_which_file(raw, ingested):
    folder = raw({"a.csv": as_csv(EVENTS), "b.csv": as_csv(EVENTS)})
    with pytest.raises(DataError, match=r"a\.csv, b\.csv.*--files\.interactions"):
        ingested(folder, columns=COLUMNS)
    ingested(folder, columns=COLUMNS, files={"interactions": "b.csv"})
    with pytest.raises(DataError, match=r"no file 'c\.csv'.*--files\.items"):
        ingested(folder, files={"interactions": "b.csv", "items": "c.csv"})


@pytest.mark.parametrize("suffix", ["parquet", "csv.gz", "jsonl.gz", "csv", "jsonl"])
def test_not_what_the_suffix_says(raw, ingested, suffix):
    folder = raw(
        {f"events.{suffix}": b"\x1f\x8bnothing of the kind" if "gz" in suffix else b"\xff"}
    )
    with pytest.raises(DataError, match=rf"events\.{suffix}"):
        ingested(folder)


@pytest.mark.parametrize("suffix", FORMATS)
def test_empty_file(raw, ingested, suffix):
    with pytest.raises(DataError, match=rf"events\.{suffix} is empty"):
        ingested(raw({f"events.{suffix}": b""}))


def test_truncated_gzip(raw, ingested):
    content = gzip.compress(as_csv(EVENTS).encode() * 50)[:-20]
    with pytest.raises(DataError, match=r"events\.csv\.gz cannot be read to its end"):
        ingested(raw({"events.csv.gz": content}), columns=COLUMNS)


def test_header_without_rows(raw, ingested):
    for content in ("user_id,item_id\n", "user_id,item_id"):
        with pytest.raises(DataError, match="no rows"):
            ingested(raw({"events.csv": content}))


def test_header_with_a_name_twice(raw, ingested):
    with pytest.raises(DataError, match=r"events\.csv: column 'item_id' is twice"):
        ingested(raw({"events.csv": "item_id,item_id\na,b\n"}))


def test_delimiter(raw, ingested):
    folder = raw({"events.csv": "user_id;item_id\na;x\n"})
    assert ingested(folder, delimiter=";").info.num_interactions == 1
    with pytest.raises(DataError, match="delimiter"):
        ingested(folder, delimiter=";;")
