"""Chains of blocks in use, and who uses them: a radix tree that costs segments where a counter would cost blocks.

Covers: adding and removing beginnings of chains, how deep each owner knows a chain, how many share it to which depth.
Does not cover: what a use means (`traffic`).

A block's hash tells all blocks before it, so equal blocks at one depth mean equal beginnings: whether a chain has all
of a node is one comparison, of the node's last block, and where the two part is found by halving. A node is a stretch
that all its users have in common; it ends where one of them ends or where two part. Users are counted by owner.

Invariants: owners of a node are owners of its parent, with no more users there than here; a node has users; and no node
has one single child with the same users, for then the two would be one, so that a path is no longer than the number of
chains in use, however many came and went. Adding, removing and asking take O(nodes on the path * log blocks) for a path
that forks at its end, and no more than one comparison a node before.
"""

from __future__ import annotations

from collections.abc import Sequence

Chain = Sequence[bytes]
Runs = list[tuple[int, int]]


class _Node:
    """Blocks `start` to `end` of `chain`, which one of its users brought; `last` is the final one of them."""

    __slots__ = ("chain", "children", "end", "last", "start", "users")

    def __init__(self, chain: Chain, start: int, end: int, users: dict[str, int]) -> None:
        self.chain = chain
        self.start = start
        self.end = end
        self.last = chain[end - 1] if end else b""
        self.users = users
        self.children: dict[bytes, _Node] = {}

    def common(self, chain: Chain, limit: int) -> int:
        """Leading blocks that a chain shares with this node's, at most `limit`. The first one of the node is shared."""
        end = self.end
        if end <= limit and chain[end - 1] == self.last:
            return end
        low, high = self.start + 1, min(end, limit)
        while low < high:
            middle = (low + high + 1) // 2
            low, high = (middle, high) if self.chain[middle - 1] == chain[middle - 1] else (low, middle - 1)
        return low


class ChainTree:
    """Beginnings of chains, each as often as it was added. The sequences must not change while they are in use."""

    def __init__(self) -> None:
        self._root = _Node((), 0, 0, {})

    def __bool__(self) -> bool:
        """Whether anything is in use."""
        return bool(self._root.children)

    def add(self, owner: str, chain: Chain, blocks: int) -> int:
        """The owner uses the first `blocks` blocks once more; how many of them it used before."""
        node, at, before = self._root, 0, 0
        while at < blocks:
            child = node.children.get(chain[at])
            if child is None:
                node.children[chain[at]] = _Node(chain, at, blocks, {owner: 1})
                break
            at = child.common(chain, blocks)
            node = child if at == child.end else _split(node, child, at)
            uses = node.users.get(owner, 0)
            node.users[owner] = uses + 1
            if uses:
                before = at
        return before

    def remove(self, owner: str, chain: Chain, blocks: int) -> int:
        """The opposite of an `add` with the same arguments; how many of the blocks the owner still uses."""
        node, at, after = self._root, 0, 0
        while at < blocks:
            child = node.children[chain[at]]
            uses = child.users[owner] - 1
            if uses:
                child.users[owner] = uses
                after = child.end
            elif len(child.users) > 1:
                del child.users[owner]
            else:  # and so nobody else uses what follows
                del node.children[chain[at]]
                break
            node, at = child, child.end
        # Users of neighbours on the path went down alike: only where it ends can two have become one.
        if node is not self._root:
            _join(node)
        return after

    def depths(self, chain: Chain) -> dict[str, int]:
        """Leading blocks of a chain that each owner uses."""
        found: dict[str, int] = {}
        for node, depth in self._path(chain):
            for owner in node.users:
                found[owner] = depth
        return found

    def runs(self, chain: Chain) -> Runs:
        """How many uses its leading blocks have: (uses, end) where the number changes, deepest last, until it is 0."""
        return [(sum(node.users.values()), depth) for node, depth in self._path(chain)]

    def _path(self, chain: Chain) -> list[tuple[_Node, int]]:
        """The nodes that a chain runs through, with its depth at the end of each or where it leaves the last one."""
        node, at, blocks = self._root, 0, len(chain)
        path = []
        while at < blocks and at == node.end:
            child = node.children.get(chain[at])
            if child is None:
                break
            at = child.common(chain, blocks)
            path.append((child, at))
            node = child
        return path


def _split(parent: _Node, node: _Node, at: int) -> _Node:
    """Cut a node in two; the upper one, which takes its place."""
    upper = _Node(node.chain, node.start, at, dict(node.users))
    parent.children[node.chain[node.start]] = upper
    upper.children[node.chain[at]] = node
    node.start = at
    return upper


def _join(node: _Node) -> None:
    """Make a node one with its only child if all go on there."""
    if len(node.children) != 1:
        return
    (child,) = node.children.values()
    if child.users == node.users:
        node.chain, node.end, node.last, node.children = child.chain, child.end, child.last, child.children
