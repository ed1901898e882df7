"""The file of learned gates: what is saved is loaded, and what does not fit is refused in one line."""

import json

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from runs import small_llama
from secateur.describe import describe
from secateur.files import InputError
from secateur.gates import Gates, architecture_fingerprint, load_gates, save_gates


def architecture(**changes):
    description = describe(small_llama(**changes))
    return description.groups, architecture_fingerprint(description.groups, description.shapes)


@pytest.fixture
def saved(tmp_path):
    groups, fingerprint = architecture()
    z_N = torch.randn(sum(g.units for g in groups), generator=torch.Generator().manual_seed(0))
    gates = Gates(z_N, groups, {"architecture": fingerprint, "steps": 7, "model": "é"})
    save_gates(tmp_path / "gates.safetensors", gates)
    return tmp_path / "gates.safetensors", gates, fingerprint


def complaint(path, groups, fingerprint):
    with pytest.raises(InputError) as error:
        load_gates(path, groups, fingerprint)
    assert "\n" not in str(error.value) and str(path) in str(error.value)
    return str(error.value)


def test_gates_survive_saving_and_loading_bit_for_bit(saved):
    path, gates, fingerprint = saved
    loaded = load_gates(path, gates.groups, fingerprint)
    assert torch.equal(loaded.z_N, gates.z_N)
    assert gates.about.items() <= loaded.about.items()


def test_gate_values_are_never_negative_and_equal_z_where_open(saved):
    _, gates, _ = saved
    values = torch.cat(list(gates.values().values()))
    assert torch.equal(values, gates.z_N.relu())
    assert {name: len(v) for name, v in gates.values().items()} == {g.name: g.units for g in gates.groups}


@pytest.mark.parametrize("changes", [{"intermediate_size": 48}, {"num_hidden_layers": 2}, {"num_key_value_heads": 4}])
def test_gates_of_other_units_are_refused(saved, changes):
    path, _, _ = saved
    if "num_hidden_layers" in changes:  # every group of the smaller model is there, of the right size
        assert "another architecture" in complaint(path, *architecture(**changes))
    else:
        assert "does not fit" in complaint(path, *architecture(**changes))


def test_gates_of_a_model_whose_weights_have_other_shapes_are_refused(saved):
    path, _, _ = saved
    assert "shapes of its weights differ" in complaint(path, *architecture(hidden_size=64))


@pytest.mark.parametrize("keep", [0, 5, 100, -1])
def test_a_truncated_file_is_refused(saved, keep):
    path, gates, fingerprint = saved
    path.write_bytes(path.read_bytes()[:keep])
    assert "learn" in complaint(path, gates.groups, fingerprint)


def test_a_safetensors_file_of_something_else_is_refused(saved):
    path, gates, fingerprint = saved
    save_file({"weight": torch.zeros(3)}, path)
    assert "not a gates file of format" in complaint(path, gates.groups, fingerprint)


def test_a_missing_file_is_named_with_the_command_that_writes_it(saved, tmp_path):
    _, gates, fingerprint = saved
    assert "secateur learn" in complaint(tmp_path / "none.safetensors", gates.groups, fingerprint)


def rewritten(path, groups, change=lambda tensors: None, **about):
    """The file with other tensors, or other words about them."""
    from safetensors.torch import load_file

    tensors = load_file(path)
    change(tensors)
    with safe_open(path, framework="pt") as file:
        said = json.loads(file.metadata()["secateur"])
    save_file(tensors, path, metadata={"secateur": json.dumps(said | about)})


@pytest.mark.parametrize(
    "about", [{"steps": None}, {"steps": -1}, {"steps": "7"}, {"steps": True}, {"steps": 1e3}, {"budget": "kv=0.5"},
              {"budget": None}, {"sparsity": "0.2"}, {"model": 3}, {"fixing": {"step": 1}}, {"experts": {"a": -1}},
              {"experts": None}, {"tokens": 10**16}, {"weights": ["a"]}],
    ids=str,
)  # fmt: skip
def test_gates_that_say_of_themselves_what_cannot_be_are_refused(saved, about):
    path, gates, fingerprint = saved
    rewritten(path, gates.groups, **about)
    said = complaint(path, gates.groups, fingerprint)
    assert "is not a valid gates file" in said and next(iter(about)) in said and "run `secateur learn` again" in said


CHANGES = {
    "nan": (
        lambda t: t["layers.0.channels"].__setitem__(3, float("nan")),
        "layers.0.channels holds values that are not",
    ),
    "infinite": (lambda t: t["layers.0.channels"].__setitem__(3, float("inf")), "not finite"),
    "dtype": (lambda t: t.update({"layers.0.channels": t["layers.0.channels"].double()}), "not a row of float32"),
    "shape": (lambda t: t.update({"layers.0.channels": t["layers.0.channels"].view(2, -1)}), "not a row of float32"),
    "length": (lambda t: t.update({"layers.0.channels": torch.ones(63)}), "does not fit: 64 units here, 63 there"),
    "values": (lambda t: t.update({f"value.{name}": -torch.ones(len(z)) for name, z in list(t.items())}), "negative"),
    "incomplete": (lambda t: t.update({"order.layers.0.channels": torch.ones(64)}), "order is incomplete"),
}


@pytest.mark.parametrize("case", CHANGES)
def test_gates_that_are_not_finite_rows_of_float32_for_each_group_are_refused(saved, case):
    path, gates, fingerprint = saved
    change, reason = CHANGES[case]
    rewritten(path, gates.groups, change)
    assert reason in complaint(path, gates.groups, fingerprint)


def test_orders_whose_groups_are_of_other_lengths_are_refused_though_their_sum_fits(saved):
    path, gates, fingerprint = saved

    def shift(tensors):
        for g in gates.groups:
            tensors[f"order.{g.name}"] = torch.ones(g.units)
        tensors["order.layers.0.channels"], tensors["order.layers.1.channels"] = torch.ones(65), torch.ones(63)

    rewritten(path, gates.groups, shift)
    assert "order is incomplete" in complaint(path, gates.groups, fingerprint)
