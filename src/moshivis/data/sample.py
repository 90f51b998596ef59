"""A conversation ready for training: the tokens of all streams, and which of them are targets.

A speech sample has audio codes of both sides and the assistant's text at the frames where it is spoken. A speechless
sample is the text of both sides and nothing else (paper section 3.2). Either may have a picture; a general dialogue has
none.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntEnum
from typing import Literal, Protocol

import numpy as np

Kind = Literal["speech", "speechless"]


class Speaker(IntEnum):
    """Whom a token of the text stream belongs to."""

    NOBODY = 0  # padding
    ASSISTANT = 1  # words, and the end of padding before them
    USER = 2  # of speechless samples only: spoken words of the user are in no text stream


@dataclass(frozen=True, kw_only=True)
class Sample:
    """T steps: frames of 80 ms in a speech sample, tokens in a speechless one."""

    text: np.ndarray  # [T] int32
    speaker: np.ndarray  # [T] uint8, of Speaker
    # [own + user codebooks, T] int16: what is said and what is heard in a step (`encode.HEARD_LATE`), not delayed,
    # -1 where unknown; None: speechless
    audio: np.ndarray | None = None
    image: str | None = None  # key of the picture in the dataset's pictures
    text_graded: np.ndarray | None = None  # [T] bool, text tokens that are targets; None: all
    audio_graded: np.ndarray | None = None  # [T] bool, frames whose own codes are targets; None: all
    origin: str = ""  # where it came from, for messages

    def __len__(self) -> int:
        return len(self.text)

    @property
    def kind(self) -> Kind:
        return "speechless" if self.audio is None else "speech"


class Dataset(Protocol):
    """An endless, deterministic sequence of samples of one kind: the same position always gives the same sample.

    Stored samples come in an order that is shuffled anew every epoch; generated ones are drawn for their position.
    So a training run resumes, and is shared between ranks and workers, by positions alone.
    """

    name: str
    kind: Kind

    def __getitem__(self, position: int) -> Sample: ...

    def picture(self, key: str) -> bytes:
        """The file of a picture that a sample of this dataset names in `image`; KeyError for any other key.

        Equal keys mean equal pictures, in all datasets.
        """
        ...


def skipped(dataset: Dataset) -> int:
    """How often a dataset has given another sample for one that it could not read; most datasets never do."""
    return int(getattr(dataset, "skipped", 0))
