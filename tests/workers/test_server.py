"""The server's life: listening, TLS, draining, ending, an engine that fails."""

from __future__ import annotations

import datetime
import ipaddress
import socket
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from concurrent.futures import TimeoutError as FuturesTimeoutError
from dataclasses import dataclass
from pathlib import Path

import grpc
import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec

from tests.workers.serving import INFO, Gate, config, routers, serving, simulated
from tests.workers.stream_client import PATIENCE_S, StreamClient, job
from warmkv import versions
from warmkv.v1 import common_pb2, worker_pb2
from workers import leaving
from workers.protocol import StepReport
from workers.server import WorkerServer
from workers.simulated import SimulatedEngine
from workers.simulated_sequence import Timing

PROMPT = list(range(51))


def test_a_port_in_use_is_refused_with_the_remedy() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        server = WorkerServer(config(port=taken.getsockname()[1]), simulated())
        with pytest.raises(OSError, match="choose another port"):
            server.start()
        assert server.wait_closed(PATIENCE_S)


def test_two_workers_do_not_share_a_port() -> None:
    with serving() as (_, address):
        second = WorkerServer(config(port=int(address.rsplit(":", 1)[1])), simulated())
        with pytest.raises(OSError, match="choose another port"):
            second.start()


def test_the_address_names_the_advertised_host() -> None:
    with serving(advertise_host="worker.example") as (_, address):
        assert address.startswith("worker.example:")


@pytest.mark.parametrize(
    ("settings", "remedy"),
    [
        ({"bind_host": "0.0.0.0", "fleet_secret": ""}, "set fleet_secret"),
        ({"tls_cert": "cert.pem"}, "set both"),
        ({"tls_client_ca": "ca.pem"}, "needs tls_cert"),
    ],
)
def test_settings_that_cannot_be_meant_are_refused_with_the_remedy(settings: dict[str, str], remedy: str) -> None:
    with pytest.raises(ValueError, match=remedy):
        WorkerServer(config(**settings), simulated())


def test_without_a_secret_loopback_needs_none() -> None:
    with serving(fleet_secret="") as (_, address), routers(address, secret="anything") as (router,):
        assert router.messages[0].hello.worker == "w0"


def test_incarnations_grow_with_every_start() -> None:
    first = WorkerServer(config(), simulated()).incarnation
    assert WorkerServer(config(), simulated()).incarnation > first


def test_drain_finishes_what_runs_and_refuses_new_jobs() -> None:
    gate = Gate()
    with serving(simulated(sleep=gate)) as (server, address), routers(address) as (router,):
        router.send(submit=job(INFO.scheme, 1, PROMPT, max_tokens=5))
        gate.wait_arrived()
        with ThreadPoolExecutor(1) as pool:
            drained = pool.submit(server.drain, PATIENCE_S)
            while not server._streams._draining:
                time.sleep(0.01)
            router.send(submit=job(INFO.scheme, 2, PROMPT))
            router.wait_finished(2)
            assert router.outputs[2][-1].error.reason == "WORKER_DRAINING"
            gate.open()
            assert drained.result(PATIENCE_S)
        router.wait_finished(1)
        assert len(router.tokens(1)) == 5


class Owing(SimulatedEngine):
    """Other workers have still to read from it, until `read` is set; `asked` is set when somebody wanted to know."""

    def __init__(self) -> None:
        super().__init__(INFO, device_blocks=100, sleep=lambda s: None)
        self.read, self.asked = threading.Event(), threading.Event()
        self.cache.owes_peers = self._owes  # type: ignore[method-assign]

    def _owes(self) -> bool:
        self.asked.set()
        return not self.read.is_set()


def test_a_worker_without_jobs_stays_until_others_have_read_what_it_made_for_them() -> None:
    engine = Owing()
    with serving(engine) as (server, _), ThreadPoolExecutor(1) as pool:
        drained = pool.submit(server.drain, PATIENCE_S)
        assert engine.asked.wait(PATIENCE_S)
        with pytest.raises(FuturesTimeoutError):
            drained.result(1.5)
        engine.read.set()
        assert drained.result(PATIENCE_S)


def test_it_stays_no_longer_than_it_was_given(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(leaving, "LINGER_S", 0.1)
    with serving(Owing()) as (server, _), ThreadPoolExecutor(1) as pool:
        assert pool.submit(server.drain, 0.3).result(PATIENCE_S), "its own jobs have ended"


@pytest.mark.parametrize("is_stuck", [False, True])
def test_what_cannot_end_in_time_is_handed_back_even_by_an_engine_that_hangs(
    monkeypatch: pytest.MonkeyPatch, *, is_stuck: bool
) -> None:
    monkeypatch.setattr(leaving, "SHARE_S", 0.3)
    monkeypatch.setattr(leaving, "LINGER_S", 0.0)
    gate, timing = Gate(), Timing(decode_step_ms=5.0)
    engine = simulated(sleep=gate) if is_stuck else simulated(sleep=time.sleep, timing=timing)
    with serving(engine) as (server, address), routers(address, 2) as (one, two):
        for number in (1, 2):
            one.send(submit=job(INFO.scheme, number, PROMPT, max_tokens=50_000))
        two.send(submit=job(INFO.scheme, 7, PROMPT, max_tokens=50_000))
        if is_stuck:
            gate.wait_arrived()
            two.wait_handled()
        else:
            one.wait_for(lambda: one.outputs[2])
            two.wait_for(lambda: two.outputs[7])
        assert not server.drain(0.05)
        for router, number in ((one, 1), (one, 2), (two, 7)):
            router.wait_finished(number)
            assert router.outputs[number][-1].error.reason == "WORKER_DRAINING"
            assert len(router.tokens(number)) < 50_000
        gate.open()
        assert server.drain(PATIENCE_S), "nothing runs any more"
        until = time.monotonic() + PATIENCE_S
        while engine.has_work() and time.monotonic() < until:
            time.sleep(0.01)
        assert not engine.has_work(), "they run on though nobody listens"
        engine.cache.check()


def test_close_ends_streams_with_unavailable_and_closes_the_engine() -> None:
    class Closing(SimulatedEngine):
        flushed: float | None = None

        def close(self, *, flush_s: float) -> None:
            self.flushed = flush_s

    engine = Closing(INFO, device_blocks=10, sleep=lambda s: None)
    server = WorkerServer(config(), engine)
    with routers(server.start()) as (router,):
        server.close(flush_s=1.5)
        error = router.wait_ended()
    assert error is not None
    assert error.code() == grpc.StatusCode.UNAVAILABLE
    assert engine.flushed == 1.5
    assert server.wait_closed(0)
    assert server.failure is None
    server.close()


def test_close_does_not_wait_for_a_router_that_reads_nothing() -> None:
    with serving() as (server, address), routers(address) as (router,):
        router.reading.clear()
        router.send(submit=job(INFO.scheme, 1, PROMPT, max_tokens=10_000))
        server.close()
        assert server.wait_closed(0)


class Breaking(SimulatedEngine):
    """Fails in the step after `fuse` was set."""

    def __init__(self, gate: Gate) -> None:
        super().__init__(INFO, device_blocks=100, sleep=gate)
        self.fuse = threading.Event()

    def step(self) -> StepReport:
        if self.fuse.is_set():
            raise RuntimeError("CUDA error: device lost")
        return super().step()


def test_an_engine_that_fails_ends_every_job_with_a_reason_and_then_the_server() -> None:
    gate, failures = Gate(), []
    engine = Breaking(gate)
    server = WorkerServer(config(), engine, on_fatal=failures.append)
    address = server.start()
    with routers(address, 2) as clients:
        for client in clients:
            client.send(submit=job(INFO.scheme, 1, PROMPT, max_tokens=1000))
            client.wait_handled()
        gate.wait_arrived()
        engine.fuse.set()
        gate.open()
        for client in clients:
            error = client.wait_ended()
            assert error is not None
            assert error.code() == grpc.StatusCode.UNAVAILABLE
            assert "device lost" in error.details()
            assert client.outputs[1][-1].finish_reason == common_pb2.FINISH_REASON_ERROR
            assert client.outputs[1][-1].error.reason == "ENGINE_FAILED"
    assert server.wait_closed(PATIENCE_S)
    server.close()
    assert [str(each) for each in failures] == ["CUDA error: device lost"]
    assert server.failure is failures[0]
    late = StreamClient(address)
    late.wait_ended()
    late.drop()
    assert late.messages == []


# TLS.


@dataclass(frozen=True)
class Pair:
    cert: Path
    key: Path


def make_certificate(folder: Path, name: str, issuer: Pair | None = None) -> Pair:
    """A certificate for 127.0.0.1, signed by `issuer` or by itself."""
    key = ec.generate_private_key(ec.SECP256R1())
    subject = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, name)])
    signer, issued_by = key, subject
    if issuer is not None:
        signer = serialization.load_pem_private_key(issuer.key.read_bytes(), None)  # type: ignore[assignment]
        issued_by = x509.load_pem_x509_certificate(issuer.cert.read_bytes()).subject
    now = datetime.datetime.now(datetime.UTC)
    certificate = (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issued_by)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - datetime.timedelta(days=1))
        .not_valid_after(now + datetime.timedelta(days=1))
        .add_extension(x509.BasicConstraints(ca=issuer is None, path_length=None), critical=True)
        .add_extension(x509.SubjectAlternativeName([x509.IPAddress(ipaddress.ip_address("127.0.0.1"))]), critical=False)
        .sign(signer, hashes.SHA256())
    )
    pair = Pair(folder / f"{name}.pem", folder / f"{name}.key")
    pair.cert.write_bytes(certificate.public_bytes(serialization.Encoding.PEM))
    pair.key.write_bytes(
        key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    )
    return pair


def test_with_a_client_ca_only_routers_with_its_certificates_get_in(tmp_path: Path) -> None:
    authority = make_certificate(tmp_path, "authority")
    worker = make_certificate(tmp_path, "worker", authority)
    router = make_certificate(tmp_path, "router", authority)
    stranger = make_certificate(tmp_path, "stranger")
    tls = {"tls_cert": str(worker.cert), "tls_key": str(worker.key), "tls_client_ca": str(authority.cert)}

    def credentials(pair: Pair | None) -> grpc.ChannelCredentials:
        mine = (None, None) if pair is None else (pair.key.read_bytes(), pair.cert.read_bytes())
        return grpc.ssl_channel_credentials(authority.cert.read_bytes(), *mine)

    with serving(**tls) as (_, address):
        with routers(address, credentials=credentials(router)) as (client,):
            assert client.messages[0].hello.worker == "w0"
        for pair in (None, stranger):
            client = StreamClient(address, credentials=credentials(pair))
            error = client.wait_ended()
            client.drop()
            assert error is not None
            assert error.code() == grpc.StatusCode.UNAVAILABLE
        plain = StreamClient(address)
        assert plain.wait_ended() is not None
        plain.drop()


def test_a_second_hello_ends_the_stream() -> None:
    with serving() as (_, address), routers(address) as (router,):
        router.send(hello=worker_pb2.RouterHello(protocol_version=versions.NEWEST))
        error = router.wait_ended()
        assert error is not None
        assert error.code() == grpc.StatusCode.INVALID_ARGUMENT
