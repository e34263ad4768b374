"""The error of ranks that cannot go on together. No torch: a worker's program catches it without knowing its engine."""


class RankLost(Exception):
    """Another rank is gone, hangs, or is not where this one is. The worker cannot go on; a new process can."""
