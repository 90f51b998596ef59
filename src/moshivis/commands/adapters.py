"""`moshivis adapters merge`: a base model and a file of adapters become one whole model."""

from __future__ import annotations

import argparse
from pathlib import Path

from moshivis.checkpoints.adapters import load_adapters, require_adapters
from moshivis.checkpoints.folder import save_folder
from moshivis.checkpoints.load import load_model
from moshivis.checkpoints.save_released import save_released
from moshivis.errors import InputError
from moshivis.files import refuse_occupied
from moshivis.inference.conversation import EMBEDDED


def run_merge(arguments: argparse.Namespace) -> int:
    """Write the merged model in our layout or in the released one. Raises MoshivisError for what the user can mend."""
    out = Path(arguments.out)
    source = EMBEDDED.get(arguments.model, arguments.model)
    require_adapters(arguments.adapters)
    try:
        refuse_occupied(out)  # now and not only when the model, which takes long to load, is to be written
        checkpoint = load_model(source, dtype="stored", allow_download=arguments.download)
        model, tokenizer = checkpoint.model, checkpoint.tokenizer
        load_adapters(arguments.adapters, model)
        text = None if tokenizer is None else tokenizer.model
        card = f"# {model.config.name}\n\nMerged from {arguments.model} and {Path(arguments.adapters).name}.\n"
        if arguments.layout == "released":
            save_released(out, model, text, checkpoint.sampling)
        else:
            save_folder(out, model, text, card, sampling=checkpoint.sampling)
    except FileExistsError as error:
        raise InputError(str(error)) from error
    print(out)
    return 0
