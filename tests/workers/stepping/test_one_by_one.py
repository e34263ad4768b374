"""Steps that are launched one by one have ended before their blocks are anyone's: also where calls return early."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from kvstore.device import DeviceTier
from tests.workers.engine_rig import BLOCK_SIZE, Rig, make_rig, prompts, runner
from tests.workers.stepping.late_device import LateDevice
from workers.device.cpu import CpuDevice
from workers.models import ModelRunner
from workers.stepping import launch
from workers.stepping.launch import DirectLauncher


class OfItsOwnKind(ModelRunner):
    """Computes steps in its own way, as the canonical runner does: no launcher but the direct one knows how."""

    def __init__(self, plain: ModelRunner) -> None:
        super().__init__(plain.model, plain.folder, plain.fingerprint)

    def forward(self, *arguments):
        return super().forward(*arguments)


def _late(**options: object) -> Rig:
    def launcher(tier: DeviceTier) -> DirectLauncher:
        kv = [tier.kv(layer) for layer in range(tier.layout.layers)]
        return DirectLauncher(runner(), kv, LateDevice(eagerness=0.0))

    return make_rig(make_launcher=launcher, host_blocks=60, max_batch_tokens=64, **options)


def _assert_host_has_what_the_device_computed(rig: Rig, prompt: list[int]) -> None:
    names = rig.job("x", prompt).block_hashes[: len(prompt) // BLOCK_SIZE]
    assert rig.store.flush(60)
    blocks = rig.device.acquire(names)
    stored = [memoryview(bytearray(rig.device.block_nbytes)) for _ in names]
    assert len(blocks) == len(names) == rig.store.host.read(names, stored).count
    for mine, theirs in zip(rig.device.payloads(blocks), stored, strict=True):
        assert np.array_equal(np.frombuffer(mine, np.uint8), np.frombuffer(theirs, np.uint8))
    rig.device.release(blocks)


def test_chunks_before_a_prompts_last_are_computed_before_they_leave_the_device():
    """Nobody reads their logits, so nothing but the step's end says when their K/V are there."""
    rig = _late()
    (prompt,) = prompts(1, lengths=(160,))
    rig.run(rig.job("a", prompt, max_tokens=1))
    _assert_host_has_what_the_device_computed(rig, prompt)
    rig.close()


def test_answers_are_those_of_a_device_that_computes_at_once():
    late, plain = _late(), make_rig(max_batch_tokens=64)
    jobs = prompts(6)
    found, wanted = (
        rig.run(*(rig.job(n, prompt, max_tokens=5) for n, prompt in enumerate(jobs))) for rig in (late, plain)
    )
    assert [answer.token_ids for answer in found] == [answer.token_ids for answer in wanted]
    late.close()
    plain.close()


def test_a_step_that_fails_late_ends_its_jobs_and_no_other():
    device = LateDevice(eagerness=0.0)
    rig = make_rig(
        make_launcher=lambda tier: DirectLauncher(
            runner(), [tier.kv(layer) for layer in range(tier.layout.layers)], device
        )
    )
    device.failures = [RuntimeError("staged")]
    first, second = prompts(2)
    (answer,) = rig.run(rig.job("a", first, max_tokens=2))
    assert answer.error is not None
    (answer,) = rig.run(rig.job("b", second, max_tokens=2))
    assert answer.error is None
    rig.close()


def test_an_engine_asks_the_device_that_its_model_lies_on(monkeypatch: pytest.MonkeyPatch):
    """As the engine itself puts it together, for a runner that no other launcher knows."""
    asked: list[torch.device] = []

    def late(torch_device: torch.device) -> LateDevice:
        asked.append(torch_device)
        return LateDevice(eagerness=0.0)

    monkeypatch.setattr(launch, "device_of", late)
    rig = make_rig(model=OfItsOwnKind(runner()), host_blocks=60, max_batch_tokens=64)
    assert asked == [torch.device("cpu")]
    (prompt,) = prompts(1, lengths=(160,))
    rig.run(rig.job("a", prompt, max_tokens=1))
    _assert_host_has_what_the_device_computed(rig, prompt)
    rig.close()


def test_a_gpu_gets_events_of_its_own(monkeypatch: pytest.MonkeyPatch):
    from workers.device import choice

    monkeypatch.setattr(choice, "CudaDevice", lambda torch_device: ("cuda", torch_device))
    assert choice.device_of(torch.device("cuda", 1)) == ("cuda", torch.device("cuda", 1))
    assert isinstance(choice.device_of(torch.device("cpu")), CpuDevice)
