"""Where others reach this worker: the host that is told to routers and peers, and how an address is written."""

from __future__ import annotations

import socket

from workers.config import WorkerConfig


def advertised_host(config: WorkerConfig) -> str:
    """What others dial: as set, or the bound host, or the node's address where all hosts are bound."""
    if config.advertise_host is not None:
        return config.advertise_host
    return _node_address() if config.bind_host in ("0.0.0.0", "::") else config.bind_host


def authority(host: str, port: int) -> str:
    """`host:port`."""
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def _node_address() -> str:
    """The address by which this node reaches others. Connecting a datagram socket sends nothing."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect(("192.0.2.1", 9))  # reserved for documentation: only its route matters
        except OSError:
            return "127.0.0.1"  # no route: nobody else could dial either
        return str(probe.getsockname()[0])
