"""How the ranks of a worker run one schedule over stores that may differ.

Every rank runs the same engine on the same jobs, over a store of its own share of the K/V heads. The schedule is a
function of the jobs, the time, the tokens and what the store answers; the first three come from rank 0, and here the
answers are made equal. A store may only ever know less than another one: its disk was slower, its server evicted a
block, its checksum failed. So the answer for all is the least one:

- a prefix is as long as on the rank where it is shortest, and what others brought beyond it is given back;
- blocks have come when they have come on every rank;
- blocks can be allocated when every rank can.

One all-reduce a step carries how many blocks every rank has free, how far each load is, and how far each constraint is
compiled: one that a rank has not finished yet is waited for by its own sequence alone, on all ranks. Admissions, and
allocations when those blocks have run short, cost one more. A step also carries a digest of the schedule: ranks that
part, which would be a defect, end the worker and never mix their tensors.
"""

from __future__ import annotations

import zlib
from array import array
from collections.abc import Iterable
from collections.abc import Sequence as Items

from kvstore.blocks import BlockHash
from kvstore.events import TierName
from kvstore.lifetime import Lifetime
from kvstore.store import ComputeMs, ReadTiers
from workers.agreement import Begun
from workers.anteroom import Compiling
from workers.sampler import Sampled
from workers.scheduler import BlockStore
from workers.sequence import Acquisition, Sequence
from workers.stepping.holds import Holds
from workers.tensor_parallel.group import RankGroup
from workers.tensor_parallel.lost import RankLost

ALL_TIERS = ReadTiers()
_STATES = 2 * 32  # of loads and constraints are sent in multiples of this
_NO_TOKEN = -1  # of a sequence whose logits are not finite
_PARTED = "its schedule is not that of the others, which is a defect; report it with the logs of all ranks"


class AgreedAcquisition:
    """One prefix on its way to the devices of all ranks. `done` changes only when the ranks agree that it has."""

    def __init__(self, own: Acquisition, store: Holds) -> None:
        self._own, self._store = own, store
        self.done = self.cancelled = False
        self._agreed = 0

    @property
    def block_ids(self) -> list[int]:
        """This rank's blocks of the prefix, as many as every rank had when they agreed last."""
        return self._own.block_ids[: self._agreed]

    @property
    def fates(self) -> list[TierName]:
        """The tiers that this rank's blocks came from."""
        return self._own.fates

    @property
    def load_ms(self) -> float:
        """How long this rank's took."""
        return self._own.load_ms

    @property
    def tail(self) -> None:
        """None: how far each rank's would be is not agreed on."""
        return None

    @property
    def made_elsewhere(self) -> int:
        """As the store says."""
        return self._own.made_elsewhere

    def cancel(self) -> None:
        """Give all blocks back."""
        self.done = self.cancelled = True
        self._own.cancel()

    def state(self) -> list[int]:
        """For the agreement: whether it has come, how long it is."""
        return [self._own.done, len(self._own.block_ids)]

    def agree(self, done: int, count: int) -> None:
        """What is true on every rank."""
        self._agreed = count
        if not done:
            return
        self.done = True
        beyond = self._own.block_ids[count:]
        del self._own.block_ids[count:], self._own.fates[count:]
        self._store.release(beyond)


class AgreedStore:
    """A rank's store, whose answers are those that hold on every rank. `workers.scheduler.BlockStore`."""

    def __init__(self, store: Holds, group: RankGroup) -> None:
        """Over this rank's store."""
        self._store, self._group = store, group
        self._under_way: list[AgreedAcquisition] = []
        self._sure = 0  # blocks that every rank can give, whatever else it holds

    def match(self, hashes: Items[BlockHash], reads: ReadTiers = ALL_TIERS) -> list[TierName]:
        """As far as every rank holds it; the tiers are this rank's."""
        found = self._store.match(hashes, reads)
        return found[: self._group.least([len(found)])[0]]

    def acquire(
        self,
        hashes: Items[BlockHash],
        *,
        reads: ReadTiers,
        compute_ms: ComputeMs,
        root: BlockHash | None = None,
        lifetime: Lifetime | None = None,
    ) -> Acquisition:
        """Start it on every rank; it is done at once only where all of them hold it near."""
        own = self._store.acquire(hashes, reads=reads, compute_ms=compute_ms, root=root, lifetime=lifetime)
        agreed = AgreedAcquisition(own, self._store)
        self._under_way.append(agreed)
        agreed.agree(*self._group.least(agreed.state()))
        self._sure = 0  # it has taken some
        return agreed

    def acquire_from_both_ends(
        self,
        hashes: Items[BlockHash],
        *,
        reads: ReadTiers,
        compute_ms: ComputeMs,
        root: BlockHash | None = None,
        lifetime: Lifetime | None = None,
    ) -> Acquisition:
        """As `acquire`, from the front alone: the ranks would have to agree on each piece that comes."""
        return self.acquire(hashes, reads=reads, compute_ms=compute_ms, root=root, lifetime=lifetime)

    def prefetch(
        self,
        hashes: Items[BlockHash],
        *,
        reads: ReadTiers = ALL_TIERS,
        compute_ms: ComputeMs | None = None,
        root: BlockHash | None = None,
        lifetime: Lifetime | None = None,
    ) -> int:
        """This rank's alone: no schedule depends on it."""
        return self._store.prefetch(hashes, reads=reads, compute_ms=compute_ms, root=root, lifetime=lifetime)

    def allocate(self, count: int) -> list[int] | None:
        """This rank's blocks, if every rank has as many."""
        if count > self._sure:
            self._sure = self._group.least([self._store.available])[0]
        if count > self._sure:
            return None
        self._sure -= count
        blocks = self._store.allocate(count)
        if blocks is None:
            raise RankLost(f"rank {self._group.rank} has no {count} blocks though all ranks agreed on it: {_PARTED}")
        return blocks

    def release(self, block_ids: Items[int]) -> None:
        """This rank's; how many more it can give then is asked when they are needed."""
        self._store.release(block_ids)

    def begin(self, digest: int, others: Items[int], grammars: Items[int]) -> tuple[list[int], list[int]]:
        """A step begins: settle what has come everywhere. Gives the least of `others` and of `grammars` over the ranks.

        All ranks have as many `others`; of `grammars` they have if they have not parted.

        Raises:
            RankLost: another rank runs another schedule.
        """
        self._under_way = [each for each in self._under_way if not each.done]
        head = [digest, -digest, len(self._under_way), -len(self._under_way)]
        states = [*grammars, *(number for each in self._under_way for number in each.state())]
        room = [0] * (-len(states) % _STATES)  # ranks that have parted shall still send equally many numbers
        agreed = self._group.least([*head, self._store.available, *others, *states, *room])
        if agreed[0] != -agreed[1] or agreed[2] != -agreed[3]:
            raise RankLost(f"rank {self._group.rank} of {self._group.size}: {_PARTED}")
        self._sure = agreed[4]
        compiling = 5 + len(others)
        first = compiling + len(grammars)
        for place, each in enumerate(self._under_way):
            each.agree(*agreed[first + 2 * place : first + 2 * place + 2])
        return agreed[5:compiling], agreed[compiling:first]


class TensorParallel:
    """`workers.agreement.Agreement` over a group of ranks.

    Attributes:
        now: the time of the step under way, on rank 0's clock; set before each step by whoever drives the engine.
        status: numbers of this rank for the others. agreed_status: the least of each, as of the last step.
        digest: of the schedule at the beginning of the last step.
    """

    def __init__(self, group: RankGroup) -> None:
        """No step has begun."""
        self._group = group
        self._store: AgreedStore | None = None
        self.now = 0.0
        self.status: list[int] = []
        self.agreed_status: list[int] = []
        self.digest = 0

    def blocks(self, store: Holds) -> BlockStore:
        """The store whose answers hold for all ranks."""
        self._store = AgreedStore(store, self._group)
        return self._store

    def begin(self, sequences: Iterable[Sequence], now: float, grammars: Items[Compiling]) -> Begun:
        """Agree on what has come and what is compiled; the time is rank 0's."""
        self.digest = schedule_digest(sequences)
        if self._store is None:
            return Begun(self.now, grammars)
        self.agreed_status, agreed = self._store.begin(self.digest, self.status, grammars)
        return Begun(self.now, [Compiling(each) for each in agreed])

    def tokens(self, sampled: dict[Sequence, Sampled]) -> dict[Sequence, Sampled]:
        """Rank 0's. This rank's own differ from them only where logits of ranks differ, which they should not."""
        if not sampled:
            return sampled
        own = [_NO_TOKEN if each.token_id is None else each.token_id for each in sampled.values()]
        agreed = self._group.numbers_of_first(own)
        if agreed == own:
            return sampled
        tokens = (None if token == _NO_TOKEN else token for token in agreed)
        return {sequence: Sampled(token) for sequence, token in zip(sampled, tokens, strict=True)}

    def failed(self, error: RuntimeError) -> None:
        """No step can follow: the others may wait for a tensor of this rank."""
        raise RankLost(f"rank {self._group.rank} of {self._group.size} could not compute a step: {error}") from error


def schedule_digest(sequences: Iterable[Sequence]) -> int:
    """A checksum of who is there and how far each is."""
    state = array("q")
    for each in sequences:
        state.extend((each.arrival, len(each.token_ids), each.num_computed, each.num_committed, len(each.block_table)))
    return zlib.crc32(state.tobytes())
