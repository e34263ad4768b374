"""Engines of a replay by name: the one place that knows which timing models there are."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace

from replay.serial_engine import SerialProfile

# A profile for a pool of so many tokens, whose router is told a rate that is off by this factor; the last argument is
# the prefill rate of a worker in tokens a second, None: the engine's own.
ProfileMaker = Callable[[int, float, float | None], SerialProfile]


def _serial(pool_tokens: int, fit_error: float, prefill_tokens_per_s: float | None) -> SerialProfile:
    plain = SerialProfile(pool_tokens=pool_tokens, fit_error=fit_error)
    return plain if prefill_tokens_per_s is None else replace(plain, prefill_tokens_per_s=prefill_tokens_per_s)


ENGINES: dict[str, ProfileMaker] = {"serial": _serial}
DEFAULT_ENGINE = "serial"
# A seed breaks ties, and puts the rate that the router is told off by a fiftieth: rules that predict have no ties, and
# their figures should show noise, too.
_RATE_ERRORS = (1.0, 0.98, 1.02)


def profile(name: str, pool_tokens: int, *, seed: int = 1, prefill_tokens_per_s: float | None = None) -> SerialProfile:
    """The engine of that name.

    Args:
        pool_tokens: capacity of one worker. seed: from 1. prefill_tokens_per_s: of one worker; None: the engine's.

    Raises:
        ValueError: there is none of that name, or the rate is not positive.
    """
    if name not in ENGINES:
        raise ValueError(f"there is no engine {name!r}; choose one of {', '.join(sorted(ENGINES))}")
    if prefill_tokens_per_s is not None and not 0 < prefill_tokens_per_s < math.inf:
        raise ValueError(f"a prefill rate of {prefill_tokens_per_s:g} tokens a second; give more than zero")
    return ENGINES[name](pool_tokens, _RATE_ERRORS[(seed - 1) % len(_RATE_ERRORS)], prefill_tokens_per_s)
