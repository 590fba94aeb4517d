"""Every text is in one batch that it fits, and what is run on padding is bounded."""

from __future__ import annotations

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fusionrec.language import buckets
from fusionrec.language.buckets import LENGTHS, Bucket, Buckets

TOKENS = st.sampled_from([8, 40, 64, 256, 512, 700])


@given(st.data(), TOKENS, st.sampled_from([512, 4096, 2**14]))
def test_every_text_is_in_one_batch_that_it_fits(data, max_tokens: int, most_tokens: int):
    found = Buckets(max_tokens, most_tokens)
    lengths = data.draw(st.lists(st.integers(1, max_tokens), max_size=400))
    batches = found.plan(lengths)
    assert sorted(text for batch in batches for text in batch.texts) == list(range(len(lengths)))
    shapes = set(found.shapes)
    for batch in batches:
        bucket = batch.bucket
        assert 0 < len(batch.texts) <= bucket.rows
        longest = max(lengths[text] for text in batch.texts)
        assert longest <= bucket.length
        assert bucket.tokens <= found.largest
        assert bucket in shapes or (longest == bucket.length and longest > LENGTHS[-1])
    run = sum(batch.bucket.tokens for batch in batches)
    counted = sum(max(length, 8) for length in lengths)
    assert run <= 4 * counted + 2 * buckets._SMALL


def test_longest_texts_come_first_and_spare_rows_are_filled(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(buckets, "_SMALL", 0)
    lengths = [10, 90, 100, 12, 95, 60, 20]
    found = [(batch.bucket, batch.texts) for batch in Buckets(128, 4096).plan(lengths)]
    assert found == [
        (Bucket(4, 128), [2, 4, 1, 5]),  # 97 to 128 tokens; three alike take a fourth along
        (Bucket(1, 32), [6]),
        (Bucket(2, 16), [3, 0]),
    ]


def test_little_is_not_worth_two_passes():
    (batch,) = Buckets(128, 4096).plan([100, 10, 10])
    assert batch.bucket == Bucket(4, 128)


def test_shapes_are_few_and_the_largest_comes_first():
    shapes = Buckets(256, 2**14).shapes
    assert len(shapes) == len(set(shapes)) == 66
    assert [bucket.tokens for bucket in shapes[:2]] == [2**14, 2**14]
    assert shapes[-1] == Bucket(1, 16)
    assert max(bucket.rows for bucket in shapes) == 256
    assert all(0 < after / before <= 2 for before, after in pairwise(LENGTHS))


def test_no_text_has_no_batch():
    assert Buckets(64, 512).plan([]) == []
