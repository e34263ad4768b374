"""The kernels compile for compute capability 9.0 and fit its memory: what an interpreter cannot know."""

from __future__ import annotations

import pytest
import torch

from tests.triton.offline import SHARED_LIMIT, compile_step

REGISTERS = 65_536  # of a processor


@pytest.mark.parametrize(
    ("dim", "dtype", "scoring"),
    [
        (128, torch.bfloat16, {}),
        (128, torch.bfloat16, {"kv_dtype": "int8"}),
        (128, torch.bfloat16, {"kv_dtype": "fp8_e4m3"}),
        (64, torch.bfloat16, {"window": 128, "sinks": torch.zeros(32, dtype=torch.bfloat16)}),
        (256, torch.float16, {"window": 4096, "softcap": 50.0}),
        (256, torch.bfloat16, {"window": 4096, "softcap": 50.0, "kv_dtype": "fp8_e4m3"}),
    ],
    ids=["llama", "llama int8", "llama fp8", "gpt-oss", "gemma-2", "gemma-2 fp8"],
)
def test_every_kernel_compiles_and_fits(dim, dtype, scoring):
    compiled = compile_step(dim, dtype, **scoring)
    assert [each.name for each in compiled] == ["write_rows", "decode_splits", "combine_splits", "prefill_rows"]
    for each in compiled:
        assert each.shared <= SHARED_LIMIT
        assert 0 <= each.spilled <= 256
    decode = compiled[1]
    assert decode.registers * 32 * 4 * 4 <= REGISTERS
