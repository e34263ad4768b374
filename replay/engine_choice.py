"""Engines of a replay by name: the one place that knows which timing models there are."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace

from replay.batched_profile import BatchedProfile
from replay.profiles import PROFILES, NamedProfile
from replay.serial_engine import SerialProfile
from replay.tiers import TierProfile, Tiers
from router.cost import PrefillFit
from workers.roles import parse_roles

Profile = SerialProfile | BatchedProfile
# A profile for a pool of so many tokens, whose router is told a rate that is off by this factor; the last argument is
# the prefill rate of a worker in tokens a second, None: the engine's own.
ProfileMaker = Callable[[int, float, float | None], Profile]


def _serial(pool_tokens: int, fit_error: float, prefill_tokens_per_s: float | None) -> SerialProfile:
    plain = SerialProfile(pool_tokens=pool_tokens, fit_error=fit_error)
    return plain if prefill_tokens_per_s is None else replace(plain, prefill_tokens_per_s=prefill_tokens_per_s)


def _batched(named: NamedProfile) -> ProfileMaker:
    def make(pool_tokens: int, fit_error: float, prefill_tokens_per_s: float | None) -> BatchedProfile:
        plain = replace(named.profile, pool_tokens=pool_tokens, fit_error=fit_error)
        if prefill_tokens_per_s is None:
            return plain
        return replace(plain, prefill=PrefillFit(plain.prefill.fixed_ms, 1e3 / prefill_tokens_per_s))

    return make


ENGINES: dict[str, ProfileMaker] = {"serial": _serial} | {name: _batched(named) for name, named in PROFILES.items()}
DEFAULT_ENGINE = "serial"
# A seed breaks ties, and puts the rate that the router is told off by a fiftieth: rules that predict have no ties, and
# their figures should show noise, too.
_RATE_ERRORS = (1.0, 0.98, 1.02)


def profile(name: str, pool_tokens: int, *, seed: int = 1, prefill_tokens_per_s: float | None = None) -> Profile:
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


def tiers(name: str, *, host_tokens: int | None = None, redis_tokens: int | None = None, roles: str = "") -> Tiers:
    """What lies below each worker's pool, with the read times of an engine's machine.

    Args:
        host_tokens: capacity of one worker's host RAM. redis_tokens: of the shared tier. None: there is none.
        roles: see `workers.roles`; with any, blocks travel between workers.

    Raises:
        ValueError: that engine has none, or no figures of such a tier; or these are no roles.
    """
    if host_tokens is None and redis_tokens is None and not parse_roles(roles):
        return Tiers()
    if name not in PROFILES:
        raise ValueError(
            f"the engine {name} has one tier, and knows no roles; for more choose one of {', '.join(PROFILES)}"
        )
    known = PROFILES[name].tiers
    return Tiers(
        host=_sized(name, "host", known.host, host_tokens),
        redis=_sized(name, "redis", known.redis, redis_tokens),
        peer=_sized(name, "peer", known.peer, 0 if roles else None),
    )


def _sized(name: str, tier: str, known: TierProfile | None, tokens: int | None) -> TierProfile | None:
    if tokens is None:
        return None
    if known is None:
        having = [each.name for each in PROFILES.values() if getattr(each.tiers, tier) is not None]
        raise ValueError(f"the engine {name} has no figures of a tier {tier}; choose one of {', '.join(having)}")
    return replace(known, tokens=tokens)
