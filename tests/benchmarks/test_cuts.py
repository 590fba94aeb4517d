"""The same ranking at several moments."""

import re

import numpy as np
import pytest

from benchmarks.cuts import CutsBenchmark, earlier, measure, spread
from fusionrec.data.splits import Protocol, split
from fusionrec.errors import DataError
from tuning.learned import FusionModel


def test_a_cut_drops_the_newest_tenth(synthetic, tmp_path):
    found = earlier(synthetic, tmp_path / "earlier")
    before, after = (np.sort(data.events.timestamps) for data in (synthetic, found))
    np.testing.assert_array_equal(after, before[: len(before) - len(before) // 10])
    assert found.catalogue == synthetic.catalogue
    assert found.info.fingerprint != synthetic.info.fingerprint
    # What is dropped are the test targets of the cut before.
    dropped = len(before) - len(after)
    test = split(synthetic, Protocol.GLOBAL_TIME).test
    assert test.targets.timestamps.min() >= after.max()
    assert len(test.targets.items) <= dropped


def test_mean_and_spread():
    assert spread([1.0, 2.0, 3.0]) == pytest.approx((2, 1))


def test_data_without_times_cannot_be_cut(tmp_path):
    raw = tmp_path / "raw"
    raw.mkdir()
    (raw / "ratings.csv").write_text("user_id,item_id\nu,a\nu,b\nv,a\n")
    with pytest.raises(DataError, match=r"has an order of events but no timestamps"):
        measure(CutsBenchmark(data=raw, out=tmp_path / "out"))


@pytest.mark.ray
def test_every_cut_is_measured(ray_cluster, synthetic, tmp_path):
    raw = tmp_path / "raw"
    raw.mkdir()
    table = synthetic.interactions(["user_id", "item_id", "timestamp"])
    table.to_pandas().to_csv(raw / "ratings.csv", index=False)
    config = CutsBenchmark(
        data=raw,
        out=tmp_path / "out",
        cuts=2,
        sources=("popularity", "item-knn"),
        model=FusionModel.LINEAR,
        trials=4,
    )
    text = measure(config).read_text()
    flags = "--cuts 2 --sources popularity,item-knn --model linear --trials 4"
    assert f"`python -m benchmarks.cuts --data {raw} {flags}`" in text
    rows = re.findall(
        r"^\| ([\w-]+) \| (\S+) \| (\S+) \| (\S+) \| (\S+) \|(.*)\|$", text, re.MULTILINE
    )
    assert [row[0] for row in rows[1:]] == ["popularity", "item-knn", "fused"]
    for _, newest, older, mean, deviation, _ in rows[1:]:
        values = [float(newest), float(older)]
        assert float(mean) == pytest.approx(np.mean(values), abs=1e-4)
        assert float(deviation) == pytest.approx(np.std(values, ddof=1), abs=1e-4)
    assert rows[-1][-1].strip() == ""
    assert rows[1][-1].strip().endswith("of 2")
