"""The cache of encoder outputs: what it holds, forgets, keeps on disk and refuses."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from moshivis.errors import InputError
from moshivis.model import MoshiVis
from moshivis.training.features import FeatureCache
from moshivis.vision import VisionEncoder, read_image, to_pixels
from training_support import picture

SIZE = 4 * 32 * 4  # bytes of a picture's features: four patches, width 32, float32


@pytest.fixture
def encoder(tiny_model: MoshiVis) -> VisionEncoder:
    assert tiny_model.vision is not None
    return tiny_model.vision.encoder


def cache(encoder: VisionEncoder, **more: object) -> FeatureCache:
    usual = {"dtype": torch.float32, "memory_mib": 1}
    return FeatureCache(encoder, picture, **{**usual, **more})  # type: ignore[arg-type]


def test_a_picture_is_encoded_once_and_as_the_encoder_does(encoder: VisionEncoder) -> None:
    features = cache(encoder)
    first = features.features(["red", None, "blue", "red"])
    assert features.encoded == 2
    assert first.present.tolist() == [True, False, True, True]
    assert first.mask.sum(1).tolist() == [4, 0, 4, 4]
    with torch.no_grad():
        direct = encoder(to_pixels(read_image(picture("blue")), encoder.config)[None])[0]
    assert first.values[2].equal(direct) and first.values[0].equal(first.values[3])
    features.features(["blue"])
    assert features.encoded == 2
    assert features.features([None, None]).values.shape == (2, 1, 32)


def test_the_least_recently_used_is_forgotten(encoder: VisionEncoder) -> None:
    features = cache(encoder)
    features.limit = SIZE
    features.get(["red"])
    features.get(["blue"])
    assert list(features.held) == ["blue"] and features.bytes == SIZE
    features.get(["red"])
    assert features.encoded == 3
    features.limit = 0
    features.held.clear()
    assert set(features.get(["red", "blue"])) == {"red", "blue"} and not features.held


def test_the_disk_keeps_them_and_damage_is_mended(encoder: VisionEncoder, tmp_path: Path) -> None:
    first = cache(encoder, folder=tmp_path).get(["red", "blue"])
    again = cache(encoder, folder=tmp_path)
    assert again.get(["red"])["red"].equal(first["red"]) and again.encoded == 0
    files = sorted(tmp_path.rglob("*.safetensors"))
    assert len(files) == 2
    for file in files:
        file.write_bytes(file.read_bytes()[:20])
    mended = cache(encoder, folder=tmp_path)
    assert mended.get(["red"])["red"].equal(first["red"]) and mended.encoded == 1
    half = cache(encoder, folder=tmp_path, dtype=torch.bfloat16)
    assert half.get(["blue"])["blue"].dtype == torch.bfloat16 and half.encoded == 1


def test_pictures_encoded_together_are_those_encoded_alone(encoder: VisionEncoder) -> None:
    alone, together = cache(encoder), cache(encoder)
    together.batch = 2  # as on an accelerator
    for key, features in together.get(["red", "blue"]).items():
        torch.testing.assert_close(features, alone.get([key])[key])


def test_a_damaged_picture_is_named(encoder: VisionEncoder) -> None:
    features = FeatureCache(encoder, lambda key: b"no picture", dtype=torch.float32, memory_mib=1)
    with pytest.raises(InputError, match="the picture sunset of the training data: .*not a picture"):
        features.features(["sunset"])
