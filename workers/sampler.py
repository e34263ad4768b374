"""Choose the next tokens of a batch, each row by its own parameters.

Covers: greedy, temperature, top-k, top-p, min-p, seeds, log-probabilities. Does not cover: bias, penalties and
constraints (`logits`), which come first.

Filters apply in the order temperature, top-k, top-p (over what top-k left), min-p. Sorting a vocabulary of 128k costs
20 times as much as taking its 1024 likeliest tokens, so a filtered row is sampled from those, and again from the whole
vocabulary only if its nucleus does not fit: the result is the same. A row without top-k and top-p needs no order.

A row's draw is one uniform number that follows from (seed, position) by a keyed hash (a counter-based generator, as in
Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", 2011), and inverts the row's cumulative distribution. So
it depends neither on the batch nor on what was drawn before: a preempted or moved sequence goes on as it would have.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from hashlib import blake2b

import torch
from torch import Tensor

from workers.logits import adjust
from workers.protocol import JobError, SamplingParams, TokenLogprob
from workers.row_state import RowState

CANDIDATES = 1024
_DRAW_BYTES = 6  # 48 bits: a draw times a sum in float64 stays below the sum


@dataclass(frozen=True, slots=True)
class Row:
    """How to sample one row. `position` is that of the new token in its sequence.

    `state`: what else its logits depend on; None: nothing.
    """

    params: SamplingParams
    position: int
    state: RowState | None = None


@dataclass(frozen=True, slots=True)
class Sampled:
    """The token of one row; None when the model's logits are not finite, or for the reason that `error` tells.

    `logprob` only where asked for, and of the raw logits.
    """

    token_id: int | None
    logprob: TokenLogprob | None = None
    error: JobError | None = None


def sample(logits: Tensor, rows: Sequence[Row], *, candidates: int = CANDIDATES) -> list[Sampled]:
    """One token for each row.

    Args:
        logits: [R, vocab] float32, raw. Not changed.
        rows: R of them. candidates: a filtered row is tried on so many of its likeliest tokens first.
    """
    best, tokens = logits.max(-1)
    finite = [math.isfinite(value) for value in best.tolist()]  # a NaN anywhere in a row is its maximum
    adjusted, errors = _adjusted(logits, best, tokens, rows)
    drawn = [index for index, row in enumerate(rows) if row.params.temperature > 0]
    if drawn:
        where = torch.tensor(drawn, device=logits.device)
        tokens[where] = _draw(adjusted[where], best[where], [rows[index] for index in drawn], candidates)
    ids = tokens.tolist()
    logprobs = _logprobs(logits, ids, rows)
    failed = {index: Sampled(None) for index, is_finite in enumerate(finite) if not is_finite}
    failed |= {index: Sampled(None, error=error) for index, error in errors.items() if index not in failed}
    return [failed.get(index) or Sampled(token, logprobs.get(index)) for index, token in enumerate(ids)]


def uniform(seed: int, position: int) -> float:
    """In [0, 1), the same for the same arguments on every machine."""
    message = (seed % (1 << 64)).to_bytes(8, "little") + position.to_bytes(8, "little")
    digest = blake2b(message, digest_size=_DRAW_BYTES, person=b"warmkv sampler").digest()
    return float(int.from_bytes(digest, "little") / (1 << (8 * _DRAW_BYTES)))


def _adjusted(logits: Tensor, best: Tensor, tokens: Tensor, rows: Sequence[Row]) -> tuple[Tensor, dict[int, JobError]]:
    """(logits after all that rows ask for before the draw, by row why it has no token).

    Rows without a state cost nothing. `best` [R] and `tokens` [R] are brought up to date.
    """
    stateful = {index: row.state for index, row in enumerate(rows) if row.state is not None}
    if not stateful:
        return logits, {}
    where = torch.tensor(list(stateful), device=logits.device)
    part = logits[where]
    errors = adjust(part, list(stateful.values()))
    best[where], tokens[where] = part.max(-1)
    whole = part if len(stateful) == len(rows) else logits.index_copy(0, where, part)
    return whole, {index: errors[place] for place, index in enumerate(stateful) if place in errors}


def _draw(logits: Tensor, best: Tensor, rows: Sequence[Row], candidates: int) -> Tensor:
    """[R] tokens of rows with a temperature."""
    temperatures = _column([row.params.temperature for row in rows], logits)
    # Shifted first, so that a tiny temperature makes minus infinities and no NaN.
    scaled = (logits - best[:, None]) / temperatures
    tokens = torch.empty(len(rows), dtype=torch.int64, device=logits.device)
    for filtered in (False, True):
        chosen = [index for index, row in enumerate(rows) if _filters(row.params) is filtered]
        if chosen:
            where = torch.tensor(chosen, device=logits.device)
            part = [rows[index] for index in chosen]
            drawn = (
                _draw_filtered(scaled[where], part, candidates) if filtered else _draw_unordered(scaled[where], part)
            )
            tokens[where] = drawn
    return tokens


def _filters(params: SamplingParams) -> bool:
    return params.top_k > 0 or params.top_p < 1


def _draw_unordered(scaled: Tensor, rows: Sequence[Row]) -> Tensor:
    weights = torch.softmax(scaled, -1)
    floor = _column([row.params.min_p for row in rows], scaled) * weights.amax(-1, keepdim=True)
    return _invert(weights * (weights >= floor), rows)


def _draw_filtered(scaled: Tensor, rows: Sequence[Row], candidates: int) -> Tensor:
    vocab = scaled.shape[-1]
    count = min(candidates, vocab)
    values, ids = scaled.topk(count)
    mass = torch.exp(values - torch.logsumexp(scaled, -1, keepdim=True))
    top_k = [min(row.params.top_k or vocab, vocab) for row in rows]
    ranks = torch.arange(count, device=scaled.device)
    mass = mass * (ranks < _column(top_k, scaled))
    through = mass.double().cumsum(-1)
    # What top-p is a share of: all that top-k left. Known where top-k lies among the candidates or leaves all.
    total = torch.where(_column(top_k, scaled) <= count, through[:, -1:], 1.0)
    nucleus = _column([row.params.top_p for row in rows], scaled).double() * total
    floor = _column([row.params.min_p for row in rows], scaled) * mass[:, :1]
    kept = (through - mass < nucleus) & (mass >= floor)
    places = _invert(mass * kept, rows)
    tokens = ids.gather(-1, places[:, None])[:, 0]
    if count < vocab:
        reached = (through[:, -1:] >= nucleus)[:, 0].tolist()
        rest = [i for i, k in enumerate(top_k) if k > count and (k < vocab or not reached[i])]
        if rest:
            where = torch.tensor(rest, device=scaled.device)
            tokens[where] = _draw_filtered(scaled[where], [rows[index] for index in rest], vocab)
    return tokens


def _invert(weights: Tensor, rows: Sequence[Row]) -> Tensor:
    """[R] places drawn with probability proportional to the weights [R, n], by inverting their cumulative sum."""
    through = weights.double().cumsum(-1)
    draws = [uniform(row.params.seed, row.position) for row in rows]
    targets = torch.tensor(draws, dtype=torch.float64, device=weights.device)[:, None] * through[:, -1:]
    places = torch.searchsorted(through, targets, right=True)[:, 0]
    return places.clamp_max(weights.shape[-1] - 1)  # only rows of NaN get there


def _logprobs(logits: Tensor, tokens: Sequence[int], rows: Sequence[Row]) -> dict[int, TokenLogprob]:
    asked = {index: row.params.logprobs for index, row in enumerate(rows) if row.params.logprobs is not None}
    if not asked:
        return {}
    part = logits[torch.tensor(list(asked), device=logits.device)]
    normalised = part - torch.logsumexp(part, -1, keepdim=True)
    count = min(max(asked.values()), logits.shape[-1])
    values, ids = (each.tolist() for each in normalised.topk(count))
    found = {}
    for place, (index, wanted) in enumerate(asked.items()):
        top = tuple(zip(ids[place][:wanted], values[place][:wanted], strict=True))
        found[index] = TokenLogprob(tokens[index], float(normalised[place, tokens[index]]), top)
    return found


def _column(values: Sequence[float], like: Tensor) -> Tensor:
    return torch.tensor(values, dtype=torch.float32, device=like.device)[:, None]
