import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fusionrec.data.catalogue import ITEM_SCHEMA
from fusionrec.data.dataset import INTERACTION_SCHEMA, Dataset
from fusionrec.data.ingest import DatasetWriter, IngestConfig, ingest
from fusionrec.errors import DataError

ROOT = Path(__file__).resolve().parents[2]
HEADER = "user_id,item_id,timestamp,value\n"
GOOD = "".join(f"u{i % 7},i{i % 5},{1_500_000_000 + i},{i % 5}\n" for i in range(200))


def interactions(count: int) -> pa.Table:
    rng = np.random.default_rng(0)
    texts = [None if i % 3 else "é" * int(n) for i, n in enumerate(rng.integers(0, 50, count))]
    return pa.table(
        {
            "user_id": [f"u{i}" for i in rng.integers(0, 40, count)],
            "item_id": [f"i{i}" for i in rng.integers(0, 9, count)],
            "timestamp": np.arange(count),
            "event": ["view"] * count,
            "value": pa.array(rng.random(count), pa.float32(), mask=rng.random(count) < 0.3),
            "text": pa.array(texts, pa.string()),
            "domain": ["d"] * count,
        },
        schema=INTERACTION_SCHEMA,
    )


def items(count: int = 10) -> pa.Table:
    return pa.table(
        {
            "item_id": [f"i{i}" for i in range(count)],
            "title": [None, *(f"T{i}" for i in range(1, count))],
            "categories": [None, [], *(["a", None, "b"] for _ in range(2, count))],
            "year": list(range(count)),
            "flags": [{"x": i} for i in range(count)],
        }
    )


def write(directory, table, step, item_table=None, **settings):
    facts = {"name": "n", "format": "synthetic"} | settings
    with DatasetWriter(directory, **facts) as writer:
        for start in range(0, len(table), step):
            writer.write_interactions(table.slice(start, step))
        writer.write_items(items() if item_table is None else item_table)
        return writer.finish()


class TestDatasetWriter:
    def test_reads_back(self, tmp_path):
        table = interactions(500)
        info = write(tmp_path / "d", table, 77)
        data = Dataset.open(tmp_path / "d")
        assert data.info == info
        assert data.interactions().equals(table)
        assert data.items.schema.names == [*ITEM_SCHEMA.names, "year", "flags"]
        assert data.items.column("flags").to_pylist() == items().column("flags").to_pylist()
        assert data.catalogue.titles[:2] == ("", "T1")
        assert (info.num_users, info.num_items, info.num_interactions) == (40, 10, 500)
        assert sorted(p.name for p in tmp_path.iterdir()) == ["d"]

    def test_rows_fill_groups_and_parts(self, tmp_path, monkeypatch):
        monkeypatch.setattr("fusionrec.data.ingest.ROWS_PER_GROUP", 10)
        monkeypatch.setattr("fusionrec.data.ingest.ROWS_PER_PART", 40)
        table = interactions(95)
        write(tmp_path / "d", table, 7)
        parts = sorted((tmp_path / "d" / "interactions").iterdir())
        assert [pq.read_metadata(part).num_rows for part in parts] == [40, 40, 15]
        assert Dataset.open(tmp_path / "d").interactions().equals(table)

    @pytest.mark.parametrize("step", [1, 13, 499])
    def test_fingerprint_of_any_batches(self, tmp_path, step):
        table = interactions(500)
        whole = write(tmp_path / "a", table, 500)
        assert write(tmp_path / "b", table, step).fingerprint == whole.fingerprint

    @pytest.mark.parametrize("name", INTERACTION_SCHEMA.names)
    def test_fingerprint_sees_every_column(self, tmp_path, name):
        table = interactions(50)
        index = table.column_names.index(name)
        values = table.column(name).to_pylist()
        values[7] = {"timestamp": 5, "value": 0.123, "item_id": "i9"}.get(name, "other")
        changed = table.set_column(
            index, table.schema.field(name), pa.array(values, table.schema.field(name).type)
        )
        a, b = write(tmp_path / "a", table, 9), write(tmp_path / "b", changed, 9)
        assert a.fingerprint != b.fingerprint

    @pytest.mark.parametrize("name", ["title", "categories", "year", "flags"])
    def test_fingerprint_sees_items(self, tmp_path, name):
        table = items()
        index = table.column_names.index(name)
        values = table.column(name).to_pylist()
        values[3] = values[2]
        values[2] = None
        changed = table.set_column(index, name, pa.array(values, table.schema.field(name).type))
        a = write(tmp_path / "a", interactions(5), 5)
        b = write(tmp_path / "b", interactions(5), 5, changed)
        assert a.fingerprint != b.fingerprint

    def test_null_is_not_empty(self, tmp_path):
        table = interactions(4)
        index = table.column_names.index("text")
        prints = set()
        for texts in (["", "", "ab", "c"], [None, "", "ab", "c"], ["", "", "a", "bc"]):
            changed = table.set_column(index, "text", pa.array(texts, pa.string()))
            prints.add(write(tmp_path / "a", changed, 4).fingerprint)
        assert len(prints) == 3

    def test_error_leaves_nothing(self, tmp_path):
        def fail():
            with DatasetWriter(tmp_path / "d", name="n", format="f") as writer:
                writer.write_interactions(interactions(5))
                raise RuntimeError("stop")

        with pytest.raises(RuntimeError, match="stop"):
            fail()
        assert not list(tmp_path.iterdir())

    def test_replaces_only_when_finished(self, tmp_path):
        first = write(tmp_path / "d", interactions(50), 50)
        with DatasetWriter(tmp_path / "d", name="n", format="f") as writer:
            writer.write_interactions(interactions(5))
            writer.write_items(items())
        assert Dataset.open(tmp_path / "d").info == first
        write(tmp_path / "d", interactions(5), 5)
        assert Dataset.open(tmp_path / "d").info.num_interactions == 5
        assert sorted(p.name for p in tmp_path.iterdir()) == ["d"]

    def test_does_not_replace_other_things(self, tmp_path):
        (tmp_path / "d").mkdir()
        (tmp_path / "d" / "thesis.txt").write_text("x")
        with pytest.raises(DataError, match="not a data set"):
            write(tmp_path / "d", interactions(5), 5)
        assert (tmp_path / "d" / "thesis.txt").read_text() == "x"

    def test_item_twice(self, tmp_path):
        twice = pa.concat_tables([items(), items().slice(3, 1)])
        with pytest.raises(DataError, match="'i3' is twice"):
            write(tmp_path / "d", interactions(5), 5, twice)

    def test_no_interactions(self, tmp_path):
        with pytest.raises(DataError, match="no interactions"):
            write(tmp_path / "d", interactions(0), 1)

    def test_full_disk(self, tmp_path, monkeypatch):
        def full(*_args, **_kwargs):
            raise OSError(28, "No space left on device")

        monkeypatch.setattr(pq, "write_table", full)
        with pytest.raises(DataError, match="No space left on device"):
            write(tmp_path / "d", interactions(5), 5)
        assert not list(tmp_path.iterdir())

    def test_unwritable_place(self, tmp_path):
        (tmp_path / "file").write_text("x")
        with pytest.raises(DataError, match="cannot be written"):
            write(tmp_path / "file" / "d", interactions(5), 5)


def refused(data):
    rows = pq.read_table(data.directory / "quarantine.parquet").to_pylist()
    return [(row["place"], row["reason"]) for row in rows]


def test_quarantine_has_reason_and_place(raw, ingested):
    lines = [
        "u,i0,1500000000,1",
        "u,i0,1500000000,1",
        "u,i0",
        "u,i0,1500000001,1,1",
        ",i0,1500000002,1",
        "u, ,1500000002,1",
        "u,i0,,1",
        "u,i0,soon,1",
        "u,i0,inf,1",
        "u,i0,1500000000000,1",
        "u,i0,-5,1",
        "u,i0,1500000003,",
        "u,i0,1500000003,five",
        "u,i0,1500000003,NaN",
        "u,i0,1500000003,-inf",
        "u,i0,1500000003,1e300",
        "u,other,1500000003,1",
        "u,i\xff,1500000003,1",
        "",
        "u,i0,2020-13-45,1",
    ]
    content = (HEADER + "\n".join(lines) + "\n").encode("latin-1")
    data = ingested(raw({"events.csv": content, "items.csv": "item_id\ni0\ni1\ni0\n\xff\n"}))
    assert refused(data) == [
        ("items.csv:4", "item is there already"),
        ("events.csv:3", "exact duplicate"),
        ("events.csv:4", "wrong number of fields"),
        ("events.csv:5", "wrong number of fields"),
        ("events.csv:6", "user_id missing"),
        ("events.csv:7", "item_id missing"),
        ("events.csv:8", "timestamp missing"),
        ("events.csv:9", "timestamp not a number"),
        ("events.csv:10", "timestamp not finite"),
        ("events.csv:11", "timestamp out of range"),
        ("events.csv:12", "timestamp out of range"),
        ("events.csv:13", "value missing"),
        ("events.csv:14", "value not a number"),
        ("events.csv:15", "value not finite"),
        ("events.csv:16", "value not finite"),
        ("events.csv:17", "value not finite"),
        ("events.csv:18", "unknown item"),
        ("events.csv:19", "not UTF-8"),
        ("events.csv:21", "timestamp not a number"),
    ]
    assert data.info.num_interactions == 1
    assert data.info.num_quarantined == 19
    assert data.info.num_items == 3


def test_too_many_broken_rows(raw, ingested, tmp_path):
    folder = raw({"events.csv": HEADER + GOOD + "u,i\nu,i\n,i,1500000000,1\n"})
    with pytest.raises(DataError) as error:
        ingested(folder, max_bad_fraction=0.01)
    assert str(error.value) == (
        "3 of 203 rows are broken, more than --max-bad-fraction 0.01 allows: "
        "2 wrong number of fields (first at events.csv:202); "
        "1 user_id missing (first at events.csv:204)"
    )
    assert sorted(p.name for p in tmp_path.iterdir()) == ["raw"]
    assert ingested(folder, max_bad_fraction=0.02).info.num_quarantined == 3


def test_broken_file_leaves_the_old_data_set(raw, ingested):
    old = ingested(raw({"events.csv": HEADER + GOOD})).info
    folder = raw({"events.csv": HEADER + GOOD + 'u,i,1500000000,"1\n' + GOOD})
    with pytest.raises(DataError, match="never closed"):
        ingested(folder)
    assert Dataset.open(folder.parent / "out").info == old


def test_no_known_format(raw, ingested):
    with pytest.raises(DataError, match=r"no known format \(there: notes\.doc\)"):
        ingested(raw({"notes.doc": "x"}))
    with pytest.raises(DataError, match="does not exist"):
        ingested(Path("nowhere"))


def test_format_forced_on_other_files(raw, ingested):
    folder = raw({"events.csv": HEADER + GOOD})
    for name in ("movielens", "s3rec", "recbole", "amazon-reviews"):
        with pytest.raises(DataError):
            ingested(folder, format=name)


def test_ignored_setting_is_a_warning(raw, ingested):
    files = {"ratings.csv": "userId,movieId,rating,timestamp\n1,1,1,5\n", "movies.csv": "x\n"}
    files["movies.csv"] = "movieId,title,genres\n1,A,B\n"
    with pytest.warns(UserWarning, match="delimiter is ignored"):
        ingested(raw(files), delimiter=",")


ids = st.text(st.characters(exclude_categories=["Cs", "Cc"]), min_size=1).filter(
    lambda text: text.strip() and "\ufdd0" not in text
)
texts = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\ufdd0"))
rows = st.tuples(
    ids,
    ids,
    st.integers(1, 4_000_000_000),
    st.floats(width=32, allow_nan=False, allow_infinity=False),
    texts,
)


@settings(max_examples=40, deadline=None)
@given(
    table=st.lists(rows, min_size=1, max_size=30, unique=True),
    suffix=st.sampled_from(["csv", "jsonl", "parquet"]),
)
def test_valid_rows_come_back_whole_in_any_batches(tmp_path_factory, table, suffix):
    folder = tmp_path_factory.mktemp("property")
    names = ["user_id", "item_id", "timestamp", "value", "text"]
    records = [dict(zip(names, row, strict=True)) for row in table]
    write_raw(folder / f"events.{suffix}", records)
    prints = set()
    for batch_bytes in (1 << 20, 1 << 12):
        out = folder / f"out-{batch_bytes}"
        config = IngestConfig(raw=folder, out=out, max_bad_fraction=0.0, batch_bytes=batch_bytes)
        prints.add(ingest(config).fingerprint)
        back = Dataset.open(out).interactions(names).to_pylist()
        assert back == [
            row | {"text": row["text"] if row["text"].strip() else None} for row in records
        ]
    assert len(prints) == 1


def write_raw(path, records):
    import csv
    import json

    if path.suffix == ".parquet":
        pq.write_table(pa.Table.from_pylist(records), path)
        return
    with path.open("w", encoding="utf-8", newline="") as file:
        if path.suffix == ".jsonl":
            file.writelines(json.dumps(record) + "\n" for record in records)
        else:
            writer = csv.DictWriter(file, records[0], lineterminator="\n", quoting=csv.QUOTE_ALL)
            writer.writeheader()
            writer.writerows(records)


def test_batches_do_not_change_what_is_refused(raw, tmp_path):
    rng = np.random.default_rng(3)
    lines = []
    for i in range(1000):
        kind = rng.integers(0, 12)
        line = f"u{i % 50},i{i % 30},{1_500_000_000 + i // 2},{i % 5}"
        broken = {
            0: "x,y",
            1: line.replace("u", "\xff"),
            2: line + "z",
            3: lines[-1] if lines else "",
        }
        lines.append(broken.get(int(kind), line))
    folder = raw({"events.csv": (HEADER + "\n".join(lines)).encode("latin-1")})
    seen = set()
    for batch_bytes in (200, 3001, 1 << 20):
        out = tmp_path / "out"
        config = IngestConfig(raw=folder, out=out, max_bad_fraction=1.0, batch_bytes=batch_bytes)
        info = ingest(config)
        seen.add((info.fingerprint, info.num_quarantined, tuple(refused(Dataset.open(out)))))
    assert len(seen) == 1


def run_job(*arguments):
    return subprocess.run(
        [sys.executable, "-m", "jobs.ingest", *map(str, arguments)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )


def test_job(raw, tmp_path):
    folder = raw({"log.csv": "visitor,item_id\n" + "a,x\nb,y\n" * 1 + "c\n"})
    mapping = ["--columns.user-id", "visitor"]
    done = run_job("--raw", folder, "--out", tmp_path / "d", *mapping, "--max-bad-fraction", "0.5")
    assert done.returncode == 0, done.stderr
    assert "quarantined: wrong number of fields" in done.stdout
    failed = run_job("--raw", folder, "--out", tmp_path / "e", *mapping)
    assert failed.returncode == 2
    assert failed.stderr.splitlines()[-1].startswith("error: 1 of 3 rows are broken")
    assert not (tmp_path / "e").exists()
