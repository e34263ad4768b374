"""A model of any shape with random weights, made where it will run and written nowhere: for measuring."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from workers.model_folder import ModelFolder
from workers.models import ATTENTION, ModelRunner


def random_model(config: Mapping[str, Any], *, device: str, dtype: str, seed: int = 0) -> Any:
    """A causal language model of transformers that attends through us.

    Args:
        config: of config.json, `model_type` among it. device: where its weights are made. dtype: theirs.
    """
    torch.manual_seed(seed)
    options = dict(config)
    shape = AutoConfig.for_model(options.pop("model_type"), **options)
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(shape, dtype=getattr(torch, dtype), attn_implementation=ATTENTION)
    return model.eval().requires_grad_(False)


def random_runner(
    model: Any, folder: ModelFolder, *, kind: type[ModelRunner] = ModelRunner, **options: Any
) -> ModelRunner:
    """Run it. `folder`: whose tokenizer reads its tokens; those beyond it have no text. options: of the runner's kind.

    Raises:
        ModelNotSupported: see `ModelRunner.load`.
    """
    return kind(model, folder, hashlib.sha256(b"random weights").digest(), **options)
