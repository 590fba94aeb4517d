import hashlib
from pathlib import Path

import pytest

from fusionrec.errors import ConfigError
from serve_apps.keys import ApiKeys, guard, is_loopback, read_entries

KEY = "a-secret-key"
DIGEST = hashlib.sha256(KEY.encode()).hexdigest()
OTHER = hashlib.sha256(b"other").hexdigest()


def test_without_keys_everybody_is_admitted():
    assert ApiKeys().admits({})


@pytest.mark.parametrize(
    "headers",
    [
        {"authorization": f"Bearer {KEY}"},
        {"authorization": f"bearer   {KEY} "},
        {"x-api-key": KEY},
    ],
)
def test_a_key_is_admitted(headers: dict[str, str]):
    assert ApiKeys.parse([OTHER, f"shop={DIGEST.upper()}"]).admits(headers)


@pytest.mark.parametrize(
    "headers",
    [
        {},
        {"authorization": KEY},
        {"authorization": f"Basic {KEY}"},
        {"authorization": "Bearer"},
        {"authorization": f"Bearer {DIGEST}"},
        {"x-api-key": "Ω€"},
        {"x-api-key": ""},
    ],
)
def test_anything_else_is_not(headers: dict[str, str]):
    assert not ApiKeys.parse([DIGEST]).admits(headers)


def test_a_key_that_was_not_hashed_is_refused_and_not_repeated():
    with pytest.raises(ConfigError, match=r"entry 2 .* sha256sum") as caught:
        ApiKeys.parse([DIGEST, KEY])
    assert KEY not in str(caught.value)


def test_entries_come_from_the_variable_or_from_a_file(tmp_path: Path):
    assert read_entries({}) == ()
    assert read_entries({"FUSIONREC_API_KEYS": f" {DIGEST}, b={OTHER}"}) == (DIGEST, f"b={OTHER}")
    file = tmp_path / "keys"
    file.write_text(f"# keys of the shop\n{DIGEST}  # front\n\nb={OTHER}\n")
    assert read_entries({"FUSIONREC_API_KEYS": str(file)}) == (DIGEST, f"b={OTHER}")
    with pytest.raises(ConfigError, match="cannot be read"):
        read_entries({"FUSIONREC_API_KEYS": str(tmp_path / "missing")})


@pytest.mark.parametrize("host", ["127.0.0.1", "127.8.0.1", "::1", "localhost", None])
def test_loopback_needs_no_key(host: str | None):
    assert is_loopback(host)
    guard(host, ApiKeys())


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.0.2.7", "example.org", ""])  # noqa: S104
def test_any_other_host_does(host: str):
    with pytest.raises(ConfigError, match=r"no API key is set: set FUSIONREC_API_KEYS"):
        guard(host, ApiKeys())
    guard(host, ApiKeys.parse([DIGEST]))
