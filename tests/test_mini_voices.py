"""The miniature's voices, augmentation and clip shards; what needs a speech program is skipped where it is missing."""

import json
import random
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moshivis.errors import InputError
from moshivis.mini import clips, grammar, voices
from moshivis.mini.augment import another_throat, augment
from moshivis.mini.clips import ClipStore, build_clips, plan, write_shard
from moshivis.mini.questions import Query
from moshivis.mini.voices import (
    ASSISTANT_VOICE,
    HELD_OUT_VOICE,
    LOWERED_VOICE,
    SAMPLE_RATE,
    TRAINING_VOICES,
    USER_VOICES,
    Voice,
    synthesise,
)

ONE_OF_EACH = (USER_VOICES[0], USER_VOICES[1], LOWERED_VOICE, ASSISTANT_VOICE)


def needs(*engines: str) -> pytest.MarkDecorator:
    missing = [engine for engine in engines if shutil.which(engine) is None]
    return pytest.mark.skipif(bool(missing), reason=f"speech programs not installed: {', '.join(missing)}")


@pytest.mark.parametrize("voice", [pytest.param(v, id=v.name, marks=needs(v.engine)) for v in ONE_OF_EACH])
def test_speech_is_loud_trimmed_and_aligned(voice: Voice) -> None:
    texts = ["What colour is the star?", "There is a big red circle on the left"]
    spoken = list(synthesise(voice, texts, random.Random(0)))
    assert [utterance.text for utterance in spoken] == texts
    for text, utterance in zip(texts, spoken, strict=True):
        audio = utterance.audio
        assert audio.dtype == np.float32 and audio.ndim == 1
        seconds = len(audio) / SAMPLE_RATE
        assert 0.7 < seconds < 5
        assert -30 < 20 * np.log10(np.sqrt(np.mean(audio**2))) < -18
        assert np.abs(audio).max() < 1
        edge = int(0.08 * SAMPLE_RATE)
        assert np.abs(audio[:edge]).max() > 0.005 and np.abs(audio[-edge:]).max() > 0.001
        assert [word.text for word in utterance.words] == text.split()
        times = [time for word in utterance.words for time in (word.start, word.end)]
        assert times == sorted(times) and times[0] >= 0 and times[-1] <= seconds + 1e-3
        assert all(word.end - word.start > 0.02 for word in utterance.words)


@needs("festival")
@pytest.mark.parametrize("voice", [ASSISTANT_VOICE, LOWERED_VOICE], ids=lambda voice: voice.name)
def test_festival_word_times_follow_the_pause(voice: Voice) -> None:
    (utterance,) = synthesise(voice, ["The star is blue, so no."], random.Random(0))
    words = {word.text: word for word in utterance.words}
    pause = utterance.audio[int(words["blue,"].end * SAMPLE_RATE) : int(words["so"].start * SAMPLE_RATE)]
    assert len(pause) > 0.05 * SAMPLE_RATE
    assert np.sqrt(np.mean(pause**2)) < 0.15 * np.sqrt(np.mean(utterance.audio**2))


@needs("festival")
def test_the_lowered_voice_is_lower_and_takes_no_more_time() -> None:
    """By the first peak of the autocorrelation, in the middle of words."""
    texts = ["Where is the big yellow heart?"] * 6
    own, lowered = (list(synthesise(v, texts, random.Random(0))) for v in (ASSISTANT_VOICE, LOWERED_VOICE))
    pitch = [np.median([_pitch(word, said.audio) for word in said.words]) for said in (*own, *lowered)]
    usual = np.median(pitch[:6])
    assert 150 < usual < 210
    assert all(0.6 < low / usual < 0.97 for low in pitch[6:]), pitch
    for said in lowered:
        assert 0.8 < len(said.audio) / len(own[0].audio) < 1.25
    assert len({len(said.audio) for said in lowered}) == len(texts)


def _pitch(word: voices.Word, audio: np.ndarray) -> float:
    middle = int((word.start + word.end) / 2 * SAMPLE_RATE)
    part = audio[max(0, middle - 1000) : middle + 1000]
    same = np.correlate(part, part, "full")[len(part) - 1 :]
    shortest = SAMPLE_RATE // 300
    return SAMPLE_RATE / (shortest + int(same[shortest : SAMPLE_RATE // 80].argmax()))


@needs("espeak-ng")
def test_user_voices_vary_and_repeat_by_seed() -> None:
    text = ["Where is the heart?"]
    first, second, again = (next(synthesise(USER_VOICES[0], text, random.Random(seed))).audio for seed in (1, 2, 1))
    assert np.array_equal(first, again)
    assert len(first) != len(second)


def test_a_missing_program_is_named_with_its_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    with pytest.raises(InputError, match="festvox-us-slt-hts"):
        next(synthesise(ASSISTANT_VOICE, ["Hello."], random.Random(0)))
    with pytest.raises(InputError, match="apt-get install flite"):
        next(synthesise(HELD_OUT_VOICE, ["Hello."], random.Random(0)))


@pytest.mark.parametrize(
    ("engine", "model", "message"),
    [
        pytest.param("espeak-ng", "en-us+zz9", "has no voice", marks=needs("espeak-ng")),
        pytest.param("flite", "nobody", "has no voice", marks=needs("flite")),
        pytest.param("festival", "nobody", "could not speak", marks=needs("festival")),
    ],
)
def test_an_unknown_voice_is_refused(engine: str, model: str, message: str) -> None:
    voice = Voice(name="nobody", engine=engine, model=model, role="user")
    with pytest.raises(InputError, match=message):
        next(synthesise(voice, ["Hello."], random.Random(0)))


def test_silence_is_refused_and_loudness_is_one() -> None:
    with pytest.raises(InputError, match="silence"):
        voices.trim(np.zeros(1000, np.float32))
    tone = np.sin(np.arange(24_000) / 10).astype(np.float32)
    for gain in (0.01, 0.9):
        level = 20 * np.log10(np.sqrt(np.mean(voices.loudness(gain * tone) ** 2)))
        assert level == pytest.approx(voices.LOUDNESS_DBFS, abs=0.1)


@pytest.fixture(scope="module")
def shards() -> list[clips.PlannedShard]:
    """The whole plan."""
    return plan()


def test_the_plan_covers_the_world_without_the_held_out_voice(shards: list[clips.PlannedShard]) -> None:
    assert [shard.index for shard in shards] == list(range(len(shards)))
    assert plan()[5] == shards[5]
    spoken = {voice: [c for s in shards if s.voice == voice for c in s.clips] for voice in {s.voice for s in shards}}
    assert set(spoken) == {*TRAINING_VOICES, ASSISTANT_VOICE} and HELD_OUT_VOICE not in spoken
    for voice in TRAINING_VOICES:
        kinds = [clip.kind for clip in spoken[voice]]
        rounds = 2 if voice.engine == "flite" else 1
        assert kinds.count("question") == 800 + 3500 + 750 * rounds
        assert kinds.count("there") == kinds.count("and") == 220 * rounds and kinds.count("whole") == 40 * rounds
    texts = {clip.text for clip in spoken[ASSISTANT_VOICE]}
    assert {*grammar.all_answers(), *grammar.repeated_claims(), *grammar.GREETINGS} <= texts
    assert {s.voice.name for s in shards[:19]} == {voice.name for voice in spoken}  # every voice is heard early


def test_a_question_clip_can_be_asked_of_another_scene(shards: list[clips.PlannedShard]) -> None:
    questions = [clip for shard in shards[4:6] for clip in shard.clips if clip.kind == "question"]
    for clip in questions:
        query = Query.from_dict(json.loads(json.dumps(clip.meta["query"])))
        assert query.text == clip.text


@pytest.fixture
def small_plan(shards: list[clips.PlannedShard]) -> list[clips.PlannedShard]:
    """A few clips of every kind, as three shards."""
    first, described = shards[0], next(s for s in shards if s.clips[0].kind.startswith("describe"))
    kinds = {clip.kind: clip for clip in shards[4].clips}
    assert set(kinds) == {"there", "and", "there_text", "and_text", "question", "whole"}
    parts = (first.clips[:3], tuple(kinds.values()), described.clips[:3])
    chosen = zip((first, shards[4], described), parts, strict=True)
    return [replace(shard, index=i, clips=some) for i, (shard, some) in enumerate(chosen)]


@needs("espeak-ng", "festival")
def test_clips_are_written_read_and_resumed(tmp_path: Path, small_plan: list[clips.PlannedShard]) -> None:
    write_shard(small_plan[1], tmp_path)  # an earlier run was killed after this shard
    (tmp_path / "shard-00000.pcm").write_bytes(b"half")  # and while it wrote this one
    before = (tmp_path / "shard-00001.pcm").stat().st_mtime_ns
    seconds = build_clips(small_plan, tmp_path, workers=1)
    assert seconds > 0
    assert (tmp_path / "shard-00001.pcm").stat().st_mtime_ns == before
    assert build_clips(small_plan, tmp_path, workers=1) == 0
    assert sorted(path.suffix for path in tmp_path.iterdir()) == [".jsonl"] * 3 + [".pcm"] * 3

    store = ClipStore(tmp_path)
    planned = [(shard, clip) for shard in small_plan for clip in shard.clips]
    assert len(store) == len(planned)
    for index, (clip, (shard, wanted)) in enumerate(zip(store.clips, planned, strict=True)):
        assert (clip.text, clip.kind, clip.meta) == (wanted.text, wanted.kind, wanted.meta)
        assert (clip.voice, clip.role) == (shard.voice.name, shard.voice.role)
        assert [word.text for word in clip.words] == clip.text.split()
        audio = store.audio(index)
        assert audio.dtype == np.float32 and len(audio) == clip.samples > 0.2 * SAMPLE_RATE
        assert 0.05 < np.abs(audio).max() <= 1
        if clip.kind in ("question", "whole"):
            assert clip.text.endswith(clip.query.text)
        if clip.kind == "whole":
            turn = grammar.answer(clip.query, clip.scene)
            assert turn is not None and turn.question == clip.query.text
        if clip.kind in ("there", "and"):
            assert clip.object.colour in clip.text and clip.object.shape in clip.text


def test_an_empty_folder_and_a_cut_shard_are_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="holds no clips"):
        ClipStore(tmp_path)
    np.zeros(100, "<i2").tofile(tmp_path / "shard-00000.pcm")
    record = {"offset": 50, "samples": 51, "text": "No.", "words": [["No.", 0, 0.1]], "voice": "v", "role": "user"}
    (tmp_path / "shard-00000.jsonl").write_text(json.dumps(record | {"kind": "question", "meta": {}}) + "\n")
    with pytest.raises(InputError, match="cut short"):
        ClipStore(tmp_path)


@settings(deadline=None)
@given(st.integers(0, 2**32 - 1), st.integers(0, 30_000))
def test_augmentation_keeps_length_and_range(seed: int, count: int) -> None:
    rng = np.random.default_rng(seed)
    audio = (0.1 * np.sin(np.arange(count) / 20)).astype(np.float32)
    changed = augment(audio, rng)
    assert changed.shape == audio.shape and changed.dtype == np.float32
    assert np.isfinite(changed).all() and np.abs(changed).max(initial=0.0) < 1


@settings(deadline=None, max_examples=30)
@given(st.integers(0, 2**32 - 1), st.integers(0, 30_000))
def test_another_throat_keeps_length_pitch_and_silence(seed: int, count: int) -> None:
    time = np.arange(count) / SAMPLE_RATE
    audio = 0.1 * np.sum([np.sin(2 * np.pi * 120.0 * n * time) / n for n in range(1, 60)], axis=0).astype(np.float32)
    audio[: count // 3] = 0.0
    changed = another_throat(audio, np.random.default_rng(seed))
    assert changed.shape == audio.shape and changed.dtype == np.float32 and np.isfinite(changed).all()
    assert np.abs(changed[: max(0, count // 3 - 1024)]).max(initial=0.0) < 1e-4
    if count > 12_000:
        spectrum = np.abs(np.fft.rfft(changed[-6000:] * np.hanning(6000)))
        peaks = spectrum[::30][1:40]  # every 120 Hz
        between = spectrum[15::30][1:40]
        assert np.median(peaks / between) > 20


def test_another_throat_moves_the_formants() -> None:
    """Noise with one peak at 1500 Hz: where the peak is afterwards."""
    rng = np.random.default_rng(0)
    noise = np.fft.rfft(rng.standard_normal(48_000))
    frequencies = np.fft.rfftfreq(48_000, 1 / SAMPLE_RATE)
    shaped = noise / (1 + ((frequencies - 1500) / 200) ** 2)
    audio = (0.1 * np.fft.irfft(shaped) / np.fft.irfft(shaped).std()).astype(np.float32)

    def peak(wave: np.ndarray) -> float:
        power = np.abs(np.fft.rfft(wave)) ** 2 * (frequencies < 4000)
        return float((frequencies * power).sum() / power.sum())

    moved = [peak(another_throat(audio, np.random.default_rng(seed))) / peak(audio) for seed in range(20)]
    assert min(moved) < 0.95 and max(moved) > 1.05 and all(0.75 < ratio < 1.3 for ratio in moved), moved


def test_augmentation_leaves_a_third_clean_and_the_speech_on_top() -> None:
    rng = np.random.default_rng(0)
    speech = (0.1 * rng.standard_normal(12_000)).astype(np.float32)
    changed = [augment(speech, rng) for _ in range(300)]
    clean = sum(np.array_equal(speech, audio) for audio in changed) / 300
    assert 0.3 < clean < 0.55
    assert np.median([np.corrcoef(speech, audio)[0, 1] for audio in changed]) > 0.8
