"""Runs with weights that lie outside of the device's memory: the same gates, plan, export, proof and figures."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from runs import (
    SIZES,
    complaint,
    leftovers,
    prune_arguments,
    same_gates,
    secateur,
    small_tokenizer,
    write_checkpoint,
    write_texts,
)
from secateur import session as sessions
from secateur import stages
from secateur.depth import with_depth
from secateur.describe import describe
from secateur.export import export
from secateur.load import describe_selected, load, places, read_export
from secateur.verify import verified
from test_families import MIXTURES, WHOLE
from tiny import random_plan, tiny, tokens


@pytest.fixture(scope="module", params=[torch.bfloat16, torch.float32], ids=["bfloat16", "float32"])
def made(request, tmp_path_factory):
    """A checkpoint, text, and an ordinary run."""
    folder = tmp_path_factory.mktemp("offload")
    made = write_checkpoint(folder / "dense", request.param), write_texts(folder / "texts.jsonl")
    assert pruned(made, folder / "ordinary") == 0
    return *made, folder / "ordinary"


def pruned(made, folder, **options):
    return secateur(*prune_arguments(*made[:2], folder, precision="float32", **options))


def read(run, name):
    return json.loads((run / f"{name}.json").read_text())


def same_results(run, other):
    """verify.json and eval.json say the same but for rounding, and for what the clock says."""
    for mine, its in zip(read(run, "verify")["comparisons"], read(other, "verify")["comparisons"], strict=True):
        assert mine["passed"] and its["passed"]
        assert mine["dtype"] == its["dtype"]
        equal = ("allowed", "same_top_token", "tokens")
        assert [mine[key] for key in equal] == pytest.approx([its[key] for key in equal], rel=1e-3)
        assert mine["mean_difference"] == pytest.approx(its["mean_difference"], rel=0.1, abs=1e-6)
    mine, its = (read(folder, "eval") for folder in (run, other))
    mine["rounding"], its["rounding"] = ({"loss": r["rounding"]["held_out_planned"]} for r in (mine, its))
    for part in ("dense", "pruned", "rounding"):
        figures, others = ({k: v for k, v in found[part].items() if isinstance(v, float)} for found in (mine, its))
        assert figures and figures == pytest.approx(others, rel=1e-5)
    assert mine["samples"] == its["samples"]
    return True


@pytest.fixture
def placed(monkeypatch):
    """Of each model that is loaded which parts are on disk."""
    found = []

    def seen(model):
        found.append({name.split(".")[1]: p.is_meta for name, p in model.named_parameters() if "." in name})
        return model

    def watched(*arguments):
        loaded = load(*arguments)
        seen(loaded.model)
        return loaded

    monkeypatch.setattr(sessions, "load", watched)
    monkeypatch.setattr(stages, "read_export", lambda *arguments, **options: seen(read_export(*arguments, **options)))
    return found


def test_a_run_is_the_ordinary_one_and_leaves_the_layers_of_both_models_on_disk_to_its_end(made, tmp_path, placed):
    assert pruned(made, tmp_path / "run", offload="disk") == 0
    assert len(placed) == 3, "the dense model, and its export to be verified and to be evaluated"
    for model in placed:
        assert model["layers"] and not model["embed_tokens"], "layers on disk, the rest in memory"
    assert same_gates(made[2], tmp_path / "run")
    files = [run / "model" / "model.safetensors" for run in (made[2], tmp_path / "run")]
    assert files[0].read_bytes() == files[1].read_bytes()
    assert same_results(tmp_path / "run", made[2])
    assert not leftovers(tmp_path / "run")


def test_so_do_its_stages_by_themselves_and_those_of_a_model_that_does_not_fit(made, tmp_path, placed, monkeypatch):
    offloaded = shutil.copytree(made[2], tmp_path / "offloaded")
    config = offloaded / "config.yaml"
    config.write_text(config.read_text().replace("offload: none", "offload: disk"))
    ordinary = shutil.copytree(made[2], tmp_path / "ordinary")
    values = sum(t.numel() for t in load_file(made[0] / "model.safetensors").values())
    for run, free in ((offloaded, 1e12), (ordinary, 3 * values)):
        monkeypatch.setattr(sessions, "free_memory", lambda free=free: free)
        for name in ("verify", "eval"):
            (run / f"{name}.json").unlink()
        for command in ("plan", "export", "verify", "eval", "report"):
            assert secateur(command, run) == 0
        assert all(model.get("layers") for model in placed), "a whole model was loaded"
        assert same_results(run, made[2])
        assert not leftovers(run)


def test_a_model_that_fits_alone_leaves_the_layers_of_its_export_on_disk(made, tmp_path, placed, monkeypatch):
    run = shutil.copytree(made[2], tmp_path / "run")
    values = sum(t.numel() for t in load_file(made[0] / "model.safetensors").values())
    left = iter([4 * values, 0])
    monkeypatch.setattr(sessions, "free_memory", lambda: next(left))
    assert secateur("verify", run) == 0
    assert [model["layers"] for model in placed] == [False, True]


def test_a_wrong_weight_does_not_pass(made, tmp_path):
    assert pruned(made, tmp_path / "run", offload="disk") == 0
    path = tmp_path / "run" / "model" / "model.safetensors"
    tensors = load_file(path)
    tensors["model.layers.1.mlp.down_proj.weight"][3, 0] += 0.5
    save_file(tensors, path, metadata={"format": "pt"})
    assert secateur("verify", tmp_path / "run") == 1


def test_experts_are_offloaded_too(tmp_path, placed):
    model_type, changes = MIXTURES["qwen3_moe"]
    folder = tmp_path / "dense"
    mixture = tiny(model_type, **changes | {"vocab_size": SIZES["vocab_size"]}).bfloat16()
    mixture.save_pretrained(folder)
    small_tokenizer().save_pretrained(folder)
    texts = write_texts(tmp_path / "texts.jsonl")
    for name, offload in (("a", "none"), ("b", "disk")):
        assert pruned((folder, texts), tmp_path / name, offload=offload) == 0
    assert [model["layers"] for model in placed] == 3 * [False] + 3 * [True]
    assert same_gates(tmp_path / "a", tmp_path / "b")
    assert same_results(tmp_path / "b", tmp_path / "a")
    assert not leftovers(tmp_path / "b")


KINDS = {
    "tied": ("llama", {"tie_word_embeddings": True}, "off"),
    "norms behind sublayers": ("gemma2", {}, "joint"),
    "norms behind sublayers, no others": ("exaone4", {}, "joint"),
    "biases": ("qwen2", {}, "off"),
    "routers with buffers": (*MIXTURES["deepseek_v3"], "off"),
    "experts with biases": (*MIXTURES["gpt_oss"], "off"),
    "code of its own": (*MIXTURES["deepseek"], "off"),
    "latent attention": ("minicpm3", WHOLE["minicpm3"], "off"),
}


@pytest.mark.parametrize("kind", KINDS)
def test_the_proof_is_the_same_for_models_of_all_kinds(kind, tmp_path):
    model_type, changes, depth = KINDS[kind]
    proved_on_disk_as_in_memory(tiny(model_type, **changes), depth, tmp_path)


def proved_on_disk_as_in_memory(model, depth, tmp_path):
    name = str(tmp_path / "dense")
    model.bfloat16().save_pretrained(name)
    small_tokenizer().save_pretrained(name)
    described = describe_selected(name)
    whole = load(name, "cpu", "auto", False)
    description = with_depth(describe(whole.model), whole.model, depth)
    plan = random_plan(description)
    export(whole.model, None, description, plan, tmp_path / "out", dtype=torch.bfloat16)
    options = {"device_map": places(described, torch.device("cpu"), "disk"), "offload_folder": str(tmp_path / "e")}
    proofs = []
    for dense, where in (
        (whole, {}),
        (load(name, "cpu", "auto", False, tmp_path / "d", described, "disk"), options),
    ):
        exported = read_export(tmp_path / "out", torch.float32, **where)
        assert any(p.is_meta for p in exported.parameters()) == bool(where)
        before = [(p.dtype, p.is_meta) for p in dense.model.parameters()]
        groups = description.groups
        proofs.append(verified(dense.model, exported, groups, plan.gates(groups), {}, torch.bfloat16, tokens()))
        assert [(p.dtype, p.is_meta) for p in dense.model.parameters()] == before
    for in_memory, on_disk in zip(*proofs, strict=True):
        assert in_memory.passed and on_disk.passed
        assert on_disk.max_difference == pytest.approx(in_memory.max_difference, rel=0.1, abs=2e-6)
        assert on_disk.allowed == pytest.approx(in_memory.allowed, rel=1e-3)


def test_what_makes_no_sense_is_one_line(made, tmp_path, capsys):
    said = complaint(capsys, *prune_arguments(*made[:2], tmp_path / "a", offload="cpu", device="cpu"))
    assert "--offload cpu is for accelerators" in said and "--offload disk" in said
    said = complaint(capsys, *prune_arguments(*made[:2], tmp_path / "b", offload="disk", method="magnitude"))
    assert "--offload is for learning" in said
    said = complaint(capsys, *prune_arguments(*made[:2], tmp_path / "c", offload="disk"), "--shard")
    assert "leave it or --offload out" in said


@pytest.mark.parametrize(("words", "command"), [(["--recover", "lora"], "recover"), (["--refit"], "refit")])
def test_weights_are_changed_in_memory_alone_which_is_said_before_anything_is_learned(
    made, tmp_path, capsys, placed, words, command
):
    said = complaint(capsys, *prune_arguments(*made[:2], tmp_path / "run", offload="disk"), *words)
    assert f"--{command} changes weights" in said and f"`secateur {command} RUN`" in said
    assert not (tmp_path / "run").exists()
    assert pruned(made, tmp_path / "run", offload="disk") == 0
    placed.clear()
    more = words if command == "recover" else []
    assert secateur(command, tmp_path / "run", *more) == 0
    assert placed and not any(model["layers"] for model in placed)
    assert secateur("eval", tmp_path / "run") == 0
