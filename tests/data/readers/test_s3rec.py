import pytest

from fusionrec.errors import DataError


def test_sequences(raw, ingested):
    folder = raw(
        {
            "Toys.txt": b"1 5 6 5\n2 6\n1 6\n3\n\xff 5\n",
            "Toys_item2attributes.json": '{"6": [12, 3], "5": [], "9": [3]}',
        }
    )
    data = ingested(folder)
    assert data.info.format == "s3rec"
    assert not data.info.has_timestamps
    table = data.interactions()
    assert table.column("user_id").to_pylist() == ["1", "1", "1", "2"]
    assert table.column("item_id").to_pylist() == ["5", "6", "5", "6"]
    assert table.column("timestamp").to_pylist() == [0, 1, 2, 0]
    assert set(table.column("domain").to_pylist()) == {"toys"}
    assert data.catalogue.item_ids == ("6", "5", "9")
    assert data.catalogue.categories == (("attribute 12", "attribute 3"), (), ("attribute 3",))
    assert not data.catalogue.has_text
    assert data.info.num_quarantined == 3


def test_without_attributes(raw, ingested):
    data = ingested(raw({"Toys.txt": "1 5 6\n2 7 5\n"}), format="s3rec")
    assert data.catalogue.item_ids == ("5", "6", "7")


@pytest.mark.parametrize("content", ["{", "[1]", '{"5": 3}'])
def test_malformed_attributes(raw, ingested, content):
    folder = raw({"Toys.txt": "1 5 6\n", "Toys_item2attributes.json": content})
    with pytest.raises(DataError, match=r"Toys_item2attributes\.json"):
        ingested(folder)


def test_two_sequence_files(raw, ingested):
    with pytest.raises(DataError, match=r"a\.txt, b\.txt"):
        ingested(raw({"a.txt": "1 2\n", "b.txt": "1 2\n"}), format="s3rec")


def test_real(shared_data, ingested):
    data = ingested(shared_data / "amazon-beauty", max_bad_fraction=0.0)
    assert (data.info.num_users, data.info.num_items) == (22_363, 12_101)
    assert data.info.num_interactions == 198_502
    assert data.catalogue.item_ids[0] == "4"
    assert data.catalogue.categories[0] == ("attribute 1", "attribute 2", "attribute 3")
