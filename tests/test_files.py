"""Files are whole or not there, whatever kills their writer, and what it leaves is found and removed."""

import errno
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from runs import leftovers
from secateur import files
from secateur.files import InputError, meant, replacing, scratch_folder, sweep, to_disk, write_text


@pytest.fixture(scope="module")
def dead():
    """The number of a process that is no more."""
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    return process.pid


def make(path, content="x"):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(content)
    return path


def names(folder):
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}


def test_what_a_dead_process_left_half_written_goes_and_all_else_stays(tmp_path, dead):
    for name in (f".plan.json.{dead}.tmp/plan.json", f".model.{dead}.tmp/model/config.json",
                 f"model/.README.md.{dead}.tmp/README.md", f".model.{dead}.tmp/model/.README.md.{dead}.tmp/README.md",
                 f"self/.00000.safetensors.{dead}.tmp/.tmpAbCdEf", f".plan.json.{os.getpid()}.tmp",
                 f".plan.json.{2**80}.tmp"):  # fmt: skip
        make(tmp_path / name)
    others = {"plan.json", ".hidden", "notes.tmp", ".notes.tmp", ".plan.json.tmp", f".plan.json.{os.getppid()}.tmp",
              f"model/.git.{dead}.temp"}  # fmt: skip
    for name in others:
        make(tmp_path / name)
    sweep(tmp_path)
    assert names(tmp_path) == others
    sweep(tmp_path / "nowhere")


def test_a_folder_that_was_set_aside_comes_back_unless_its_successor_is_there(tmp_path, dead):
    make(tmp_path / f".model.{dead}.earlier.tmp" / "config.json", "old")
    make(tmp_path / f".model.{dead}.tmp" / "config.json", "new")
    sweep(tmp_path)
    assert names(tmp_path) == {"model/config.json"} and (tmp_path / "model" / "config.json").read_text() == "old"
    make(tmp_path / f".model.{dead}.earlier.tmp" / "config.json", "older")
    sweep(tmp_path)
    assert names(tmp_path) == {"model/config.json"} and (tmp_path / "model" / "config.json").read_text() == "old"


@pytest.mark.parametrize("folder", [False, True])
def test_content_is_on_the_disk_before_it_gets_its_name_and_what_speaks_of_the_old_goes_between(
    tmp_path, monkeypatch, folder
):
    target, outdated, done = tmp_path / "model", [make(tmp_path / "verify.json"), tmp_path / "states"], []
    make(tmp_path / "states" / "one")
    (target.mkdir if folder else target.touch)()
    rename = Path.replace
    monkeypatch.setattr(files, "to_disk", to_disk)
    monkeypatch.setattr(os, "fsync", lambda _: done.append(("synced", [p.exists() for p in outdated])))
    monkeypatch.setattr(
        Path, "replace", lambda p, to: (done.append((to.name, [o.exists() for o in outdated])), rename(p, to))
    )
    with replacing(target, outdated) as temporary:
        make(temporary / "config.json" if folder else temporary)
    aside = [(f".model.{os.getpid()}.earlier.tmp", [False, False])] * folder
    assert done == [("synced", [True, True]), *aside, ("model", [False, False])]
    assert leftovers(tmp_path) == []


def test_files_are_as_readable_as_the_umask_says(tmp_path):
    before = os.umask(0o027)
    try:
        with replacing(tmp_path / "gates.safetensors") as temporary:
            save_file({"z": torch.zeros(2)}, temporary)
    finally:
        os.umask(before)
    assert (tmp_path / "gates.safetensors").stat().st_mode & 0o777 == 0o640


def test_all_files_of_a_folder_go_to_the_disk(tmp_path, monkeypatch):
    synced = []
    for name in ("a", "b/c"):
        make(tmp_path / name)
    monkeypatch.setattr(os, "fsync", lambda number: synced.append(Path(f"/dev/fd/{number}").resolve().name))
    to_disk(tmp_path)
    assert len(synced) == 2


def test_a_disk_that_turns_out_full_when_it_is_written_to_leaves_the_old_file_and_what_speaks_of_it(
    tmp_path, monkeypatch
):
    target, outdated = make(tmp_path / "plan.json", "old"), make(tmp_path / "verify.json")

    def full(_descriptor):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(files, "to_disk", to_disk)
    monkeypatch.setattr(os, "fsync", full)
    said = r"cannot write .*plan\.json: No space left on device"
    with pytest.raises(InputError, match=said), replacing(target, [outdated]) as temporary:
        make(temporary, "new")
    assert target.read_text() == "old" and outdated.exists() and leftovers(tmp_path) == []


def test_a_file_inside_of_what_is_not_whole_yet_is_named_as_it_would_be_called(tmp_path):
    with pytest.raises(InputError) as error, replacing(tmp_path / "model") as temporary:
        make(temporary / "config.json")
        write_text(temporary / "config.json" / "README.md", "")
    assert str(error.value).startswith(f"cannot write {tmp_path / 'model' / 'config.json' / 'README.md'}: ")


def test_temporary_names_are_told_from_others():
    assert meant(".plan.json.12.tmp") == meant(".plan.json.12.earlier.tmp") == "plan.json"
    assert meant("plan.json") == "plan.json" and meant(".plan.json.tmp") == ".plan.json.tmp"


def test_a_scratch_folder_goes_at_the_end_and_is_swept_if_its_process_was_killed(tmp_path, dead):
    with pytest.raises(KeyError), scratch_folder(tmp_path, "offload") as folder:
        make(folder / "weights.dat")
        raise KeyError
    assert not list(tmp_path.iterdir())
    make(tmp_path / folder.name.replace(str(os.getpid()), str(dead)) / "weights.dat")
    sweep(tmp_path)
    assert not list(tmp_path.iterdir())
