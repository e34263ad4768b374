"""Forward passes captured once and replayed: one graph for each size that steps are padded to.

Launching a small step kernel by kernel takes the host several times as long as the device needs for it (measured with
an 8B model: 28 ms against 9). A graph is one launch. It is captured over the static buffers, so that filling those and
replaying it is the whole step; sampling follows outside, as its kernels depend on what the rows ask for.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from kvstore.tier import Clock
from workers.attention.captured import INPUTS
from workers.attention.step import KVViews, Step
from workers.device.interface import Device, Graph
from workers.models import ModelRunner
from workers.stepping.buckets import Bucket, choose, largest_first
from workers.stepping.buffers import StepBuffers

log = logging.getLogger(__name__)

_NO_ROWS = torch.empty(0, dtype=torch.int64)

Forward = Callable[[Step, Tensor, Tensor, Tensor], Tensor]


@dataclass(frozen=True, slots=True)
class CapturedStep:
    """A graph, and where the logits of each replay lie: [sequences, vocab] float32."""

    graph: Graph
    logits: Tensor


class StepGraphs:
    """The captured sizes.

    Attributes:
        buckets: the sizes, smallest first.
    """

    def __init__(self, captured: dict[Bucket, CapturedStep]) -> None:
        """Of these; none: every step goes kernel by kernel."""
        self.buckets = sorted(captured)
        self._captured = captured

    def choose(self, rows: int, sequences: int, longest: int) -> Bucket | None:
        """As `buckets.choose`."""
        return choose(self.buckets, rows, sequences, longest)

    def replay(self, bucket: Bucket) -> Tensor:
        """Compute what lies in the static buffers; logits [sequences, vocab], valid until the next replay."""
        captured = self._captured[bucket]
        captured.graph.replay()
        return captured.logits


def static_step(runner: ModelRunner, kv: KVViews, buffers: StepBuffers, bucket: Bucket) -> Step:
    """A step of this size that reads the static buffers and nothing else; its spans are not known."""
    inputs = buffers.inputs(bucket)
    nothing = _NO_ROWS.to(inputs.slots.device)
    size = buffers.capacity.block_size
    return Step(kv, size, (), nothing, nothing, runner.backend, plan={INPUTS: inputs})


def capture(
    device: Device,
    runner: ModelRunner,
    kv: KVViews,
    buffers: StepBuffers,
    buckets: Sequence[Bucket],
    *,
    clock: Clock,
    forward: Forward | None = None,
) -> StepGraphs:
    """Capture all sizes, the largest first; `forward`: instead of the runner's own.

    The buffers must hold padding and nothing else, as what is captured is run, and would write into the pool.
    """
    started, before = clock(), device.used_bytes()
    compute, captured = forward or runner.forward_tensors, {}
    for bucket in largest_first(buckets):
        captured[bucket] = _captured(device, compute, static_step(runner, kv, buffers, bucket), buffers, bucket)
    log.info(
        "step graphs captured",
        extra={
            "graphs": len(captured),
            "largest": max((bucket.rows for bucket in captured), default=0),
            "seconds": round(clock() - started, 2),
            "mib": (device.used_bytes() - before) >> 20,
        },
    )
    return StepGraphs(captured)


def _captured(device: Device, forward: Forward, step: Step, buffers: StepBuffers, bucket: Bucket) -> CapturedStep:
    logits: list[Tensor] = []

    def work() -> None:
        rows = bucket.rows
        made = forward(step, buffers.ids[:rows], buffers.positions[:rows], buffers.wanted[: bucket.sequences])
        if logits and device.torch_device.type == "cpu":
            logits[0].copy_(made)  # as a real graph does, which computes into the same memory each time
        else:
            logits[:] = [made]

    graph = device.capture(work)
    return CapturedStep(graph, logits[0])
