"""`python -m moshivis.mini build`: make the miniature."""

from __future__ import annotations

import argparse
from pathlib import Path

import torch

from moshivis.mini.build import Build

STAGES = (
    "clips",
    "tokenizer",
    "recogniser",
    "codec",
    "codes",
    "pictures",
    "vision",
    "language",
    "adapters",
    "listener",
)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m moshivis.mini")
    verbs = parser.add_subparsers(dest="verb", required=True)
    build = verbs.add_parser("build", help="train the miniature from nothing, in stages that resume")
    build.add_argument("--out", type=Path, required=True, help="working folder (about 2 GB)")
    build.add_argument("--device", default="cpu")
    build.add_argument("--workers", type=int, default=2, help="processes for synthesis and encoding")
    build.add_argument("--stage", choices=STAGES, help="only this stage (and what it needs)")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    chain = Build(arguments.out, torch.device(arguments.device), arguments.workers)
    for name in [arguments.stage] if arguments.stage else STAGES:
        getattr(chain, name)()


if __name__ == "__main__":
    main()
