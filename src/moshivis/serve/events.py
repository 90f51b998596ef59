"""Reading a stranger's JSON events: what the two OpenAI-style protocols share.

Whatever is wrong with an event raises EventError, which the protocols answer with an `error` event; the session goes
on. Nothing here trusts a size, a type or a name.
"""

from __future__ import annotations

import binascii
import dataclasses
import json
import math
import secrets
from collections.abc import Mapping
from typing import Any

from moshivis.errors import InputError, MoshivisError
from moshivis.inference.call import CallSettings
from moshivis.serve.pcm import AudioFormat

MAX_DEPTH = 16  # objects and lists inside each other
MAX_MARKS = 20_000  # values of an event, roughly: bounds the memory that a small message can unfold to
MAX_NAME = 128  # characters of an identifier that we keep or send back
MAX_APPEND_S = 30.0  # seconds of sound in one event
VOICE = "assistant"  # the model has one

Json = dict[str, Any]
Known = Mapping[str, tuple[Any, ...] | None]  # see `Fields.only`


class EventError(MoshivisError):
    """An event that cannot be honoured: `code` for programs, `param` the path of the field that is to blame."""

    def __init__(self, message: str, *, code: str, param: str | None = None, kind: str = "invalid_request_error"):
        super().__init__(message)
        self.code, self.param, self.kind = code, param, kind

    def body(self, client_event_id: str | None) -> Json:
        """The `error` object. The two protocols name the client's event differently; it carries both names."""
        return {
            "type": self.kind,
            "code": self.code,
            "message": str(self),
            "param": self.param,
            "event_id": client_event_id,
            "client_event_id": client_event_id,
        }


def new_id(prefix: str) -> str:
    return f"{prefix}_{secrets.token_hex(8)}"


def parse_event(text: str) -> Json:
    """The object in a message. Its `type` is a string; nothing else is known of it."""
    if holds_too_much(text):
        raise EventError(f"the message holds more than {MAX_MARKS} values", code="invalid_json")
    try:
        event = json.loads(text, parse_constant=_refuse_constant)
    except (ValueError, RecursionError) as error:
        raise EventError(f"the message is not JSON: {str(error)[:200]}", code="invalid_json") from None
    if not isinstance(event, dict):
        raise EventError("the message must be a JSON object with a type", code="invalid_json")
    _check_depth(event)
    if not isinstance(event.get("type"), str):
        raise EventError("the event has no type, or one that is not a string", code="missing_parameter", param="type")
    if not isinstance(event.get("event_id"), str | None):
        raise EventError("event_id must be a string", code="invalid_type", param="event_id")
    return event


def holds_too_much(text: str) -> bool:
    """Whether JSON would unfold to more than MAX_MARKS values. To be asked before it is read, which takes long."""
    return sum(text.count(mark) for mark in "[{,") > MAX_MARKS


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is not a JSON number")


def _check_depth(event: Json) -> None:
    level: list[Any] = [event]
    for _ in range(MAX_DEPTH):
        children = [value.values() if isinstance(value, dict) else value for value in level]
        level = [child for group in children for child in group if isinstance(child, dict | list)]
        if not level:
            return
    raise EventError(f"the event is nested more than {MAX_DEPTH} levels deep", code="invalid_json")


def client_event_id(event: Json) -> str | None:
    """The name that the client gave its event, if it is one that can be sent back."""
    name = event.get("event_id")
    return name if isinstance(name, str) and len(name) <= MAX_NAME else None


def shown(value: object) -> str:
    """A stranger's value, short enough for a message."""
    if not isinstance(value, str):
        return f"a {_JSON_NAMES[type(value)]}"
    text = ascii(value[:61])  # in which a character can take ten
    return text if len(text) <= 62 else f"{text[:61]}…{text[0]}"


_JSON_NAMES: dict[type, str] = {
    dict: "object",
    list: "list",
    bool: "boolean",
    int: "number",
    float: "number",
    type(None): "null",
}


class Fields:
    """An object of an event, and the path at which it stands, so that errors can name the field."""

    def __init__(self, values: Json, path: str = ""):
        self.values, self.path = values, path

    def where(self, name: str) -> str:
        return f"{self.path}.{name}" if self.path else name

    def wrong(self, name: str, message: str, code: str = "invalid_value") -> EventError:
        return EventError(f"{self.where(name)} {message}", code=code, param=self.where(name))

    def object(self, name: str) -> Fields | None:
        """The object `name`; None if it is null or not given."""
        value = self.values.get(name)
        if value is None:
            return None
        if not isinstance(value, dict):
            raise self.wrong(name, f"must be an object, not {shown(value)}", "invalid_type")
        return Fields(value, self.where(name))

    def required_object(self, name: str) -> Fields:
        found = self.object(name)
        if found is None:
            raise self.wrong(name, "is missing", "missing_parameter")
        return found

    def string(self, name: str, limit: int | None = MAX_NAME) -> str | None:
        """The string `name`; None if it is null or not given."""
        value = self.values.get(name)
        if value is None:
            return None
        if not isinstance(value, str):
            raise self.wrong(name, f"must be a string, not {shown(value)}", "invalid_type")
        if limit is not None and len(value) > limit:
            raise self.wrong(name, f"has {len(value)} characters; {limit} are possible")
        return value

    def required_string(self, name: str, limit: int | None = MAX_NAME) -> str:
        found = self.string(name, limit)
        if found is None:
            raise self.wrong(name, "is missing", "missing_parameter")
        return found

    def whole_number(self, name: str) -> int:
        """A required whole number from 0 to 2^31."""
        value = self.values.get(name)
        if not isinstance(value, int) or isinstance(value, bool):
            raise self.wrong(name, "must be a whole number", "missing_parameter" if value is None else "invalid_type")
        if not 0 <= value < 2**31:
            raise self.wrong(name, "is out of range")
        return value

    def only(self, known: Known) -> None:
        """Refuse what is not known, and what is known but cannot be changed.

        `known` gives the values that a field can have because they ask for nothing; None = read elsewhere.
        """
        for name, value in self.values.items():
            if name not in known:
                raise EventError(
                    f"there is no parameter {shown(name)} in {self.path or 'this event'}",
                    code="unknown_parameter",
                    param=self.where(name[:MAX_NAME]),
                )
            allowed = known[name]
            if value is None or allowed is None:
                continue
            if not any(value == one and isinstance(value, bool) == isinstance(one, bool) for one in allowed):
                choice = (
                    f"can only be {' or '.join(json.dumps(one) for one in allowed)}" if allowed else "is not offered"
                )
                raise self.wrong(name, f"{choice}: this server has no such feature", "unsupported_value")


def read_settings(fields: Fields, current: CallSettings, extra: tuple[str, ...] = ()) -> CallSettings:
    """`current` with the changes that an object `moshivis` asks for; null leaves a value as it is.

    `extra` fields are read elsewhere.
    """
    known = {field.name for field in dataclasses.fields(CallSettings)}
    fields.only(dict.fromkeys([*known, *extra]))
    changes = {name: value for name, value in fields.values.items() if name in known and value is not None}
    for name, value in changes.items():
        short = not isinstance(value, str) or len(value) <= MAX_NAME
        finite = not isinstance(value, int | float) or (abs(value) < 2**64 and math.isfinite(value))
        if isinstance(value, bool | dict | list) or not (short and finite):
            raise fields.wrong(name, f"must be a number of reasonable size or a name, not {shown(value)}")
    settings = dataclasses.replace(current, **changes)
    try:
        settings.check()
    except InputError as error:
        name = next((name for name in changes if str(error).startswith(f"{name} ")), "")
        raise EventError(str(error)[:300], code="invalid_value", param=fields.where(name)) from None
    return settings


def read_format(fields: Fields, formats: tuple[AudioFormat, ...]) -> AudioFormat:
    """The one of `formats` that an object `{"type": …, "rate": …}` names; without rate the first of that type."""
    fields.only({"type": None, "rate": None})
    kind, rate = fields.required_string("type"), fields.values.get("rate")
    for known in formats:
        if known.type == kind and (rate is None or (rate == known.rate and not isinstance(rate, bool))):
            return known
    offered = ", ".join(f"{known.type} at {known.rate} Hz" for known in formats)
    raise EventError(f"{fields.path} can be {offered}", code="unsupported_format", param=fields.path)


def read_sound(fields: Fields, name: str, format: AudioFormat) -> bytes:
    """Whole samples in base64, of MAX_APPEND_S seconds at most."""
    text = fields.required_string(name, limit=None)
    limit = int(MAX_APPEND_S * format.rate) * format.sample_bytes
    data = decode_base64(text, fields.where(name), limit, f"{MAX_APPEND_S:g} seconds; send it in pieces")
    if len(data) % format.sample_bytes:
        message = f"has {len(data)} bytes, but a sample has {format.sample_bytes}: send whole samples"
        raise fields.wrong(name, message, "invalid_audio")
    return data


def read_picture(fields: Fields, name: str, limit: int) -> bytes | None:
    """The encoded picture in a data URI, of `limit` bytes at most; None if the field is null or not given."""
    uri = fields.string(name, limit=None)
    if uri is None:
        return None
    content = picture_content(uri)
    if content is None:
        message = 'must hold the picture itself, as "data:image/png;base64,…": nothing is fetched from elsewhere'
        raise fields.wrong(name, message, "invalid_image")
    return decode_base64(content, fields.where(name), limit, "the limit for pictures; make it smaller")


def picture_content(uri: str) -> str | None:
    """The base64 in the data URI of a picture; None if it is none."""
    head, comma, content = uri.partition(",")
    kind, *parameters = head[:200].lower().split(";")
    return content if comma and kind.startswith("data:image/") and "base64" in parameters else None


def encode_sound(data: bytes) -> str:
    return binascii.b2a_base64(data, newline=False).decode("ascii")


def decode_base64(text: str, param: str, limit: int, what: str) -> bytes:
    """Strictly decoded bytes; more than `limit`, which `what` explains, are refused before they are decoded."""
    if len(text) // 4 * 3 > limit + 3:
        raise EventError(f"{param} is longer than {limit} bytes, {what}", code="too_large", param=param)
    try:
        data = binascii.a2b_base64(text, strict_mode=True)
    except ValueError as error:
        raise EventError(f"{param} is not base64: {error}", code="invalid_base64", param=param) from None
    if len(data) > limit:
        raise EventError(f"{param} is longer than {limit} bytes, {what}", code="too_large", param=param)
    return data
