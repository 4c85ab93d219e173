"""Location of an FFN's neurons in its tensors; reordering them changes nothing else."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

from d2m_model.config import FFNLayout
from d2m_model.layout import FFNTensors, expert_views, ffn_tensors, inverse_order, neuron_axis, permute_neurons


def test_tensors_of_a_double_blocks_ffn_are_its_own() -> None:
    expected = FFNTensors(up="double_blocks.7.txt_mlp.0", first_row=0, down="double_blocks.7.txt_mlp.2", first_column=0)
    assert ffn_tensors("double_blocks.7.txt_mlp", 3072) == expected


def test_tensors_of_a_single_blocks_ffn_are_shared_with_attention() -> None:
    tensors = ffn_tensors("single_blocks.0", 3072)
    assert (tensors.up, tensors.first_row) == ("single_blocks.0.linear1", 3 * 3072)  # behind q, k, v
    assert (tensors.down, tensors.first_column) == ("single_blocks.0.linear2", 3072)  # behind the attention's output


def test_a_name_that_is_no_ffn_is_refused() -> None:
    with pytest.raises(ValueError, match=r"'img_in' is not an FFN's name; expected double_blocks"):
        ffn_tensors("img_in", 3072)


@pytest.mark.parametrize(
    ("tensor", "name", "expected"),
    [
        ("double_blocks.1.img_mlp.0.weight", "double_blocks.1.img_mlp", (0, 0)),
        ("double_blocks.1.img_mlp.0.bias", "double_blocks.1.img_mlp", (0, 0)),
        ("double_blocks.1.img_mlp.2.weight", "double_blocks.1.img_mlp", (1, 0)),
        ("double_blocks.1.img_mlp.2.bias", "double_blocks.1.img_mlp", None),  # b2 belongs to no neuron
        ("double_blocks.1.txt_mlp.0.weight", "double_blocks.1.img_mlp", None),
        ("double_blocks.11.img_mlp.0.weight", "double_blocks.1.img_mlp", None),
        ("single_blocks.2.linear1.weight", "single_blocks.2", (0, 24)),
        ("single_blocks.2.linear1.bias", "single_blocks.2", (0, 24)),
        ("single_blocks.2.linear2.weight", "single_blocks.2", (1, 8)),
        ("single_blocks.2.linear2.bias", "single_blocks.2", None),
        ("single_blocks.2.modulation.lin.weight", "single_blocks.2", None),
    ],
)
def test_axis_and_first_index_of_the_neurons(tensor: str, name: str, expected: tuple[int, int] | None) -> None:
    assert neuron_axis(tensor, name, hidden_size=8) == expected


@given(
    neurons=st.integers(1, 40),
    first=st.integers(0, 5),
    behind=st.integers(0, 5),
    axis=st.integers(0, 1),
    dtype=st.sampled_from([torch.int32, torch.int64]),
    seed=st.integers(0, 2**31),
)
def test_permuting_moves_the_neurons_and_only_them_and_can_be_undone(
    neurons: int, first: int, behind: int, axis: int, dtype: torch.dtype, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(neurons, generator=generator).to(dtype)
    tensor = torch.randn(first + neurons + behind, 3, generator=generator)
    tensor = tensor.t() if axis == 1 else tensor
    original = tensor.clone()
    permuted = permute_neurons(tensor, axis, first, order)
    for i in range(neurons):
        assert torch.equal(permuted.select(axis, first + i), tensor.select(axis, first + int(order[i])))
    assert torch.equal(permuted.narrow(axis, 0, first), tensor.narrow(axis, 0, first))
    assert torch.equal(permuted.narrow(axis, first + neurons, behind), tensor.narrow(axis, first + neurons, behind))
    assert torch.equal(permute_neurons(permuted, axis, first, inverse_order(order)), original)
    assert torch.equal(tensor, original)


def test_a_permuted_ffn_computes_what_the_dense_one_does() -> None:
    generator = torch.Generator().manual_seed(0)
    up, bias, down, x = (
        torch.randn(*s, generator=generator, dtype=torch.float64) for s in ((32, 8), (32,), (8, 32), (5, 8))
    )
    order = torch.randperm(32, generator=generator)
    permuted = [permute_neurons(t, axis, 0, order) for t, axis in ((up, 0), (bias, 0), (down, 1))]
    dense = F.gelu(x @ up.t() + bias) @ down.t()
    torch.testing.assert_close(F.gelu(x @ permuted[0].t() + permuted[1]) @ permuted[2].t(), dense)


def test_experts_are_views_of_the_right_neurons() -> None:
    layout = FFNLayout(shared=4, experts=3, width=2)
    up, bias, down = torch.arange(50.0).view(10, 5), torch.arange(10.0), torch.arange(50.0).view(5, 10)
    up_EFH, bias_EF, down_HEF = expert_views(up, bias, down, layout)
    assert (up_EFH.shape, bias_EF.shape, down_HEF.shape) == ((3, 2, 5), (3, 2), (5, 3, 2))
    for expert in range(3):
        neurons = slice(4 + 2 * expert, 6 + 2 * expert)
        assert torch.equal(up_EFH[expert], up[neurons])
        assert torch.equal(bias_EF[expert], bias[neurons])
        assert torch.equal(down_HEF[:, expert], down[:, neurons])
    for view, weight in ((up_EFH, up), (bias_EF, bias), (down_HEF, down)):
        assert view.untyped_storage().data_ptr() == weight.untyped_storage().data_ptr()
