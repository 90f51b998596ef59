"""`moshivis train`: run a recipe, go on with it, or say what it would take."""

from __future__ import annotations

import argparse
import os

from moshivis.errors import InputError
from moshivis.training.recipe_file import read_recipe


def run_train(arguments: argparse.Namespace) -> int:
    """Raises MoshivisError for anything that the user can mend."""
    recipe = read_recipe(arguments.recipe, arguments.overrides)
    if arguments.dry_run:
        from moshivis.training.plan import plan, print_plan

        print_plan(plan(recipe, ranks=arguments.ranks or 1))
        return 0
    if arguments.ranks is not None:
        raise InputError(
            "--ranks is what --dry-run reckons with; N processes train by torchrun --nproc-per-node N -m moshivis train"
        )
    from moshivis.training.run import train

    result = train(recipe)
    if os.environ.get("RANK", "0") == "0":
        print(result)
    return 0
