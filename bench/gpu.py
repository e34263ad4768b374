"""The engine on a GPU, near which floor: prefill, decode, time to first token, and copies of blocks beside the steps.

A Llama-3-8B shape with random weights, made on the device; everything goes through `Engine.step()`, with scheduling,
sampling, block accounting and spilling to host on. Beside each figure stands what the hardware would allow: reading
every weight and all K/V once a decode step at the peak bandwidth, computing a prefill's products at 80 % of the peak.

Rows `canonical_*_ratio`: times of the bit-exact mode by those of the plain one. A part that fails is reported, and the
others are measured all the same; the command then ends with 1.

With `--kv-dtype` K/V is quantised: rows then end in its name and have no bar, and floors count the bytes that are read.

    python -m bench.gpu [--quick] [--json] [--compile] [--kv-dtype int8|fp8_e4m3] [--only PART ...]
    python -m bench.gpu --dry --quick     # every line of it, on a CPU with a tiny model: its figures mean nothing
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from bench.gpu_copies import Moved, PromoteAlways, SpillAlways, Watched, chains_in_host, promote, spill, watched
from bench.gpu_floors import Floors
from bench.gpu_rig import DRY, LLAMA_8B, GpuRig, Scale, make_rig
from bench.report import Report
from kvstore.layout import KV_DTYPES, UNQUANTISED
from workers.canonical.runner import CanonicalRunner
from workers.stepping.make import StepOptions

WARM_STEPS = 8
BARS = {
    "prefill_2k_tok_s": ">= 36000",
    "decode_b1_tok_s": ">= 140",
    "decode_b32_tok_s": ">= 4000",
    "decode_b128_tok_s": ">= 9500",
    "attention_decode_bandwidth_ratio": ">= 0.8",
    "warm_8k_device_ms": "<= 15",
    "warm_8k_host_ms": "<= 40",
    "spill_gb_s": ">= 45",
    "promote_gb_s": ">= 45",
    "spill_beside_decode_gb_s": ">= 45",
    "promote_beside_decode_gb_s": ">= 45",
    "decode_loss_while_spilling_ratio": "<= 0.05",
    "decode_loss_while_promoting_ratio": "<= 0.05",
}


@dataclass(slots=True)
class Bench:
    """One run. `repeats`: of each short measurement. `failed`: parts that did not come to an end."""

    rig: GpuRig
    report: Report
    floors: Floors
    repeats: int
    dry: bool
    failed: list[str] = field(default_factory=list)

    def add(self, name: str, samples: list[float], unit: str, floor: float | None = None) -> None:
        """A row, its bar unless this is a dry run, and its floor as a row of its own."""
        if self.rig.device.layout.quantised:
            name = f"{name}_{self.rig.device.layout.kv_dtype}"
        bar = "" if self.dry else BARS.get(name, "")
        told = "" if floor is None or not bar else f" (floor {floor:.4g})"
        self.report.add(name, samples, unit, bar=bar + told)
        if floor is not None:
            self.report.add(f"{name}_floor", [floor], unit)

    def run(self, name: str, part: Callable[[Bench], None]) -> None:
        """Measure one part; what it raises is told, and the next one follows."""
        started = time.perf_counter()
        try:
            part(self)
        except Exception:  # noqa: BLE001 - a machine seen for the first time: one part must not cost the others
            self.failed.append(name)
            print(f"{name} failed:\n{traceback.format_exc()}", file=sys.stderr, flush=True)
            self.rig.abandon()
        print(f"{name}: {time.perf_counter() - started:.1f} s", file=sys.stderr, flush=True)


def prefill(bench: Bench) -> None:
    """Prompts of one full step each, one behind the other."""
    rig, tokens, prompts = bench.rig, bench.rig.scale.max_batch_tokens, 6
    samples = []
    for repeat in range(bench.repeats + 1):
        given = [rig.prompt(tokens) for _ in range(prompts)]
        started = time.perf_counter()
        for prompt in given:
            rig.submit(prompt, 1)
        while rig.engine.has_work():
            rig.step()
        if repeat:  # the first one compiles kernels
            samples.append(prompts * tokens / (time.perf_counter() - started))
        rig.finish()
    bench.add("prefill_2k_tok_s", samples, "tokens/s", bench.floors.prefill_tok_s(tokens))


def decode(bench: Bench) -> None:
    """Sequences that all decode, behind a context of their own."""
    context = bench.rig.scale.context
    for batch, name in zip(bench.rig.scale.batches, ("b1", "b32", "b128"), strict=True):
        samples, floor = _decode_rates(bench, batch, bench.repeats), bench.floors.decode_tok_s(batch, context)
        bench.add(f"decode_{name}_tok_s", samples, "tokens/s", floor)


def _decode_rates(bench: Bench, batch: int, repeats: int, before_step: Callable[[], None] | None = None) -> list[float]:
    """Tokens a second, measured over some steps at a time.

    Raises:
        RuntimeError: not all of the sequences got a token in every step: it is another batch that was measured.
    """
    rig, steps, samples = bench.rig, _steps(bench), []
    rig.decoding(batch, WARM_STEPS + steps * repeats + 8)
    for _ in range(WARM_STEPS):
        rig.step()
    for _ in range(repeats):
        made, started = 0, time.perf_counter()
        for _ in range(steps):
            if before_step is not None:
                before_step()
            made += sum(len(output.token_ids) for output in rig.step())
        samples.append(made / (time.perf_counter() - started))
        if made != batch * steps:
            raise RuntimeError(f"{made} tokens in {steps} steps of {batch} sequences; give them more room, or output")
    rig.finish()
    return samples


def _steps(bench: Bench) -> int:
    """That one measurement of decoding takes."""
    return 4 if bench.dry else 16


def first_tokens(bench: Bench) -> None:
    """A long prompt: cold, and with all but its tail in the device or in host."""
    rig, scale = bench.rig, bench.rig.scale
    rig.first_token_ms(rig.prompt(scale.prompt))
    cold = [rig.first_token_ms(rig.prompt(scale.prompt))[0] for _ in range(bench.repeats)]
    bench.add("cold_8k_ms", cold, "ms", scale.prompt / bench.floors.prefill_tok_s(scale.prompt) * 1e3)
    prefix = rig.prompt(scale.prompt - scale.tail)
    rig.first_token_ms([*prefix, *rig.prompt(scale.tail)])
    warm = [[*prefix, *rig.prompt(scale.tail)] for _ in range(bench.repeats + 1)]
    in_device = [rig.first_token_ms(prompt)[0] for prompt in warm]
    in_host, from_host = [], []
    for _ in range(bench.repeats + 1):
        rig.device.clear()
        took_ms, fates = rig.first_token_ms([*prefix, *rig.prompt(scale.tail)])
        in_host.append(took_ms)
        from_host.append(float(fates.get("host", 0)))
    bench.add("warm_8k_device_ms", in_device[1:], "ms", bench.floors.weights_ms)
    bench.add("warm_8k_host_ms", in_host[1:], "ms", bench.floors.loaded_ms(scale.prompt - scale.tail))
    bench.add("warm_8k_host_cached_tokens", from_host[1:], "tokens")


def copies(bench: Bench) -> None:
    """Blocks to host and back, with nothing else to do: the whole, and the copies alone."""
    rig = bench.rig
    _add_moved(bench, "spill", [spill(rig) for _ in range(bench.repeats + 1)][1:])
    chains = chains_in_host(rig)
    _add_moved(bench, "promote", [promote(rig, chains) for _ in range(bench.repeats + 1)][1:])


def _add_moved(bench: Bench, name: str, moved: list[Moved]) -> None:
    bench.add(f"{name}_gb_s", [each.gb_s for each in moved], "GB/s", bench.floors.bus_gb_s)
    bench.add(f"{name}_host_us", [each.host_us for each in moved], "us/block")
    if alone := [each.bus_gb_s for each in moved if each.bus_gb_s is not None]:
        bench.add(f"{name}_bus_gb_s", alone, "GB/s")


def decode_beside_copies(bench: Bench) -> None:
    """Decode with the bus kept busy in one direction, by decode without: interleaved."""
    _beside(bench, "spill", "spilling", SpillAlways(bench.rig))
    _beside(bench, "promote", "promoting", PromoteAlways(bench.rig))


def _beside(bench: Bench, name: str, verb: str, keep_busy: SpillAlways | PromoteAlways) -> None:
    rig, batch = bench.rig, bench.rig.scale.batches[1]
    losses, rates = [], []
    for _ in range(2 if bench.dry else max(3, bench.repeats // 2)):
        alone = _decode_rates(bench, batch, 3)
        with watched(rig, keep_busy.verb) as seen:

            def before_step(seen: Watched = seen) -> None:
                keep_busy()
                seen.mark()

            beside = _decode_rates(bench, batch, 3, before_step)
            keep_busy.end()
        rates.append(seen.gb_s())
        losses.append(1 - statistics.median(beside) / statistics.median(alone))
    bench.add(f"decode_loss_while_{verb}_ratio", losses, "ratio")
    bench.add(f"{name}_beside_decode_gb_s", rates, "GB/s", bench.floors.bus_gb_s)


def attention(bench: Bench) -> None:
    """The decode kernels alone, as `bench.gpu_attention` measures them: K/V bytes that must be read by the peak
    bandwidth, for 64k tokens of context and more. Not in a dry run, which has no kernels."""
    if bench.dry:
        print("attention: run bench.gpu_attention --dry under triton's interpreter", file=sys.stderr, flush=True)
        return
    from bench import gpu_attention  # here: it needs triton

    stored = bench.rig.device.layout.kv_dtype
    gpu_attention.rows(bench.report, gpu_attention.plan(quick=True, dry=False, kv_dtype=stored))


def canonical(bench: Bench, model: Any, folder: Path) -> None:
    """The bit-exact mode by the plain one, on the same weights."""
    prefilled, decoded = _rates(bench)
    bench.rig.close()
    bench.rig = make_rig(bench.rig.scale, folder, StepOptions(), model=model, kind=CanonicalRunner)
    exact_prefilled, exact_decoded = _rates(bench)
    bench.report.add("canonical_prefill_2k_ratio", [prefilled / exact_prefilled], "ratio")
    bench.report.add("canonical_decode_b32_ratio", [decoded / exact_decoded], "ratio")


def _rates(bench: Bench) -> tuple[float, float]:
    """Prefill and decode of the rig at hand, tokens/s; told nowhere."""
    short = Bench(bench.rig, Report("gpu"), bench.floors, 2, bench.dry)
    prefill(short)
    return short.report.rows[0].value, statistics.median(_decode_rates(short, bench.rig.scale.batches[1], 2))


PARTS: dict[str, Callable[[Bench], None]] = {
    "attention": attention,
    "prefill": prefill,
    "decode": decode,
    "first_tokens": first_tokens,
    "copies": copies,
    "decode_beside_copies": decode_beside_copies,
}


def measure(scale: Scale, options: argparse.Namespace, folder: Path) -> Bench:
    """All parts that are asked for."""
    started = time.perf_counter()
    steps, kv_dtype = StepOptions(compile=options.compile), options.kv_dtype
    rig = make_rig(scale, folder, steps, captures=not options.eager, kv_dtype=kv_dtype)
    print(f"model, tiers and graphs: {time.perf_counter() - started:.1f} s", file=sys.stderr, flush=True)
    repeats = 3 if options.quick else 7
    bench = Bench(rig, Report("gpu"), Floors.of(rig), repeats, options.dry)
    bench.report.add("start_s", [time.perf_counter() - started], "s")
    for name, part in PARTS.items():
        if not options.only or name in options.only:
            bench.run(name, part)
    # It would find compiled layers, and is not for quantised K/V.
    if (not options.only or "canonical" in options.only) and not options.compile and kv_dtype == UNQUANTISED:
        bench.run("canonical", lambda each: canonical(each, rig.runner.model, folder / "canonical"))
    bench.rig.close()
    return bench


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="fewer repeats; coarser figures")
    parser.add_argument("--json", action="store_true", help="one JSON object as the last line of standard output")
    parser.add_argument("--dry", action="store_true", help="on a CPU, with a tiny model; the figures mean nothing")
    parser.add_argument("--compile", action="store_true", help="compile what is captured first; takes minutes")
    parser.add_argument("--eager", action="store_true", help="without graphs")
    parser.add_argument("--kv-dtype", choices=KV_DTYPES, default=UNQUANTISED, help="what K/V is stored as")
    parser.add_argument("--only", nargs="+", choices=[*PARTS, "canonical"], help="these parts alone")
    options = parser.parse_args()
    if not options.dry and not torch.cuda.is_available():
        parser.error("PyTorch finds no usable GPU; give --dry to run it on a CPU with a tiny model")
    if options.dry:
        torch.set_num_threads(1)
    with tempfile.TemporaryDirectory(prefix="warmkv-bench-") as folder:
        bench = measure(DRY if options.dry else LLAMA_8B, options, Path(folder))
    bench.report.print(as_json=options.json)
    if bench.failed:
        sys.exit(f"failed: {', '.join(bench.failed)}; see above")


if __name__ == "__main__":
    main()
