"""Where a server is, as people write it: the address that `moshivis serve` prints, a host and a port, or less."""

from __future__ import annotations

from dataclasses import dataclass
from urllib.parse import parse_qs, urlencode, urlsplit

from moshivis.errors import InputError

PORT = 8998  # of `moshivis serve`
PATH = "/api/chat"
_TLS = {"http": False, "ws": False, "https": True, "wss": True}


@dataclass(frozen=True, kw_only=True)
class Address:
    """A server's `/api/chat`."""

    host: str
    port: int
    tls: bool
    path: str
    token: str | None = None  # that stood in the address

    @property
    def place(self) -> str:
        """Host and port, for messages."""
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"{host}:{self.port}"

    def url(self, **query: object) -> str:
        """To be opened as a WebSocket. Of the query, what is None is left out."""
        given = {name: str(value) for name, value in query.items() if value is not None}
        scheme = "wss" if self.tls else "ws"
        return f"{scheme}://{self.place}{self.path}" + (f"?{urlencode(given)}" if given else "")


def read_address(text: str) -> Address:
    """Raises InputError for what is no address of a server."""
    try:
        parts = urlsplit(text if "://" in text else f"http://{text}")
        host, port = parts.hostname, parts.port
    except ValueError as error:
        raise InputError(f"{text!r} is no address: {error}; write it like http://localhost:{PORT}") from None
    if parts.scheme not in _TLS or not host or any(char.isspace() for char in text):
        raise InputError(f"{text!r} is no address of a server; write it like http://localhost:{PORT}")
    tls = _TLS[parts.scheme]
    if port is None:
        port = (443 if tls else 80) if "://" in text else PORT
    path = parts.path.rstrip("/")
    return Address(
        host=host,
        port=port,
        tls=tls,
        path=path if path.endswith(PATH) else path + PATH,
        token=parse_qs(parts.query).get("token", [None])[0],
    )
