"""`kill -9` at any instant: a process that writes, removes and rewrites its log is killed again and again."""

from __future__ import annotations

import random
import subprocess
import sys
import textwrap
from pathlib import Path

from tests.kvstore.blocks_for_tests import buffers, chain, names, payload
from tests.kvstore.disk.disk_for_tests import Place, slab_file

KILLS = 12
SLOTS, CHAINS, LENGTH = 24, 12, 4

# It says what it is about to do and what it has done, each in one write to a pipe, which outlives it.
WRITER = f"""
import os, random, sys, threading
from pathlib import Path
from kvstore.disk import index as disk_index
from kvstore.events import RemovalCause
from tests.kvstore.blocks_for_tests import chain, names, payloads
from tests.kvstore.disk.disk_for_tests import Place

disk_index.SPARE_LOG_BYTES = 2000  # so that the log is rewritten all the time
place = Place(Path(sys.argv[1]), blocks={SLOTS})
rng = random.Random(int(sys.argv[2]))

def tell(*words):
    os.write(1, (" ".join(map(str, words)) + "\\n").encode())

tell("begin")
while True:
    token = rng.randrange({CHAINS})
    metas = chain({LENGTH}, first_token=token)
    if rng.random() < 0.2:
        tell("remove", token)
        place.tier.remove(names(metas)[2:], RemovalCause.CLEARED)
        tell("removed", token)
    else:
        tell("write", token)
        count = place.tier.write(metas, payloads(metas))
        tell("written", token, count, len(place.tier.metas()))
        gone = {{meta.hash for meta in place.tier.metas()}}
        tell("held", *(n for n in range({CHAINS}) for m in chain({LENGTH}, first_token=n) if m.hash in gone))
"""


def run_and_kill(folder: Path, seed: int) -> list[list[str]]:
    """What the writer said before it was killed."""
    rng = random.Random(seed)
    command = [sys.executable, "-c", textwrap.dedent(WRITER), str(folder), str(seed)]
    lines: list[list[str]] = []
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as child:
        assert child.stdout is not None
        wanted = rng.randrange(2, 400)
        for line in child.stdout:
            lines.append(line.split())
            if len(lines) == wanted:
                break
        for _ in range(rng.randrange(3000)):  # somewhere in the middle of what comes next
            pass
        child.kill()
        lines += [line.split() for line in child.stdout.read().splitlines()]
    assert lines[0] == ["begin"], "the writer did not come up"
    return lines


def last_known(lines: list[list[str]]) -> tuple[dict[int, int], set[int]]:
    """How many blocks of each chain were held for sure, and the chains that were being changed since."""
    held: dict[int, int] = {}
    unsure: set[int] = set()
    for words in lines:
        match words[0]:
            case "held":
                tokens = [int(word) for word in words[1:]]
                held, unsure = {token: tokens.count(token) for token in tokens}, set()
            case "write":
                unsure = set(range(CHAINS))  # any of them may be evicted for it
            case "removed":
                token = int(words[1])
                held[token] = min(held.get(token, 0), 2)
                unsure.discard(token)
            case "remove":
                unsure.add(int(words[1]))
    return held, unsure


def test_a_killed_writer_leaves_whole_blocks_and_all_that_it_had_written(tmp_path: Path) -> None:
    folder, total = tmp_path / "blocks", 0
    for seed in range(KILLS):
        held, unsure = last_known(run_and_kill(folder, seed))
        place = Place(folder, blocks=SLOTS)
        place.tier.check()
        found: dict[int, int] = {}
        for token in range(CHAINS):
            metas = chain(LENGTH, first_token=token)
            for name in names(metas):
                into = buffers(1)
                if place.tier.match([name]):
                    assert place.tier.read([name], into).count == 1, "a block that the index names is not whole"
                    assert bytes(into[0]) == bytes(payload(name))
                    found[token] = found.get(token, 0) + 1
        for token in set(range(CHAINS)) - unsure:
            assert found.get(token, 0) == held.get(token, 0)
        assert place.tier.stats().misses == {}
        # In flight is one batch: at most so many blocks went for it, or are missing of it.
        lost = sum(max(0, count - found.get(token, 0)) for token, count in held.items())
        assert lost <= LENGTH
        total += sum(found.values())
        place.tier.close()
    assert total > 0
    assert slab_file(folder).exists()
