"""`warmkv size`: its numbers against the tiers themselves, its words against what they stand for."""

from __future__ import annotations

import json
import re
import shlex
import time
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from deploy.model_shape import layout_of_config
from deploy.size import plan_sizes
from kvstore.codec import BlockCodec
from kvstore.device import DeviceTier
from kvstore.disk.tier import DiskTier
from kvstore.host.tier import HostTier
from kvstore.layout import KVLayout

if TYPE_CHECKING:
    from conftest import Warmkv

LLAMA = {"model_type": "llama", "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 8}
LLAMA |= {"hidden_size": 4096, "torch_dtype": "bfloat16"}
SMALL = KVLayout(layers=2, kv_heads=3, k_dim=20, v_dim=20, dtype="float32", block_size=16)


@pytest.fixture
def config(tmp_path: Path) -> Path:
    file = tmp_path / "config.json"
    file.write_text(json.dumps(LLAMA))
    return file


@pytest.mark.parametrize("capacity", [100_000, 1_000_000, 3_333_333])
@pytest.mark.parametrize("layout", [SMALL, replace(SMALL, block_size=1), replace(SMALL, kv_heads=8)], ids=str)
def test_tiers_really_hold_as_many_blocks(tmp_path: Path, layout: KVLayout, capacity: int) -> None:
    sizes = {"device": capacity, "host": capacity, "disk": capacity}
    plan = plan_sizes(layout, sizes, workers=1, conversation_tokens=16)
    told = {tier.name: tier.size.blocks for tier in plan.tiers}
    disk = DiskTier(tmp_path / "w0", capacity, codec=BlockCodec(layout, bytes(32)), clock=time.monotonic)
    host = HostTier(layout, capacity, clock=time.monotonic)
    try:
        device = DeviceTier(layout, capacity, clock=time.monotonic)
        assert told == {"device": device.num_blocks, "host": host.num_slots, "disk": disk.num_slots}
    finally:
        disk.close()
        host.close()


def test_a_tier_without_bytes_is_left_out_and_one_without_room_holds_nothing() -> None:
    plan = plan_sizes(SMALL, {"device": 10, "host": 0, "redis": 100}, workers=1, conversation_tokens=1)
    assert [(tier.name, tier.size.blocks) for tier in plan.tiers] == [("device", 0), ("redis", 0)]


def test_the_figures_of_the_design_come_out(warmkv: Warmkv, config: Path) -> None:
    sizes = ("--device-bytes", "40GiB", "--host-bytes", "200GiB", "--disk-bytes", "0", "--redis-bytes", "500GiB")
    speeds = ("--bandwidth", "host=47GB", "--bandwidth", "redis=1GB", "--prefill-tokens-per-s", "32000")
    done = warmkv.invoke("size", "--model", str(config), *sizes, *speeds, "--json")
    answer = json.loads(done.stdout)
    assert answer["layout"]["token_bytes"] == 131072
    assert answer["break_even_bytes_per_s"] == 131072 * 32000
    tiers = {tier["tier"]: tier for tier in answer["tiers"]}
    assert list(tiers) == ["device", "host", "redis"]
    assert (tiers["host"]["tokens"], tiers["host"]["conversations"]) == (1638400, 163)
    assert tiers["host"]["speedup"] == pytest.approx(47e9 / (131072 * 32000))
    assert (tiers["redis"]["of"], tiers["host"]["of"]) == ("fleet", "worker")
    assert tiers["redis"]["worth_tokens"] is None
    text = warmkv.invoke("size", "--model", str(config.parent), *sizes, *speeds).stdout
    assert "128.0 KiB of K/V" in text
    assert "11.2 times as fast" in text
    assert "slower (0.24): blocks are computed" in text


def test_sizes_that_are_not_given_are_those_of_the_settings(warmkv: Warmkv, config: Path) -> None:
    chosen = ("--set", "store.host_bytes=8GiB", "--set", "store.block_size=32", "--set", "model.dtype=float32")
    answer = json.loads(warmkv.invoke("size", "--model", str(config), *chosen, "--json").stdout)
    assert {tier["tier"]: tier["capacity_bytes"] >> 30 for tier in answer["tiers"]} == {
        "device": 1,
        "host": 8,
        "disk": 4,
    }
    assert answer["layout"] == {
        "layers": 32,
        "kv_heads": 8,
        "k_dim": 128,
        "v_dim": 128,
        "dtype": "float32",
        "block_size": 32,
        "kv_dtype": "auto",
        "token_bytes": 262144,
        "block_bytes": 8388608,
    }
    assert answer["break_even_bytes_per_s"] is None
    assert layout_of_config(LLAMA).block_size == 16


def test_a_quantised_store_holds_twice_the_tokens(warmkv: Warmkv, config: Path) -> None:
    asked = ("size", "--model", str(config), "--device-bytes", "40GiB", "--disk-bytes", "0")
    plain = json.loads(warmkv.invoke(*asked, "--json").stdout)
    quantised = json.loads(warmkv.invoke(*asked, "--set", "engine.kv_dtype=int8", "--json").stdout)
    assert quantised["layout"]["token_bytes"] == 32 * 8 * 260
    pairs = zip(plain["tiers"], quantised["tiers"], strict=True)
    assert all(1.9 < other["tokens"] / one["tokens"] < 2 for one, other in pairs)
    text = warmkv.invoke(*asked, "--set", "engine.kv_dtype=int8").stdout
    assert "layout      L32 KVH8 K128 V128 bfloat16 B16 int8/row\n" in text
    assert "65.0 KiB of K/V as int8; 128.0 KiB as bfloat16" in text


def test_the_examples_of_the_documentation_are_what_the_command_prints(
    warmkv: Warmkv, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    page = (Path(__file__).resolve().parents[2] / "docs" / "operations.md").read_text()
    section = page[page.index("\n## Sizing") :].partition("\n## ")[2].partition("\n## ")[0]
    config, *runs = re.findall(r"^```\w*\n(.*?)^```", section, re.DOTALL | re.MULTILINE)
    (tmp_path / "config.json").write_text(config)
    monkeypatch.chdir(tmp_path)
    assert len(runs) == 4
    for command, output in (runs[:2], runs[2:]):
        done = warmkv.invoke(*shlex.split(command.replace("\\\n", " "))[1:])
        assert done.stdout == output


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("--model", "/nowhere"), "give --model"),
        ((), "give --model"),
        (("--bandwidth", "ram=1GB"), "TIER one of device, host, disk, redis"),
        (("--bandwidth", "redis"), "no byte size"),
        (("--redis-bytes", "much"), "--redis-bytes: 'much' is no byte size"),
        (("--host-bytes", "4X"), "store.host_bytes"),
        (("--prefill-tokens-per-s", "0"), "more than zero"),
        (("--prefill-tokens-per-s", "nan"), "more than zero"),
    ],
)
def test_wrong_usage_is_one_line_and_code_2(
    warmkv: Warmkv, config: Path, arguments: tuple[str, ...], says: str
) -> None:
    model = () if not arguments or arguments[0] == "--model" else ("--model", str(config))
    done = warmkv.invoke("size", *model, *arguments)
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (2, "", 1)
    assert says in done.stderr


def test_a_file_that_is_no_configuration_is_named(warmkv: Warmkv, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("[1]")
    assert "no JSON object" in warmkv.invoke("size", "--model", str(tmp_path)).stderr
    (tmp_path / "config.json").write_text("[" * 100_000)
    done = warmkv.invoke("size", "--model", str(tmp_path))
    assert (done.returncode, done.stderr.count("\n"), "cannot be read" in done.stderr) == (2, 1, True)
