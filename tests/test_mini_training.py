"""What the miniature is trained on and how: real clips, composed dialogues, targets, resumable stages."""

import multiprocessing
import random
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.multiprocessing.spawn import ProcessException

from mini_support import FAMILIES, needs_speech
from moshivis.errors import CheckpointError, InputError, MoshivisError
from moshivis.mini import batches, dialogues, grammar, parallel
from moshivis.mini.batches import EXTRA_FRAMES, spoken_batch, written_batch
from moshivis.mini.build import Build
from moshivis.mini.codes import TAIL_FRAMES, ClipCodes
from moshivis.mini.dialogues import Spoken
from moshivis.mini.language_training import Schedule
from moshivis.mini.pace import word_starts
from moshivis.mini.pictures import ATTRIBUTES, draw
from moshivis.mini.questions import Query, Turn
from moshivis.mini.recipe import CODEBOOKS, TOKENS, mini
from moshivis.mini.scenes import Scene, SceneObject, sample_scene
from moshivis.mini.stage import Stage
from moshivis.mini.timeline import BREATH, TEXT_LEAD, Reply, Timeline
from moshivis.mini.writing import Writing
from moshivis.mini.written_dialogues import Written
from moshivis.speech_lm.tokenizer import END_OF_PADDING, PADDING, SPECIAL, TextTokenizer
from moshivis.training.recipe_file import read_recipe


@needs_speech
def test_spoken_dialogue_holds_the_clips_where_it_says(spoken_codes: ClipCodes, world_tokenizer: TextTokenizer) -> None:
    spoken = Spoken(spoken_codes, world_tokenizer, 300, CODEBOOKS, padding_weight=0.3)
    sample = spoken.with_picture(Scene(()), random.Random(2), FAMILIES)
    assert sample.own.shape == sample.user.shape == (CODEBOOKS, 300)
    text = world_tokenizer.decode(sample.text)
    assert text.startswith(grammar.GREETINGS[0])
    replies = {clip.text for clip in spoken_codes.clips.clips if clip.kind == "answer"}
    assert any(reply in text for reply in replies)
    # the assistant's words stand a little before the time in which a turn that teaches to speak speaks them
    words = np.flatnonzero(~np.isin(sample.text, list(SPECIAL)))
    words = words[words + TEXT_LEAD < len(sample.text)]
    speaks = sample.weight[words] == 0
    assert 0 < speaks.sum() < len(words)
    assert sample.audible[words[speaks] + TEXT_LEAD].all()
    assert sample.audible[words[~speaks] + TEXT_LEAD].mean() < 0.1
    # what the assistant hears of itself begins as one of its clips: of the words, or of others
    clips = [spoken_codes[i][:CODEBOOKS] for i, clip in enumerate(spoken_codes.clips.clips) if clip.role == "assistant"]
    for begin in words[np.flatnonzero(np.diff(words, prepend=-99) > 8)][:-1]:
        near = range(max(0, begin - 6), begin + TEXT_LEAD + 1)
        assert any(np.array_equal(sample.own[:, i : i + 8], clip[:, :8]) for i in near for clip in clips)
    heard = {world_tokenizer.piece(i).strip() for i in sample.heard if i not in SPECIAL}
    asked = {
        word
        for clip in spoken_codes.clips.clips
        if clip.kind == "question"
        for word in grammar.normalise(clip.text).split()
    }
    assert heard and all(any(word.startswith(piece) for word in asked) for piece in heard)


@needs_speech
def test_a_recital_does_not_grade_how_facts_begin(
    spoken_codes: ClipCodes, world_tokenizer: TextTokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of every fact all words but the first two, or those after a claim, are targets, verdicts above all."""
    monkeypatch.setattr("moshivis.mini.dialogues.RECITAL_SHARE_WITH_PICTURE", 1.0)
    spoken = Spoken(spoken_codes, world_tokenizer, 300, CODEBOOKS, padding_weight=0.3)
    scene = Scene((SceneObject("circle", "red", "big", "top left"), SceneObject("star", "blue", "small", "right")))
    claims = 0
    for seed in range(4):
        sample = spoken.with_picture(scene, random.Random(seed), ("colour",))
        text = world_tokenizer.decode(sample.text)
        greeting = next(g for g in grammar.GREETINGS if text.startswith(g))
        facts = [f"{fact.strip()}." for fact in text[len(greeting) :].split(".")][:-1]  # the last one may be cut
        assert len(facts) >= 6 and any("red" in fact for fact in facts) and any("blue" in fact for fact in facts)
        words = ~np.isin(sample.text, list(SPECIAL))
        begins = int(np.flatnonzero(sample.weight == 0)[0])
        recited = words & (np.arange(300) > begins)
        graded = world_tokenizer.decode(sample.text[recited & (sample.weight > 0)])
        expected = [word for fact in facts for word in re.sub(r"^.*\? ", "", fact).split()[2:]]
        assert graded.split()[: len(expected)] == expected
        claims += sum("?" in fact for fact in facts)
        verdicts = [fact.split()[-1] for fact in facts if ", so " in fact]
        assert world_tokenizer.decode(sample.text[sample.weight > 1]).split()[: len(verdicts)] == verdicts
        spoken_at = np.flatnonzero(recited[:-TEXT_LEAD]) + TEXT_LEAD
        assert sample.audible[spoken_at].mean() < 0.05  # not none: a pause may lie between two recitals
        assert (sample.user < 256).all() and (sample.own[:, begins + TEXT_LEAD : 290] >= 0).all()
    assert claims


@needs_speech
@pytest.mark.parametrize("speaking", [0.0, 1.0])
def test_words_come_at_the_even_pace(spoken_codes: ClipCodes, world_tokenizer: TextTokenizer, speaking: float) -> None:
    spoken = Spoken(spoken_codes, world_tokenizer, 300, CODEBOOKS, padding_weight=0.3)
    text = "The capital of Italy is Rome."
    line = Timeline(spoken, random.Random(0), speaking)
    line.assistant(Reply(text, [spoken.answers[text]]), at=5)
    words = spoken_codes.clips.clips[spoken.answers[text]].words
    for word, start in zip(words, word_starts(words, spoken.pace), strict=True):
        assert line.text[5 + start] == world_tokenizer.encode(word.text)[0]


@needs_speech
def test_a_claim_is_repeated_before_the_answer(spoken_codes: ClipCodes, world_tokenizer: TextTokenizer) -> None:
    spoken = Spoken(spoken_codes, world_tokenizer, 300, CODEBOOKS, padding_weight=0.3)
    turn = grammar.answer(Query(family="yes_no", shape="star", claim="green"), Scene(()))
    reply = spoken._reply(turn)
    assert reply is not None
    line = Timeline(spoken, random.Random(0), speaking=1.0)
    line.assistant(reply, at=5)
    assert world_tokenizer.decode(line.text) == "Green? The star is not there, so no."
    first, second = (spoken_codes[index] for index in reply.clips)
    begin = 5 + TEXT_LEAD
    answer = begin + first.shape[1] - TAIL_FRAMES + BREATH
    assert np.array_equal(line.own[:, begin : begin + 4], first[:CODEBOOKS, :4])
    assert np.array_equal(line.own[:, answer : answer + second.shape[1]], second[:CODEBOOKS])


@needs_speech
def test_spoken_batch_predicts_what_is_said_next(spoken_codes: ClipCodes, world_tokenizer: TextTokenizer) -> None:
    frames, config = 160, mini(len(world_tokenizer)).speech_lm
    spoken = Spoken(spoken_codes, world_tokenizer, frames + EXTRA_FRAMES, CODEBOOKS, padding_weight=0.3)
    rng = random.Random(0)
    samples = [spoken.with_picture(Scene(()), rng, FAMILIES) for _ in range(8)]
    batch = spoken_batch(samples, config, frames, random.Random(1))
    assert batch.inputs.shape == (8, 1 + 2 * CODEBOOKS, frames)
    # own streams: the input of a step is the target of the step before
    assert torch.equal(batch.inputs[:, 0, 1:], batch.text[:, :-1])
    own = batch.inputs[:, 1 : 1 + CODEBOOKS]
    said = batch.audio[..., :-1] >= 0
    graded = (batch.text_weight == 1) & (batch.text != PADDING)
    assert 0.1 < batch.depth.float().mean() < 0.9 and batch.depth[graded].float().mean() < 0.2
    assert torch.equal(own[..., 1:][said], batch.audio[..., :-1][said])
    # the user's semantic code of a frame is there at that frame
    whole = [row for row, s in enumerate(samples) if np.array_equal(s.text[:frames], batch.text[row])]
    assert whole
    for row in whole:
        user = torch.from_numpy(samples[row].user[0, 1:frames])
        assert torch.equal(batch.inputs[row, 1 + CODEBOOKS, 1:], user)


@needs_speech
@pytest.mark.parametrize("start, taught", [(0, 0), (20, 0), (21, 60), (60, 60), (61, 221)])
def test_nothing_is_taught_about_a_scene_that_was_cut_off(
    start: int, taught: int, spoken_codes: ClipCodes, world_tokenizer: TextTokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of two scenes, told from frames 20 and 60 on: the frame from which on words are targets, by where it is cut."""
    frames, config = 160, mini(len(world_tokenizer)).speech_lm
    spoken = Spoken(spoken_codes, world_tokenizer, frames + EXTRA_FRAMES, CODEBOOKS, padding_weight=0.3)
    line = Timeline(spoken, random.Random(0), speaking=0.0)
    question = next(i for i, clip in enumerate(spoken_codes.clips.clips) if clip.kind == "question")
    line.user([question], 4)
    assert line.sample().tellings == ()
    told = replace(line.sample(), tellings=(20, 60))
    monkeypatch.setattr(batches, "MID_STREAM", float(start > 0))
    monkeypatch.setattr(random.Random, "randint", lambda rng, low, high: start)
    batch = spoken_batch([told], config, frames, random.Random(0))
    first = max(taught - start, 0)
    assert not batch.text_weight[0, :first].any() and (batch.text_weight[0, first:] > 0).all()


@needs_speech
def test_a_claim_is_not_given_up_for_a_question_that_has_more_clips(
    spoken_codes: ClipCodes, world_tokenizer: TextTokenizer
) -> None:
    spoken = Spoken(spoken_codes, world_tokenizer, 200, CODEBOOKS, padding_weight=0.3)
    unclaimed = next(query for _, query in spoken.questions if query.claim is None)
    unspoken, claimed = (Query(family="yes_no", shape="star", claim=claim) for claim in ("blue", "green"))
    drawn = iter((unspoken, unclaimed, unclaimed, claimed))

    def ask(scene: Scene, family: str, rng: random.Random) -> Turn | None:
        return grammar.answer(next(drawn), scene)

    found = spoken._question(spoken.voices[0], "yes_no", Scene(()), random.Random(0), ask)
    assert found is not None
    assert [spoken_codes.clips.clips[index].query.claim for index in found[0]] == ["green"]


def test_written_samples_read_back(world_tokenizer: TextTokenizer) -> None:
    written = Written(world_tokenizer, TOKENS, CODEBOOKS, user_weight=0.1)
    rng = random.Random(5)
    for _ in range(20):
        scene = sample_scene(rng)
        sample = written.with_picture(scene, rng, ("colour", "count"))
        assert sample.text[0] == END_OF_PADDING and len(sample.text) == TOKENS
        sentences = "".join(world_tokenizer.piece(i) or "|" for i in sample.text).split("|")
        assert sentences[1].strip() in grammar.GREETINGS
        answers = [s.strip() for s in sentences if s.strip().startswith(("The", "There"))]
        assert len(answers) >= 1
        weights = sample.weight[: int(np.flatnonzero(sample.text == PADDING)[0])]
        assert (weights == 1).all()  # the greeting counts in full
    batch = written_batch([sample], mini(len(world_tokenizer)).speech_lm)
    assert (batch.inputs[:, 1:] == -1).all() and not batch.depth.any()


def test_patch_labels_say_what_covers_each_patch() -> None:
    scene = Scene((SceneObject("circle", "red", "big", "top left"), SceneObject("star", "blue", "small", "right")))
    pixels, labels = draw(scene, random.Random(0), 128, 8)
    assert pixels.shape == (3, 128, 128) and labels.shape == (len(ATTRIBUTES), 16, 16)
    red = labels[1] == 1 + ATTRIBUTES["colour"].index("red")
    assert red[:8, :8].any() and not red[8:].any()
    for row, column in np.argwhere(red)[:: max(1, red.sum() // 4)]:
        assert labels[0, row, column] == 1 + ATTRIBUTES["shape"].index("circle")
    assert (labels[0] == 0).mean() > 0.5


class _Toy:
    """A least-squares problem whose data depend on the step only."""

    def __init__(self) -> None:
        torch.manual_seed(0)
        self.model = nn.Linear(4, 3)
        self.optimiser = torch.optim.AdamW(self.model.parameters(), lr=0.05)
        self.parts = {"model": self.model, "optimiser": self.optimiser}

    def step(self, step: int) -> dict[str, float]:
        x = torch.randn(8, 4, generator=torch.Generator().manual_seed(step))
        loss = (self.model(x) - x[:, :3]).square().mean()
        self.optimiser.zero_grad()
        loss.backward()
        self.optimiser.step()
        return {"loss": loss.item()}


def _run_toy(folder: Path, total: int) -> None:
    toy = _Toy()
    Stage(folder).train(total, toy.parts, toy.step)


def test_a_killed_stage_ends_with_the_same_weights(tmp_path: Path) -> None:
    whole = _Toy()
    Stage(tmp_path / "whole").train(30, whole.parts, whole.step)
    process = multiprocessing.get_context("spawn").Process(target=_run_toy, args=(tmp_path / "cut", 12))
    process.start()
    process.join()
    resumed, stage = _Toy(), Stage(tmp_path / "cut")
    stage.train(30, resumed.parts, resumed.step)
    assert stage.step == 30
    assert torch.equal(resumed.model.weight, whole.model.weight)
    assert not list((tmp_path / "cut").glob("*.tmp"))


def test_a_loss_that_is_not_finite_stops_the_stage(tmp_path: Path) -> None:
    with pytest.raises(FloatingPointError, match="not finite at step"):
        Stage(tmp_path).train(3, {}, lambda step: {"loss": float("nan")})
    assert not (tmp_path / "checkpoint.pt").exists()


def test_a_finished_stage_without_its_weights_is_not_used(tmp_path: Path) -> None:
    toy = _Toy()
    stage = Stage(tmp_path)
    stage.train(2, toy.parts, toy.step)
    stage.finish({})
    (tmp_path / "checkpoint.pt").unlink()
    with pytest.raises(CheckpointError, match="is finished, but has no checkpoint.pt"):
        Stage(tmp_path).restore(toy.parts)


def test_what_a_worker_says_is_said(tmp_path: Path) -> None:
    with pytest.raises(MoshivisError, match="^there is no picture 1$"):
        parallel.run(2, _complain, tmp_path)
    with pytest.raises(ProcessException, match="not foreseen"):
        parallel.run(2, _fail, tmp_path)


def _complain(rank: int, workers: int, folder: Path) -> None:
    if rank:
        raise InputError(f"there is no picture {rank}")


def _fail(rank: int, workers: int, folder: Path) -> None:
    raise RuntimeError("not foreseen")


def test_workers_share_every_batch_evenly(tmp_path: Path) -> None:
    rows = (*read_recipe("mini").rows(), Schedule().spoken_rows, Schedule().written_rows)
    for workers in range(1, 30):
        trainers = Build(tmp_path, torch.device("cpu"), workers).trainers
        assert trainers <= workers and all(count % trainers == 0 for count in rows)


def test_workers_average_their_gradients(tmp_path: Path) -> None:
    parallel.run(2, _save_gradient, tmp_path)
    parts = [torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(2)]
    for averaged in parts:
        assert torch.allclose(averaged, torch.tensor([1.5, 3.0, 4.5]))


def test_a_gradient_that_one_worker_lacks_counts_as_zero(tmp_path: Path) -> None:
    parallel.run(2, _save_lopsided_gradient, tmp_path)
    parts = [torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(2)]
    for averaged in parts:
        assert torch.equal(averaged, torch.tensor([0.5, 0.5]))


def _save_lopsided_gradient(rank: int, workers: int, folder: Path) -> None:
    used, unused = torch.zeros(1, requires_grad=True), torch.zeros(2, requires_grad=True)
    (used.sum() + (unused.sum() if rank else 0)).backward()
    parallel.average_gradients([used, unused], workers)
    gradient: Tensor | None = unused.grad
    assert gradient is not None
    torch.save(gradient, folder / f"{rank}.pt")


def _save_gradient(rank: int, workers: int, folder: Path) -> None:
    weight = torch.zeros(3, requires_grad=True)
    ((rank + 1) * weight * torch.tensor([1.0, 2.0, 3.0])).sum().backward()
    parallel.average_gradients([weight], workers)
    gradient: Tensor | None = weight.grad
    assert gradient is not None
    torch.save(gradient, folder / f"{rank}.pt")


def test_what_is_not_written_is_seldom_asked_for() -> None:
    rng = random.Random(0)
    families, shares = dialogues.SCENE_FAMILIES, []
    for scene in (Scene(()), Scene((), writing=Writing("sun"))):
        asked = [dialogues.choose_family(scene, rng, families) for _ in range(3000)]
        assert set(asked) == set(families)
        shares.append(asked.count("read") / len(asked) * len(families))
    assert shares[0] < 0.6 and shares[1] > 2


def test_tokenizer_covers_the_world(world_tokenizer: TextTokenizer) -> None:
    rng = random.Random(9)
    for _ in range(100):
        turn = grammar.ask(sample_scene(rng), rng.choice(grammar.FAMILIES), rng)
        if turn is not None:
            for text in (turn.question, turn.answer, grammar.normalise(turn.question)):
                assert world_tokenizer.decode(world_tokenizer.encode(text)) == text
    query = Query(family="colour", shape="star")
    assert len(world_tokenizer.encode(replace(query, phrasing=0).text)) <= 8
