"""Sampling on the device: the tokens that `workers.sampler` would choose, without a word from the host.

What the host knows of a row goes over with the step's other numbers: temperature, top-k, top-p, min-p, and the uniform
draw, which follows from (seed, position) and so does not wait for any token. What comes back is one tensor: token,
whether the logits were finite, log-probabilities. The tokens themselves stay on the device, too, for the next step.

Rows that ask for anything else (penalties, a grammar: whatever `SamplingParams` has besides these) are the host's.
"""

from __future__ import annotations

from collections.abc import Sequence as Items
from dataclasses import dataclass, fields

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from workers.protocol import SamplingParams, TokenLogprob
from workers.sampler import CANDIDATES, Row, Sampled, uniform

# What the device does, and what does not change the choice.
DEVICE_FIELDS = frozenset({"temperature", "top_p", "top_k", "min_p", "seed", "logprobs"})
HOST_FIELDS = frozenset({"max_tokens", "stop", "stop_token_ids", "ignore_eos"})
_HEAD = 3  # columns before the alternatives: token, whether all is finite, its log-probability


def samples_on_device(params: SamplingParams) -> bool:
    """Whether the device can choose such a row's token; a parameter that it has never heard of is the host's."""
    plain = {f.name: f.default for f in fields(params) if f.name not in DEVICE_FIELDS | HOST_FIELDS}
    return all(_is_default(getattr(params, name), default) for name, default in plain.items())


def _is_default(value: object, default: object) -> bool:
    return value == default or not value  # fields made by a factory are empty when nobody set them


@dataclass(frozen=True, slots=True)
class DrawPlan:
    """What is done for the R rows of a step; what differs from row to row is in the numbers.

    Attributes:
        numbers: [R, 5] float64: temperature, top_k, top_p, min_p, draw.
        draws: whether any row has a temperature. candidates: of rows that filter; 0: none does.
        plain: whether any row draws without a filter. alternatives: log-probabilities to return; None: none at all.
    """

    numbers: npt.NDArray[np.float64]
    draws: bool
    plain: bool
    candidates: int
    alternatives: int | None

    @property
    def columns(self) -> int:
        """Of the packed result."""
        return _HEAD + 2 * (self.alternatives or 0)


def plan_draws(rows: Items[Row], vocab: int) -> DrawPlan:
    """How to sample these rows, all of which `samples_on_device`."""
    drawn = [row for row in rows if row.params.temperature > 0]
    filtered = [row.params for row in drawn if _filters(row.params)]
    asked = [row.params.logprobs for row in rows if row.params.logprobs is not None]
    numbers = np.array([_numbers(row, vocab) for row in rows], np.float64).reshape(len(rows), 5)
    return DrawPlan(
        numbers=numbers,
        draws=bool(drawn),
        plain=len(filtered) < len(drawn),
        candidates=_candidates(filtered, vocab),
        alternatives=min(max(asked), vocab) if asked else None,
    )


def _numbers(row: Row, vocab: int) -> tuple[float, float, float, float, float]:
    params = row.params
    top_k = min(params.top_k, vocab) if params.top_k else vocab + 1  # no bound is not the same as one that bounds none
    draw = uniform(params.seed, row.position) if params.temperature > 0 else 0.0
    return params.temperature, top_k, params.top_p, params.min_p, draw


def _filters(params: SamplingParams) -> bool:
    return params.top_k > 0 or params.top_p < 1


def _candidates(filtered: Items[SamplingParams], vocab: int) -> int:
    """As many likeliest tokens as hold what any row keeps. Whether a nucleus fits cannot be asked without waiting, so
    rows that a top-k does not bound are given the whole vocabulary."""
    if not filtered:
        return 0
    bounded = all(0 < params.top_k <= CANDIDATES for params in filtered)
    return min(CANDIDATES, vocab) if bounded else vocab


def sample_rows(logits: Tensor, numbers: Tensor, plan: DrawPlan) -> tuple[Tensor, Tensor]:
    """One token for each row; nothing waits for the device.

    Args:
        logits: [R, vocab] float32, raw. numbers: [R, 5] float64, the plan's, on the device.

    Returns:
        [R] int64 tokens, and [R, plan.columns] float64 for `read_rows`.
    """
    best, tokens = logits.max(-1)
    if plan.draws:
        temperature = numbers[:, 0:1].float()
        warm = temperature > 0
        scaled = (logits - best[:, None]) / torch.where(warm, temperature, 1.0)
        drawn = tokens
        if plan.plain:
            drawn = _draw_plain(scaled, numbers)
        if plan.candidates:
            filtered = _draw_filtered(scaled, numbers, plan.candidates)
            filters = (numbers[:, 1] <= logits.shape[-1]) | (numbers[:, 2] < 1)
            drawn = torch.where(filters, filtered, drawn)
        tokens = torch.where(warm[:, 0], drawn, tokens)
    packed = torch.zeros(len(logits), plan.columns, dtype=torch.float64, device=logits.device)
    packed[:, 0], packed[:, 1] = tokens, torch.isfinite(best)
    if plan.alternatives is not None:
        _add_logprobs(packed, logits, tokens, plan.alternatives)
    return tokens, packed


def read_rows(packed: Tensor, rows: Items[Row]) -> list[Sampled]:
    """What came back from the device: [R, columns] on the host."""
    values, found = packed.tolist(), []
    count = (packed.shape[1] - _HEAD) // 2
    for row, (token, finite, logprob, *rest) in zip(rows, values, strict=True):
        wanted = row.params.logprobs
        if not finite:
            found.append(Sampled(None))
            continue
        told = None
        if wanted is not None:
            ids, logprobs = map(int, rest[:wanted]), rest[count : count + wanted]
            told = TokenLogprob(int(token), logprob, tuple(zip(ids, logprobs, strict=True)))
        found.append(Sampled(int(token), told))
    return found


def _draw_plain(scaled: Tensor, numbers: Tensor) -> Tensor:
    weights = torch.softmax(scaled, -1)
    floor = numbers[:, 3:4].float() * weights.amax(-1, keepdim=True)
    return _invert(weights * (weights >= floor), numbers)


def _draw_filtered(scaled: Tensor, numbers: Tensor, count: int) -> Tensor:
    values, ids = scaled.topk(count)
    mass = torch.exp(values - torch.logsumexp(scaled, -1, keepdim=True))
    vocab = scaled.shape[-1]
    top_k = numbers[:, 1:2].clamp_max(vocab)
    mass = mass * (torch.arange(count, device=scaled.device) < top_k)
    through = mass.double().cumsum(-1)
    # What top-p is a share of: all that top-k left, which is all there is where it is no bound.
    total = torch.where((top_k < vocab) | (vocab <= CANDIDATES), through[:, -1:], 1.0)
    nucleus = numbers[:, 2:3].float().double() * total
    floor = numbers[:, 3:4].float() * mass[:, :1]
    kept = (through - mass < nucleus) & (mass >= floor)
    return ids.gather(-1, _invert(mass * kept, numbers)[:, None])[:, 0]


def _invert(weights: Tensor, numbers: Tensor) -> Tensor:
    through = weights.double().cumsum(-1)
    targets = numbers[:, 4:5] * through[:, -1:]
    places = torch.searchsorted(through, targets, right=True)[:, 0]
    return places.clamp_max(weights.shape[-1] - 1)


def _add_logprobs(packed: Tensor, logits: Tensor, tokens: Tensor, count: int) -> None:
    normalised = logits - torch.logsumexp(logits, -1, keepdim=True)
    packed[:, 2] = normalised.gather(-1, tokens[:, None])[:, 0]
    if count:
        values, ids = normalised.topk(count)
        packed[:, _HEAD : _HEAD + count], packed[:, _HEAD + count :] = ids, values
