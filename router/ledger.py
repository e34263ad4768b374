"""The fate of every prompt token, counted once, when the work is done. Usage, metrics and dashboard are views of it.

Covers: totals since the router started. Does not cover: rates and windows (queries over the metrics do that), or
requests that other routers served. Invariant: the totals over fates equal the prompt tokens of the requests that were
counted with fates.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field

# In the order of the proto's fields.
FATES = ("computed", "device", "host", "disk", "redis", "peer")


@dataclass(frozen=True, slots=True)
class Entry:
    """One finished request.

    Attributes:
        code: the gRPC status name. worker: where it ended; empty when it reached none.
        prompt_tokens: its length. fates: sums to prompt_tokens, or is empty when no worker ran it.
        begun: whether a worker may have worked at it; False: its only one said that it had not.
        generated_tokens: of the answer. predicted_cached: what the router expected to be reused.
        admitted_by: whose admission settled the fates, where an answer went on at another worker; empty: `worker`.
        generated_by: tokens of the answer by worker; empty: `worker` made them all.
    """

    tenant: str
    worker: str
    code: str
    prompt_tokens: int = 0
    fates: Mapping[str, int] = field(default_factory=dict)
    generated_tokens: int = 0
    predicted_cached: int = 0
    begun: bool = True
    admitted_by: str = ""
    generated_by: Mapping[str, int] = field(default_factory=dict)

    @property
    def reused(self) -> int:
        """Prompt tokens that were not computed."""
        return sum(n for fate, n in self.fates.items() if fate != "computed")


@dataclass(slots=True)
class Totals:
    """Since the router started."""

    fates: Counter[str] = field(default_factory=Counter)
    requests: Counter[str] = field(default_factory=Counter)
    prompt_tokens: int = 0
    generated_tokens: int = 0
    predicted_cached: int = 0
    reused: int = 0


class Ledger:
    """Adds entries up."""

    def __init__(self) -> None:
        self.totals = Totals()

    def record(self, entry: Entry) -> None:
        """Count a request once, when it has ended.

        Raises:
            ValueError: the fates do not sum to the prompt; `settled_fates` makes them.
        """
        if entry.fates and sum(entry.fates.values()) != entry.prompt_tokens:
            raise ValueError(f"fates {dict(entry.fates)} do not sum to {entry.prompt_tokens} prompt tokens")
        totals = self.totals
        totals.requests[entry.code] += 1
        totals.generated_tokens += entry.generated_tokens
        if entry.fates:
            totals.fates.update(entry.fates)
            totals.prompt_tokens += entry.prompt_tokens
            totals.predicted_cached += entry.predicted_cached
            totals.reused += entry.reused


def settled_fates(reported: Mapping[str, int], prompt_tokens: int) -> tuple[dict[str, int], bool]:
    """(fates that sum to the prompt, whether the reported ones did).

    A worker whose books are wrong must not spoil ours: what it did not account for counts as computed, and a report of
    more tokens than there were counts as nothing reused.
    """
    reused = {fate: reported.get(fate, 0) for fate in FATES[1:]}
    rest = prompt_tokens - sum(reused.values())
    if rest < 0:
        return {**dict.fromkeys(FATES, 0), "computed": prompt_tokens}, False
    return {"computed": rest, **reused}, rest == reported.get("computed", 0)
