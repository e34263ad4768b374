"""A Ray of two nodes that is not ours, for tests: says its address and its processes, and loses a node when told to.

Lines out: {"address": ..., "pids": [...]}; then, for each line in, "second" (kill the second node): {"killed": [...]}.
Ends all of it when its standard input closes.
"""

from __future__ import annotations

import json
import os
import sys

import psutil


def main() -> None:
    from ray.cluster_utils import Cluster

    say = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    common = {"object_store_memory": 80 << 20, "include_dashboard": False}
    cluster = Cluster(
        initialize_head=True,
        head_node_args={**common, "node_ip_address": "127.0.0.2", "num_cpus": 1, "no_monitor": True},
    )
    second = cluster.add_node(**common, node_ip_address="127.0.0.3", num_cpus=1)
    cluster.wait_for_nodes()
    try:
        say.write(json.dumps({"address": cluster.address, "pids": _pids()}) + "\n")
        for line in sys.stdin:
            if line.strip() == "second":
                before = set(_pids())
                cluster.remove_node(second, allow_graceful=False)
                say.write(json.dumps({"killed": sorted(before - set(_pids()))}) + "\n")
    finally:
        cluster.shutdown()


def _pids() -> list[int]:
    children = psutil.Process().children(recursive=True)
    return [child.pid for child in children if child.status() != psutil.STATUS_ZOMBIE]


if __name__ == "__main__":
    main()
