"""Other routers and ours through the same load, in one run, before the same simulated workers.

`python -m bench.peers [--quick] [--json] [--routers NAME,...] [--scenarios NAME,...]`. Installs the peers' wheels,
pinned, into environments of their own under a cache folder; one that does not install or start is reported on standard
error and left out. Every round runs all routers, one after another, through each scenario, each with fresh processes.
docs/peers.md says what is compared and how.
"""

from __future__ import annotations

import argparse
import asyncio
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import psutil

from bench.peers.contenders import OWN, Contender, Own, peer_contenders
from bench.peers.environment import REQUIREMENTS, NotInstalled, cache_folder, install
from bench.peers.processes import NotStarted
from bench.peers.prompts import VOCABULARY
from bench.peers.scenarios import Figures, Scenario, scenarios
from bench.peers.table import Trials, rows
from workers.tiny import ModelShape, make_model_folder

TRIAL_TIMEOUT_S = 1800.0
_ATTEMPTS = 2
ROUND_ROBIN = "sglang_round_robin"
ROUTERS = (OWN, "sglang", "smg", "vllm", "dynamo", ROUND_ROBIN)


def say(line: str) -> None:
    """Progress and trouble, for people."""
    print(f"{time.strftime('%H:%M:%S')}  {line}", file=sys.stderr, flush=True)


def contenders(wanted: Sequence[str], model: Path, folder: Path) -> list[Contender]:
    """Those that can be run, ours first; peers are installed where they are not."""
    found: dict[str, Contender] = {OWN: Own(model)}
    for peer in REQUIREMENTS:
        if not any(name.startswith(peer) for name in wanted):
            continue
        try:
            say(f"installing {', '.join(REQUIREMENTS[peer])}")
            found |= {each.name: each for each in peer_contenders(peer, install(peer, folder))}
        except NotInstalled as problem:
            say(f"{peer} is left out, it does not install: {problem}")
    return [found[name] for name in ROUTERS if name in wanted and name in found]


async def play(scenario: Scenario, contender: Contender, seed: int) -> Figures | None:
    """One trial; begun anew with other ports where its processes did not start; None: it failed."""
    for attempt in range(_ATTEMPTS):
        try:
            async with asyncio.timeout(TRIAL_TIMEOUT_S):
                return await scenario.play(contender, seed)
        except (NotStarted, OSError, TimeoutError, psutil.Error) as problem:
            say(f"{contender.name} {scenario.name}, attempt {attempt + 1}: {type(problem).__name__}: {problem}")
    return None


async def run(found: Sequence[Contender], chosen: Sequence[Scenario]) -> Trials:
    """All trials, round by round."""
    trials: Trials = {}
    failed: set[tuple[str, str]] = set()
    for number in range(max(each.rounds for each in chosen)):
        for scenario in chosen:
            for contender in found:
                key = (contender.name, scenario.name)
                if number >= scenario.rounds or key in failed:
                    continue
                figures = await play(scenario, contender, number)
                if figures is None:
                    say(f"{contender.name} is left out of {scenario.name}")
                    failed.add(key)
                    continue
                trials.setdefault(key, []).append(figures)
                say(f"{scenario.name:11} {contender.name:19}" + " ".join(f"{k} {v:.4g}" for k, v in figures.items()))
    return dict(sorted(trials.items(), key=lambda each: _order(each[0], chosen)))


def _order(key: tuple[str, str], chosen: Sequence[Scenario]) -> tuple[int, int]:
    return [each.name for each in chosen].index(key[1]), ROUTERS.index(key[0])


def _options(known: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m bench.peers", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="one round, shorter (some minutes); coarser figures")
    parser.add_argument("--json", action="store_true", help="one JSON object as the last line of standard output")
    parser.add_argument("--routers", type=_names(ROUTERS), default=ROUTERS, help=f"some of {','.join(ROUTERS)}")
    parser.add_argument("--scenarios", type=_names(known), default=known, help=f"some of {','.join(known)}")
    parser.add_argument("--environments", type=Path, default=cache_folder(), help="where the peers are installed")
    return parser.parse_args()


def _names(known: Sequence[str]) -> Callable[[str], list[str]]:
    def parse(text: str) -> list[str]:
        names = text.split(",")
        if unknown := [name for name in names if name not in known]:
            raise argparse.ArgumentTypeError(f"{', '.join(unknown)}: not among {', '.join(known)}")
        return names

    return parse


def main() -> None:
    """Print the table."""
    options = _options(list(scenarios(quick=True)))
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # what was started shall end with it
    chosen = [each for name, each in scenarios(quick=options.quick).items() if name in options.scenarios]
    with tempfile.TemporaryDirectory(prefix="warmkv-peers-model-") as folder:
        model = make_model_folder(folder, ModelShape(layers=1, hidden=64, heads=4, kv_heads=2, vocab=VOCABULARY))
        found = contenders(options.routers, model, options.environments)
        trials = asyncio.run(run(found, chosen))
    rows(trials).print(as_json=options.json)


if __name__ == "__main__":
    main()
