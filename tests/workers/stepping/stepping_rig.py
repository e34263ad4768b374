"""Engines whose steps are padded, captured and launched behind the host, on a device that computes late."""

from __future__ import annotations

import functools
import time

from kvstore.device import DeviceTier
from tests.workers.engine_rig import BLOCK_SIZE, SHAPE, Rig, make_rig, runner
from tests.workers.stepping.late_device import GARBAGE, LateDevice
from workers.attention.gather_backend import GatherBackend
from workers.device.interface import Device
from workers.models import ModelRunner
from workers.stepping.buckets import Bucket, decode_buckets, tail_buckets
from workers.stepping.buffers import Capacity
from workers.stepping.graphs import capture
from workers.stepping.launch import BufferedLauncher


@functools.cache
def gathering(architecture: str = "llama") -> ModelRunner:
    """The same model, whose attention reads nothing but tensors."""
    plain = runner(architecture)
    return ModelRunner(plain._model, plain.folder, plain.fingerprint, GatherBackend())


def buffered(
    tier: DeviceTier,
    device: Device,
    *,
    model: ModelRunner,
    buckets: list[Bucket] | None,
    runs_ahead: bool,
    max_batch_tokens: int = 256,
    max_running: int = 32,
) -> BufferedLauncher:
    kv = [tier.kv(layer) for layer in range(tier.layout.layers)]
    width = min(tier.num_blocks, -(-SHAPE.context_length // BLOCK_SIZE))
    capacity = Capacity(max(256, max_batch_tokens), max_running, width, BLOCK_SIZE)
    launcher = BufferedLauncher(model, kv, device, capacity, runs_ahead=runs_ahead)
    if buckets is not None:
        launcher.use(capture(device, model, kv, launcher.buffers, buckets, clock=time.monotonic))
    if isinstance(device, LateDevice):
        device.after_work = lambda: launcher.buffers.memory.fill_(GARBAGE)
    return launcher


def late_rig(
    device: LateDevice | None = None,
    *,
    graphs: bool = True,
    runs_ahead: bool = True,
    gather: bool = True,
    max_batch_tokens: int = 256,
    max_running: int = 32,
    **options: object,
) -> Rig:
    """An engine that runs ahead of a late device."""
    model = gathering() if gather else runner()
    buckets = [*decode_buckets(max_running), *tail_buckets(max_running, max_batch_tokens)] if graphs else None
    return make_rig(
        max_batch_tokens=max_batch_tokens,
        max_running=max_running,
        model=model,
        make_launcher=lambda tier: buffered(
            tier,
            device or LateDevice(),
            model=model,
            buckets=buckets,
            runs_ahead=runs_ahead,
            max_batch_tokens=max_batch_tokens,
            max_running=max_running,
        ),
        **options,
    )


def sync_rig(**options: object) -> Rig:
    """The engine as it is on a CPU, over the same attention."""
    return make_rig(model=gathering(), **options)
