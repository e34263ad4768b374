"""What the attention kernels are launched for, and the numbers that make scores of products.

Knows no triton, so that it can be read and tried anywhere.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from workers.attention.paged_inputs import PagedInputs, from_spans
from workers.attention.step import Step

LAUNCHES = "launches"  # where a step's plan keeps them


@dataclass(slots=True)
class Launches:
    """A step's inputs and which sequences each kernel is for.

    Attributes:
        decode, prefill: [N] int32 sequences; None: the first N.
        decodes, prefills: N, how many sequences to launch for; 0: no launch.
        longest: most rows of one sequence.
    """

    inputs: PagedInputs
    decode: Tensor | None
    prefill: Tensor | None
    decodes: int
    prefills: int
    longest: int


@dataclass(frozen=True, slots=True)
class Scoring:
    """How products become exponents of base 2: `factor * product`, or `factor * tanh(inner * product)` if `capped`."""

    factor: float
    inner: float
    window: int
    capped: bool
    sinks: Tensor | None


def for_all(inputs: PagedInputs) -> Launches:
    """Launches for every sequence, where only the device knows which is what."""
    count = len(inputs.contexts)
    return Launches(inputs, None, None, count, count if inputs.longest > 1 else 0, inputs.longest)


def plan(step: Step) -> Launches:
    """What a step's spans need launched; the tensors serve all its layers."""
    device = step.kv[0][0].device
    inputs = from_spans(step.spans, step.block_size, device)
    decode = [number for number, span in enumerate(step.spans) if span.length == 1]
    prefill = [number for number, span in enumerate(step.spans) if span.length > 1]
    if not decode or not prefill:
        return Launches(inputs, None, None, len(decode), len(prefill), inputs.longest)
    members = torch.tensor(decode + prefill, dtype=torch.int32).to(device, non_blocking=True)
    return Launches(inputs, members[: len(decode)], members[len(decode) :], len(decode), len(prefill), inputs.longest)


def score_with(*, scale: float, window: int | None, softcap: float | None, sinks: Tensor | None) -> Scoring:
    """What the kernels compute with.

    Raises:
        ValueError: the scale or the cap is not positive, or the window is empty.
    """
    if not scale > 0 or not (softcap is None or softcap > 0) or not (window is None or window > 0):
        raise ValueError(
            f"attention with scale {scale}, softcap {softcap} and window {window} is not supported on this device: all"
            " must be positive; use device cpu for this model"
        )
    log2_e = math.log2(math.e)
    if softcap is None:
        return Scoring(scale * log2_e, 0.0, window or 0, False, sinks)
    return Scoring(softcap * log2_e, scale / softcap, window or 0, True, sinks)
