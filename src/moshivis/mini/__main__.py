"""`python -m moshivis.mini`: `build` makes the miniature, `improve` trains it further, `measure` says how it is."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import torch

from moshivis import option_values
from moshivis.devices import usable_device
from moshivis.errors import MoshivisError
from moshivis.extras import need

BUILT = (
    "clips",
    "tokenizer",
    "recogniser",
    "codec",
    "voice",
    "codes",
    "pictures",
    "vision",
    "language",
    "adapters",
    "listener",
    "model",
)
IMPROVED = ("clips", "codes", "pictures", "language", "adapters", "model")
WEIGHTS = Path(__file__).parent / "weights"


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m moshivis.mini", description=__doc__)
    verbs = parser.add_subparsers(dest="verb", required=True)
    build = verbs.add_parser("build", help="train the miniature from nothing, in stages that resume")
    improve = verbs.add_parser("improve", help="train a finished miniature further, in stages that resume")
    improve.add_argument("--model", type=Path, default=WEIGHTS, help="what to begin with; the embedded one by default")
    for verb, stages, seed in ((build, BUILT, 0), (improve, IMPROVED, 1)):
        verb.add_argument("--out", type=Path, required=True, help="working folder (about 15 GB)")
        verb.add_argument("--device", default="cpu", help="cpu or cuda")
        verb.add_argument(
            "--workers", type=option_values.some, default=2, help="processes that train, speak and encode"
        )
        verb.add_argument("--stage", choices=stages, help="only this stage, and what it needs")
        verb.add_argument(
            "--seed",
            type=option_values.seed,
            default=seed,
            help="of what is drawn and said; another sitting takes another",
        )
    measure = verbs.add_parser("measure", help="ask a model fresh questions about fresh scenes")
    measure.add_argument("--model", type=Path, default=WEIGHTS, help="model folder; the embedded one by default")
    measure.add_argument("--count", type=option_values.some, default=300, help="scenes")
    measure.add_argument("--seed", type=option_values.seed, default=1)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    try:
        return _measure(arguments) if arguments.verb == "measure" else _train(arguments)
    except MoshivisError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except OSError as error:
        where = f"{error.filename}: " if error.filename else ""
        print(f"error: {where}{error.strerror or error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130


def _train(arguments: argparse.Namespace) -> int:
    from moshivis.mini.build import Build
    from moshivis.mini.improve import Sitting
    from moshivis.mini.parallel import keep_memory

    keep_memory()
    where = arguments.out, usable_device(arguments.device), arguments.workers, arguments.seed
    building = arguments.verb == "build"
    chain = Build(*where) if building else Sitting(arguments.model, *where)
    for name in [arguments.stage] if arguments.stage else BUILT if building else IMPROVED:
        getattr(chain, name)()
    return 0


def _measure(arguments: argparse.Namespace) -> int:
    from moshivis.checkpoints.load import load_model
    from moshivis.mini.listener import FILE, load_listener
    from moshivis.mini.measure import measure, report

    checkpoint = load_model(arguments.model)
    listener = None
    if (arguments.model / FILE).exists():
        need(("jiwer",), extra="eval", what="measuring words")
        listener = load_listener(arguments.model)
    else:
        print(f"{arguments.model} brings no {FILE}: its speech is not transcribed", file=sys.stderr)
    report(measure(checkpoint, listener, count=arguments.count, seed=arguments.seed))
    return 0


if __name__ == "__main__":
    sys.exit(main())
