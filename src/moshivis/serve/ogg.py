"""Ogg from a stranger: pages out of any bytes, packets out of pages; bounded memory, linear time (RFC 3533).

A page counts when all of it is there and its checksum is right; whatever else comes is thrown away. Where pages would
overlap, the one that ends first counts, so how the bytes were cut into messages makes no difference, and a page that
broke off holds up none that follows.
"""

from __future__ import annotations

import re
import struct
import zlib
from collections.abc import Iterator
from dataclasses import dataclass

HEADER = 27  # bytes, before the table of segments
MAX_PAGE = HEADER + 255 + 255 * 255
MAX_PACKET = 255 * 255 - 1  # bytes, that one page can hold; those of Opus have 61 kB at most, and usually some hundred

_MAGIC = b"OggS\0"  # with the version
_BEGINNING = re.compile(_MAGIC + rb"[\0-\7]")  # and the flags
_CONTINUED = 1  # flag: the page begins inside a packet
_MAX_CANDIDATES = 4  # beginnings of pages that are waited for at once
_MIRRORED = bytes(int(f"{byte:08b}"[::-1], 2) for byte in range(256))


def checksum(page: bytes) -> int:
    """The checksum of a page's bytes, its own field being taken as 0.

    Ogg's polynomial is that of zip files, with the bits the other way round and nothing inverted.
    """
    mirrored = (page[:22] + b"\0\0\0\0" + page[26:]).translate(_MIRRORED)
    value = zlib.crc32(mirrored, 0xFFFFFFFF) ^ 0xFFFFFFFF
    return int(f"{value:032b}"[::-1], 2)


def make_page(packet: bytes, *, serial: int, sequence: int, flags: int = 0) -> bytes:
    """A page that holds one whole packet of MAX_PACKET bytes at most."""
    table = b"\xff" * (len(packet) // 255) + bytes([len(packet) % 255])
    head = _MAGIC + struct.pack("<BqIIIB", flags, 0, serial, sequence, 0, len(table))
    page = head + table + packet
    return page[:22] + struct.pack("<I", checksum(page)) + page[26:]


class PageSplitter:
    """Bytes in, whole pages out. Holds less than two pages whatever comes."""

    def __init__(self) -> None:
        self.discarded = 0  # bytes that belonged to no page
        self._buffer = bytearray()
        self._candidates: list[_Candidate] = []  # in the order of their beginnings
        self._searched = 0  # what begins in the buffer before here is a candidate, or none

    def feed(self, data: bytes) -> Iterator[bytes]:
        """The pages that these bytes complete. To be exhausted before the next call."""
        for start in range(0, len(data), MAX_PAGE):
            self._buffer += data[start : start + MAX_PAGE]
            yield from self._pages()

    def _pages(self) -> Iterator[bytes]:
        while True:
            found = _BEGINNING.search(self._buffer, self._searched)
            # in the order in which single bytes would make both known, or the cut of messages would make a difference
            page = self._first_complete(before=found.end() - 1 if found else len(self._buffer))
            if page is not None:
                yield page
            elif found:
                self._candidates = [*self._candidates, _Candidate(found.start())][-_MAX_CANDIDATES:]
                self._searched = found.start() + 1
            else:
                break
        self._searched = max(self._searched, len(self._buffer) - len(_MAGIC))  # the flags may not be there yet
        self._discard(self._candidates[0].begin if self._candidates else self._searched)

    def _first_complete(self, *, before: int) -> bytes | None:
        """Of the candidates that end at or before a place, the good page that ends first. It leaves the buffer."""
        ends = [(end, candidate) for candidate in self._candidates if (end := candidate.find_end(self._buffer))]
        for end, candidate in sorted((end, candidate) for end, candidate in ends if end <= before):
            page = bytes(self._buffer[candidate.begin : end])
            if checksum(page) == int.from_bytes(page[22:26], "little"):
                self._discard(candidate.begin)
                self._cut(len(page))
                return page
            self._candidates.remove(candidate)
        return None

    def _discard(self, count: int) -> None:
        self.discarded += count
        self._cut(count)

    def _cut(self, count: int) -> None:
        """Take bytes from the front of the buffer."""
        if count:
            del self._buffer[:count]
            self._searched = max(self._searched - count, 0)
            self._candidates = [left.moved(count) for left in self._candidates if left.begin >= count]


@dataclass(order=True)
class _Candidate:
    """Where in the buffer a page may begin."""

    begin: int
    end: int = 0  # 0 = not known yet: the header is not complete

    def find_end(self, buffer: bytearray) -> int:
        table = self.begin + HEADER
        if self.end == 0 and table <= len(buffer):
            segments = buffer[table : table + buffer[table - 1]]
            if len(segments) == buffer[table - 1]:
                self.end = table + len(segments) + sum(segments)
        return self.end

    def moved(self, count: int) -> _Candidate:
        return _Candidate(self.begin - count, self.end - count if self.end else 0)


@dataclass
class PacketReader:
    """Pages in, whole packets out. A packet of which a page is missing, or that is too large, is thrown away."""

    discarded: int = 0  # bytes
    _serial: int = -1
    _sequence: int = -1
    _begun: bytes | None = None  # of a packet that goes on in the next page

    def feed(self, page: bytes) -> list[bytes]:
        """The packets that end in this page, which must be a whole one."""
        continued = bool(page[5] & _CONTINUED)
        packets, rest = _split(page)
        begun = self._begun if self._follows(page) and continued else None
        if begun is None:
            self._throw_away(self._begun)
        if continued:
            if packets:
                first = packets.pop(0)
                if begun is None or len(begun) + len(first) > MAX_PACKET:
                    self._throw_away((begun or b"") + first)
                else:
                    packets.insert(0, begun + first)
            elif begun is None:
                self._throw_away(rest)
                rest = b""
            else:
                rest = begun + rest
        if len(rest) > MAX_PACKET:
            self._throw_away(rest)
            rest = b""
        self._begun = rest or None
        return packets

    def _follows(self, page: bytes) -> bool:
        before = self._serial, (self._sequence + 1) & 0xFFFFFFFF
        self._serial, self._sequence = struct.unpack_from("<II", page, 14)
        return before == (self._serial, self._sequence)

    def _throw_away(self, part: bytes | None) -> None:
        self.discarded += len(part or b"")


def _split(page: bytes) -> tuple[list[bytes], bytes]:
    """The pieces of a page that end a packet, and what follows the last of them."""
    pieces = []
    begin = end = HEADER + page[26]
    for segment in page[HEADER:begin]:
        end += segment
        if segment < 255:
            pieces.append(page[begin:end])
            begin = end
    return pieces, page[begin:end]
