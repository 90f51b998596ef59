"""Stage `tokenizer`: a SentencePiece vocabulary of the world's sentences."""

from __future__ import annotations

import io
import random
from pathlib import Path

import sentencepiece

from moshivis.mini.grammar import normalise, world_text
from moshivis.mini.stage import Stage
from moshivis.speech_lm.tokenizer import TextTokenizer

VOCABULARY, SENTENCES = 640, 20000


def train_tokenizer(stage: Stage) -> TextTokenizer:
    """Train the tokenizer of the miniature (seconds), or load the one that `stage` holds."""
    path: Path = stage.folder / "tokenizer.model"
    if stage.done:
        return TextTokenizer.load(path)
    rng = random.Random(0)
    sentences = world_text(rng, SENTENCES)
    sentences += [normalise(sentence) for sentence in sentences]
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(sentences),
        model_writer=model,
        vocab_size=VOCABULARY,
        model_type="bpe",
        character_coverage=1.0,
        unk_id=0,
        bos_id=1,
        eos_id=2,
        pad_id=3,
        required_chars="abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789.,?!:'-",
        num_threads=1,
        hard_vocab_limit=False,  # the world has fewer pieces than asked for
        minloglevel=2,
    )
    path.write_bytes(model.getvalue())
    tokenizer = TextTokenizer(model.getvalue())
    words = sum(len(sentence.split()) for sentence in sentences)
    stage.finish(
        {"vocabulary": len(tokenizer), "pieces_per_word": sum(map(len, map(tokenizer.encode, sentences))) / words}
    )
    return tokenizer
