from pathlib import Path

import pytest

from fusionrec.bundles.manifest import Manifest, verify
from fusionrec.bundles.store import BundleStore
from fusionrec.errors import BundleCorrupt


@pytest.fixture
def bundle(tmp_path: Path, pipeline: Path) -> Path:
    store = BundleStore(tmp_path / "bundles")
    return store.path(store.add(pipeline).id)


def test_an_untouched_bundle_passes(bundle: Path):
    manifest = verify(bundle)
    assert [file.path for file in manifest.files] == [
        "catalogue.parquet",
        "fusion.json",
        "item_counts.npy",
        "metrics.json",
        "pipeline.json",
        "sources/ease/neighbours.npz",
        "users.parquet",
    ]
    assert manifest.dataset["name"] == "toy"
    assert manifest.metrics == {"test": {"ndcg@10": 0.25}}
    assert manifest.size == sum(p.stat().st_size for p in bundle.rglob("*.*")) - len(
        (bundle / "manifest.json").read_bytes()
    )


def test_the_recall_of_the_indexes_in_use_is_in_the_manifest(tmp_path: Path, pipeline: Path):
    for name in ("ease", "of-an-earlier-fit"):
        (pipeline / "sources" / name).mkdir(exist_ok=True)
        (pipeline / "sources" / name / "index.json").write_text('{"kind": "ivf", "recall": 0.96}')
    manifest = BundleStore(tmp_path / "bundles").add(pipeline)
    assert manifest.metrics == {
        "test": {"ndcg@10": 0.25},
        "indexes": {"ease": {"kind": "ivf", "recall": 0.96}},
    }


def test_manifest_round_trips(bundle: Path):
    manifest = Manifest.load(bundle)
    assert Manifest.model_validate_json(manifest.canonical()) == manifest
    assert (bundle / "manifest.json").read_bytes() == manifest.canonical()


@pytest.mark.parametrize("name", ["catalogue.parquet", "sources/ease/neighbours.npz"])
@pytest.mark.parametrize("position", [0, 777, -1])
def test_a_flipped_bit_is_refused(bundle: Path, name: str, position: int):
    path = bundle / name
    content = bytearray(path.read_bytes())
    content[position] ^= 1
    path.chmod(0o644)
    path.write_bytes(content)
    with pytest.raises(BundleCorrupt, match=rf"{name} was changed"):
        verify(bundle)


def test_a_flipped_bit_of_the_manifest_is_refused(bundle: Path):
    path = bundle / "manifest.json"
    path.write_text(path.read_text().replace('"toy"', '"tox"'))
    with pytest.raises(BundleCorrupt, match=r"manifest.json was changed"):
        verify(bundle)


@pytest.mark.parametrize("content", ["", "[]", "{}", "\x00", '{"format_version": 2}'])
def test_a_broken_manifest_is_refused(bundle: Path, content: str):
    (bundle / "manifest.json").write_text(content)
    with pytest.raises(BundleCorrupt, match="is not a manifest"):
        verify(bundle)


def test_a_missing_file_is_refused(bundle: Path):
    (bundle / "fusion.json").unlink()
    with pytest.raises(BundleCorrupt, match=r"fusion.json is missing"):
        verify(bundle)


def test_a_missing_manifest_is_refused(bundle: Path):
    (bundle / "manifest.json").unlink()
    with pytest.raises(BundleCorrupt, match=r"manifest.json cannot be read"):
        verify(bundle)


def test_a_short_file_is_refused(bundle: Path):
    path = bundle / "catalogue.parquet"
    path.chmod(0o644)
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(BundleCorrupt, match=r"catalogue.parquet has 8999 bytes"):
        verify(bundle)


def test_an_additional_file_is_refused(bundle: Path):
    (bundle / "sources" / "extra.bin").write_bytes(b"")
    with pytest.raises(BundleCorrupt, match=r"extra.bin is not listed"):
        verify(bundle)


def test_a_link_is_refused(bundle: Path):
    (bundle / "sources" / "extra").symlink_to("/etc")
    with pytest.raises(BundleCorrupt, match="not a plain file"):
        verify(bundle)
