"""The host tier beside the memory it is made of: copies against memcpy, handles in microseconds, start-up, and keys.

Every comparison is interleaved: one round of memcpy, one of the tier, and so on, and the ratio is taken within a round.
"""

from __future__ import annotations

import hashlib
import time
from array import array
from collections.abc import Callable, Iterator

import numpy as np
import numpy.typing as npt

from bench.report import Report, arguments, ratios
from kvstore.blocks import BlockHash, block_hashes
from kvstore.events import RemovalCause
from kvstore.host.memory import available_bytes
from kvstore.host.tier import HostTier
from kvstore.layout import KVLayout
from kvstore.tier import BlockMeta, chain_metas

ROOT = BlockHash(b"r" * 32)
BLOCK = KVLayout(layers=32, kv_heads=8, k_dim=128, v_dim=128, dtype="bfloat16")  # 2 MiB
SMALL = KVLayout(layers=1, kv_heads=1, k_dim=8, v_dim=8, dtype="float32")  # 1 KiB: handles do not look at bytes
BATCH = 32
START_BYTES = 8 << 30
QUICK_START_BYTES = 2 << 30  # touching a GiB for the first time takes a second
KEY_TOKENS = 32 << 10
READY_S = 300.0


def rows(report: Report, quick: bool) -> None:
    """Add this benchmark's rows."""
    copies(report, blocks=64 if quick else 128, rounds=9 if quick else 21)
    handles(report, blocks=2000, rounds=10 if quick else 50)
    evictions(report, blocks=4000 if quick else 20_000)
    start(report, nbytes=QUICK_START_BYTES if quick else START_BYTES, rounds=3 if quick else 5)
    keys(report, rounds=20 if quick else 60)


def metas_of(count: int, *, first_token: int = 0, layout: KVLayout = BLOCK) -> list[BlockMeta]:
    """A chain of so many blocks."""
    tokens = [first_token, *range(1, count * layout.block_size)]
    return chain_metas(block_hashes(tokens, ROOT, layout.block_size), before=ROOT, root=ROOT, ttl_s=3600.0)


def copies(report: Report, *, blocks: int, rounds: int) -> None:
    """Put and get of 2 MiB blocks, in batches, against `np.copyto` of the same bytes between prefaulted buffers."""
    source = np.random.default_rng(1).integers(0, 256, (blocks, BLOCK.block_nbytes), np.uint8)
    target, twin = np.zeros_like(source), np.zeros_like(source)
    tier = HostTier(BLOCK, source.nbytes, clock=time.monotonic)
    tier.wait_ready(READY_S)
    metas = metas_of(blocks)
    names = [meta.hash for meta in metas]
    payloads, buffers = [row.data for row in source], [row.data for row in target]
    put, get, put_ratio, get_ratio = [], [], [], []
    for number in range(rounds + 1):
        tier.remove(names, RemovalCause.INVALID)
        plain = seconds(lambda: copy_rows(source, twin))
        stored = seconds(lambda: batches(lambda at: tier.write(metas[at], payloads[at]), blocks))
        loaded = seconds(lambda: batches(lambda at: tier.read(names[at], buffers[at]), blocks))
        plain = (plain + seconds(lambda: copy_rows(source, twin))) / 2  # before and after: the load drifts
        if number:  # the first round warms up
            put.append(source.nbytes / stored / 1e9)
            get.append(source.nbytes / loaded / 1e9)
            put_ratio.append(plain / stored)
            get_ratio.append(plain / loaded)
    if not np.array_equal(source, target):
        raise RuntimeError("the tier gave other bytes than it was given")
    tier.close()
    report.add("host_put_2mib_gbps", put, "GB/s")
    report.add("host_get_2mib_gbps", get, "GB/s")
    report.add("host_put_vs_memcpy_ratio", put_ratio, "ratio", bar=">= 0.9")
    report.add("host_get_vs_memcpy_ratio", get_ratio, "ratio", bar=">= 0.9")


def copy_rows(source: npt.NDArray[np.uint8], target: npt.NDArray[np.uint8]) -> None:
    """Row by row, as the tier has to."""
    for row, into in zip(source, target, strict=True):
        np.copyto(into, row)


def batches(call: Callable[[slice], object], blocks: int) -> None:
    """The call for each batch of blocks."""
    for start in range(0, blocks, BATCH):
        call(slice(start, start + BATCH))


def handles(report: Report, *, blocks: int, rounds: int) -> None:
    """Operations that look at no bytes, one block at a time: microseconds each, 10^5 in all."""
    tier = filled(blocks)
    names = [meta.hash for meta in tier.metas()]
    operations: dict[str, Callable[[BlockHash], object]] = {
        "holds": tier.holds,
        "find": tier.find,
        "touch": lambda name: tier.touch([name]),
        "view_and_end": lambda name: tier.end_view(tier.view([name])[0]),
    }
    samples: dict[str, list[float]] = {name: [] for name in operations}
    for _ in range(rounds):
        for name, operation in operations.items():
            samples[name].append(each(operation, names) / blocks * 1e6)
    batched = [seconds(lambda: batches(lambda at: tier.end_views(tier.view(names[at])), blocks)) for _ in range(rounds)]
    tier.close()
    steps = len(operations) + 1  # a view and its end are two
    every = [sum(times) / steps for times in zip(*samples.values(), strict=True)]
    report.add("host_handle_us", every, "us", bar="<= 3")
    for name, values in samples.items():
        report.add(f"host_{name}_us", values, "us")
    report.add("host_view_and_end_batched_us", [took / blocks * 1e6 for took in batched], "us")


def each(operation: Callable[[BlockHash], object], names: list[BlockHash]) -> float:
    """Seconds of an operation on all of them, one after the other."""
    return seconds(lambda: [operation(name) for name in names])


def evictions(report: Report, *, blocks: int) -> None:
    """A write that evicts, in a small tier, in one ten times as large, and in that with half of its blocks viewed."""
    tiers = {"small": filled(blocks // 10), "large": filled(blocks), "viewed": filled(blocks)}
    views = tiers["viewed"].view([meta.hash for meta in tiers["viewed"].metas()[: blocks // 2]])
    samples: dict[str, list[float]] = {case: [] for case in tiers}
    for turn in range(6):
        fresh = [metas_of(1, first_token=(turn + 1) * blocks + n, layout=SMALL) for n in range(blocks // 40)]
        for case, tier in tiers.items():
            took = write_each(tier, fresh) / len(fresh) * 1e6
            if turn:  # the first one meets each viewed block, once for all
                samples[case].append(took)
    tiers["viewed"].end_views(views)
    for tier in tiers.values():
        tier.check()
        tier.close()
    report.add("host_evicting_write_us", samples["large"], "us")
    report.add("host_evicting_write_10x_blocks_ratio", ratios(samples["large"], samples["small"]), "ratio")
    report.add("host_evicting_write_half_viewed_ratio", ratios(samples["viewed"], samples["large"]), "ratio")


def write_each(tier: HostTier, batches_of_one: list[list[BlockMeta]]) -> float:
    """Seconds to write blocks one by one."""
    payload = [memoryview(bytes(SMALL.block_nbytes))]
    return seconds(lambda: [tier.write(metas, payload) for metas in batches_of_one])


def filled(blocks: int) -> HostTier:
    """A full tier of small blocks in chains of ten."""
    tier = HostTier(SMALL, blocks * SMALL.block_nbytes, clock=time.monotonic)
    for number in range(blocks // 10):
        tier.write(metas_of(10, first_token=number, layout=SMALL), [memoryview(bytes(SMALL.block_nbytes))] * 10)
    tier.drain_events()
    return tier


def start(report: Report, *, nbytes: int, rounds: int) -> None:
    """From nothing to a tier that has stored and given back its first block, and until all its memory is ready."""
    nbytes = min(nbytes, available_bytes() // 2)
    payload, into = [memoryview(bytes(BLOCK.block_nbytes))], [memoryview(bytearray(BLOCK.block_nbytes))]
    serving, ready = [], []
    metas = metas_of(1)
    for number in range(rounds):
        began = time.perf_counter()
        tier = HostTier(BLOCK, nbytes, clock=time.monotonic)
        if tier.write(metas, payload) + tier.read([metas[0].hash], into).count != 2:
            raise RuntimeError("a new tier did not store a block")
        serving.append(time.perf_counter() - began)
        if number == 0:
            tier.wait_ready(READY_S)
            ready.append((time.perf_counter() - began) / (nbytes / 1e9))
        tier.close()
    report.add("host_start_s", serving, "s", bar=f"< 1 ({nbytes / 2**30:.1f} GiB)")
    report.add("host_ready_s_per_gb", ready, "s/GB")


def keys(report: Report, *, rounds: int) -> None:
    """Names of a 32k-token prompt's blocks, beside nothing but SHA-256 of as many bytes."""
    tokens = list(range(KEY_TOKENS))
    blocks = KEY_TOKENS // 16
    pieces = list(plain_pieces(tokens))
    ours, plain = [], []
    for _ in range(rounds):
        ours.append(seconds(lambda: block_hashes(tokens, ROOT, 16)) / blocks * 1e6)
        plain.append(seconds(lambda: [hashlib.sha256(piece).digest() for piece in pieces]) / blocks * 1e6)
    report.add("key_us_per_block", ours, "us", bar="<= 0.6")
    report.add("key_sha256_alone_us_per_block", plain, "us")
    report.add("key_vs_sha256_ratio", ratios(ours, plain), "ratio")


def plain_pieces(tokens: list[int]) -> Iterator[bytes]:
    """What is hashed for each block, without the chain."""
    data = array("I", tokens).tobytes()
    return (ROOT + data[start : start + 64] for start in range(0, len(data), 64))


def seconds(call: Callable[[], object]) -> float:
    """How long a call takes."""
    began = time.perf_counter()
    call()
    return time.perf_counter() - began


def main() -> None:
    """Print the table."""
    options = arguments(__doc__)
    report = Report("store_host")
    rows(report, options.quick)
    report.print(as_json=options.json)


if __name__ == "__main__":
    main()
