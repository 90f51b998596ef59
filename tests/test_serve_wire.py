"""Messages and queries of `/api/chat`, as bytes and words."""

from __future__ import annotations

import json
from urllib.parse import parse_qsl

import pytest
from hypothesis import given
from hypothesis import strategies as st

from moshivis.errors import InputError
from moshivis.inference.call import CallSettings
from moshivis.serve import wire
from moshivis.serve.wire import PICTURE_FOLLOWS, ChatQuery, Kind, read_query

USUAL = CallSettings(text_temperature=0.7, text_top_k=25, audio_temperature=0.8, audio_top_k=250, seed=7)

# as the released pages send them (reference facts, serving.md section 1.4)
STOCK = (
    "worker_auth_id=ticket&email=a%40b.org&text_temperature=0.45&text_topk=25&audio_temperature=0.7&audio_topk=250"
    "&pad_mult=-0.5&text_seed=12&audio_seed=34&repetition_penalty_context=64&repetition_penalty=1.15"
)
STOCK_PICTURE = STOCK + "&image_resolution=448&center_crop=false&xa_start=16&text_temperature_gating_influence=0"


def read(query: str) -> ChatQuery:
    return read_query(dict(parse_qsl(query, keep_blank_values=True)), USUAL)


# messages -------------------------------------------------------------------------------------------------------------


def test_messages_as_bytes() -> None:
    assert wire.HANDSHAKE == bytes(9)
    assert wire.PING == b"\x06"
    assert wire.text(" hé") == b"\x02 h\xc3\xa9"
    assert wire.coloured(" a", 0) == b"\x07\x00 a" and wire.coloured("b", 10) == b"\x07\x0ab"
    assert wire.error("no") == b"\x05no"
    assert wire.metadata({"a": "é"}) == b'\x04{"a":"\xc3\xa9"}'
    assert wire.message(Kind.AUDIO, b"OggS") == b"\x01OggS"


@given(st.binary(max_size=50))
def test_any_bytes_are_split(data: bytes) -> None:
    kind, payload = wire.split(data)
    assert payload == data[1:]
    assert (kind is None) == (not data or data[0] not in {*range(9), 10})
    if kind is not None:
        assert wire.message(kind, payload) == data


@given(st.text(max_size=300))
def test_a_reason_fits_into_a_close_frame(sentence: str) -> None:
    shown = wire.shorten(sentence)
    encoded = shown.encode()
    assert len(encoded) <= 123
    if len(sentence.encode("utf-8", "replace")) <= 123:
        assert shown == sentence.encode("utf-8", "replace").decode()
    else:
        assert shown.endswith("…") and sentence.startswith(shown[:-1])


def test_metadata_satisfy_the_released_page() -> None:
    """Every field of its schema, of the right type (reference facts, serving.md section 1.5)."""
    values = json.loads(json.dumps(wire.stock_metadata(USUAL, model="mini", image_size=224, name="it")))
    numbers = (
        "text_temperature text_topk text_temperature_gating_influence audio_temperature audio_topk pad_mult "
        "repetition_penalty_context repetition_penalty image_resolution"
    )
    assert all(type(values[name]) in (int, float) for name in numbers.split())
    assert all(type(values[name]) is str for name in ("lm_model_file", "instance_name", "base_filename"))
    build = (
        "build_timestamp build_date git_branch git_timestamp git_date git_hash git_describe rustc_host_triple "
        "rustc_version cargo_target_triple"
    )
    assert all(type(values["build_info"][name]) is str for name in build.split())
    assert values["text_topk"] == 25 and values["image_resolution"] == 224 and values["base_filename"] == "it"


# queries --------------------------------------------------------------------------------------------------------------


def test_the_released_page_with_a_picture() -> None:
    asked = read(STOCK_PICTURE)
    settings = asked.settings
    assert (settings.text_temperature, settings.text_top_k) == (0.45, 25)
    assert (settings.audio_temperature, settings.audio_top_k) == (0.7, 250)
    assert settings.padding_bias == -0.5 and settings.gate_delay == 16 and settings.max_frames is None
    assert asked.picture_first and not asked.page and asked.audio == "ogg" and asked.ticket == "ticket"
    assert read(STOCK_PICTURE).settings.seed == settings.seed != read(STOCK_PICTURE + "&text_seed=13").settings.seed
    assert read(STOCK_PICTURE + "&audio_seed=35").settings.seed != settings.seed


@pytest.mark.parametrize("left_out", PICTURE_FOLLOWS)
def test_without_one_of_the_four_no_picture_follows(left_out: str) -> None:
    """The plain Moshi page sends some of them in a mode of its own."""
    query = "&".join(part for part in STOCK_PICTURE.split("&") if not part.startswith(left_out + "="))
    assert not read(query).picture_first
    assert not read(STOCK).picture_first and not read("").picture_first


def test_nothing_said_is_as_usual() -> None:
    asked = read("")
    assert asked.settings.seed != read("").settings.seed
    assert asked == ChatQuery(settings=CallSettings(**(vars(USUAL) | {"seed": asked.settings.seed})))


def test_our_own_parameters() -> None:
    asked = read("page=1&audio=pcm&seed=5&max_steps=100&text_seed=9")
    assert asked.page and asked.picture_first and asked.audio == "pcm"
    assert asked.settings.seed == 5 and asked.settings.max_frames == 100
    assert not read("page=1&picture=0").picture_first
    assert read("picture=true").picture_first and not read("picture=true").page


@pytest.mark.parametrize(
    "query, sentence",
    [
        ("text_temperature=warm", "text_temperature must be a number, not 'warm'"),
        ("text_temperature=nan", "text_temperature must be a number, not 'nan'"),
        ("audio_temperature=", "audio_temperature must be a number, not ''"),
        ("audio_temperature=9", "audio_temperature must be a number from 0 to 2"),
        ("text_temperature=-1", "text_temperature must be a number from 0"),
        ("pad_mult=inf", "pad_mult must be a number, not 'inf'"),
        ("pad_mult=1e9", "^pad_mult must be a number from -10 to 10"),
        ("text_topk=1.5", "text_topk must be a whole number from 0 on, not '1.5'"),
        ("text_topk=-1", "text_topk must be a whole number"),
        ("audio_topk=100000", "^audio_topk must be a whole number from 0 to 500"),
        ("xa_start=start", "xa_start must be a whole number"),
        ("text_topk=501", "^text_topk must be a whole number from 0 to 500"),
        ("xa_start=99999999999", "^xa_start must be a whole number"),
        ("max_steps=0", "^max_steps must be a whole number from 1"),
        ("seed=" + "9" * 19, "seed must be a whole number from 0"),
        ("text_seed=²", "text_seed must be a whole number"),
        ("audio=mp3", "audio must be ogg or pcm, not 'mp3'"),
        ("page=yes", "page must be 1 or 0, not 'yes'"),
        ("picture=" + "x" * 500, "picture must be 1 or 0"),
    ],
)
def test_what_cannot_be_is_named(query: str, sentence: str) -> None:
    with pytest.raises(InputError, match=sentence) as error:
        read(query)
    assert len(str(error.value)) < 150


@given(st.dictionaries(st.sampled_from([*PICTURE_FOLLOWS, "seed", "text_seed", "text_topk", "pad_mult"]), st.text()))
def test_any_query_is_read_or_refused(query: dict[str, str]) -> None:
    try:
        read_query(query, USUAL).settings.check()
    except InputError as error:
        assert any(name in str(error) for name in query)
