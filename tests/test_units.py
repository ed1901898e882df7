"""Index arithmetic: which rows and columns belong to which unit."""

from dataclasses import replace

import pytest
import torch

from secateur.units import Group, Size, Slice, aligned, block_size, packed, sliced_shapes, take, unit_params

SHAPES = {"q": (12, 8), "k": (4, 8), "o": (8, 12), "norm": (4,), "other": (3, 3)}
GROUP = Group(
    "layers.0.kv_groups",
    0,
    "kv_groups",
    2,
    "o",
    (Slice("q", 0), Slice("k", 0), Slice("o", 1)),
    (("heads", 3),),
    ("norm",),
)


EXPERTS = Group(
    "layers.0.expert_channels",
    0,
    "expert_channels",
    12,
    "experts",
    (Slice("gate_up_proj", 1, copies=2), Slice("down_proj", 2)),
    (("moe_intermediate_size", 1),),
    experts=3,
)
"""Three experts of four channels."""


def group(units: int) -> Group:
    return replace(GROUP, units=units)


def test_a_unit_is_a_block_of_consecutive_rows() -> None:
    weight = torch.arange(12.0).reshape(6, 2)
    assert torch.equal(take(weight, Slice("w", 0), group(3), torch.tensor([0, 2])), weight[[0, 1, 4, 5]])


def test_a_unit_is_a_block_of_consecutive_columns() -> None:
    weight = torch.arange(12.0).reshape(2, 6)
    assert torch.equal(take(weight, Slice("w", 1), group(3), torch.tensor([1])), weight[:, 2:4])


def test_fused_gate_and_up_rows_are_cut_in_both_copies() -> None:
    gate, up = torch.arange(4.0), 10 + torch.arange(4.0)
    fused = torch.cat([gate, up]).unsqueeze(1)
    kept = torch.tensor([1, 3])
    assert take(fused, Slice("w", 0, copies=2), group(4), kept).flatten().tolist() == [1, 3, 11, 13]


def test_keeping_none_leaves_an_empty_tensor() -> None:
    assert take(torch.ones(6, 2), Slice("w", 0), group(3), torch.tensor([], dtype=torch.long)).shape == (0, 2)


def test_a_dimension_that_does_not_divide_is_a_broken_invariant() -> None:
    with pytest.raises(AssertionError, match="7 entries do not divide into 1 × 3 units"):
        block_size((7, 2), Slice("w", 0), 3)


def test_parameters_of_a_unit() -> None:
    assert unit_params(GROUP, SHAPES) == 6 * 8 + 2 * 8 + 8 * 6


def test_shapes_after_slicing() -> None:
    assert sliced_shapes([GROUP], {GROUP.name: Size(1)}, SHAPES) == SHAPES | {"q": (6, 8), "k": (2, 8), "o": (8, 6)}


def test_a_closed_sublayer_loses_what_its_units_shared() -> None:
    shapes = sliced_shapes([GROUP], {GROUP.name: Size(0)}, SHAPES)
    assert "norm" not in shapes
    assert shapes["other"] == (3, 3)


def test_experts_are_packed_to_the_width_of_the_widest_and_closed_ones_left_out() -> None:
    pack = packed(EXPERTS, torch.tensor([1, 2, 3, 10]))
    assert pack.experts.tolist() == [0, 2]
    assert pack.channels_EW.tolist() == [[1, 2, 3], [2, 0, 1]]
    assert pack.filled_EW.tolist() == [[True, True, True], [True, False, False]]


def test_two_experts_are_left_of_a_closed_mixture() -> None:
    assert packed(EXPERTS, torch.tensor([], dtype=torch.int64)).channels_EW.tolist() == [[0], [0]]
    assert packed(EXPERTS, torch.tensor([9])).experts.tolist() == [0, 2]


def test_experts_with_biases_stay() -> None:
    assert packed(replace(EXPERTS, shared=("down_proj_bias",)), torch.tensor([1])).experts.tolist() == [0, 1, 2]


def test_widths_are_multiples_of_eight_where_the_dense_one_is() -> None:
    wide = replace(EXPERTS, units=3 * 24)
    assert [aligned(wide, w) for w in (0, 1, 8, 9, 24)] == [8, 8, 8, 16, 24]
    assert [aligned(EXPERTS, w) for w in (0, 1, 3)] == [1, 1, 3]
    assert packed(wide, torch.arange(9)).channels_EW.shape == (2, 16)


def test_experts_channels_are_cut_of_each_expert_by_itself() -> None:
    fused = torch.arange(3 * 8.0).reshape(3, 8, 1)
    cut = take(fused, EXPERTS.slices[0], EXPERTS, torch.tensor([1, 2, 8, 11]))
    assert cut[..., 0].tolist() == [[1, 2, 5, 6], [16, 19, 20, 23]]


def test_shapes_of_experts_after_slicing() -> None:
    shapes = {"gate_up_proj": (3, 8, 5), "down_proj": (3, 5, 4)}
    assert unit_params(EXPERTS, shapes) == 15
    found = sliced_shapes([EXPERTS], {EXPERTS.name: Size(2, 2)}, shapes)
    assert found == {"gate_up_proj": (2, 4, 5), "down_proj": (2, 5, 2)}
