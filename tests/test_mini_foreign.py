"""Scenes that another program draws, and photos of scenes: still the same scenes."""

from __future__ import annotations

import random
import shutil

import numpy as np
import pytest
from PIL import ImageColor

from moshivis.errors import InputError
from moshivis.mini.drawing import draw_scene, draw_with_boxes
from moshivis.mini.foreign import SIDE, photograph, render_svg, svg
from moshivis.mini.scenes import PLACES, SHAPES, Scene, SceneObject, sample_scene

needs_rsvg = pytest.mark.skipif(shutil.which("rsvg-convert") is None, reason="librsvg2-bin is not installed")


@needs_rsvg
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("place", ["top left", "middle", "bottom right"])
def test_librsvg_paints_a_thing_where_it_is_said_to_be(shape: str, place: str) -> None:
    sizes = {}
    for size in ("small", "big"):
        picture = render_svg(Scene((SceneObject(shape, "blue", size, place),), "white"), 150)
        assert picture.size == (150, 150) and picture.mode == "RGB"
        blue = np.argwhere((np.asarray(picture) == ImageColor.getrgb("blue")).all(-1))
        row, column = divmod(PLACES.index(place), 3)
        middle = (blue.min(0) + blue.max(0)) / 2
        assert abs(middle - (np.array([row, column]) + 0.5) * 50).max() < 6
        assert len(np.unique(blue // 50, axis=0)) == 1, "inside its place"
        sizes[size] = len(blue)
    assert sizes["big"] > 3 * sizes["small"] > 300


def test_what_has_no_place_cannot_be_drawn() -> None:
    with pytest.raises(InputError, match="no place"):
        svg(Scene((SceneObject("star", "red", "big", None),), "white"))


def test_every_thing_is_in_the_document() -> None:
    scene = sample_scene(random.Random(3), 4)
    document = svg(scene)
    assert document.count("<g ") == 4 and f'viewBox="0 0 {SIDE} {SIDE}"' in document


def test_a_photo_shows_the_picture_in_perspective_and_differs_every_time() -> None:
    picture = draw_scene(Scene((SceneObject("square", "red", "big", "middle"),), "white"), random.Random(1), (200, 200))
    photos = [photograph(picture, random.Random(seed)).picture for seed in (1, 2)]
    assert [photo.size for photo in photos] == [(320, 320), (320, 320)]
    assert photos[0].tobytes() != photos[1].tobytes()
    assert photograph(picture, random.Random(1)).picture.tobytes() == photos[0].tobytes()
    for photo in photos:
        pixels = np.asarray(photo, int)
        assert pixels[160, 160, 0] > pixels[160, 160, 1] + 60, "the square is where it was"
        assert abs(pixels[1, 1] - pixels[160, 60]).max() > 10, "a table around the print"


@pytest.mark.parametrize("seed", range(4))
def test_a_photo_tells_where_the_things_are(seed: int) -> None:
    scene = Scene((SceneObject("square", "red", "small", PLACES[2 * seed]),), "white")
    drawing = draw_with_boxes(scene, random.Random(seed), (200, 200))
    photo = photograph(drawing.picture, random.Random(seed))
    left, top, right, bottom = photo.box(drawing.boxes[0])
    pixels = np.asarray(photo.picture, int)
    red = np.argwhere(pixels[..., 0] > pixels[..., 1:].max(-1) + 90) / 320
    assert abs(red.min(0) - (top, left)).max() < 0.03 and abs(red.max(0) - (bottom, right)).max() < 0.03
