"""What the doctor says of engine settings is what a worker says that is started with them."""

from __future__ import annotations

from pathlib import Path

import pytest

from deploy.doctor_engine import check_engine
from deploy.finding import Finding
from deploy.layers import load_settings
from deploy.settings import Settings
from workers.build import build_engine
from workers.tiny import ModelShape, make_model_folder

TINY = ModelShape(layers=1, hidden=32, heads=2, kv_heads=1, vocab=512, context_length=256)


def _settings(flags: dict[str, object]) -> Settings:
    return load_settings(environ={}, flags=flags).settings


def _findings(flags: dict[str, object]) -> list[Finding]:
    return list(check_engine(_settings(flags), Path()))


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model_folder(tmp_path_factory.mktemp("tiny"), TINY)


@pytest.mark.parametrize(
    ("flags", "named"),
    [
        ({"engine.deterministic": "true", "engine.kv_dtype": "int8"}, "engine.kv_dtype"),
        ({"engine.deterministic": "true", "workers.tensor_parallel": 2}, "workers.tensor_parallel"),
        ({"engine.deterministic": "true", "engine.compile": "true", "workers.device": "auto"}, "engine.compile"),
        ({"engine.deterministic": "true", "workers.threads": 3}, "workers.threads"),
        ({"engine.deterministic": "true", "engine.cuda_graphs": "on", "workers.device": "auto"}, "engine.cuda_graphs"),
        ({"engine.cuda_graphs": "on"}, "workers.device is cpu"),
        ({"engine.compile": "true"}, "workers.device is cpu"),
        ({"engine.cuda_graphs": "on", "workers.tensor_parallel": 2}, "workers.tensor_parallel"),
    ],
)
def test_what_a_worker_refuses_at_its_start_is_a_failure_here(
    flags: dict[str, object], named: str, model: Path
) -> None:
    flags = {"workers.device": "cpu", **flags}
    found = _findings(flags)
    assert {finding.level for finding in found} == {"fail"}
    assert named in " ".join(finding.found + finding.remedy for finding in found)
    sizes = {"model.dir": str(model), "store.device_bytes": "4MiB", "store.host_bytes": 0, "store.disk_bytes": 0}
    with pytest.raises(ValueError, match="set "):
        build_engine(_settings(flags | sizes).worker_config("w0", fleet_secret=""))


@pytest.mark.parametrize(
    "flags",
    [
        {},
        {"engine.deterministic": "true", "workers.threads": 2},
        {"engine.kv_dtype": "int8", "engine.cuda_graphs": "on", "engine.compile": "true", "workers.device": "cuda"},
    ],
)
def test_settings_that_go_together_are_said_to_be(flags: dict[str, object]) -> None:
    assert [finding.level for finding in _findings({"workers.device": "cpu", **flags})] == ["ok"]


@pytest.mark.parametrize(
    ("flags", "named"),
    [
        ({"store.peers": "false"}, "store.peers"),
        ({"store.host_bytes": 0}, "store.host_bytes"),
        ({"workers.roles": "prefill=2"}, "role decode"),
        ({"workers.roles": "decode=2"}, "role prefill"),
        ({"workers.roles": "prefill=1,decode=2"}, "workers.count to 3"),
        ({"tls.worker_cert": "cert.pem", "tls.worker_key": "key.pem"}, "store.protection to encrypt"),
    ],
)
def test_roles_that_are_of_no_use_are_told(flags: dict[str, object], named: str) -> None:
    roles = {"workers.count": 2, "workers.roles": "prefill=1,decode=1"}
    assert [finding.level for finding in _findings(roles)] == ["ok"]
    assert [finding.level for finding in _findings(roles | {"workers.tensor_parallel": 2})] == ["ok"]
    found = _findings(roles | flags)
    assert [finding.level for finding in found] == ["warn"]
    assert named in found[0].remedy
