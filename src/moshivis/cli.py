"""The `moshivis` command: what it understands. What a verb does is imported when it is asked for, `--help` is quick."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from moshivis import __version__
from moshivis.commands.data_options import add_data
from moshivis.errors import MoshivisError
from moshivis.extras import need
from moshivis.option_values import count, duration, not_negative, seed, some

BAD_INPUT, INTERRUPTED = 2, 130  # exit statuses


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit status: 2 for anything the user can mend, said in one sentence."""
    arguments = _parse(argv)
    try:
        return int(arguments.run(arguments))
    except MoshivisError as error:
        print(f"moshivis: {error}", file=sys.stderr)
        return BAD_INPUT
    except OSError as error:  # a disk that is full, a folder that is a file
        where = f"{error.filename}: " if error.filename else ""
        print(f"moshivis: {where}{error.strerror or error}", file=sys.stderr)
        return BAD_INPUT
    except (RuntimeError, MemoryError) as error:
        if not _is_out_of_memory(error):
            raise
        sentence = str(error).rpartition("DefaultCPUAllocator: ")[2].partition(". ")[0]
        why = f": {sentence}" if sentence else ""
        print(f"moshivis: the memory is too small{why}; a smaller model or batch takes less", file=sys.stderr)
        return BAD_INPUT
    except KeyboardInterrupt:
        print("\nmoshivis: interrupted", file=sys.stderr)
        return INTERRUPTED


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """Options of `train` may stand among its KEY=VALUE words, which argparse by itself takes in one place only."""
    parser = _parser()
    arguments, left = parser.parse_known_args(argv)
    if arguments.verb == "train":
        arguments.overrides += [word for word in left if not word.startswith("-")]
        left = [word for word in left if word.startswith("-")]
    if left:
        parser.error(f"unrecognized arguments: {' '.join(left)}")
    return arguments


def _is_out_of_memory(error: RuntimeError | MemoryError) -> bool:
    """Of a GPU, or of the processor, for which torch has no class of its own."""
    said = str(error)
    return (
        isinstance(error, MemoryError)
        or type(error).__name__ == "OutOfMemoryError"
        or "can't allocate memory" in said
        or "out of memory" in said
    )


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="moshivis", description="Talk with a speech model about a picture.")
    parser.add_argument("--version", action="version", version=f"moshivis {__version__}")
    verbs = parser.add_subparsers(dest="verb", required=True, metavar="VERB")
    _add_talk(verbs.add_parser("talk", help="ask questions about a picture, by voice or in writing"))
    _add_serve(verbs.add_parser("serve", help="a web page to talk on, and the protocols of other clients"))
    _add_chat(verbs.add_parser("chat", help="talk with a server from the terminal"))
    add_data(verbs.add_parser("data", help="make training data, look at it"))
    _add_train(verbs.add_parser("train", help="train adapters, LoRA or the whole model by a recipe"))
    adapters = verbs.add_parser("adapters", help="what training leaves").add_subparsers(
        dest="what", required=True, metavar="WHAT"
    )
    _add_merge(adapters.add_parser("merge", help="make one whole model of a base and its adapters"))
    _add_conform(verbs.add_parser("conform", help="compare the numbers of the model with recorded ones"))
    bench = verbs.add_parser("bench", help="measure speed").add_subparsers(dest="what", required=True, metavar="WHAT")
    _add_bench_step(bench.add_parser("step", help="one 80 ms frame, part by part"))
    _add_bench_codec(bench.add_parser("codec", help="the streaming codec, beside other programs"))
    _add_bench_serve(bench.add_parser("serve", help="how many conversations at once a server carries"))
    _add_bench_train(bench.add_parser("train", help="a training step, beside the straightforward way"))
    return parser


def _add_talk(parser: argparse.ArgumentParser) -> None:
    parser.description = (
        "Ask questions about a picture, one after the other. Spoken questions get spoken answers, written ones are "
        "answered in writing; the two cannot be mixed."
    )
    parser.add_argument("picture", metavar="PICTURE", nargs="?", help="PNG, JPEG, WebP, GIF, BMP, TIFF …")
    ask = parser.add_argument_group("questions")
    ask.add_argument("--audio", metavar="FILE", action="append", default=[], help="WAV, FLAC, MP3 or OGG; repeatable")
    ask.add_argument("--text", metavar="TEXT", action="append", default=[], help="repeatable")
    ask.add_argument(
        "--example",
        action="store_true",
        help="the picture and the spoken question that come with the package, if none is given",
    )
    _add_model(parser, "mini")
    _add_adapters(parser)
    parser.add_argument("--device", default="cpu", help="cpu, cuda, cuda:1, mps (default: cpu)")
    parser.add_argument("--dtype", help="float32, bfloat16, float16")
    results = parser.add_argument_group("results")
    results.add_argument(
        "--out",
        metavar="FILE.wav",
        help="both voices, user left and assistant right (default: answer.wav); the assistant alone goes beside it",
    )
    results.add_argument("--gates", metavar="FILE.png", help="draw the transcript coloured by its gates")
    results.add_argument("--json", action="store_true", help="print one JSON object and nothing else")
    how = parser.add_argument_group("how to answer")
    how.add_argument(
        "--seconds", metavar="S", type=duration, help="longest wait for the end of a spoken answer (default: 20)"
    )
    how.add_argument("--seed", metavar="N", type=seed, default=0, help="the same seed, the same answer (default: 0)")
    how.add_argument(
        "--temperature", metavar="T", type=not_negative, help="of the speech tokens; 0 takes the likeliest"
    )
    how.add_argument("--text-temperature", metavar="T", type=not_negative, help="of the text tokens")
    how.add_argument("--top-k", metavar="K", type=count, help="draw from the K likeliest tokens only; 0 means from all")
    parser.set_defaults(run=_talk)


def _add_serve(parser: argparse.ArgumentParser) -> None:
    parser.description = (
        "Serve many conversations at once: a web page at /, the protocols of Moshi and MoshiVis clients at /api/chat, "
        "and those of the OpenAI SDK at /v1. Prints the address to open. Ctrl-C ends it."
    )
    _add_model(parser, "mini")
    _add_adapters(parser)
    parser.add_argument("--device", default="cpu", help="cpu, cuda, cuda:1, mps (default: cpu)")
    parser.add_argument("--dtype", help="float32, bfloat16, float16")
    parser.add_argument("--threads", metavar="N", type=some, help="of the CPU, for the model")
    where = parser.add_argument_group("where")
    where.add_argument("--host", default="localhost", help="0.0.0.0 for all addresses (default: localhost)")
    where.add_argument("--port", type=count, default=8998, help="0 takes a free one (default: 8998)")
    where.add_argument("--open", action="store_true", help="open the page in a browser")
    where.add_argument("--no-page", action="store_true", help="the protocols only")
    tls = where.add_mutually_exclusive_group()
    tls.add_argument("--tls", nargs=2, metavar=("CERT", "KEY"), help="files in PEM form")
    tls.add_argument(
        "--tls-self-signed",
        nargs="?",
        const="",
        metavar="DIR",
        help="a certificate that is made once and kept; browsers ask before they trust it",
    )
    who = parser.add_argument_group("who and how much")
    who.add_argument("--sessions", metavar="N", type=some, default=4, help="conversations at once (default: 4)")
    who.add_argument("--queue", metavar="N", type=count, default=50, help="callers who may wait (default: 50)")
    who.add_argument("--token", help="what a client must know; better given in the environment, as MOSHIVIS_TOKEN")
    who.add_argument(
        "--origin",
        metavar="URL",
        action="append",
        default=[],
        help="a web page's origin that may use the server beside its own, as https://example.org; repeatable",
    )
    who.add_argument(
        "--session-seconds", metavar="S", type=duration, default=3600, help="longest conversation (default: 3600)"
    )
    who.add_argument(
        "--idle-seconds",
        metavar="S",
        type=duration,
        default=60,
        help="a client silent for so long is cut (default: 60)",
    )
    parser.set_defaults(run=_serve)


def _add_chat(parser: argparse.ArgumentParser) -> None:
    parser.description = (
        "Talk with a server that moshivis serve has started, by microphone and loudspeaker (with the package "
        "sounddevice; wear headphones), or with questions from files. Ctrl-C ends the conversation."
    )
    parser.add_argument("url", metavar="URL", help="the address that moshivis serve prints, or a host")
    parser.add_argument("--image", metavar="FILE", help="a picture to talk about")
    parser.add_argument(
        "--audio", metavar="FILE", action="append", default=[], help="a question, WAV, FLAC, MP3 or OGG; repeatable"
    )
    parser.add_argument("--out", metavar="FILE.wav", help="record both voices, user left and assistant right")
    parser.add_argument("--seconds", metavar="S", type=duration, help="end after so long")
    parser.add_argument("--json", action="store_true", help="print one JSON object and nothing else")
    server = parser.add_argument_group("the server")
    server.add_argument("--token", help="if it wants one; better given in the environment, as MOSHIVIS_TOKEN")
    server.add_argument("--insecure", action="store_true", help="accept any certificate, like one that is self-signed")
    how = parser.add_argument_group("how to answer (default: as the server likes)")
    how.add_argument("--seed", metavar="N", type=seed, help="the same seed and the same sound, the same answer")
    how.add_argument(
        "--temperature", metavar="T", type=not_negative, help="of the speech tokens; 0 takes the likeliest"
    )
    how.add_argument("--text-temperature", metavar="T", type=not_negative, help="of the text tokens")
    how.add_argument("--top-k", metavar="K", type=count, help="draw from the K likeliest tokens only")
    parser.set_defaults(run=_chat)


def _add_train(parser: argparse.ArgumentParser) -> None:
    parser.description = (
        "Train by a recipe. The same command run again, after whatever ended it, goes on from its newest checkpoint. "
        "With several GPUs: torchrun --nproc-per-node 8 -m moshivis train RECIPE"
    )
    parser.add_argument("recipe", metavar="RECIPE", help="a YAML file, or one that comes with the package: paper, mini")
    parser.add_argument(
        "overrides", metavar="KEY=VALUE", nargs="*", help="over what the recipe says: steps=100 optimiser.rate=3e-4"
    )
    parser.add_argument("--dry-run", action="store_true", help="say what it would take, and do nothing")
    parser.add_argument("--ranks", metavar="N", type=some, help="processes that a dry run reckons with (default: 1)")
    parser.set_defaults(run=_train)


def _add_merge(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("adapters", metavar="FILE", help="the adapters.safetensors of a training run")
    parser.add_argument("out", metavar="DIR", help="a new folder")
    _add_model(parser, "mini")
    parser.add_argument(
        "--layout", choices=("moshivis", "released"), default="moshivis", help="of the files (default: moshivis)"
    )
    parser.set_defaults(run=_merge)


def _add_conform(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("paths", metavar="DIR", nargs="+", help="folders that hold cases")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32")
    parser.set_defaults(run=_conform)


def _add_bench_step(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--preset", metavar="NAME", help="a model by its configuration, with --random weights")
    parser.add_argument("--random", action="store_true", help="random weights: nothing is loaded")
    _add_model(parser, None)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", help="float32, bfloat16, float16")
    parser.add_argument("--batch", metavar="N", type=int, default=1, help="conversations at once (default: 1)")
    parser.add_argument("--frames", metavar="N", type=int, default=100, help="frames measured (default: 100)")
    parser.add_argument("--threads", metavar="N", type=int, help="of the CPU")
    parser.set_defaults(run=_bench_step)


def _add_bench_codec(parser: argparse.ArgumentParser) -> None:
    parser.description = (
        "Stream the codec frame by frame on the CPU, with random weights. Peers run in the same rounds, from an "
        "environment of their own: python -m venv peers; peers/bin/pip install torch numpy safetensors "
        "huggingface_hub sentencepiece sphn einops; peers/bin/pip install --no-deps moshi==0.2.13 rustymimi==0.4.1; "
        "moshivis bench codec --peers --peer-python peers/bin/python"
    )
    parser.add_argument("--preset", metavar="NAME", default="moshika-vis", help="moshika-vis (full size) or mini")
    parser.add_argument("--batch", metavar="N", type=int, default=1, help="conversations at once (default: 1)")
    parser.add_argument("--frames", metavar="N", type=int, default=100, help="frames measured (default: 100)")
    parser.add_argument(
        "--warm-up", metavar="N", type=count, help="frames before (default: as many as the codec remembers)"
    )
    parser.add_argument("--threads", metavar="N", type=int, help="of each contender")
    parser.add_argument("--peers", action="store_true", help="beside moshi and rustymimi, as far as they are installed")
    parser.add_argument("--peer-python", metavar="PATH", help="interpreter that finds peers (default: this one)")
    parser.set_defaults(run=_bench_codec)


def _add_bench_serve(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--sessions", metavar="N[,N…]", default="1,2,4,8", help="conversations at once (default: 1,2,4,8)"
    )
    parser.add_argument("--seconds", metavar="S", type=duration, default=30.0, help="of each run (default: 30)")
    _add_model(parser, "mini")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", metavar="N", type=int, help="of the CPU, for a tick")
    parser.set_defaults(run=_bench_serve)


def _add_bench_train(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--model", metavar="MODEL", default="mini", help="embedded model, folder, or preset with random weights"
    )
    parser.add_argument("--rows", metavar="B", type=int, default=16, help="samples of a step (default: 16)")
    parser.add_argument("--steps", metavar="N", type=int, default=10, help="steps that count (default: 10)")
    parser.add_argument("--frames", metavar="T", type=int, default=192, help="of the longest speech sample")
    parser.add_argument("--tokens", metavar="T", type=int, default=96, help="of the longest speechless sample")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--activation-checkpointing", action="store_true", help="keep less, compute twice")
    parser.set_defaults(run=_bench_train)


def _add_model(parser: argparse.ArgumentParser, default: str | None) -> None:
    parser.add_argument(
        "--model",
        metavar="DIR_OR_REPO",
        default=default,
        help="mini (comes with the package), a folder, or a repository of the Hugging Face Hub",
    )
    parser.add_argument("--download", action="store_true", help="allow fetching the repository")


def _add_adapters(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--adapters", metavar="FILE", help="what a training run left, in place of the adapters of the model"
    )


# verbs ----------------------------------------------------------------------------------------------------------------


def _talk(arguments: argparse.Namespace) -> int:
    from moshivis.commands.talk import run_talk

    return run_talk(arguments)


def _serve(arguments: argparse.Namespace) -> int:
    from moshivis.commands.serve import run_serve

    return run_serve(arguments)


def _chat(arguments: argparse.Namespace) -> int:
    from moshivis.commands.chat import run_chat

    return run_chat(arguments)


def _train(arguments: argparse.Namespace) -> int:
    need(("pyarrow",), extra="train", what="training")
    from moshivis.commands.train import run_train

    return run_train(arguments)


def _merge(arguments: argparse.Namespace) -> int:
    from moshivis.commands.adapters import run_merge

    return run_merge(arguments)


def _conform(arguments: argparse.Namespace) -> int:
    from moshivis.conform.run import run_conform

    return run_conform(arguments.paths, arguments.device, arguments.dtype)


def _bench_step(arguments: argparse.Namespace) -> int:
    from moshivis.inference.bench import run_bench_step

    return run_bench_step(arguments)


def _bench_codec(arguments: argparse.Namespace) -> int:
    from moshivis.inference.bench_codec import run_bench_codec

    return run_bench_codec(arguments)


def _bench_train(arguments: argparse.Namespace) -> int:
    need(("pyarrow",), extra="train", what="training")
    from moshivis.training.bench import run_bench_train

    return run_bench_train(arguments)


def _bench_serve(arguments: argparse.Namespace) -> int:
    from moshivis.commands.serve import NEEDED

    need(NEEDED, extra="serve", what="the server")
    from moshivis.serve.bench import run_bench_serve

    return run_bench_serve(arguments)


if __name__ == "__main__":
    sys.exit(main())
