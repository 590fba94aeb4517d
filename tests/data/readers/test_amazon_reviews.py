import gzip
import json

import pytest

from fusionrec.errors import DataError


def review(user, item, seconds, **more):
    record = {
        "rating": 5.0,
        "title": "Fine",
        "text": "It works.",
        "images": [],
        "asin": "variant",
        "parent_asin": item,
        "user_id": user,
        "timestamp": seconds * 1000 + 123,
        "helpful_vote": 0,
        "verified_purchase": True,
    }
    return json.dumps(record | more) + "\n"


def meta(item, **more):
    record = {
        "main_category": "Toys",
        "title": f"Toy {item}",
        "average_rating": 4.5,
        "rating_number": 7,
        "features": ["Soft.", " "],
        "description": ["A toy."],
        "price": 9.99,
        "store": "S",
        "categories": ["Toys & Games", "Dolls"],
        "details": {"Weight": "1 kg"},
        "parent_asin": item,
    }
    return json.dumps(record | more) + "\n"


def test_domains(raw, ingested):
    folder = raw(
        {
            "Toys.jsonl": review("u", "A", 1_500_000_000) + review("v", "B", 1_500_000_001),
            "meta_Toys.jsonl": meta("A") + meta("B", price="from 3", categories=None, title=None),
            "Books.jsonl.gz": gzip.compress(review("u", "C", 1_500_000_002, title="").encode()),
            "meta_Books.jsonl.gz": gzip.compress(meta("C", price=None).encode()),
        }
    )
    data = ingested(folder)
    assert data.info.format == "amazon-reviews"
    table = data.interactions()
    assert table.column("item_id").to_pylist() == ["C", "A", "B"]
    assert table.column("timestamp").to_pylist() == [1_500_000_002, 1_500_000_000, 1_500_000_001]
    assert table.column("text").to_pylist() == ["It works.", "Fine\nIt works.", "Fine\nIt works."]
    assert table.column("domain").to_pylist() == ["Books", "Toys", "Toys"]
    assert data.catalogue.titles == ("Toy C", "Toy A", "")
    assert data.catalogue.texts[0] == "A toy.\nSoft."
    assert data.catalogue.categories == (("Toys & Games", "Dolls"),) * 2 + ((),)
    assert data.items.column("price").to_pylist() == [None, "9.99", "from 3"]
    assert data.items.column("details").to_pylist() == ['{"Weight": "1 kg"}'] * 3
    assert data.items.column("rating_number").to_pylist() == [7.0] * 3


def test_recognised_by_keys(raw, ingested):
    data = ingested(raw({"Toys.jsonl": review("u", "A", 1_500_000_000)}))
    assert data.info.format == "amazon-reviews"
    assert data.catalogue.domains == ("Toys",)


def test_broken_lines(raw, ingested):
    content = review("u", "A", 1_500_000_000) + review("u", "Z", 1_500_000_001)
    content += '{"rating": \n[1]\n' + review("v\ud800", "A", 1_500_000_002)
    folder = raw({"T.jsonl": content.encode() + b'{"a": "\xff"}\n', "meta_T.jsonl": meta("A")})
    data = ingested(folder)
    assert data.info.num_interactions == 1
    assert data.info.num_quarantined == 5


def test_domain_without_metadata(raw, ingested):
    line = review("u", "A", 1_500_000_000)
    with pytest.raises(DataError, match=r"B\.jsonl has no metadata meta_B\.jsonl"):
        ingested(raw({"A.jsonl": line, "meta_A.jsonl": meta("A"), "B.jsonl": line}))


def test_key_missing(raw, ingested):
    with pytest.raises(DataError, match=r"T\.jsonl has no column 'parent_asin'"):
        ingested(raw({"T.jsonl": '{"user_id": "u"}\n'}), format="amazon-reviews")
