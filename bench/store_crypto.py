"""What a stored block costs besides its transport: header, checksum, tag, encryption. A part of `bench.store`.

Every figure is of one 2 MiB block of a run of 16, on one core; the run does not fit the core's own caches. The plain
checksum runs over such a run in the same rounds, because everything else is compared with it.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Sequence
from functools import partial

import xxhash

from bench.report import Report, arguments
from kvstore.blocks import BlockHash
from kvstore.codec import BlockCodec
from kvstore.crypto import Keyring, Protection
from kvstore.layout import KVLayout
from kvstore.tier import BlockMeta

LAYOUT = KVLayout(layers=32, kv_heads=8, k_dim=128, v_dim=128, dtype="bfloat16", block_size=16)
META = BlockMeta(BlockHash(b"h" * 32), BlockHash(b"p" * 32), BlockHash(b"r" * 32), 3600.0, 50)
NAMESPACE = b"n" * 32
RUN = 16  # blocks in a row: 32 MiB
SMALL_CALLS = 200


def rows(report: Report, quick: bool) -> None:
    """Add the codec's rows to `report`. Some seconds; four with `quick`."""
    keyring = Keyring({"bench": os.urandom(32)})
    codecs = {
        "raw": BlockCodec(LAYOUT, NAMESPACE),
        "authenticate": BlockCodec(LAYOUT, NAMESPACE, keyring, Protection.AUTHENTICATE),
        "encrypt": BlockCodec(LAYOUT, NAMESPACE, keyring, Protection.ENCRYPT),
    }
    rounds = 9 if quick else 25
    header_rows(report, codecs["raw"], rounds)
    payload_rows(report, codecs, rounds)


def header_rows(report: Report, codec: BlockCodec, rounds: int) -> None:
    """Microseconds of a header alone: packing and checksum of a block of almost no bytes, and parsing."""
    small = BlockCodec(KVLayout(layers=1, kv_heads=1, k_dim=1, v_dim=1, dtype="float16", block_size=1), NAMESPACE)
    body = bytes(small.layout.block_nbytes)
    header, _ = small.encode(META, body, 1.0)
    pack = [mean_us(lambda: small.encode(META, body, 1.0)) for _ in range(rounds)]
    parse = [mean_us(lambda: codec.parse(header)) for _ in range(rounds)]
    report.add("codec_header_pack_us", pack, "us", bar="<= 10")
    report.add("codec_header_parse_us", parse, "us")


def payload_rows(report: Report, codecs: dict[str, BlockCodec], rounds: int) -> None:
    """GB/s to write and to verify a block in each protection, and the verification's share of plain xxh3's speed."""
    payloads = [memoryview(bytearray(os.urandom(LAYOUT.block_nbytes))) for _ in range(RUN)]
    checksum: list[float] = []
    writing: dict[str, list[float]] = {name: [] for name in codecs}
    reading: dict[str, list[float]] = {name: [] for name in codecs}
    for _ in range(rounds):
        twins = [(bytearray(payload),) for payload in payloads]
        checksum.append(seconds_each(xxhash.xxh3_64_intdigest, twins))
        for name, codec in codecs.items():
            writing[name].append(seconds_each(codec.encode, [(META, payload, 1.0) for payload in payloads]))
            values = [codec.encode(META, payload, 1.0) for payload in payloads]
            received = [(header, memoryview(bytearray(stored))) for header, stored in values]
            reading[name].append(seconds_each(partial(codec.decode, expect=META.hash), received))
    report.add("codec_xxh3_gbps", [_gbps(s) for s in checksum], "GB/s")
    for name in codecs:
        report.add(f"codec_write_{name}_gbps", [_gbps(s) for s in writing[name]], "GB/s")
        report.add(f"codec_verify_{name}_gbps", [_gbps(s) for s in reading[name]], "GB/s")
        report.add(f"codec_verify_{name}_cpu_s_per_gb", [s * 1e9 / LAYOUT.block_nbytes for s in reading[name]], "s/GB")
    ratios = [plain / ours for plain, ours in zip(checksum, reading["raw"], strict=True)]
    report.add("codec_verify_vs_xxh3_ratio", ratios, "ratio", bar=">= 0.8")


def mean_us(call: Callable[[], object]) -> float:
    """Mean CPU microseconds of a small call."""
    started = time.thread_time()
    for _ in range(SMALL_CALLS):
        call()
    return (time.thread_time() - started) * 1e6 / SMALL_CALLS


def seconds_each(call: Callable[..., object], blocks: Sequence[tuple[object, ...]]) -> float:
    """Mean CPU seconds of the call for one block of a run: this thread's, so that other load counts less."""
    started = time.thread_time()
    for block in blocks:
        call(*block)
    return (time.thread_time() - started) / len(blocks)


def _gbps(taken_s: float) -> float:
    return LAYOUT.block_nbytes / taken_s / 1e9


def main() -> None:
    """Print the table."""
    options = arguments(__doc__)
    report = Report("store_crypto")
    rows(report, options.quick)
    report.print(as_json=options.json)


if __name__ == "__main__":
    main()
