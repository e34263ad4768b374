"""How an engine's steps are computed follows from the device, the attention and the settings."""

from __future__ import annotations

import time

import pytest
import torch

from tests.workers.engine_rig import make_rig, runner
from tests.workers.stepping.stepping_rig import gathering
from workers.attention.captured import PagedBackend
from workers.attention.gather_backend import GatherBackend
from workers.attention.torch_backend import TorchBackend
from workers.device.cpu import CpuDevice
from workers.models import ModelRunner
from workers.stepping.buckets import decode_buckets
from workers.stepping.launch import DirectLauncher
from workers.stepping.make import Capturing, Limits, StepOptions, buffered, make_launcher

LIMITS = Limits(max_batch_tokens=64, max_running=4, context_length=100, num_blocks=20)


def _made(model: ModelRunner, options: StepOptions) -> object:
    rig = make_rig(device_blocks=20)
    kv = [rig.device.kv(layer) for layer in range(rig.device.layout.layers)]
    return make_launcher(model, kv, options, LIMITS, clock=time.monotonic)


def test_a_cpu_computes_at_once():
    assert _made(runner(), StepOptions()) is None
    assert _made(gathering(), StepOptions(Capturing.OFF)) is None
    assert isinstance(make_rig().engine._pipeline._launcher, DirectLauncher)


@pytest.mark.parametrize("options", [StepOptions(Capturing.ON), StepOptions(compile=True)])
def test_what_cannot_be_had_is_refused_with_a_remedy(options: StepOptions):
    with pytest.raises(ValueError, match=r"needs a GPU|a GPU is needed"):
        _made(gathering(), options)


def test_backends_that_go_by_tensors_alone_can_be_captured():
    assert isinstance(GatherBackend(), PagedBackend)
    assert not isinstance(TorchBackend(), PagedBackend)


def test_buffers_hold_the_largest_step_and_the_longest_sequence():
    rig = make_rig(device_blocks=20)
    kv = [rig.device.kv(layer) for layer in range(rig.device.layout.layers)]
    made = buffered(gathering(), kv, CpuDevice(), StepOptions(), LIMITS, decode_buckets(4), time.monotonic)
    capacity = made.buffers.capacity
    assert (capacity.rows, capacity.sequences, capacity.width, capacity.block_size) == (256, 4, 7, 16)
    assert [bucket.rows for bucket in made._graphs.buckets] == [1, 2, 4]
    assert made.buffers.memory.dtype is torch.uint8
