import hashlib
from pathlib import Path

import pytest

from fusionrec.errors import ConfigError
from serve_apps.keys import ANYBODY, ApiKeys, RateLimit, guard, is_loopback, read_entries

KEY = "a-secret-key"
DIGEST = hashlib.sha256(KEY.encode()).hexdigest()
OTHER = hashlib.sha256(b"other").hexdigest()


def test_without_keys_everybody_is_admitted():
    assert ApiKeys().admit({}) == ANYBODY


@pytest.mark.parametrize(
    "headers",
    [
        {"authorization": f"Bearer {KEY}"},
        {"authorization": f"bearer   {KEY} "},
        {"x-api-key": KEY},
    ],
)
def test_a_key_is_admitted(headers: dict[str, str]):
    assert ApiKeys.parse([OTHER, f"shop={DIGEST.upper()}"]).admit(headers) == "shop"


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
    assert ApiKeys.parse([DIGEST]).admit(headers) is None


def test_a_key_that_was_not_hashed_is_refused_and_not_repeated():
    with pytest.raises(ConfigError, match=r"entry 2 .* sha256sum") as caught:
        ApiKeys.parse([DIGEST, KEY])
    assert KEY not in str(caught.value)


def test_entries_come_from_the_variable_or_from_a_file(tmp_path: Path):
    assert read_entries({}) == ()
    assert read_entries({"FUSIONREC_API_KEYS": f" {DIGEST}, b={OTHER}"}) == (DIGEST, f"b={OTHER}")
    many = ",".join([DIGEST] * 5)  # longer than the name of any file
    assert read_entries({"FUSIONREC_API_KEYS": many}) == (DIGEST,) * 5
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


def test_a_key_without_a_name_is_named_after_its_hash():
    keys = ApiKeys.parse([OTHER, DIGEST])
    assert keys.admit({"x-api-key": KEY}) == f"key-{DIGEST[:8]}"


def test_a_rate_lets_a_burst_pass_and_then_so_many_a_second():
    now = [100.0]
    limit = RateLimit(2.0, 3, clock=lambda: now[0])
    assert [limit.take("a") for _ in range(5)] == [0, 0, 0, 0.5, 0.5]
    assert limit.take("b") == 0  # another key has a bucket of its own
    now[0] += 0.75
    assert [limit.take("a") for _ in range(2)] == [0, 0.25]
    now[0] += 1000  # no more than the burst gathers
    assert [limit.take("a") for _ in range(4)] == [0, 0, 0, 0.5]
