"""Index arithmetic: which rows and columns belong to which unit."""

import pytest
import torch

from secateur.units import Group, Slice, block_size, sliced_shapes, take, unit_params

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


def test_a_unit_is_a_block_of_consecutive_rows() -> None:
    weight = torch.arange(12.0).reshape(6, 2)
    assert torch.equal(take(weight, Slice("w", 0), 3, torch.tensor([0, 2])), weight[[0, 1, 4, 5]])


def test_a_unit_is_a_block_of_consecutive_columns() -> None:
    weight = torch.arange(12.0).reshape(2, 6)
    assert torch.equal(take(weight, Slice("w", 1), 3, torch.tensor([1])), weight[:, 2:4])


def test_fused_gate_and_up_rows_are_cut_in_both_copies() -> None:
    gate, up = torch.arange(4.0), 10 + torch.arange(4.0)
    fused = torch.cat([gate, up]).unsqueeze(1)
    kept = torch.tensor([1, 3])
    assert take(fused, Slice("w", 0, copies=2), 4, kept).flatten().tolist() == [1, 3, 11, 13]


def test_keeping_none_leaves_an_empty_tensor() -> None:
    assert take(torch.ones(6, 2), Slice("w", 0), 3, torch.tensor([], dtype=torch.long)).shape == (0, 2)


def test_a_dimension_that_does_not_divide_is_a_broken_invariant() -> None:
    with pytest.raises(AssertionError, match="7 entries do not divide into 1 × 3 units"):
        block_size((7, 2), Slice("w", 0), 3)


def test_parameters_of_a_unit() -> None:
    assert unit_params(GROUP, SHAPES) == 6 * 8 + 2 * 8 + 8 * 6


def test_shapes_after_slicing() -> None:
    assert sliced_shapes([GROUP], {GROUP.name: 1}, SHAPES) == SHAPES | {"q": (6, 8), "k": (2, 8), "o": (8, 6)}


def test_a_closed_sublayer_loses_what_its_units_shared() -> None:
    shapes = sliced_shapes([GROUP], {GROUP.name: 0}, SHAPES)
    assert "norm" not in shapes
    assert shapes["other"] == (3, 3)
