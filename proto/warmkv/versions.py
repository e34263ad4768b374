"""Which versions of the stream between routers and workers this package speaks, and which one two ends use.

A minor version of the package may raise the stream's version by one, and it still speaks the one before it: routers and
workers that are one minor version apart work together, so a fleet is upgraded one process at a time, in any order.
What only the newer end knows is then not used: a router sends a request that needs it to no older worker.

The router says the span that it speaks before it knows the worker's, the worker answers with the version of this
stream. Ends of version 2 know no spans: they say their own version and take no other, which is why a router gives the
oldest that it speaks where they look.
"""

from __future__ import annotations

# Of the package. It is written here, and its metadata taken from here, so that also a tree that runs where it lies says
# what it is.
VERSION = "0.2.0.dev0"
NEWEST = 3
OLDEST = 2


def agreed(oldest: int, newest: int) -> int | None:
    """The highest version that both ends speak; None: there is none.

    Args:
        oldest, newest: what the other end speaks; `newest` zero: it knows no spans, and speaks `oldest` only.
    """
    version = min(NEWEST, max(oldest, newest))
    return version if version >= max(OLDEST, oldest) else None


def span() -> str:
    """For messages to people."""
    return f"{OLDEST} to {NEWEST}"
