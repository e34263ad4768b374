"""The settings and the configurations that are made of them."""

from dataclasses import fields
from pathlib import Path

import pytest
from pydantic import ValidationError

from deploy.layers import SettingsProblem, load_settings
from deploy.settings import Settings
from router.config import RouterConfig, TlsFiles
from workers.config import WorkerConfig


def test_defaults_are_those_of_the_parts() -> None:
    settings = Settings()
    worker = settings.worker_config("w0", fleet_secret="")
    plain = WorkerConfig(name="w0", model_dir=worker.model_dir, model_name=worker.model_name)
    # Loopback where the workers are on loopback: what is dialled is what is bound. A disk and peers are for a user's
    # fleet only.
    own = {"advertise_host", "disk_bytes", "peers"}
    assert {f.name for f in fields(worker) if getattr(worker, f.name) != getattr(plain, f.name)} == own
    router = settings.router_config("r", model_dir="m", fleet_secret="")
    assert router == RouterConfig(name="r", model_dir="m", model_name=router.model_name)


def test_an_index_too_small_to_work_is_refused_with_what_to_give() -> None:
    with pytest.raises(SettingsProblem, match=r"1MiB is too small for an index; give it at least 16MiB"):
        load_settings(environ={"WARMKV_ROUTER__INDEX_BYTES": "1MiB"})
    assert load_settings(environ={"WARMKV_ROUTER__INDEX_BYTES": "16MiB"}).settings.router.index_bytes == 16 << 20


def test_every_value_reaches_its_part() -> None:
    settings = load_settings(
        environ={},
        flags={
            "model.name": "m",
            "model.context_length": 99,
            "workers.engine": "simulated",
            "workers.threads": 3,
            "workers.max_running": 5,
            "store.device_bytes": "2MiB",
            "store.host_bytes": 0,
            "store.default_ttl": "never",
            "store.block_size": 32,
            "engine.kv_dtype": "fp8_e4m3",
            "redis.url": "redis://:pw@h/0",
            "redis.timeout": "20ms",
            "store.load_slack": "70ms",
            "router.weights": "{load = 2}",
            "router.http_port": "none",
            "router.default_deadline": "never",
            "router.drain_grace": "1m",
            "router.max_worker_queue": "never",
            "router.max_queue_wait": "5s",
            "router.tenant_weights": "{a = 2}",
            "router.tokens_per_minute": "{b = 1000}",
            "router.default_tokens_per_minute": 50,
            "tls.cert": "/c",
            "tls.key": "/k",
            "tls.worker_ca": "/w",
        },
    ).settings
    worker = settings.worker_config("w7", fleet_secret="s", threads=9)
    assert (worker.name, worker.fleet_secret, worker.threads) == ("w7", "s", 3)
    assert (worker.model_name, worker.engine, worker.context_length) == ("m", "simulated", 99)
    assert (worker.device_bytes, worker.host_bytes, worker.default_ttl_s) == (2 << 20, 0, None)
    assert (worker.block_size, worker.redis_url, worker.redis_timeout_s) == (32, "redis://:pw@h/0", 0.02)
    assert (worker.load_slack_s, worker.kv_dtype) == (0.07, "fp8_e4m3")
    router = settings.router_config("r", model_dir="d", fleet_secret="s")
    assert (router.weights, router.http_port, router.default_deadline_s) == ({"load": 2.0}, None, None)
    over = router.overload
    assert (over.max_worker_queue_s, over.max_queue_wait_s, over.default_tokens_per_minute) == (None, 5.0, 50)
    assert (over.tenant_weights, over.tokens_per_minute) == ({"a": 2.0}, {"b": 1000})
    assert (router.drain_grace_s, router.tls, router.worker_ca) == (60.0, TlsFiles("/c", "/k"), "/w")


def test_workers_stay_on_loopback_unless_they_join_a_cluster() -> None:
    alone = Settings().worker_config("w0", fleet_secret="s")
    assert (alone.bind_host, alone.advertise_host) == ("127.0.0.1", "127.0.0.1")
    joined = load_settings(environ={}, flags={"ray.address": "10.0.0.1:6379"}).settings
    there = joined.worker_config("w0", fleet_secret="s")
    assert (there.bind_host, there.advertise_host) == ("0.0.0.0", None)


def test_the_model_is_named_after_its_folder() -> None:
    settings = load_settings(environ={}, flags={"model.dir": "/models/Qwen3-0.6B"}).settings
    assert settings.model_name == "Qwen3-0.6B"


def test_settings_cannot_be_changed_afterwards() -> None:
    settings = Settings()
    with pytest.raises(ValidationError):
        settings.store = settings.store
    with pytest.raises(ValidationError):
        settings.store.host_bytes = 1


def test_paths_are_absolute_because_workers_run_in_another_folder() -> None:
    flags = {"model.dir": "m", "tls.worker_cert": "c", "tls.worker_key": "k", "auth.api_keys_file": "a"}
    settings = load_settings(environ={}, flags=flags).settings
    worker, here = settings.worker_config("w0", fleet_secret=""), str(Path.cwd())
    assert (worker.model_dir, worker.tls_cert, worker.tls_key) == (f"{here}/m", f"{here}/c", f"{here}/k")
    assert settings.router_config("r", model_dir="m", fleet_secret="").api_keys_file == f"{here}/a"


def test_a_certificate_without_its_key_is_refused() -> None:
    with pytest.raises(SettingsProblem, match=r"tls\.cert and tls\.key"):
        load_settings(environ={}, flags={"tls.cert": Path("c.pem")})


def test_every_setting_says_what_it_means() -> None:
    assert [row.key for row in load_settings(environ={}).rows() if not row.help] == []


def test_the_threshold_of_tail_optimized_reaches_the_worker() -> None:
    settings = load_settings(environ={}, flags={"store.tail_threshold": "2s"}).settings
    assert settings.worker_config("w0", fleet_secret="").tail_threshold_s == 2.0
    with pytest.raises(SettingsProblem, match=r"store\.tail_threshold"):
        load_settings(environ={}, flags={"store.tail_threshold": 0})


def test_rules_of_admission_reach_the_worker_each_for_its_tier() -> None:
    settings = load_settings(environ={}, flags={"store.admission": "on_eviction", "redis.admission": "always"}).settings
    worker = settings.worker_config("w0", fleet_secret="")
    assert (worker.admission, worker.redis_admission) == ("on_eviction", "always")
