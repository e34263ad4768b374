"""How long will it take, in milliseconds: reads of a tier, prefills, and which of the two to choose.

Pure Python without numpy or torch: the router prices workers with the same functions. Everything is learnt from
measurements; before the first one an estimate is None, and the choice is to load (one has to begin to learn).

Both fits are least squares over moments that fade exponentially (each new measurement takes a share `_FADE` of the
weight), so that they follow a machine whose load changes and cost O(1) memory. A measurement far above the estimate is
cut down to `_OUTLIER` times it: one stall does not spoil the fit, while a tier that stays slow is believed after a few.
From the second read in a row that is far below the estimate each weighs `_CATCH_UP`: a tier that was slow is read
seldom, and must not stay avoided when it is fast again.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import combinations

_FADE = 0.1
_OUTLIER = 4.0
_CATCH_UP = 0.5
_SETTLED = 4  # measurements before outliers are cut
_RIDGE = 1e-6  # relative; decides between features that the measurements cannot tell apart
_GAIN = 1e-4  # a further term must improve the mean squared relative error by this much
_MIN_MS = 1e-3


class TransferEstimate:
    """Latency and bandwidth of reads from one tier: `ms = latency_ms + nbytes / bytes_per_ms`.

    With reads of one size only, all of the time counts as bandwidth.
    """

    def __init__(self) -> None:
        self._count = self._far_below = 0
        self._mean_x = self._mean_y = self._var_x = self._cov = 0.0

    @property
    def measured(self) -> bool:
        """Whether there was a measurement."""
        return self._count > 0

    @property
    def latency_ms(self) -> float:
        """Time of a read of no bytes; zero before the first measurement."""
        return max(0.0, self._mean_y - self._ms_per_byte * self._mean_x)

    def ms_per(self, nbytes: int) -> float:
        """Time that so many bytes add to a read; zero before the first measurement."""
        return self._ms_per_byte * nbytes

    def predict_ms(self, nbytes: int) -> float | None:
        """Time of a read of so many bytes; None before the first measurement."""
        return self.latency_ms + self.ms_per(nbytes) if self.measured else None

    def observe(self, nbytes: int, ms: float) -> None:
        """Learn from a read. A read that found nothing, or was given up, counts with zero bytes."""
        expected = self.predict_ms(nbytes)
        if expected is not None and self._count >= _SETTLED:
            ms = min(ms, _OUTLIER * max(expected, _MIN_MS))
        is_far_below = expected is not None and ms * _OUTLIER < expected
        self._far_below = self._far_below + 1 if is_far_below else 0
        self._count += 1
        weight = max(_CATCH_UP if self._far_below > 1 else _FADE, 1.0 / self._count)
        dx, dy = nbytes - self._mean_x, ms - self._mean_y
        self._mean_x += weight * dx
        self._mean_y += weight * dy
        self._var_x = (1 - weight) * (self._var_x + weight * dx * dx)
        self._cov = (1 - weight) * (self._cov + weight * dx * dy)

    @property
    def _ms_per_byte(self) -> float:
        """The slope, pulled towards the ratio of the means where the sizes hardly differ; not negative."""
        if self._mean_x <= 0:
            return 0.0
        ratio, pull = self._mean_y / self._mean_x, _RIDGE * self._mean_x * self._mean_x
        slope = (self._cov + pull * ratio) / (self._var_x + pull)
        return min(max(0.0, slope), ratio)


@dataclass(frozen=True, slots=True)
class PrefillCost:
    """Time to prefill n new tokens after m cached ones: `fixed_ms + token_ms * n + pair_ms * n * (m + n / 2)`.

    The last term is attention: each new token looks at all before it.
    """

    fixed_ms: float
    token_ms: float
    pair_ms: float

    def predict_ms(self, new: int, cached: int) -> float:
        """Milliseconds; zero for no new tokens."""
        return _dot((self.fixed_ms, self.token_ms, self.pair_ms), _features(new, cached)) if new > 0 else 0.0


class PrefillFit:
    """Learns a `PrefillCost` from measured prefills, by relative errors: short ones weigh as much as long ones."""

    def __init__(self) -> None:
        self._count = 0
        self._gram = [[0.0] * 3 for _ in range(3)]
        self._moment = [0.0] * 3
        self._cost: PrefillCost | None = None

    @property
    def cost(self) -> PrefillCost | None:
        """The fit; None before the first measurement."""
        if self._cost is None and self._count > 0:
            self._cost = PrefillCost(*_nonnegative_fit(self._gram, self._moment))
        return self._cost

    def predict_ms(self, new: int, cached: int) -> float | None:
        """Milliseconds; None before the first measurement."""
        return None if self.cost is None else self.cost.predict_ms(new, cached)

    def observe(self, new: int, cached: int, ms: float) -> None:
        """Learn from a prefill of `new` tokens (at least one) after `cached` ones."""
        ms = max(ms, _MIN_MS)
        expected = self.predict_ms(new, cached)
        if expected is not None and self._count >= _SETTLED:
            ms = min(ms, _OUTLIER * max(expected, _MIN_MS))
        row = [feature / ms for feature in _features(new, cached)]  # over ms: relative errors, the target is 1
        self._count += 1
        weight = max(_FADE, 1.0 / self._count)
        for i in range(3):
            self._moment[i] += weight * (row[i] - self._moment[i])
            for j in range(3):
                self._gram[i][j] += weight * (row[i] * row[j] - self._gram[i][j])
        self._cost = None


def worth_loading(load_ms: float | None, compute_ms: float | None) -> bool:
    """Whether to load blocks rather than compute them. None: not measured; then loading is tried."""
    return load_ms is None or compute_ms is None or load_ms < compute_ms


def _features(new: int, cached: int) -> tuple[float, float, float]:
    return 1.0, float(new), new * (cached + new / 2)


def _nonnegative_fit(gram: list[list[float]], moment: list[float]) -> tuple[float, float, float]:
    """Least squares with coefficients >= 0: the best of the unconstrained fits over each subset of features.

    With three features there are seven subsets, and the optimum is among them (the active-set view of Lawson and
    Hanson's NNLS). A ridge relative to each feature's own size keeps subsets solvable that were measured at one point.
    """
    best, best_error = (0.0, 0.0, 0.0), 0.0
    for subset in _subsets(3):
        solution = _solve(gram, moment, subset)
        if solution is None or min(solution) < 0:
            continue
        full = [0.0] * 3
        for index, value in zip(subset, solution, strict=True):
            full[index] = value
        error = sum(full[i] * (_dot(gram[i], full) - 2 * moment[i]) for i in range(3))
        if error < best_error - _GAIN:
            best, best_error = (full[0], full[1], full[2]), error
    return best


def _subsets(size: int) -> Iterator[tuple[int, ...]]:
    # Tokens alone first, so that a single measurement is read as a price per token.
    order = (1, 2, 0)
    for count in range(1, size + 1):
        yield from combinations(order, count)


def _solve(gram: list[list[float]], moment: list[float], subset: tuple[int, ...]) -> list[float] | None:
    """Gaussian elimination on the scaled, ridged subsystem; None when it is singular."""
    scale = [gram[i][i] ** 0.5 for i in subset]
    if min(scale) <= 0:
        return None
    rows = [
        [gram[i][j] / (si * sj) + (_RIDGE if i == j else 0.0) for j, sj in zip(subset, scale, strict=True)]
        + [moment[i] / si]
        for i, si in zip(subset, scale, strict=True)
    ]
    size = len(subset)
    for pivot in range(size):
        if rows[pivot][pivot] < _RIDGE / 2:
            return None
        for below in range(pivot + 1, size):
            factor = rows[below][pivot] / rows[pivot][pivot]
            rows[below] = [b - factor * p for b, p in zip(rows[below], rows[pivot], strict=True)]
    values = [0.0] * size
    for pivot in reversed(range(size)):
        rest = sum(rows[pivot][column] * values[column] for column in range(pivot + 1, size))
        values[pivot] = (rows[pivot][size] - rest) / rows[pivot][pivot]
    return [value / s for value, s in zip(values, scale, strict=True)]


def _dot(left: Sequence[float], right: Sequence[float]) -> float:
    return sum(a * b for a, b in zip(left, right, strict=True))
