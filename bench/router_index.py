"""The prefix index: how fast it answers and learns, how long it pauses, and what it takes.

Every question is made of new objects, as a hasher makes them, and goes through a chain that others have pushed out of
the processor's cache since it was asked last: a benchmark that asks the same chain again flatters every dict. Times are
of the thread on its processor: on a machine that others use, the clock on the wall tells of them. Rates are of events
of 64 blocks, not counting the decoding of messages but where a row says so.
"""

from __future__ import annotations

import gc
import importlib
import json
import random
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from bench.report import Report, arguments, ratios
from kvstore.events import BlockRemoved, BlockStored, RemovalCause, TierName
from router import kv_wire
from router.index import PrefixIndex
from router.settling import settle_process
from warmkv.v1 import common_pb2, kv_events_pb2

EVENT_BLOCKS = 64
CHAIN_BLOCKS = 2048
PROMPT_BLOCKS = 62
CHAINS = 40  # asked in turn
Names = Sequence[bytes]
_RNG = random.Random(1)
_DEVICE = TierName.DEVICE
_ROOM = 16 << 30


def add_index_rows(report: Report, *, quick: bool) -> None:
    """Add the index's rows. `quick`: 1 M blocks of background instead of 10 M, and a smaller bound."""
    _bound(report, prompts=24_000 if quick else 180_000, limit=(64 if quick else 256) << 20)
    blocks = 1_000_000 if quick else 10_000_000
    index = _joined(PrefixIndex(time.monotonic, limit_bytes=_ROOM, settle=settle_process), 8 if quick else 64)
    _ingest(report, index, blocks)
    _many_runs(report, 16_000 if quick else 160_000)
    _other_events(report, index)
    _questions(report, index)
    if quick:
        print("match_10m_64_workers_us: left out, --quick indexes 1 M blocks only", file=sys.stderr)
    else:
        _many_workers(report, index)
    _beside_dynamo(report, index)


def _joined(index: PrefixIndex, workers: int) -> PrefixIndex:
    for number in range(workers):
        index.join(f"w{number}", 1, shared_id="r")
        index.begin_snapshot(f"w{number}", 1)
        index.end_snapshot(f"w{number}", 1)
    return index


def new_chain(blocks: int) -> tuple[bytes, ...]:
    """Names of a new chain."""
    names = _RNG.randbytes(16 * blocks)
    return tuple(names[at : at + 16] for at in range(0, len(names), 16))


def fresh(chain: Names) -> list[bytes]:
    """The same names as new objects."""
    return [bytes(bytearray(name)) for name in chain]


def stored(chain: Names, blocks: int = EVENT_BLOCKS) -> list[BlockStored]:
    """Events that tell of a chain."""
    return [
        BlockStored(_DEVICE, tuple(chain[at : at + blocks]), chain[at - 1] if at else None)
        for at in range(0, len(chain), blocks)
    ]


def _ingest(report: Report, index: PrefixIndex, blocks: int) -> None:
    """New chains until so many blocks are known; each event timed for the longest pause."""
    rates, worst, workers = [], 0.0, len(index.match([]))
    before = _rss_bytes()
    for number in range(blocks // CHAIN_BLOCKS):
        took = 0.0
        for event in stored(new_chain(CHAIN_BLOCKS)):
            pause = _seconds(index.apply, f"w{number % workers}", 1, [event])
            worst = max(worst, pause)
            took += pause
        rates.append(CHAIN_BLOCKS / took / 1e6)
    grown = _rss_bytes() - before
    report.add("ingest_mblocks_s", rates, "M blocks/s", bar=">= 2")
    report.add("worst_pause_ms", [worst * 1e3], "ms", bar=f"<= 10 ({len(index) / 1e6:.0f} M blocks)")
    report.add("full_collection_ms", [_seconds(gc.collect) * 1e3], "ms")
    report.add("bytes_per_block", [grown / len(index)], "B")
    report.add("bytes_counted_per_block", [index.nbytes / len(index)], "B")


def _many_runs(report: Report, runs: int) -> None:
    """As many runs as 10 M blocks are where each prompt is one: what pauses by the run, collections of garbage too."""
    index = _joined(PrefixIndex(time.monotonic, limit_bytes=_ROOM, settle=settle_process), 8)
    events = ([BlockStored(_DEVICE, new_chain(3))] for _ in range(runs))
    worst = max(_seconds(index.apply, f"w{number % 8}", 1, event) for number, event in enumerate(events))
    report.add("worst_pause_of_runs_ms", [worst * 1e3], "ms", bar=f"<= 10 ({runs // 1000} k runs)")


def _other_events(report: Report, index: PrefixIndex) -> None:
    chains = [new_chain(CHAIN_BLOCKS) for _ in range(CHAINS)]
    second: list[float] = []
    removed: list[float] = []
    decoded: list[float] = []
    for chain in chains:
        index.apply("w0", 1, stored(chain))
        again = stored(fresh(chain))
        second.append(CHAIN_BLOCKS / _seconds(index.apply, "w1", 1, again) / 1e6)
    for chain in [new_chain(CHAIN_BLOCKS) for _ in range(CHAINS)]:
        step = [_wire(event) for event in stored(chain)]
        took = _seconds(lambda step=step: index.apply("w0", 1, kv_wire.events(step)))
        decoded.append(CHAIN_BLOCKS / took / 1e6)
    for chain in chains:
        gone = [BlockRemoved(_DEVICE, event.hashes[::-1], RemovalCause.EVICTED) for event in stored(fresh(chain))[::-1]]
        removed.append(CHAIN_BLOCKS / _seconds(index.apply, "w1", 1, gone) / 1e6)
    report.add("ingest_with_decoding_mblocks_s", decoded, "M blocks/s")
    report.add("ingest_second_holder_mblocks_s", second, "M blocks/s")
    report.add("ingest_removed_mblocks_s", removed, "M blocks/s")


def _wire(event: BlockStored) -> kv_events_pb2.KvEvent:
    """As a worker sends it."""
    names = b"".join(event.hashes)
    told = kv_events_pb2.BlockStored(tier=common_pb2.TIER_DEVICE, hashes=names, parent=event.parent or b"")
    return kv_events_pb2.KvEvent(stored=told)


# Who holds what of a chain, of eight workers.
def _all_hold(index: PrefixIndex, chain: Names) -> None:
    for worker in range(8):
        index.apply(f"w{worker}", 1, stored(chain))


def _one_holds(index: PrefixIndex, chain: Names) -> None:
    index.apply("w0", 1, stored(chain))


def _parts_are_held(index: PrefixIndex, chain: Names) -> None:
    for worker in range(8):
        index.apply(f"w{worker}", 1, stored(chain[: (worker + 1) * len(chain) // 8]))


def _all_have_holes(index: PrefixIndex, chain: Names) -> None:
    _all_hold(index, chain)
    for worker in range(8):
        hole = (chain[(worker + 1) * len(chain) // 9],)
        index.apply(f"w{worker}", 1, [BlockRemoved(_DEVICE, hole, RemovalCause.EVICTED)])


def _all_differ(index: PrefixIndex, chain: Names) -> None:
    _one_holds(index, chain)
    index.apply("w1", 1, [BlockStored(_DEVICE, (name,)) for name in chain[::2]])


def _questions(report: Report, index: PrefixIndex) -> None:
    _asked(report, index, "match_128", 128, _one_holds, bar="<= 30")
    _asked(report, index, "match_128x8_parts", 128, _parts_are_held)
    _asked(report, index, "match_2048x8", CHAIN_BLOCKS, _all_hold, bar="<= 60", first_too=True)
    _asked(report, index, "match_2048x8_parts", CHAIN_BLOCKS, _parts_are_held)
    _asked(report, index, "match_2048x8_holes", CHAIN_BLOCKS, _all_have_holes)
    _asked(report, index, "match_2048_all_differ", CHAIN_BLOCKS, _all_differ)


def _asked(
    report: Report,
    index: PrefixIndex,
    name: str,
    blocks: int,
    hold: Callable[[PrefixIndex, Names], None],
    *,
    bar: str = "",
    first_too: bool = False,
) -> None:
    chains = [new_chain(blocks) for _ in range(CHAINS)]
    for chain in chains:
        hold(index, chain)
    first, later = _ask(index, chains), [took for _ in range(3) for took in _ask(index, chains)]
    report.add(f"{name}_us", later, "us", bar=bar)
    if first_too:  # the names are compared
        report.add(f"{name}_first_us", first, "us")


def _ask(index: PrefixIndex, chains: Sequence[Names]) -> list[float]:
    questions = [fresh(chain) for chain in chains]
    return [_seconds(index.match, asked) * 1e6 for asked in questions]


def _many_workers(report: Report, index: PrefixIndex) -> None:
    """Chains of which 64 workers hold from a sixty-fourth to all, and the whole answer."""
    chains = [new_chain(CHAIN_BLOCKS) for _ in range(CHAINS)]
    for chain in chains:
        for worker in range(64):
            index.apply(f"w{worker}", 1, stored(chain[: (worker + 1) * CHAIN_BLOCKS // 64]))
    _ask(index, chains)
    report.add("match_10m_64_workers_us", [t for _ in range(3) for t in _ask(index, chains)], "us")


# Beside Dynamo's index, where its wheel is there


def _beside_dynamo(report: Report, index: PrefixIndex) -> None:
    """The same chains, 2,048 blocks held by eight workers, in turn; 1 M blocks of background on its side."""
    try:
        tree = importlib.import_module("dynamo.llm").RadixTree()
    except (ImportError, AttributeError) as error:
        print(f"match_vs_dynamo_ratio: left out ({error}); pip install ai-dynamo-runtime to have it", file=sys.stderr)
        return
    events = _DynamoEvents(tree)
    for number in range(1_000_000 // CHAIN_BLOCKS):
        events.store(number % 8, _token_hashes())
    pairs = [(new_chain(CHAIN_BLOCKS), _token_hashes()) for _ in range(CHAINS)]
    for chain, tokens in pairs:
        _all_hold(index, chain)
        for worker in range(8):
            events.store(worker, tokens)
    ours: list[float] = []
    theirs: list[float] = []
    for turn in range(4):
        for chain, tokens in pairs:
            asked = fresh(chain)
            took = _seconds(index.match, asked)
            other = _seconds(tree.find_matches, tokens)
            if turn:
                ours.append(took * 1e6)
                theirs.append(other * 1e6)
    report.add("match_dynamo_us", theirs, "us")
    report.add("match_vs_dynamo_ratio", ratios(ours, theirs), "ratio", bar="< 1")


def _token_hashes() -> list[int]:
    return [_RNG.getrandbits(63) for _ in range(CHAIN_BLOCKS)]


class _DynamoEvents:
    """Tells Dynamo's tree of stored blocks, in its own format."""

    def __init__(self, tree: Any) -> None:
        self._tree = tree
        self._count = 0

    def store(self, worker: int, tokens: Sequence[int]) -> None:
        """A chain, by the hashes of its blocks' tokens."""
        parent = None
        for at in range(0, len(tokens), EVENT_BLOCKS):
            blocks = [{"block_hash": token ^ 0x55, "tokens_hash": token} for token in tokens[at : at + EVENT_BLOCKS]]
            data = {"stored": {"parent_hash": parent, "blocks": blocks}}
            event = {"event_id": self._count, "data": data, "dp_rank": 0}
            self._tree.apply_event(worker, json.dumps(event).encode())
            self._count += 1
            parent = blocks[-1]["block_hash"]


# The bound


def _bound(report: Report, *, prompts: int, limit: int) -> None:
    """Unique prompts into a small index, in a process of its own: what that grew by, against the bound."""
    command = [sys.executable, "-m", "bench.router_index", "--fill", str(prompts), str(limit)]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    found = json.loads(done.stdout)
    report.add("bound_rss_ratio", [found["rss_ratio"]], "ratio", bar=f"<= 1.1 ({limit >> 20} MiB)")
    report.add("bound_counted_ratio", [found["counted_ratio"]], "ratio", bar="<= 1")
    report.add("bound_mblocks_s", [found["mblocks_s"]], "M blocks/s")
    report.add("bound_worst_pause_ms", [found["worst_ms"]], "ms", bar="<= 10")


def fill(prompts: int, limit: int) -> dict[str, float]:
    """What becomes of an index that is told of so many prompts of `PROMPT_BLOCKS` blocks that nobody sends again."""
    gc.collect()
    before = _rss_bytes()
    index = _joined(PrefixIndex(lambda: now, limit_bytes=limit, settle=settle_process), 8)
    counted, rss, took, worst = 0, 0, 0.0, 0.0
    for number in range(prompts):
        now = number / 6000
        event = BlockStored(_DEVICE, new_chain(PROMPT_BLOCKS))
        pause = _seconds(index.apply, f"w{number % 8}", 1, [event])
        took, worst, counted = took + pause, max(worst, pause), max(counted, index.nbytes)
        if number % 1000 == 0:
            rss = max(rss, _rss_bytes() - before)
    return {
        "rss_ratio": max(rss, _rss_bytes() - before) / limit,
        "counted_ratio": counted / limit,
        "mblocks_s": prompts * PROMPT_BLOCKS / took / 1e6,
        "worst_ms": worst * 1e3,
        "blocks": len(index),
        "evicted": index.evicted_blocks,
    }


def _rss_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096


def _seconds(call: Callable[..., object], *args: object) -> float:
    """Of this thread on its processor."""
    began = time.thread_time()
    call(*args)
    return time.thread_time() - began


def main() -> None:
    """Print the table."""
    if sys.argv[1:2] == ["--fill"]:
        print(json.dumps(fill(int(sys.argv[2]), int(sys.argv[3]))))
        return
    options = arguments(__doc__)
    report = Report("router_index")
    add_index_rows(report, quick=options.quick)
    report.print(as_json=options.json)


if __name__ == "__main__":
    main()
