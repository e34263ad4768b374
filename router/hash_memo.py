"""Names of a prompt's blocks, remembered for prompts that begin alike. Hashing is most of a decision's time.

Covers: `kvstore.blocks.block_hashes` behind a bounded memory. Does not cover: the rule of the chain.

The memory is a radix tree over the bytes of the tokens: a node is a stretch of whole blocks with their names, and its
children are what followed it, by their first block. That a prompt goes through a node is one comparison of memory, so
a session that comes again costs a few of them, however long it has grown, and the hashing of what is new. Keys and
stretches are the exact tokens behind the root of the chain: there is nothing to collide, and what tenants with
different roots ask for never meets. A leaf grows in place with its session; what one prompt left is cut in two where
another one parts from it. Least recently used leaves go first, and a node that has one child left becomes one with it,
so that a path is no longer than the number of prompts that part from it.
"""

from __future__ import annotations

from array import array
from collections import OrderedDict
from collections.abc import Sequence
from typing import NamedTuple

from kvstore.blocks import SHORT_HASH_BYTES, BlockHash, block_hashes

DEFAULT_BYTES = 64 << 20  # about 6 million tokens at 16 a block
_TOKEN_BYTES = 4
_NAME_BYTES = 32
_SHORT_NAME_BYTES = 64 + 8  # an object of 16 bytes, as CPython allocates it, and what points to it
_NODE_BYTES = 600  # a node without its stretch: objects, its entries in the tree and in the order of use


class Names(NamedTuple):
    """Of a prompt's full blocks, first to last.

    Attributes:
        short: the first 16 bytes of each; the caller's own list. joined: all 32 bytes of each, without gaps.
    """

    short: list[bytes]
    joined: bytes

    @property
    def last(self) -> BlockHash:
        """The name of the last block; empty when there is none."""
        return BlockHash(self.joined[-_NAME_BYTES:])

    def at(self, position: int) -> BlockHash:
        """The name of one block, counted from 0."""
        return BlockHash(self.joined[position * _NAME_BYTES : (position + 1) * _NAME_BYTES])

    @property
    def full(self) -> list[BlockHash]:
        """One by one. Made anew at each call: only operators' orders need them."""
        return [BlockHash(self.joined[at : at + _NAME_BYTES]) for at in range(0, len(self.joined), _NAME_BYTES)]


class _Node:
    """A stretch: its tokens' bytes and its blocks' names. `key`: under which its parent has it."""

    __slots__ = ("children", "joined", "key", "parent", "short", "tokens")

    def __init__(self, parent: _Node | None, key: bytes, tokens: bytes, names: Names) -> None:
        self.parent = parent
        self.key = key
        self.tokens = tokens
        self.short, self.joined = names
        self.children: dict[bytes, _Node] = {}

    @property
    def nbytes(self) -> int:
        names = len(self.joined) + _SHORT_NAME_BYTES * len(self.short)
        return _NODE_BYTES + len(self.key) + len(self.tokens) + names


class HashMemo:
    """The memory. `nbytes` of it are in use, never more than `max_bytes` when a call has returned."""

    def __init__(self, *, max_bytes: int = DEFAULT_BYTES) -> None:
        self._root = _Node(None, b"", b"", Names([], b""))
        self._recent: OrderedDict[_Node, None] = OrderedDict()  # a parent is always more recent than its children
        self._max_bytes = max_bytes
        self.nbytes = 0

    def names(self, token_ids: Sequence[int], root: BlockHash, block_size: int) -> Names:
        """The same as `block_hashes(token_ids, root, block_size)`, in both lengths.

        An `array("I")` of token ids is read several times faster than a list.

        Raises:
            OverflowError: a token id is negative or does not fit 32 bits.
        """
        packed = array("I", token_ids)
        width = _TOKEN_BYTES * block_size
        data = packed.tobytes()
        end = len(data) - len(data) % width
        path, at = self._path(data, end, root, width)
        if at < end:
            parent = BlockHash(path[-1].joined[-_NAME_BYTES:]) if path else root
            tail = _named(packed[at // _TOKEN_BYTES :], parent, block_size)
            self._remember(path, (b"" if at else root) + data[at : at + width], data[at:end], tail)
        short: list[bytes] = []
        for node in path:
            short += node.short
        joined = b"".join([node.joined for node in path])
        if at > end:  # the prompt ends within the last node
            del short[end // width :]
            joined = joined[: len(short) * _NAME_BYTES]
        self._used(path)
        return Names(short, joined)

    def _path(self, data: bytes, end: int, root: bytes, width: int) -> tuple[list[_Node], int]:
        """The nodes that a prompt's whole blocks run through, and where those end, which may lie behind the prompt."""
        node, at, key = self._root, 0, root + data[:width]
        path: list[_Node] = []
        while at < end and (child := node.children.get(key)) is not None:
            if not data.startswith(child.tokens, at, end):
                same = _common(child.tokens, data[at:end], width)
                if at + same < end:
                    child = self._split(child, same, width)
            path.append(child)
            node, at = child, at + len(child.tokens)
            key = data[at : at + width]
        return path, at

    def _remember(self, path: list[_Node], key: bytes, tokens: bytes, names: Names) -> None:
        """Names that follow the path, which from now on has them."""
        node = path[-1] if path else self._root
        if path and not node.children:
            self.nbytes -= node.nbytes
            node.tokens += tokens
            node.short += names.short
            node.joined += names.joined
        else:
            parent, node = node, _Node(node, key, tokens, names)
            parent.children[key] = node
            path.append(node)
        self.nbytes += node.nbytes

    def _used(self, path: list[_Node]) -> None:
        for node in reversed(path):  # children first, so that the least recent node is always a leaf
            self._recent[node] = None
            self._recent.move_to_end(node)
        while self.nbytes > self._max_bytes:
            self._forget_oldest()

    def _forget_oldest(self) -> None:
        node, _ = self._recent.popitem(last=False)
        self.nbytes -= node.nbytes
        parent = node.parent
        if parent is not None:
            del parent.children[node.key]
            if parent is not self._root and len(parent.children) == 1:
                self._join(parent)

    def _split(self, node: _Node, at: int, width: int) -> _Node:
        """Cut a node in two, `at` so many bytes of its tokens; the upper one, which takes its place."""
        self.nbytes -= node.nbytes
        blocks, parent = at // width, node.parent
        upper = _Node(
            parent, node.key, node.tokens[:at], Names(node.short[:blocks], node.joined[: blocks * _NAME_BYTES])
        )
        if parent is not None:
            parent.children[node.key] = upper
        node.parent, node.key, node.tokens = upper, node.tokens[at : at + width], node.tokens[at:]
        node.short, node.joined = node.short[blocks:], node.joined[blocks * _NAME_BYTES :]
        upper.children[node.key] = node
        self.nbytes += upper.nbytes + node.nbytes
        self._recent[upper] = None
        return upper

    def _join(self, node: _Node) -> None:
        """Make a node one with its only child."""
        (child,) = node.children.values()
        self.nbytes -= _NODE_BYTES + len(child.key)
        node.tokens += child.tokens
        node.short += child.short
        node.joined += child.joined
        node.children = child.children
        for grandchild in node.children.values():
            grandchild.parent = node
        del self._recent[child]


def _named(tokens: array[int], parent: BlockHash, block_size: int) -> Names:
    full = block_hashes(tokens, parent, block_size)
    return Names([name[:SHORT_HASH_BYTES] for name in full], b"".join(full))


def _common(one: bytes, other: bytes, width: int) -> int:
    """Bytes of whole leading blocks that two stretches share; the first block is shared.

    Each part is compared once: halving goes on in the half where the difference lies.
    """
    low, high = 1, min(len(one), len(other)) // width
    while low < high:
        middle = (low + high + 1) // 2
        same = one[low * width : middle * width] == other[low * width : middle * width]
        low, high = (middle, high) if same else (low, middle - 1)
    return low * width
