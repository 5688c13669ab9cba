"""Who gets in: keys, roles, and what only a browser would send."""

from __future__ import annotations

from hashlib import sha256
from pathlib import Path

import pytest

from bacalhau_node.api.auth import OWNER, Caller, Keys, foreign, own_key, read_keys
from bacalhau_node.errors import SpecError
from bacalhau_node.literals import is_loopback


def _line(role: str, key: str, name: str) -> str:
    return f"{role} {sha256(key.encode()).hexdigest()} {name}\n"


@pytest.fixture
def keys_file(tmp_path: Path) -> Path:
    path = tmp_path / "keys"
    path.write_text("# people\n\n" + _line("submit", "ann-key", "ann") + _line("admin", "bob-key", "bob"))
    path.chmod(0o600)
    return path


def test_each_key_is_its_caller_and_no_other(keys_file):
    keys = Keys([*read_keys(keys_file), own_key("tökén")])
    assert keys.caller("Bearer ann-key") == Caller("ann", "submit")
    assert keys.caller("bearer  bob-key ") == Caller("bob", "admin")
    assert keys.caller("Bearer tökén") == OWNER
    for header in (
        None,
        "",
        "Bearer",
        "Bearer ",
        "Bearer ann-ke",
        "Bearer ann-keys",
        "Basic ann-key",
        "ann-key",
        "\udcff",
    ):
        assert keys.caller(header) is None


def test_a_hash_is_no_key(keys_file):
    digest = sha256(b"ann-key").hexdigest()
    assert Keys(read_keys(keys_file)).caller(f"Bearer {digest}") is None


def test_a_submitter_sees_own_jobs_and_an_admin_all():
    ann, bob = Caller("ann", "submit"), Caller("bob", "admin")
    assert [ann.sees(owner) for owner in ("ann", "bob", "")] == [True, False, False]
    assert all(bob.sees(owner) for owner in ("ann", "bob", ""))


@pytest.mark.parametrize(
    "line",
    ["ann", "root " + "0" * 64 + " x", "submit " + "0" * 63 + " x", "submit " + "G" * 64 + " x", "submit " + "0" * 64],
)
def test_a_line_that_is_no_key_is_named(keys_file, line):
    keys_file.write_text(f"# a comment\n{line}\n")
    with pytest.raises(SpecError, match="line 2"):
        read_keys(keys_file)


def test_a_file_that_others_may_write_or_that_is_empty_or_missing_is_refused(keys_file, tmp_path):
    keys_file.chmod(0o660)
    with pytest.raises(SpecError, match="chmod 600"):
        read_keys(keys_file)
    keys_file.chmod(0o600)
    keys_file.write_text("# nobody\n")
    with pytest.raises(SpecError, match="no key"):
        read_keys(keys_file)
    with pytest.raises(SpecError, match="can't be read"):
        read_keys(tmp_path / "none")


@pytest.mark.parametrize("host", ["localhost", "127.0.0.1", "127.8.8.8", "::1", "[::1]"])
def test_loopback_is_this_machine(host):
    assert is_loopback(host)


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "10.0.0.1", "example.org", "localhost.example.org", ""])
def test_everything_else_is_not(host):
    assert not is_loopback(host)


@pytest.mark.parametrize("host", ["localhost", "localhost:80", "127.0.0.1:1234", "[::1]:1234"])
def test_programs_on_this_machine_may_ask(host):
    assert foreign({"Host": host}, loopback=True) is None


@pytest.mark.parametrize(
    "headers",
    [
        {"Host": "evil.example:1234"},
        {"Host": "localhost.evil.example"},
        {"Host": "127.0.0.1.nip.io:1234"},
        {"Host": ""},
        {"Host": "[::1"},
        {"Host": "[::1]evil.example"},
        {"Host": "localhost:evil.example"},
        {},
        {"Host": "localhost", "Origin": "http://localhost"},
        {"Host": "localhost", "Origin": "null"},
        {"Host": "localhost", "Sec-Fetch-Site": "cross-site"},
        {"Host": "localhost", "Sec-Fetch-Site": "same-origin"},
    ],
)
def test_pages_and_rebound_names_may_not(headers):
    assert foreign(headers, loopback=True)


def test_beyond_loopback_the_name_is_what_the_certificate_says():
    assert foreign({"Host": "node.example.org"}, loopback=False) is None
    assert foreign({"Host": "node.example.org", "Origin": "https://node.example.org"}, loopback=False)
