"""Cases of the image path: preprocessing, encoders and projection (`f.*`), and all of it up to tokens (`e2e.*`).

Runs are named `f.<image>`, `f.<image>.s<size>`, `f.batch` (all images of the case in one call), `e2e.<image>` and
`e2e.<image>.gen`; images `image.<name>` are uint8 [3, H, W].
"""

from __future__ import annotations

import copy
import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from moshivis.adapters.gated_cross_attention import ImageKV
from moshivis.conform.generate import generate
from moshivis.conform.parts import Built
from moshivis.inference.colour import RELEASED_SCALE
from moshivis.inference.sampling import GREEDY
from moshivis.vision.image import resize_bicubic, to_pixels

Results = dict[str, Tensor]


class ImageRuns:
    """Makes the runs of one case. `run` gives the tensors of a run, None if it does not know the run."""

    def __init__(self, built: Built, spec: Mapping[str, Any], inputs: Mapping[str, Tensor], dtype: torch.dtype):
        self.parts = copy.deepcopy(built.parts).to(dtype)
        assert self.parts.vision is not None
        self.vision = self.parts.vision
        self.extra = None if built.extra is None else copy.deepcopy(built.extra).to(dtype)
        self.spec = spec
        self.inputs = inputs
        self.images = {n.removeprefix("image."): t for n, t in inputs.items() if n.startswith("image.")}
        self.config = self.parts.config.vision
        self.weight = next(self.vision.parameters())

    def run(self, name: str, expected: Mapping[str, Tensor]) -> Results | None:
        """`expected` holds the case's tensors of this run, by the names that the result has."""
        if name == "f.batch":
            return self._batch()
        single = re.fullmatch(r"(?:f|e2e)\.(\w+?)(?:\.s(\d+))?", name)
        if single is not None and single[1] in self.images:
            size = int(single[2]) if single[2] else self.spec.get("server_size")
            return self._single(self.images[single[1]], size)
        generated = re.fullmatch(r"e2e\.(\w+)\.gen", name)
        if generated is not None and generated[1] in self.images and self.parts.speech_lm is not None:
            return self._generate(self.images[generated[1]], expected)
        return None

    def _single(self, image: Tensor, size: int | None) -> Results:
        pixels = to_pixels(image, self.config, size)
        results = {"pixel_values": pixels}
        if size is not None:
            results["resized"] = resize_bicubic(image, size, size)
        batch = pixels[None].to(self.weight)
        encoded = self.vision.encoder(batch)
        tokens = self.vision.projection(encoded)
        results |= {"encoded": encoded, "cross_attention_src": tokens}
        if self.config.encoder == "siglip":
            results["embeddings"] = self.vision.encoder.embed(batch)
        else:
            results["cross_attention_mask"] = torch.ones(tokens.shape[:2], dtype=torch.bool)
        if self.extra is not None:
            results["image_embeds"] = self.extra(encoded)
        image_kv = self._keys_values(tokens)
        if image_kv is not None:
            results["k"] = image_kv.keys[0].transpose(1, 2).flatten(2)
            results["v"] = image_kv.values[0].transpose(1, 2).flatten(2)
        return results

    def _batch(self) -> Results:
        size = self.spec.get("server_size")
        images = [to_pixels(image, self.config, size).to(self.weight) for image in self.images.values()]
        encoded, mask = self.vision.encoder.encode_many(images)
        results = {
            "encoded": encoded,
            "cross_attention_src": self.vision.projection(encoded),
            "cross_attention_mask": mask,
        }
        if self.extra is not None:
            results["image_embeds"] = self.extra(encoded)
        return results

    def _keys_values(self, tokens: Tensor) -> ImageKV | None:
        return None if self.parts.adapters is None else self.parts.adapters.encode(tokens, streaming=True)

    def _generate(self, image: Tensor, expected: Mapping[str, Tensor]) -> Results:
        pixels = to_pixels(image, self.config, self.spec.get("server_size"))
        image_kv = self._keys_values(self.vision(pixels[None].to(self.weight)))
        first = self.spec.get("src_from", 0)
        user = self.inputs["user"].to(self.weight.device)
        results = generate(self.parts, user, lambda step: image_kv if step >= first else None, GREEDY, expected)
        results["color"] = torch.tensor([RELEASED_SCALE.index(float(gate)) for gate in results["gate_weight"]])
        return results
