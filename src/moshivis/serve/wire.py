"""The messages of `/api/chat` and the parameters of its query (reference facts, serving.md sections 1.2 and 1.4).

A message is binary: one byte that tells its kind, then the payload. Kinds that are not known are to be ignored.
"""

from __future__ import annotations

import json
import math
import secrets
from collections.abc import Mapping
from dataclasses import dataclass, replace
from enum import IntEnum
from typing import TYPE_CHECKING, Any, Literal, TypeVar, get_args

from moshivis import __version__
from moshivis.errors import InputError

if TYPE_CHECKING:  # the client needs the protocol, but no model
    from moshivis.inference.call import CallSettings


class Kind(IntEnum):
    HANDSHAKE = 0x00  # server: sound may start
    AUDIO = 0x01  # both: pages of an Ogg/Opus stream, or 16-bit samples
    TEXT = 0x02  # server: UTF-8, what the assistant says
    CONTROL = 0x03  # client: one byte
    METADATA = 0x04  # server: a JSON object
    ERROR = 0x05  # server: a sentence
    PING = 0x06  # both: nothing but a sign of life
    COLOURED = 0x07  # server: one byte, the level of the gate from 0 to 10, then text
    IMAGE = 0x08  # client: an encoded picture; empty for none
    RATING = 0x0A  # client: one byte, 1 to 5


class Control(IntEnum):
    START = 0
    END_TURN = 1
    PAUSE = 2
    RESTART = 3


class Close(IntEnum):
    """Why the server closes a socket."""

    NORMAL = 1000  # the conversation is over: its time or its frames
    GOING_AWAY = 1001  # the server stops
    BAD_REQUEST = 1008
    TOO_LARGE = 1009
    INTERNAL = 1011
    BUSY = 1013


# Two numbers of 32 bits, the versions of protocol and model. Some servers leave them out; clients read or ignore them.
HANDSHAKE = bytes([Kind.HANDSHAKE]) + bytes(8)
PING = bytes([Kind.PING])

MAX_REASON = 123  # bytes, what a close frame has room for


def message(kind: Kind, payload: bytes = b"") -> bytes:
    return bytes([kind]) + payload


def text(piece: str) -> bytes:
    return message(Kind.TEXT, piece.encode())


def coloured(piece: str, level: int) -> bytes:
    """Text with the level, 0 to 10, of how much came from the picture."""
    return message(Kind.COLOURED, bytes([level]) + piece.encode())


def error(sentence: str) -> bytes:
    return message(Kind.ERROR, sentence.encode())


def metadata(values: Mapping[str, Any]) -> bytes:
    return message(Kind.METADATA, json.dumps(values, ensure_ascii=False, separators=(",", ":")).encode())


def split(data: bytes) -> tuple[Kind | None, bytes]:
    """Kind and payload of a message; None for an empty message or a kind that is not known."""
    try:
        return Kind(data[0]), data[1:]
    except (IndexError, ValueError):
        return None, data[1:]


def shorten(sentence: str) -> str:
    """A sentence as the reason of a close frame, cut between two characters if it is too long."""
    encoded = sentence.encode("utf-8", "replace")
    if len(encoded) <= MAX_REASON:
        return encoded.decode()
    return encoded[: MAX_REASON - 3].decode("utf-8", "ignore") + "…"


# the query ------------------------------------------------------------------------------------------------------------

AudioKind = Literal["ogg", "pcm"]

# The released MoshiVis page adds these four exactly when it is about to send a picture; other clients wait for the
# handshake, so that each would wait for ever if it were taken for the other.
PICTURE_FOLLOWS = ("image_resolution", "center_crop", "xa_start", "text_temperature_gating_influence")

# Settings of a call that have another name in the query.
PARAMETERS = {
    "text_top_k": "text_topk",
    "audio_top_k": "audio_topk",
    "padding_bias": "pad_mult",
    "gate_delay": "xa_start",
    "max_frames": "max_steps",
}

MAX_SEED = 2**31 - 1
WholeOrNone = TypeVar("WholeOrNone", int, int | None)


@dataclass(frozen=True, kw_only=True)
class ChatQuery:
    """What a client asks for in the query of `/api/chat`."""

    settings: CallSettings
    audio: AudioKind = "ogg"
    page: bool = False  # wants the metadata that our page shows
    picture_first: bool = False  # a picture follows, or an empty one, and the handshake is to wait for it
    ticket: str | None = None  # from the queue


def read_query(query: Mapping[str, str], usual: CallSettings) -> ChatQuery:
    """Read a query. What it does not say is as `usual`, but the seed, which is drawn.

    A picture is waited for if `picture=1` says so, for our page unless `picture=0` says otherwise, and for the
    released page. Known, but without a counterpart in this model: `repetition_penalty`, `repetition_penalty_context`,
    `image_resolution`, `center_crop`, `text_temperature_gating_influence`, `email`. Metadata tell what is in force.
    Raises InputError that names the parameter.
    """
    settings = replace(
        usual,
        text_temperature=_number(query, "text_temperature", usual.text_temperature),
        text_top_k=_whole(query, "text_topk", usual.text_top_k),
        audio_temperature=_number(query, "audio_temperature", usual.audio_temperature),
        audio_top_k=_whole(query, "audio_topk", usual.audio_top_k),
        padding_bias=_number(query, "pad_mult", usual.padding_bias),
        gate_delay=_whole(query, "xa_start", usual.gate_delay),
        max_frames=_whole(query, "max_steps", usual.max_frames),
        seed=_seed(query),
    )
    try:
        settings.check()
    except InputError as error:
        name, _, rest = str(error).partition(" ")
        raise InputError(f"{PARAMETERS.get(name, name)} {rest}") from None
    audio = query.get("audio", "ogg")
    if audio not in get_args(AudioKind):
        raise InputError(f"audio must be ogg or pcm, not {_quoted(audio)}")
    page = _flag(query, "page", otherwise=False)
    return ChatQuery(
        settings=settings,
        audio="pcm" if audio == "pcm" else "ogg",
        page=page,
        picture_first=_flag(query, "picture", otherwise=page or all(name in query for name in PICTURE_FOLLOWS)),
        ticket=query.get("worker_auth_id") or None,
    )


def _seed(query: Mapping[str, str]) -> int:
    """Clients of the released servers send two seeds; here one is made of them."""
    if "seed" in query:
        return _whole(query, "seed", 0)
    if "text_seed" not in query and "audio_seed" not in query:
        return secrets.randbelow(MAX_SEED)
    return (_whole(query, "text_seed", 0) * 1_000_003 + _whole(query, "audio_seed", 0)) % MAX_SEED


def _number(query: Mapping[str, str], name: str, otherwise: float) -> float:
    if name not in query:
        return otherwise
    try:
        value = float(query[name])
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        raise InputError(f"{name} must be a number, not {_quoted(query[name])}")
    return value


def _whole(query: Mapping[str, str], name: str, otherwise: WholeOrNone) -> int | WholeOrNone:
    if name not in query:
        return otherwise
    digits = query[name]
    if not (digits.isascii() and digits.isdigit() and len(digits) < 20):
        raise InputError(f"{name} must be a whole number from 0 on, not {_quoted(digits)}")
    return int(digits)


def _flag(query: Mapping[str, str], name: str, *, otherwise: bool) -> bool:
    value = query.get(name)
    if value is None:
        return otherwise
    if value not in ("0", "1", "false", "true"):
        raise InputError(f"{name} must be 1 or 0, not {_quoted(value)}")
    return value in ("1", "true")


def _quoted(value: str) -> str:
    return repr(value if len(value) <= 40 else value[:40] + "…")


# what the server tells of itself --------------------------------------------------------------------------------------


def stock_metadata(settings: CallSettings, *, model: str, image_size: int, name: str) -> dict[str, Any]:
    """What the released page wants to know, all of it, or it shows nothing (reference facts, serving.md section 1.5).

    `name` begins the names of the files that it offers to save.
    """
    return {
        "text_temperature": settings.text_temperature,
        "text_topk": settings.text_top_k,
        "text_temperature_gating_influence": 0,
        "audio_temperature": settings.audio_temperature,
        "audio_topk": settings.audio_top_k,
        "pad_mult": settings.padding_bias,
        "repetition_penalty_context": 0,
        "repetition_penalty": 1,
        "image_resolution": image_size,
        "lm_model_file": model,
        "instance_name": "moshivis",
        "base_filename": name,
        "build_info": dict.fromkeys(_BUILD_INFO, "") | {"git_describe": __version__},
    }


_BUILD_INFO = (
    "build_timestamp",
    "build_date",
    "git_branch",
    "git_timestamp",
    "git_date",
    "git_hash",
    "git_describe",
    "rustc_host_triple",
    "rustc_version",
    "cargo_target_triple",
)
