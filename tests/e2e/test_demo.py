"""`warmkv demo` as a newcomer runs it, only shorter."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from deploy.redis_server import find_redis_server

WARMKV = Path(sys.executable).with_name("warmkv")


@pytest.mark.skipif(shutil.which("warmkv", path=str(WARMKV.parent)) is None, reason="warmkv is not installed here")
def test_the_demo_plays_three_acts_and_prints_one_object(tmp_path: Path) -> None:
    command = [str(WARMKV), "demo", "--json", "--workers", "2", "--duration", "12", "--port", "0", "--http-port", "0"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=240, cwd=tmp_path, check=False)
    assert done.returncode == 0, done.stderr
    said = json.loads(done.stdout)
    assert said["workers"] == 2
    assert said["first_token_s"] > 0
    acts = {act["name"]: act for act in said["acts"]}
    names = ["round_robin", "cache_aware", "after restart"] if find_redis_server() else ["round_robin", "cache_aware"]
    assert list(acts) == names
    for act in acts.values():
        assert act["failed"] == 0
        assert sum(act["tokens_by_fate"].values()) == act["prompt_tokens"] > 0
        assert act["ttft_p50_ms"] <= act["ttft_p95_ms"]
    first, second = acts["round_robin"], acts["cache_aware"]
    # The same requests, and none of their blocks from the shared tier.
    assert (first["requests"], first["prompt_tokens"]) == (second["requests"], second["prompt_tokens"])
    assert first["tokens_by_fate"]["redis"] == second["tokens_by_fate"]["redis"] == 0
    if find_redis_server():
        assert acts["after restart"]["tokens_by_fate"]["redis"] > 0
        assert acts["after restart"]["tokens_by_fate"]["computed"] < acts["after restart"]["prompt_tokens"] / 4
