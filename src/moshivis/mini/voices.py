"""The voices of the miniature world, spoken by Debian's text-to-speech programs.

Users speak with eleven espeak-ng voices and three flite voices, with varying pitch and speed; flite's `rms` is kept
out of training. The assistant has one voice, festival's `cmu_us_slt_arctic_hts` (32 kHz). Lowered, it is one more user
of training: beside flite's `awb` the only one that is a model of a person's recorded sentences, as `rms` is. All audio
becomes mono float32 at 24 kHz, trimmed of outer silence and brought to one loudness.

Word times are exact for festival, which reports them, and for the other programs estimated from the share of
characters of each word in the voiced span.
"""

import random
import re
import shutil
import subprocess
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import soundfile
import soxr

from moshivis.errors import InputError

SAMPLE_RATE = 24_000
LOUDNESS_DBFS = -23.0  # root mean square of the active speech
_MARGIN_S = 0.03  # kept before the first and after the last audible sample
_FESTIVAL_BATCH = 100  # its start takes about a second, a sentence about 70 ms
_PACKAGES = {"espeak-ng": "espeak-ng", "flite": "flite", "festival": "festival festvox-us-slt-hts"}


@dataclass(frozen=True, kw_only=True)
class Voice:
    """A speaker: `engine` is the program, `model` its voice name, `role` user, heldout or assistant."""

    name: str
    engine: str
    model: str
    role: str


@dataclass(frozen=True)
class Word:
    """A word as written, with its start and end in seconds."""

    text: str
    start: float
    end: float


@dataclass(frozen=True, kw_only=True)
class Utterance:
    """Spoken text: mono float32 audio `[samples]` at 24 kHz, and when each written word is heard."""

    audio: np.ndarray
    text: str
    words: tuple[Word, ...]
    voice: str


def _espeak(model: str) -> Voice:
    return Voice(name=f"espeak-{model}", engine="espeak-ng", model=model, role="user")


USER_VOICES = (
    _espeak("en-us"),
    Voice(name="flite-kal16", engine="flite", model="kal16", role="user"),
    _espeak("en-gb+f2"),
    Voice(name="flite-awb", engine="flite", model="awb", role="user"),
    _espeak("en-gb-scotland"),
    _espeak("en-us+f4"),
    Voice(name="flite-kal", engine="flite", model="kal", role="user"),
    _espeak("en-gb-x-rp+m3"),
    _espeak("en-029+f1"),
    _espeak("en-us+m7"),
    _espeak("en-gb"),
    _espeak("en-gb-x-gbcwmd+m1"),
    _espeak("en-us+f3"),
    _espeak("en-gb+m5"),
)
HELD_OUT_VOICE = Voice(name="flite-rms", engine="flite", model="rms", role="heldout")
ASSISTANT_VOICE = Voice(name="festival-slt", engine="festival", model="cmu_us_slt_arctic_hts", role="assistant")
LOWERED_VOICE = Voice(name="festival-slt-lowered", engine="festival", model=ASSISTANT_VOICE.model, role="user")
TRAINING_VOICES = (*USER_VOICES, LOWERED_VOICE)


def require(engine: str) -> str:
    """Path of a speech program. Raises InputError naming the Debian package if it is not installed."""
    path = shutil.which(engine)
    if path is None:
        raise InputError(f"the speech program '{engine}' is not installed: apt-get install {_PACKAGES[engine]}")
    return path


def synthesise(voice: Voice, texts: Sequence[str], rng: random.Random) -> Iterator[Utterance]:
    """Speak each text, in order; user voices vary in pitch and speed by `rng`.

    Raises InputError if the program is not installed, does not know the voice, or does not speak.
    """
    program = require(voice.engine)
    _require_model(program, voice)
    with tempfile.TemporaryDirectory(prefix="voices-") as folder:
        if voice.engine == "festival":
            for first in range(0, len(texts), _FESTIVAL_BATCH):
                yield from _festival(program, voice, texts[first : first + _FESTIVAL_BATCH], Path(folder), rng)
            return
        speak = _speak_espeak if voice.engine == "espeak-ng" else _speak_flite
        wave = Path(folder) / "speech.wav"
        for text in texts:
            speak(program, voice, text, wave, rng)
            speed = rng.uniform(0.88, 1.13)  # shifts the formants too: more speakers than the programs have
            audio, _ = trim(_read(wave, speed))
            yield Utterance(audio=loudness(audio), text=text, words=spread_words(text, audio), voice=voice.name)


# ----------------------------------------------------------------------------------------------------------------------
# The programs


def _require_model(program: str, voice: Voice) -> None:
    """espeak-ng and flite speak with another voice, without a word, if they do not know the one asked for."""
    if voice.engine == "festival":
        return
    listings = ("--voices=en", "--voices=variant") if voice.engine == "espeak-ng" else ("-lv",)
    known = " ".join(
        subprocess.run([program, listing], capture_output=True, text=True, check=False).stdout for listing in listings
    ).split()
    language, _, variant = voice.model.partition("+")
    if language not in known or (variant and f"!v/{variant}" not in known):
        raise InputError(f"{program} has no voice '{voice.model}': apt-get install {_PACKAGES[voice.engine]}")


def _speak_espeak(program: str, voice: Voice, text: str, wave: Path, rng: random.Random) -> None:
    pitch, speed = rng.randint(30, 70), rng.randint(135, 185)
    _run([program, "-v", voice.model, "-p", str(pitch), "-s", str(speed), "-w", str(wave), text], wave)


def _speak_flite(program: str, voice: Voice, text: str, wave: Path, rng: random.Random) -> None:
    command = [program, "-voice", voice.model, "--setf", f"duration_stretch={rng.uniform(0.9, 1.15):.3f}"]
    if voice.model.startswith("kal"):
        command += ["--setf", f"int_f0_target_mean={rng.uniform(85, 135):.1f}"]
    _run([*command, "-t", text, "-o", str(wave)], wave)


# Phrases end at punctuation alone: else a break that only what follows explains makes the word before it twice as long.
_FESTIVAL_SCRIPT = """
(voice_{model})
(Parameter.set 'Phrase_Method 'cart_tree)
(set! phrase_cart_tree simple_phrase_cart_tree)
(define (speak_one text name)
  (let ((utt (utt.synth (eval (list 'Utterance 'Text text)))) (file (fopen (string-append name ".words") "w")))
    (utt.save.wave utt (string-append name ".wav") 'riff)
    (mapcar
      (lambda (token)
        (let ((words (item.daughters token)))
          (if words
            (begin
              (format file "%f" (item.feat (car words) "word_start"))
              (mapcar (lambda (word) (format file " %f" (item.feat word "word_end"))) words)
              (format file "\\n")))))
      (utt.relation.items utt 'Token))
    (fclose file)))
"""

_FESTIVAL_TEMPO = '(set! hts_engine_params (append {model}::hts_engine_params (list (list "-r" {tempo:.3f}))))'


def _festival(
    program: str, voice: Voice, texts: Sequence[str], folder: Path, rng: random.Random
) -> Iterator[Utterance]:
    script = folder / "speak.scm"
    lines = [_FESTIVAL_SCRIPT.format(model=voice.model)]
    lowered = voice == LOWERED_VOICE
    # A tape that runs slower gives a lower voice and a longer throat; speaking faster makes up for the time.
    tapes = [rng.uniform(0.68, 0.92) if lowered else 1.0 for _ in texts]
    for index, text in enumerate(texts):
        if lowered:
            lines.append(_FESTIVAL_TEMPO.format(model=voice.model, tempo=rng.uniform(0.9, 1.15) / tapes[index]))
        quoted = text.replace("\\", "").replace('"', "")
        lines.append(f'(speak_one "{quoted}" "{folder / str(index)}")')
    script.write_text("\n".join(lines))
    last = folder / f"{len(texts) - 1}.wav"
    _run([program, "-b", str(script)], last, hint=" (is festvox-us-slt-hts installed?)")
    for index, text in enumerate(texts):
        audio, cut = trim(_read(folder / f"{index}.wav", tapes[index]))
        written = [word for word in text.split() if re.search(r"\w", word)]
        lines = (folder / f"{index}.words").read_text().splitlines()
        times = [[float(time) / tapes[index] for time in line.split()] for line in lines]
        if len(written) == len(times):
            limit = len(audio) / SAMPLE_RATE
            # A token's last part may be its punctuation, which takes no time: the latest end counts.
            spans = [(min(max(t - cut, 0.0), limit) for t in (start, max(ends))) for start, *ends in times]
            words = tuple(Word(w, round(a, 3), round(b, 3)) for w, (a, b) in zip(written, spans, strict=True))
        else:  # a token that festival splits or drops
            words = spread_words(text, audio)
        yield Utterance(audio=loudness(audio), text=text, words=words, voice=voice.name)
    for path in folder.iterdir():
        path.unlink()


def _run(command: list[str], wave: Path, hint: str = "") -> None:
    wave.unlink(missing_ok=True)
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode or not wave.exists():
        raise InputError(f"{command[0]} could not speak{hint}: {done.stderr.strip() or 'no audio was written'}")


def _read(wave: Path, speed: float = 1.0) -> np.ndarray:
    audio, rate = soundfile.read(wave, dtype="float32", always_2d=True)
    if speed == 1.0 and rate == SAMPLE_RATE:
        return audio[:, 0]
    return soxr.resample(audio[:, 0], rate * speed, SAMPLE_RATE)


# ----------------------------------------------------------------------------------------------------------------------
# Audio


def trim(audio: np.ndarray) -> tuple[np.ndarray, float]:
    """Audio `[samples]` without its outer silence, and the seconds cut at the start.

    Raises InputError if nothing is audible.
    """
    loud = np.flatnonzero(np.abs(audio) > 0.02 * np.max(np.abs(audio), initial=0.0) + 1e-5)
    if not len(loud):
        raise InputError("the speech program wrote silence")
    margin = int(_MARGIN_S * SAMPLE_RATE)
    start = max(0, int(loud[0]) - margin)
    return audio[start : int(loud[-1]) + margin], start / SAMPLE_RATE


def loudness(audio: np.ndarray) -> np.ndarray:
    """Audio `[samples]` scaled so that its active frames have `LOUDNESS_DBFS`, never clipping."""
    frames = audio[: len(audio) // 480 * 480].reshape(-1, 480)
    power = np.mean(np.square(frames), axis=1)
    active = power[power > 0.01 * power.max(initial=0.0)]
    level = np.sqrt(active.mean()) if len(active) else np.abs(audio).max(initial=1e-9)
    gain = min(10 ** (LOUDNESS_DBFS / 20) / max(level, 1e-9), 0.99 / max(np.abs(audio).max(initial=0.0), 1e-9))
    return (audio * gain).astype(np.float32)


def spread_words(text: str, audio: np.ndarray) -> tuple[Word, ...]:
    """Estimated word times: the voiced span is shared out by characters, pauses and punctuation counting as some."""
    written = [word for word in text.split() if re.search(r"\w", word)]
    # A short word takes more time than its letters say; a pause follows punctuation inside the text.
    sounds = [len(re.sub(r"\W", "", word)) + 1.0 for word in written]
    pauses = [3.0 if re.search(r"[,.:;?!]$", word) else 0.0 for word in written[:-1]] + [0.0]
    span = len(audio) / SAMPLE_RATE - 2 * _MARGIN_S
    unit = span / max(sum(sounds) + sum(pauses), 1e-9)
    words, clock = [], _MARGIN_S
    for word, sound, pause in zip(written, sounds, pauses, strict=True):
        words.append(Word(word, round(clock, 3), round(clock + sound * unit, 3)))
        clock += (sound + pause) * unit
    return tuple(words)
