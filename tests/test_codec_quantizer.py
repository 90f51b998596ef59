"""The split residual quantizer: what it learns in training, step by step, and the laws of its codes."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch import Tensor

from moshivis.checkpoints.mimi import from_released, to_released
from moshivis.codec.quantizer import DEAD_CODE_INTERVAL, Codebook, SplitQuantizer
from moshivis.config import QuantizerConfig

GOLDEN = Path(os.environ.get("MOSHIVIS_GOLDEN", Path(__file__).parent / "golden")) / "mimi_training"
CHECKED = settings(derandomize=True, deadline=None, max_examples=30)


def reference() -> tuple[SplitQuantizer, dict[str, Tensor]]:
    """The quantizer of the reference numbers before its first step, in training mode, and the numbers."""
    released = load_file(GOLDEN / "quant_train.weights.safetensors")
    released = {"quantizer." + name.removeprefix("w."): tensor for name, tensor in released.items()}
    quantizer = SplitQuantizer(32, QuantizerConfig(dimension=8, bins=32, num_codebooks=4))
    ours = from_released(released)
    quantizer.load_state_dict({name.removeprefix("quantizer."): tensor for name, tensor in ours.items()})
    return quantizer.train(), load_file(GOLDEN / "quant_train.io.safetensors")


def released_state(quantizer: SplitQuantizer) -> dict[str, Tensor]:
    state = to_released({f"quantizer.{name}": tensor.clone() for name, tensor in quantizer.state_dict().items()})
    return {name.removeprefix("quantizer."): tensor for name, tensor in state.items()}


def random_quantizer(codebooks: int = 4, *, seed: int = 0, bins: int = 16) -> SplitQuantizer:
    torch.manual_seed(seed)
    quantizer = SplitQuantizer(12, QuantizerConfig(dimension=6, bins=bins, num_codebooks=codebooks))
    for module in quantizer.modules():
        if isinstance(module, Codebook):
            module.embedding_sum.normal_()
            module.initialized.fill_(1)
    return quantizer.eval()


# reference numbers ---------------------------------------------------------------------------------------------------


def test_evaluation_equals_the_reference() -> None:
    quantizer, numbers = reference()
    output = quantizer.eval()(numbers["z"], 4)
    torch.testing.assert_close(output.latent, numbers["eval.x"])
    assert torch.equal(output.codes, numbers["eval.codes"])
    assert output.penalty == numbers["eval.penalty"] == 0
    torch.testing.assert_close(quantizer.decode(output.codes), numbers["eval.x"])
    assert torch.equal(quantizer.encode(numbers["z"], 4), numbers["eval.codes"])


def test_two_training_steps_equal_the_reference() -> None:
    """Outputs, penalty and codebooks after each step; the codebooks move after the step has used them."""
    quantizer, numbers = reference()
    for step, z in ((1, "z"), (2, "z2")):
        output = quantizer(numbers[z], 4)
        torch.testing.assert_close(output.latent, numbers[f"train{step}.x"])
        assert torch.equal(output.codes, numbers[f"train{step}.codes"])
        torch.testing.assert_close(output.penalty, numbers[f"train{step}.penalty"])
        after = f"after{step}."
        expected = {name.removeprefix(after): number for name, number in numbers.items() if name.startswith(after)}
        assert len(expected) == 12
        state = released_state(quantizer)
        for name, number in expected.items():
            assert torch.allclose(state[name], number, rtol=1e-5, atol=1e-5), name


def test_gradients_equal_the_reference() -> None:
    quantizer, numbers = reference()
    z = numbers["z"].clone().requires_grad_()
    output = quantizer(z, 4)
    signal = (output.latent * numbers["grad_out"]).sum()
    for name, loss in (("sum_x_gradout", signal), ("penalty", output.penalty)):
        (gradient,) = torch.autograd.grad(loss, z, retain_graph=True)
        torch.testing.assert_close(gradient, numbers[f"train1.grad_z_of_{name}"])
    (signal + output.penalty).backward()
    for part, ours in (("rvq_first", quantizer.semantic), ("rvq_rest", quantizer.acoustic)):
        for side in ("input_proj", "output_proj"):
            weight = ours.get_parameter(f"{side}.weight")
            torch.testing.assert_close(weight.grad, numbers[f"train1.grad.{part}.{side}.weight"], rtol=1e-5, atol=1e-5)


def test_bypass_of_all_rows_equals_the_reference() -> None:
    quantizer, numbers = reference()
    output = quantizer(numbers["z"], 4, torch.ones(3, dtype=torch.bool))
    torch.testing.assert_close(output.latent, numbers["bypass.x"])


# training ------------------------------------------------------------------------------------------------------------


def test_bypass_is_row_by_row() -> None:
    quantizer = random_quantizer()
    z = torch.randn(3, 12, 5)
    rows = torch.tensor([True, False, True])
    mixed, plain, passed = quantizer(z, 4, rows), quantizer(z, 4), quantizer(z, 4, torch.ones(3, dtype=torch.bool))
    torch.testing.assert_close(mixed.latent[rows], passed.latent[rows])
    torch.testing.assert_close(mixed.latent[~rows], plain.latent[~rows])
    assert not torch.allclose(plain.latent, passed.latent)


def test_levels_are_initialised_one_forward_after_the_other() -> None:
    torch.manual_seed(0)
    quantizer = SplitQuantizer(12, QuantizerConfig(dimension=6, bins=8, num_codebooks=4)).train()
    books = [*quantizer.semantic.levels, *quantizer.acoustic.levels]
    z = torch.randn(2, 12, 30)
    seen = []
    for _ in range(4):
        seen.append([bool(book.get_buffer("initialized")) for book in books])
        quantizer(z, 4)
    assert seen == [
        [False, False, False, False],
        [True, True, False, False],
        [True, True, True, False],
        [True, True, True, True],
    ]


def test_k_means_finds_clusters() -> None:
    torch.manual_seed(1)
    centres = 10 * torch.randn(4, 3)
    points = centres.repeat_interleave(50, 0) + 0.1 * torch.randn(200, 3)
    book = Codebook(3, 16)
    book.initialise(points)
    assert (torch.cdist(centres, book.embedding).amin(1) < 0.5).all()
    assert book.cluster_usage.sum() >= 200 and (book.cluster_usage >= 1).all()


def test_fewer_vectors_than_entries_initialise_too() -> None:
    book = Codebook(3, 16)
    points = torch.randn(5, 3)
    book.initialise(points)
    assert torch.cdist(points, book.embedding).amin(1).max() < 1e-4


def test_an_unused_entry_is_replaced_by_a_vector_of_the_batch_at_every_fifth_step() -> None:
    book = Codebook(2, 4)
    book.initialized.fill_(1)
    book.embedding_sum.copy_(torch.tensor([[0.0, 0.0], [1.0, 0.0], [0.0, 1.0], [99.0, 99.0]]) * 8)
    book.cluster_usage.fill_(8)
    book.embedding_sum[3] *= 0.01 / 8
    book.cluster_usage[3] = 0.01
    x = torch.rand(20, 2)
    for step in range(1, DEAD_CODE_INTERVAL + 1):
        assert torch.cdist(x, book.embedding[3:]).min() > 10, step
        book.learn(x, book.encode(x))
    assert torch.cdist(x, book.embedding[3:]).min() < 1e-4
    assert book.cluster_usage[3] > 1


def test_codebooks_learn_in_training_only() -> None:
    quantizer = random_quantizer()
    before = {name: tensor.clone() for name, tensor in quantizer.state_dict().items()}
    quantizer(torch.randn(2, 12, 9), 4)
    assert all(torch.equal(tensor, before[name]) for name, tensor in quantizer.state_dict().items())
    quantizer.train()(torch.randn(2, 12, 9), 3)
    moved = [not torch.equal(tensor, before[name]) for name, tensor in quantizer.state_dict().items()]
    names = [name for name, yes in zip(before, moved, strict=True) if yes]
    learnt = {f"{part}.levels.{level}" for part, level in (("semantic", 0), ("acoustic", 0), ("acoustic", 1))}
    assert {name.rpartition(".")[0] for name in names} == learnt


def test_training_brings_the_codebooks_to_the_data() -> None:
    """The averages follow: the same data is quantized better and better."""
    quantizer = random_quantizer(bins=32).train()
    z = torch.randn(4, 12, 100)
    penalties = [quantizer(z, 4).penalty.item() for _ in range(120)]
    assert penalties[-1] < 0.7 * penalties[0]


def test_one_codebook_trains_too() -> None:
    quantizer = random_quantizer().train()
    output = quantizer(torch.randn(2, 12, 5), 1)
    assert output.codes.shape == (2, 1, 5)
    torch.testing.assert_close(output.latent, output.semantic)
    assert output.penalty > 0


# codes ---------------------------------------------------------------------------------------------------------------


@given(codebooks=st.integers(1, 6), batch=st.integers(1, 3), frames=st.integers(1, 7), seed=st.integers(0, 999))
@CHECKED
def test_fewer_codebooks_are_a_prefix_of_more(codebooks: int, batch: int, frames: int, seed: int) -> None:
    quantizer = random_quantizer(codebooks, seed=seed)
    z = torch.randn(batch, 12, frames)
    with torch.no_grad():
        full = quantizer.encode(z, codebooks)
        assert full.shape == (batch, codebooks, frames) and full.dtype == torch.int64
        for fewer in range(1, codebooks + 1):
            assert torch.equal(quantizer.encode(z, fewer), full[:, :fewer])
            assert torch.equal(quantizer(z, fewer).codes, full[:, :fewer])
            assert quantizer.decode(full[:, :fewer]).shape == (batch, 12, frames)


@given(seed=st.integers(0, 999))
@CHECKED
def test_every_code_is_the_nearest_entry_to_what_is_left_over(seed: int) -> None:
    quantizer = random_quantizer(4, seed=seed)
    z = torch.randn(1, 12, 6)
    with torch.no_grad():
        codes = quantizer.encode(z, 4)
        left = quantizer.acoustic.input_proj(z)[0].T
        for level, book in enumerate(quantizer.acoustic.levels):
            assert isinstance(book, Codebook)
            distances = (left[:, None] - book.embedding[None]).norm(dim=-1)
            assert torch.equal(codes[0, 1 + level], distances.argmin(1))
            left = left - book.embedding[codes[0, 1 + level]]


def test_the_first_of_equal_entries_is_taken() -> None:
    book = Codebook(2, 5)
    book.embedding_sum.copy_(torch.tensor([[5.0, 5], [1, 2], [1, 2], [0, 0], [1, 2]]))
    assert book.encode(torch.tensor([[1.0, 2.0]])).tolist() == [1]


def test_an_entry_that_was_never_used_stays_finite() -> None:
    book = Codebook(2, 3)
    book.cluster_usage.copy_(torch.tensor([0.0, 3e-6, 2.0]))
    book.embedding_sum.copy_(torch.tensor([[1.0, 1.0], [1.0, 1.0], [4.0, 2.0]]))
    expected = torch.tensor([[1e5, 1e5], [1e5, 1e5], [2.0, 1.0]])
    torch.testing.assert_close(book.embedding, expected)


@pytest.mark.parametrize("code", [-2, -1, 16])
def test_a_code_that_is_none_is_refused(code: int) -> None:
    with pytest.raises(IndexError):
        random_quantizer().decode(torch.full((1, 4, 2), code))


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_codes_of_either_integer_type_decode(dtype: torch.dtype) -> None:
    quantizer = random_quantizer()
    codes = torch.randint(16, (2, 4, 3))
    torch.testing.assert_close(quantizer.decode(codes.to(dtype)), quantizer.decode(codes))
