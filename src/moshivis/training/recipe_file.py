"""Reading recipes: a YAML file or a preset that comes with the package, then `key=value` words over it."""

from __future__ import annotations

import dataclasses
import difflib
import re
import types
import typing
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import yaml

from moshivis.errors import InputError
from moshivis.training.recipe import Recipe

PRESETS = Path(__file__).parent / "recipes"


def read_recipe(source: str | Path, overrides: Sequence[str] = ()) -> Recipe:
    """The recipe in a file, or a preset by name, with dotted `key=value` words applied; checked.

    Values are YAML: `optimiser.rate=3e-4`, `data.datasets=[{path: a, kind: speech}]`, `data.datasets.0.path=b`.
    Raises InputError naming the key for anything unknown, of the wrong type, or impossible.
    """
    data = _read_yaml(find_recipe(source))
    for word in overrides:
        _override(data, word)
    recipe = recipe_from_dict(data)
    recipe.check()
    return recipe


def find_recipe(source: str | Path) -> Path:
    """A file, or the preset of that name. Raises InputError if there is neither."""
    path = Path(source)
    if path.is_file():
        return path
    names = sorted(preset.stem for preset in PRESETS.glob("*.yaml"))
    if str(source) in names:
        return PRESETS / f"{source}.yaml"
    raise InputError(f"there is no recipe {str(source)!r}: neither a file nor one of the presets {', '.join(names)}")


def recipe_from_dict(data: Mapping[str, Any]) -> Recipe:
    """Raises InputError as `read_recipe` does; contradictions between values are left to `Recipe.check`."""
    return typing.cast(Recipe, _build(Recipe, data, ""))


def recipe_to_dict(recipe: Recipe) -> dict[str, Any]:
    """Plain data that `recipe_from_dict` and YAML take, tuples as lists."""
    return typing.cast(dict[str, Any], _plain(dataclasses.asdict(recipe)))


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    return [_plain(item) for item in value] if isinstance(value, list | tuple) else value


# YAML -----------------------------------------------------------------------------------------------------------------


class _Loader(yaml.SafeLoader):
    """YAML 1.1, in which 1e-4 would be a word, with numbers as everybody writes them."""


_FLOAT = r"^[-+]?(?:\d[\d_]*\.?[\d_]*|\.\d[\d_]*)(?:[eE][-+]?\d+)$"
_Loader.add_implicit_resolver("tag:yaml.org,2002:float", re.compile(_FLOAT), list("-+0123456789."))


def _read_yaml(path: Path) -> dict[str, Any]:
    try:
        data = _parse(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise InputError(f"{path} is not readable as YAML: {error}") from error
    if not isinstance(data, dict):
        raise InputError(f"{path} does not hold a recipe: a mapping of keys to values")
    return data


def _parse(text: str) -> Any:
    return yaml.load(text, _Loader)  # a SafeLoader: it builds plain data only


def _override(data: dict[str, Any], word: str) -> None:
    key, equals, text = word.partition("=")
    if not equals or not key:
        raise InputError(f"{word!r} is no key=value")
    try:
        value = _parse(text)
    except yaml.YAMLError as error:
        raise InputError(f"the value of {word!r} is not readable as YAML: {error}") from error
    place: Any = data
    *parents, last = key.split(".")
    for name in parents:
        place = _child(place, name, key)
    if isinstance(place, list):
        place[_index(place, last, key)] = value
    else:
        place[last] = value


def _child(place: Any, name: str, key: str) -> Any:
    if isinstance(place, list):
        child = place[_index(place, name, key)]
    else:
        child = place.setdefault(name, {})
        if child is None:
            child = place[name] = {}
    if not isinstance(child, dict | list):
        raise InputError(f"{key}: {name} is a single value, {child!r}, with nothing below it")
    return child


def _index(place: list[Any], name: str, key: str) -> int:
    if not name.isdigit() or int(name) >= len(place):
        raise InputError(f"{key}: the list has {len(place)} entries, counted from 0; there is no {name!r}")
    return int(name)


# plain data -> dataclasses --------------------------------------------------------------------------------------------


def _build(hint: Any, value: Any, path: str) -> Any:
    if dataclasses.is_dataclass(hint):
        return _dataclass(typing.cast(type, hint), value, path)
    origin, options = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        if value is None:
            return None
        return _build(next(option for option in options if option is not type(None)), value, path)
    if origin is Literal:
        if value not in options or isinstance(value, bool):
            raise InputError(f"{path} must be one of {', '.join(map(str, options))}, not {value!r}")
        return value
    if origin is tuple:
        if not isinstance(value, list | tuple):
            raise InputError(f"{path} must be a list, not {value!r}")
        return tuple(_build(options[0], item, f"{path}.{index}") for index, item in enumerate(value))
    return _scalar(hint, value, path)


def _dataclass(cls: type, value: Any, path: str) -> Any:
    if not isinstance(value, Mapping):
        raise InputError(f"{path or 'a recipe'} must be a mapping of keys to values, not {value!r}")
    hints = typing.get_type_hints(cls)
    fields = {field.name: field for field in dataclasses.fields(cls)}
    dot = f"{path}." if path else ""
    for name in value:
        if name not in fields:
            near = difflib.get_close_matches(str(name), fields, n=1, cutoff=0.5)
            hint = f"did you mean {dot}{near[0]}?" if near else f"known are: {', '.join(fields)}"
            raise InputError(f"a recipe has no key {dot}{name}; {hint}")
    for name, entry in fields.items():
        needed = entry.default is dataclasses.MISSING and entry.default_factory is dataclasses.MISSING
        if needed and name not in value:
            raise InputError(f"the recipe does not say {dot}{name}; add it, or give {dot}{name}=…")
    return cls(**{name: _build(hints[name], item, f"{dot}{name}") for name, item in value.items()})


def _scalar(hint: type, value: Any, path: str) -> Any:
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if not isinstance(value, hint) or (isinstance(value, bool) and hint is not bool):
        noun = {bool: "true or false", int: "a whole number", float: "a number", str: "text"}[hint]
        raise InputError(f"{path} must be {noun}, not {value!r}")
    return value
