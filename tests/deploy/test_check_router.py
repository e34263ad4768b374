"""What would keep a router from starting is found before Ray and workers are started."""

from __future__ import annotations

import base64
import socket
from pathlib import Path

import pytest

from deploy.layers import SettingsProblem, load_settings
from deploy.render import number_text
from deploy.up import check_router, check_store
from kvstore.errors import KeyringError
from router.app import STARTUP_ERRORS


def test_good_settings_pass() -> None:
    check_router(load_settings(flags={"router.grpc_port": 0, "router.http_port": 0}, environ={}).settings)


@pytest.mark.parametrize(
    ("flags", "word"),
    [
        ({"router.policy": "fastest"}, "cache_aware"),
        ({"router.weights": {"nonsense": 1.0}}, "nonsense"),
        ({"auth.api_keys_file": "no-such-keys.toml"}, "no-such-keys"),
        ({"tls.cert": "no-such-cert.pem", "tls.key": "no-such-key.pem"}, "no-such"),
    ],
    ids=["policy", "weight", "keys", "tls"],
)
def test_bad_settings_are_named(flags: dict[str, object], word: str) -> None:
    loaded = load_settings(flags={"router.grpc_port": 0, "router.http_port": 0, **flags}, environ={})
    with pytest.raises(STARTUP_ERRORS, match=word):
        check_router(loaded.settings)


@pytest.mark.parametrize("setting", ["router.tenant_weights", "router.tokens_per_minute"])
def test_a_tenant_without_a_key_has_no_weight_and_no_quota(setting: str, tmp_path: Path) -> None:
    keys = tmp_path / "keys.toml"
    keys.write_text('[[keys]]\nkey = "a"\ntenant = "team-a"\n', encoding="utf-8")
    flags = {"router.grpc_port": 0, "router.http_port": 0, "auth.api_keys_file": keys}
    check_router(load_settings(flags={**flags, setting: {"team-a": 5}}, environ={}).settings)
    with pytest.raises(SettingsProblem, match=f"{setting} names 'team-x'"):
        check_router(load_settings(flags={**flags, setting: {"team-x": 5}}, environ={}).settings)
    with pytest.raises(SettingsProblem, match="'team-x' is not above 0"):
        load_settings(flags={setting: {"team-x": 0}}, environ={})


def test_a_taken_port_is_named_with_its_flag(tmp_path: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        flags = {"router.grpc_port": taken.getsockname()[1], "router.http_port": 0}
        with pytest.raises(STARTUP_ERRORS, match="--grpc-port"):
            check_router(load_settings(flags=flags, environ={}).settings)


@pytest.mark.parametrize(("value", "text"), [(1048576.0, "1048576"), (0.5, "0.5"), (0.0, "0"), (1 / 3, "0.333333")])
def test_numbers_are_written_for_people(value: float, text: str) -> None:
    assert number_text(value) == text


@pytest.mark.parametrize("text", [None, "", "no key", "a:c2hvcnQ="])
def test_keys_that_no_worker_could_use_are_refused_before_anything_starts(tmp_path: Path, text: str | None) -> None:
    path = tmp_path / "keys"
    if text is not None:
        path.write_text(text)
    with pytest.raises(KeyringError, match=r"; |: "):
        check_store(load_settings(flags={"store.keys_file": str(path)}, environ={}).settings)


def test_good_keys_reach_the_workers(tmp_path: Path) -> None:
    path = tmp_path / "keys"
    path.write_text(f"first:{base64.b64encode(bytes(range(32))).decode()}\n")
    flags = {"store.keys_file": str(path), "store.protection": "encrypt"}
    settings = load_settings(flags=flags, environ={}).settings
    check_store(settings)
    config = settings.worker_config("w0", fleet_secret="")
    assert (config.store_keys, config.protection) == (path.read_text(), "encrypt")
    assert "first" not in repr(config)


@pytest.mark.parametrize("key", ["store.admission", "redis.admission"])
def test_writing_what_host_evicts_needs_a_host_tier(key: str) -> None:
    flags = {key: "on_eviction", "store.host_bytes": 0}
    with pytest.raises(SettingsProblem, match=rf"{key} is on_eviction.* give it bytes, or choose"):
        check_store(load_settings(flags=flags, environ={}).settings)
    check_store(load_settings(flags={key: "on_eviction"}, environ={}).settings)
