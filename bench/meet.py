"""Load and compute meet in the middle: time to first token of a long prompt in a tier that is as slow as computing.

One CPU worker's engine, `Engine.submit` to the first token; random weights, 8 layers of width 512, float32. The prompt
lies on the disk tier and nowhere else. Each round serves it three times: by computing alone; by loading alone, with
reads that are made so slow that all of them take as long as computing just took; from both ends, as the engine chooses.
The ratio is that of one round; half is the least that can be.
"""

from __future__ import annotations

import math
import random
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from bench.report import Report, arguments, ratios
from bench.reuse import SHAPE
from kvstore.blocks import BlockHash, block_hashes
from kvstore.tier import Delivery, LocalTier
from workers.build import build_engine
from workers.config import WorkerConfig
from workers.engine import TorchEngine
from workers.protocol import Job, SamplingParams
from workers.tiny import make_model_folder

BAR = "<= 0.75"
FLUSH_S = 60.0
WARM_ROUNDS = 1


class Throttle:
    """Reads of a tier take so long a block. `block_s`: zero: as long as they take."""

    def __init__(self, tier: LocalTier) -> None:
        """Over a tier; every read goes through this from now on."""
        self.block_s = 0.0
        self._read: Callable[..., Delivery] = tier.read
        setattr(tier, "read", self._throttled)  # noqa: B010  # a method cannot be assigned in the eyes of a type checker

    def _throttled(
        self, hashes: Sequence[BlockHash], into: Sequence[memoryview], *, deadline_s: float | None = None
    ) -> Delivery:
        due = time.perf_counter() + self.block_s * len(hashes)
        delivery = self._read(hashes, into, deadline_s=deadline_s)
        time.sleep(max(0.0, due - time.perf_counter()))
        return delivery


@contextmanager
def engine_on_disk() -> Iterator[tuple[TorchEngine, Throttle]]:
    """An engine with a device and a disk tier, and what makes its reads slow."""
    with tempfile.TemporaryDirectory() as folder:
        make_model_folder(folder, SHAPE)
        config = WorkerConfig(
            name="bench",
            model_dir=folder,
            model_name="bench",
            device="cpu",
            device_bytes=256 << 20,
            host_bytes=0,
            disk_bytes=1 << 30,
            disk_dir=f"{folder}/disk",
            load_slack_s=5.0,
        )
        engine = build_engine(config)
        try:
            if engine.store.disk is None:
                raise RuntimeError("the engine has no disk tier though it was given bytes for one")
            yield engine, Throttle(engine.store.disk)
        finally:
            engine.close(flush_s=0.0)


def serve(engine: TorchEngine, token_ids: list[int], **options: Any) -> tuple[float, dict[str, int]]:
    """Milliseconds from submit to the first token, and the prompt's fates."""
    root = engine.info.scheme.root(b"bench")
    names = block_hashes(token_ids, root, engine.info.scheme.block_size)
    sampling = SamplingParams(max_tokens=1, temperature=0.0, ignore_eos=True)
    started = time.perf_counter()
    engine.submit(Job("bench", token_ids, root, names, sampling, **options))
    while not (outputs := engine.step().outputs):
        engine.wait(0.05)
    elapsed_ms = 1e3 * (time.perf_counter() - started)
    if not engine.store.flush(FLUSH_S):
        raise RuntimeError(f"the disk did not take the blocks within {FLUSH_S:g} s")
    engine.store.device.clear()
    return elapsed_ms, outputs[-1].fates or {}


@contextmanager
def loading_alone(engine: TorchEngine) -> Iterator[None]:
    """As if nobody knew what computing takes: all is loaded that can be."""
    store, both = engine.store, engine.store.acquire_from_both_ends

    def acquire(hashes: Sequence[BlockHash], **asked: Any) -> Any:
        return store.acquire(hashes, **(asked | {"compute_ms": lambda first, count: math.inf}))

    setattr(store, "acquire_from_both_ends", acquire)  # noqa: B010  # as above
    try:
        yield
    finally:
        setattr(store, "acquire_from_both_ends", both)  # noqa: B010  # as above


def main() -> None:
    """Print the table."""
    options = arguments(__doc__)
    length, rounds = (1024, 3) if options.quick else (4096, 5)
    rng, report = random.Random(1), Report("meet")
    token_ids = [rng.randrange(16, SHAPE.vocab) for _ in range(length)]
    samples: dict[str, list[float]] = {"meet": [], "load_only": [], "compute_only": []}
    shares: list[float] = []
    with engine_on_disk() as (engine, throttle):
        serve(engine, token_ids)  # first calls warm up allocators and estimates, and fill the disk
        blocks = length // engine.info.scheme.block_size
        for number in range(WARM_ROUNDS + rounds):
            computed_ms, _ = serve(engine, token_ids, no_read=True)
            throttle.block_s = computed_ms / 1e3 / blocks
            with loading_alone(engine):
                loaded_ms, _ = serve(engine, token_ids)
            met_ms, fates = serve(engine, token_ids)
            if number >= WARM_ROUNDS:
                for name, ms in (("meet", met_ms), ("load_only", loaded_ms), ("compute_only", computed_ms)):
                    samples[name].append(ms)
                shares.append(fates.get("disk", 0) / length)
    for name, found in samples.items():
        report.add(f"{name}_ttft_ms", found, "ms")
    best = [min(pair) for pair in zip(samples["load_only"], samples["compute_only"], strict=True)]
    report.add("meet_vs_best_ratio", ratios(samples["meet"], best), "ratio", bar=BAR)
    report.add("meet_loaded_share", shares, "ratio")
    report.print(as_json=options.json)


if __name__ == "__main__":
    main()
