"""From trials to rows: names, units, bars, and ours beside the best peer's."""

from __future__ import annotations

from bench.peers.contenders import OWN
from bench.peers.scenarios import Figures
from bench.report import Report, ratios

_UNITS = (("_ms", "ms"), ("_us", "us"), ("_per_s", "1/s"), ("_s", "s"), ("_mib", "MiB"), ("_a_prompt", "bytes"))
_COUNTED = {"errors": "requests", "back_requests": "requests", "workers_used": "workers"}

BARS: dict[tuple[str, str], str] = {
    ("hot_32", "hit"): ">= 0.878",
    ("hot_32", "ttft_ms"): "<= 7.5",
    ("hot_32", "busiest_share"): "<= 0.4",
    ("hot_96", "hit"): ">= 0.871",
    ("hot_96", "ttft_ms"): "<= 20",
    ("groups_32", "hit"): ">= 0.876",
    ("sequential", "workers_used"): ">= 4",
    ("kill", "errors"): "0",
    ("kill", "back_s"): "<= 2",
    ("restart", "blind_share"): "<= 0.01",
}
# Scenarios whose mean time to the first token is compared with the best peer's of the same round.
BESIDE_BEST = {"hot_32": "< 1", "hot_96": "", "groups_32": "<= 1"}

Trials = dict[tuple[str, str], list[Figures]]  # by router and scenario, one for each round


def rows(trials: Trials) -> Report:
    """All rows, scenario by scenario."""
    report = Report("peers")
    for (router, scenario), played in trials.items():
        for figure in played[0]:
            bar = BARS.get((scenario, figure), "") if router == OWN else ""
            report.add(f"{router}_{scenario}_{figure}", [each[figure] for each in played], unit(figure), bar=bar)
    for scenario, bar in BESIDE_BEST.items():
        best = _best_ttft_ms(trials, scenario)
        own = trials.get((OWN, scenario))
        if own and len(best) == len(own):
            values = ratios([each["ttft_ms"] for each in own], best)
            report.add(f"{OWN}_{scenario}_ttft_by_best_peer", values, "ratio", bar=bar)
    return report


def unit(figure: str) -> str:
    """The unit that a figure's name says."""
    return _COUNTED.get(figure) or next((name for ending, name in _UNITS if figure.endswith(ending)), "share")


def _best_ttft_ms(trials: Trials, scenario: str) -> list[float]:
    """Round by round, of peers that played all rounds."""
    peers = [played for (router, name), played in trials.items() if name == scenario and router != OWN]
    most = max((len(played) for played in peers), default=0)
    rounds = zip(*(played for played in peers if len(played) == most), strict=True)
    return [min(each["ttft_ms"] for each in played) for played in rounds]
