"""The file of learned gates: what is saved is loaded, and what does not fit is refused in one line."""

import pytest
import torch
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
