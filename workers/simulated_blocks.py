"""The blocks of a simulated engine's sequences: what they find, hold, fill and give back. Real accounting, no tensors.

Covers: reuse over device and host, room for tokens, names for what became full. Does not cover: which sequence may have
them (`simulated`), the tiers themselves (`simulated_store`).
"""

from __future__ import annotations

from collections.abc import Iterable

from kvstore.blocks import BlockHash, block_hashes, shared_blocks
from kvstore.events import TierName
from kvstore.lifetime import Lifetime
from kvstore.tier import BlockMeta, Clock, prolonged
from workers.simulated_sequence import Sequence, Timing
from workers.simulated_store import SimulatedTier

_COMPUTED = "computed"


class SequenceBlocks:
    """Gives sequences blocks of a device tier, from a host tier where that beats computing."""

    def __init__(
        self,
        device: SimulatedTier,
        host: SimulatedTier,
        *,
        block_size: int,
        timing: Timing,
        default: Lifetime,
        clock: Clock,
    ) -> None:
        """Over both tiers; blocks of `block_size` tokens. `default`: the lifetime of those whose job names none."""
        self._device, self._host, self._block_size, self._timing = device, host, block_size, timing
        self._default, self._clock = default, clock

    def acquire(self, sequence: Sequence) -> bool:
        """Take the cached prefix and room for the rest of the tokens; False when there is no room."""
        names = [] if sequence.job.no_read else sequence.names
        on_device = self._device.match(names)
        held = self._device.pin(names[:on_device])
        loaded = self._loadable(sequence, names, on_device)
        blocks = -(-len(sequence.tokens) // self._block_size)
        if not self._device.allocate(blocks - on_device):
            self._device.release(held)
            return False
        sequence.held, sequence.private = held, blocks - on_device
        sequence.admitted_at = sequence.admitted_at or self._clock()
        sequence.ready_at = self._clock()
        if loaded:
            self._promote(sequence, names[on_device : on_device + loaded])
        self._device.prolong(names[:on_device], sequence.job.lifetime or self._default)
        self._host.prolong(names[: on_device + loaded], sequence.job.lifetime or self._default)
        self._account(sequence, on_device, loaded)
        return True

    def grow(self, sequence: Sequence, tokens: int) -> bool:
        """Give it blocks for that many tokens; False, and nothing given, when there is no room."""
        needed = -(-tokens // self._block_size) - len(sequence.held) - sequence.private
        if needed > 0 and not self._device.allocate(needed):
            return False
        sequence.private += max(0, needed)
        return True

    def found(self, sequence: Sequence) -> int:
        """Leading blocks that it would find now."""
        names = sequence.reusable
        on_device = self._device.match(names)
        return on_device + self._host.match(names[on_device:])

    def expected_cached(self, sequence: Sequence, before: Iterable[Sequence]) -> int:
        """Tokens that it will find when those before it are prefilled; what the load counts until it is admitted."""
        made = [shared_blocks(sequence.reusable, s.names) for s in before if s.missing > 1 and not s.job.no_store]
        return min(max(self.found(sequence), *made, 0) * self._block_size, len(sequence.tokens) - 1)

    def commit(self, sequence: Sequence) -> None:
        """Name the blocks that became full. A name that is held already leaves our copy private."""
        size = self._block_size
        for position in range(sequence.registered, sequence.computed // size):
            name = self._name(sequence, position)
            if sequence.job.no_store:
                continue
            meta = self._meta(sequence, name, position)
            if name not in self._device:
                sequence.held.append(self._device.name_private(meta))
                sequence.private -= 1
            self._host.add(meta)
        sequence.registered = max(sequence.registered, sequence.computed // size)

    def give_back(self, sequence: Sequence) -> None:
        """Take all from it; those with a name stay findable."""
        self._device.release(sequence.held)
        self._device.free(sequence.private)
        sequence.held, sequence.private = [], 0

    def _loadable(self, sequence: Sequence, names: list[BlockHash], on_device: int) -> int:
        """Blocks that follow in host, if reading them beats computing them."""
        count = self._host.match(names[on_device:])
        size = self._block_size
        cheaper = self._timing.host_ms(count) < self._timing.prefill_ms(count * size, on_device * size)
        return count if cheaper else 0

    def _promote(self, sequence: Sequence, names: list[BlockHash]) -> None:
        # The copy is findable at once, though its reader waits for it: a simplification of the simulation.
        for name in names:
            if name in self._device:  # it outlived a block before it
                self._device.free(1)
                sequence.held += self._device.pin([name])
            else:
                meta = self._host.meta(name) or self._meta(sequence, name, len(sequence.held))
                lifetime = sequence.job.lifetime or self._default
                sequence.held.append(self._device.name_private(prolonged(meta, lifetime)))
        sequence.private -= len(names)
        self._host.count_hits(len(names))
        sequence.load_ms = self._timing.host_ms(len(names))
        sequence.ready_at = self._clock() + sequence.load_ms / 1000

    def _account(self, sequence: Sequence, on_device: int, loaded: int) -> None:
        size, length = self._block_size, len(sequence.tokens)
        cached = min((on_device + loaded) * size, length - 1)  # the last token is always computed: it gives the logits
        sequence.computed, sequence.registered = cached, on_device + loaded
        if sequence.fates is None:
            sequence.fates = _fates(sequence.job.num_prompt, on_device * size, cached)
            if sequence.job.resumed:
                sequence.resumed_fates = _fates(len(sequence.job.token_ids), on_device * size, cached)

    def _name(self, sequence: Sequence, position: int) -> BlockHash:
        size = self._block_size
        while len(sequence.names) <= position:
            start = len(sequence.names) * size
            parent = sequence.names[-1] if sequence.names else sequence.job.root
            sequence.names += block_hashes(sequence.tokens[start : start + size], parent, size)
        return sequence.names[position]

    def _meta(self, sequence: Sequence, name: BlockHash, position: int) -> BlockMeta:
        job = sequence.job
        parent = sequence.names[position - 1] if position else job.root
        ttl_s, until, _ = job.lifetime or self._default
        return BlockMeta(name, parent, job.root, ttl_s, job.keep_priority, until, job.turn)


def _fates(tokens: int, on_device: int, cached: int) -> dict[str, int]:
    """Where so many leading tokens lie, of which the first `cached` were found, the first `on_device` on the device."""
    found = min(cached, tokens)
    device = min(on_device, found)
    return {TierName.DEVICE.value: device, TierName.HOST.value: found - device, _COMPUTED: tokens - found}
