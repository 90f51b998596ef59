"""`load()` a model and talk with it: one conversation, frame by frame, or in writing.

assistant = moshivis.load()
conversation = assistant.conversation(image="picture.png")
result = conversation.step(frame)  # 80 ms of sound in, 80 ms of sound and a piece of text out
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from PIL import Image

from moshivis.adapters.gated_cross_attention import ImageKV
from moshivis.audio import SAMPLE_RATE, float_samples
from moshivis.checkpoints.adapters import load_adapters, require_adapters
from moshivis.checkpoints.folder import SAMPLING, is_our_folder
from moshivis.checkpoints.load import HUB, find_folder, load_model
from moshivis.devices import has_bfloat16, usable_device
from moshivis.errors import CheckpointError, InputError
from moshivis.inference.duplex import Duplex, DuplexState
from moshivis.inference.rows import RowSettings
from moshivis.inference.sampling import RELEASED_SAMPLING, Sampling
from moshivis.inference.written import WrittenStream
from moshivis.model import MoshiVis
from moshivis.speech_lm.tokenizer import TextStream, TextTokenizer
from moshivis.vision.image import read_image, to_pixels

EMBEDDED = {"mini": Path(__file__).parents[1] / "mini" / "weights"}  # models that come with the package
SMALL = 200_000_000  # parameters

Picture = str | os.PathLike[str] | bytes | Image.Image | ImageKV


def load(
    name_or_path: str | os.PathLike[str] = "mini",
    *,
    device: torch.device | str = "cpu",
    dtype: torch.dtype | None = None,
    download: bool = False,
    adapters: str | os.PathLike[str] | None = None,
) -> Assistant:
    """Load the embedded model, a folder in our or the released format, or a repository of the Hugging Face Hub.

    A repository, `owner/name`, is fetched only with `download`, or if it is named `hf://owner/name`. `dtype` None is
    float32 on a CPU (for models beyond a billion parameters, and on other devices, the stored one). `adapters` names
    a file that a training run left; what is in it takes the place of the model's own adapters.
    Raises InputError for an unknown name or a device that is not there, CheckpointError for a damaged model.
    """
    usable_device(device)
    if adapters is not None:
        require_adapters(adapters)  # before a model is fetched, which takes long
    folder = _find(os.fspath(name_or_path), download)
    checkpoint = load_model(folder, device, dtype)
    if checkpoint.tokenizer is None:
        raise CheckpointError(f"{folder} holds no tokenizer, so it cannot be talked with")
    if adapters is not None:
        load_adapters(Path(adapters), checkpoint.model)
    if not has_bfloat16(torch.device(device).type):
        _look_in_float32(checkpoint.model)
    return Assistant(checkpoint.model, checkpoint.tokenizer, sampling_from(checkpoint.sampling, folder / SAMPLING))


def _look_in_float32(model: MoshiVis) -> None:
    """Encode pictures in float32: large products, which take minutes where bfloat16 is emulated. Frames are small."""
    if model.vision is not None and model.adapters is not None:
        model.vision.float()
        model.adapters.key_value.float()


def _find(name: str, download: bool) -> Path:
    if name in EMBEDDED:
        folder = EMBEDDED[name]
        if not is_our_folder(folder):
            raise CheckpointError(
                f"this installation does not hold the embedded model {name!r} ({folder} is missing); "
                "build it with: python -m moshivis.mini build"
            )
        return folder
    if Path(name).exists() or name.startswith(HUB) or (download and name.count("/") == 1):
        return find_folder(name, allow_download=download)
    raise InputError(
        f"there is no model {name!r}: neither a folder of that name nor one of the models that come with the package "
        f"({', '.join(EMBEDDED)}). A repository of the Hugging Face Hub (kyutai/moshika-vis-pytorch-bf16) is fetched "
        "only when asked, with --download or load(..., download=True)"
    )


def sampling_from(values: Mapping[str, Any] | None, file: Path) -> Sampling:
    """What a checkpoint's sampling.json says; the released way without one. Raises CheckpointError naming the file."""
    if values is None:
        return RELEASED_SAMPLING
    known = {field.name for field in dataclasses.fields(Sampling)} - {"generators"}
    if not set(values) <= known or not all(isinstance(value, int | float) for value in values.values()):
        raise CheckpointError(f"{file} must give numbers for some of {', '.join(sorted(known))}")
    sampling = Sampling(**values)
    try:
        RowSettings.usual(sampling).check()
    except InputError as error:
        raise CheckpointError(f"{file}: {error}") from error
    return sampling


@dataclass(frozen=True, kw_only=True)
class TextPiece:
    """A token of the assistant's text stream."""

    frame: int  # spoken: number of the 80 ms frame; written: number of the token in the stream
    token: int | None  # None in a frame that is not complete yet
    text: str  # '' for padding, a leading space where a word begins
    gate: float  # how much the adapters let through, averaged as the release does; 0 without image


@dataclass(frozen=True, kw_only=True, eq=False)
class StepResult(TextPiece):
    """What the assistant says in one frame."""

    audio: NDArray[np.float32]  # [frame_size]


class Assistant:
    """A loaded model, its tokenizer and its usual way of sampling. Holds no conversation."""

    def __init__(self, model: MoshiVis, tokenizer: TextTokenizer, sampling: Sampling = RELEASED_SAMPLING):
        card = model.config.speech_lm.text_card
        if len(tokenizer) != card:
            raise CheckpointError(f"the tokenizer has {len(tokenizer)} pieces, but the model predicts {card}")
        if model.config.codec.sample_rate != SAMPLE_RATE:
            raise CheckpointError(
                f"the model's codec runs at {model.config.codec.sample_rate} Hz; one can only talk at {SAMPLE_RATE} Hz"
            )
        self.model = model.eval().requires_grad_(False)
        self.config = model.config
        self.tokenizer = tokenizer
        self.sampling = sampling
        self.duplex = Duplex(model)

    @property
    def device(self) -> torch.device:
        return self.model.speech_lm.text_head.weight.device

    @property
    def emulated(self) -> bool:
        """Whether the model is in bfloat16 on a device without instructions for it: batches then take long."""
        dtype = self.model.speech_lm.text_head.weight.dtype
        return dtype == torch.bfloat16 and not has_bfloat16(self.device.type)

    @property
    def threads(self) -> int | None:
        """Threads that a frame is fastest with: one for a small model on a CPU, where several wait for each other.

        None is torch's choice, also where the environment says how many.
        """
        small = sum(parameter.numel() for parameter in self.model.parameters()) <= SMALL
        return 1 if small and self.device.type == "cpu" and "OMP_NUM_THREADS" not in os.environ else None

    @property
    def frame_size(self) -> int:
        """Samples a frame."""
        return self.config.codec.frame_size

    @torch.inference_mode()
    def look(self, picture: Picture) -> ImageKV:
        """Keys and values of one picture, for any number of conversations.

        Raises InputError if it is not a picture, is too large, or if the model cannot see.
        """
        if isinstance(picture, ImageKV):
            return picture
        pixels = to_pixels(read_image(picture), self.config.vision)
        if self.model.vision is None or self.model.adapters is None:
            raise InputError(f"the model {self.config.name} has no adapters: it cannot look at a picture")
        weight = next(self.model.vision.parameters())
        tokens = self.model.vision(pixels[None].to(weight.device, weight.dtype))
        return self.model.adapters.encode(tokens, streaming=True).to(self.model.speech_lm.text_head.weight.dtype)

    def conversation(
        self, image: Picture | None = None, *, seed: int = 0, sampling: Sampling | None = None
    ) -> Conversation:
        """A new conversation about a picture, or about none. The same seed gives the same conversation.

        Raises InputError as `look` does.
        """
        return Conversation(self, image, seed, sampling or self.sampling)

    def warm_up(self, frames: int = 4) -> None:
        """Run frames of silence that nobody hears, so that the first real one is as fast as the others."""
        picture = Image.new("RGB", (224, 224)) if self.model.adapters is not None else None
        conversation = self.conversation(picture)
        for _ in range(frames):
            conversation.step(np.zeros(self.frame_size, np.float32))


class Conversation:
    """One conversation: a batch of one row. It is either spoken (`step`) or written (`say_text`), not both."""

    def __init__(self, assistant: Assistant, image: Picture | None, seed: int, sampling: Sampling):
        self.assistant = assistant
        self._random = torch.Generator(assistant.device).manual_seed(seed)
        self._sampling = dataclasses.replace(sampling, generators=self._random)
        self._spoken: DuplexState | None = None  # made when the first word falls: a written conversation needs none
        self._spoken_frames = 0
        self._said = TextStream(assistant.tokenizer)
        self._written: WrittenStream | None = None
        self._image: ImageKV | None = None
        self.set_image(image)

    @property
    def frame(self) -> int:
        """Frames taken, or, in a written conversation, tokens."""
        return self._spoken_frames if self._written is None else self._written.tokens

    def set_image(self, image: Picture | None) -> None:
        """Show another picture from now on, or none. Raises InputError as `Assistant.look` does."""
        self._image = None if image is None else self.assistant.look(image)

    def step(self, frame: ArrayLike) -> StepResult:
        """The user's next 80 ms, float32 [frame_size] in -1..1, against the assistant's.

        The first frame of the assistant is silence: a frame is complete a step after its first token.
        Raises InputError for anything but one frame of finite numbers, or if the conversation is a written one.
        """
        if self._written is not None:
            raise InputError("this conversation is written; start another one to speak")
        samples = float_samples(frame)
        size = self.assistant.frame_size
        if samples.shape != (size,):
            raise InputError(f"a frame is {size} samples, not an array of shape {list(samples.shape)}")
        if not np.isfinite(samples).all():
            raise InputError(f"a frame is {size} finite samples; some of these are infinite or not numbers")
        if self._spoken is None:
            self._spoken = self.assistant.duplex.new_state(1)
        wave = torch.from_numpy(np.clip(samples, -1.0, 1.0)).to(self.assistant.device)
        result = self.assistant.duplex.step(self._spoken, wave[None, None], self._image, self._sampling)
        token = int(result.text) if bool(result.valid) else None
        self._spoken_frames += 1
        return StepResult(
            frame=self._spoken_frames - 1,
            token=token,
            text="" if token is None else self._said.push(token),
            gate=float(result.gate),
            audio=result.audio[0, 0].cpu().numpy(),
        )

    def greet_text(self) -> list[TextPiece]:
        """What the assistant writes before it is asked anything. A written conversation begins with it.

        Raises InputError if the conversation has begun already.
        """
        if self.frame:
            raise InputError("a greeting can only stand at the beginning of a conversation")
        self._written = WrittenStream(self.assistant.model, self._image)
        return self._reply()

    def say_text(self, question: str, *, greeted: bool = True) -> list[TextPiece]:
        """Write a question, and read the assistant's sentence: the paper's speechless form, which has no sound.

        The assistant greets before the first question (what it says is not returned), unless `greeted` is False: for
        models whose written dialogues the user opens.

        Raises InputError if the question holds no text, or if the conversation is a spoken one.
        """
        if self._spoken_frames:
            raise InputError("this conversation is spoken; start another one to write")
        tokens = self.assistant.tokenizer.encode(question)
        if not self.assistant.tokenizer.decode(tokens):  # of signs that it cannot spell a space is left
            raise InputError("the question is empty: it has no text that the model could read")
        if self._written is None and greeted:
            self.greet_text()
        if self._written is None:
            self._written = WrittenStream(self.assistant.model, self._image)
        self._written.push(tokens, self._image)
        return self._reply()

    def _reply(self) -> list[TextPiece]:
        written = self._written
        assert written is not None
        first = written.tokens + 1  # after the token that opens the sentence
        text = TextStream(self.assistant.tokenizer)
        said = written.reply(self._image, self._sampling)
        pieces = [TextPiece(frame=first + i, token=t, text=text.push(t), gate=gate) for i, (t, gate) in enumerate(said)]
        if rest := text.end():
            pieces[-1] = dataclasses.replace(pieces[-1], text=pieces[-1].text + rest)
        return pieces
