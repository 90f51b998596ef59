"""What a recipe asks for and the base or the machine cannot give is refused before anything is trained."""

from __future__ import annotations

import copy
import dataclasses
from pathlib import Path
from typing import Any

import pytest

from moshivis.cli import main
from moshivis.errors import InputError
from moshivis.model import MoshiVis
from moshivis.speech_lm.tokenizer import TextTokenizer
from moshivis.training.recipe_file import recipe_from_dict
from moshivis.training.setup import check_base
from training_support import pack, packed, run

__all__ = ["packed", "run"]  # fixtures


def test_a_device_that_is_not_there(run: Any) -> None:
    with pytest.raises(InputError, match="the device 'cuda:77' cannot be used here.*try cpu"):
        run(device="cuda:77")


def test_compiling_without_a_compiler(run: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(InputError, match=r"needs a C\+\+ compiler on a CPU: install g\+\+, or set compile=false"):
        run(compile=True)


@pytest.mark.parametrize("layers", [[99], [], [0, 0]])
def test_adapters_in_blocks_that_are_not_there(run: Any, layers: list[int]) -> None:
    with pytest.raises(InputError, match=r"adapters.layers are different blocks from 0 to 1, not \["):
        run(adapters__layers=layers)


def test_more_codebooks_than_the_model_speaks_in(run: Any) -> None:
    with pytest.raises(InputError, match="loss.codebooks=4, but the model speaks in 3 codebooks"):
        run(loss__codebooks=4)


def test_a_base_without_adapters_trains_whole_or_not_at_all(tiny_model: MoshiVis) -> None:
    blind = dataclasses.replace(tiny_model.config, adapters=None)
    for trained in ("adapters", "lora"):
        with pytest.raises(InputError, match=f"no adapters; train: {trained} needs both"):
            check_base(recipe_from_dict({"out": "out", "train": trained}), blind)


@pytest.mark.parametrize("adapters", [{}, {"sharing": "qkv"}])  # the base's own
def test_a_scale_that_nothing_would_use(run: Any, adapters: dict[str, str]) -> None:
    with pytest.raises(InputError, match="adapters.out_scale is for adapters that start anew"):
        run(adapters={"out_scale": 2.0, **adapters})


def test_all_of_a_model_without_text_to_learn(tiny_model: MoshiVis) -> None:
    whole = {"out": "out", "train": "all", "data": {"p_audio": 1.0}, "loss": {"speech": 0.0, "codebooks": 3}}
    with pytest.raises(InputError, match="train: all with loss.speech=0 would let what has no target decay"):
        check_base(recipe_from_dict(whole), tiny_model.config)


def test_ranks_without_a_dry_run(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", "mini", "out=out", "--ranks", "2"]) == 2
    assert "--ranks is what --dry-run reckons with" in capsys.readouterr().err and not Path("out").exists()


def test_data_of_another_model_is_refused(tiny_model: MoshiVis, packed: Path, run: Any, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="was made with another tokenizer than that of mini"):
        run(base="mini")


def test_another_codec_does_not_matter_to_what_is_written(
    tiny_model: MoshiVis, tiny_tokenizer: TextTokenizer, run: Any, tmp_path: Path
) -> None:
    other = copy.deepcopy(tiny_model)
    for buffer in other.codec.buffers():
        buffer.add_(1)
    folder = pack(tmp_path / "others", other, tiny_tokenizer)
    both = [{"path": str(folder), "kind": kind} for kind in ("speech", "speechless")]
    with pytest.raises(InputError, match="was made with another codec"):
        run(data__datasets=both)
    assert run("alone", data__datasets=both[1:], data__p_audio=0.0).exists()
    assert run("both", data__datasets=both, data__p_audio=0.0).exists()  # speech, which no batch asks for


def test_general_dialogues_with_pictures(run: Any, packed: Path) -> None:
    general = [{"path": str(packed), "kind": kind} for kind in ("speech", "speechless")]
    with pytest.raises(InputError, match=f"{packed} holds speech dialogues with a picture.* packed without pictures"):
        run(data__general=general, data__p_concat=0.001)  # no dialogue of these few steps would be wrapped
