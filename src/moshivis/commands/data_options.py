"""What `moshivis data` understands. Quick to import: what a verb does is imported when it is asked for."""

from __future__ import annotations

import argparse

from moshivis.extras import need


def add_data(parser: argparse.ArgumentParser) -> None:
    """Add the verbs of `moshivis data`."""
    verbs = parser.add_subparsers(dest="what", required=True, metavar="WHAT")
    _add_tokenize(verbs.add_parser("tokenize", help="pack conversations for training"))
    _add_inspect(verbs.add_parser("inspect", help="one sample as a picture and a WAV file"))


def _add_tokenize(parser: argparse.ArgumentParser) -> None:
    parser.description = (
        "Pack the conversations of a .jsonl file into a folder of shards: recordings (path, duration, image) are "
        "encoded by the codec of the model, dialogues in writing (turns, image) by its tokenizer. Of a folder all "
        "recordings, each with the picture of its name. Interrupted by anything, the same command goes on."
    )
    parser.add_argument("source", metavar="SOURCE", help="a .jsonl file, or a folder of recordings")
    parser.add_argument("out", metavar="OUT", help="a folder, new or begun by the same command")
    _add_model(parser)
    parser.add_argument("--device", default="cpu", help="cpu, cuda, cuda:1 (default: cpu)")
    parser.add_argument(
        "--kind",
        choices=("speech", "speechless"),
        help="speechless: recordings become their transcripts (default: each conversation as it is)",
    )
    _add_form(parser)
    parser.add_argument("--workers", metavar="N", type=int, default=1, help="processes (default: 1)")
    parser.add_argument(
        "--part",
        metavar="N",
        type=int,
        default=256,
        help="conversations a shard, done anew if interrupted; in training, those of small shards are mixed with "
        "fewer others (default: 256)",
    )
    parser.add_argument(
        "--on-error", choices=("stop", "skip"), default="stop", help="at a broken conversation (default: stop)"
    )
    parser.set_defaults(run=_tokenize)


def _add_inspect(parser: argparse.ArgumentParser) -> None:
    parser.description = "Draw one sample (waveforms, words, codes, picture), write its sound, print its transcript."
    parser.add_argument("source", metavar="SOURCE", help="a folder of shards, a .jsonl file, or a folder of recordings")
    parser.add_argument("--index", metavar="I", type=int, default=0, help="which conversation, from 0 (default: 0)")
    parser.add_argument(
        "--out", metavar="DIR", default=".", help="where to write inspect-KIND-I.png and .wav (default: here)"
    )
    _add_model(parser)
    parser.add_argument(
        "--kind", choices=("speech", "speechless"), help="of a folder that holds both (default: speech)"
    )
    _add_form(parser)
    parser.set_defaults(run=_inspect)


def _add_model(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--model",
        metavar="DIR_OR_REPO",
        default="mini",
        help="whose codec and tokenizer to use: mini (default), a folder, or a repository of the Hugging Face Hub",
    )
    parser.add_argument("--download", action="store_true", help="allow fetching the repository, all of it")


def _add_form(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--form",
        choices=("plain", "marked"),
        help="of speechless samples. plain: text alone, a newline after each turn; marked: the assistant's turns begin "
        "with end-of-padding and end with padding, as mini is trained and as talk --text writes (default: plain, or "
        "marked if the vocabulary has no newline, like mini's)",
    )


def _tokenize(arguments: argparse.Namespace) -> int:
    need(("pyarrow",), extra="data", what="packing samples")
    from moshivis.commands.data import run_tokenize

    return run_tokenize(arguments)


def _inspect(arguments: argparse.Namespace) -> int:
    need(("pyarrow",), extra="data", what="looking at samples")
    from moshivis.commands.data import run_inspect

    return run_inspect(arguments)
