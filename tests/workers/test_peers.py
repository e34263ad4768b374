"""Workers that read one another's host tiers: real engines with a real model, on loopback."""

from __future__ import annotations

import base64
import logging
import math
import socket
import time
from collections.abc import Iterator
from dataclasses import replace

import pytest

from kvstore.blocks import block_hashes
from kvstore.errors import TierError
from kvstore.events import TierName
from kvstore.peer.promises import FIRST_QUESTION_S
from tests.workers.engine_rig import model_folder, prompts
from tests.workers.serving import INFO, routers, serving
from tests.workers.stream_client import SECRET, job
from warmkv.v1 import worker_pb2
from workers import peers
from workers.build import build_engine
from workers.config import WorkerConfig
from workers.engine import TorchEngine
from workers.protocol import FinishReason, Job, Output, PeerHint, Promised, SamplingParams
from workers.simulated_cache import SimulatedCache

CONFIG = WorkerConfig(
    name="w0",
    model_dir=str(model_folder()),
    model_name="tiny",
    device="cpu",
    device_bytes=4 << 20,
    host_bytes=8 << 20,
    block_size=16,
    fleet_secret=SECRET,
    peers=True,
    load_slack_s=10.0,  # a read is not given up because this machine was busy
)
PROMPT = prompts(1, lengths=(100,))[0]  # six full blocks
KEYS = "k1:" + base64.b64encode(bytes(range(32))).decode()


@pytest.fixture(autouse=True)
def _patient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(peers, "TIMEOUT_S", 30.0)


def _engine(**settings: object) -> TorchEngine:
    engine = build_engine(replace(CONFIG, **settings))  # type: ignore[arg-type]
    engine._scheduler._compute_ms = lambda first, count: math.inf  # whatever reading costs, it is worth it
    return engine


@pytest.fixture
def two() -> Iterator[list[TorchEngine]]:
    engines = [_engine(), _engine(name="w1")]
    yield engines
    for engine in engines:
        engine.cache.check()
        engine.close(flush_s=0)


def _job(engine: TorchEngine, *hints: PeerHint) -> Job:
    root = engine.info.scheme.root(b"")
    sampling = SamplingParams(max_tokens=5, temperature=0.0, ignore_eos=True)
    return Job("a", PROMPT, root, block_hashes(PROMPT, root, 16), sampling, peers=hints)


def _hint(engine: TorchEngine, blocks: int = 6) -> PeerHint:
    return PeerHint(engine.info.peer_address, blocks)


def _run(engine: TorchEngine, *hints: PeerHint) -> tuple[list[int], dict[str, int] | None]:
    engine.submit(_job(engine, *hints))
    outputs: list[Output] = []
    while engine.has_work():
        outputs += engine.step().outputs
        engine.wait(0.05)
    return [token for output in outputs for token in output.token_ids], outputs[-1].fates


def test_a_prompt_that_another_worker_holds_is_read_from_there(two: list[TorchEngine]):
    tokens, cold = _run(two[0])
    assert cold == {"computed": 100}
    assert _run(two[1], _hint(two[0])) == (tokens, {"computed": 4, "peer": 96})
    stats, latency_ms, block_ms = two[1].load().tiers[TierName.PEER]
    assert (stats.hits, stats.healthy, stats.capacity_bytes) == (6, True, 0)
    assert block_ms > latency_ms >= 0
    told = [event for event in two[1].snapshot() if event.tier is TierName.HOST]
    assert sum(len(event.hashes) for event in told) == 6
    assert _run(two[1]) == (tokens, {"computed": 4, "device": 96})


def test_only_as_much_is_read_as_the_hint_says(two: list[TorchEngine]):
    _run(two[0])
    assert _run(two[1], _hint(two[0], 2))[1] == {"computed": 68, "peer": 32}


def test_a_worker_does_not_ask_itself_and_a_wrong_hint_is_computed(two: list[TorchEngine]):
    tokens, _ = _run(two[0], _hint(two[0]), _hint(two[1]))
    assert _run(two[1], PeerHint("127.0.0.1:1", 6), PeerHint("", 6)) == (tokens, {"computed": 100})
    own = two[0].load().tiers[TierName.PEER][0]
    assert own.misses == {"absent": 1}, "the other one was asked, once"


def test_while_it_is_held_no_peer_is_read(two: list[TorchEngine]):
    tokens, _ = _run(two[0])
    two[1].cache.hold_peers("a clear", 60.0)
    assert _run(two[1], _hint(two[0])) == (tokens, {"computed": 100})
    two[1].cache.clear()
    two[1].cache.release_peers("a clear")
    assert _run(two[1]) == (tokens, {"computed": 100}), "hints from before the clear are forgotten"
    two[1].cache.clear()
    assert _run(two[1], _hint(two[0])) == (tokens, {"computed": 4, "peer": 96})


def test_the_shared_tiers_switch_is_none_of_peers(two: list[TorchEngine]):
    _run(two[0])
    two[1].cache.set_shared_reads(enabled=False)
    assert _run(two[1], _hint(two[0]))[1] == {"computed": 4, "peer": 96}


def test_a_worker_that_ended_is_a_miss(two: list[TorchEngine]):
    other = _engine(name="w2")
    tokens, _ = _run(other)
    assert _run(two[1], replace(_hint(other), blocks=2))[1] == {"computed": 68, "peer": 32}  # a connection stays open
    other.close(flush_s=0)
    two[1].cache.clear()
    assert _run(two[1], _hint(other)) == (tokens, {"computed": 100})


def test_another_fleets_worker_gives_nothing(two: list[TorchEngine]):
    stranger = _engine(name="w2", fleet_secret="another fleet's")
    _run(stranger)
    assert _run(two[1], _hint(stranger))[1] == {"computed": 100}
    stranger.close(flush_s=0)


def test_what_others_dial_is_the_advertised_host():
    engine = _engine(bind_host="0.0.0.0", advertise_host="gpu-7.example")
    host, _, port = engine.info.peer_address.partition(":")
    assert host == "gpu-7.example"
    socket.create_connection(("127.0.0.1", int(port)), timeout=30).close()
    engine.close(flush_s=0)
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection(("127.0.0.1", int(port)), timeout=30)


def test_a_worker_without_a_host_tier_reads_and_serves_nobody(two: list[TorchEngine]):
    tokens, _ = _run(two[0])
    bare = _engine(name="w2", host_bytes=0)
    assert bare.info.peer_address == ""
    assert _run(bare, _hint(two[0])) == (tokens, {"computed": 4, "peer": 96})
    bare.close(flush_s=0)


def test_a_port_that_is_taken_is_named():
    with socket.create_server(("127.0.0.1", 0)) as other, pytest.raises(TierError, match="free port"):
        _engine(peer_port=other.getsockname()[1])


@pytest.mark.parametrize(
    ("settings", "problem"),
    [
        ({"fleet_secret": ""}, "auth.fleet_secret"),
        ({"tls_cert": "cert.pem", "tls_key": "key.pem"}, "store.protection=encrypt"),
        ({"tls_cert": "cert.pem", "tls_key": "key.pem", "store_keys": KEYS}, "store.protection=encrypt"),
        ({"peers": False}, ""),
    ],
)
def test_a_worker_that_may_not_take_part_says_why(
    settings: dict[str, object], problem: str, caplog: pytest.LogCaptureFixture
):
    with caplog.at_level(logging.WARNING):
        engine = _engine(**settings)
    assert engine.info.peer_address == ""
    assert TierName.PEER not in engine.load().tiers
    said = [record.problem for record in caplog.records if "other workers" in record.message]  # type: ignore[attr-defined]
    assert [problem in line for line in said] == ([True] if problem else [])
    engine.cache.hold_peers("a", 1.0)
    engine.cache.release_peers("a")
    assert _run(engine, PeerHint("127.0.0.1:1", 6))[1] == {"computed": 100}
    engine.close(flush_s=0)


def test_encrypted_blocks_go_between_workers_whose_streams_are_encrypted():
    settings = {"tls_cert": "cert.pem", "tls_key": "key.pem", "store_keys": KEYS, "protection": "encrypt"}
    one, other = _engine(**settings), _engine(name="w1", **settings)
    tokens, _ = _run(one)
    assert _run(other, _hint(one)) == (tokens, {"computed": 4, "peer": 96})
    for engine in (one, other):
        engine.close(flush_s=0)


def test_a_simulated_worker_serves_nobody_and_ignores_hints():
    with serving() as (_, address), routers(address) as (router,):
        assert router.messages[0].hello.peer_address == ""
        asked = job(INFO.scheme, 1, list(range(100)))
        asked.peers.add(address="127.0.0.1:1", blocks=6)
        router.send(submit=asked)
        router.wait_finished(1)
        router.send(clear=worker_pb2.Clear(clear_id=4, peers_hold=9))
        router.send(peers_released=worker_pb2.PeersReleased(peers_hold=9))
        router.wait_for(lambda: "clear_done" in router.kinds())
        router.wait_handled()


# --- prefill here, answer there ---

LONG = prompts(2, lengths=(500, 500))[1]  # 31 full blocks, of which all may be read


def _long(engine: TorchEngine, name: str, **options: object) -> Job:
    root = engine.info.scheme.root(b"")
    sampling = SamplingParams(max_tokens=12, temperature=0.0, ignore_eos=True)
    return Job(name, LONG, root, block_hashes(LONG, root, 16), sampling, **options)  # type: ignore[arg-type]


def _prefill_job(engine: TorchEngine, blocks: int = 31) -> Job:
    root = engine.info.scheme.root(b"")
    prompt = LONG[: 16 * blocks]
    sampling = SamplingParams(max_tokens=1, temperature=0.0)
    return Job("p", prompt, root, block_hashes(prompt, root, 16), sampling, prefill_only=True)


def _promise(engine: TorchEngine, blocks: int = 31) -> Promised:
    return Promised(engine.info.peer_address, blocks, ready_ms=20_000.0, margin_ms=20_000.0)


def _both(maker: TorchEngine, answerer: TorchEngine, *, stop_maker_after: int = 10_000) -> tuple[list[Output], Output]:
    """Step both in turn; all outputs of the answer, and the maker's last word."""
    answers: list[Output] = []
    makers: list[Output] = []
    for step in range(10_000):
        if step == stop_maker_after:
            maker.cancel("p")
        makers += maker.step().outputs if maker.has_work() else []
        answers += answerer.step().outputs
        if not answerer.has_work():
            break
        answerer.wait(0.01)
    makers += maker.step().outputs if maker.has_work() else []
    return answers, makers[-1]


def _tokens(outputs: list[Output]) -> list[int]:
    return [token for output in outputs for token in output.token_ids]


@pytest.fixture
def small_steps() -> Iterator[list[TorchEngine]]:
    engines = [_engine(max_batch_tokens=64), _engine(name="w1", max_batch_tokens=64)]
    yield engines
    for engine in engines:
        engine.cache.check()
        assert [block for block in range(engine.store.device.num_blocks) if engine.store.device.refs(block)] == []
        engine.close(flush_s=0)


def test_a_prefill_elsewhere_gives_the_same_answer_and_counts_as_computed(small_steps: list[TorchEngine]):
    maker, answerer = small_steps
    alone = _engine(name="w2")
    alone.submit(_long(alone, "a"))
    expected = []
    while alone.has_work():
        expected += alone.step().outputs
    alone.close(flush_s=0)
    answerer.submit(_long(answerer, "a", promise=_promise(maker)))
    maker.submit(_prefill_job(maker))
    before = answerer.load().pending_prefill_tokens
    answers, last = _both(maker, answerer)
    assert _tokens(answers) == _tokens(expected)
    assert answers[-1].fates == {"computed": 500}, "this request's own forward made all of it, on two workers"
    assert (last.token_ids, last.finish, last.fates) == ([], FinishReason.LENGTH, {"computed": 496})
    assert before == 4, "what another worker makes is no work of this one"
    stats = answerer.load().tiers[TierName.PEER][0]
    assert stats.hits == 31


def test_blocks_travel_while_the_prefill_goes_on(small_steps: list[TorchEngine]):
    maker, answerer = small_steps
    answerer.submit(_long(answerer, "a", promise=_promise(maker)))
    maker.submit(_prefill_job(maker))
    for _ in range(3):  # 192 of 496 tokens
        maker.step()
    for _ in range(2000):
        answerer.step()
        if len(answerer.store.match(block_hashes(LONG, answerer.info.scheme.root(b""), 16))) == 12:
            break
        answerer.wait(0.01)
    else:
        raise AssertionError("the first chunks did not come")
    assert answerer.load().running == 0
    answers, _ = _both(maker, answerer)
    assert answers[-1].finish is FinishReason.LENGTH


def test_what_the_maker_had_cached_is_a_hit(small_steps: list[TorchEngine]):
    maker, answerer = small_steps
    maker.submit(_prefill_job(maker, blocks=10))
    while maker.has_work():
        maker.step()
    answerer.submit(_long(answerer, "a", promise=_promise(maker)))
    maker.submit(_prefill_job(maker))
    answers, last = _both(maker, answerer)
    assert last.fates == {"computed": 336, "device": 160}
    assert answers[-1].fates == {"computed": 340, "peer": 160}


@pytest.mark.parametrize("after", [0, 1, 3, 6])
def test_a_maker_that_stops_half_way_costs_no_token(small_steps: list[TorchEngine], after: int):
    maker, answerer = small_steps
    answerer.submit(_long(answerer, "a", promise=_promise(maker)))
    maker.submit(_prefill_job(maker))
    answers, last = _both(maker, answerer, stop_maker_after=after)
    assert last.finish is FinishReason.CANCELLED
    assert answers[-1].fates == {"computed": 500}
    answerer.cache.clear()
    answerer.submit(_long(answerer, "b"))
    again: list[Output] = []
    while answerer.has_work():
        again += answerer.step().outputs
    assert _tokens(answers) == _tokens(again)


@pytest.mark.parametrize("made_first", [0, 3])
def test_a_job_that_is_cancelled_while_it_waits_for_another_worker_holds_nothing(
    small_steps: list[TorchEngine], made_first: int
):
    """Nothing has come yet, or a part of it lies on the device already."""
    maker, answerer = small_steps
    answerer.submit(_long(answerer, "a", promise=_promise(maker)))
    maker.submit(_prefill_job(maker))
    for _ in range(made_first):
        maker.step()
    names = block_hashes(LONG, answerer.info.scheme.root(b""), 16)
    until = time.monotonic() + 30
    while len(answerer.store.match(names)) < made_first * 4 or answerer.load().waiting != 1:
        assert time.monotonic() < until
        answerer.step()
        answerer.wait(0.01)
    assert answerer.load().running == 0
    answerer.cancel("a")
    assert [output.finish for output in answerer.step().outputs] == [FinishReason.CANCELLED]
    assert not answerer.has_work()
    device = answerer.store.device
    assert [block for block in range(device.num_blocks) if device.refs(block)] == []
    while maker.has_work():
        maker.step()
    answerer.step()
    answerer.cache.check()


def test_a_maker_owes_what_it_made_until_the_other_one_has_read_it(small_steps: list[TorchEngine]):
    maker, answerer = small_steps
    assert not maker.cache.owes_peers()
    answerer.submit(_long(answerer, "a", promise=_promise(maker)))
    maker.submit(_prefill_job(maker))
    while maker.has_work():
        maker.step()
        assert maker.cache.owes_peers()
    time.sleep(FIRST_QUESTION_S + 0.2)
    assert maker.cache.owes_peers(), "the other one has not begun to read, and still asks"
    answers: list[Output] = []
    while answerer.has_work():
        answers += answerer.step().outputs
        answerer.wait(0.01)
    assert answers[-1].fates == {"computed": 500}
    assert answerer.load().tiers[TierName.PEER][0].hits == 31
    until = time.monotonic() + 30
    while maker.cache.owes_peers():
        assert time.monotonic() < until, "nobody asks any more"
        time.sleep(0.05)


def test_who_hears_that_its_maker_failed_computes_at_once(small_steps: list[TorchEngine]):
    maker, answerer = small_steps
    promised = _promise(maker)
    answerer.submit(_long(answerer, "a", promise=promised))
    for _ in range(5):
        assert answerer.step().outputs == [], "nobody makes it, and it would be waited for 60 s"
    answerer.cache.promise_broken(promised.address, block_hashes(LONG, answerer.info.scheme.root(b""), 16)[30])
    outputs: list[Output] = []
    for _ in range(40):
        outputs += answerer.step().outputs
    assert (len(_tokens(outputs)), outputs[-1].fates) == (12, {"computed": 500})


def test_what_a_router_says_of_a_promise_reaches_the_engine(monkeypatch: pytest.MonkeyPatch):
    heard: list[tuple[str, bytes]] = []
    monkeypatch.setattr(SimulatedCache, "promise_broken", lambda _, address, ticket: heard.append((address, ticket)))
    with serving() as (_, address), routers(address) as (router,):
        router.send(promise_broken=worker_pb2.PromiseBroken(address="127.0.0.1:1", ticket=b"t" * 32))
        router.send(submit=job(INFO.scheme, 1, list(range(100))))
        router.wait_finished(1)
    assert heard == [("127.0.0.1:1", b"t" * 32)]


def test_while_it_waits_others_decode(small_steps: list[TorchEngine]):
    maker, answerer = small_steps
    answerer.submit(_long(answerer, "a", promise=_promise(maker)))
    answerer.submit(replace(_job(answerer), job_id="other"))
    others: list[Output] = []
    while not others or others[-1].finish is None:
        others += [output for output in answerer.step().outputs if output.job_id == "other"]
    assert len(_tokens(others)) == 5
    maker.submit(_prefill_job(maker))
    answers, _ = _both(maker, answerer)
    assert len(_tokens(answers)) == 12


def test_a_job_cancelled_while_it_waits_holds_nothing(small_steps: list[TorchEngine]):
    maker, answerer = small_steps
    answerer.submit(_long(answerer, "a", promise=_promise(maker)))
    maker.submit(_prefill_job(maker))
    for _ in range(3):
        maker.step()
        answerer.step()
    answerer.cancel("a")
    assert answerer.step().outputs[-1].finish is FinishReason.CANCELLED
    assert not answerer.has_work()
    while maker.has_work():
        maker.step()


def test_who_may_read_nothing_waits_for_nothing(small_steps: list[TorchEngine]):
    maker, answerer = small_steps
    answerer.submit(_long(answerer, "a", promise=_promise(maker), no_read=True))
    answers: list[Output] = []
    while answerer.has_work():
        answers += answerer.step().outputs
    assert answers[-1].fates == {"computed": 500}
