"""The CPU engine beside transformers' own `generate()`, what a step costs besides the forward, and canonical mode.

One model (8 layers, hidden 512, 8 query and 4 K/V heads, float32), one thread, the same prompts, greedy, 32 new tokens:
`generate()` with its default cache and attention, left-padded to the longest prompt where there are several, and a
`TorchEngine` as `build_engine` makes it, cold prompts each time. They run in turns in this process and are timed in CPU
time of this thread, so that what else the machine does is no part of it. Rows:

- `vs_generate_b1_ratio`, `vs_generate_b8_ratio`: the engine's tokens a second over those of `generate()`, of whole
  requests: prefill, 32 tokens, detokenizing, writing to the host tier. One prompt of 256 tokens; eight of 64 to 256.
- `vs_generate_even_b8_ratio`: the same of eight prompts of one length, where `generate()` has nothing to pad.
- `step_overhead_b1_ms`, `step_overhead_ms`: a decode step of the engine less its forward, at 1 and 8 sequences.
- `canonical_prefill_ratio`, `canonical_decode_b1_ratio`, `canonical_decode_b8_ratio`: time of the canonical mode over
  that of the default mode, of a prefill of 512 tokens and of a decode step. `canonical_check_s`: its start.
"""

from __future__ import annotations

import random
import tempfile
import time
from collections.abc import Callable
from itertools import count
from typing import Any

import torch
from transformers import AutoModelForCausalLM

from bench.report import Report, arguments, ratios
from kvstore.blocks import block_hashes
from workers.build import build_engine
from workers.config import WorkerConfig
from workers.engine import TorchEngine
from workers.protocol import Job, SamplingParams
from workers.tiny import ModelShape, make_model_folder

SHAPE = ModelShape(layers=8, hidden=512, heads=8, kv_heads=4)
NEW_TOKENS = 32
ONE, UNEVEN, EVEN = (256,), (64, 96, 128, 160, 192, 224, 240, 256), (256,) * 8
PREFILL = 512
DECODES = 16  # steps of a sample


class Bench:
    """An engine that is stepped by hand, and measured in this thread's CPU time."""

    def __init__(self, engine: TorchEngine) -> None:
        self.engine = engine
        self._names = count()
        self.forward_s = 0.0
        self._watch_forward()

    def submit(self, prompt: list[int], new_tokens: int) -> None:
        """Give it a job."""
        scheme = self.engine.info.scheme
        root = scheme.root(b"bench")
        names = block_hashes(prompt, root, scheme.block_size)
        sampling = SamplingParams(new_tokens, temperature=0.0, ignore_eos=True)
        self.engine.submit(Job(next(self._names), prompt, root, names, sampling))

    def finish(self) -> int:
        """Until all jobs have ended; how many tokens came."""
        tokens = 0
        while self.engine.has_work():
            tokens += sum(len(output.token_ids) for output in self.engine.step().outputs)
        return tokens

    def generate_s(self, prompts: list[list[int]]) -> float:
        """All prompts at once, to the last token."""
        started = time.thread_time()
        for prompt in prompts:
            self.submit(prompt, NEW_TOKENS)
        tokens = self.finish()
        took = time.thread_time() - started
        if tokens != NEW_TOKENS * len(prompts):
            raise RuntimeError(f"{tokens} tokens came, and {NEW_TOKENS * len(prompts)} were asked for")
        return took

    def prefill_s(self, prompt: list[int]) -> float:
        """The step that computes a prompt."""
        self.submit(prompt, 1)
        started = time.thread_time()
        self.finish()
        return time.thread_time() - started

    def decode_s(self, prompts: list[list[int]]) -> tuple[float, float]:
        """Of one decode step of all these: its time, and that of its forward."""
        for prompt in prompts:
            self.submit(prompt, DECODES + 8)
        while self.engine.load().decoding < len(prompts):
            self.engine.step()
        self.forward_s, started = 0.0, time.thread_time()
        for _ in range(DECODES):
            self.engine.step()
        took, forward = time.thread_time() - started, self.forward_s
        self.finish()
        return took / DECODES, forward / DECODES

    def _watch_forward(self) -> None:
        forward: Callable[..., torch.Tensor] = self.engine.runner.forward

        def watched(*given: Any, **named: Any) -> torch.Tensor:
            started = time.thread_time()
            logits = forward(*given, **named)
            self.forward_s += time.thread_time() - started
            return logits

        self.engine.runner.forward = watched  # type: ignore[method-assign]


class Prompts:
    """Prompts that nobody had before."""

    def __init__(self) -> None:
        self._draw = random.Random(1)

    def of(self, lengths: tuple[int, ...]) -> list[list[int]]:
        """One of each length."""
        return [[self._draw.randrange(300, SHAPE.vocab) for _ in range(length)] for length in lengths]


@torch.inference_mode()
def plain_generate_s(model: Any, prompts: list[list[int]]) -> float:
    """The same by transformers, left-padded."""
    longest = max(map(len, prompts))
    started = time.thread_time()
    ids = torch.tensor([[0] * (longest - len(prompt)) + prompt for prompt in prompts])
    mask = torch.tensor([[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in prompts])
    options = {"max_new_tokens": NEW_TOKENS, "min_new_tokens": NEW_TOKENS, "do_sample": False, "use_cache": True}
    out = model.generate(ids, attention_mask=mask, pad_token_id=0, **options)
    took = time.thread_time() - started
    if out.shape[1] != longest + NEW_TOKENS:
        raise RuntimeError("generate() ended early; its figures would not compare")
    return took


def compare(report: Report, bench: Bench, model: Any, repeats: int) -> None:
    """The rows against `generate()`, in turns."""
    prompts = Prompts()
    for name, lengths in (("b1", ONE), ("b8", UNEVEN), ("even_b8", EVEN)):
        is_one = (
            lengths == ONE
        )  # is short, so one sample of it says little; eight at once run little that it has not run
        for _ in range(2 if is_one else int(repeats > 1)):
            bench.generate_s(prompts.of(lengths))
            plain_generate_s(model, prompts.of(lengths))
        batches = [prompts.of(lengths) for _ in range(max(repeats, 3) if is_one else repeats)]
        pairs = [(plain_generate_s(model, batch), bench.generate_s(batch)) for batch in batches]
        theirs, ours = [pair[0] for pair in pairs], [pair[1] for pair in pairs]
        report.add(f"vs_generate_{name}_ratio", ratios(theirs, ours), "ratio", bar=">= 1.0")
        report.add(f"engine_{name}_tok_s", [NEW_TOKENS * len(lengths) / each for each in ours], "tok/s")
        report.add(f"generate_{name}_tok_s", [NEW_TOKENS * len(lengths) / each for each in theirs], "tok/s")


def overhead(report: Report, bench: Bench, repeats: int) -> None:
    """What a step costs besides its forward."""
    prompts = Prompts()
    for name, lengths in (("step_overhead_b1_ms", ONE), ("step_overhead_ms", UNEVEN)):
        steps = [bench.decode_s(prompts.of(lengths)) for _ in range(repeats)]
        report.add(name, [(step - forward) * 1e3 for step, forward in steps], "ms")
        report.add(name.replace("overhead", "forward"), [forward * 1e3 for _, forward in steps], "ms")


def canonical(report: Report, bench: Bench, exact: Bench, repeats: int) -> None:
    """What the canonical mode costs."""
    prompts = Prompts()
    batches = [prompts.of((PREFILL,))[0] for _ in range(repeats)]
    report.add("canonical_prefill_ratio", [exact.prefill_s(each) / bench.prefill_s(each) for each in batches], "ratio")
    for name, lengths in (("b1", ONE), ("b8", UNEVEN)):
        batches_of = [prompts.of(lengths) for _ in range(repeats)]
        found = [exact.decode_s(each)[0] / bench.decode_s(each)[0] for each in batches_of]
        report.add(f"canonical_decode_{name}_ratio", found, "ratio")


def main() -> None:
    """Print the table."""
    given, report = arguments(__doc__), Report("engine")
    repeats = 1 if given.quick else 5
    with tempfile.TemporaryDirectory() as folder:
        model_dir = str(make_model_folder(folder, SHAPE))
        config = WorkerConfig("w0", model_dir, "bench", device="cpu", block_size=16, host_bytes=1 << 28)
        bench = Bench(build_engine(config))
        model = AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32).eval()
        compare(report, bench, model, repeats)
        overhead(report, bench, repeats)
        started = time.thread_time()
        exact_config = WorkerConfig("w1", model_dir, "bench", device="cpu", block_size=16, deterministic=True)
        exact = Bench(build_engine(exact_config))
        report.add("canonical_check_s", [time.thread_time() - started], "s")
        canonical(report, bench, exact, repeats)
        for each in (bench, exact):
            each.engine.close(flush_s=0.0)
    report.print(as_json=given.json)


if __name__ == "__main__":
    main()
