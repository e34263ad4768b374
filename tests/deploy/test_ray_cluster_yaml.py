"""deploy/ray/cluster.yaml: what Ray's own schema accepts, with the Ray that the lock names."""

import importlib.util
import json
import re
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml

from deploy.doctor_ray import RAY_VERSION

ROOT = Path(__file__).resolve().parents[2]
PATH = ROOT / "deploy" / "ray" / "cluster.yaml"


@pytest.fixture(scope="module")
def cluster() -> Any:
    return yaml.safe_load(PATH.read_text())


def test_ray_accepts_it(cluster: Any) -> None:
    spec = importlib.util.find_spec("ray")
    assert spec is not None
    assert spec.origin is not None
    schema = json.loads((Path(spec.origin).parent / "autoscaler" / "ray-schema.json").read_text())
    jsonschema.validate(cluster, schema)


def test_it_names_the_ray_of_the_lock_everywhere() -> None:
    locked = re.search(r"^ray==(\S+)$", (ROOT / "requirements.lock").read_text(), re.M)
    assert locked is not None
    assert set(re.findall(r"(?:ray\[default\]==|releases-)([\d.]+\d)", PATH.read_text())) == {locked[1]}
    assert locked[1] == RAY_VERSION
    assert f'"ray[default]=={locked[1]}"' in (ROOT / "pyproject.toml").read_text()


def test_workers_find_room_on_gpu_nodes_only(cluster: Any) -> None:
    types = cluster["available_node_types"]
    assert types[cluster["head_node_type"]]["resources"] == {"CPU": 0}
    assert types["gpu"]["resources"]["GPU"] == 1
    assert types["gpu"]["resources"]["CPU"] >= 1
    assert types["gpu"]["max_workers"] <= cluster["max_workers"]
