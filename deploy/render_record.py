"""What `warmkv record` prints at its end. Pure."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path

from deploy.quantities import format_duration
from deploy.recording import Ended
from replay.recorder import shares


def recorded_text(file: Path, ended: Ended) -> str:
    """What is in the file, and what is not."""
    done = ended.recorded
    if not done.requests:
        return f"no request ended in {format_duration(round(done.seconds))}; {file} is empty"
    hit, shared = shares(done)
    failed = f", {done.failed} of them not answered in full" if done.failed else ""
    lines = [
        f"requests   {done.requests:,} in {format_duration(round(done.seconds))}{failed}",
        f"tokens     {done.prompt_tokens:,} of prompts, {done.generated_tokens:,} generated",
        f"hit rate   {hit:.1%} of prompt tokens were cached",
        f"sharing    {shared:.1%} of prompt tokens stand in blocks that an earlier request of this file had",
        f"blocks     {done.blocks:,} different ones",
        f"tenants    {done.tenants}, sessions with an affinity key {done.sessions}",
    ]
    if done.forgotten_blocks:
        lines.append(f"           {done.forgotten_blocks:,} that were not met for long would count as new again")
    lines.append(f"missed     {done.missed:,} requests" + (_LATE if done.missed else ""))
    lines += [f"lost       the router at {router}: {error}" for router, error in ended.lost.items()]
    return "\n".join([*lines, f"written    {file}; next: warmkv replay {file}"])


def recorded_json(file: Path, ended: Ended) -> str:
    """All of it."""
    hit, shared = shares(ended.recorded)
    lost = {router: str(error) for router, error in ended.lost.items()}
    return json.dumps(
        {"file": str(file), **asdict(ended.recorded), "hit_rate": hit, "shared_share": shared, "lost": lost}
    )


_LATE = ": this program or the connection was slower than the traffic, so the trace has gaps; record nearer to it"
