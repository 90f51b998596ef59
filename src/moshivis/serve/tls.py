"""Certificates: files that somebody gives, or a self-signed one that is made on request and kept."""

from __future__ import annotations

import datetime
import ipaddress
import os
import socket
import ssl
import tempfile
from dataclasses import dataclass
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from moshivis.errors import InputError
from moshivis.serve.address import ANY, own_address

DAYS = 365
RENEW_DAYS = 14  # before the end a new one is made
CERTIFICATE, KEY = "certificate.pem", "key.pem"
_SUBJECT = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "moshivis (self-signed)")])  # by it we know our own


@dataclass(frozen=True, kw_only=True)
class Certificate:
    """Files in PEM form that fit each other."""

    cert: Path
    key: Path


def given(cert: str | os.PathLike[str], key: str | os.PathLike[str]) -> Certificate:
    """Files that somebody gives, checked. Raises InputError that says what is wrong with them."""
    for path, noun in ((Path(cert), "certificate"), (Path(key), "key")):
        try:
            with path.open("rb") as file:
                file.read(1)
        except OSError as error:
            raise InputError(f"the {noun} {path} cannot be read: {error.strerror or error}") from error
    try:
        _load(Path(cert), Path(key))
    except _EncryptedKey as error:
        raise InputError(f"the key {key} is protected by a password; give one that is not") from error
    except ssl.SSLError as error:
        if error.reason == "KEY_VALUES_MISMATCH":
            raise InputError(f"the key {key} does not belong to the certificate {cert}") from error
        raise InputError(f"{cert} and {key} are not a certificate and its key in PEM form") from error
    end = _read(Path(cert)).not_valid_after_utc
    if end < _now():
        raise InputError(f"the certificate {cert} was valid until {end:%Y-%m-%d} only; renew it")
    return Certificate(cert=Path(cert), key=Path(key))


def self_signed(folder: str | os.PathLike[str] | None, host: str) -> Certificate:
    """A certificate in `folder` (None: a place of the user's) for localhost, this machine and `host`; made if there is
    none that still holds. Browsers warn of it until somebody tells them to trust it.

    Raises InputError if the folder cannot be written, or holds a certificate that is not ours.
    """
    place = _usual_folder() if folder is None else Path(folder)
    found = Certificate(cert=place / CERTIFICATE, key=place / KEY)
    names = _names(host)
    if _holds(found, names):
        return found
    if _is_anothers(found):
        raise InputError(f"{found.cert} was not made by moshivis; name another folder, or serve it with --tls")
    key = ec.generate_private_key(ec.SECP256R1())
    try:
        place.mkdir(parents=True, exist_ok=True, mode=0o700)
        _write(found.key, _key_bytes(key))
        _write(found.cert, _sign(key, names).public_bytes(serialization.Encoding.PEM))
    except OSError as error:
        raise InputError(f"the certificate cannot be written to {place}: {error.strerror or error}") from error
    return found


def _usual_folder() -> Path:
    configured = os.environ.get("XDG_CONFIG_HOME")
    return (Path(configured) if configured else Path.home() / ".config") / "moshivis" / "tls"


def _names(host: str) -> list[str]:
    """What people may call the server, each once, as certificates write it. Raises InputError if that cannot be done
    for `host`; a name of this machine's own is left out then."""
    names = ["localhost", "127.0.0.1", "::1"]
    asked = own_address(host) if host in ANY else host.strip("[]")
    for name in (asked, socket.gethostname()):
        try:
            names.append(name.lower().encode("idna").decode())
        except UnicodeError as error:
            if name == host.strip("[]"):
                raise InputError(f"a certificate cannot name the host {host!r}: {error}") from error
    return list(dict.fromkeys(names))


def _holds(certificate: Certificate, names: list[str]) -> bool:
    try:
        _load(certificate.cert, certificate.key)
        read = _read(certificate.cert)
        alternatives = read.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    except (OSError, ValueError, _EncryptedKey, x509.ExtensionNotFound):  # missing, damaged, or of two makings
        return False
    held = {str(name.value) for name in alternatives}
    return read.not_valid_after_utc - _now() > datetime.timedelta(days=RENEW_DAYS) and held >= set(names)


def _is_anothers(certificate: Certificate) -> bool:
    try:
        return _read(certificate.cert).subject != _SUBJECT
    except (OSError, ValueError):  # there is none that anybody could use
        return False


def _sign(key: ec.EllipticCurvePrivateKey, names: list[str]) -> x509.Certificate:
    public = key.public_key()
    identifier = x509.SubjectKeyIdentifier.from_public_key(public)
    builder = (
        x509.CertificateBuilder()
        .subject_name(_SUBJECT)
        .issuer_name(_SUBJECT)
        .public_key(public)
        .serial_number(x509.random_serial_number())
        .not_valid_before(_now() - datetime.timedelta(hours=1))  # clocks differ
        .not_valid_after(_now() + datetime.timedelta(days=DAYS))
        .add_extension(x509.SubjectAlternativeName([_general_name(name) for name in names]), critical=False)
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .add_extension(x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH]), critical=False)
        .add_extension(identifier, critical=False)
        .add_extension(
            x509.AuthorityKeyIdentifier.from_issuer_subject_key_identifier(identifier),
            critical=False,
        )
    )
    return builder.sign(key, hashes.SHA256())


def _general_name(name: str) -> x509.GeneralName:
    try:
        return x509.IPAddress(ipaddress.ip_address(name))
    except ValueError:
        return x509.DNSName(name)


def _key_bytes(key: ec.EllipticCurvePrivateKey) -> bytes:
    return key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )


def _write(path: Path, content: bytes) -> None:
    """Whole or not at all, and readable by its owner alone from the first moment on."""
    handle, name = tempfile.mkstemp(prefix=f".{path.stem}-", dir=path.parent)  # with mode 0600
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(handle)
        os.replace(name, path)
    finally:
        Path(name).unlink(missing_ok=True)


class _EncryptedKey(Exception):
    pass


def _load(cert: Path, key: Path) -> None:
    def no_password() -> str:
        raise _EncryptedKey

    ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER).load_cert_chain(cert, key, no_password)


def _read(cert: Path) -> x509.Certificate:
    return x509.load_pem_x509_certificate(cert.read_bytes())


def _now() -> datetime.datetime:
    return datetime.datetime.now(datetime.UTC)
