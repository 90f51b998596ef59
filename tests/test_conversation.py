"""Conversations frame by frame and in writing, with random models and, where it is there, the embedded one."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image

import moshivis
from moshivis.audio import read_audio
from moshivis.errors import InputError
from moshivis.inference.activity import reaction_samples, speech_span
from moshivis.inference.conversation import EMBEDDED, Assistant, StepResult, TextPiece, load
from moshivis.inference.duplex import Duplex, DuplexFrame
from moshivis.inference.sampling import GREEDY
from moshivis.inference.talk import ANSWER_PAUSE, GREETING_FRAMES, Question, talk
from moshivis.mini import grammar
from moshivis.mini.drawing import draw_scene
from moshivis.mini.judge import judge
from moshivis.mini.language import NUMBERS, normalise
from moshivis.mini.scenes import COLOURS, SHAPES, sample_scene
from moshivis.model import MoshiVis
from moshivis.speech_lm.streams import model_inputs
from moshivis.speech_lm.tokenizer import TextTokenizer

FRAME = 1920
RED = Image.new("RGB", (50, 40), "red")
CHECKS = Image.fromarray((np.indices((64, 64)).sum(0) % 16 * 16).astype(np.uint8))


@pytest.fixture(scope="module")
def assistant(tiny_folder: Path) -> Assistant:
    return load(tiny_folder)


def noise(frames: int, seed: int = 0) -> NDArray[np.float32]:
    """[frames, FRAME]"""
    return (0.2 * np.random.default_rng(seed).standard_normal((frames, FRAME))).astype(np.float32)


def run(assistant: Assistant, frames: NDArray[np.float32], **options: Any) -> list[StepResult]:
    conversation = assistant.conversation(**options)
    return [conversation.step(frame) for frame in frames]


def same(a: list[StepResult], b: list[StepResult]) -> bool:
    return [r.token for r in a] == [r.token for r in b] and all(
        np.array_equal(x.audio, y.audio) for x, y in zip(a, b, strict=True)
    )


# frame by frame -------------------------------------------------------------------------------------------------------


def test_a_frame_in_a_frame_out(assistant: Assistant) -> None:
    results = run(assistant, noise(6), image=RED)
    assert [result.frame for result in results] == list(range(6))
    assert all(result.audio.shape == (FRAME,) and result.audio.dtype == np.float32 for result in results)
    assert results[0].token is None and results[0].text == "" and not results[0].audio.any()
    assert all(result.token is not None and result.audio.any() for result in results[1:])
    assert results[0].gate == 0 and all(0 < result.gate < 1 for result in results[1:])


def test_the_seed_decides(assistant: Assistant) -> None:
    first, again, other = (run(assistant, noise(8), image=RED, seed=seed) for seed in (3, 3, 4))
    assert same(first, again)
    assert not same(first, other)


def test_conversations_do_not_disturb_each_other(assistant: Assistant) -> None:
    alone = run(assistant, noise(6), image=RED, seed=1)
    a, b = assistant.conversation(RED, seed=1), assistant.conversation(CHECKS, seed=2)
    together = []
    for frame, other in zip(noise(6), noise(6, seed=9), strict=True):
        together.append(a.step(frame))
        b.step(other)
    assert same(alone, together)


def test_the_picture_can_change_at_any_time(assistant: Assistant) -> None:
    frames = noise(9)
    conversation = assistant.conversation(RED, seed=5)
    changed = [conversation.step(frame) for frame in frames[:3]]
    conversation.set_image(None)
    changed += [conversation.step(frame) for frame in frames[3:6]]
    conversation.set_image(CHECKS)
    changed += [conversation.step(frame) for frame in frames[6:]]
    assert same(changed[:3], run(assistant, frames[:3], image=RED, seed=5))
    assert [result.gate == 0 for result in changed] == [True, False, False, True, True, True, False, False, False]


def test_what_the_user_says_and_shows_matters(assistant: Assistant) -> None:
    results = [
        run(assistant, frames, image=image, sampling=GREEDY)
        for frames, image in ((noise(12), RED), (tone(12 * 0.08).reshape(12, FRAME), RED), (noise(12), None))
    ]
    assert not same(results[0], results[1])
    assert [result.gate for result in results[0]] != [result.gate for result in results[1]]
    assert not same(results[0], results[2])


@pytest.mark.parametrize(
    "frame",
    [np.zeros(100), np.zeros((1, FRAME)), np.full(FRAME, np.nan), [], np.zeros(FRAME, np.int16)],
    ids=["short", "two-dimensional", "nan", "empty", "integers"],
)
def test_a_wrong_frame_is_refused_and_leaves_no_trace(assistant: Assistant, frame: Any) -> None:
    conversation = assistant.conversation(RED)
    with pytest.raises(InputError, match=r"a frame is 1920 (finite )?samples|floats in -1\.\.1, not int16"):
        conversation.step(frame)
    assert same([conversation.step(f) for f in noise(3)], run(assistant, noise(3), image=RED))


def test_rows_of_a_batch_are_conversations(assistant: Assistant) -> None:
    """Three rows of one batch: one starts late and one pauses; each says what it says alone."""
    model = assistant.model
    duplex = Duplex(model)
    heard = torch.from_numpy(np.stack([noise(10, seed) for seed in range(3)]))  # [B, F, FRAME]

    def alone(row: int, frames: list[int]) -> list[DuplexFrame]:
        state = duplex.new_state(1)
        return [duplex.step(state, heard[row, f][None, None], None, GREEDY) for f in frames]

    taken = [list(range(10)), list(range(4, 10)), [0, 1, 2, 6, 7, 8, 9]]
    state = duplex.new_state(3)
    batched: list[list[DuplexFrame]] = [[], [], []]
    for f in range(10):
        active = torch.tensor([f in frames for frames in taken])
        frame = duplex.step(state, heard[:, f][:, None], None, GREEDY, active)
        assert not frame.valid[~active].any() and not frame.audio[~active].any()
        for row in active.nonzero()[:, 0].tolist():
            batched[row].append(frame)
    for row, frames in enumerate(taken):
        for ours, single in zip(batched[row], alone(row, frames), strict=True):
            assert ours.valid[row] == single.valid[0] and ours.text[row] == single.text[0]
            torch.testing.assert_close(ours.audio[row], single.audio[0], rtol=1e-4, atol=1e-5)


def test_a_row_that_is_reset_starts_anew(assistant: Assistant) -> None:
    duplex = Duplex(assistant.model)
    state = duplex.new_state(2)
    heard = torch.from_numpy(noise(5))[:, None, None].expand(-1, 2, -1, -1)
    first = [duplex.step(state, wave, None, GREEDY) for wave in heard]
    state.reset(torch.tensor([False, True]))
    second = [duplex.step(state, wave, None, GREEDY) for wave in heard]
    for before, after in zip(first, second, strict=True):
        assert before.valid[1] == after.valid[1]
        assert before.text[1] == after.text[1] or not after.valid[1]
        torch.testing.assert_close(after.audio[1], before.audio[1], rtol=1e-4, atol=1e-5)
    assert not torch.equal(first[0].valid, second[0].valid)  # row 0 went on


# in writing -----------------------------------------------------------------------------------------------------------


def test_a_written_conversation_is_what_training_shows(assistant: Assistant) -> None:
    """Every token that the assistant chose is the likeliest one when the whole stream is read at once."""
    config, model = assistant.config.speech_lm, assistant.model
    conversation = assistant.conversation(RED, sampling=GREEDY)
    stream: list[int] = []
    chosen: dict[int, int] = {}
    gates: dict[int, float] = {}
    for question in (None, "what colour is the star", "hello"):
        if question is not None:
            stream += assistant.tokenizer.encode(question)
        stream.append(config.text_end_of_padding)
        said = conversation.greet_text() if question is None else conversation.say_text(question)
        assert said[0].frame == len(stream)
        for piece in said:
            assert piece.token is not None
            chosen[piece.frame], gates[piece.frame] = piece.token, piece.gate
            stream.append(piece.token)
        stream.append(config.text_padding)
        assert conversation.frame == len(stream)
    codes = torch.full((1, config.num_streams, len(stream)), -1)
    codes[:, 0] = torch.tensor(stream)
    inputs = model_inputs(codes, config)
    inputs[:, 1:] = -1
    assert model.adapters is not None
    output = model(inputs, assistant.look(RED))
    likeliest = output.text_logits[0].argmax(-1)
    assert {frame: int(likeliest[frame]) for frame in chosen} == chosen
    # The gate of a piece is that of the step which reads it, as in speech.
    seen = output.context.gate()[0]
    read = {frame: float(seen[frame + 1]) for frame in gates if frame + 1 < len(stream)}
    assert read == pytest.approx({frame: gates[frame] for frame in read}, abs=1e-5)


def test_written_and_spoken_do_not_mix(assistant: Assistant) -> None:
    written, spoken = assistant.conversation(), assistant.conversation()
    written.say_text("hello")
    with pytest.raises(InputError, match="written"):
        written.step(np.zeros(FRAME))
    with pytest.raises(InputError, match="beginning"):
        written.greet_text()
    spoken.step(np.zeros(FRAME))
    with pytest.raises(InputError, match="spoken"):
        spoken.say_text("hello")
    with pytest.raises(InputError, match="cannot be mixed"):
        talk(assistant, None, [Question(text="hello"), Question(audio=noise(3).ravel())])


def test_a_question_must_hold_something(assistant: Assistant) -> None:
    with pytest.raises(InputError, match="the question is empty"):
        assistant.conversation().say_text("  ")
    for unreadable in ("\x00", "日本語"):
        with pytest.raises(InputError, match="no text that the model could read"):
            moshivis.load().conversation().say_text(unreadable)
    with pytest.raises(InputError, match="no question"):
        talk(assistant, None, [])
    with pytest.raises(InputError, match="either sound or text"):
        Question()
    with pytest.raises(InputError, match="T > 0"):
        Question(audio=np.zeros(0, np.float32))
    with pytest.raises(InputError, match="must be finite"):
        Question(audio=np.array([0.0, np.nan]))
    double = Question(audio=np.zeros(9)).audio  # type: ignore[arg-type]
    assert double is not None and double.dtype == np.float32


def test_no_answer_is_lost_to_a_later_question_without_text(assistant: Assistant) -> None:
    pieces: list[TextPiece] = []
    with pytest.raises(InputError, match="'日本語' has no text that the model could read"):
        talk(
            moshivis.load(), None, [Question(text="What do you see?"), Question(text="日本語")], on_frame=pieces.append
        )
    assert not pieces


# a whole conversation -------------------------------------------------------------------------------------------------


class Scripted(Duplex):
    """Greets, and answers a loud question `delay` samples after it, with a tone and a word a frame."""

    def __init__(self, model: MoshiVis, words: list[int], delay: int):
        super().__init__(model)
        self.words, self.delay = words, delay
        self.padding = model.config.speech_lm.text_padding
        self.clock, self.loud_until = 0, 0
        self.sounds: list[tuple[int, int]] = [(3 * FRAME, 6 * FRAME)]  # the greeting, in samples

    def step(self, state: Any, audio: torch.Tensor, *_: Any, **__: Any) -> DuplexFrame:
        begin, end = self.clock, self.clock + FRAME
        loud = audio[0, 0].abs().numpy() > 0.05
        if loud.any():
            self.loud_until = begin + int(np.flatnonzero(loud)[-1]) + 1
        elif self.loud_until:
            onset = self.loud_until + self.delay
            self.sounds.append((onset, onset + len(self.words) * FRAME))
            self.loud_until = 0
        time = torch.arange(begin, end)
        wave, token = torch.zeros(FRAME), self.padding
        for number, (first, last) in enumerate(self.sounds):
            wave += 0.3 * torch.sin(time * 0.3) * ((time >= first) & (time < last))
            word = begin // FRAME - first // FRAME
            if number and 0 <= word < len(self.words):
                token = self.words[word]
        self.clock = end
        return DuplexFrame(wave[None, None], torch.tensor([token]), torch.tensor([True]), torch.tensor([0.01]))


def tone(seconds: float, before: float = 0.0, after: float = 0.0) -> NDArray[np.float32]:
    wave = 0.3 * np.sin(np.arange(round(seconds * 24000)) * 0.2)
    return np.pad(wave, (round(before * 24000), round(after * 24000))).astype(np.float32)


def test_turns_follow_each_other(tiny_model: MoshiVis, tiny_tokenizer: TextTokenizer) -> None:
    assistant = Assistant(tiny_model, tiny_tokenizer)
    answer = tiny_tokenizer.encode("the star is blue")
    assistant.duplex = Scripted(tiny_model, answer, delay=9600)
    sound = tone(0.7, before=0.2, after=0.1)
    questions = [Question(audio=sound, label="one"), Question(audio=tone(0.5, after=0.15), label="two")]
    frames: list[int] = []
    result = talk(assistant, None, questions, on_frame=lambda piece: frames.append(piece.frame))
    assert result.form == "spoken"
    assert [turn.question for turn in result.turns] == [None, "one", "two"]
    assert [turn.text for turn in result.turns] == ["", "the star is blue", "the star is blue"]
    assert result.turns[1].frame == 6 + 6  # greeting, then the pause that ends it
    assert [turn.reaction_ms for turn in result.turns[1:]] == [pytest.approx(400, abs=15)] * 2
    assert result.text == "the star is blue the star is blue"
    assert frames == list(range(result.frames))
    assert result.user is not None and result.assistant is not None
    assert len(result.user) == len(result.assistant) == result.frames * FRAME
    start = result.turns[1].frame * FRAME
    np.testing.assert_array_equal(result.user[start : start + len(sound)], sound)
    last = np.flatnonzero(result.assistant)[-1] // FRAME
    assert result.frames - 1 - last == ANSWER_PAUSE
    plain = json.loads(json.dumps(result.to_json()))
    assert plain["frames"] == result.frames and plain["reaction_ms"] == pytest.approx(400, abs=15)
    assert "".join(piece["piece"] for piece in plain["pieces"]).strip() == result.text


def test_silence_is_waited_for_and_no_longer(tiny_model: MoshiVis, tiny_tokenizer: TextTokenizer) -> None:
    assistant = Assistant(tiny_model, tiny_tokenizer)
    mute = Scripted(tiny_model, [3], delay=10**9)
    mute.sounds.clear()
    assistant.duplex = mute
    result = talk(assistant, None, [Question(audio=tone(0.8))], seconds=1.6)
    assert result.frames == GREETING_FRAMES + 10 + 20
    assert result.reaction_ms is None and result.text == "" and result.turns[1].reaction_ms is None


def test_a_random_model_is_stopped(assistant: Assistant) -> None:
    result = talk(assistant, RED, [Question(audio=tone(0.4))], seconds=0.8, seed=1)
    again = talk(assistant, RED, [Question(audio=tone(0.4))], seconds=0.8, seed=1)
    assert result.frames == GREETING_FRAMES + 5 + 10
    assert len(result.gates) == result.frames and 0 < result.real_time_factor
    assert result.pieces == again.pieces
    np.testing.assert_array_equal(result.assistant, again.assistant)


@pytest.mark.parametrize(
    ("sounds", "reaction"),
    [
        ([(3.5, 5)], 0.5),
        ([(0.2, 1.5), (3.25, 4)], 0.25),  # what begins before the question belongs to what was before
        ([(0.2, 2.5), (3.5, 4)], 0.5),
        ([(2.5, 4)], -0.5),  # barged in
        ([(1.5, 2.0), (3.4, 4)], 0.4),  # a short "mm" while the user speaks
        ([(3.4, 3.6), (3.7, 5)], 0.4),
        ([(0.1, 0.9)], None),
        ([], None),
    ],
)
def test_reaction_is_from_the_end_of_the_question(sounds: list[tuple[float, float]], reaction: float | None) -> None:
    speaker = np.zeros(6 * 24000, np.float32)
    for first, last in sounds:
        speaker[round(first * 24000) : round(last * 24000)] = tone(last - first)[: round((last - first) * 24000)]
    found = reaction_samples(speaker, begin=24000, end=3 * 24000)
    assert (None if found is None else found / 24000) == (
        None if reaction is None else pytest.approx(reaction, abs=0.02)
    )


def test_speech_ends_where_its_energy_ends() -> None:
    audio = tone(1.0, before=0.3, after=2.0) + 0.001 * noise(60).ravel()[: round(3.3 * 24000)]
    span = speech_span(audio)
    assert span is not None and span == pytest.approx((0.3 * 24000, 1.3 * 24000), abs=480)
    assert speech_span(np.zeros(5000)) is None


# the embedded model ---------------------------------------------------------------------------------------------------

needs_weights = pytest.mark.skipif(not EMBEDDED["mini"].exists(), reason="the embedded model has not been built yet")
ASSETS = Path(moshivis.__file__).parent / "assets"


@pytest.fixture(scope="module")
def mini() -> Assistant:
    return load("mini")


@needs_weights
def test_it_sees_what_it_is_asked_about(mini: Assistant) -> None:
    """Written questions about the colour of a thing in freshly drawn scenes: one in eleven would be by chance."""
    rng = random.Random("conversation test")
    right = 0
    for _ in range(20):
        turn = None
        while turn is None or turn.facts["missing"]:
            scene = sample_scene(rng)
            turn = grammar.ask(scene, "colour", rng)
        pieces = mini.conversation(draw_scene(scene, rng), sampling=GREEDY).say_text(turn.question)
        right += judge(turn, "".join(piece.text for piece in pieces))
    assert right >= 12


@needs_weights
def test_the_spoken_example_gets_a_spoken_answer(mini: Assistant) -> None:
    question = Question(audio=read_audio(ASSETS / "example.wav"), label="example")
    result = talk(mini, ASSETS / "example.png", [question])
    assert set(normalise(result.turns[1].text).split()) & {*COLOURS, *SHAPES, *NUMBERS, "yes", "no", "left", "right"}
    assert result.turns[1].reaction_ms is not None and -500 < result.turns[1].reaction_ms < 3000
    assert result.assistant is not None and speech_span(result.assistant) is not None
