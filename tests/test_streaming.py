"""Models larger than memory: planned and exported without being loaded, to the same bytes."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from runs import complaint, leftovers, prune_arguments, secateur, write_checkpoint, write_texts
from secateur import session as sessions
from secateur.describe import describe
from secateur.export import export
from secateur.load import load
from test_families import MIXTURES, PARTLY, WHOLE, build
from tiny import random_plan, tiny


def exported(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.name != "README.md"}


def from_files(model, folder, dtype):
    """Writes the model, then exports it once in memory and once from its files."""
    from runs import small_tokenizer

    model.to(dtype).save_pretrained(folder / "dense")
    small_tokenizer().save_pretrained(folder / "dense")
    whole = load(str(folder / "dense"), "cpu", "auto", False)
    on_disk = load(str(folder / "dense"), "cpu", "auto", False, folder / "scratch")
    for loaded, name in ((whole, "in-memory"), (on_disk, "from-files")):
        plan = random_plan(describe(whole.model))
        export(loaded.model, None, loaded.description, plan, folder / name, dtype=loaded.checkpoint_dtype)
    return exported(folder / "in-memory"), exported(folder / "from-files")


@pytest.mark.parametrize("model_type", [*WHOLE, *PARTLY])
def test_dense_models_are_exported_from_their_files_to_the_same_bytes(model_type, tmp_path):
    in_memory, streamed = from_files(build(model_type), tmp_path, torch.bfloat16)
    assert "model.safetensors" in in_memory and in_memory == streamed


@pytest.mark.parametrize("family", MIXTURES)
def test_so_are_mixtures(family, tmp_path):
    model_type, changes = MIXTURES[family]
    in_memory, streamed = from_files(tiny(model_type, **changes), tmp_path, torch.bfloat16)
    assert in_memory == streamed


@pytest.mark.parametrize("model_type", ["llama", "gemma2", "qwen2"])
def test_dense_models_need_no_second_copy(model_type, tmp_path):
    from_files(build(model_type), tmp_path, torch.bfloat16)
    assert not any((tmp_path / "scratch").glob("*")), "weights were written anew"


def test_weights_that_are_wider_than_the_configuration_says_are_rounded_once(tmp_path):
    write_checkpoint(tmp_path / "dense")
    config = json.loads((tmp_path / "dense" / "config.json").read_text())
    (tmp_path / "dense" / "config.json").write_text(json.dumps(config | {"dtype": "bfloat16"}))
    found = []
    for scratch in (None, tmp_path / "scratch"):
        loaded = load(str(tmp_path / "dense"), "cpu", "auto", False, scratch)
        plan = random_plan(loaded.description)
        export(loaded.model, None, loaded.description, plan, tmp_path / "out", dtype=loaded.checkpoint_dtype)
        found.append(exported(tmp_path / "out"))
    assert found[0] == found[1]


@pytest.fixture
def run(tmp_path):
    """A finished run on a bfloat16 model in several shards."""
    model = write_checkpoint(tmp_path / "dense", torch.bfloat16)
    assert secateur(*prune_arguments(model, write_texts(tmp_path / "t.jsonl"), tmp_path / "run", dtype="auto")) == 0
    return tmp_path / "run"


def never_loaded(monkeypatch):
    """Whatever reads all weights into memory fails."""

    def refuse(name, device, dtype, trust, offload=None, *more):
        assert offload is not None, "the model was loaded"
        return load(name, device, dtype, trust, offload, *more)

    monkeypatch.setattr(sessions, "load", refuse)


def test_export_never_loads_a_dense_model(run, monkeypatch):
    before = exported(run / "model")
    never_loaded(monkeypatch)
    assert secateur("export", run) == 0
    assert exported(run / "model") == before
    assert not leftovers(run)


def test_what_does_not_fit_in_memory_is_planned_without_losses_and_exported(run, monkeypatch, capsys):
    before, plan = exported(run / "model"), json.loads((run / "plan.json").read_text())
    never_loaded(monkeypatch)
    monkeypatch.setattr(sessions, "free_memory", lambda: 1000)
    assert secateur("plan", run) == 0
    assert "the held-out loss was not measured" in " ".join(capsys.readouterr().out.split())
    again = json.loads((run / "plan.json").read_text())
    assert again["kept"] == plan["kept"] and again["rounding"]["held_out_planned"] is None
    assert secateur("export", run) == 0
    assert exported(run / "model") == before
    monkeypatch.undo()
    assert secateur("verify", run) == 0 and secateur("eval", run) == 0 and secateur("report", run) == 0


def test_low_memory_plans_without_the_model_in_any_shape_and_size(run, monkeypatch, capsys):
    never_loaded(monkeypatch)
    assert secateur("plan", run, "--shape", "aligned:8", "--low-memory") == 0
    assert secateur("export", run, "--low-memory") == 0
    assert secateur("plan", run, "--sparsity", 0.4, "--low-memory") == 0
    assert secateur("export", run / "sizes" / "0.4", "--low-memory") == 0
    said = complaint(capsys, "plan", run, "--compare", "--low-memory")
    assert "--compare measures losses" in said and "--low-memory leaves the weights on disk" in said
    assert f"secateur plan {run} --shape uniform" in complaint(
        capsys, "export", run, "--shape", "uniform", "--low-memory"
    )


def test_other_weights_are_noticed_when_they_are_exported_from_their_files(run, capsys):
    path = run.parent / "dense" / "model.safetensors"
    tensors = load_file(path)
    save_file({name: tensor + 1 for name, tensor in tensors.items()}, path, metadata={"format": "pt"})
    assert secateur("export", run) == 0
    assert "found on other weights" in capsys.readouterr().out
