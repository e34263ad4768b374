"""A compiled model reaches attention through one opaque operator, and gives what it gave before."""

from __future__ import annotations

import torch

from tests.workers.engine_rig import make_rig, prompts, runner
from tests.workers.stepping.stepping_rig import buffered
from workers.attention.gather_backend import GatherBackend
from workers.device.cpu import CpuDevice
from workers.models import ModelRunner
from workers.stepping.buckets import Bucket

BUCKETS = [Bucket(1, 1, 1), Bucket(4, 4, 1), Bucket(16, 8, 16)]


def test_a_compiled_engine_gives_the_same_tokens():
    """Traced and partitioned, but not turned into machine code: that needs a compiler at run time."""
    plain = ModelRunner.load(runner().folder.path)
    model = ModelRunner(plain._model, plain.folder, plain.fingerprint, GatherBackend())

    def answers() -> list[list[int]]:
        rig = make_rig(
            model=model,
            max_running=4,
            make_launcher=lambda tier: buffered(
                tier, CpuDevice(), model=model, buckets=BUCKETS, runs_ahead=True, max_running=4
            ),
        )
        jobs = [rig.job(n, prompt, max_tokens=8) for n, prompt in enumerate(prompts(4, lengths=(7, 40)))]
        found = [answer.token_ids for answer in rig.run(*jobs)]
        rig.close()
        return found

    expected = answers()
    model.compile(len(BUCKETS), backend="aot_eager")
    counted = torch._dynamo.utils.counters
    counted.clear()
    assert answers() == expected
    assert counted["stats"]["unique_graphs"] == len(BUCKETS)
