"""Sound on the wire: however a stream is cut, damaged or meant, what is good in it is heard."""

from __future__ import annotations

import struct
import tracemalloc

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from moshivis.serve.ogg import HEADER, MAX_PACKET, MAX_PAGE, PacketReader, PageSplitter, checksum, make_page
from moshivis.serve.opus import BIT_RATE, MAX_SECONDS, OpusReader, OpusWriter, packet_ms

sphn = pytest.importorskip("sphn")
Audio = NDArray[np.float32]
FRAME = 1920
slow = settings(max_examples=60, deadline=None)


def speech_like(seconds: float) -> Audio:
    """A voice's harmonics whose pitch and loudness wander, which no two frames share."""
    time = np.arange(round(seconds * 24000)) / 24000
    pitch = 120 + 30 * np.sin(2 * np.pi * 0.7 * time)
    phase = 2 * np.pi * np.cumsum(pitch) / 24000
    voice = sum(np.sin(phase * n) / n for n in range(1, 12)) * (0.6 + 0.4 * np.sin(2 * np.pi * 3 * time))
    return (0.15 * voice).astype(np.float32)


def encode(audio: Audio) -> list[bytes]:
    """One message every 80 ms."""
    writer = OpusWriter()
    return [writer.write(audio[start : start + FRAME]) for start in range(0, len(audio), FRAME)]


def pages_of(stream: bytes) -> list[bytes]:
    """By the lengths that an undamaged stream states."""
    pages = []
    while stream:
        segments = stream[26]
        length = HEADER + segments + sum(stream[HEADER : HEADER + segments])
        pages.append(stream[:length])
        stream = stream[length:]
    return pages


def cut(stream: bytes, lengths: list[int]) -> list[bytes]:
    pieces = []
    for length in lengths:
        pieces.append(stream[:length])
        stream = stream[length:]
    return [*pieces, stream]


def hear(reader: OpusReader, pieces: list[bytes]) -> Audio:
    return np.concatenate([reader.read(piece) for piece in pieces])


AUDIO = speech_like(2.0)
MESSAGES = encode(AUDIO)
STREAM = b"".join(MESSAGES)
PAGES = pages_of(STREAM)
HEARD = hear(OpusReader(), MESSAGES)

junk = st.one_of(
    st.binary(max_size=400),
    st.sampled_from(PAGES).flatmap(lambda page: st.integers(1, len(page) - 1).map(lambda length: page[:length])),
    st.binary(max_size=60).map(lambda rest: b"OggS\0\0" + rest),
    st.just(b"OggS\0\0" * 30),
    st.just(b"OggS\0\0" + bytes(20) + b"\xff" * 256),  # claims 65,025 bytes
)
lengths = st.lists(st.integers(0, 700), max_size=60)


# towards the client ---------------------------------------------------------------------------------------------------


def test_a_message_holds_whole_pages_of_80_ms() -> None:
    for number, message in enumerate(MESSAGES):
        pages = pages_of(message)
        assert len(pages) == (4 if number == 0 else 2)
        assert all(page[:4] == b"OggS" and checksum(page) == struct.unpack_from("<I", page, 22)[0] for page in pages)
    assert b"OpusHead" in PAGES[0] and b"OpusTags" in PAGES[1]
    assert [struct.unpack_from("<I", page, 18)[0] for page in PAGES] == list(range(len(PAGES)))
    granules = [struct.unpack_from("<q", page, 6)[0] for page in PAGES[2:]]
    assert np.diff(granules).tolist() == [1920] * (len(granules) - 1)  # 40 ms at 48 kHz


def test_the_bit_rate_is_the_stated_one() -> None:
    long = encode(speech_like(20.0))
    bits = 8 * sum(map(len, long[1:])) / ((len(long) - 1) * 0.08)
    assert BIT_RATE / 1.4 < bits < BIT_RATE * 1.4


def test_frames_of_any_length_make_the_same_stream() -> None:
    writer = OpusWriter()
    parts = np.split(AUDIO, np.sort(np.random.default_rng(0).integers(0, len(AUDIO), 90)))
    assert b"".join(writer.write(part) for part in parts) == STREAM


def test_loud_samples_are_clipped() -> None:
    reader = OpusReader()
    loud = reader.read(b"".join(encode(AUDIO * 1000)))
    assert np.abs(loud).max() == 1 and len(loud) == len(AUDIO)


# from the client: undamaged -------------------------------------------------------------------------------------------


def test_what_was_said_is_heard() -> None:
    assert len(HEARD) == len(AUDIO)
    lag = int(np.argmax([np.dot(AUDIO[: -shift or None], HEARD[shift:]) for shift in range(400)]))
    said, heard = AUDIO[4800 : 38400 - lag], HEARD[4800 + lag : 38400]
    assert np.corrcoef(said, heard)[0, 1] > 0.7 and np.abs(heard).max() > 0.2


@slow
@given(lengths)
def test_chunking_changes_nothing(lengths: list[int]) -> None:
    reader = OpusReader()
    np.testing.assert_array_equal(hear(reader, cut(STREAM, lengths)), HEARD)
    assert reader.junk == 0


def test_byte_by_byte() -> None:
    short = STREAM[: sum(map(len, MESSAGES[:6]))]
    heard = hear(OpusReader(), [short[i : i + 1] for i in range(len(short))])
    np.testing.assert_array_equal(heard, HEARD[: 6 * FRAME])


def test_a_sound_is_heard_as_soon_as_its_page_is_there() -> None:
    reader = OpusReader()
    assert [len(reader.read(page)) for page in PAGES] == [0, 0] + [960] * (len(PAGES) - 2)


def test_headers_may_be_missing_and_may_come_again() -> None:
    np.testing.assert_array_equal(OpusReader().read(b"".join(PAGES[2:])), HEARD)
    reader = OpusReader()
    reader.read(STREAM)
    assert len(reader.read(STREAM)) == len(HEARD)
    assert reader.junk == 0


def test_several_packets_in_a_page() -> None:
    """As other encoders lay them out."""
    packets = [page[HEADER + page[26] :] for page in PAGES[2:22]]
    table = b"".join(b"\xff" * (len(packet) // 255) + bytes([len(packet) % 255]) for packet in packets)
    page = make_page(b"", serial=3, sequence=2)[:26] + bytes([len(table)]) + table + b"".join(packets)
    np.testing.assert_array_equal(OpusReader().read(reseal(page)), HEARD[: 20 * 960])


def test_a_packet_over_several_pages() -> None:
    packet = bytes(i % 251 for i in range(1000))
    parts = [
        _page(packet[:510], [255, 255], sequence=7),
        _page(packet[510:765], [255], sequence=8, flags=1),
        _page(packet[765:] + b"next", [235, 4], sequence=9, flags=1),
    ]
    reader = PacketReader()
    assert [reader.feed(part) for part in parts] == [[], [], [packet, b"next"]] and reader.discarded == 0
    for lost, found in enumerate([[b"next"], [b"next"], []]):
        reader = PacketReader()
        kept = [part for number, part in enumerate(parts) if number != lost]
        assert [packet for part in kept for packet in reader.feed(part)] == found
        assert reader.feed(_page(b"later", [5], sequence=10)) == [b"later"]
        assert reader.discarded == (1000 - (510, 255, 235)[lost])


def _page(content: bytes, table: list[int], *, sequence: int, flags: int = 0) -> bytes:
    head = make_page(b"", serial=3, sequence=sequence, flags=flags)[:26]
    return reseal(head + bytes([len(table), *table]) + content)


def reseal(page: bytes) -> bytes:
    """With the right checksum."""
    return page[:22] + struct.pack("<I", checksum(page)) + page[26:]


# from the client: damaged ---------------------------------------------------------------------------------------------


@slow
@given(st.lists(st.tuples(st.integers(0, len(PAGES)), junk), max_size=12), lengths)
def test_junk_between_pages_costs_nothing_but_itself(inserted: list[tuple[int, bytes]], lengths: list[int]) -> None:
    parts, size = list(PAGES), 0
    for place, rubbish in sorted(inserted, key=lambda item: -item[0]):
        parts.insert(place, rubbish)
        size += len(rubbish)
    damaged = b"".join(parts)
    reader = OpusReader()
    np.testing.assert_array_equal(hear(reader, cut(damaged, lengths)), HEARD)
    pending = size - reader.discarded
    assert 0 <= pending <= size
    assert reader.refused == 0


@slow
@given(st.lists(st.integers(2, len(PAGES) - 1), min_size=1, max_size=8, unique=True), st.data(), lengths)
def test_only_damaged_pages_are_lost(damaged: list[int], data: st.DataObject, lengths: list[int]) -> None:
    parts = list(PAGES)
    for number in damaged:
        page = bytearray(parts[number])
        if data.draw(st.booleans(), "truncated"):
            left = data.draw(st.integers(0, len(page) - 1))
            assume(not PAGES[-1].startswith(bytes(page[left:])))  # or the next page makes it whole, and is lost itself
            del page[left:]
        else:
            page[data.draw(st.integers(0, len(page) - 1))] ^= data.draw(st.integers(1, 255))
        parts[number] = bytes(page)
    reader = OpusReader()
    heard = hear(reader, [*cut(b"".join(parts), lengths), PAGES[-1]])
    assert len(heard) == (len(PAGES) - 2 - len(damaged) + 1) * 960
    good = OpusReader()
    kept = [page for number, page in enumerate(PAGES) if number not in damaged]
    np.testing.assert_array_equal(heard, good.read(b"".join(kept) + PAGES[-1]))


@slow
@given(st.lists(st.binary(max_size=500), max_size=30))
def test_packets_of_rubbish_never_raise_and_lose_no_later_speech(packets: list[bytes]) -> None:
    reader = OpusReader()
    for number, packet in enumerate(packets):
        heard = reader.read(make_page(packet, serial=9, sequence=number))
        assert np.isfinite(heard).all() and len(heard) <= 0.12 * 24000
    assert len(reader.read(STREAM)) == len(HEARD)


@slow
@given(st.lists(st.binary(max_size=2000), max_size=20), st.lists(junk, max_size=20))
def test_however_it_is_cut_rubbish_is_the_same_rubbish(pieces: list[bytes], more: list[bytes]) -> None:
    stream = b"".join(pieces) + b"".join(more) + STREAM[:2000] + b"".join(more) + STREAM[1000:3000]
    whole, parts = PageSplitter(), PageSplitter()
    at_once = list(whole.feed(stream))
    assert at_once == [page for i in range(0, len(stream), 7) for page in parts.feed(stream[i : i + 7])]
    assert len(at_once) >= 10


def test_a_reader_speaks_again_at_once_after_a_page_that_broke_off() -> None:
    """It does not wait for the bytes that the broken page announced."""
    reader = OpusReader()
    claims_much = b"OggS\0\0" + bytes(20) + b"\xff" * 256
    assert len(reader.read(claims_much + MESSAGES[0])) == FRAME
    assert reader.discarded == len(claims_much)


# from the client: hostile ---------------------------------------------------------------------------------------------


def test_empty_packets_make_no_sound() -> None:
    """The decoder would make five seconds of each."""
    reader = OpusReader()
    page = reseal(make_page(b"", serial=1, sequence=0)[:26] + bytes([255]) + bytes(255))
    assert len(reader.read(page)) == 0 and reader.refused == 255


def test_sound_is_bounded_however_small_its_packets_are() -> None:
    table = bytes([2]) * 255
    longest = bytes([3 << 3 | 3, 2]) * 255  # two SILK frames of 60 ms, both empty
    page = reseal(make_page(b"", serial=1, sequence=0)[:26] + bytes([255]) + table + longest)
    reader = OpusReader()
    for _ in range(3):
        heard = reader.read(page * 4)
        assert MAX_SECONDS - 0.12 < len(heard) / 24000 <= MAX_SECONDS
    assert reader.refused > 2000


def test_memory_is_bounded() -> None:
    """Nonsense, pages that never end, packets that never end, streams without number: nothing is kept for long."""
    rng = np.random.default_rng(0)
    endless = [
        reseal(make_page(b"", serial=1, sequence=i, flags=1)[:26] + b"\xff" * 256 + bytes(65025)) for i in range(9)
    ]
    streams = [
        reseal(make_page(b"", serial=i, sequence=0, flags=2)[:26] + b"\x01\xff" + bytes(255)) for i in range(3000)
    ]
    announced = b"OggS\0\0" + bytes(20) + b"\xff" * 256
    hostile = [rng.bytes(MAX_PAGE) for _ in range(20)] + endless * 5 + streams + [announced * 200] * 5
    reader = OpusReader()
    tracemalloc.start()
    for piece in hostile:
        reader.read(piece)
    held, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert held < 3 * MAX_PAGE + MAX_PACKET
    assert peak < 20 * MAX_PAGE
    assert len(reader.read(STREAM)) == len(HEARD)


def test_what_looks_like_pages_takes_linear_time() -> None:
    import time

    reader = OpusReader()
    begun = time.process_time()
    reader.read(b"OggS\0\0" * 40_000)
    assert time.process_time() - begun < 5  # on a slow machine; a quadratic search takes minutes
    assert len(reader.read(STREAM)) == len(HEARD)


def test_a_packet_that_is_too_large_is_thrown_away() -> None:
    reader = PacketReader()
    part = bytes(65025)
    for number in range(5):
        page = make_page(b"", serial=1, sequence=number, flags=1 if number else 0)[:26] + b"\xff" * 256 + part
        assert reader.feed(page) == []
    assert reader.feed(make_page(b"end", serial=1, sequence=5, flags=1)) == []
    assert reader.discarded == 5 * 65025 + 3
    assert reader.feed(make_page(b"next", serial=1, sequence=6)) == [b"next"]


@pytest.mark.parametrize("size", [MAX_PACKET, MAX_PACKET + 1, MAX_PACKET + 4000])
def test_a_packet_for_which_a_page_is_too_small_is_no_sound(size: int) -> None:
    """Two pages bring it, its first byte looks like Opus, and the decoder would get it in one."""
    packet = bytes([31 << 3]) + bytes(size - 1)
    begun, rest = packet[: 200 * 255], packet[200 * 255 :]
    reader = OpusReader()
    reader.read(_page(begun, [255] * 200, sequence=0))
    reader.read(_page(rest, [255] * (len(rest) // 255) + [len(rest) % 255], sequence=1, flags=1))
    assert reader.discarded == (size if size > MAX_PACKET else 0)
    assert len(reader.read(STREAM)) == len(HEARD)


@pytest.mark.parametrize(
    "packet, milliseconds",
    [
        (b"", 0),
        (bytes([3 << 3]), 60),
        (bytes([12 << 3 | 1]), 20),
        (bytes([16 << 3 | 2]), 5),
        (bytes([31 << 3]), 20),
        (bytes([31 << 3 | 3]), 0),
        (bytes([31 << 3 | 3, 0]), 0),
        (bytes([31 << 3 | 3, 6]), 120),
        (bytes([31 << 3 | 3, 7]), 0),
    ],
)
def test_length_of_a_packet(packet: bytes, milliseconds: float) -> None:
    assert packet_ms(packet) == milliseconds
