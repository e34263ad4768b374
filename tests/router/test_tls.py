"""TLS and mTLS over real handshakes, rotation without a restart, and wrong files named at the start."""

import asyncio
import os
import shutil
from pathlib import Path

import grpc
import pytest
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec

from router.config import TlsFiles
from router.server import RouterServer
from router.tls import TlsFilesError, server_credentials
from tests.router.certificates import Authority
from tests.router.edge import WordRouter, serving
from warmkv.client import AsyncClient, Client, Retry, Tls, WarmkvError

ONCE = Retry(attempts=1)


def client(server: RouterServer, tls: Tls | None) -> AsyncClient:
    return AsyncClient(f"127.0.0.1:{server.grpc_port}", tls=tls, retry=ONCE, timeout=5)


async def says(server: RouterServer, tls: Tls | None) -> str:
    async with client(server, tls) as connection:
        return (await connection.generate("hi").result()).text


@pytest.mark.asyncio
async def test_tls_serves_those_who_trust_its_authority_and_nobody_else(tmp_path: Path) -> None:
    authority, stranger = Authority(tmp_path), Authority(tmp_path, "stranger")
    async with serving(WordRouter(), tls=TlsFiles(*authority.issue("router"))) as server:
        assert await says(server, Tls(ca=authority.path)) == "0 1 2 "
        for wrong in (Tls(ca=stranger.path), None):
            with pytest.raises(WarmkvError) as caught:
                await says(server, wrong)
            assert caught.value.code is grpc.StatusCode.UNAVAILABLE


@pytest.mark.asyncio
async def test_mtls_admits_only_certificates_of_its_authority(tmp_path: Path) -> None:
    authority, stranger = Authority(tmp_path), Authority(tmp_path, "stranger")
    files = TlsFiles(*authority.issue("router"), client_ca=authority.path)
    async with serving(WordRouter(), tls=files) as server:
        cert, key = authority.issue("caller")
        assert await says(server, Tls(ca=authority.path, cert=cert, key=key)) == "0 1 2 "
        cert, key = stranger.issue("intruder")
        for wrong in (Tls(ca=authority.path), Tls(ca=authority.path, cert=cert, key=key)):
            with pytest.raises(WarmkvError):
                await says(server, wrong)


@pytest.mark.asyncio
async def test_a_replaced_certificate_serves_the_next_connection(tmp_path: Path) -> None:
    old, new = Authority(tmp_path, "old"), Authority(tmp_path, "new")
    files = TlsFiles(*old.issue("router"))
    async with serving(WordRouter(), tls=files) as server:
        assert await says(server, Tls(ca=old.path))
        for source, target in zip(new.issue("next"), (files.cert, files.key), strict=True):
            shutil.copy(source, target)
            os.utime(target, (2e9, 2e9))
        assert await says(server, Tls(ca=new.path))
        with pytest.raises(WarmkvError):
            await says(server, Tls(ca=old.path))


@pytest.mark.asyncio
async def test_a_broken_replacement_changes_nothing(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    authority = Authority(tmp_path)
    files = TlsFiles(*authority.issue("router"))
    async with serving(WordRouter(), tls=files) as server:
        _replace(files.cert, "half a certif")
        assert await says(server, Tls(ca=authority.path))
    assert "were not reloaded" in caplog.text


@pytest.mark.asyncio
async def test_the_sync_client_speaks_tls_under_another_name(tmp_path: Path) -> None:
    authority = Authority(tmp_path)
    async with serving(WordRouter(), tls=TlsFiles(*authority.issue("router"))) as server:

        def ask() -> str:
            tls = Tls(ca=authority.path, server_name="localhost")
            with Client(f"127.0.0.1:{server.grpc_port}", tls=tls, timeout=5) as connection:
                return connection.generate("hi").result().text

        assert await asyncio.to_thread(ask) == "0 1 2 "


def _replace(path: str, text: str) -> None:
    Path(path).write_text(text)
    os.utime(path, (2e9, 2e9))


def test_wrong_files_are_named(tmp_path: Path) -> None:
    authority = Authority(tmp_path)
    cert, key = authority.issue("router")
    _, other_key = authority.issue("other")
    empty = tmp_path / "empty.pem"
    empty.write_text("")
    locked = tmp_path / "locked.key"
    locked.write_bytes(
        ec.generate_private_key(ec.SECP256R1()).private_bytes(
            serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.BestAvailableEncryption(b"pw")
        )
    )
    for files, named in [
        (TlsFiles(str(tmp_path / "none.pem"), key), "none.pem"),
        (TlsFiles(cert, other_key), other_key),
        (TlsFiles(str(empty), key), "empty.pem"),
        (TlsFiles(cert, str(locked)), "locked.key"),
        (TlsFiles(cert, key, str(empty)), "empty.pem"),
    ]:
        with pytest.raises(TlsFilesError) as caught:
            server_credentials(files)
        assert named in str(caught.value)
        assert str(caught.value).endswith(".")


def test_a_client_certificate_needs_its_key(tmp_path: Path) -> None:
    cert, _ = Authority(tmp_path).issue("caller")
    with pytest.raises(ValueError, match="both cert and key"):
        AsyncClient(tls=Tls(cert=cert))
