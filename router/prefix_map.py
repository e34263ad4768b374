"""The most used prefixes: a bounded radix tree over block hashes that counts requests. For the dashboard.

Covers: counting, splitting where prompts diverge, forgetting the least recently used. Does not cover: who holds a
prefix (`index.match` of its hashes). Every node is a prefix that at least one request had; an inner node is where
prompts parted. Bounded by nodes and by blocks a prompt; the oldest leaf goes first.
"""

from __future__ import annotations

import heapq
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, field


@dataclass(slots=True, eq=False)
class _Node:
    parent: _Node | None
    blocks: list[bytes]
    tenant: str
    words: str
    depth: int  # blocks from the root, its own included
    requests: int = 0
    children: dict[bytes, _Node] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class UsedPrefix:
    """A prefix: its blocks from the first, its tenant, how often it was asked for, its first words."""

    hashes: list[bytes]
    tenant: str
    requests: int
    words: str


class PrefixMap:
    """Counts how often each prefix is asked for."""

    def __init__(self, *, max_nodes: int = 2048, max_blocks: int = 512) -> None:
        self._roots: dict[bytes, _Node] = {}
        self._recent: OrderedDict[int, _Node] = OrderedDict()
        self._max_nodes = max_nodes
        self._max_blocks = max_blocks

    def __len__(self) -> int:
        return len(self._recent)

    def count(self, hashes: Sequence[bytes], tenant: str, words: str) -> None:
        """A request asked for this chain. `words`: the beginning of its text, or empty."""
        at, siblings, parent = 0, self._roots, None
        blocks = list(hashes[: self._max_blocks])
        path: list[_Node] = []
        while at < len(blocks):
            node = siblings.get(blocks[at])
            if node is None:
                node = self._add(parent, blocks[at:], tenant, words)
                siblings[blocks[at]] = node
            same = _common(node.blocks, blocks, at)
            if same < len(node.blocks):
                node = self._split(node, same, siblings)
            path.append(node)
            at += same
            siblings, parent = node.children, node
        for node in reversed(path):  # children first, so that the least recent node is always a leaf
            node.requests += 1
            self._recent.move_to_end(id(node))
        while len(self._recent) > self._max_nodes:
            self._forget_oldest()

    def most_used(self, limit: int) -> list[UsedPrefix]:
        """The prefixes that most blocks were asked for through (requests times length), best first.

        A prefix that was asked for once is left out unless there is nothing else, and so is one of which every request
        went on to the same longer prefix.
        """
        telling = [n for n in self._recent.values() if all(c.requests < n.requests for c in n.children.values())]
        shared = [n for n in telling if n.requests > 1] or telling
        best = heapq.nlargest(limit, shared, key=lambda n: (n.requests * n.depth, n.depth))
        return [UsedPrefix(_chain(n), n.tenant, n.requests, n.words) for n in best]

    def clear(self) -> None:
        """Forget everything."""
        self._roots.clear()
        self._recent.clear()

    def _add(self, parent: _Node | None, blocks: list[bytes], tenant: str, words: str) -> _Node:
        node = _Node(parent, blocks, tenant, words, (parent.depth if parent else 0) + len(blocks))
        self._recent[id(node)] = node
        return node

    def _split(self, node: _Node, at: int, siblings: dict[bytes, _Node]) -> _Node:
        """Cut a node in two; the upper one, which takes its place."""
        upper = self._add(node.parent, node.blocks[:at], node.tenant, node.words)
        upper.requests = node.requests
        siblings[node.blocks[0]] = upper
        node.blocks = node.blocks[at:]
        node.parent = upper
        upper.children[node.blocks[0]] = node
        return upper

    def _forget_oldest(self) -> None:
        _, node = self._recent.popitem(last=False)
        siblings = node.parent.children if node.parent else self._roots
        del siblings[node.blocks[0]]


def _common(segment: list[bytes], blocks: list[bytes], at: int) -> int:
    """How many blocks from `at` on are the segment's; the first one is. A block's hash tells all before it."""
    low, high = 1, min(len(segment), len(blocks) - at)
    if segment[high - 1] == blocks[at + high - 1]:
        return high
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if segment[middle - 1] == blocks[at + middle - 1] else (low, middle - 1)
    return low


def _chain(node: _Node | None) -> list[bytes]:
    parts: list[list[bytes]] = []
    while node is not None:
        parts.append(node.blocks)
        node = node.parent
    return [block for part in reversed(parts) for block in part]
