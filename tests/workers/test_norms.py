"""Shorter norms: the same bits, and only where the formula is the same."""

from __future__ import annotations

import copy

import torch
from torch import nn
from transformers.models.gemma2.modeling_gemma2 import Gemma2RMSNorm
from transformers.models.llama.modeling_llama import LlamaRMSNorm
from transformers.models.qwen3.modeling_qwen3 import Qwen3RMSNorm

from workers.norms import simplify_norms


class OddRMSNorm(LlamaRMSNorm):
    """Looks like the others from outside."""

    def forward(self, hidden_states):
        return super().forward(hidden_states) * 1.0001


def _model(*norms: nn.Module) -> nn.Module:
    draw = torch.Generator().manual_seed(1)
    for norm in norms:
        norm.weight.data = torch.randn(norm.weight.shape, generator=draw).to(norm.weight.dtype)
    return nn.ModuleList(norms).requires_grad_(False)


@torch.inference_mode()
def test_a_shorter_norm_gives_the_same_bits_and_leaves_its_input():
    model = _model(LlamaRMSNorm(64), Qwen3RMSNorm(16))
    before = copy.deepcopy(model)
    assert simplify_norms(model) == 2
    for norm, old in zip(model, before, strict=True):
        for rows in (1, 2, 7, 300):
            given = torch.randn(1, rows, len(norm.weight)) * 20
            kept = given.clone()
            assert torch.equal(norm(given), old(given))
            assert torch.equal(given, kept)


def test_other_formulas_and_dtypes_stay():
    assert simplify_norms(_model(OddRMSNorm(64), Gemma2RMSNorm(64), LlamaRMSNorm(64).bfloat16())) == 0
    assert simplify_norms(_model(nn.LayerNorm(64))) == 0
