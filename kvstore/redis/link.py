"""The way to one Redis server: connections for each purpose, the breaker, what is known of the server and its troubles.

Covers: turning every fault of a server into one exception with a reason, and into a line that says what to do. Does not
cover: what is asked (`commands`), what a fault means for blocks (`redis`).
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from enum import StrEnum

import redis

from kvstore.breaker import Breaker
from kvstore.errors import CodecError, MissReason
from kvstore.redis.facts import SETTINGS, ServerFacts, parse_info, remedy
from kvstore.redis.judgement import Advice, judge
from kvstore.redis.pool import WirePool, mask_url
from kvstore.redis.resp import Wire, pack
from kvstore.tier import Clock

log = logging.getLogger(__name__)

FACTS_AGE_S = 5.0
SETTINGS_AGE_S = 60.0
LEAST_WEIGHT = 0.25  # of a failure, however little time the caller had: twelve of them open the breaker, too
NEVER = float("inf")


class Purpose(StrEnum):
    """What a connection is wanted for. Values travel apart from questions, so that no question waits behind a value."""

    LOOK_UPS = "look-ups"
    READS = "reads"
    WRITES = "writes"
    TOUCHES = "touches"
    REMOVALS = "removals"
    PROBES = "probes"
    VALUES = "probes of values' connections"


class UnavailableError(Exception):
    """The server could not be asked, or did not answer as it should. The message says what to do.

    Attributes:
        reason: as a miss. failure: as a failed write, in the words of `TierStats.store_failures`.
    """

    def __init__(self, problem: str, reason: MissReason, failure: str = "error") -> None:
        super().__init__(problem)
        self.reason = reason
        self.failure = failure


class RedisLink:
    """Thread-safe. After three faults in a row the breaker answers for the server; its probes are ordinary contacts.

    A refusal (no permission, full, read-only) is an answer: it is a problem of its purpose alone, until that succeeds.
    """

    def __init__(
        self,
        url: str,
        *,
        clock: Clock,
        on_restart: Callable[[], None],
        in_cluster: bool = False,
        block_nbytes: int = 0,
    ) -> None:
        """Connect to nothing yet.

        Args:
            url: see `address.URL_FORMS`.
            clock: of the breaker and of the facts' age; deadlines are real time.
            on_restart: called when another run of the server is found than before, which does not go on with what that
                held (the replica that became the primary does).
            in_cluster: it is spoken to as one node of a cluster, of keys that it serves.
            block_nbytes: of the blocks, to judge how many it has room for; zero: not judged.

        Raises:
            TierError: the URL cannot be used.
        """
        self._where = mask_url(url)
        self._clock = clock
        self._on_restart = on_restart
        self._in_cluster = in_cluster
        self._block_nbytes = block_nbytes
        self._breaker = Breaker(clock)
        self._lock = threading.Lock()
        self._facts = ServerFacts()
        self._facts_at = self._settings_at = -NEVER
        self._settings_are_refused = False
        self._told: set[str] = set()
        self._trouble = ""  # with the way to the server
        self._refusals: dict[Purpose, str] = {}
        self._info_refusal = ""
        self._is_open = True
        questions, values = (WirePool(url, self._learn) for _ in range(2))
        of_values = (Purpose.READS, Purpose.WRITES, Purpose.VALUES)
        self._pools = {purpose: values if purpose in of_values else questions for purpose in Purpose}

    @property
    def facts(self) -> ServerFacts:
        """The server's last word on itself, some seconds old."""
        return self._facts

    @property
    def is_healthy(self) -> bool:
        """Whether look-ups and reads can be expected to work."""
        with self._lock:
            is_refused = Purpose.LOOK_UPS in self._refusals or Purpose.READS in self._refusals
            return self._breaker.is_closed and not self._trouble and not is_refused

    @property
    def problem(self) -> str:
        """What is wrong and what to do; empty when nothing is."""
        with self._lock:
            wrong = [str(advice) for advice in self._judge(self._facts) if advice.is_wrong]
            problems = [self._trouble, *self._refusals.values(), self._info_refusal, *wrong]
        return "; ".join(dict.fromkeys(filter(None, problems)))

    @property
    def advice(self) -> list[str]:
        """What could be better about how the server is set up, though nothing is wrong, and what to do."""
        return [str(advice) for advice in self._judge(self._facts) if not advice.is_wrong]

    def probe(self, patience_s: float) -> bool:
        """Ask for a sign of life, if the breaker lets us; whether there was one.

        On both kinds of connections, which are then open: a first read has less patience than a greeting may take.
        """
        with suppress(UnavailableError):
            for purpose in (Purpose.PROBES, Purpose.VALUES):
                with self.contact(purpose, patience_s) as wire:
                    wire.ask(b"PING")
            return True
        return False

    @contextmanager
    def contact(self, purpose: Purpose, patience_s: float, ends_at: float = NEVER) -> Iterator[Wire]:
        """A connection for the time of the block.

        Args:
            purpose: what it is for.
            patience_s: longest wait for one answer, connecting included; `Wire.renew` grants it anew.
            ends_at: `time.monotonic()` when the caller's own time is up.

        Raises:
            UnavailableError: instead of any fault of the server.
        """
        started, asked_at = time.monotonic(), self._clock()
        self._admit(is_late=started >= ends_at)
        wire: Wire | None = None
        try:
            with self._pools[purpose].lease(patience_s, ends_at) as wire:
                yield wire
        except (redis.TimeoutError, TimeoutError) as error:
            # A caller in a hurry who hangs up while the server talks says nothing about the server, and one who granted
            # it less than its time says little.
            hung_up = wire is not None and wire.heard_at >= started and time.monotonic() >= ends_at
            if hung_up:
                raise UnavailableError(self._remedy(error), MissReason.DEADLINE) from error
            weight = min(1.0, max(LEAST_WEIGHT, (ends_at - started) / patience_s))
            raise self._lost(error, MissReason.DEADLINE, asked_at, weight) from error
        except redis.ResponseError as error:
            raise self._refused(purpose, error) from error
        except (redis.RedisError, OSError) as error:
            raise self._lost(error, MissReason.ERROR, asked_at) from error
        except CodecError:  # a wrong value is an answer, too
            self._answered(purpose)
            raise
        self._answered(purpose)

    def noted(self, purpose: Purpose, refusal: redis.ResponseError | None) -> None:
        """What came of commands that went along with those of another purpose, during a contact."""
        if refusal is not None:
            self._refused(purpose, refusal)
            return
        with self._lock:
            self._refusals.pop(purpose, None)

    def refresh_facts(self, wire: Wire) -> None:
        """Ask the server about itself, if the last time is a while ago."""
        if self._clock() - self._facts_at >= FACTS_AGE_S:
            self._learn(wire)

    def close(self) -> None:
        """Close all connections; later contacts fail."""
        self._is_open = False
        for pool in self._pools.values():
            pool.close()

    def _admit(self, *, is_late: bool) -> None:
        if not self._is_open:
            raise UnavailableError("the tier is closed; open another one", MissReason.ERROR)
        if is_late:
            raise UnavailableError("the deadline had passed; grant more time", MissReason.DEADLINE)
        if not self._breaker.admit():
            raise UnavailableError(self._trouble, MissReason.BREAKER, "breaker")

    def _lost(self, error: Exception, reason: MissReason, asked_at: float, weight: float = 1.0) -> UnavailableError:
        self._breaker.failed(asked_at=asked_at, weight=weight)
        problem = self._remedy(error)
        with self._lock:
            is_new, self._trouble = problem != self._trouble, problem
        if is_new:
            log.warning("redis failed", extra={"server": self._where, "problem": problem})
        return UnavailableError(problem, reason)

    def _refused(self, purpose: Purpose, error: redis.ResponseError) -> UnavailableError:
        self._answered(purpose)
        problem = self._remedy(error)
        with self._lock:
            is_new, self._refusals[purpose] = problem != self._refusals.get(purpose), problem
        if is_new:
            log.warning("redis refused", extra={"server": self._where, "purpose": str(purpose), "problem": problem})
        is_full = isinstance(error, redis.OutOfMemoryError)
        return UnavailableError(problem, MissReason.ERROR, "full" if is_full else "error")

    def _answered(self, purpose: Purpose) -> None:
        self._breaker.succeeded()
        with self._lock:
            was_lost, self._trouble = bool(self._trouble), ""
            self._refusals.pop(purpose, None)
        if was_lost:
            log.info("redis answered again", extra={"server": self._where})

    def _learn(self, wire: Wire) -> None:
        reply = wire.ask(b"INFO")
        if not isinstance(reply, bytes):
            error = reply if isinstance(reply, redis.ResponseError) else redis.InvalidResponse("INFO is no text")
            with self._lock:
                self._info_refusal = self._remedy(error)
            return
        facts = self._with_settings(wire, parse_info(reply))
        with self._lock:
            is_another = self._facts.run_id not in ("", facts.run_id) and not facts.inherits(self._facts)
            self._facts, self._facts_at = facts, self._clock()
            self._info_refusal = ""
        if is_another:
            log.info("redis was started anew", extra={"server": self._where})
            self._on_restart()

    def _with_settings(self, wire: Wire, facts: ServerFacts) -> ServerFacts:
        """Settings rarely change. Where they are refused they are asked for once a run: the ACL log notes each time."""
        known, now = self._facts, self._clock()
        is_same = facts.run_id == known.run_id
        if is_same and (now - self._settings_at < SETTINGS_AGE_S or self._settings_are_refused):
            return replace(facts, saves=known.saves, limits_clients=known.limits_clients)
        replies = wire.ask_all([pack(b"CONFIG", b"GET", name) for name in SETTINGS])
        self._settings_at = now
        self._settings_are_refused = all(isinstance(reply, redis.ResponseError) for reply in replies)
        facts = facts.with_settings(replies)
        self._tell(self._judge(facts))
        return facts

    def _tell(self, found: list[Advice]) -> None:
        """Log what has not been logged yet. Figures may differ from one time to the next; remedies are the same."""
        for advice in found:
            if advice.remedy not in self._told:
                self._told.add(advice.remedy)
                level = logging.WARNING if advice.is_wrong else logging.INFO
                log.log(level, "redis could be set up better", extra={"server": self._where, "advice": str(advice)})

    def _judge(self, facts: ServerFacts) -> list[Advice]:
        return judge(facts, in_cluster=self._in_cluster, block_nbytes=self._block_nbytes)

    def _remedy(self, error: Exception) -> str:
        return remedy(error, self._where, self._pools[Purpose.READS].masked(str(error)))
