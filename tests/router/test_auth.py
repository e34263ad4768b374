"""Keys to callers: the file's forms, its reload, and what is said (never a key) when it is wrong."""

import hashlib
import logging
import os
from pathlib import Path

import pytest

from router.auth import ApiKeys, KeysFileError, bearer_token, open_access
from router.errors import Unauthenticated
from router.protocol import Caller, Role

GOOD = f"""
[[keys]]
key = "wk-alpha"
tenant = "alpha"

[[keys]]
key_sha256 = "{hashlib.sha256(b"wk-boss").hexdigest()}"
tenant = "ops"
role = "admin"
trust_group = "company"
"""


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def path(tmp_path: Path) -> Path:
    (tmp_path / "keys.toml").write_text(GOOD)
    return tmp_path / "keys.toml"


def rewrite(path: Path, text: str) -> None:
    before = path.stat().st_mtime_ns
    path.write_text(text)
    os.utime(path, ns=(before + 10**9, before + 10**9))


def test_a_key_names_tenant_role_and_group(path: Path) -> None:
    keys = ApiKeys(path)
    assert keys.authenticate("wk-alpha") == Caller("alpha", Role.USER, "alpha")
    assert keys.authenticate("wk-boss") == Caller("ops", Role.ADMIN, "company")
    assert (keys.trust_group_of("ops"), keys.trust_group_of("nobody")) == ("company", "nobody")


@pytest.mark.parametrize(
    "token", [None, "", "wk-alph", "wk-alpha ", "WK-ALPHA", hashlib.sha256(b"wk-boss").hexdigest()]
)
def test_any_other_token_is_refused_without_repeating_it(path: Path, token: str | None) -> None:
    with pytest.raises(Unauthenticated) as caught:
        ApiKeys(path).authenticate(token)
    assert caught.value.message.endswith(".")
    assert not token or token not in caught.value.message


def test_a_changed_file_is_read_again_within_a_second(path: Path) -> None:
    clock = Clock()
    keys = ApiKeys(path, clock=clock)
    rewrite(path, GOOD.replace("wk-alpha", "wk-new"))
    clock.now += 0.5
    assert keys.authenticate("wk-alpha").tenant == "alpha"
    clock.now += 0.6
    assert keys.authenticate("wk-new").tenant == "alpha"
    with pytest.raises(Unauthenticated):
        keys.authenticate("wk-alpha")


@pytest.mark.parametrize("text", ["[[keys]", "", '[[keys]]\nkey = "wk-secret"\n', None])
def test_a_file_that_became_wrong_changes_nothing_and_is_logged_without_keys(
    path: Path, text: str | None, caplog: pytest.LogCaptureFixture
) -> None:
    clock = Clock()
    keys = ApiKeys(path, clock=clock)
    path.unlink() if text is None else rewrite(path, text)
    clock.now += 2
    assert keys.authenticate("wk-alpha").tenant == "alpha"
    assert [record.levelno for record in caplog.records] == [logging.ERROR]
    assert "wk-" not in str([record.__dict__ for record in caplog.records])


def test_a_file_that_is_restored_counts_again(path: Path) -> None:
    clock = Clock()
    keys = ApiKeys(path, clock=clock)
    rewrite(path, "[[keys]")
    clock.now += 2
    keys.authenticate("wk-alpha")
    rewrite(path, GOOD.replace("wk-alpha", "wk-new"))
    clock.now += 2
    assert keys.authenticate("wk-new").tenant == "alpha"


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("keys = 3", r"no \[\[keys\]\]"),
        ("[[keys]]\ntenant = 'a'", "exactly one"),
        ("[[keys]]\nkey = 'wk-x'", "tenant is missing"),
        ("[[keys]]\nkey = 'wk-x'\nkey_sha256 = 'ab'\ntenant = 'a'", "exactly one"),
        ("[[keys]]\nkey_sha256 = 'zz'\ntenant = 'a'", "64 hex digits"),
        ("[[keys]]\nkey = 'wk-x'\ntenant = 'a'\nrole = 'root'", "role"),
        ("[[keys]]\nkey = 'wk-x'\ntenant = 'a'\ntenent = 'a'", "unknown fields"),
        ("[[keys]]\nkey = 'wk-x'\ntenant = 7", "every field"),
        ("[[keys]]\nkey = ''\ntenant = 'a'", "every field"),
        ("[[keys]]\nkey = 'wk-x'\ntenant = 'a'\n[[keys]]\nkey = 'wk-x'\ntenant = 'b'", "number 2 repeats"),
        ("keys = 'wk-x", "not valid TOML"),
    ],
)
def test_a_wrong_file_is_refused_at_the_start_and_its_keys_are_not_repeated(path: Path, text: str, says: str) -> None:
    path.write_text(text)
    with pytest.raises(KeysFileError, match=says) as caught:
        ApiKeys(path)
    assert str(path) in str(caught.value)
    assert "wk-x" not in str(caught.value)


def test_a_missing_file_is_refused_at_the_start(tmp_path: Path) -> None:
    with pytest.raises(KeysFileError, match="cannot be read"):
        ApiKeys(tmp_path / "none.toml")


def test_without_a_file_everybody_is_the_default_tenant_and_admin() -> None:
    assert open_access("home")(None) == open_access("home")("x") == Caller("home", Role.ADMIN, "home")


def test_bearer_tokens_are_taken_from_their_header() -> None:
    assert bearer_token(None) is None
    assert bearer_token("bEARER  a.b ") == "a.b"
    for wrong in ("", "Bearer", "Bearer ", "Basic abc", "abc"):
        with pytest.raises(Unauthenticated):
            bearer_token(wrong)
