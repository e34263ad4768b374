"""Policies with weights: as a person writes them, as the command that sets them, and drawn at random around defaults.

Covers: the text form `cache_aware:load=2,tie_ms=5`, drawing for a search. Does not cover: searching (`tuning`).
"""

from __future__ import annotations

import math
import random
from collections.abc import Mapping
from dataclasses import dataclass, field

from router.errors import InvalidRequest
from router.policies.protocol import Weight
from router.policy import checked_weights, find_policy

_SPREAD = 1.0  # of a drawn weight's logarithm: two of three lie within a factor of e of the default
_REACH = 20.0  # no weight is drawn further than by this factor
_FROM_ZERO = 0.5  # chance that a weight whose default is zero stays zero
_DIGITS = 2


@dataclass(frozen=True, slots=True)
class Configuration:
    """A policy and the weights that differ from its defaults."""

    policy: str
    weights: Mapping[str, float] = field(default_factory=dict)

    @property
    def text(self) -> str:
        """`cache_aware:load=2,tie_ms=5`."""
        given = ",".join(f"{name}={value:g}" for name, value in sorted(self.weights.items()))
        return f"{self.policy}:{given}" if given else self.policy

    @property
    def command(self) -> str:
        """What puts it into force."""
        weights = "".join(f" --weight {name}={value:g}" for name, value in sorted(self.weights.items()))
        return f"warmkv policy set {self.policy}{weights}"


def parse_configuration(text: str) -> Configuration:
    """What stands in the text form.

    Raises:
        ValueError: it has another form, or names a policy or a weight that there is not, or a value out of range.
    """
    name, _, rest = text.strip().partition(":")
    weights: dict[str, float] = {}
    for part in filter(None, (part.strip() for part in rest.split(","))):
        key, equals, value = part.partition("=")
        try:
            weights[key.strip()] = float(value)
        except ValueError:
            raise ValueError(f"{text!r}: {part!r} is no weight; write NAME:WEIGHT=NUMBER,...") from None
        if not equals:
            raise ValueError(f"{text!r}: {part!r} is no weight; write NAME:WEIGHT=NUMBER,...")
    try:
        checked_weights(find_policy(name), weights)
    except InvalidRequest as error:
        raise ValueError(error.message) from None
    return Configuration(name, _without_defaults(name, weights))


def draw(policy: str, rng: random.Random) -> Configuration:
    """Weights at random: each stays at its default with a chance that leaves about two of them changed.

    On a logarithmic scale around the default, within the weight's limits; two significant digits, so that a person can
    read what is found.
    """
    weights = find_policy(policy).weights
    changes = min(1.0, 2.5 / len(weights)) if weights else 0.0
    drawn = {weight.name: _drawn(weight, rng) for weight in weights if rng.random() < changes}
    return Configuration(policy, _without_defaults(policy, drawn))


def _drawn(weight: Weight, rng: random.Random) -> float:
    if weight.default == 0:
        if rng.random() < _FROM_ZERO:
            return 0.0
        value = math.exp(rng.uniform(math.log(0.1), math.log(100.0)))
    else:
        factor = math.exp(max(-math.log(_REACH), min(math.log(_REACH), rng.gauss(0.0, _SPREAD))))
        value = weight.default * factor
    return min(weight.max, max(weight.min, _rounded(value)))


def _rounded(value: float) -> float:
    return round(value, _DIGITS - 1 - math.floor(math.log10(abs(value)))) if value else 0.0


def _without_defaults(policy: str, weights: Mapping[str, float]) -> dict[str, float]:
    defaults = {weight.name: weight.default for weight in find_policy(policy).weights}
    return {name: value for name, value in sorted(weights.items()) if value != defaults[name]}
