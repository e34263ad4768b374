"""Whole models over the Triton backend: the torch backend's logits, in any step and any way of scoring."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from workers.attention.step import Span
from workers.attention.tiles import Tile, Tiles
from workers.attention.torch_backend import TorchBackend
from workers.attention.triton_backend import TritonBackend
from workers.model_folder import ModelFolder
from workers.models import ATTENTION, ModelRunner
from workers.tiny import ModelShape, make_model_folder

torch.set_num_threads(1)
COMMON = {
    "num_hidden_layers": 2,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 16,
    "vocab_size": 300,
    "max_position_embeddings": 256,
}
GEMMA_2 = {"sliding_window": 20, "attn_logit_softcapping": 3.0, "query_pre_attn_scalar": 16}
GPT_OSS = {"sliding_window": 20, "num_local_experts": 2, "num_experts_per_tok": 1}
TILES = Tiles(prefill=Tile(32, 16, 4, 1), decode=Tile(16, 16, 4, 1), split=32)
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 5e-2}


def _runner(architecture: str, dtype: torch.dtype, options: dict, backend) -> ModelRunner:
    torch.manual_seed(0)
    config = AutoConfig.for_model(architecture, **{**COMMON, **options})
    model = AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation=ATTENTION).eval()
    for name, parameter in model.named_parameters():
        if "sinks" in name:
            torch.nn.init.normal_(parameter)
    return ModelRunner(model.requires_grad_(False), ModelFolder.__new__(ModelFolder), b"", backend)


def _mixed_step(runner: ModelRunner, past: ModelRunner) -> torch.Tensor:
    """Two prompts by `past`, which takes no time, then a step of one decode row, a chunk behind a prefix, and a fresh
    prompt; last rows' logits."""
    layout, generator = runner.layout, torch.Generator().manual_seed(1)
    options = {"dtype": getattr(torch, layout.dtype)}
    kv = [
        tuple(torch.full((16, 8, layout.kv_heads, dim), torch.nan, **options) for dim in (layout.k_dim, layout.v_dim))
        for _ in range(layout.layers)
    ]
    ids = torch.randint(3, runner.vocab_size, (100,), generator=generator).tolist()
    first, second, third = [3, 9, 0, 7, 14, 1], [5, 2, 11, 4], [8]
    past.forward(kv, [Span(0, 40, 40, first[:5])], ids[:40], range(40), [])
    past.forward(kv, [Span(0, 13, 13, second[:2])], ids[40:53], range(13), [])
    spans = [Span(0, 1, 41, first), Span(1, 17, 30, second), Span(18, 5, 5, third)]
    return runner.forward(kv, spans, ids[60:83], [40, *range(13, 30), *range(5)], [0, 5, 17, 18, 22])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    ("architecture", "options"),
    [("llama", {}), ("gemma2", GEMMA_2), ("gpt_oss", GPT_OSS)],
    ids=["llama", "gemma-2", "gpt-oss"],
)
def test_a_mixed_step_gives_the_torch_backends_logits(architecture, options, dtype):
    plain = _runner(architecture, dtype, options, TorchBackend())
    wanted = _mixed_step(plain, plain)
    found = _mixed_step(_runner(architecture, dtype, options, TritonBackend(TILES)), plain)
    error = float((found - wanted).norm() / wanted.norm())
    assert error < TOLERANCE[dtype], error
    if dtype == torch.float32:
        assert torch.equal(found.argmax(-1), wanted.argmax(-1))


def test_a_model_folder_that_is_served_from_here(tmp_path: Path):
    folder = make_model_folder(tmp_path / "m", ModelShape(layers=2, hidden=32, heads=2, kv_heads=1, vocab=512))
    loaded = ModelRunner.load(folder)
    served = ModelRunner(loaded._model, loaded.folder, b"", TritonBackend(TILES))
    torch.testing.assert_close(_mixed_step(served, served), _mixed_step(loaded, loaded), atol=1e-4, rtol=1e-3)
