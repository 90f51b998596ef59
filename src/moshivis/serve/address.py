"""Where a server listens, and how people reach it: sockets bound before anything slow begins, the address to open."""

from __future__ import annotations

import errno
import ipaddress
import socket

from moshivis.errors import InputError, MoshivisError

ANY = ("", "0.0.0.0", "::")


def bind(host: str, port: int) -> list[socket.socket]:
    """Sockets bound to a host and a port, not listening yet: callers are refused until the server is up.

    Port 0 takes a free one. A name may have several addresses, as localhost mostly has.
    Raises InputError for an unknown host or a port out of range, MoshivisError if the port cannot be had.
    """
    if not 0 <= port <= 65535:
        raise InputError(f"a port is a number from 0 to 65535, not {port}")
    try:
        found = socket.getaddrinfo(host or None, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    except (OSError, UnicodeError) as error:
        raise InputError(f"the host {host!r} is not known here: {error}; try localhost, or 0.0.0.0 for all") from error
    sockets: list[socket.socket] = []
    try:
        for family, place in dict.fromkeys((family, address) for family, *_, address in found):
            if sockets and port == 0:
                place = (place[0], sockets[0].getsockname()[1], *place[2:])
            try:
                sockets.append(_bound(family, place))
            except OSError as error:
                if sockets and error.errno in (errno.EADDRNOTAVAIL, errno.EAFNOSUPPORT):
                    continue  # many machines name an IPv6 address for localhost and have none
                raise _sentence(error, host, port) from error
    except MoshivisError:
        for bound in sockets:
            bound.close()
        raise
    return sockets


def _bound(family: socket.AddressFamily, place: tuple[object, ...]) -> socket.socket:
    bound = socket.socket(family, socket.SOCK_STREAM)
    try:
        # Elsewhere, not to wait for the last server's connections; on Windows it would share the port with others.
        bound.setsockopt(socket.SOL_SOCKET, getattr(socket, "SO_EXCLUSIVEADDRUSE", socket.SO_REUSEADDR), 1)
        if family == socket.AF_INET6:
            bound.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
        bound.bind(place)
        bound.set_inheritable(False)
        bound.setblocking(False)
    except OSError:
        bound.close()
        raise
    return bound


def _sentence(error: OSError, host: str, port: int) -> MoshivisError:
    where = f"port {port} on {host or 'all addresses'}"
    if error.errno == errno.EADDRINUSE:
        return MoshivisError(f"{where} is taken by another program; end it, or choose another one with --port")
    if error.errno == errno.EACCES:
        return MoshivisError(f"{where} may not be used by this user; choose one from 1024 on with --port")
    if error.errno == errno.EADDRNOTAVAIL:
        return MoshivisError(
            f"{host} is no address of this machine; try localhost, or 0.0.0.0 for all of its addresses"
        )
    return MoshivisError(f"{where} cannot be used: {error.strerror or error}")


def is_local(host: str) -> bool:
    """Whether only this machine reaches a server on this host."""
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return host.lower() == "localhost" or host.lower().endswith(".localhost")


def shown_host(host: str) -> str:
    """What to write into a browser for a server on `host`: for one on all addresses, this machine's own."""
    return own_address(host) if host in ANY else host


def own_address(host: str) -> str:
    """The address by which this machine goes out, of the kind that a server on `host`, one of ANY, answers to; what
    the machine calls itself if it has none. Nothing is sent to find out."""
    # Both addresses are reserved for documentation.
    family, elsewhere = (socket.AF_INET6, "2001:db8::1") if host == "::" else (socket.AF_INET, "192.0.2.1")
    try:
        with socket.socket(family, socket.SOCK_DGRAM) as probe:
            probe.connect((elsewhere, 9))
            return str(probe.getsockname()[0])
    except OSError:
        return "::1" if host == "::" else socket.gethostname()


def url(host: str, port: int, *, tls: bool, token: str | None = None) -> str:
    """The address to open, with the token in it."""
    shown = shown_host(host)
    if ":" in shown:
        shown = f"[{shown.strip('[]')}]"
    scheme, usual = ("https", 443) if tls else ("http", 80)
    place = shown if port == usual else f"{shown}:{port}"
    return f"{scheme}://{place}/" + (f"?token={token}" if token else "")
