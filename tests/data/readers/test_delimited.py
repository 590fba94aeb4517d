from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fusionrec.data.readers import delimited
from fusionrec.errors import DataError


def read(path: Path, content: bytes, **options):
    path.write_bytes(content)
    batches = list(delimited.read(path, **options))
    rows = [row for batch in batches for row in batch.table.to_pylist()]
    lines = [line for batch in batches for line in batch.lines.tolist()]
    return rows, lines, [refused for batch in batches for refused in batch.refused]


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    return tmp_path_factory.mktemp("csv") / "t.csv"


def test_quotes_line_ends_and_blank_lines(path):
    content = b'\xef\xbb\xbfa,b\r\n1,"x\r\ny, ""z"""\r\n\r\n2,q"r\r\n'
    rows, lines, refused = read(path, content)
    assert rows == [{"a": "1", "b": 'x\r\ny, "z"'}, {"a": "2", "b": 'q"r'}]
    assert lines == [2, 5]
    assert not refused


def test_broken_bytes_are_marked_in_place(path):
    rows, lines, refused = read(path, b"a,b\n1,\xff\n\xfe\n2,3\n")
    assert rows[0]["b"] != "\ufffd"
    assert lines == [2, 4]
    assert [(r.line, r.reason) for r in refused] == [(3, "not UTF-8")]


def test_only_broken_rows(path):
    rows, lines, refused = read(path, b"a,b\n1\n2\n3,4,5")
    assert (rows, lines) == ([], [])
    assert [r.line for r in refused] == [2, 3, 4]


def test_open_quote_refuses_every_line_that_it_swallows(path):
    _, lines, refused = read(path, b'a,b\n1,2\n"3,4\n5,6\n7,8\n')
    assert lines == [2]
    assert [(r.line, r.row) for r in refused] == [(3, '"3,4'), (4, "5,6"), (5, "7,8")]


def test_open_quote_in_the_last_field(path):
    assert read(path, b'a,b\n1,2\n3,"4\n5,6"\n')[1] == [2, 3]
    for end in (b"", b"\n", b"\n\n"):
        with pytest.raises(DataError, match=r"t\.csv: the double quote opened in line 3 is never"):
            read(path, b'a,b\n1,2\n3,"4\n5,6\n7,8' + end)


def test_row_longer_than_a_batch(path):
    with pytest.raises(DataError, match=r"t\.csv: after line .*double quote is never closed"):
        read(path, b'a,b\n1,"' + b"x,y\n" * 5000, batch_bytes=1000)


@settings(max_examples=60, deadline=None)
@given(
    kinds=st.lists(st.sampled_from(["good", "bad", "blank", "quoted", "swallowed"]), min_size=1),
    batch_bytes=st.integers(40, 400),
    end=st.booleans(),
)
def test_lines_are_exact(path, kinds, batch_bytes, end):
    text, good, bad = ["a,b,c"], [], []
    for kind in kinds:
        line = len(text) + 1
        if kind == "good":
            text.append(f"u,v,{line}")
            good.append(line)
        elif kind == "quoted":
            text += ['"x', f'y",2,{line}']
            good.append(line)
        elif kind == "bad":
            text.append("1,2")
            bad.append(line)
        elif kind == "swallowed":
            text += ['"x', 'y",2']
            bad += [line, line + 1]
        else:
            text.append("")
    content = "\n".join(text) + "\n" * end
    rows, lines, refused = read(path, content.encode(), batch_bytes=batch_bytes)
    assert lines == good == [int(row["c"]) for row in rows]
    assert [r.line for r in refused] == bad
