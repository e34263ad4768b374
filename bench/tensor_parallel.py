"""What sharing out a model between two ranks costs and gains on a CPU: step times of two ranks against those of one.

Both engines are built from the same settings and run the same jobs, in turn; the second rank is a process of its own.
With a core for each rank the model's share is halved and the collectives are added; with fewer cores, or on a machine
that others use, the ratio says little more than that. So the collectives of a step are counted, and the time that the
ranks take to agree is measured on its own: a step that has nothing to compute.
"""

from __future__ import annotations

import os
import random
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from bench.report import Report, arguments, ratios
from kvstore.blocks import block_hashes
from workers.build import build_engine
from workers.config import WorkerConfig
from workers.engine import TorchEngine
from workers.protocol import Job, SamplingParams
from workers.tensor_parallel.leader import LeadingEngine
from workers.tensor_parallel.start import build_leading_engine
from workers.tiny import ModelShape, make_model_folder

BATCH = 8
PROMPT_TOKENS = 256
SHAPE = ModelShape(layers=8, hidden=512, heads=8, kv_heads=4)


class Timed:
    """An engine, the times of its steps in milliseconds by kind, and the collectives of each decode step."""

    def __init__(self, engine: TorchEngine | LeadingEngine, collectives: Callable[[], int] = int) -> None:
        """Take over an engine that has nothing to do. `collectives`: how many it has carried out so far."""
        self.engine, self._collectives_so_far = engine, collectives
        self.forget()

    def forget(self) -> None:
        """Begin to measure anew."""
        self.collectives: list[int] = []
        self.prefill: list[float] = []
        self.decode: list[float] = []
        self.idle: list[float] = []

    def run(self, round_number: int, new_tokens: int) -> None:
        """A batch of fresh prompts and their answers."""
        draw, root = random.Random(round_number), self.engine.info.scheme.root(b"")
        for number in range(BATCH):
            prompt = [draw.randrange(5, SHAPE.vocab) for _ in range(PROMPT_TOKENS)]
            names = block_hashes(prompt, root, self.engine.info.scheme.block_size)
            sampling = SamplingParams(max_tokens=new_tokens, temperature=0.0, ignore_eos=True)
            self.engine.submit(Job((round_number, number), prompt, root, names, sampling))
        self.prefill.append(self._step())
        while self.engine.has_work():
            before = self._collectives_so_far()
            self.decode.append(self._step())
            self.collectives.append(self._collectives_so_far() - before)
        self.idle += [self._step() for _ in range(10)]

    def _step(self) -> float:
        started = time.perf_counter()
        self.engine.step()
        return (time.perf_counter() - started) * 1e3


def measure(report: Report, folder: Path, *, rounds: int, new_tokens: int) -> None:
    """Rows of both engines, run in turn."""
    config = WorkerConfig(
        "w0",
        str(folder),
        "bench",
        device="cpu",
        device_bytes=256 << 20,
        host_bytes=0,
        block_size=16,
        max_batch_tokens=4096,
    )
    leader = build_leading_engine(replace(config, tensor_parallel=2))
    one, two = Timed(build_engine(config)), Timed(leader, lambda: leader.group.collectives)
    try:
        for round_number in range(rounds + 1):
            if round_number == 1:  # the first round warms up
                for timed in (one, two):
                    timed.forget()
            for timed in (one, two):
                timed.run(round_number, new_tokens)
    finally:
        one.engine.close(flush_s=0.0)
        leader.close(flush_s=0.0)
    report.add("tp_step_ratio", ratios(two.decode, one.decode), "ratio")
    report.add("tp_prefill_ratio", ratios(two.prefill, one.prefill), "ratio")
    report.add("tp_decode_step_ms", two.decode, "ms")
    report.add("one_rank_decode_step_ms", one.decode, "ms")
    report.add("tp_agreement_ms", two.idle, "ms")
    report.add("collectives_per_decode_step", two.collectives, "collectives")
    report.add("ranks_per_core", [2 / len(os.sched_getaffinity(0))], "ratio")


def main() -> None:
    """Run the benchmark."""
    options = arguments(__doc__ or "")
    report = Report("tensor_parallel")
    with tempfile.TemporaryDirectory(prefix="warmkv-bench-") as folder:
        make_model_folder(folder, SHAPE)
        measure(report, Path(folder), rounds=1 if options.quick else 4, new_tokens=16 if options.quick else 48)
    report.print(as_json=options.json)


if __name__ == "__main__":
    main()
