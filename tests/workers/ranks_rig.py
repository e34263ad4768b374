"""A worker of two ranks whose ranks are threads of the test: real collectives, real stores, and both within reach."""

from __future__ import annotations

import functools
import math
import tempfile
import threading
import unittest.mock
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path

from torch import Tensor

from kvstore.blocks import HashScheme
from kvstore.codec import BlockCodec
from kvstore.device import DeviceTier
from kvstore.disk.tier import DiskTier
from kvstore.host.tier import HostTier
from kvstore.peer.peers import PeersTier
from kvstore.peer.server import PeerServer
from kvstore.redis.tier import RedisTier
from kvstore.store import TieredStore
from tests.workers.engine_rig import BLOCK_SIZE, SHAPE, Clock, Rig, model_folder
from tests.workers.stream_client import SECRET
from workers import models
from workers.engine import TorchEngine
from workers.models import ModelRunner
from workers.peers import Peers, address_of
from workers.protocol import EngineInfo
from workers.tensor_parallel.agreement import TensorParallel
from workers.tensor_parallel.follower import Follower
from workers.tensor_parallel.group import RankGroup
from workers.tensor_parallel.leader import LeadingEngine
from workers.tensor_parallel.lost import RankLost

SIZE = 2
TIMEOUT_S = 120.0
_rigs: list[RanksRig] = []  # made and perhaps not closed


@contextmanager
def one_at_a_time() -> Iterator[None]:
    """Ranks are processes; here they are threads, and `from_pretrained` is not made for two at once."""
    load, lock = models._load_model, threading.Lock()

    def alone(*arguments):
        with lock:
            return load(*arguments)

    with unittest.mock.patch.object(models, "_load_model", alone):
        yield


class ModelsGroup:
    """The group of the rig at hand: models are loaded once and serve many rigs."""

    def __init__(self, rank: int) -> None:
        self.rank, self.size = rank, SIZE
        self.group: RankGroup | None = None

    def add_up(self, part: Tensor) -> Tensor:
        return self.group.add_up(part)

    def side_by_side(self, part: Tensor) -> Tensor:
        return self.group.side_by_side(part)


def meet(folder: Path, rank: int) -> RankGroup:
    return RankGroup(folder, rank, SIZE, join_timeout_s=TIMEOUT_S, timeout_s=TIMEOUT_S)


def on_all_ranks(work: Callable[[int], object]) -> list:
    with ThreadPoolExecutor(SIZE) as pool:
        return list(pool.map(work, range(SIZE)))


@functools.cache
def cut_runners(architecture: str = "llama") -> tuple[list[ModelRunner], list[ModelsGroup]]:
    groups = [ModelsGroup(rank) for rank in range(SIZE)]
    with tempfile.TemporaryDirectory() as folder:

        def load(rank: int) -> ModelRunner:
            groups[rank].group = meet(Path(folder), rank)
            return ModelRunner.load(model_folder(architecture), ranks=groups[rank])

        with one_at_a_time():
            return on_all_ranks(load), groups


class Watched(TensorParallel):
    """Keeps the digest of every step."""

    def __init__(self, group: RankGroup) -> None:
        super().__init__(group)
        self.digests: list[int] = []

    def begin(self, sequences, now, grammars):
        begun = super().begin(sequences, now, grammars)
        self.digests.append(self.digest)
        return begun


@dataclass
class RanksRig(Rig):
    """`Rig` for rank 0, and the others' parts. A follower only moves while rank 0 speaks."""

    engines: list[TorchEngine] = field(default_factory=list)
    stores: list[TieredStore] = field(default_factory=list)
    ranks: list[Watched] = field(default_factory=list)
    groups: list[RankGroup] = field(default_factory=list)
    proxies: list[ModelsGroup] = field(default_factory=list)
    peers: list[Peers] = field(default_factory=list)
    follower: threading.Thread | None = None
    failures: list[BaseException] = field(default_factory=list)

    def use_models(self) -> None:
        """The models are of one rig at a time: from now on of this one."""
        for proxy, group in zip(self.proxies, self.groups, strict=True):
            proxy.group = group

    def assert_nothing_held(self) -> None:
        self.settle()
        for store in self.stores:
            store.check()
            assert [block for block in range(store.device.num_blocks) if store.device.refs(block)] == []
        assert [len(engine._scheduler) for engine in self.engines] == [0] * SIZE
        assert self.ranks[0].digests == self.ranks[1].digests

    def settle(self) -> None:
        """Until the other rank has done all that was told, and waits for more."""
        self.engine.step()
        self.engine.cache.check()

    def close(self) -> None:
        self.engine.close(flush_s=5)
        self.follower.join(TIMEOUT_S)
        assert not self.follower.is_alive()
        if self.failures:
            raise self.failures[0]


def make_ranks_rig(
    architecture: str = "llama",
    *,
    device_blocks: int = 400,
    fewer_on_rank_1: int = 0,
    host_blocks: int = 0,
    disk: Path | None = None,
    redis_url: str | None = None,
    max_batch_tokens: int = 256,
    max_running: int = 32,
    serves_peers: bool = False,
) -> RanksRig:
    """As `make_rig`, on two ranks. `serves_peers`: each reads blocks of other workers and serves its own."""
    (runners, proxies), clock, other_clock = cut_runners(architecture), Clock(), Clock()
    other_clock.ahead_s = 1000.0  # ranks have clocks of their own
    parts: dict[int, tuple] = {}
    with tempfile.TemporaryDirectory() as folder:
        groups = on_all_ranks(lambda rank: meet(Path(folder), rank))
    for rank in range(SIZE):
        proxies[rank].group, model = groups[rank], runners[rank]
        layout = replace(model.layout, block_size=BLOCK_SIZE)
        named = HashScheme(model.fingerprint, layout.describe(), BLOCK_SIZE, tp_size=SIZE)
        codec = BlockCodec(layout, replace(named, tp_rank=rank).digest())
        nbytes = layout.block_nbytes
        clock_of_rank = other_clock if rank else clock
        blocks_of_rank = device_blocks - (fewer_on_rank_1 if rank else 0)
        device = DeviceTier(layout, blocks_of_rank * nbytes, clock=clock_of_rank, poison=True)
        host = HostTier(layout, host_blocks * nbytes, clock=clock_of_rank) if host_blocks else None
        on_disk = None if disk is None else DiskTier(disk / f"rank{rank}", 64 << 20, codec=codec, clock=clock_of_rank)
        shared = None if redis_url is None else RedisTier(redis_url, codec=codec, timeout_s=5.0)
        peers = _open_peers(host, codec, clock_of_rank, rank) if serves_peers else None
        store = TieredStore(
            layout,
            device,
            host,
            shared,
            disk=on_disk,
            peers=None if peers is None else peers.tier,
            clock=clock_of_rank,
            default_ttl_s=None,
            load_slack_s=5.0,
        )
        info = EngineInfo(
            scheme=named,
            model="tiny",
            tokenizer_sha256=model.folder.tokenizer_sha256,
            context_length=SHAPE.context_length,
            vocab_size=model.vocab_size,
            block_nbytes=nbytes * SIZE,
            device="cpu",
            eos_token_ids=model.folder.eos_token_ids,
        )
        ranks = Watched(groups[rank])
        engine = TorchEngine(
            model,
            store,
            [device.kv(layer) for layer in range(layout.layers)],
            info,
            num_blocks=device_blocks - fewer_on_rank_1,
            max_batch_tokens=max_batch_tokens,
            max_running=max_running,
            default_ttl_s=None,
            clock=clock_of_rank,
            peers=peers,
            ranks=ranks,
        )
        engine._scheduler._compute_ms = lambda first, count: math.inf
        parts[rank] = (engine, store, ranks, peers)
    if serves_peers:
        address = address_of([parts[rank][3].address for rank in range(SIZE)])
        for rank in range(SIZE):
            parts[rank][0].info = replace(parts[rank][0].info, peer_address=address)
    rig = RanksRig(
        LeadingEngine(parts[0][0], groups[0], parts[0][2], clock=clock),
        parts[0][1],
        parts[0][1].device,
        clock,
        engines=[parts[rank][0] for rank in range(SIZE)],
        stores=[parts[rank][1] for rank in range(SIZE)],
        ranks=[parts[rank][2] for rank in range(SIZE)],
        groups=groups,
        proxies=proxies,
        peers=[parts[rank][3] for rank in range(SIZE) if parts[rank][3] is not None],
    )
    rig.follower = threading.Thread(target=_follow, args=(rig,), name="rank1", daemon=True)
    rig.follower.start()
    _rigs.append(rig)
    return rig


def _open_peers(host: HostTier | None, codec: BlockCodec, clock: Clock, rank: int) -> Peers:
    server = PeerServer(host, codec=codec, secret=SECRET)
    tier = PeersTier(codec=codec, secret=SECRET, timeout_s=30.0, clock=clock)
    return Peers(tier, server, server.address, rank=rank, size=SIZE)


def end_rigs() -> None:
    """Let followers of rigs that a failed test left open go: a thread that waits for a rank would abort the process."""
    while _rigs:
        rig = _rigs.pop()
        rig.groups[0].close()
        rig.follower.join(TIMEOUT_S)


def _follow(rig: RanksRig) -> None:
    try:
        Follower(rig.engines[1], rig.groups[1], rig.ranks[1]).run()
    except RankLost as error:
        rig.failures.append(error)
