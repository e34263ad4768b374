"""The disk tier beside the disk: writes against raw direct writes, reads, and how soon a restart has its blocks back.

Covers: 2 MiB blocks through `DiskTier`, checksums, header and log included, against `pwrite` and `pread` of as many
bytes with O_DIRECT into a preallocated file beside it, by one thread, in turns; a restart with 100,000 small blocks.
Does not cover: power cuts (nothing here waits for the device), tiers above it.

The folder is a new one in the working directory, as the system's temporary one is often in memory. Where the file
system has no direct I/O, both sides are buffered and the row `disk_direct` says 0.
"""

from __future__ import annotations

import os
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import count
from pathlib import Path

import numpy as np

from bench.report import Report, arguments
from kvstore.blocks import BlockHash, block_hashes
from kvstore.buffers import aligned
from kvstore.codec import BlockCodec
from kvstore.disk.files import DIRECT, PAGE_NBYTES
from kvstore.disk.slab import slot_nbytes
from kvstore.disk.tier import DiskTier
from kvstore.layout import KVLayout
from kvstore.tier import BlockMeta, chain_metas

LAYOUT = KVLayout(layers=32, kv_heads=8, k_dim=128, v_dim=128, dtype="bfloat16")  # Llama-3-8B: 2 MiB a block
SMALL = KVLayout(layers=2, kv_heads=1, k_dim=8, v_dim=8, dtype="float32")  # 2 KiB: for their number
ROOT = BlockHash(b"r" * 32)
BATCH = 32
SLOTS = 2 * BATCH  # half of them hold what the batch before wrote, so that every write evicts
RESTART_BLOCKS = 100_000


class RawFile:
    """As many slots of the same size, written and read with nothing around it."""

    def __init__(self, path: Path, *, direct: bool) -> None:
        self._fd = os.open(path, os.O_RDWR | os.O_CREAT | (DIRECT if direct else 0), 0o600)
        self._step = slot_nbytes(LAYOUT.block_nbytes)
        os.posix_fallocate(self._fd, 0, SLOTS * self._step)
        self._next = 0

    def write(self, buffers: list[memoryview]) -> None:
        for buffer in buffers:
            self._next = (self._next + 1) % SLOTS
            if os.pwrite(self._fd, buffer, self._next * self._step) != len(buffer):
                raise OSError("a raw write came short")

    def read(self, buffers: list[memoryview]) -> None:
        for number, buffer in enumerate(buffers):
            if os.preadv(self._fd, [buffer], number * self._step) != len(buffer):
                raise OSError("a raw read came short")

    def close(self) -> None:
        os.close(self._fd)


@contextmanager
def scratch() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="bench-disk-", dir=Path.cwd()) as folder:
        yield Path(folder)


def chains(layout: KVLayout, length: int) -> Iterator[list[BlockMeta]]:
    """Chains without end, none of which shares a block with another."""
    for first in count():
        tokens = [first, *range(1, layout.block_size * length)]
        names = block_hashes(tokens, ROOT, layout.block_size)
        yield chain_metas(names, before=ROOT, root=ROOT, ttl_s=3600.0)


def timed(work: object, *arguments: object) -> float:
    started = time.perf_counter()
    work(*arguments)  # type: ignore[operator]
    return time.perf_counter() - started


def throughput(report: Report, folder: Path, *, rounds: int) -> None:
    """Writes and reads of 2 MiB blocks, raw and through the tier in turns."""
    capacity = PAGE_NBYTES + SLOTS * slot_nbytes(LAYOUT.block_nbytes)
    tier = DiskTier(folder / "tier", capacity, codec=BlockCodec(LAYOUT, b"n" * 32), clock=time.monotonic)
    raw = RawFile(folder / "raw", direct=tier.is_direct)
    rng = np.random.default_rng(1)
    sources = [aligned(LAYOUT.block_nbytes) for _ in range(BATCH)]
    for source in sources:
        source[:] = rng.bytes(LAYOUT.block_nbytes)
    targets = [aligned(LAYOUT.block_nbytes) for _ in range(BATCH)]
    gigabytes = BATCH * LAYOUT.block_nbytes / 1e9
    seconds: dict[str, list[float]] = {name: [] for name in ("write", "raw_write", "read", "raw_read", "write_cpu")}
    for turn, metas in enumerate(chains(LAYOUT, BATCH)):
        names = [meta.hash for meta in metas]
        cpu = time.process_time()
        wrote = timed(tier.write, metas, sources)
        cpu = time.process_time() - cpu
        if turn < 4:
            raw.write(sources)  # until every slot of both files has been written once
            continue
        figures = (wrote, timed(raw.write, sources), timed(tier.read, names, targets), timed(raw.read, targets), cpu)
        for name, figure in zip(seconds, figures, strict=True):
            seconds[name].append(figure)
        if turn == rounds + 3:
            break
    tier.read(names, targets)
    if targets != sources or tier.stats().misses:
        raise RuntimeError("the disk tier did not give back what it was given")
    report.add("disk_direct", [float(tier.is_direct)], "bool")
    for kind in ("write", "read"):
        ratios = [raw_s / tier_s for raw_s, tier_s in zip(seconds[f"raw_{kind}"], seconds[kind], strict=True)]
        report.add(f"disk_{kind}_2mib_gbps", [gigabytes / s for s in seconds[kind]], "GB/s")
        report.add(f"disk_raw_{kind}_2mib_gbps", [gigabytes / s for s in seconds[f"raw_{kind}"]], "GB/s")
        report.add(f"disk_{kind}_vs_raw_ratio", ratios, "ratio", bar=">= 0.85")
    report.add("disk_write_cpu_s_per_gb", [cpu / gigabytes for cpu in seconds["write_cpu"]], "s/GB")
    tier.close()
    raw.close()


def restart(report: Report, folder: Path, *, rounds: int) -> None:
    """From opening a folder of 100,000 blocks to having found and read some of them."""
    length = 100
    codec, capacity = BlockCodec(SMALL, b"n" * 32), PAGE_NBYTES + RESTART_BLOCKS * slot_nbytes(SMALL.block_nbytes)
    data = [memoryview(bytes(SMALL.block_nbytes))] * length
    target = [aligned(SMALL.block_nbytes) for _ in range(length)]

    def open_tier() -> DiskTier:
        return DiskTier(folder / "many", capacity, codec=codec, clock=time.monotonic, direct=False)

    tier = open_tier()
    for number, metas in enumerate(chains(SMALL, length), 1):
        tier.write(metas, data)
        if number * length == RESTART_BLOCKS:
            break
    names = [meta.hash for meta in metas]
    tier.close()
    seconds, opened = [], []
    for _ in range(rounds):
        started = time.perf_counter()
        tier = open_tier()
        opened.append(time.perf_counter() - started)
        if (
            tier.stats().blocks != RESTART_BLOCKS
            or tier.match(names) != length
            or tier.read(names, target).count != length
        ):
            raise RuntimeError("blocks are missing after a restart")
        seconds.append(time.perf_counter() - started)
        tier.close()
    report.add("disk_restart_100k_s", seconds, "s", bar="< 1")
    report.add("disk_open_100k_s", opened, "s")


def rows(report: Report, quick: bool) -> None:
    """Add the disk tier's rows."""
    with scratch() as folder:
        throughput(report, folder, rounds=9 if quick else 25)
        restart(report, folder, rounds=3 if quick else 7)


def main() -> None:
    """Print the table."""
    options = arguments(__doc__)
    report = Report("store_disk")
    rows(report, options.quick)
    report.print(as_json=options.json)


if __name__ == "__main__":
    main()
