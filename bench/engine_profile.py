"""The times of a real engine's steps as an engine profile for replays: `cpu_tiny` of `replay.profiles` is made by this.

One `TorchEngine` in this process is stepped by hand: prefills of several lengths, with and without a cached prefix;
decodes of several sequences with short and long contexts; and prefills beside decodes. Each is repeated, and the least
time counts, in CPU time of this thread: what else the machine does is no part of the engine. Least squares of relative
errors give the figures of `BatchedProfile`. Rows `prefill_*`, `decode_*`, `mixed_*`: the figures, and `*_error`: the
mean relative error of the fit.
"""

from __future__ import annotations

import argparse
import random
import tempfile
import time
from collections.abc import Sequence
from itertools import count

import numpy as np

from bench.report import Report
from kvstore.blocks import block_hashes
from workers.build import build_engine
from workers.config import WorkerConfig
from workers.engine import TorchEngine
from workers.protocol import Job, SamplingParams
from workers.tiny import ModelShape, make_model_folder

SHAPE = ModelShape(layers=6, hidden=256, heads=4, kv_heads=2, vocab=2048)
BLOCK = 16
PREFILLS = ((16, 0), (64, 0), (128, 0), (256, 0), (512, 0), (1024, 0), (1920, 0), (64, 512), (256, 1024), (64, 1920))
DECODES = tuple((sequences, tokens) for sequences in (1, 6, 24) for tokens in (40, 400))
MIXED = ((128, 1, 40), (128, 6, 40), (128, 24, 40), (512, 6, 400), (512, 24, 400))  # chunk, sequences, tokens of each


class Stepped:
    """An engine that is stepped by hand."""

    def __init__(self, engine: TorchEngine) -> None:
        self.engine = engine
        self._rng = random.Random(1)
        self._names = count()

    def prompt(self, tokens: int) -> list[int]:
        """A prompt that nobody had before."""
        return [self._rng.randrange(300, SHAPE.vocab) for _ in range(tokens)]

    def submit(self, prompt: list[int], output: int) -> None:
        """Give the engine a job."""
        root = self.engine.info.scheme.root(b"bench")
        sampling = SamplingParams(output, temperature=0.0, ignore_eos=True)
        self.engine.submit(Job(next(self._names), prompt, root, block_hashes(prompt, root, BLOCK), sampling))

    def step_ms(self) -> float:
        """One step, in this thread's CPU time."""
        started = time.thread_time()
        self.engine.step()
        return (time.thread_time() - started) * 1e3

    def finish(self) -> None:
        """Until all jobs have ended."""
        while self.engine.has_work():
            self.engine.step()

    def prefill_ms(self, tokens: int, cached: int) -> float:
        """A prefill behind so many cached tokens."""
        prefix = self.prompt(cached)
        if cached:
            self.submit([*prefix, *self.prompt(BLOCK)], 1)
            self.finish()
        self.submit([*prefix, *self.prompt(tokens)], 1)
        took = self.step_ms()
        self.finish()
        return took

    def decode_ms(self, sequences: int, tokens: int, chunk: int = 0) -> float:
        """A step of so many decoding sequences of so many tokens, and a prompt's prefill beside them if asked for."""
        for _ in range(sequences):
            self.submit(self.prompt(tokens), 16)
        while self.engine.load().decoding < sequences:
            self.engine.step()
        if chunk:
            self.submit(self.prompt(chunk), 1)
        took = self.step_ms() if chunk else min(self.step_ms() for _ in range(5))
        self.finish()
        return took


def fitted(rows: Sequence[Sequence[float]], times: Sequence[float]) -> tuple[list[float], float]:
    """Factors of the columns, none negative, by least squares of relative errors; and the mean relative error."""
    a, b = np.array(rows, dtype=float), np.array(times, dtype=float)
    used = list(range(a.shape[1]))
    while True:
        found, *_ = np.linalg.lstsq(a[:, used] / b[:, None], np.ones(len(b)), rcond=None)
        if min(found) >= 0 or len(used) == 1:
            break
        used.pop(int(np.argmin(found)))  # a time that would be negative is none
    factors = np.zeros(a.shape[1])
    factors[used] = found
    return [float(factor) for factor in factors], float(np.mean(np.abs(a @ factors / b - 1.0)))


def measure(report: Report, stepped: Stepped, repeats: int) -> None:
    """All rows."""
    stepped.prefill_ms(64, 0)

    prefills = [min(stepped.prefill_ms(n, m) for _ in range(repeats)) for n, m in PREFILLS]
    decodes = [min(stepped.decode_ms(d, t) for _ in range(repeats)) for d, t in DECODES]
    mixed = [min(stepped.decode_ms(d, t, n) for _ in range(repeats)) for n, d, t in MIXED]
    (fixed, token, pair), error = fitted([(1.0, n, n * (m + n / 2)) for n, m in PREFILLS], prefills)
    (step, sequence, context), decode_error = fitted([(1.0, d, d * t) for d, t in DECODES], decodes)
    alone = [fixed + token * n + pair * n * n / 2 + context * d * t for n, d, t in MIXED]
    beside = sum(ms - own for ms, own in zip(mixed, alone, strict=True))
    each = max(0.0, beside / sum(d for _, d, _ in MIXED))
    apart = [abs(own + each * d - ms) / ms for ms, own, (_, d, _) in zip(mixed, alone, MIXED, strict=True)]
    mixed_error = sum(apart) / len(apart)
    for name, value in (
        ("prefill_fixed_ms", fixed),
        ("prefill_token_ms", token),
        ("prefill_pair_ms", pair),
        ("decode_ms", step),
        ("decode_sequence_ms", sequence),
        ("decode_context_ms", context),
        ("mixed_sequence_ms", each),
    ):
        report.add(name, [value], "ms")
    for name, value in (("prefill_error", error), ("decode_error", decode_error), ("mixed_error", mixed_error)):
        report.add(name, [value], "share")


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="two repeats instead of nine")
    parser.add_argument("--json", action="store_true", help="one JSON object as the last line of standard output")
    given, report = parser.parse_args(), Report("engine_profile")
    with tempfile.TemporaryDirectory() as folder:
        model_dir = str(make_model_folder(folder, SHAPE))
        config = WorkerConfig("w0", model_dir, "bench", device="cpu", block_size=BLOCK, host_bytes=0)
        engine = build_engine(config)
        measure(report, Stepped(engine), 2 if given.quick else 9)
        engine.close(flush_s=0.0)
    report.print(as_json=given.json)


if __name__ == "__main__":
    main()
