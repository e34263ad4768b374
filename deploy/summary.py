"""What an act of the demo or of a benchmark came to: tokens by fate, times to first token, requests a second."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

from rich.table import Table

FATES = ("computed", "device", "host", "disk", "redis", "peer")
WHERE_USED = ("disk", "peer")  # not every fleet has them: shown where something came from there


@dataclass(frozen=True, slots=True)
class Result:
    """One finished request, as its client saw it.

    Attributes:
        session, turn, tenant: which. ok: False when it failed; `error` says how.
        ttft_s, duration_s: from sending to the first token, and to the end.
        prompt_tokens, fates: tokens by fate. worker, reason: the route. started_s: on the driver's clock.
    """

    session: str
    turn: int
    tenant: str
    started_s: float
    ttft_s: float = 0.0
    duration_s: float = 0.0
    prompt_tokens: int = 0
    fates: dict[str, int] = field(default_factory=dict)
    worker: str = ""
    reason: str = ""
    error: str = ""

    @property
    def ok(self) -> bool:
        """Whether it was answered."""
        return not self.error


@dataclass(frozen=True, slots=True)
class Act:
    """One act: a name and its requests."""

    name: str
    results: tuple[Result, ...]
    elapsed_s: float

    @property
    def answered(self) -> list[Result]:
        """The requests that succeeded."""
        return [result for result in self.results if result.ok]

    @property
    def failed(self) -> int:
        """How many failed."""
        return len(self.results) - len(self.answered)

    def tokens(self, fate: str) -> int:
        """Prompt tokens of that fate."""
        return sum(result.fates.get(fate, 0) for result in self.answered)

    @property
    def prompt_tokens(self) -> int:
        """All prompt tokens."""
        return sum(result.prompt_tokens for result in self.answered)

    def share(self, fate: str) -> float:
        """The fate's share of the prompt tokens, 0 to 1."""
        return self.tokens(fate) / max(1, self.prompt_tokens)

    @property
    def hit_rate(self) -> float:
        """Share of the prompt tokens that were not computed, 0 to 1."""
        return 1.0 - self.share("computed") if self.prompt_tokens else 0.0

    def ttft_ms(self, quantile: float) -> float:
        """Time to first token at that quantile, milliseconds; 0 without requests."""
        return percentile([result.ttft_s * 1e3 for result in self.answered], quantile)

    @property
    def requests_per_s(self) -> float:
        """Answered requests a second."""
        return len(self.answered) / self.elapsed_s if self.elapsed_s > 0 else 0.0

    def as_dict(self) -> dict[str, object]:
        """For `--json`."""
        return {
            "name": self.name,
            "requests": len(self.results),
            "failed": self.failed,
            "elapsed_s": round(self.elapsed_s, 3),
            "prompt_tokens": self.prompt_tokens,
            "tokens_by_fate": {fate: self.tokens(fate) for fate in FATES},
            "hit_rate": round(self.hit_rate, 4),
            "ttft_p50_ms": round(self.ttft_ms(0.5), 1),
            "ttft_p95_ms": round(self.ttft_ms(0.95), 1),
            "requests_per_s": round(self.requests_per_s, 2),
        }


def percentile(samples: Sequence[float], quantile: float) -> float:
    """The nearest-rank quantile: the smallest sample that at least that share does not exceed; 0 for no samples."""
    ordered = sorted(samples)
    return ordered[max(0, math.ceil(quantile * len(ordered)) - 1)] if ordered else 0.0


def shown_fates(acts: Sequence[Act]) -> list[str]:
    """The fates that a table of these acts has a row for; they add up to the prompt."""
    return [fate for fate in FATES if fate not in WHERE_USED or any(act.tokens(fate) for act in acts)]


def comparison(acts: Sequence[Act]) -> Table:
    """The table that the demo ends with: one column an act."""
    table = Table(title="what each act cost", title_justify="left")
    table.add_column("")
    for act in acts:
        table.add_column(act.name, justify="right")
    table.add_row("prompt tokens", *(f"{act.prompt_tokens:,}" for act in acts))
    for fate in shown_fates(acts):
        table.add_row(f"  {fate}", *(f"{act.tokens(fate):,} ({act.share(fate):.0%})" for act in acts))
    table.add_row("TTFT p50", *(f"{act.ttft_ms(0.5):.0f} ms" for act in acts))
    table.add_row("TTFT p95", *(f"{act.ttft_ms(0.95):.0f} ms" for act in acts))
    table.add_row("requests/s", *(f"{act.requests_per_s:.1f}" for act in acts))
    table.add_row("answered", *(f"{len(act.answered)} of {len(act.results)}" for act in acts))
    return table
