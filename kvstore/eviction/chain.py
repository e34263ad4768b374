"""Which entries may be evicted, given what holds them and what continues them.

Each node counts the held nodes that continue it (`children`), and its `holds`: those that its owner put on it, and one
for each child that has holds itself. A node without holds is free: it can be evicted, once its children are. One that
is free and has no children is offered to the policy, so a suffix always goes before its prefix.

Holding a chain from its first node to its last costs O(1) a node, since a parent that is held already passes nothing
on; so does letting it go from last to first. A node alone costs O(its depth). All else is O(1) and the policy's part.
A child may be added before its parent, and outlive it: a name that is not held is remembered while others continue it.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable
from dataclasses import dataclass
from typing import Generic

from kvstore.errors import InvariantError
from kvstore.eviction.order import Key, Order


@dataclass(slots=True, eq=False)
class Node(Generic[Key]):
    """A held entry's place in its chain; without a key, the memory of one that others continue."""

    key: Key | None
    name: Hashable | None
    parent: Node[Key] | None = None
    children: int = 0
    holds: int = 0


class Candidates(Generic[Key]):
    """The nodes, of which it offers to `order` those that may go.

    Attributes:
        free: held nodes without holds.
    """

    def __init__(self, order: Order[Key]) -> None:
        self.free = 0
        self._order = order
        self._names: dict[Hashable, Node[Key]] = {}

    def add(self, key: Key, name: Hashable | None, parent: Hashable | None) -> Node[Key]:
        """A new node; of several with one name, the last one is the one that others continue.

        Raises:
            InvariantError: it would continue itself.
        """
        if name is not None and name == parent:
            raise InvariantError(f"{name!r} cannot continue itself")
        node = self._node_to_hold(key, name)
        if parent is not None:
            self._join(node, self._names.get(parent) or self._remember(parent))
        if node.holds == 0:
            self.free += 1
            self._offer(node)
        return node

    def remove(self, node: Node[Key]) -> None:
        """The node is held no more. Its owner's holds must be gone."""
        self.free -= node.holds == 0
        node.key = None
        if node.children == 0:
            self._forget(node)
        parent, node.parent = node.parent, None
        if parent is None:
            return
        parent.children -= 1
        if node.holds > 0:
            self.let_go(parent)
        elif parent.holds == 0:
            self._offer(parent)
        if parent.children == 0 and parent.key is None:
            self._forget(parent)

    def hold(self, node: Node[Key]) -> None:
        """Put one hold on it."""
        above: Node[Key] | None = node
        while above is not None:
            above.holds += 1
            if above.holds > 1:
                return
            if above.key is not None:
                self.free -= 1
                if above.children == 0:
                    self._order.withdraw(above.key)
            above = above.parent

    def let_go(self, node: Node[Key]) -> None:
        """Take one hold from it."""
        above: Node[Key] | None = node
        while above is not None:
            above.holds -= 1
            if above.holds > 0:
                return
            if above.key is not None:
                self.free += 1
                self._offer(above)
            above = above.parent

    def check(self, nodes: Iterable[tuple[Node[Key], int]]) -> None:
        """Audit the counts. O(n).

        Args:
            nodes: all held nodes, each with its owner's holds.

        Raises:
            InvariantError: they are wrong.
        """
        held = list(nodes)
        children: dict[int, int] = {}
        holding: dict[int, int] = {}
        for node, _ in held:
            if node.parent is not None:
                children[id(node.parent)] = children.get(id(node.parent), 0) + 1
                holding[id(node.parent)] = holding.get(id(node.parent), 0) + (node.holds > 0)
        for node, own in held:
            if node.children != children.get(id(node), 0) or node.holds != own + holding.get(id(node), 0):
                raise InvariantError(f"{node.key!r} has other children or holds than it counts")
            if node.key is None or (node.key in self._order) != (node.holds == 0 and node.children == 0):
                raise InvariantError(f"{node.key!r} is offered and may not go, or the other way round")
        if self.free != sum(node.holds == 0 for node, _ in held):
            raise InvariantError("free nodes are miscounted")
        if any(node.key is None and node.children == 0 for node in self._names.values()):
            raise InvariantError("a name is remembered that nothing continues")

    def _offer(self, node: Node[Key]) -> None:
        if node.children == 0 and node.key is not None:
            self._order.offer(node.key)

    def _node_to_hold(self, key: Key, name: Hashable | None) -> Node[Key]:
        if name is None:
            return Node(key, None)
        node = self._names.get(name)
        if node is None or node.key is not None:
            node = self._names[name] = Node(key, name)
        node.key = key
        return node

    def _remember(self, name: Hashable) -> Node[Key]:
        node = self._names[name] = Node(None, name)
        return node

    def _forget(self, node: Node[Key]) -> None:
        if node.name is not None and self._names.get(node.name) is node:
            del self._names[node.name]

    def _join(self, node: Node[Key], parent: Node[Key]) -> None:
        node.parent = parent
        parent.children += 1
        if parent.children == 1 and parent.holds == 0 and parent.key is not None:
            self._order.withdraw(parent.key)
        if node.holds > 0:
            self.hold(parent)
