"""The data sets of a recipe, mixed by weight."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from moshivis.data.concat import Concatenated
from moshivis.data.excerpt import Excerpts
from moshivis.data.mixture import Mixture
from moshivis.data.sample import Dataset, Kind
from moshivis.data.shard_format import Manifest, codec_fingerprint, tokenizer_fingerprint
from moshivis.data.shards import ShardDataset, open_shards
from moshivis.errors import InputError
from moshivis.model import MoshiVis
from moshivis.speech_lm.tokenizer import TextTokenizer
from moshivis.training.recipe import DataRecipe, DatasetRecipe, Recipe


def require_data(recipe: DataRecipe) -> None:
    """Raises InputError if the recipe names no data."""
    if not recipe.datasets:
        raise InputError("the recipe names no data: set data.datasets, each with a path and a kind")


def training_sets(recipe: DataRecipe, seed: int) -> tuple[Dataset | None, Dataset | None]:
    """Speech and speechless samples as the recipe mixes them; None where `p_audio` takes none of that kind.

    Raises InputError for folders that are missing, damaged, or without samples of their kind, and for general dialogues
    with pictures.
    """
    speech = _training_set(recipe, "speech", seed) if recipe.p_audio > 0 else None
    return speech, _training_set(recipe, "speechless", seed) if recipe.p_audio < 1 else None


def held_out_sets(datasets: Sequence[DatasetRecipe], recipe: DataRecipe) -> tuple[Dataset | None, Dataset | None]:
    """Speech and speechless validation samples: of one data set in the order they are stored; of several mixed,
    as far as none comes twice.

    Raises InputError as `training_sets` does.
    """
    return _excerpts(datasets, "speech", None, recipe), _excerpts(datasets, "speechless", None, recipe)


def check_made_for(model: MoshiVis, tokenizer: TextTokenizer | None, datasets: Sequence[DatasetRecipe]) -> None:
    """Raise InputError for a folder whose tokens are of another tokenizer or codec than the model's.

    A model without a tokenizer of its own, as with random weights, takes any.
    """
    if tokenizer is None:
        return
    text, codec = tokenizer_fingerprint(tokenizer), codec_fingerprint(model.codec)
    for dataset in datasets:
        manifest = Manifest.read(Path(dataset.path))
        compared = [("tokenizer", manifest.tokenizer, text)]
        if dataset.kind == "speech":  # no codes are read of the others
            compared.append(("codec", manifest.codec or codec, codec))
        for what, theirs, ours in compared:
            if theirs != ours:
                raise InputError(
                    f"{dataset.path} was made with another {what} than that of {model.config.name}; "
                    "make it again with: moshivis data tokenize --model …"
                )


def check_pictures(recipe: Recipe) -> bool:
    """Whether a conversation of the kinds in use has a picture.

    Raises InputError if none has and adapters are all that is trained.
    """
    data = recipe.data
    opened = [shards for kind in sorted(recipe.kinds()) for shards, _ in _opened(data.datasets, kind, None, data)]
    pictured = any(shards.pictured for shards in opened)
    if recipe.train == "adapters" and not pictured:
        raise InputError(
            "no data set that is used holds a picture, and without pictures adapters learn nothing: pack "
            'conversations with an "image", or set train: lora'
        )
    return pictured


def _training_set(recipe: DataRecipe, kind: Kind, seed: int) -> Dataset | None:
    dialogues = _excerpts(recipe.datasets, kind, seed, recipe)
    opened = _opened(recipe.general, kind, seed, recipe)
    if dialogues is None or not recipe.p_concat:
        return dialogues
    for shards, _ in opened:
        if shards.pictured:
            raise InputError(
                f"{shards.folder} holds {kind} dialogues with a picture, which would be heard beside that of another "
                "dialogue; as data.general give dialogues that are packed without pictures"
            )
    general = _mixed(opened, kind, seed)
    assert general is not None
    return Concatenated(dialogues, general, probability=recipe.p_concat, longest=_longest(kind, recipe), seed=seed)


def _excerpts(datasets: Sequence[DatasetRecipe], kind: Kind, seed: int | None, recipe: DataRecipe) -> Dataset | None:
    mixed = _mixed(_opened(datasets, kind, seed, recipe), kind, seed)
    return None if mixed is None else Excerpts(mixed, longest=_longest(kind, recipe), seed=seed or 0)


def _longest(kind: Kind, recipe: DataRecipe) -> int:
    return recipe.max_frames if kind == "speech" else recipe.max_tokens


_Weighted = list[tuple[ShardDataset, float]]


def _opened(datasets: Sequence[DatasetRecipe], kind: Kind, seed: int | None, recipe: DataRecipe) -> _Weighted:
    """Those of one kind, with their weights."""
    chosen = [dataset for dataset in datasets if dataset.kind == kind]
    opened: _Weighted = []
    for number, dataset in enumerate(chosen):
        shards = open_shards(
            dataset.path,
            kind,
            seed=None if seed is None else seed + number,
            name=dataset.name or Path(dataset.path).name,
            verify=recipe.verify,
            on_corrupt=recipe.on_corrupt,
        )
        opened.append((shards, dataset.weight))
    return opened


def _mixed(opened: _Weighted, kind: Kind, seed: int | None) -> Dataset | None:
    if len(opened) > 1:
        return Mixture(opened, kind, seed or 0)
    return opened[0][0] if opened else None
