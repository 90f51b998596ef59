"""Sound as one Ogg/Opus stream a direction, 24 kHz mono.

The decoder of `sphn` stops for good at the first damaged page, makes five seconds of sound of an empty packet, and
keeps whatever a stream says of itself. It gets only packets that look like Opus, one by one, in pages made here.
"""

from __future__ import annotations

import numpy as np
import sphn
from numpy.typing import NDArray

from moshivis.audio import SAMPLE_RATE
from moshivis.serve.ogg import PacketReader, PageSplitter, make_page

BIT_RATE = 30_000  # bits a second, about: what sphn's encoder, which cannot be told otherwise, makes of 24 kHz mono
REFUSED_BYTES = 64  # that a refused packet counts for
MAX_SECONDS = 10.0  # of sound that one call of a reader gives; what is beyond it is not even decoded

Samples = NDArray[np.float32]  # [T], -1..1

_SILENCE = np.zeros(0, np.float32)
_HEADERS = (b"OpusHead", b"OpusTags")
_SILK_MS, _HYBRID_MS, _CELT_MS = (10.0, 20.0, 40.0, 60.0), (10.0, 20.0), (2.5, 5.0, 10.0, 20.0)
_MAX_PACKET_MS = 120.0


class OpusReader:
    """Sound out of an Ogg/Opus stream that arrives in pieces of any length, damaged or not. Never raises.

    Nothing is lost but what a damaged page held. The pre-skip stays, as everywhere in this protocol.
    """

    def __init__(self) -> None:
        self.refused = 0  # packets that are not Opus, or came too many at once
        self._pages = PageSplitter()
        self._packets = PacketReader()
        self._start_decoder()

    @property
    def discarded(self) -> int:
        """Bytes that belonged to no packet."""
        return self._pages.discarded + self._packets.discarded

    @property
    def junk(self) -> int:
        """The same, and some for each packet that was refused: also an empty one takes time."""
        return self.discarded + REFUSED_BYTES * self.refused

    def read(self, data: bytes) -> Samples:
        """What can be heard once these bytes are there, [T], at most MAX_SECONDS of it."""
        heard: list[Samples] = []
        seconds = 0.0
        for page in self._pages.feed(data):
            for packet in self._packets.feed(page):
                length = packet_ms(packet) / 1000
                if packet.startswith(_HEADERS):
                    continue
                if length == 0 or seconds + length > MAX_SECONDS:
                    self.refused += 1
                    continue
                heard.append(self._decode(packet))
                seconds += length
        return np.clip(np.concatenate(heard), -1.0, 1.0) if heard else _SILENCE

    def _decode(self, packet: bytes) -> Samples:
        self._sequence += 1
        try:
            return self._decoder.append_bytes(make_page(packet, serial=1, sequence=self._sequence & 0xFFFFFFFF))
        except ValueError:
            self.refused += 1
            self._start_decoder()
            return _SILENCE

    def _start_decoder(self) -> None:
        self._decoder = sphn.OpusStreamReader(SAMPLE_RATE)
        self._sequence = 1  # those of the headers are 0 and 1


def packet_ms(packet: bytes) -> float:
    """How long the sound of an Opus packet is, in milliseconds, by its first bytes; 0 if it is none (RFC 6716, 3)."""
    if not packet:
        return 0.0
    configuration, code = packet[0] >> 3, packet[0] & 3
    if configuration < 12:
        frame = _SILK_MS[configuration & 3]
    elif configuration < 16:
        frame = _HYBRID_MS[configuration & 1]
    else:
        frame = _CELT_MS[configuration & 3]
    if code < 3:
        return frame if code == 0 else 2 * frame
    length = frame * (packet[1] & 63) if len(packet) > 1 else 0.0
    return length if length <= _MAX_PACKET_MS else 0.0


class OpusWriter:
    """Samples to pages of Ogg/Opus, whole ones, each with a packet of 40 ms. The first bytes hold the headers too.

    `sphn` holds the interpreter's lock while it works, so a thread for it would take nothing off the event loop.
    """

    def __init__(self) -> None:
        self._encoder = sphn.OpusStreamWriter(SAMPLE_RATE)

    def write(self, samples: NDArray[np.floating]) -> bytes:
        """What these samples [T] complete: of 1920 two pages at about BIT_RATE."""
        return bytes(self._encoder.append_pcm(np.clip(samples, -1.0, 1.0).astype(np.float32)))
