"""How an engine's steps are computed follows from the device, the attention and the settings."""

from __future__ import annotations

import time
from dataclasses import replace

import pytest
import torch

from kvstore.device import DeviceTier
from tests.workers.engine_rig import Rig, make_rig, prompts, runner
from tests.workers.stepping.stepping_rig import gathering
from workers.attention.captured import PagedBackend
from workers.attention.gather_backend import GatherBackend
from workers.attention.torch_backend import TorchBackend
from workers.device.cpu import CpuDevice
from workers.device.interface import Graph, Work
from workers.models import ModelRunner
from workers.stepping.buckets import decode_buckets
from workers.stepping.launch import DirectLauncher, Launcher
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


class Uncapturable(CpuDevice):
    """Runs work, and fails to capture it, as a GPU does where a forward asks it something. `broken`: for good."""

    def __init__(self, *, broken: bool = False) -> None:
        self.broken, self.captures = broken, 0

    def capture(self, work: Work) -> Graph:
        self.captures += 1
        if self.captures == 1:
            return super().capture(work)
        raise RuntimeError("CUDA error: operation not permitted when stream is capturing\nmore of it")

    def synchronise(self) -> None:
        if self.broken:
            raise RuntimeError("CUDA error: an illegal memory access was encountered")


def _captured_by(device: Uncapturable, options: StepOptions) -> Rig:
    def launcher(tier: DeviceTier) -> Launcher:
        kv = [tier.kv(layer) for layer in range(tier.layout.layers)]
        limits = replace(LIMITS, max_batch_tokens=256, num_blocks=20)
        return buffered(gathering(), kv, device, options, limits, decode_buckets(4), time.monotonic)

    return make_rig(model=gathering(), max_running=4, device_blocks=20, make_launcher=launcher)


def test_a_model_that_cannot_be_captured_is_served_without_graphs_and_said_so(caplog: pytest.LogCaptureFixture):
    rig = _captured_by(Uncapturable(), StepOptions())
    assert rig.engine._pipeline._launcher._graphs.buckets == []
    (told,) = [record for record in caplog.records if "cannot be captured" in record.getMessage()]
    assert str(gathering().folder.path) in told.getMessage()
    assert "not permitted" in told.getMessage()
    assert "set engine.cuda_graphs to off" in told.getMessage()
    plain = make_rig(model=gathering(), max_running=4)
    (prompt,) = prompts(1)
    found, wanted = (each.run(each.job("a", prompt, max_tokens=5))[0].token_ids for each in (rig, plain))
    assert found == wanted
    rig.close()
    plain.close()


@pytest.mark.parametrize("options", [StepOptions(Capturing.ON), StepOptions(compile=True)])
def test_graphs_that_were_asked_for_and_cannot_be_had_are_an_error(
    options: StepOptions, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(ModelRunner, "compile", lambda *_: None)
    with pytest.raises(ValueError, match=r"not permitted when stream is capturing\); set engine.cuda_graphs to auto"):
        _captured_by(Uncapturable(), options)


def test_a_device_that_a_capture_has_broken_is_not_served_from():
    with pytest.raises(RuntimeError, match="illegal memory access"):
        _captured_by(Uncapturable(broken=True), StepOptions())


def test_buffers_hold_the_largest_step_and_the_longest_sequence():
    rig = make_rig(device_blocks=20)
    kv = [rig.device.kv(layer) for layer in range(rig.device.layout.layers)]
    made = buffered(gathering(), kv, CpuDevice(), StepOptions(), LIMITS, decode_buckets(4), time.monotonic)
    capacity = made.buffers.capacity
    assert (capacity.rows, capacity.sequences, capacity.width, capacity.block_size) == (256, 4, 7, 16)
    assert [bucket.rows for bucket in made._graphs.buckets] == [1, 2, 4]
    assert made.buffers.memory.dtype is torch.uint8
