"""What the frozen image encoder makes of each picture, computed once.

Kept in memory up to a limit, the least recently used forgotten first, and, if a folder is given, on disk: one file a
picture under the encoder's fingerprint, so that ranks, runs and recipes share them.
"""

from __future__ import annotations

import hashlib
import logging
from collections import OrderedDict
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from moshivis.checkpoints.fingerprint import fingerprint
from moshivis.checkpoints.tensors import write_tensors
from moshivis.errors import InputError
from moshivis.files import atomic_write
from moshivis.training.learner import Features
from moshivis.vision import VisionEncoder, read_image, to_pixels

_log = logging.getLogger(__name__)


class FeatureCache:
    """Pictures by key -> encoder outputs, [S, D_enc] each, in `dtype`."""

    def __init__(
        self,
        encoder: VisionEncoder,
        picture: Callable[[str], bytes],
        *,
        dtype: torch.dtype,
        memory_mib: int,
        folder: Path | None = None,
        batch: int = 8,
    ):
        self.encoder, self.picture, self.dtype = encoder, picture, dtype
        self.device = next(encoder.parameters()).device
        self.limit = memory_mib * 2**20
        # One by one on a CPU: as fast, and the last bit never depends on which pictures are asked for together.
        self.batch = 1 if self.device.type == "cpu" else batch
        self.folder: Path | None = None
        if folder is not None:
            mark = fingerprint(encoder.config, dict(encoder.named_parameters()))
            self.folder = folder / f"{mark[:16]}-{str(dtype).removeprefix('torch.')}"
        self.held: OrderedDict[str, Tensor] = OrderedDict()
        self.bytes = 0
        self._unwritable = False
        self.encoded = 0  # pictures that went through the encoder

    def features(self, keys: Sequence[str | None]) -> Features:
        """Of the rows of a part; None = a row without picture. Raises InputError for a picture that cannot be read."""
        found = self.get([key for key in keys if key is not None])
        none = torch.zeros(1, self.encoder.config.hidden_size, dtype=self.dtype)
        rows = [none if key is None else found[key] for key in keys]
        values = pad_sequence(rows, batch_first=True)
        lengths = torch.tensor([0 if key is None else len(row) for key, row in zip(keys, rows, strict=True)])
        mask = torch.arange(values.shape[1]) < lengths[:, None]
        return Features(*(x.to(self.device) for x in (values, mask, lengths > 0)))

    def get(self, keys: Sequence[str]) -> dict[str, Tensor]:
        """Features by key, on the CPU."""
        found: dict[str, Tensor] = {}
        missing: list[str] = []
        for key in dict.fromkeys(keys):
            tensor = self.held.get(key)
            if tensor is None and (tensor := self._read(key)) is not None:
                self._hold(key, tensor)
            if tensor is None:
                missing.append(key)
            else:
                found[key] = tensor
                if key in self.held:
                    self.held.move_to_end(key)
        for begin in range(0, len(missing), self.batch):
            some = missing[begin : begin + self.batch]
            for key, tensor in zip(some, self._encode(some), strict=True):
                found[key] = tensor
                self._write(key, tensor)
                self._hold(key, tensor)
        return found

    @torch.no_grad()
    def _encode(self, keys: Sequence[str]) -> list[Tensor]:
        pixels = [self._pixels(key) for key in keys]
        weight = next(self.encoder.parameters())
        padded, mask = self.encoder.encode_many([image.to(weight.device, weight.dtype) for image in pixels])
        self.encoded += len(keys)
        features = padded.to(self.dtype).cpu()
        return [row[kept].clone() for row, kept in zip(features, mask.cpu(), strict=True)]

    def _pixels(self, key: str) -> Tensor:
        try:
            return to_pixels(read_image(self.picture(key)), self.encoder.config)
        except InputError as error:
            raise InputError(f"the picture {key} of the training data: {error}") from error

    def _hold(self, key: str, tensor: Tensor) -> None:
        if tensor.nbytes > self.limit:
            return
        self.held[key] = tensor
        self.bytes += tensor.nbytes
        while self.bytes > self.limit:
            self.bytes -= self.held.popitem(last=False)[1].nbytes

    def _file(self, key: str) -> Path | None:
        if self.folder is None:
            return None
        name = hashlib.sha256(key.encode()).hexdigest()  # a key may hold anything, a path's separators too
        return self.folder / name[:2] / f"{name}.safetensors"

    def _read(self, key: str) -> Tensor | None:
        file = self._file(key)
        if file is None or not file.is_file():
            return None
        try:
            return load_file(file)["features"]
        except (OSError, SafetensorError, KeyError):
            return None  # damaged or out of reach: it is computed again and replaced

    def _write(self, key: str, tensor: Tensor) -> None:
        file = self._file(key)
        if file is None or self._unwritable:
            return
        try:
            with atomic_write(file) as temporary:
                write_tensors({"features": tensor}, temporary)
        except OSError as error:  # a full disk costs time, not the training
            self._unwritable = True
            _log.warning("%s cannot be written, so further pictures' features are not kept on disk: %s", file, error)
