"""Scenes of the miniature world: one to four coloured shapes at distinct places on a plain ground.

A scene is pure data; `moshivis.mini.drawing` paints it and `moshivis.mini.grammar` talks about it. An object's size or
place may be None: then nobody has said it (a scene that is only described in words), and no question may need it.
"""

import random
from collections.abc import Sequence
from dataclasses import dataclass, replace

from moshivis.mini.writing import ROWS, Writing, sample_writing

SHAPES = ("circle", "square", "triangle", "star", "heart", "cross")
COLOURS = ("red", "green", "blue", "yellow", "orange", "purple", "pink", "brown", "black", "white", "grey")
SIZES = ("small", "big")
# Reading order: objects of a scene are listed row by row, and so are descriptions.
PLACES = ("top left", "top", "top right", "left", "middle", "right", "bottom left", "bottom", "bottom right")

_OBJECT_COUNTS = (1, 2, 2, 2, 3, 3, 3, 4, 4)
_WRITTEN_SHARE = 1 / 3
_BACKGROUNDS = ("white", "white", "white", "white", "black", "grey", *COLOURS)


@dataclass(frozen=True)
class SceneObject:
    """One shape of a scene; `size` or `place` None means that it has not been said."""

    shape: str
    colour: str
    size: str | None = None
    place: str | None = None


@dataclass(frozen=True)
class Scene:
    """One to four objects at distinct places; no two share both shape and colour. With a writing: up to two."""

    objects: tuple[SceneObject, ...]
    background: str = "white"
    writing: Writing | None = None


def sample_scene(rng: random.Random, num_objects: int | None = None) -> Scene:
    """A random scene, objects in reading order.

    Shapes repeat in about a third of the scenes and colours in about a quarter, so that counting has something to
    count, while most objects remain the only one of their shape and of their colour.
    """
    count = num_objects or rng.choice(_OBJECT_COUNTS)
    shapes = _with_repeats(rng, SHAPES, count, repeat_probability=0.35)
    colours = _with_repeats(rng, COLOURS, count, repeat_probability=0.25)
    while len(set(zip(shapes, colours, strict=True))) < count:
        colours = _with_repeats(rng, COLOURS, count, repeat_probability=0.25)
    places = rng.sample(PLACES, count)
    sizes = [rng.choice(SIZES) for _ in range(count)]
    objects = tuple(map(SceneObject, shapes, colours, sizes, places))
    ground = rng.choice([colour for colour in _BACKGROUNDS if colour not in colours])
    return Scene(in_reading_order(objects), ground)


def sample_picture(rng: random.Random) -> Scene:
    """A scene to be drawn: as `sample_scene`, or, in a third of the cases, a writing with up to two objects."""
    return sample_written_scene(rng) if rng.random() < _WRITTEN_SHARE else sample_scene(rng)


def sample_written_scene(rng: random.Random) -> Scene:
    """A writing that has a row for itself, and up to two objects in other rows."""
    writing = sample_writing(rng)
    scene = sample_scene(rng, rng.choice((1, 1, 2)))
    places = [place for i, place in enumerate(PLACES) if ROWS[i // 3] != writing.row]
    chosen = rng.sample(places, len(scene.objects))
    objects = tuple(replace(thing, place=place) for thing, place in zip(scene.objects, chosen, strict=True))
    kept = objects if rng.random() < 0.7 else ()
    return Scene(in_reading_order(kept), scene.background, writing)


def sample_object(rng: random.Random, forget: bool = False) -> SceneObject:
    """A random object; with `forget`, size and place are each left unsaid now and then."""
    thing = SceneObject(rng.choice(SHAPES), rng.choice(COLOURS), rng.choice(SIZES), rng.choice(PLACES))
    return leave_unsaid(thing, rng) if forget else thing


def leave_unsaid(thing: SceneObject, rng: random.Random) -> SceneObject:
    """The object as somebody describes it: complete in two cases of three, else without size, place or both."""
    draw = rng.random()
    if draw < 0.66:
        return thing
    if draw < 0.80:
        return replace(thing, size=None)
    if draw < 0.94:
        return replace(thing, place=None)
    return replace(thing, size=None, place=None)


def said_scene(scene: Scene, rng: random.Random) -> Scene:
    """The scene as a user says it: in any order, some sizes and places left out."""
    objects = [leave_unsaid(thing, rng) for thing in scene.objects]
    rng.shuffle(objects)
    return Scene(tuple(objects), scene.background, scene.writing)


def in_reading_order(objects: Sequence[SceneObject]) -> tuple[SceneObject, ...]:
    """Objects sorted row by row; those without a place keep their order at the end."""
    return tuple(sorted(objects, key=lambda thing: PLACES.index(thing.place) if thing.place else len(PLACES)))


def _with_repeats(rng: random.Random, values: Sequence[str], count: int, repeat_probability: float) -> list[str]:
    """`count` distinct values, one of them sometimes overwritten by another (by two, now and then)."""
    chosen = rng.sample(values, count)
    if count > 1 and rng.random() < repeat_probability:
        keep = chosen[0]
        chosen[1] = keep
        if count > 2 and rng.random() < 0.3:
            chosen[2] = keep
    rng.shuffle(chosen)
    return chosen
