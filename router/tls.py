"""TLS for the gRPC server: credentials from PEM files that follow the files when they are replaced.

With `client_ca`, callers must present a certificate that it signed (mTLS). Certificates say that a caller may connect;
who it is, its API key says.
"""

from __future__ import annotations

import logging
import ssl
from pathlib import Path

import grpc

from router.config import TlsFiles

log = logging.getLogger(__name__)


class TlsFilesError(ValueError):
    """A PEM file is missing or wrong, or key and certificate do not belong together."""


def server_credentials(files: TlsFiles) -> grpc.ServerCredentials:
    """Credentials that read the files again, at the next handshake, when one of them changed.

    Raises:
        TlsFilesError: a file is missing or wrong; the message names it.
    """
    _check(files)
    source = _Reloading(files)
    return grpc.dynamic_ssl_server_credentials(
        source.configuration, source.changed, require_client_authentication=files.client_ca is not None
    )


class _Reloading:
    """Reads the files when their times changed. Files that became wrong change nothing."""

    def __init__(self, files: TlsFiles) -> None:
        self._files = files
        self._stamp = _stamp(files)
        self.configuration = _configuration(files)

    def changed(self) -> grpc.ServerCertificateConfiguration:
        """The configuration in force now. gRPC calls this at every handshake."""
        try:
            stamp = _stamp(self._files)
            if stamp == self._stamp:
                return self.configuration
            self._stamp = stamp
            _check(self._files)
            self.configuration = _configuration(self._files)
        except (OSError, TlsFilesError) as error:
            log.error("TLS files were not reloaded; those read before stay in force", extra={"problem": str(error)})
            return self.configuration
        log.info("TLS files were reloaded", extra={"cert": self._files.cert})
        return self.configuration


def _configuration(files: TlsFiles) -> grpc.ServerCertificateConfiguration:
    pair = (Path(files.key).read_bytes(), Path(files.cert).read_bytes())
    roots = Path(files.client_ca).read_bytes() if files.client_ca is not None else None
    return grpc.ssl_server_certificate_configuration([pair], root_certificates=roots)


def _stamp(files: TlsFiles) -> tuple[int, ...]:
    paths = [path for path in (files.cert, files.key, files.client_ca) if path is not None]
    return tuple(Path(path).stat().st_mtime_ns for path in paths)


def _check(files: TlsFiles) -> None:
    """Let OpenSSL read the files, since gRPC itself would only fail at every handshake."""
    for path in (files.cert, files.key, files.client_ca):
        if path is not None and not Path(path).is_file():
            raise TlsFilesError(f"{path} is missing. Give the path of a PEM file.")
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    try:
        context.load_cert_chain(files.cert, files.key, password=_no_password)
    except (ssl.SSLError, OSError, ValueError) as error:
        raise TlsFilesError(
            f"{files.cert} and {files.key} are no PEM certificate and its unencrypted key ({error}). Correct them."
        ) from error
    if files.client_ca is not None:
        try:
            context.load_verify_locations(files.client_ca)
        except (ssl.SSLError, OSError) as error:
            raise TlsFilesError(f"{files.client_ca} holds no PEM certificate ({error}). Correct it.") from error


def _no_password() -> str:
    """Answers in place of the terminal, which OpenSSL would ask for an encrypted key's password."""
    raise ValueError("the key is encrypted")
