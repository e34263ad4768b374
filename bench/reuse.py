"""What a cached prefix is worth, and what looking for one costs: time to first token cold, and warm from each tier.

No router and no network: `Engine.submit` to the first token of one CPU worker's engine, through scheduling, the store
and sampling. The model has random weights, 8 layers of width 512, float32. Cold and warm runs of one prompt follow one
another, so that a noisy neighbour hits both; each speedup is the ratio of one such pair.

`cold_vs_no_store` is what the store costs when nothing is ever found: prompts that nobody has seen follow one another
without a pause, first on an engine with host, disk and Redis, whose writes go on behind them, then on one that has the
device tier alone.
"""

from __future__ import annotations

import random
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

from bench.report import Report, arguments
from deploy.redis_server import PrivateRedis
from kvstore.blocks import BlockHash, block_hashes
from workers.build import build_engine
from workers.config import WorkerConfig
from workers.engine import TorchEngine
from workers.protocol import Job, SamplingParams
from workers.tiny import ModelShape, make_model_folder

LENGTHS = (512, 2048, 4096)
BARS = {("device", 2048): ">= 20", ("host", 2048): ">= 16", ("redis", 2048): ">= 12"}
COLD_BAR = "<= 1.05"
COLD_RUN = 4  # prompts in a row
FLUSH_S = 30.0
SHAPE = ModelShape(layers=8, hidden=512, heads=8, kv_heads=4, vocab=2048, context_length=8192)


@contextmanager
def engines() -> Iterator[tuple[TorchEngine, TorchEngine, TorchEngine]]:
    """Three engines of one model: with host and Redis for warm runs, with every tier, with the device tier alone."""
    with (
        tempfile.TemporaryDirectory() as folder,
        PrivateRedis(maxmemory_bytes=2 << 30) as redis,
        ExitStack() as stack,
    ):
        make_model_folder(folder, SHAPE)
        shared = {"redis_url": redis.url, "redis_timeout_s": 5.0, "load_slack_s": 5.0}
        yield (
            stack.enter_context(_engine(folder, host_bytes=512 << 20, **shared)),
            stack.enter_context(
                _engine(folder, host_bytes=512 << 20, disk_bytes=512 << 20, disk_dir=f"{folder}/disk", **shared)
            ),
            stack.enter_context(_engine(folder, host_bytes=0)),
        )


@contextmanager
def _engine(folder: str, **tiers: Any) -> Iterator[TorchEngine]:
    config = WorkerConfig(
        name="bench", model_dir=folder, model_name="bench", device="cpu", device_bytes=256 << 20, **tiers
    )
    engine = build_engine(config)
    try:
        yield engine
    finally:
        engine.close(flush_s=0.0)


def time_to_first_token(engine: TorchEngine, token_ids: list[int], root: BlockHash) -> tuple[float, dict[str, int]]:
    """Seconds from submit to the first token, and the prompt's fates."""
    names = block_hashes(token_ids, root, engine.info.scheme.block_size)
    started = time.perf_counter()
    engine.submit(Job("bench", token_ids, root, names, SamplingParams(max_tokens=1, temperature=0.0, ignore_eos=True)))
    while True:
        outputs = engine.step().outputs
        if outputs:
            elapsed = time.perf_counter() - started
            return elapsed, outputs[-1].fates or {}
        engine.wait(0.05)


def measure(engine: TorchEngine, length: int, rng: random.Random, *, settled: bool = True) -> dict[str, float]:
    """Seconds to first token of one fresh prompt: cold, then warm from device, host and Redis.

    `settled`: the engine knows how long it computes and reads, so all comes from the tier that is measured.

    Raises:
        RuntimeError: it did not, or a tier took no blocks.
    """
    root = engine.info.scheme.root(b"bench")
    token_ids = [rng.randrange(16, SHAPE.vocab) for _ in range(length)]
    seconds = {}
    for tier in ("cold", "device", "host", "redis"):
        if tier in ("host", "redis"):
            engine.store.device.clear()
        if tier == "redis" and engine.store.host is not None:
            engine.store.host.clear()
        seconds[tier], fates = time_to_first_token(engine, token_ids, root)
        expected = "computed" if tier == "cold" else tier
        if settled and fates.get(expected, 0) < length * 0.9:
            raise RuntimeError(f"{tier}: the prompt's tokens had the fates {fates}")
        if not engine.store.flush(FLUSH_S):
            raise RuntimeError(f"Redis did not take the blocks within {FLUSH_S:g} s")
    engine.store.clear(shared=True)
    return seconds


def measure_cold(engine: TorchEngine, length: int, rng: random.Random) -> float:
    """Mean seconds to first token of fresh prompts that follow one another."""
    root = engine.info.scheme.root(b"bench")
    total = 0.0
    for _ in range(COLD_RUN):
        token_ids = [rng.randrange(16, SHAPE.vocab) for _ in range(length)]
        seconds, fates = time_to_first_token(engine, token_ids, root)
        if fates.get("computed") != length:
            raise RuntimeError(f"a prompt that nobody has seen had the fates {fates}")
        total += seconds
    if not engine.store.flush(FLUSH_S):
        raise RuntimeError(f"the slow tiers did not take the blocks within {FLUSH_S:g} s")
    engine.store.clear(shared=True)
    return total / COLD_RUN


def main() -> None:
    """Print the table."""
    options = arguments(__doc__)
    lengths = LENGTHS[:2] if options.quick else LENGTHS
    rounds = 3 if options.quick else 7
    rng, report = random.Random(1), Report("reuse")
    with engines() as (warm, full, bare):
        measure(warm, 512, rng, settled=False)  # first calls warm up allocators and estimates
        for length in lengths:
            samples = [measure(warm, length, rng) for _ in range(rounds)]
            for tier in ("cold", "device", "host", "redis"):
                report.add(f"{tier}_ttft_{length}", [sample[tier] * 1e3 for sample in samples], "ms")
            for tier in ("device", "host", "redis"):
                ratios = [sample["cold"] / sample[tier] for sample in samples]
                report.add(f"{tier}_speedup_{length}", ratios, "ratio", bar=BARS.get((tier, length), ""))
        for engine in (full, bare):
            measure_cold(engine, 512, rng)
        for length in lengths:
            ratios = [measure_cold(full, length, rng) / measure_cold(bare, length, rng) for _ in range(rounds)]
            report.add(f"cold_vs_no_store_{length}", ratios, "ratio", bar=COLD_BAR)
    report.print(as_json=options.json)


if __name__ == "__main__":
    main()
