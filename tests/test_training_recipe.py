"""Recipes: what is read, what is refused, and with which words."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import yaml

from moshivis.config import AdapterConfig
from moshivis.errors import InputError
from moshivis.training.recipe import AdapterRecipe, Recipe, adapter_config
from moshivis.training.recipe_file import PRESETS, read_recipe, recipe_from_dict, recipe_to_dict


def written(folder: Path, text: str) -> Path:
    path = folder / "recipe.yaml"
    path.write_text(text, encoding="utf-8")
    return path


def test_yaml_and_words_over_it(tmp_path: Path) -> None:
    path = written(
        tmp_path, "out: here\nsteps: 10\noptimiser: {rate: 1e-3}\ndata: {datasets: [{path: a, kind: speech}]}"
    )
    recipe = read_recipe(path, ["steps=20", "optimiser.betas=[0.5, 0.6]", "data.datasets.0.weight=2", "data.p_audio=1"])
    assert recipe.steps == 20 and recipe.optimiser.rate == 1e-3 and recipe.optimiser.betas == (0.5, 0.6)
    assert recipe.data.datasets[0].weight == 2.0
    assert recipe_from_dict(yaml.safe_load(yaml.safe_dump(recipe_to_dict(recipe)))) == recipe


@pytest.mark.parametrize(
    ("word", "message"),
    [
        ("optimizer.rate=1", "no key optimizer; did you mean optimiser?"),
        ("optimiser.ratte=1", "no key optimiser.ratte; did you mean optimiser.rate?"),
        ("steps=many", "steps must be a whole number, not 'many'"),
        ("steps=1.5", "steps must be a whole number, not 1.5"),
        ("compile=1", "compile must be true or false, not 1"),
        ("optimiser.rate=true", "optimiser.rate must be a number, not True"),
        ("train=lora8", "train must be one of adapters, lora, all, not 'lora8'"),
        ("data=3", "data must be a mapping"),
        ("lora.targets=in_proj", "lora.targets must be a list"),
        ("lora.targets=[head]", "lora.targets are some of in_proj, out_proj, linear_in, linear_out"),
        ("steps.more=1", "steps is a single value"),
        ("data.datasets.3.path=x", "the list has 0 entries"),
        ("steps", "'steps' is no key=value"),
        ("steps=[", "not readable as YAML"),
        ("steps=0", "steps must be 1 or more, not 0"),
        ("loss.user=-1", "loss.user must be 0 or more"),
        ("data.p_audio=1.5", "data.p_audio is a share from 0 to 1, not 1.5"),
        ("adapters.out_scale=0", "adapters.out_scale must be above 0, not 0"),
        ("seed=-1", "seed must be from 0 to"),
        ("seed=99999999999999999999", "seed must be from 0 to"),
        ("optimiser.betas.0.x=1", "0 is a single value"),
        ("lora.alpha=0", "lora.alpha must be above 0, not 0"),
        ("lora.rank=64", "the recipe sets `lora`, but train is adapters"),
        ("data.general=[{path: a, kind: speech}]", "used by data.p_concat alone, which is 0"),
        ("validation.samples=2", "validation.every=0 means never"),
        ("optimiser.ema=1", "optimiser.ema is a decay"),
        ("optimiser.betas=[0.9]", "optimiser.betas are two numbers"),
        ("batch.rows=10", "batch.rows=10 with data.p_audio=0.25 and 1 rank.* gives 2.5 speech and 7.5 speechless"),
        ("data.datasets=[{path: a, kind: speech}]", "asks for speechless samples, but data.datasets has none"),
        ("data.datasets=[{kind: speech}]", "does not say data.datasets.0.path"),
        ("data.datasets=[{path: a, kind: song}]", "data.datasets.0.kind must be one of speech, speechless"),
    ],
)
def test_what_cannot_be_is_refused_by_name(word: str, message: str, tmp_path: Path) -> None:
    path = written(tmp_path, "{out: here, steps: 10, data: {datasets: []}, optimiser: {betas: [0.9, 0.95]}}")
    with pytest.raises(InputError, match=message):
        read_recipe(path, [word])


def test_contradictions(tmp_path: Path) -> None:
    both = "data.datasets=[{path: a, kind: speech}, {path: a, kind: speechless}]"
    path = written(tmp_path, "out: here")
    with pytest.raises(InputError, match="needs data.general dialogues .*missing: speech, speechless"):
        read_recipe(path, [both, "data.p_concat=0.5"])
    with pytest.raises(InputError, match="validation.datasets names no held-out data"):
        read_recipe(path, [both, "validation.every=5"])
    with pytest.raises(InputError, match="parallel: ddp"):
        read_recipe(path, [both, "parallel=fsdp", "optimiser.matrices=muon"])
    for weight in ("0", ".nan", ".inf"):
        with pytest.raises(InputError, match="data: dataset a needs a weight above 0"):
            read_recipe(path, [both, f"data.datasets.1.weight={weight}"])
    general = "data.general=[{path: b, kind: speech}, {path: b, kind: speechless, weight: -1}]"
    with pytest.raises(InputError, match="data.general: dataset b needs a weight above 0, not -1"):
        read_recipe(path, [both, general, "data.p_concat=0.5"])
    with pytest.raises(InputError, match="parallel: ddp"):
        read_recipe(path, ["parallel=fsdp", "validation.samples=1", "validation.every=5"])
    with pytest.raises(InputError, match="does not say out"):
        read_recipe(written(tmp_path, "steps: 1"))
    with pytest.raises(InputError, match="neither a file nor one of the presets mini, paper"):
        read_recipe("papier")
    with pytest.raises(InputError, match="does not hold a recipe"):
        read_recipe(written(tmp_path, "- 1"))


@pytest.mark.parametrize(("share", "kind"), [("0", "speechless"), ("1", "speech")])
def test_general_dialogues_are_needed_of_what_is_trained_alone(share: str, kind: str, tmp_path: Path) -> None:
    path = written(tmp_path, "out: here\ndata: {datasets: [{path: a, kind: speech}, {path: a, kind: speechless}]}")
    words = [f"data.p_audio={share}", "data.p_concat=0.5"]
    read_recipe(path, [*words, f"data.general=[{{path: b, kind: {kind}}}]"])
    with pytest.raises(InputError, match=f"missing: {kind}$"):
        read_recipe(path, words)


@pytest.mark.parametrize(
    "words",
    [
        ["loss.text=0", "loss.audio=0"],
        ["loss.text=0", "data.p_audio=0"],
        ["loss.speech=0", "loss.audio=0", "data.p_audio=1"],
        ["loss.text=0", "loss.semantic=0", "loss.codebooks=1"],
    ],
)
def test_a_recipe_without_a_target(words: list[str], tmp_path: Path) -> None:
    path = written(tmp_path, "out: here")
    with pytest.raises(InputError, match="nothing has a target"):
        read_recipe(path, words)
    read_recipe(path, words[1:])


def test_rows_are_shared_exactly() -> None:
    recipe = Recipe(out="here")
    assert recipe.rows() == (16, 48)
    assert recipe.rows(8) == (2, 6)
    with pytest.raises(InputError, match="and 5 rank"):
        recipe.rows(5)


def test_the_presets_are_valid_and_the_papers_is_the_papers() -> None:
    for preset in PRESETS.glob("*.yaml"):
        read_recipe(preset.stem)
    paper = read_recipe("paper")
    assert (paper.steps, paper.batch.rows, paper.data.p_audio) == (50_000, 64, 0.25)
    assert (paper.loss.codebooks, paper.loss.semantic, paper.loss.acoustic) == (2, 100.0, 1.0)
    spoken, written = (
        {dataset.name for dataset in paper.data.datasets if dataset.kind == kind} for kind in ("speech", "speechless")
    )
    assert spoken == {"DOCCI PROP", "DOCCI LOC", "PixMo LEAD1", "PixMo COMB"}
    assert written == {
        *("PixelProse TS1", "PixelProse TS2", "PixelProse LEAD2"),
        *("TallyQA", "OCR-VQA", "RenderedText", "DocVQA"),
    }


def test_the_papers_general_dialogues_are_as_the_comment_says(tmp_path: Path) -> None:
    """`p_concat`, which the preset leaves out, by the lines that are commented out in it."""
    text = (PRESETS / "paper.yaml").read_text()
    commented = [f"  # {line}" for line in ("p_concat: 0.2", "general:")]
    assert all(line in text for line in commented)
    (tmp_path / "own.yaml").write_text(re.sub(r"^  # (p_concat|general|  - )", r"  \1", text, flags=re.MULTILINE))
    recipe = read_recipe(str(tmp_path / "own.yaml"))
    recipe.check()
    assert recipe.data.p_concat == 0.2
    assert [dataset.kind for dataset in recipe.data.general] == ["speech", "speechless"]


def test_adapters_start_anew_when_they_are_others() -> None:
    base = AdapterConfig()
    assert adapter_config(base, AdapterRecipe()) == (base, False)
    assert adapter_config(base, AdapterRecipe(gate="layer")) == (base, False)
    assert adapter_config(base, AdapterRecipe(fresh=True)) == (base, True)
    changed, fresh = adapter_config(base, AdapterRecipe(gate="none", sharing="kv", gate_activation="tanh", layers=(1,)))
    assert fresh and changed is not None
    assert (changed.gate, changed.sharing, changed.gate_activation, changed.layers) == ("none", "kv", "tanh", (1,))
    assert adapter_config(None, AdapterRecipe()) == (None, False)


def test_new_adapters_generate_with_the_keys_that_they_learn_with() -> None:
    unshared = AdapterConfig(sharing="none", stream_keys="first")  # as a released file without sharing is read
    assert adapter_config(unshared, AdapterRecipe()) == (unshared, False)
    for base, anew in (
        (unshared, AdapterRecipe(fresh=True)),
        (unshared, AdapterRecipe(gate="none")),
        (AdapterConfig(stream_keys="first"), AdapterRecipe(sharing="none")),
    ):
        changed, fresh = adapter_config(base, anew)
        assert fresh and changed is not None and (changed.sharing, changed.stream_keys) == ("none", "own")
