"""States of training: which are kept, which is taken, and what is told of those that are damaged."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from secateur import checkpoints as checkpointing
from secateur.checkpoints import Checkpoints, State
from secateur.files import InputError


def state(step, loss=None, settings="these"):
    generator = torch.Generator().manual_seed(step)
    tensors = {
        "z": torch.randn(40, generator=generator), "open": torch.rand(7, generator=generator) > 0.5,
        "moment": torch.randn(3, 4, generator=generator).bfloat16(), "done": torch.tensor(step),
        "none": torch.zeros(0, 3),
    }  # fmt: skip
    return State(step, settings, tensors, {"fixed": step / 3}, loss)


def filled(folder, steps, **options):
    checkpoints = Checkpoints(folder / "states", **options)
    for step in steps:
        checkpoints.save(state(step))
    return checkpoints


def kept(checkpoints):
    return sorted(int(path.stem.removeprefix("step-")) for path in checkpoints.folder.iterdir())


def file(checkpoints, step):
    return checkpoints.folder / f"step-{step:08d}.safetensors"


def flip(path, at):
    content = bytearray(path.read_bytes())
    content[at] ^= 4
    path.write_bytes(content)


def test_what_is_saved_is_found_again_bit_for_bit(tmp_path):
    checkpoints = filled(tmp_path, [50])
    found, saved = checkpoints.latest("these"), state(50)
    assert (found.step, found.settings, found.about, found.loss) == (50, "these", {"fixed": 50 / 3}, None)
    assert found.tensors.keys() == saved.tensors.keys()
    for name, tensor in saved.tensors.items():
        assert found.tensors[name].dtype == tensor.dtype and torch.equal(found.tensors[name], tensor)


def test_equal_states_are_equal_files(tmp_path):
    one, other = (file(filled(tmp_path / name, [3]), 3).read_bytes() for name in ("one", "other"))
    assert one == other


def test_the_last_two_are_kept_and_the_best(tmp_path):
    checkpoints = Checkpoints(tmp_path / "states")
    for step, loss in ((1, None), (2, 0.5), (3, 0.3), (4, 0.4), (5, None), (6, 0.35)):
        checkpoints.save(state(step, loss))
    assert kept(checkpoints) == [3, 5, 6]
    assert Checkpoints(tmp_path / "states").latest("these").step == 6
    checkpoints.save(state(7, 0.1))
    checkpoints.save(state(8, 0.2))
    assert kept(checkpoints) == [7, 8]


def test_states_are_due_at_multiples_and_after_the_last_step():
    assert [step for step in range(1, 12) if Checkpoints(Path(), every=4).due(step, 11)] == [4, 8, 11]


def test_states_of_other_settings_are_refused_with_what_to_delete(tmp_path):
    checkpoints = filled(tmp_path, [3])
    with pytest.raises(InputError, match=f"belongs to other settings than these; delete {checkpoints.folder}"):
        checkpoints.latest("those")


DAMAGE = {
    "cut": lambda path: path.write_bytes(path.read_bytes()[:-9]),
    "empty": lambda path: path.write_bytes(b""),
    "zeros": lambda path: path.write_bytes(bytes(path.stat().st_size)),
    "a bit of a tensor": lambda path: flip(path, -5),
    "a bit of what it says": lambda path: flip(path, path.read_bytes().index(b"these") + 1),
    "a bit of its step": lambda path: flip(path, path.read_bytes().index(b'step\\": ') + 8),
    "another file": lambda path: save_file({"z": torch.zeros(2)}, path),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_state_is_left_out_with_a_warning_and_the_one_before_is_taken(tmp_path, damage):
    said = []
    checkpoints = filled(tmp_path, [50, 100, 150], warn=said.append)
    DAMAGE[damage](file(checkpoints, 150))
    assert checkpoints.latest("these").step == 100
    assert len(said) == 1 and str(file(checkpoints, 150)) in said[0] and "damaged" in said[0] and "\n" not in said[0]
    DAMAGE[damage](file(checkpoints, 100))
    assert checkpoints.latest("these") is None and len(said) == 3


def test_a_damaged_state_does_not_count_as_one_of_the_last_two(tmp_path):
    checkpoints = filled(tmp_path, [50, 73])
    flip(file(checkpoints, 73), -5)
    assert checkpoints.latest("these").step == 50
    checkpoints.save(state(100))
    assert kept(checkpoints) == [50, 100]
    flip(file(checkpoints, 100), -5)
    assert checkpoints.latest("these").step == 50
    checkpoints.save(state(100))  # written anew
    checkpoints.save(state(150))
    assert kept(checkpoints) == [100, 150]


def test_states_beyond_the_one_gone_on_from_are_removed(tmp_path):
    checkpoints = filled(tmp_path, [50, 100])
    checkpoints.save(state(20))
    assert kept(checkpoints) == [20]


@pytest.mark.parametrize(
    ("steps", "said", "left"), [(100, "", True), (100, "es", True), (100, "no", False), (150, "", False)]
)
def test_states_after_the_last_step_are_left_over_and_go(tmp_path, steps, said, left):
    checkpoints = filled(tmp_path, [50, 100])
    assert checkpoints.left_over(steps, said) is left
    assert checkpoints.folder.exists() is not left
    assert Checkpoints(tmp_path / "nowhere").left_over(0) is False


def test_what_is_discarded_is_known_as_complete_until_all_of_it_is_gone(tmp_path, monkeypatch):
    checkpoints = filled(tmp_path, [50, 100])
    removed = []
    monkeypatch.setattr(checkpointing, "remove", removed.append)
    checkpoints.discard()
    assert removed == [file(checkpoints, 50), file(checkpoints, 100), checkpoints.folder]
