"""What is copied into a block is not written over by a step that was launched for the block's last owner."""

from __future__ import annotations

import numpy as np

from tests.workers.engine_rig import BLOCK_SIZE, prompts
from tests.workers.stepping.late_device import LateDevice
from tests.workers.stepping.stepping_rig import late_rig


def test_a_block_is_promoted_into_only_when_no_step_in_flight_writes_to_it():
    """`ended` stops at a token whose successor is already queued: that row's K/V must not land in a promoted block."""
    rig = late_rig(LateDevice(eagerness=0.0), device_blocks=16, host_blocks=60, max_running=1, max_batch_tokens=64)
    cached, other = prompts(2, lengths=(70, 40))
    rig.run(rig.job("first", cached, max_tokens=1))
    (probe,) = rig.run(rig.job("probe", other, max_tokens=5, no_store=True, ignore_eos=True))
    rig.device.clear()
    stop = frozenset([probe.token_ids[3]])
    rig.engine.submit(rig.job("ended", other, max_tokens=9, no_store=True, ignore_eos=True, stop_token_ids=stop))
    rig.engine.submit(rig.job("warm", cached, max_tokens=6, ignore_eos=True))
    answers = rig.collect()
    assert answers["ended"].token_ids == probe.token_ids[:4]
    assert answers["warm"].fates == {"host": 64, "computed": 6}
    names = rig.job("x", cached).block_hashes[: 64 // BLOCK_SIZE]
    blocks = rig.device.acquire(names)
    size = rig.device.block_nbytes
    stored = [memoryview(bytearray(size)) for _ in names]
    assert rig.store.host.read(names, stored).count == len(names)
    for mine, theirs in zip(rig.device.payloads(blocks), stored, strict=True):
        assert np.array_equal(np.frombuffer(mine, np.uint8), np.frombuffer(theirs, np.uint8))
    rig.device.release(blocks)
    rig.close()
