"""What it takes to read blocks from another worker, against a plain socket. A part of `bench.store`.

Both workers run in this process, over loopback TCP; 2 MiB blocks, 16 a read. The plain socket sends the same bytes with
`sendall` and receives them straight into the same buffers, in the same rounds.
"""

from __future__ import annotations

import os
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial

from bench.report import Report, arguments
from kvstore.blocks import BlockHash, block_hashes
from kvstore.codec import BlockCodec
from kvstore.crypto import Keyring, Protection
from kvstore.host.tier import HostTier
from kvstore.layout import KVLayout
from kvstore.peer.server import PeerServer
from kvstore.peer.tier import PeerTier
from kvstore.tier import chain_metas

LAYOUT = KVLayout(layers=32, kv_heads=8, k_dim=128, v_dim=128, dtype="bfloat16", block_size=16)
RUN = 16
LOOK_UP = 256
NAMESPACE, ROOT = b"n" * 32, BlockHash(b"r" * 32)
PATIENT_S = 10.0


def rows(report: Report, quick: bool) -> None:
    """Add the peer tier's rows to `report`. Half a minute; some seconds with `quick`."""
    rounds = 9 if quick else 25
    names = block_hashes(range(RUN * LAYOUT.block_size), ROOT, LAYOUT.block_size)
    payloads = [memoryview(os.urandom(LAYOUT.block_nbytes)) for _ in names]
    into = [memoryview(bytearray(LAYOUT.block_nbytes)) for _ in names]
    host = HostTier(LAYOUT, RUN * LAYOUT.block_nbytes, clock=time.monotonic)
    host.write(chain_metas(names, before=ROOT, root=ROOT, ttl_s=None), payloads)
    keyring = Keyring({"bench": os.urandom(32)})
    with (
        plain_socket(payloads, into) as receive,
        peer(host, BlockCodec(LAYOUT, NAMESPACE)) as plain,
        peer(host, BlockCodec(LAYOUT, NAMESPACE, keyring, Protection.AUTHENTICATE)) as signed,
        peer(host, BlockCodec(LAYOUT, NAMESPACE, keyring, Protection.ENCRYPT)) as secret,
    ):
        tiers = {"raw": plain, "authenticate": signed, "encrypt": secret}
        taken: dict[str, list[float]] = {"socket": [], **{name: [] for name in tiers}}
        for _ in range(rounds):
            taken["socket"].append(seconds(receive))
            for name, tier in tiers.items():
                taken[name].append(seconds(partial(read_all, tier, names, into)))
        many = names * (LOOK_UP // RUN)
        look_ups = [1e3 * seconds(lambda: plain.match(many)) for _ in range(10 * rounds)]
    host.close()
    for name, times in taken.items():
        report.add(f"peer_read_{name}_gbps", [RUN * LAYOUT.block_nbytes / s / 1e9 for s in times], "GB/s")
    ratios = [wire / ours for wire, ours in zip(taken["socket"], taken["raw"], strict=True)]
    report.add("peer_read_vs_socket_ratio", ratios, "ratio")
    report.add("peer_lookup_256_ms", look_ups, "ms")


@contextmanager
def peer(host: HostTier, codec: BlockCodec) -> Iterator[PeerTier]:
    """A server of that tier and its reader."""
    server = PeerServer(host, codec=codec, secret="bench")
    tier = PeerTier(server.address, codec=codec, secret="bench", timeout_s=PATIENT_S)
    try:
        yield tier
    finally:
        tier.close()
        server.close()


@contextmanager
def plain_socket(payloads: list[memoryview], into: list[memoryview]) -> Iterator[Callable[[], None]]:
    """Receives all payloads when it is called."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        thread = threading.Thread(target=_send_when_asked, args=(listener, payloads))
        thread.start()
        with socket.create_connection(listener.getsockname()) as sock:

            def receive() -> None:
                sock.sendall(b"?")
                for buffer in into:
                    sock.recv_into(buffer, 0, socket.MSG_WAITALL)

            yield receive
        thread.join()


def _send_when_asked(listener: socket.socket, payloads: list[memoryview]) -> None:
    sock, _ = listener.accept()
    with sock:
        while sock.recv(1):
            for payload in payloads:
                sock.sendall(payload)


def read_all(tier: PeerTier, names: list[BlockHash], into: list[memoryview]) -> None:
    """Read, and check that everything arrived: a miss is fast, too."""
    if tier.read(names, into).count != len(names):
        raise RuntimeError(f"not all blocks arrived: {tier.stats()}; run it on a quieter machine")


def seconds(call: Callable[[], object]) -> float:
    """How long a call takes."""
    started = time.perf_counter()
    call()
    return time.perf_counter() - started


def main() -> None:
    """Print the table."""
    options = arguments(__doc__)
    report = Report("store_peer")
    rows(report, options.quick)
    report.print(as_json=options.json)


if __name__ == "__main__":
    main()
