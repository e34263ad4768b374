"""Models whose K/V `bench.kv_quality` quantises: one trained for a moment on text that is at hand, and two made of it.

Covers: a small Llama trained on the Python library's own sources and documentation; the same with outlying channels in
K. Does not cover: a good model. Random weights attend to everything alike, so they hide what wrong keys do; a minute of
training gives attention that depends on them. A model of your own says more: `python -m bench.kv_quality --model DIR`.
"""

from __future__ import annotations

import random
import shutil
import statistics
import sysconfig
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

import torch
from tokenizers import Tokenizer
from torch import Tensor
from transformers import AutoModelForCausalLM
from transformers.utils.logging import disable_progress_bar

from workers.tiny import ModelShape, make_model_folder

SHAPE = ModelShape(layers=3, hidden=128, heads=2, kv_heads=1, vocab=512, context_length=2048, spread=0.02)
SHARP = 0.1  # spread of random weights at which attention and answers are as peaked as a trained model's
SEQUENCE = 1024
BATCH, TRAINED_TOKENS = 4, 256  # short rows, because it is steps that teach; see `_batches`
TEXT_NBYTES = 3_000_000
OUTLIER = 16.0


def local_text() -> str:
    """What every CPython brings: its documentation's topics and the sources of its library, in a fixed order."""
    sources = sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))
    code = "\n".join(path.read_text(encoding="utf-8", errors="replace") for path in sources)
    return "\n".join(topics[name] for name in sorted(topics)) + code[:TEXT_NBYTES]


def token_ids(folder: Path, text: str) -> list[int]:
    """The text as the model of this folder sees it."""
    ids: list[int] = Tokenizer.from_file(str(folder / "tokenizer.json")).encode(text).ids
    return ids


def random_model(folder: Path) -> Path:
    """Weights as they are drawn, of a larger spread."""
    return make_model_folder(folder, replace(SHAPE, spread=SHARP))


def train(folder: Path, ids: list[int], seconds: float) -> tuple[Path, float]:
    """A model folder after training on all but the last tenth of the tokens; the mean of its last losses, nats.

    Args:
        seconds: of the CPU, so that on a busy machine the model is as good.
    """
    make_model_folder(folder, SHAPE)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, weight_decay=0.01)
    losses, give_up = [], time.process_time() + seconds
    for step, (batch, positions) in enumerate(_batches(torch.tensor(ids[: len(ids) * 9 // 10]))):
        for group in optimizer.param_groups:
            group["lr"] = 3e-3 * min(1.0, (step + 1) / 20)
        out = model(input_ids=batch, labels=batch, position_ids=positions)
        optimizer.zero_grad()
        out.loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        losses.append(float(out.loss.detach()))
        if time.process_time() > give_up:
            break
    _save(model, folder)
    return folder, statistics.fmean(losses[-10:])


def with_outliers(trained: Path, folder: Path) -> Path:
    """The same function of the prompt, with one pair of K's channels a head OUTLIER times as large.

    Large models have such channels. What K gains Q loses, so the scores stay; a pair, because rotation mixes the two.
    """
    shutil.copytree(trained, folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    dim = SHAPE.hidden // SHAPE.heads
    with torch.no_grad():
        for layer in model.model.layers:
            for weight, factor in (
                (layer.self_attn.k_proj.weight, OUTLIER),
                (layer.self_attn.q_proj.weight, 1 / OUTLIER),
            ):
                heads = weight.view(-1, dim, SHAPE.hidden)
                heads[:, [dim // 2 - 1, dim - 1]] *= factor  # the pair that turns slowest
    _save(model, folder)
    return folder


def _save(model: Any, folder: Path) -> None:
    disable_progress_bar()
    model.save_pretrained(folder)


def _batches(ids: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """[BATCH, TRAINED_TOKENS] token ids and positions from places drawn at random, without end.

    The positions begin anywhere below SEQUENCE: what is compared later lies that far from the beginning.
    """
    draw, row = random.Random(0), torch.arange(TRAINED_TOKENS)
    while True:
        starts = torch.tensor([draw.randrange(len(ids) - TRAINED_TOKENS) for _ in range(BATCH)])
        first = torch.tensor([draw.randrange(SEQUENCE - TRAINED_TOKENS + 1) for _ in range(BATCH)])
        yield ids[starts[:, None] + row], first[:, None] + row
