"""The nodes of a Redis Cluster and which of them serves what: known from the seeds on, learnt anew when it changes.

Covers: making and closing nodes as the map names them, asking many of them at once, asking for a new map in the
background. Does not cover: reading the map (`slots`), what is asked of nodes (`cluster`).
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from typing import TypeVar

import redis

from kvstore.errors import MissReason
from kvstore.redis.address import at_node, mask_url, parse_address
from kvstore.redis.facts import remedy
from kvstore.redis.link import NEVER, UnavailableError
from kvstore.redis.node import DOWN, MOVING, ElsewhereError, RedisNode
from kvstore.redis.slots import Primary, SlotMap
from kvstore.tier import Clock

log = logging.getLogger(__name__)

ASK_AGAIN_S = 1.0  # between two questions for the map
SHOWN = 3  # nodes whose problems are told
# Nodes that are asked at once, by all callers together; threads are made when they are needed. A look-up has a deadline
# and must not queue behind writes, which have none.
QUESTION_THREADS, OTHER_THREADS = 64, 16

QUEUED = "more questions to the Redis cluster wait than are asked at once; grant more time, or add workers"

T = TypeVar("T")
MakeNode = Callable[[str, Primary | None], RedisNode]


class Topology:
    """Thread-safe.

    Attributes:
        slots: the map, some time old.
    """

    def __init__(self, seeds: Sequence[str], make: MakeNode, *, clock: Clock) -> None:
        """Ask nobody yet.

        Args:
            seeds: URLs of nodes that may be asked first, at least one.
            make: a node from its URL; of a seed nobody knows yet which node it is.
        """
        self._seeds = {url: make(url, None) for url in seeds}
        self._first_seed = seeds[0]
        self._make = make
        self._clock = clock
        self._questions = ThreadPoolExecutor(QUESTION_THREADS, thread_name_prefix="redis-cluster-ask")
        self._others = ThreadPoolExecutor(OTHER_THREADS, thread_name_prefix="redis-cluster")
        self._lock = threading.Lock()
        self._asking = threading.Lock()
        self._asked_at = float("-inf")
        self._nodes: dict[Primary, RedisNode] = {}
        self._is_open = True
        self._problem = self._trouble = ""
        self.slots = SlotMap()

    def nodes(self) -> dict[Primary, RedisNode]:
        """All that serve slots. A copy."""
        with self._lock:
            return dict(self._nodes)

    def outdated(self) -> None:
        """A node answered, or failed, as if the map had changed: ask for it soon."""
        with self._lock:
            if not self._is_open or self._clock() - self._asked_at < ASK_AGAIN_S:
                return
            self._asked_at = self._clock()
        self._start(self._others, self.learn)

    def learn(self) -> bool:
        """Ask one node after the other for the map, those that answered last first; whether one told it."""
        with self._asking:
            candidates = sorted(self.nodes().values(), key=lambda node: not node.link.is_healthy)
            problem = ""
            for node in [*candidates, *self._seeds.values()]:
                if not self._is_open:
                    return False
                try:
                    found = node.slots()
                    if not found.primaries:
                        raise redis.exceptions.ClusterDownError("no slot is served")
                except (UnavailableError, redis.RedisError) as error:
                    problem = problem or self._why_not(node, error)
                    continue
                self._adopt(found)
                return True
            self._problem = problem
            return False

    def problems(self) -> list[str]:
        """What is wrong with the cluster as a whole and with its nodes, and what to do."""
        if not self.slots.primaries:
            return [self._problem or "the Redis cluster has not been asked yet; try again"]
        found = [f"{primary}: {problem}" for primary, node in self.nodes().items() if (problem := node.problem)]
        more = [f"and {len(found) - SHOWN} more nodes, see the log"] if len(found) > SHOWN else []
        lost = self.slots.unserved
        cluster = (
            [f"{lost} slots of the Redis cluster are served by no node; run redis-cli --cluster fix"] if lost else []
        )
        return [*cluster, *filter(None, [self._trouble]), *found[:SHOWN], *more]

    def close(self) -> None:
        """Close all nodes."""
        with self._lock:
            self._is_open = False
            nodes = [*self._nodes.values(), *self._seeds.values()]
        for node in nodes:
            node.close()
        self._questions.shutdown(wait=True)
        self._others.shutdown(wait=True)

    def ask(
        self, slots: Sequence[int], work: Callable[[RedisNode, list[int]], T], ends_at: float
    ) -> list[tuple[list[int], T | UnavailableError]]:
        """Ask all nodes that serve some of these slots, at once; the last one on the caller's own thread.

        For each: the positions of its slots, ascending, and what `work` returned for them, or why it could not. `work`
        itself keeps to `ends_at` (`time.monotonic()`); what has not even begun by then is not asked at all.
        """
        return self._split(self._questions, slots, work, ends_at)

    def tell(
        self, slots: Sequence[int], work: Callable[[RedisNode, list[int]], T]
    ) -> list[tuple[list[int], T | UnavailableError]]:
        """As `ask`, of what nobody waits for with a deadline: writes, touches, removals."""
        return self._split(self._others, slots, work, NEVER)

    def _split(
        self,
        threads: ThreadPoolExecutor,
        slots: Sequence[int],
        work: Callable[[RedisNode, list[int]], T],
        ends_at: float,
    ) -> list[tuple[list[int], T | UnavailableError]]:
        if not slots:
            return []
        *others, (primary, part) = self.slots.split(slots).items()
        started = [(theirs, self._start(threads, self._at, other, theirs, work)) for other, theirs in others]
        last = self._at(primary, part, work)
        return [*((theirs, _result(job, ends_at)) for theirs, job in started), (part, last)]

    def ask_all(self, work: Callable[[RedisNode], T]) -> list[T | UnavailableError]:
        """Ask every node that serves slots, at once; what came of it."""
        threads = self._others
        started = [
            self._start(threads, self._at, primary, [], lambda node, part: work(node)) for primary in self.nodes()
        ]
        return [_result(job, NEVER) for job in started]

    def heed(self, fault: UnavailableError | None) -> None:
        """A slot may have moved, or a replica may have taken over: the map is asked for."""
        if fault is None or fault.reason is MissReason.BREAKER:
            return
        if isinstance(fault, ElsewhereError) and str(fault) == DOWN:
            self._trouble = DOWN
        self.outdated()

    def _at(
        self, primary: Primary | None, part: list[int], work: Callable[[RedisNode, list[int]], T]
    ) -> T | UnavailableError:
        node = None if primary is None else self._nodes.get(primary)
        if node is None:
            self.outdated()
            return UnavailableError("; ".join(self.problems()) or MOVING, MissReason.ERROR)
        try:
            answer = work(node, part)
        except UnavailableError as fault:
            self.heed(fault)
            return fault
        self._trouble = ""
        return answer

    def _start(
        self, threads: ThreadPoolExecutor, work: Callable[..., T], *args: object
    ) -> Future[T] | UnavailableError:
        try:
            return threads.submit(work, *args)
        except RuntimeError:  # they have been shut down
            return UnavailableError("the tier is closed; open another one", MissReason.ERROR)

    def _adopt(self, found: SlotMap) -> None:
        with self._lock:
            if not self._is_open:
                return
            known = self._nodes
            self._nodes = {
                primary: known.get(primary)
                or self._make(at_node(self._first_seed, primary.host, primary.port), primary)
                for primary in found.primaries
            }
            self.slots, self._problem = found, ""
            gone = [node for primary, node in known.items() if primary not in self._nodes]
        if known and known.keys() != self._nodes.keys():
            log.info("the redis cluster changed", extra={"nodes": [str(primary) for primary in found.primaries]})
        for node in gone:
            node.close()

    def _why_not(self, node: RedisNode, error: Exception) -> str:
        where, said = mask_url(node.url), parse_address(node.url).masked(str(error))
        if "cluster support disabled" in said:
            return f"{where} is no node of a cluster; write redis:// instead of redis+cluster:// in the Redis URL"
        return said if isinstance(error, UnavailableError) else remedy(error, where, said)


def _result(job: Future[T] | UnavailableError, ends_at: float) -> T | UnavailableError:
    """What has begun is waited for, as it may still fill the caller's buffers: it ends by itself, at its deadline."""
    if not isinstance(job, Future):
        return job
    left_s = None if ends_at == NEVER else max(0.0, ends_at - time.monotonic())
    wait([job], left_s)
    if job.cancel():
        return UnavailableError(QUEUED, MissReason.DEADLINE)
    return job.result()
