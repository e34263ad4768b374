"""From a tenant's name in the settings to the blocks that a worker keeps for it."""

from __future__ import annotations

from pathlib import Path

import pytest

from deploy.layers import SettingsProblem, load_settings
from deploy.settings import Settings
from deploy.up import check_store
from kvstore.blocks import HashScheme
from router.salts import group_salt
from workers.build import _shares

SCHEME = HashScheme(b"f" * 32, "layout", 16)
KEYS = """
[[keys]]
key = "a"
tenant = "team-a"
[[keys]]
key = "b"
tenant = "team-b"
trust_group = "company"
[[keys]]
key = "c"
tenant = "team-c"
trust_group = "company"
"""


def settings_with(tmp_path: Path, **quotas: float) -> Settings:
    keys = tmp_path / "keys.toml"
    keys.write_text(KEYS, encoding="utf-8")
    return load_settings(environ={}, flags={"store.quotas": quotas, "auth.api_keys_file": keys}).settings


def shares(settings: Settings, *groups: str) -> list[int | None]:
    """Of a tier of 1,000 bytes, as a worker reads its configuration."""
    config = settings.worker_config("w0", fleet_secret="s")
    found = _shares(config, SCHEME, 1000) or {}
    assert len(found) == len(groups)
    return [found.get(SCHEME.root(group_salt("s", group))) for group in groups]


def test_a_tenants_share_is_that_of_the_root_of_its_blocks(tmp_path: Path) -> None:
    settings = settings_with(tmp_path, **{"team-a": 0.25, "team-b": 0.5})
    check_store(settings)
    assert shares(settings, "team-a", "company") == [250, 500]


def test_tenants_who_share_their_blocks_have_their_shares_together(tmp_path: Path) -> None:
    assert shares(settings_with(tmp_path, **{"team-b": 0.25, "team-c": 0.5}), "company") == [750]


def test_without_keys_everybody_is_the_default_tenant() -> None:
    settings = load_settings(environ={}, flags={"store.quotas": "{default = 0.5}"}).settings
    check_store(settings)
    assert shares(settings, "default") == [500]
    with pytest.raises(SettingsProblem, match=r"'team-a' .* name a keys file"):
        check_store(load_settings(environ={}, flags={"store.quotas": "{team-a = 0.5}"}).settings)


def test_a_tenant_without_a_key_is_refused_before_anything_starts(tmp_path: Path) -> None:
    with pytest.raises(SettingsProblem, match=r"'team-x' .* correct the name"):
        check_store(settings_with(tmp_path, **{"team-x": 0.5}))


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("{a = 0.6, b = 0.5}", "1.1 together"),
        ("{a = 0}", "'a' is not above 0"),
        ("{a = 1.5}", "'a' is not above 0"),
        ("{a = -0.5}", "'a' is not above 0"),
    ],
)
def test_shares_that_no_tier_could_give_are_refused(text: str, said: str) -> None:
    with pytest.raises(SettingsProblem, match=said) as refused:
        load_settings(environ={}, flags={"store.quotas": text})
    assert "store.quotas" in str(refused.value)


def test_quotas_come_from_file_environment_and_flags(tmp_path: Path) -> None:
    file = tmp_path / "warmkv.toml"
    file.write_text('[store.quotas]\n"team-a" = 0.5\n', encoding="utf-8")
    assert load_settings(environ={}, file=file).settings.store.quotas == {"team-a": 0.5}
    environ = {"WARMKV_STORE__QUOTAS": '{"Team-B": 0.25}'}
    assert load_settings(environ=environ, file=file).settings.store.quotas == {"Team-B": 0.25}
    assert load_settings(environ=environ, flags={"store.quotas": "{c = 1}"}).settings.store.quotas == {"c": 1.0}
