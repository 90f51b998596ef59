"""Certificates and addresses: made, kept, checked, and reached over real sockets."""

from __future__ import annotations

import datetime
import shutil
import socket
import ssl
import stat
import threading
from pathlib import Path
from urllib.parse import urlsplit

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

from moshivis.errors import InputError, MoshivisError
from moshivis.serve.address import bind, is_local, url
from moshivis.serve.tls import Certificate, given, self_signed

STRICT = 0x20 | 0x80000  # VERIFY_X509_STRICT and PARTIAL_CHAIN: what Python 3.13 asks for by itself


def shake_hands(certificate: Certificate, name: str) -> None:
    """A TLS connection whose client trusts this very certificate and asks for `name`."""
    server = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    server.load_cert_chain(certificate.cert, certificate.key)
    client = ssl.create_default_context(cafile=str(certificate.cert))
    client.verify_flags |= ssl.VerifyFlags(STRICT)
    ours, theirs = socket.socketpair()

    def answer() -> None:
        with server.wrap_socket(theirs, server_side=True) as wrapped:
            wrapped.sendall(b"hello")

    thread = threading.Thread(target=answer)
    thread.start()
    try:
        with client.wrap_socket(ours, server_hostname=name) as wrapped:
            assert wrapped.recv(5) == b"hello"
    finally:
        ours.close()
        thread.join()


def test_a_self_signed_certificate_is_made_once_and_trusted_by_who_has_it(tmp_path: Path) -> None:
    made = self_signed(tmp_path / "new", "voice.example")
    before = made.cert.read_bytes(), made.key.read_bytes()
    for path in (made.cert, made.key):
        assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert sorted(path.name for path in made.cert.parent.iterdir()) == ["certificate.pem", "key.pem"]
    for name in ("localhost", "127.0.0.1", "::1", "voice.example", socket.gethostname()):
        shake_hands(made, name)
    with pytest.raises(ValueError, match="does not match|mismatch|not valid for"):
        _refused(made, "other.example")
    assert self_signed(tmp_path / "new", "voice.example") == made
    assert (made.cert.read_bytes(), made.key.read_bytes()) == before
    assert given(made.cert, made.key) == made


def test_names_are_written_as_certificates_have_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("socket.gethostname", lambda: "Büro")
    made = self_signed(tmp_path, "bücher.example")
    for name in ("bücher.example", "xn--bcher-kva.example", "büro"):
        shake_hands(made, name)
    before = made.cert.read_bytes()
    assert self_signed(tmp_path, "Bücher.example") == made and made.cert.read_bytes() == before


def test_names_that_no_certificate_can_have(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("socket.gethostname", lambda: "x" * 64)  # longer than a part of a name may be
    for host in ("localhost", "0.0.0.0"):
        shake_hands(self_signed(tmp_path, host), "localhost")
    for host in ("x" * 64, "ü" * 64, "a..b"):
        with pytest.raises(InputError, match="a certificate cannot name the host"):
            self_signed(tmp_path, host)


def _refused(certificate: Certificate, name: str) -> None:
    context = ssl.create_default_context(cafile=str(certificate.cert))
    server = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    server.load_cert_chain(certificate.cert, certificate.key)
    to_client, to_server = ssl.MemoryBIO(), ssl.MemoryBIO()
    client = context.wrap_bio(to_client, to_server, server_hostname=name)
    other = server.wrap_bio(to_server, to_client, server_side=True)
    for _ in range(4):
        for side in (client, other):
            try:
                side.do_handshake()
            except ssl.SSLWantReadError:
                pass
            except ssl.SSLCertVerificationError as error:
                raise ValueError(error.verify_message) from error


def test_a_certificate_is_made_anew_for_another_name_or_when_it_ends_or_is_damaged(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = self_signed(tmp_path, "one.example")
    first = made.cert.read_bytes()
    self_signed(tmp_path, "two.example")
    assert made.cert.read_bytes() != first
    shake_hands(made, "two.example")
    made.key.write_bytes(b"damaged")
    self_signed(tmp_path, "two.example")
    shake_hands(made, "two.example")
    first = made.cert.read_bytes()
    monkeypatch.setattr("moshivis.serve.tls.RENEW_DAYS", 400)
    self_signed(tmp_path, "two.example")
    assert made.cert.read_bytes() != first
    shake_hands(made, "two.example")


@pytest.mark.parametrize("names", [True, False])
def test_a_certificate_of_somebody_elses_is_never_replaced(tmp_path: Path, names: bool) -> None:
    made = write(tmp_path, days=5, names=names)
    before = made.cert.read_bytes(), made.key.read_bytes()
    with pytest.raises(InputError, match=r"certificate.pem was not made by moshivis.*--tls"):
        self_signed(tmp_path, "three.example")
    assert (made.cert.read_bytes(), made.key.read_bytes()) == before


def test_where_nothing_can_be_written_is_said(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("not a folder")
    with pytest.raises(InputError, match="file/tls.*Not a directory"):
        self_signed(tmp_path / "file" / "tls", "localhost")


def write(folder: Path, *, days: int = 100, password: bytes | None = None, names: bool = True) -> Certificate:
    """A certificate of somebody else's making."""
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "two.example")])
    called = ["localhost", "127.0.0.1", "::1", "two.example", socket.gethostname().lower()]
    end = datetime.datetime.now(datetime.UTC) + datetime.timedelta(days=days)
    builder = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(5)
        .not_valid_before(end - datetime.timedelta(days=1000))
        .not_valid_after(end)
    )
    if names:
        alternatives = x509.SubjectAlternativeName([x509.DNSName(each) for each in called])
        builder = builder.add_extension(alternatives, critical=False)
    cert = builder.sign(key, hashes.SHA256())
    hidden = serialization.BestAvailableEncryption(password) if password else serialization.NoEncryption()
    made = Certificate(cert=folder / "certificate.pem", key=folder / "key.pem")
    made.cert.write_bytes(cert.public_bytes(serialization.Encoding.PEM))
    made.key.write_bytes(key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, hidden))
    return made


def test_given_files_are_checked(tmp_path: Path) -> None:
    for name in ("one", "two", "old", "secret"):
        (tmp_path / name).mkdir()
    one, two = write(tmp_path / "one"), write(tmp_path / "two")
    old, secret = write(tmp_path / "old", days=-1), write(tmp_path / "secret", password=b"x")
    words = tmp_path / "words.pem"
    words.write_text("neither")
    assert given(one.cert, one.key) == one
    for cert, key, sentence in (
        (tmp_path / "none.pem", one.key, "the certificate .*none.pem cannot be read: No such file"),
        (one.cert, tmp_path, "the key .* cannot be read: Is a directory"),
        (one.cert, two.key, "does not belong to the certificate"),
        (words, words, "not a certificate and its key"),
        (one.key, one.cert, "not a certificate and its key"),
        (secret.cert, secret.key, "protected by a password"),
        (old.cert, old.key, "was valid until"),
    ):
        with pytest.raises(InputError, match=sentence):
            given(cert, key)
    both = tmp_path / "both.pem"
    shutil.copyfile(one.cert, both)
    with both.open("ab") as file:
        file.write(one.key.read_bytes())
    given(both, both)


# addresses ------------------------------------------------------------------------------------------------------------


def test_a_bound_port_is_taken_and_refuses_callers() -> None:
    sockets = bind("localhost", 0)
    port = sockets[0].getsockname()[1]
    try:
        assert {bound.getsockname()[1] for bound in sockets} == {port}
        with pytest.raises(ConnectionRefusedError):
            socket.create_connection(("127.0.0.1", port), timeout=5)
        sockets[0].listen()
        with pytest.raises(MoshivisError, match=f"port {port} on 127.0.0.1 is taken by another program"):
            bind("127.0.0.1", port)
    finally:
        for bound in sockets:
            bound.close()


@pytest.mark.parametrize(
    "host, port, sentence",
    [
        ("localhost", 70000, "from 0 to 65535"),
        ("no.such.host.invalid", 0, "is not known here"),
        ("192.0.2.7", 0, "no address of this machine"),
    ],
)
def test_where_no_server_can_be(host: str, port: int, sentence: str) -> None:
    with pytest.raises(MoshivisError, match=sentence):
        bind(host, port)


def test_the_address_to_open() -> None:
    assert url("localhost", 8998, tls=False) == "http://localhost:8998/"
    assert url("::1", 8998, tls=True, token="abc") == "https://[::1]:8998/?token=abc"
    assert url("example.org", 443, tls=True) == "https://example.org/"
    assert "0.0.0.0" not in url("0.0.0.0", 8998, tls=False)
    assert all(map(is_local, ("localhost", "127.0.0.1", "127.3.2.1", "::1")))
    assert not any(map(is_local, ("0.0.0.0", "::", "", "192.168.1.5", "example.org")))


@pytest.mark.parametrize("routed", [True, False], ids=["routed", "no way out"])
def test_the_address_to_open_answers(routed: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A server on all IPv6 addresses answers to no IPv4 one."""
    try:
        (server,) = bind("::", 0)
    except MoshivisError:
        pytest.skip("there is no IPv6 here")
    with server:
        server.listen()
        if not routed:
            monkeypatch.setattr(socket.socket, "connect", unreachable)
        opened = urlsplit(url("::", server.getsockname()[1], tls=True))
        certificate = self_signed(tmp_path, "::")
        monkeypatch.undo()
        socket.create_connection((opened.hostname, opened.port), timeout=5).close()
        shake_hands(certificate, opened.hostname or "")


def unreachable(probe: socket.socket, place: object) -> None:
    raise OSError("network is unreachable")
