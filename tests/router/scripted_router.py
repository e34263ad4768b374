"""A RouterApi whose numbers are a script: eight prompts over four workers, better under cache_aware.

Not a simulation of the product. It gives the page and the endpoints numbers that change as real ones do, and every
number can be set by hand in `now`.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncIterator
from typing import Any, cast

from router.errors import InvalidRequest
from router.policy import find_policy
from router.protocol import CacheApi, Caller, RequestContext
from warmkv.v1 import admin_pb2, common_pb2, inference_pb2

MIB = 1 << 20
START_MS = 1_800_000_000_000
PREFIXES = [
    ("You are a travel agent who", 512),
    ("You are a SQL expert. Answer", 768),
    ("Summarize the contract between", 2048),
    ("Read the manual of the pump and", 1536),
    ("You are a tutor for algebra", 640),
    ("Translate into formal German", 384),
    ("Review this change as a careful", 896),
    ("Classify the ticket as one of", 256),
]
# policy -> share of prompt tokens (device, host, redis), p50 in ms
MIX = {"round_robin": ((0.24, 0.08, 0.0), 118.0), "cache_aware": ((0.62, 0.17, 0.04), 43.0)}
WEIGHTS = [(w.name, w.default, w.min, w.max, w.unit, w.help) for w in find_policy("cache_aware").weights]


class ScriptedRouter:
    """Every method of RouterApi; those that the HTTP side never calls refuse.

    Attributes:
        now: the next answer of `stats`, free to be changed. applied: what `set_policy` was asked for.
        snapshots: calls of `stats`, by `show_prompts`. store: the answer of `cache.tiers`, free to be changed.
    """

    def __init__(self, *, workers: int = 4, seed: int = 1) -> None:
        self.applied: list[admin_pb2.SetPolicyRequest] = []
        self.snapshots: list[bool] = []
        self.store = admin_pb2.GetCacheStatsResponse()
        self.is_ready = True
        self._taken = asyncio.Event()
        self._random = random.Random(seed)
        self._version = 1
        self.now = admin_pb2.WatchStatsResponse(time_ms=START_MS, window_seconds=60, shared_tier_reads=True)
        self.now.policy.CopyFrom(_policy("round_robin", {}))
        self.now.shared_tier.CopyFrom(
            admin_pb2.TierUsage(tier=common_pb2.TIER_REDIS, capacity_bytes=256 * MIB, healthy=True)
        )
        self.now.workers.extend(_worker(index) for index in range(workers))

    def advance(self, seconds: float = 1.0, *, requests: int = 20) -> None:
        """Let time pass and requests finish."""
        (device, host, redis), p50 = MIX.get(self.now.policy.name, MIX["round_robin"])
        self.now.time_ms += round(seconds * 1000)
        for number in range(requests):
            prompt = self._random.randint(600, 1400)
            parts = [int(prompt * share * self._random.uniform(0.85, 1.15)) for share in (device, host, redis)]
            self._count(prompt, parts, p50 * self._random.uniform(0.7, 1.5), number)
        wobble = self._random.uniform(0.9, 1.1)
        self.now.ttft.CopyFrom(
            admin_pb2.Latency(
                count=requests * 60, p50_ms=p50 * wobble, p95_ms=p50 * 2.3 * wobble, p99_ms=p50 * 3.1 * wobble
            )
        )
        self.now.in_flight = self._random.randint(4, 14)
        self._fill_workers()
        self._place_prefixes()

    async def taken(self) -> None:
        """Wait for the next snapshot."""
        self._taken.clear()
        await self._taken.wait()

    def _count(self, prompt: int, parts: list[int], ttft_ms: float, number: int) -> None:
        now = self.now
        tokens = now.prompt_tokens
        tokens.device += parts[0]
        tokens.host += parts[1]
        tokens.redis += parts[2]
        tokens.computed += prompt - sum(parts)
        now.generated_tokens += 32
        now.requests["OK"] += 1
        predicted = int(sum(parts) * 1.03)
        now.predicted_cached_tokens += predicted
        now.reused_tokens += sum(parts)
        aware = now.policy.name == "cache_aware"
        reason = self._random.choices(["prefix", "balance", "no_hit"], [8, 2, 1])[0] if aware else "order"
        now.decisions[reason] += 1
        worker = now.workers[self._random.randrange(len(now.workers))].name if now.workers else ""
        record = admin_pb2.DecisionRecord(
            time_ms=now.time_ms - number * 50,
            request_id=f"{self._random.getrandbits(64):016x}",
            tenant=self._random.choice(["search", "support"]),
            worker=worker,
            policy=now.policy.name,
            reason=reason,
            prompt_tokens=prompt,
            predicted_cached_tokens=predicted,
            predicted_ttft_ms=ttft_ms * self._random.uniform(0.8, 1.2),
        )
        if number > 1:
            record.reused_tokens = sum(parts)
            record.ttft_ms = ttft_ms
        if aware:
            record.runner_up = "w3" if worker != "w3" else "w0"
            record.runner_up_extra_ms = ttft_ms * 0.8
        recent = [record, *now.recent][:32]
        del now.recent[:]
        now.recent.extend(recent)

    def _fill_workers(self) -> None:
        for worker in self.now.workers:
            worker.running = self._random.randint(0, 6)
            worker.waiting = self._random.randint(0, 3)
            for tier in worker.tiers:
                tier.used_bytes = min(tier.capacity_bytes, tier.used_bytes + self._random.randint(1, 4) * MIB)
                tier.blocks = tier.used_bytes // (64 << 10)
        shared = self.now.shared_tier
        shared.used_bytes = min(shared.capacity_bytes, shared.used_bytes + 3 * MIB)
        shared.blocks = shared.used_bytes // (64 << 10)

    def _place_prefixes(self) -> None:
        del self.now.prefixes[:]
        served = sum(self.now.requests.values())
        names = [worker.name for worker in self.now.workers]
        for index, (_, tokens) in enumerate(PREFIXES):
            prefix = admin_pb2.PrefixHolding(
                label=f"{hash_of(index)}", tenant="search" if index % 2 else "support", tokens=tokens
            )
            prefix.requests = served // (index + 2)
            prefix.redis_tokens = tokens // 2 if index % 3 else tokens
            for place, name in enumerate(names):
                device, host = self._held(index, place, tokens, len(names))
                if host:
                    prefix.held.add(worker=name, device_tokens=device, host_tokens=host)
            self.now.prefixes.append(prefix)

    def _held(self, index: int, place: int, tokens: int, workers: int) -> tuple[int, int]:
        if self.now.policy.name != "cache_aware":
            return (tokens * ((index + place) % 4) // 8, tokens * ((index + place) % 4) // 5)
        if index % workers == place:
            return (tokens if index % 2 else tokens * 3 // 4, tokens)
        return (0, tokens // 4 if (index + 1) % workers == place and index > 4 else 0)

    def stats(self, *, show_prompts: bool) -> admin_pb2.WatchStatsResponse:
        self.snapshots.append(show_prompts)
        self._taken.set()
        answer = admin_pb2.WatchStatsResponse()
        answer.CopyFrom(self.now)
        if show_prompts:
            for prefix, (words, _) in zip(answer.prefixes, PREFIXES, strict=False):
                prefix.label = words
        return answer

    def get_policy(self) -> admin_pb2.GetPolicyResponse:
        return admin_pb2.GetPolicyResponse(
            policy=self.now.policy,
            version=self._version,
            available=[
                admin_pb2.PolicyInfo(name="round_robin", help="Each worker in turn, whatever it holds."),
                admin_pb2.PolicyInfo(name="least_loaded", help="The worker with the fewest requests."),
                admin_pb2.PolicyInfo(
                    name="cache_aware",
                    help="The lowest predicted milliseconds to the first token: queue, load, compute.",
                    weights=_weight_infos(),
                ),
            ],
            shared_tier_reads=self.now.shared_tier_reads,
        )

    async def policy_kept(self) -> None:
        return None

    def set_policy(
        self, request: admin_pb2.SetPolicyRequest, *, caller: Caller | None = None
    ) -> admin_pb2.SetPolicyResponse:
        known = {info.name: info for info in self.get_policy().available}
        if request.HasField("policy"):
            name = request.policy.name
            if name not in known:
                raise InvalidRequest(f"There is no policy {name!r}. Use one of {', '.join(known)}.")
            self.now.policy.CopyFrom(_policy(name, dict(request.policy.weights)))
        if request.HasField("shared_tier_reads"):
            self.now.shared_tier_reads = request.shared_tier_reads
        self.applied.append(request)
        self._version += 1
        return admin_pb2.SetPolicyResponse(policy=self.now.policy, version=self._version)

    def rollback_policy(self, request: Any, *, caller: Caller) -> admin_pb2.RollbackPolicyResponse:
        raise NotImplementedError

    def set_shadow_policy(self, request: Any, *, caller: Caller) -> admin_pb2.SetShadowPolicyResponse:
        raise NotImplementedError

    def list_workers(self) -> list[admin_pb2.WorkerInfo]:
        return list(self.now.workers)

    def ready(self) -> bool:
        return self.is_ready

    def generate(
        self, request: inference_pb2.GenerateRequest, *, caller: Caller, context: RequestContext
    ) -> AsyncIterator[inference_pb2.GenerateResponse]:
        raise NotImplementedError

    async def explain(self, request: Any, *, caller: Caller) -> inference_pb2.ExplainResponse:
        raise NotImplementedError

    async def tokenize(self, request: Any, *, caller: Caller) -> inference_pb2.TokenizeResponse:
        raise NotImplementedError

    def drain_worker(self, worker: str, *, hand_over_after_s: float | None = None) -> int:
        raise NotImplementedError

    def undrain_worker(self, worker: str) -> None:
        raise NotImplementedError

    async def scale_workers(self, workers: int) -> tuple[list[str], list[str]]:
        raise NotImplementedError

    async def clear_cache(self, request: Any, *, caller: Caller) -> admin_pb2.ClearCacheResponse:
        raise NotImplementedError

    @property
    def cache(self) -> CacheApi:
        return cast("CacheApi", self)

    def tiers(self) -> admin_pb2.GetCacheStatsResponse:
        return self.store


def hash_of(index: int) -> str:
    return f"{(index + 1) * 0x9E3779B97F4A7C15 % (1 << 64):016x}"[:12]


def _policy(name: str, given: dict[str, float]) -> admin_pb2.Policy:
    defaults = {weight[0]: weight[1] for weight in WEIGHTS} if name == "cache_aware" else {}
    return admin_pb2.Policy(name=name, weights={**defaults, **given})


def _weight_infos() -> list[admin_pb2.WeightInfo]:
    return [
        admin_pb2.WeightInfo(name=name, default_value=default, min=low, max=high, unit=unit, help=text)
        for name, default, low, high, unit, text in WEIGHTS
    ]


def _worker(index: int) -> admin_pb2.WorkerInfo:
    return admin_pb2.WorkerInfo(
        name=f"w{index}",
        address=f"127.0.0.1:{50100 + index}",
        state=admin_pb2.WORKER_STATE_READY,
        incarnation=1_800_000_000_000_000_000 + index,
        model="tiny-llama",
        device="cpu",
        role="both",
        ranks=1,
        kv_dtype="float32",
        prefill_ms_per_1k=61.5 + index,
        tiers=[
            admin_pb2.TierUsage(tier=common_pb2.TIER_DEVICE, capacity_bytes=64 * MIB, healthy=True),
            admin_pb2.TierUsage(tier=common_pb2.TIER_HOST, capacity_bytes=192 * MIB, healthy=True),
        ],
    )
