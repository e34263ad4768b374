"""What is done to logits before a token is drawn: bias, penalties, the constraint's mask. In this order.

Bias is added. The repetition penalty divides positive logits and multiplies negative ones of every token of prompt and
answer (Keskar et al., "CTRL", 2019, as Hugging Face's RepetitionPenaltyLogitsProcessor has it); then presence and
frequency penalties are taken from those of the answer: `frequency * count + presence * (count > 0)` (OpenAI's formula,
as in vLLM). Temperature and filters follow in `sampler`. All rows of a batch are done at once, over the tokens that
are concerned, and what is done to a row depends on no other.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from workers.grammars import ConstraintError
from workers.protocol import JobError
from workers.row_state import RowState

_BYTE = torch.arange(8, dtype=torch.uint8)


def adjust(logits: Tensor, states: Sequence[RowState]) -> dict[int, JobError]:
    """Change the logits [R, vocab] of rows that have a state, in place.

    Returns:
        By row, why no token can be sampled from it.
    """
    _add_bias(logits, states)
    _penalize(logits, states)
    return _constrain(logits, states)


def _add_bias(logits: Tensor, states: Sequence[RowState]) -> None:
    rows, ids = _places([state.bias_ids for state in states], logits)
    if len(rows):
        added = torch.from_numpy(np.concatenate([state.bias for state in states]))
        logits[rows, ids] += added.to(logits.device)


def _penalize(logits: Tensor, states: Sequence[RowState]) -> None:
    penalized = [(row, state, state.seen) for row, state in enumerate(states) if state.seen is not None]
    if not penalized:
        return
    sizes = [len(seen.ids) for _, _, seen in penalized]
    rows = torch.repeat_interleave(torch.tensor([row for row, _, _ in penalized]), torch.tensor(sizes))
    rows, device = rows.to(logits.device), logits.device
    ids = torch.from_numpy(np.concatenate([seen.ids for _, _, seen in penalized])).to(device)
    counts = torch.from_numpy(np.concatenate([seen.counts for _, _, seen in penalized])).to(device)
    chosen = [state.params for _, state, _ in penalized]
    repetition = _spread([params.repetition_penalty for params in chosen], sizes, logits)
    presence = _spread([params.presence_penalty for params in chosen], sizes, logits)
    frequency = _spread([params.frequency_penalty for params in chosen], sizes, logits)
    values = logits[rows, ids]
    values = torch.where(values > 0, values / repetition, values * repetition)
    logits[rows, ids] = values - frequency * counts - presence * (counts > 0)


def _constrain(logits: Tensor, states: Sequence[RowState]) -> dict[int, JobError]:
    masks: dict[int, bytes] = {}
    errors: dict[int, JobError] = {}
    for row, state in enumerate(states):
        if state.grammar is None:
            continue
        try:
            masks[row] = state.grammar.mask()
        except ConstraintError as error:
            message = f"the constraint became too complex ({error}); simplify it"
            errors[row] = JobError("CONSTRAINT_TOO_COMPLEX", message)
            continue
        if not any(masks[row]):
            errors[row] = _DEAD_END
    if masks:
        _rule_out(logits, list(masks), b"".join(masks.values()))
    return errors


_DEAD_END = JobError(
    "CONSTRAINT_DEAD_END",
    "no token of this model's vocabulary can go on as the constraint demands; allow other characters in it",
)


def _rule_out(logits: Tensor, rows: Sequence[int], masks: bytes) -> None:
    packed = np.frombuffer(masks, dtype=np.uint8).reshape(len(rows), -1)
    unpack = _unpacked_here if logits.device.type == "cpu" else _unpacked_there
    ruled_out = unpack(packed, logits.device)[:, : logits.shape[-1]] == 0
    if len(rows) == len(logits):
        logits.masked_fill_(ruled_out, -torch.inf)
    else:
        where = torch.tensor(rows, device=logits.device)
        logits[where] = logits[where].masked_fill_(ruled_out, -torch.inf)


def _unpacked_here(packed: NDArray[np.uint8], device: torch.device) -> Tensor:
    """[R, 8 n] zeros and ones of [R, n] bytes, the lowest bit first."""
    return torch.from_numpy(np.unpackbits(packed, axis=1, bitorder="little")).to(device)


def _unpacked_there(packed: NDArray[np.uint8], device: torch.device) -> Tensor:
    """The same, unpacked on the device: an eighth of the bytes travel."""
    there = torch.from_numpy(packed.copy()).to(device)[:, :, None]
    return ((there >> _BYTE.to(device)) & 1).flatten(1)


def _places(ids: Sequence[NDArray[np.int64]], logits: Tensor) -> tuple[Tensor, Tensor]:
    """(row, token) of each of the tokens that rows name."""
    sizes = torch.tensor([len(each) for each in ids])
    rows = torch.repeat_interleave(torch.arange(len(ids)), sizes)
    return rows.to(logits.device), torch.from_numpy(np.concatenate(ids)).to(logits.device)


def _spread(values: Sequence[float], sizes: Sequence[int], logits: Tensor) -> Tensor:
    """Each row's value once for each of its tokens."""
    repeated = np.repeat(np.asarray(values, dtype=np.float32), sizes)
    return torch.from_numpy(repeated).to(logits.device)
