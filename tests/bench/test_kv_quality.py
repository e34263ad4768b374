"""What `bench.kv_quality` compares is what it says."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch

from bench.kv_model import SEQUENCE, random_model, token_ids, with_outliers
from bench.kv_quality import FIRST, compare, logits_of
from workers.models import ModelRunner

torch.set_num_threads(1)
TEXT = list(range(5, 5 + SEQUENCE - 500)) * 2


def test_a_model_compared_with_itself_differs_in_nothing() -> None:
    own = torch.randn(len(TEXT) - FIRST - 1, 2000, generator=torch.Generator().manual_seed(0))
    same = compare(own, own, TEXT)
    assert same.kl.abs().max() < 1e-9
    assert same.agrees.all()
    assert torch.equal(same.loss, same.own_loss)


def test_divergence_agreement_and_loss_are_those_of_the_definition() -> None:
    own, found = torch.tensor([[math.log(0.5), math.log(0.5)]]), torch.tensor([[math.log(0.25), math.log(0.75)]])
    compared = compare(found, own, [0] * (FIRST + 1) + [1])
    assert compared.kl.tolist() == pytest.approx([0.5 * math.log(2) + 0.5 * math.log(2 / 3)])
    assert (compared.loss.item(), compared.own_loss.item()) == pytest.approx((-math.log(0.75), math.log(2)))
    assert compared.agrees.tolist() == [0.0]


def test_outlying_channels_leave_the_model_as_it_was_and_are_in_its_keys(tmp_path: Path) -> None:
    plain = ModelRunner.load(random_model(tmp_path / "plain"))
    changed = ModelRunner.load(with_outliers(tmp_path / "plain", tmp_path / "changed"))
    ids = (token_ids(tmp_path / "plain", "the same text again and again, ") * 200)[: FIRST + 40]
    own, other = (logits_of(runner, "auto", ids) for runner in (plain, changed))
    assert torch.allclose(own, other, atol=1e-3 * float(own.abs().max()))
    weights = [runner._model.model.layers[1].self_attn.k_proj.weight for runner in (plain, changed)]
    assert weights[1].abs().max() > 8 * weights[0].abs().max()
    errors = [float((logits_of(runner, "int8", ids) - own).norm()) for runner in (plain, changed)]
    assert errors[1] > errors[0] > 0
