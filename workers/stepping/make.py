"""Choose how an engine's steps are computed: at once on a CPU, behind the host and from graphs on a GPU."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum

from kvstore.tier import Clock
from workers.attention.captured import PagedBackend
from workers.attention.step import KVViews
from workers.device.cuda import CudaDevice
from workers.device.interface import Device
from workers.models import ModelRunner
from workers.stepping.buckets import TAIL_ROWS, Bucket, decode_buckets, tail_buckets
from workers.stepping.buffers import Capacity
from workers.stepping.graphs import StepGraphs, capture
from workers.stepping.launch import BufferedLauncher, Launcher

log = logging.getLogger(__name__)


class Capturing(StrEnum):
    """Whether small steps are captured: `auto` where it can be done and helps."""

    AUTO = "auto"
    ON = "on"
    OFF = "off"


@dataclass(frozen=True, slots=True)
class StepOptions:
    """What the settings say of steps. `compile`: what is captured is compiled first."""

    graphs: Capturing = Capturing.AUTO
    compile: bool = False


@dataclass(frozen=True, slots=True)
class Limits:
    """The largest step and the longest sequence: tokens and sequences of a step, tokens of a sequence, blocks of the
    pool."""

    max_batch_tokens: int
    max_running: int
    context_length: int
    num_blocks: int


def make_launcher(
    runner: ModelRunner, kv: KVViews, options: StepOptions, limits: Limits, *, clock: Clock
) -> Launcher | None:
    """What computes the steps; None: at once, as on a CPU.

    Raises:
        ValueError: graphs or compiled code were asked for, and cannot be had.
    """
    is_gpu = runner.device.type == "cuda"
    if type(runner).forward is not ModelRunner.forward:
        return None  # it cuts and pads steps in its own way, which nothing here knows
    can_capture = is_gpu and isinstance(runner.backend, PagedBackend)
    if options.graphs is Capturing.ON and not can_capture:
        raise ValueError("engine.cuda_graphs is on, which needs a GPU and its attention kernels; set it to auto")
    captures = can_capture and options.graphs is not Capturing.OFF
    if options.compile and not captures:
        raise ValueError("engine.compile is on, and compiles what graphs capture: a GPU is needed; set it to false")
    if not is_gpu:
        return None
    buckets = [*decode_buckets(limits.max_running), *tail_buckets(limits.max_running, limits.max_batch_tokens)]
    return buffered(runner, kv, CudaDevice(runner.device), options, limits, buckets if captures else (), clock)


def buffered(
    runner: ModelRunner,
    kv: KVViews,
    device: Device,
    options: StepOptions,
    limits: Limits,
    buckets: Sequence[Bucket],
    clock: Clock,
) -> BufferedLauncher:
    """One that runs ahead; a graph of each of these sizes is made now, or none where the model cannot be captured.

    Raises:
        ValueError: it cannot, and graphs or compiled code were asked for.
        RuntimeError: trying it has broken the device.
    """
    size = kv[0][0].shape[1]
    width = min(limits.num_blocks, -(-limits.context_length // size))
    rows = max(limits.max_batch_tokens, limits.max_running, *TAIL_ROWS)
    launcher = BufferedLauncher(runner, kv, device, Capacity(rows, limits.max_running, width, size), runs_ahead=True)
    if buckets:
        if options.compile:
            runner.compile(len(buckets))
        launcher.use(_captured(runner, kv, device, options, launcher, buckets, clock))
    return launcher


def _captured(
    runner: ModelRunner,
    kv: KVViews,
    device: Device,
    options: StepOptions,
    launcher: BufferedLauncher,
    buckets: Sequence[Bucket],
    clock: Clock,
) -> StepGraphs:
    """The graphs; none where a forward asks the device something, or needs memory that is not there."""
    try:
        return capture(device, runner, kv, launcher.buffers, buckets, clock=clock)
    except RuntimeError as error:
        why = f"{runner.folder.path}: its steps cannot be captured ({str(error).partition(chr(10))[0]})"
        if options.graphs is Capturing.ON or options.compile:
            raise ValueError(f"{why}; set engine.cuda_graphs to auto and engine.compile to false") from error
        log.warning(
            "%s: they are launched kernel by kernel, which takes several times as long where few sequences decode;"
            " set engine.cuda_graphs to off to start without trying, or serve a model that can be captured",
            why,
            exc_info=error,
        )
    device.synchronise()  # a device that is broken says so now
    return StepGraphs({})
