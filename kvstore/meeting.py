"""Where load and compute meet: a prefix is computed from its front while a slow tier loads it from its back.

Loading n blocks takes L(n), computing as many C(n). Either alone takes L(n) or C(n); both at once end together where
C(m) = L(n - m), the m first ones computed. With constant times l and c a block that is `n * l * c / (l + c)`: half of
either where both are equally slow, and hardly less than the better one where they are far apart. So it is done where

- it is sooner than the better one of the two by a tenth, and by `LEAST_GAIN_MS`: below a tier nine times slower than
  computing that is not so, and short prefixes are not worth the further steps;
- loading alone would take at least half as long as computing. Where it takes less, the wait is short, and a device that
  computes what could be had for nothing is missing to other sequences.

Covers: the choice and the place, in milliseconds. Does not cover: reading (`tails`), computing. Pure.
"""

from __future__ import annotations

from collections.abc import Callable

LEAST_GAIN_MS = 20.0
LEAST_GAIN_SHARE = 0.1
LEAST_LOAD_SHARE = 0.5

Ms = Callable[[int], float]  # of so many blocks; grows with them


def meeting(count: int, *, compute_ms: Ms, load_ms: Ms) -> int:
    """How many of `count` blocks are computed until all others are loaded: the least m with C(m) >= L(count - m)."""
    low, high = 0, count
    while low < high:
        middle = (low + high) // 2
        if compute_ms(middle) >= load_ms(count - middle):
            high = middle
        else:
            low = middle + 1
    return low


def is_worthwhile(count: int, meets: int, *, compute_ms: Ms, load_ms: Ms, all_ms: float) -> bool:
    """Whether to compute `meets` of `count` blocks while the others are loaded, rather than all or none.

    `load_ms`: in the pieces that meeting half-way takes. `all_ms`: of all blocks at once.
    """
    computed = compute_ms(count)
    both, alone = max(compute_ms(meets), load_ms(count - meets)), min(all_ms, computed)
    if all_ms < LEAST_LOAD_SHARE * computed:
        return False
    return alone - both >= max(LEAST_GAIN_MS, LEAST_GAIN_SHARE * alone)
