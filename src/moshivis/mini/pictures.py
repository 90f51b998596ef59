"""Stage `pictures`: drawn scenes as the vision encoder sees them, with what each patch shows."""

from __future__ import annotations

import json
import random
from collections.abc import Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from rich.progress import track

from moshivis.files import atomic_write
from moshivis.mini.drawing import Drawing, draw_with_boxes
from moshivis.mini.foreign import photograph
from moshivis.mini.lettering import Box
from moshivis.mini.scenes import COLOURS, PLACES, SHAPES, SIZES, Scene, SceneObject, sample_picture
from moshivis.mini.stage import Stage
from moshivis.mini.writing import TEXTS, Writing
from moshivis.vision.image import image_to_tensor, resize_bicubic

OBJECT_ATTRIBUTES = {"shape": SHAPES, "colour": COLOURS, "size": SIZES, "place": PLACES}
LETTERS = tuple("abcdefghijklmnopqrstuvwxyz0123456789")
COUNTS = ("one", "two", "three", "four")
# What a patch can show. "same_…": how many objects of the picture share the object's shape, colour or size; "order":
# its rank in reading order; "objects": how many there are in the picture, which is asked of every patch.
ATTRIBUTES = {
    **OBJECT_ATTRIBUTES,
    **{f"same_{name}": COUNTS for name in ("shape", "colour", "size")},
    "order": COUNTS,
    "letter": LETTERS,
    "text": TEXTS,
    "objects": ("none", *COUNTS),
}
CHUNK = 500
PHOTO_SHARE = 0.25


@dataclass(frozen=True)
class Pictures:
    """Scenes and their drawings."""

    scenes: list[Scene]
    pixels: np.ndarray  # [N, 3, S, S] uint8
    labels: np.ndarray  # [N, len(ATTRIBUTES), P, P] uint8: 1 + index of the value on each patch, 0 = there is none


def draw_pictures(
    stage: Stage, count: int, image_size: int, patch_size: int, workers: int = 2, seed: int = 0
) -> Pictures:
    """Draw what is missing of `count` scenes, in chunks that resume."""
    chunks = range(-(-count // CHUNK))
    missing = [i for i in chunks if not _path(stage.folder, i).exists()]
    # A forked process that starts threads of its own hangs where its parent had some.
    with ProcessPoolExecutor(workers, initializer=torch.set_num_threads, initargs=(1,)) as pool:
        jobs = [pool.submit(_draw_chunk, stage.folder, i, image_size, patch_size, seed) for i in missing]
        for job in track(jobs, "drawing scenes", total=len(jobs)):
            job.result()
    if not stage.done:
        stage.finish({"pictures": len(chunks) * CHUNK})
    return open_pictures(stage.folder)


def open_pictures(folder: Path) -> Pictures:
    """The pictures of a finished stage."""
    parts = [np.load(path) for path in sorted(folder.glob("scenes-*.npz"))]
    scenes = [_scene(fields) for part in parts for fields in json.loads(str(part["scenes"]))]
    return Pictures(scenes, _joined(parts, "pixels", len(scenes)), _joined(parts, "labels", len(scenes)))


def _joined(parts: Sequence[Mapping[str, np.ndarray]], name: str, rows: int) -> np.ndarray:
    """An array of all parts, end to end. One part is read at a time: a process that keeps its memory keeps them all."""
    begin, joined = 0, np.empty(0)
    for part in parts:
        block = part[name]
        if not begin:
            joined = np.empty((rows, *block.shape[1:]), block.dtype)
        joined[begin : begin + len(block)] = block
        begin += len(block)
    return joined


def _draw_chunk(folder: Path, index: int, image_size: int, patch_size: int, seed: int = 0) -> None:
    rng = random.Random(f"pictures {seed} {index}")
    scenes = [sample_picture(rng) for _ in range(CHUNK)]
    drawn = [draw(scene, rng, image_size, patch_size) for scene in scenes]
    with atomic_write(_path(folder, index)) as path, open(path, "wb") as file:
        np.savez(
            file,
            pixels=np.stack([pixels for pixels, _ in drawn]),
            labels=np.stack([labels for _, labels in drawn]),
            scenes=json.dumps([asdict(scene) for scene in scenes]),
        )


def draw(scene: Scene, rng: random.Random, image_size: int, patch_size: int) -> tuple[np.ndarray, np.ndarray]:
    """A scene's pixels [3, S, S] and patch labels [len(ATTRIBUTES), P, P]."""
    drawing = draw_with_boxes(scene, rng)
    if rng.random() < PHOTO_SHARE:
        drawing = _photographed(drawing, rng)
    pixels = resize_bicubic(image_to_tensor(drawing.picture), image_size, image_size).numpy()
    patches = image_size // patch_size
    labels = np.zeros((len(ATTRIBUTES), patches, patches), np.uint8)
    channels = dict(zip(ATTRIBUTES, labels, strict=True))
    channels["objects"][:] = 1 + len(scene.objects)
    for order, (thing, box) in enumerate(zip(scene.objects, drawing.boxes, strict=True)):
        covered = _covered(box, patches)
        channels["order"][covered] = 1 + order
        for name, values in OBJECT_ATTRIBUTES.items():
            channels[name][covered] = 1 + values.index(getattr(thing, name))
            if (same := f"same_{name}") in channels:
                channels[same][covered] = sum(getattr(other, name) == getattr(thing, name) for other in scene.objects)
    for letter, box in drawing.letters:
        assert scene.writing is not None
        covered = _covered(box, patches)
        channels["letter"][covered] = 1 + LETTERS.index(letter)
        channels["text"][covered] = 1 + TEXTS.index(scene.writing.text)
    return pixels, labels


def _photographed(drawing: Drawing, rng: random.Random) -> Drawing:
    photo = photograph(drawing.picture, rng)
    letters = [(letter, photo.box(box)) for letter, box in drawing.letters]
    return Drawing(picture=photo.picture, boxes=[photo.box(box) for box in drawing.boxes], letters=letters)


def _covered(box: Box, patches: int) -> tuple[np.ndarray, ...]:
    """Index of the patches whose centre a box covers, and of that which holds the centre of a small one."""
    left, top, right, bottom = box
    centres = (np.arange(patches) + 0.5) / patches
    rows = (centres > top) & (centres < bottom) | (np.arange(patches) == int((top + bottom) / 2 * patches))
    columns = (centres > left) & (centres < right) | (np.arange(patches) == int((left + right) / 2 * patches))
    return np.ix_(rows, columns)


def _scene(fields: dict) -> Scene:
    writing = fields["writing"]
    objects = tuple(SceneObject(**thing) for thing in fields["objects"])
    return Scene(objects, fields["background"], writing and Writing(**writing))


def _path(folder: Path, index: int) -> Path:
    return folder / f"scenes-{index:04d}.npz"
