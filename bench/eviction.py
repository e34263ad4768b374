"""Eviction policies on recorded traces: share of prompt tokens found in one cache, against the clairvoyant policy.

Rows `hit_<trace>_<capacity in 1000 tokens>k_<policy>`; the first tenth of each trace fills the cache and does not
count. The policies are those of `kvstore.eviction`, fed as a tier feeds them: a prompt's blocks are used from the last
to the first, and what does not fit is evicted. `belady` knows the future: furthest next use first, suffixes first.

Rows of what a lower tier, five times as large as the upper one, is given (`kvstore.admission`): `hit_<trace>_<rule>`,
hits of both; `writes_<trace>_<rule>`, blocks written as a share of those that `always` writes, and `writes_saved`, the
others; `hits_lost_<trace>_<rule>`, points of the hit rate that `always` has and the rule has not.

`--trace FILE` adds a trace of your own, or of those that are too large to ship, at its capacities (`--capacities`).
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from bench.cache_replay import Clock, Replay
from bench.report import Report
from kvstore.admission import ADMISSIONS, Moment, make_admission
from kvstore.eviction.policies import POLICIES, Eviction, Hint, make_eviction
from replay.traces import Trace, load, shipped

# Capacities in tokens, where the traces differ between hopeless and all.
CAPACITIES = {
    "mooncake_conversation": (1_600_000, 3_200_000, 12_800_000),
    "mooncake_synthetic": (1_600_000, 3_200_000, 12_800_000),
    "claude_code": (1_600_000, 3_200_000, 12_800_000),
    "claude_code_sample": (320_000, 640_000, 2_560_000),
    "ragpulse": (5_000, 10_000, 50_000),
    "tau_airline": (10_000, 25_000, 100_000),
}
QUICK = {
    "mooncake_conversation": (1_600_000, 3_200_000, 12_800_000),
    "mooncake_synthetic": (3_200_000,),
    "claude_code_sample": (640_000,),
}
# What LRU reached here when the policies were first compared; a replay that differs by more than 0.005 is another one.
KNOWN_LRU = {
    ("mooncake_conversation", 1600): 0.069,
    ("mooncake_conversation", 3200): 0.145,
    ("mooncake_conversation", 12800): 0.321,
    ("mooncake_synthetic", 1600): 0.059,
    ("mooncake_synthetic", 3200): 0.138,
    ("mooncake_synthetic", 12800): 0.383,
    ("claude_code", 1600): 0.276,
    ("claude_code", 3200): 0.671,
    ("claude_code", 12800): 0.948,
    ("ragpulse", 5): 0.253,
    ("ragpulse", 10): 0.284,
    ("ragpulse", 50): 0.310,
}
# Upper tiers of the rows of admission, in tokens, so that neither nothing nor everything fits.
UPPER = {
    "mooncake_conversation": 400_000,
    "mooncake_synthetic": 400_000,
    "ragpulse": 2_000,
    "tau_airline": 5_000,
}
LOWER = 5  # times that
QUICK_UPPER = ("mooncake_synthetic",)


class TwoTiers:
    """An upper tier, a lower one, and the rule of the hop between them. Both evict the least recently used block.

    Attributes:
        writes: blocks written to the lower tier.
    """

    def __init__(self, replay: Replay, rule: str, upper: int, lower: int) -> None:
        self._segments = replay.segments
        self._sizes = upper, lower
        self._rule = make_admission(rule, memory=lower)
        self._upper: Eviction[int] = make_eviction("lru", Clock(), upper)
        self._lower: Eviction[int] = make_eviction("lru", Clock(), lower)
        self.writes = 0

    def leading(self, chain: Sequence[int]) -> int:
        """How many leading blocks either tier holds."""
        missing = (n for n, block in enumerate(chain) if block not in self._upper and block not in self._lower)
        return next(missing, len(chain))

    def take(self, chain: Sequence[int]) -> None:
        """Use the blocks, last ones first. A hit refreshes the lower tier as well."""
        for block in reversed(chain):
            self._hold(self._upper, block)
            if block in self._lower:
                self._lower.use(block)
            elif self._rule.moment is Moment.USE and self._rule.admits(block):
                self._write(block)
        for block in self._evict(self._upper, self._sizes[0]):
            if block not in self._lower and self._rule.moment is Moment.EVICTION and self._rule.admits(block):
                self._write(block)
        self._evict(self._lower, self._sizes[1])

    def _write(self, block: int) -> None:
        self.writes += 1
        self._hold(self._lower, block)

    def _hold(self, tier: Eviction[int], block: int) -> None:
        if block in tier:
            tier.use(block)
        else:
            tier.add(block, None, hint=Hint(name=block, parent=self._segments.parents[block]))

    @staticmethod
    def _evict(tier: Eviction[int], size: int) -> list[int]:
        gone = []
        while len(tier) > size and (victim := tier.victim()) is not None:
            tier.remove(victim)
            gone.append(victim)
        return gone


def admission_rows(report: Report, name: str, trace: Trace) -> None:
    """Hits, writes and lost hits of each rule."""
    replay = Replay(trace, longest=1)
    upper = UPPER[name] // replay.block_size
    hit, writes = {}, {}
    for rule in ADMISSIONS:
        tiers, hits = TwoTiers(replay, rule, upper, LOWER * upper), 0
        for number, request in enumerate(trace.requests):
            chain = replay.segments.chains[number]
            if number >= replay.counted:
                hits += min(tiers.leading(chain) * replay.block_size, request.input_length)
            tiers.take(chain)
        hit[rule], writes[rule] = hits / replay.tokens, tiers.writes
    for rule in ADMISSIONS:
        written = writes[rule] / writes["always"]
        report.add(f"hit_{name}_{rule}", [hit[rule]], "share")
        report.add(f"writes_{name}_{rule}", [written], "share")
        report.add(f"writes_saved_{name}_{rule}", [1 - written], "share")
        report.add(f"hits_lost_{name}_{rule}", [100 * (hit["always"] - hit[rule])], "points")


def hit_rows(report: Report, name: str, replay: Replay, capacities: Sequence[int]) -> None:
    """Each policy at each capacity."""
    for capacity in capacities:
        thousands = capacity // 1000
        for policy in (*POLICIES, "belady"):
            known = KNOWN_LRU.get((name, thousands)) if policy == "lru" else None
            bar = "" if known is None else f"{known:.3f} +- 0.005"
            report.add(f"hit_{name}_{thousands}k_{policy}", [replay.hit(policy, capacity)], "share", bar=bar)


def options() -> argparse.Namespace:
    """The flags that every benchmark has, and those for other traces."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="end within 50 s; segments count as blocks")
    parser.add_argument("--json", action="store_true", help="one JSON object as the last line of standard output")
    parser.add_argument("--trace", type=Path, metavar="FILE", help="replay only this file")
    parser.add_argument("--capacities", metavar="TOKENS,...", help="for --trace: the sizes of the cache")
    return parser.parse_args()


def chosen(given: argparse.Namespace) -> dict[str, tuple[Trace, tuple[int, ...]]]:
    """The traces to replay and their capacities."""
    if given.trace is not None:
        trace = load(given.trace)
        sizes = given.capacities.split(",") if given.capacities else CAPACITIES.get(trace.name)
        if sizes is None:
            raise SystemExit(f"what sizes of the cache for {trace.name}? Give --capacities TOKENS,...")
        return {trace.name: (trace, tuple(map(int, sizes)))}
    sizes_of = QUICK if given.quick else CAPACITIES
    return {name: (load(path), sizes_of[name]) for name, path in shipped().items() if name in sizes_of}


def main() -> None:
    """Print the table."""
    given, report = options(), Report("eviction")
    for name, (trace, capacities) in chosen(given).items():
        # Policies count entries: let those be blocks, or where blocks are small, the 1,024 tokens that a piece holds.
        longest = None if given.quick else max(1, 1024 // (trace.block_size or 1))
        hit_rows(report, name, Replay(trace, longest=longest), capacities)
        if name in (QUICK_UPPER if given.quick else UPPER):
            admission_rows(report, name, trace)
    report.print(as_json=given.json)


if __name__ == "__main__":
    main()
