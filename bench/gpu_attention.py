"""Attention on a GPU: decode beside the bandwidth of its memory, prefill beside its tensor cores. Llama-3-8B heads.

    python -m bench.gpu_attention [--quick] [--json] [--tiles] [--kv-dtype int8|fp8_e4m3]
    TRITON_INTERPRET=1 PYTHONPATH=.venv-triton:. python -m bench.gpu_attention --dry

Every shape is checked against float32 SDPA before it is timed. Timed is the whole of `attend` (K/V write, splits,
combination) over several layers in one CUDA graph, as a decode step runs it; layers, so that no K/V are found in the
cache of the chip. With `--kv-dtype` the pool is quantised: rows end in its name and have no bar, floors count the bytes
that are read. `--tiles` also times other tiles and splits than those that serve. `--dry` computes tiny shapes on a
CPU, for whoever changes this file; its times say nothing.
"""

from __future__ import annotations

import argparse
import math
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention
from triton.runtime.errors import TritonError

from bench.gpu_chips import UNKNOWN, Chip, chip_of
from bench.report import Report
from kvstore.device import DeviceTier
from kvstore.layout import KV_DTYPES, UNQUANTISED, KVLayout
from kvstore.quantised import Rows, quantise, read_blocks
from workers.attention.step import Span, Step
from workers.attention.tiles import Tile, Tiles, tiles_for
from workers.attention.triton_backend import TritonBackend
from workers.attention.triton_launching import INTERPRETED

LAYERS = 4
WARM_UPS = 3
ENOUGH_TOKENS = 64 << 10  # B x ctx from which decode should be bound by bandwidth
CHECKED = 3  # sequences of a step that are compared
TOLERANCE = {torch.bfloat16: 3e-2, torch.float16: 4e-3, torch.float32: 1e-4}


@dataclass(frozen=True, slots=True)
class Heads:
    """Of the model."""

    heads: int = 32
    kv_heads: int = 8
    dim: int = 128
    dtype: torch.dtype = torch.bfloat16
    block_size: int = 16
    kv_dtype: str = UNQUANTISED

    @property
    def layout(self) -> KVLayout:
        """Of blocks with LAYERS layers."""
        name = str(self.dtype).removeprefix("torch.")
        return KVLayout(LAYERS, self.kv_heads, self.dim, self.dim, name, self.block_size, self.kv_dtype)

    @property
    def suffix(self) -> str:
        """What names of rows end in."""
        return "" if self.kv_dtype == UNQUANTISED else f"_{self.kv_dtype}"


@dataclass
class World:
    """A pool of random K/V with steps to compute over it.

    Attributes:
        sequences: (rows, context) of each.
    """

    sequences: list[tuple[int, int]]
    heads: Heads
    device: torch.device
    window: int | None = None
    tiles: Tiles | None = None
    kv: list[tuple[Rows, Rows]] = field(init=False)

    def __post_init__(self) -> None:
        heads, size = self.heads, self.heads.block_size
        counts = [math.ceil(context / size) for _, context in self.sequences]
        blocks = sum(counts)
        nbytes = blocks * heads.layout.block_nbytes
        tier = DeviceTier(heads.layout, nbytes, clock=time.monotonic, device=self.device)
        self.kv = [tier.kv(layer) for layer in range(LAYERS)]
        for part in (part for pair in self.kv for part in pair):
            _fill(part)
        order = torch.randperm(blocks, generator=torch.Generator().manual_seed(0)).tolist()
        self.spans: list[Span] = []
        row = 0
        for (rows, context), count in zip(self.sequences, counts, strict=True):
            self.spans.append(Span(row, rows, context, [order.pop() for _ in range(count)]))
            row += rows
        # As projections give them: [T, heads, dim], seen from the heads.
        self.query, self.key, self.value = (
            torch.randn(row, count, heads.dim, dtype=heads.dtype, device=self.device).transpose(0, 1)
            for count in (heads.heads, heads.kv_heads, heads.kv_heads)
        )
        nothing = torch.empty(0, dtype=torch.int64, device=self.device)
        backend = TritonBackend(self.tiles)
        self.step = Step(self.kv, size, self.spans, nothing, nothing, backend)

    @property
    def scale(self) -> float:
        return float(self.heads.dim**-0.5)

    def attend(self, layer: int) -> Tensor:
        """One layer's attention; the K/V that it writes are the same each time."""
        return self.step.backend.attend(
            self.step,
            layer,
            self.query,
            self.key,
            self.value,
            scale=self.scale,
            window=self.window,
            softcap=None,
            sinks=None,
        )

    def attend_all(self) -> None:
        """All layers, as a model's forward does."""
        for layer in range(LAYERS):
            self.attend(layer)

    def check(self) -> None:
        """Compare some sequences with SDPA in float32.

        Raises:
            RuntimeError: they differ, or a row is not finite.
        """
        found = self.attend(1)
        if not bool(found.isfinite().all()):
            raise RuntimeError(f"attention over {self.sequences[:3]} gave NaN or infinity; nothing was timed")
        for span in [self.spans[0], *self.spans[-CHECKED + 1 :]]:
            wanted = self._reference(span)
            error = float((found[span.row : span.row + span.length].float() - wanted).abs().max())
            if not error <= TOLERANCE[self.heads.dtype]:
                raise RuntimeError(
                    f"attention of {span.length} rows over {span.context} tokens, heads of {self.heads.dim},"
                    f" {self.heads.dtype}, window {self.window} is off by {error:.1e}; nothing was timed"
                )

    def _reference(self, span: Span) -> Tensor:
        """[rows, heads, dim] float32."""
        table = torch.tensor(span.block_table, device=self.device)
        keys, values = (read_blocks(each, table)[: span.context].float() for each in self.kv[1])
        stands = torch.arange(span.context - span.length, span.context, device=self.device)[:, None]
        places = torch.arange(span.context, device=self.device)[None]
        seen = places <= stands
        if self.window is not None:
            seen &= places > stands - self.window
        group = self.heads.heads // self.heads.kv_heads
        out = scaled_dot_product_attention(
            self.query[:, span.row : span.row + span.length].float()[None],
            keys.transpose(0, 1).repeat_interleave(group, 0)[None],
            values.transpose(0, 1).repeat_interleave(group, 0)[None],
            attn_mask=seen,
            scale=self.scale,
        )
        return out[0].transpose(0, 1)


def _fill(rows: Rows) -> None:
    """Random numbers everywhere, a block's at a time."""
    if isinstance(rows, Tensor):
        rows.normal_()
        return
    for block in range(rows.shape[0]):
        numbers = torch.randn(rows.shape[1:], device=rows.device)
        rows.codes[block], rows.scales[block] = quantise(numbers, rows.kv_dtype)


def layer_seconds(world: World, rounds: int) -> list[float]:
    """Seconds of one layer's `attend`, one figure a round."""
    if world.device.type != "cuda":
        return [_measured(world.attend_all) / LAYERS]
    side = torch.cuda.Stream()  # type: ignore[no-untyped-call]
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(WARM_UPS):
            world.attend_all()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        world.attend_all()
    return cuda_seconds(graph.replay, rounds, LAYERS)


def cuda_seconds(work: Callable[[], None], rounds: int, parts: int = 1) -> list[float]:
    """Seconds of one of `parts` of the work, by CUDA events, one figure a round."""
    for _ in range(WARM_UPS):
        work()
    seconds = []
    for _ in range(rounds):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
        start.record()
        work()
        end.record()
        end.synchronize()
        seconds.append(start.elapsed_time(end) / 1e3 / parts)
    return seconds


def _measured(work: Callable[[], None]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


@dataclass(frozen=True, slots=True)
class Plan:
    """What to time. `dry` has shapes that the interpreter can compute."""

    device: torch.device
    chip: Chip
    heads: Heads
    rounds: int
    decodes: list[tuple[int, int]]  # (sequences, context)
    prefills: list[tuple[int, int]]  # (rows, context)
    dims: list[int]
    windows: list[int]


def plan(*, quick: bool, dry: bool, kv_dtype: str = UNQUANTISED) -> Plan:
    """For this machine.

    Raises:
        RuntimeError: there is no GPU, and it is no dry run under the interpreter.
    """
    if dry and INTERPRETED:
        heads = Heads(heads=2, kv_heads=1, dim=64, dtype=torch.float32, kv_dtype=kv_dtype)
        return Plan(torch.device("cpu"), UNKNOWN, heads, 1, [(2, 70)], [(20, 50)], [80], [20])
    if dry or INTERPRETED or not torch.cuda.is_available():
        raise RuntimeError("this needs a GPU; without one run it with TRITON_INTERPRET=1 and --dry")
    chip = chip_of(torch.cuda.get_device_name())
    decodes = [(1, 8192), (8, 8192), (64, 1024), (64, 4096), (256, 1024)]
    prefills = [(16, 8192), (256, 8192), (2048, 2048), (2048, 8192)]
    if not quick:
        decodes = [(1, 1024), *decodes, (2, 32768), (32, 2048), (128, 1024)]
        prefills = [*prefills, (64, 8192), (512, 8192), (2048, 32768)]
    dims = [128] if quick else [64, 80, 96, 256]
    return Plan(
        torch.device("cuda"), chip, Heads(kv_dtype=kv_dtype), 10 if quick else 30, decodes, prefills, dims, [128, 1024]
    )


def rows(report: Report, plan: Plan) -> None:
    """Add this benchmark's rows; the one with a bar follows the shapes that it is the median of."""
    ratios = [_decode(report, plan, batch, context) for batch, context in plan.decodes]
    sizes = [batch * context for batch, context in plan.decodes]
    bound = [ratio for ratio, size in zip(ratios, sizes, strict=True) if size >= ENOUGH_TOKENS]
    suffix = plan.heads.suffix
    report.add(f"attention_decode_bandwidth_ratio{suffix}", bound or ratios, "ratio", bar="" if suffix else ">= 0.8")
    if plan.device.type == "cuda":
        _copy(report, plan)
    for count, context in plan.prefills:
        _prefill(report, plan, count, context)
    batch, context = plan.decodes[-1]
    for dim in plan.dims:
        _decode(report, replace(plan, heads=replace(plan.heads, dim=dim)), batch, context, f"_dim{dim}")
    for window in plan.windows:
        _decode(report, plan, batch, context, f"_window{window}", window=window)


def _decode(
    report: Report,
    plan: Plan,
    batch: int,
    context: int,
    suffix: str = "",
    *,
    window: int | None = None,
    tiles: Tiles | None = None,
) -> float:
    """Time, floor and share of the peak bandwidth, which is returned."""
    world = World([(1, context)] * batch, plan.heads, plan.device, window, tiles)
    world.check()
    seconds = layer_seconds(world, plan.rounds)
    seen = context if window is None else min(context, window)
    nbytes = batch * seen * plan.heads.layout.token_nbytes / LAYERS
    floor, name = nbytes / plan.chip.bandwidth, f"decode_b{batch}_ctx{context}{suffix}{plan.heads.suffix}"
    report.add(f"{name}_us", [each * 1e6 for each in seconds], "us")
    report.add(f"{name}_floor_us", [floor * 1e6], "us")
    shares = [floor / each for each in seconds]
    report.add(f"{name}_ratio", shares, "ratio")
    return statistics.median(shares)


def _prefill(
    report: Report, plan: Plan, count: int, context: int, suffix: str = "", *, tiles: Tiles | None = None
) -> None:
    """Time, floor and TFLOP/s of one chunk behind its prefix."""
    world = World([(count, context)], plan.heads, plan.device, tiles=tiles)
    world.check()
    seconds = layer_seconds(world, plan.rounds)
    flops = 4 * plan.heads.heads * plan.heads.dim * (count * context - count * (count - 1) / 2)
    name = f"prefill_{count}_ctx{context}{suffix}{plan.heads.suffix}"
    report.add(f"{name}_us", [each * 1e6 for each in seconds], "us")
    report.add(f"{name}_floor_us", [flops / plan.chip.flops * 1e6], "us")
    report.add(f"{name}_tflop_s", [flops / each / 1e12 for each in seconds], "TFLOP/s")


def _copy(report: Report, plan: Plan) -> None:
    """What a plain copy reaches, read and written: nothing that streams memory is faster."""
    source = torch.empty(1 << 30, dtype=torch.uint8, device=plan.device)
    target = torch.empty_like(source)

    def work() -> None:
        target.copy_(source)

    seconds = cuda_seconds(work, plan.rounds)
    report.add("copy_bandwidth_ratio", [2 * source.nbytes / each / plan.chip.bandwidth for each in seconds], "ratio")


def tile_rows(report: Report, plan: Plan) -> None:
    """Other tiles and splits than those that serve, for who chooses them; what does not fit is named and left out."""
    serving = tiles_for(plan.heads.dim, plan.heads.dtype, plan.heads.kv_dtype)
    for tile in (
        Tile(64, 64, 4, 3),
        Tile(128, 64, 4, 3),
        Tile(128, 64, 8, 3),
        Tile(128, 128, 8, 3),
        Tile(64, 128, 4, 3),
    ):
        suffix = f"_{tile.rows}x{tile.keys}x{tile.warps}x{tile.stages}"
        for count, context in plan.prefills:
            try:
                _prefill(report, plan, count, context, suffix, tiles=replace(serving, prefill=tile))
            except (RuntimeError, TritonError) as error:
                print(f"prefill{suffix}: {str(error).splitlines()[0]}", file=sys.stderr)
    for split in (256, 512, 1024):
        for keys in (32, 64, 128):
            tiles = replace(serving, split=split, decode=replace(serving.decode, keys=keys))
            for batch, context in plan.decodes:
                try:
                    _decode(report, plan, batch, context, f"_split{split}_keys{keys}", tiles=tiles)
                except RuntimeError as error:
                    print(f"decode, split {split}, {keys} keys: {str(error).splitlines()[0]}", file=sys.stderr)


def main() -> None:
    """Print them."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="fewer shapes, coarser figures")
    parser.add_argument("--json", action="store_true", help="one JSON object as the last line of standard output")
    parser.add_argument("--tiles", action="store_true", help="also other tiles and splits than those that serve")
    parser.add_argument("--kv-dtype", choices=KV_DTYPES, default=UNQUANTISED, help="what K/V is stored as")
    parser.add_argument("--dry", action="store_true", help="tiny shapes under triton's interpreter")
    options = parser.parse_args()
    report = Report("gpu_attention")
    try:
        todo = plan(quick=options.quick, dry=options.dry, kv_dtype=options.kv_dtype)
    except RuntimeError as error:
        sys.exit(str(error))
    with torch.inference_mode():
        rows(report, todo)
        if options.tiles:
            tile_rows(report, todo)
    report.print(as_json=options.json)


if __name__ == "__main__":
    main()
