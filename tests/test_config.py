"""The contract of every setting: who overrides whom, what is refused, and in which words."""

from pathlib import Path
from typing import Literal

import pytest
from pydantic import Field, ValidationError

from fusionrec.config import Config, JobConfig, parse, read_yaml
from fusionrec.errors import ConfigError


class Training(Config):
    """A group of settings."""

    learning_rate: float = 0.1
    """Step size."""
    epochs: int = Field(3, ge=1)
    """Passes over the data."""


class ExampleConfig(JobConfig):
    """Does nothing."""

    raw: Path
    """Folder of raw files."""
    training: Training = Training()
    """How to train."""
    protocol: Literal["leave-one-out", "global-time"] = "leave-one-out"
    """Which split."""
    sources: tuple[str, ...] = ("popularity", "ease")
    """Sources in order."""
    columns: dict[str, str] = Field({})
    """Column mapping."""
    force: bool = False
    """Whether to go on."""


@pytest.fixture
def write(tmp_path):
    def write(text: str) -> str:
        path = tmp_path / "settings.yaml"
        path.write_text(text, encoding="utf-8")
        return str(path)

    return write


def refusal(*arguments: str) -> str:
    with pytest.raises(ConfigError) as caught:
        parse(ExampleConfig, arguments)
    message = str(caught.value)
    assert "\n" not in message
    return message


def test_flags_override_environment_overrides_file_overrides_defaults(write, monkeypatch):
    path = write("raw: file\nprotocol: global-time\ntraining: {learning_rate: 1, epochs: 1}\n")
    monkeypatch.setenv("FUSIONREC_RAW", "environment")
    monkeypatch.setenv("FUSIONREC_TRAINING__EPOCHS", "2")
    config = parse(ExampleConfig, ["--config", path, "--raw", "flag"])
    assert config.raw == Path("flag")
    assert config.training == Training(learning_rate=1, epochs=2)
    assert config.protocol == "global-time"
    assert config.sources == ("popularity", "ease")
    assert parse(ExampleConfig, [f"--config={path}"]).raw == Path("environment")
    assert parse(ExampleConfig, ["--training.epochs", "9"]).training.epochs == 9


def test_values_with_parts(monkeypatch):
    config = parse(ExampleConfig, ["--raw=x", "--sources", "a,b", "--columns", "user_id=uid"])
    assert config.sources == ("a", "b")
    assert config.columns == {"user_id": "uid"}
    monkeypatch.setenv("FUSIONREC_SOURCES", '["c", "d"]')
    assert parse(ExampleConfig, ["--raw=x"]).sources == ("c", "d")
    assert parse(ExampleConfig, ["--raw=x", "--force"]).force


def test_direct_construction_ignores_the_environment(monkeypatch):
    monkeypatch.setenv("FUSIONREC_FORCE", "true")
    assert not ExampleConfig(raw=Path("x")).force


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([], ["raw is missing", "--raw VALUE"]),
        (["--raw", "x", "--rwa", "y"], ["--rwa y", "--help"]),
        (["--raw", "x", "--sourc", "y"], ["--sourc y"]),  # no abbreviations: they would break later
        (["--raw", "x", "--training.epoch", "1"], ["--training.epoch 1"]),
        (["--raw", "x", "--training.epochs", "0"], ["training.epochs = '0'", "--training.epochs"]),
        (["--raw", "x", "--training.epochs", "a"], ["training.epochs = 'a'", "valid integer"]),
        (["--raw", "x", "--protocol", "z"], ["protocol = 'z'", "'leave-one-out' or 'global-time'"]),
        (["--raw"], ["--raw", "expected one argument"]),
        (["x"], ["unrecognized arguments: x"]),
        (["--config"], ["--config FILE"]),
        (["--config", "absent.yaml"], ["absent.yaml", "No such file"]),
    ],
)
def test_wrong_flags_are_refused_in_a_sentence(arguments, words):
    message = refusal(*arguments)
    assert all(word in message for word in words), message


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("raw: x\nrwa: y\n", ["rwa is unknown", "'y'", "remove it"]),
        ("raw: x\ntraining: {epoch: 1}\n", ["training.epoch is unknown"]),
        ("raw: x\ntraining: 5\n", ["training = 5"]),
        ("- raw\n", ["must be a mapping"]),
        ("", ["must be a mapping"]),
        ("raw: x\nsources: [a\n", ["not YAML", "line 3"]),
    ],
)
def test_wrong_files_are_refused_in_a_sentence(write, text, words):
    message = refusal("--config", write(text))
    assert all(word in message for word in words), message


@pytest.mark.parametrize(
    ("name", "value", "words"),
    [
        ("SOURCES", "a,b", ["FUSIONREC_SOURCES = 'a,b'", "JSON"]),
        ("TRAINING", "{", ["FUSIONREC_TRAINING = '{'", "JSON"]),
        ("TRAINING__EPOCHS", "zero", ["training.epochs = 'zero'"]),
    ],
)
def test_wrong_environment_is_refused_in_a_sentence(monkeypatch, name, value, words):
    monkeypatch.setenv(f"FUSIONREC_{name}", value)
    message = refusal("--raw", "x")
    assert all(word in message for word in words), message


def test_a_file_that_is_not_text(tmp_path):
    (tmp_path / "settings.yaml").write_bytes(b"raw: \xff\n")
    with pytest.raises(ConfigError, match="not YAML in UTF-8"):
        read_yaml(tmp_path / "settings.yaml")


def test_round_trip_through_json():
    config = parse(ExampleConfig, ["--raw", "x", "--training.epochs", "7", "--sources", "a"])
    again = ExampleConfig.model_validate_json(config.model_dump_json())
    assert again == config
    assert again.sources == ("a",)


def test_frozen_and_closed():
    config = ExampleConfig(raw=Path("x"))
    with pytest.raises(ValidationError, match="frozen"):
        config.force = True
    with pytest.raises(ValidationError, match="frozen"):
        config.training.epochs = 2
    with pytest.raises(ValidationError, match="epoch"):
        Training(epoch=1)


def test_help_lists_every_setting_with_its_meaning(capsys):
    with pytest.raises(SystemExit) as ended:
        parse(ExampleConfig, ["--help"])
    assert ended.value.code == 0
    text = capsys.readouterr().out
    for words in ("--config FILE", "--raw", "--training.learning-rate", "Step size.", "--no-force"):
        assert words in text
