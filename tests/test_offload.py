"""Runs with weights that lie outside of the device's memory: the same gates, plan, export, proof and figures."""

import json
import shutil

import pytest
import torch
from accelerate.hooks import attach_align_device_hook
from accelerate.utils import OffloadedWeightsLoader
from safetensors.torch import load_file, save_file

from runs import (
    SIZES,
    complaint,
    leftovers,
    prune_arguments,
    random_tokens,
    same_gates,
    secateur,
    small_tokenizer,
    write_checkpoint,
    write_texts,
)
from secateur import exported
from secateur import session as sessions
from secateur.attach import attached
from secateur.depth import with_depth
from secateur.describe import describe
from secateur.export import export
from secateur.load import describe_selected, load, places, read_export
from secateur.offloaded import weight_of
from secateur.passes import recomputing
from secateur.verify import verified, with_weights_in
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
    monkeypatch.setattr(exported, "read_export", lambda *arguments, **options: seen(read_export(*arguments, **options)))
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


@pytest.fixture
def offloaded(made, tmp_path):
    """The ordinary run, as if it had been made with `--offload disk`."""
    run = shutil.copytree(made[2], tmp_path / "offloaded")
    config = run / "config.yaml"
    said = config.read_text()
    assert "offload: none" in said
    config.write_text(said.replace("offload: none", "offload: disk"))
    return run


def test_so_do_its_stages_by_themselves_and_those_of_a_model_that_does_not_fit(
    made, offloaded, tmp_path, placed, monkeypatch
):
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


def test_a_wrong_weight_does_not_pass(offloaded):
    path = offloaded / "model" / "model.safetensors"
    tensors = load_file(path)
    tensors["model.layers.1.mlp.down_proj.weight"][3, 0] += 0.5
    save_file(tensors, path, metadata={"format": "pt"})
    assert secateur("verify", offloaded) == 1


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


def test_no_weight_of_a_layer_stays_in_memory_when_gradients_have_been_computed(made, tmp_path):
    found = []
    for where in ((), (tmp_path / "scratch", None, "disk")):
        loaded = load(str(made[0]), "cpu", "auto", False, *where)
        groups = loaded.description.groups
        gates = {g.name: torch.full((g.units,), 0.7, requires_grad=True) for g in groups}
        with attached(loaded.model, groups, gates):
            with recomputing(loaded.model, True):
                loss = loaded.model(random_tokens(2, 8), use_cache=False).logits.square().mean()
            found.append(torch.cat(torch.autograd.grad(loss, gates.values())))
        assert all(p.is_meta == bool(where) for n, p in loaded.model.named_parameters() if ".layers." in n)
    assert torch.equal(*found)


def test_many_sizes_are_learned_one_after_the_other(made, tmp_path, placed):
    words = ["--sweep", "0.2:0.4", "--pick", "loss<=9"]
    for name, offload in (("a", "none"), ("b", "disk")):
        arguments = prune_arguments(*made[:2], tmp_path / name, precision="float32", offload=offload)
        i = arguments.index("--sparsity")
        assert secateur(*arguments[:i], *arguments[i + 2 :], *words) == 0
    sizes = [path.relative_to(tmp_path / "a") for path in (tmp_path / "a").glob("sizes/0.*")]
    assert len(sizes) == 3 and all(same_gates(tmp_path / "a" / size, tmp_path / "b" / size) for size in sizes)
    half = len(placed) // 2
    assert not any(model["layers"] for model in placed[:half]) and all(model["layers"] for model in placed[half:])
    assert same_results(tmp_path / "b" / "sizes" / "0.4", tmp_path / "a" / "sizes" / "0.4")


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


def test_so_it_is_for_layers_in_the_memory_of_a_processor(tmp_path):
    """What `--offload cpu` does for an accelerator, with the processor in its place: values lie in a dictionary."""
    dense = with_weights_in(with_weights_in(tiny("gemma2"), torch.bfloat16), torch.float32)
    description = with_depth(describe(dense), dense, "joint")
    plan, groups = random_plan(description), description.groups
    export(dense, None, description, plan, tmp_path / "out", dtype=torch.bfloat16)
    models = dense, read_export(tmp_path / "out", torch.float32)
    arguments = groups, plan.gates(groups), {}, torch.bfloat16, tokens()
    in_memory = verified(*models, *arguments)
    for model in models:
        layers = OffloadedWeightsLoader(state_dict={name: t.clone() for name, t in model.state_dict().items()})
        attach_align_device_hook(model.model.layers, "cpu", True, layers, module_name="model.layers")
        assert model.model.layers[0].mlp.down_proj.weight.is_meta
    writer = "model.layers.1.mlp.down_proj.weight"
    assert torch.equal(weight_of(models[1], writer), layers[writer])
    again = verified(*models, *arguments)
    for before, found in zip(in_memory, again, strict=True):
        assert before.passed and found.passed
        assert found.max_difference == pytest.approx(before.max_difference, rel=0.1, abs=2e-6)


def test_what_makes_no_sense_is_one_line(made, tmp_path, capsys):
    said = complaint(capsys, *prune_arguments(*made[:2], tmp_path / "a", offload="cpu", device="cpu"))
    assert "--offload cpu is for accelerators" in said and "--offload disk" in said
    said = complaint(capsys, *prune_arguments(*made[:2], tmp_path / "b", offload="disk", method="magnitude"))
    assert "--offload is a setting of learning" in said
    said = complaint(capsys, *prune_arguments(*made[:2], tmp_path / "c", offload="disk"), "--shard")
    assert "leave it or --offload out" in said


@pytest.mark.parametrize(("words", "command"), [(["--recover", "lora"], "recover"), (["--refit"], "refit")])
def test_weights_are_changed_in_memory_alone_which_is_said_before_anything_is_learned(
    made, offloaded, tmp_path, capsys, placed, monkeypatch, words, command
):
    said = complaint(capsys, *prune_arguments(*made[:2], tmp_path / "run", offload="disk"), *words)
    assert f"--{command} changes weights" in said and f"`secateur {command} RUN`" in said
    assert not (tmp_path / "run").exists()
    monkeypatch.setattr(sessions, "free_memory", lambda: 0)  # which is tried all the same
    more = words if command == "recover" else []
    assert secateur(command, offloaded, *more) == 0
    assert placed and not any(model["layers"] for model in placed)
    placed.clear()
    assert secateur("eval", offloaded) == 0
    assert all(model["layers"] for model in placed)
