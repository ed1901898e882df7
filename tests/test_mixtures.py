"""Mixtures of experts through the whole command line: learning, budgets and shapes, export, and what is refused."""

import json
import shutil
from contextlib import ExitStack, contextmanager
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, Qwen3MoeConfig, Qwen3MoeForCausalLM

from runs import SIZES, complaint, leftovers, prune_arguments, random_tokens, secateur, small_tokenizer, write_texts
from secateur import refit as refitting
from secateur.api import open_session
from secateur.attach import attached
from secateur.budget import everything, largest_that_fits, make_budget
from secateur.describe import describe
from secateur.experts import inside_experts
from secateur.export import export
from secateur.gates import by_group
from secateur.importance import ONE_SHOT
from secateur.inspection import LENGTH, routing
from secateur.learn import learn, unseen
from secateur.optimise import Optimiser
from secateur.planning import compare_shapes
from secateur.recipes import auto_recipe
from secateur.refit import normal_equations, refit
from secateur.sensitivity import drawn, gate_sensitivity
from secateur.text import evaluation_text
from secateur.units import packed
from tiny import random_plan

EXPERTS, WIDTH = 4, 16


def small_mixture(seed=0, **changes):
    torch.manual_seed(seed)
    own = {"num_experts": EXPERTS, "num_experts_per_tok": 2, "moe_intermediate_size": WIDTH, "num_hidden_layers": 2}
    model = Qwen3MoeForCausalLM(Qwen3MoeConfig(**SIZES | own | {"norm_topk_prob": True} | changes))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("mlp.gate.weight"):
                parameter.normal_()
    return model.eval().requires_grad_(False)


@pytest.fixture(scope="module")
def mixture(tmp_path_factory):
    folder = tmp_path_factory.mktemp("mixture")
    small_mixture().save_pretrained(folder / "dense")
    small_tokenizer().save_pretrained(folder / "dense")
    write_texts(folder / "text.jsonl")
    return folder


def only_experts(model):
    return describe(model).only(()).groups


def pruned(mixture, out, **options):
    assert secateur(*prune_arguments(mixture / "dense", mixture / "text.jsonl", out, **options)) == 0
    return json.loads((out / "eval.json").read_text())


# --- the whole way ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", ["ragged", "uniform", "padded"])
@pytest.mark.parametrize("method", ["deterministic", "grasprune"])
def test_a_mixture_is_pruned_exported_and_verified(mixture, tmp_path, method, shape):
    sparsity = 0.7 if shape == "padded" else 0.3  # what the widest expert keeps, all are filled up to
    results = pruned(mixture, tmp_path / "run", shape=shape, method=method, sparsity=sparsity)
    assert json.loads((tmp_path / "run" / "verify.json").read_text())["passed"]
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "model", trust_remote_code=shape != "uniform")
    assert model.generate(torch.tensor([[3, 4, 5]]), max_new_tokens=4, do_sample=False).shape[1] > 3
    figures = results["pruned"]
    assert figures["parameters"] == sum(p.numel() for p in model.parameters())
    assert figures["active_parameters"] < figures["parameters"]
    assert figures["active_parameters"] < results["dense"]["active_parameters"]


def test_a_mixture_in_bfloat16_is_verified_in_its_own_dtype(mixture, tmp_path):
    small_mixture().to(torch.bfloat16).save_pretrained(tmp_path / "dense")
    small_tokenizer().save_pretrained(tmp_path / "dense")
    assert secateur(*prune_arguments(tmp_path / "dense", mixture / "text.jsonl", tmp_path / "run")) == 0
    compared = json.loads((tmp_path / "run" / "verify.json").read_text())["comparisons"]
    assert [c["dtype"] for c in compared] == ["bfloat16", "float32"] and all(c["passed"] for c in compared)


@pytest.mark.parametrize("method", sorted(ONE_SHOT.keys() - {"flap"}))
def test_every_baseline_scores_experts(mixture, tmp_path, method):
    results = pruned(mixture, tmp_path / "run", method=method, sparsity=0.5)
    assert results["pruned"]["parameters"] < results["dense"]["parameters"]


def test_attention_and_experts_share_one_budget(mixture, tmp_path):
    run = tmp_path / "run"
    arguments = prune_arguments(mixture / "dense", mixture / "text.jsonl", run, sparsity=0.4)
    assert secateur(*arguments, "--units", "heads", "expert_channels") == 0
    widths = json.loads((run / "plan.json").read_text())["widths"]
    assert {name.split(".")[2] for name in widths} == {"heads", "expert_channels"}
    assert json.loads((run / "plan.json").read_text())["rounding"]["kept"] <= 0.6


def test_inspect_tells_experts_active_parameters_and_routing(mixture, capsys):
    assert secateur("inspect", mixture / "dense", "--data", mixture / "text.jsonl") == 0
    said = " ".join(capsys.readouterr().out.split())
    model = small_mixture()
    total = sum(p.numel() for p in model.parameters())
    idle = sum(p.numel() for layer in model.model.layers for p in layer.mlp.experts.parameters()) // 2
    assert f"{total:,} parameters" in said and f"{total - idle:,} active" in said
    assert f"{EXPERTS} × {WIDTH}" in said
    found, tokens = routing(str(mixture / "dense"), str(mixture / "text.jsonl"))
    assert [r.layer for r in found] == [0, 1] and f"routing of {tokens:,} tokens" in said
    for r in found:
        assert sum(r.share_E) == pytest.approx(1.0) and 1.0 <= r.effective <= EXPERTS
    seen = torch.zeros(EXPERTS)

    def count(_module, args):
        seen.add_(torch.bincount(args[1].flatten(), minlength=EXPERTS))

    model.model.layers[0].mlp.experts.register_forward_pre_hook(count)
    text = evaluation_text(str(mixture / "text.jsonl"))
    model(small_tokenizer()(text, return_tensors="pt").input_ids[0, :tokens].view(-1, LENGTH))
    torch.testing.assert_close(torch.tensor(found[0].share_E), seen / seen.sum())


@pytest.mark.parametrize("renormalised", [True, False])
def test_dropping_the_routers_rows_as_well_would_send_tokens_elsewhere(renormalised, tmp_path):
    """Why they stay: a token that chose a closed expert would get another one, and larger weights."""
    teacher, closed = small_mixture(norm_topk_prob=renormalised), [1, 3]
    description = describe(teacher).only(())
    plan = random_plan(description, close_experts=tuple(closed), share=1.0)
    ids = random_tokens(2, 12)
    with attached(teacher, description.groups, plan.gates(description.groups)), torch.no_grad():
        gated = teacher(ids).logits
    export(teacher, None, description, plan, tmp_path / "model")
    exported = AutoModelForCausalLM.from_pretrained(tmp_path / "model", trust_remote_code=True)
    smaller = small_mixture(norm_topk_prob=renormalised, num_experts=EXPERTS - 2)
    weights = dict(exported.named_parameters())
    for name, parameter in smaller.named_parameters():
        kept = [0, 2] if name.endswith("mlp.gate.weight") else slice(None)
        parameter.data.copy_(weights[name][kept])
    with torch.no_grad():
        torch.testing.assert_close(exported(ids).logits, gated, rtol=0, atol=1e-5)
        assert (smaller(ids).logits - gated).abs().max() > 0.1


# --- what is refused -------------------------------------------------------------------------------------------------


def test_flap_has_no_place_for_its_biases(mixture, tmp_path, capsys):
    arguments = prune_arguments(mixture / "dense", mixture / "text.jsonl", tmp_path / "run", method="flap")
    assert "flap adds biases" in complaint(capsys, *arguments)


def test_scores_of_experts_need_experts_alone(mixture, tmp_path, capsys):
    arguments = prune_arguments(mixture / "dense", mixture / "text.jsonl", tmp_path / "run", method="reap")
    assert "this run prunes heads" in complaint(capsys, *arguments, "--units", "heads", "expert_channels")


def test_routing_needs_experts(dense, text, capsys):
    assert "has no fused experts" in complaint(capsys, "inspect", dense, "--data", text)


def test_experts_that_are_not_all_alike_stay_whole_with_the_reason():
    model = small_mixture()
    experts = model.model.layers[1].mlp.experts
    experts.down_proj = torch.nn.Parameter(experts.down_proj[:, :, 1:])
    description = describe(model)
    assert [g.layer for g in description.groups if g.experts] == [0]
    (refusal,) = description.refusals
    assert refusal.where.endswith("layers.1.mlp.experts")
    assert "are not those of 4 experts alike, of width 15" in refusal.reason


def test_experts_whose_activation_mixes_channels_stay_whole():
    model = small_mixture()
    model.model.layers[0].mlp.experts._apply_gate = lambda x: x.chunk(2, dim=-1)[0].cumsum(-1)
    assert any("activation does not treat every channel by itself" in r.reason for r in describe(model).refusals)


def test_experts_in_a_list_of_modules_are_not_fused():
    model = small_mixture()
    mlp = torch.nn.Module()
    mlp.experts = torch.nn.ModuleList(torch.nn.Linear(32, 32) for _ in range(3))
    model.model.layers[0].mlp = mlp
    assert any("not fused tensors in the layout of transformers" in r.reason for r in describe(model).refusals)


def test_an_unknown_experts_implementation_is_named(mixture, tmp_path, capsys):
    broken = shutil.copytree(mixture / "dense", tmp_path / "dense")
    config = json.loads((broken / "config.json").read_text())
    (broken / "config.json").write_text(json.dumps(config | {"experts_implementation": "nonsense"}))
    arguments = prune_arguments(broken, mixture / "text.jsonl", tmp_path / "run")
    assert 'experts_implementation="nonsense"' in complaint(capsys, *arguments)


def test_units_that_the_model_has_not(mixture, tmp_path, capsys):
    arguments = prune_arguments(mixture / "dense", mixture / "text.jsonl", tmp_path / "run")
    assert "no shared_channels that can be pruned" in complaint(capsys, *arguments, "--units", "shared_channels")


# --- learning --------------------------------------------------------------------------------------------------------


@contextmanager
def routed(model):
    """Layer and expert of all that tokens are sent to within the context."""
    seen = set()
    with ExitStack() as stack:
        for i, layer in enumerate(model.model.layers):

            def see(_module, args, i=i):
                seen.update((i, e) for e in args[1].flatten().tolist())

            stack.callback(layer.mlp.experts.register_forward_pre_hook(see).remove)
        yield seen


def test_gates_of_experts_that_no_token_reached_stay_as_they_are():
    model = small_mixture(num_experts=16, num_experts_per_tok=1)
    groups, ids = only_experts(model), random_tokens(1, 4)
    limits = make_budget(groups, describe(model).shapes, 0.5, "model")
    optimiser = Optimiser(auto_recipe(4), limits, 4, 0, torch.device("cpu"))
    optimiser.start_from(torch.ones(len(limits.share_N)), torch.rand(len(limits.share_N)))
    before, reached = by_group(optimiser.z_N.clone(), groups), set()
    for _ in range(3):
        z_N = optimiser.z_N.clone().requires_grad_()
        with attached(model, groups, by_group(optimiser.train_gates(z_N), groups)), routed(model) as now:
            (grad_N,) = torch.autograd.grad(model(ids).logits.square().sum(), z_N)
        unseen_N = unseen(grad_N, groups)
        assert unseen_N.sum() == WIDTH * (2 * 16 - len(now)) > 0
        reached |= now
        optimiser.advance(grad_N, 1.0, 1.0, 0.0, unseen_N)
    after = by_group(optimiser.z_N, groups)
    moved = set()
    for g in groups:
        moved_E = ((before[g.name] - after[g.name]).abs() > 1e-6).unflatten(0, (g.experts, -1)).any(1)
        moved |= {(g.layer, e) for e in moved_E.nonzero().flatten().tolist()}
    assert moved == reached


def test_the_loop_leaves_them_where_they_started():
    model = small_mixture(num_experts=16, num_experts_per_tok=1)
    groups, ids = only_experts(model), random_tokens(2, 4)
    limits = make_budget(groups, describe(model).shapes, 0.5, "model")
    recipe = replace(auto_recipe(2), sensitivity_batches=0, settle=0.0)
    with routed(model) as seen:
        learned = learn(model, groups, ids, ids, limits, recipe, steps=2, batch_size=1)
    moved = set()
    for g in groups:
        moved_E = ((by_group(learned.z_N, groups)[g.name] - 1.0).abs() > 1e-6).unflatten(0, (g.experts, -1)).any(1)
        moved |= {(g.layer, e) for e in moved_E.nonzero().flatten().tolist()}
    assert moved and moved <= seen and len(seen) < 2 * 16


def test_without_experts_nothing_is_unseen():
    groups = describe(small_mixture()).only(("heads",)).groups
    assert unseen(torch.zeros(sum(g.units for g in groups)), groups) is None


def test_gradient_checkpointing_does_not_change_the_gates():
    results = []
    for checkpointing in (False, True):
        model = small_mixture()
        groups = only_experts(model)
        limits = make_budget(groups, describe(model).shapes, 0.4, "model")
        ids = random_tokens(12, 16)
        passes = []
        for layer in model.model.layers:
            layer.mlp.experts.register_forward_pre_hook(lambda *_, passes=passes: passes.append(1))
        learned = learn(
            model, groups, ids, ids[:2], limits, auto_recipe(6), steps=6, batch_size=2,
            gradient_checkpointing=checkpointing,
        )  # fmt: skip
        results.append((learned.z_N, len(passes)))
    assert results[1][1] > results[0][1], "nothing was computed twice"
    torch.testing.assert_close(results[0][0], results[1][0])


def test_sensitivity_is_the_squared_gradient_of_the_gate_over_a_sequence():
    model = small_mixture()
    groups, ids = only_experts(model), random_tokens(3, 9)
    found = gate_sensitivity(model, groups, ids, seed=3)
    generator, expected = torch.Generator().manual_seed(3), torch.zeros_like(found)
    for row in ids.split(1):
        gate_N = torch.ones(len(found), requires_grad=True)
        with attached(model, groups, by_group(gate_N, groups)):
            logits = model(row).logits[0, :-1]
        labels = drawn(logits.detach().softmax(-1), torch.rand((len(logits), 1), generator=generator))[:, 0]
        loss = torch.nn.functional.cross_entropy(logits, labels)
        (grad,) = torch.autograd.grad(loss, gate_N)
        expected += grad.square() * 8 / 3
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-9)


# --- budgets ---------------------------------------------------------------------------------------------------------


def test_tied_rows_leave_all_experts_of_a_layer_equally_wide():
    model = small_mixture(moe_intermediate_size=32)
    groups, shapes = only_experts(model), describe(model).shapes
    limits = make_budget(groups, shapes, 0.4, "model", "rows")
    rank_N = torch.rand(len(limits.share_N), generator=torch.Generator().manual_seed(0))
    kept = by_group(largest_that_fits(rank_N, limits), groups)
    widths = {g.name: kept[g.name].unflatten(0, (g.experts, -1)).sum(1).tolist() for g in groups}
    assert all(len(set(found)) == 1 and found[0] % 8 == 0 for found in widths.values()), widths
    share = float((limits.share_N * torch.cat(list(kept.values()))).sum())
    assert 0.6 - 8 * EXPERTS / len(rank_N) < share <= 0.6
    for g in groups:
        rank_EC, kept_EC = (part[g.name].unflatten(0, (g.experts, -1)) for part in (by_group(rank_N, groups), kept))
        for ranks, mask in zip(rank_EC, kept_EC, strict=True):
            assert not mask.all() and ranks[mask].min() > ranks[~mask].max(), "an expert keeps its best channels"


def test_closed_experts_go_whole_and_leave_room_for_others():
    model = small_mixture(moe_intermediate_size=32)
    groups, shapes = only_experts(model), describe(model).shapes
    limits = make_budget(groups, shapes, 0.25, "model", "rows")
    rank_N = torch.ones(len(limits.share_N))
    closed = [by_group(rank_N, groups)[g.name].unflatten(0, (g.experts, -1))[1] for g in groups]
    for part in closed:
        part.fill_(-0.1)
    kept = by_group(largest_that_fits(rank_N, limits), groups)
    for g in groups:
        assert kept[g.name].unflatten(0, (g.experts, -1)).sum(1).tolist() == [32, 0, 32, 32]
        assert packed(g, kept[g.name].nonzero().flatten()).experts.tolist() == [0, 2, 3]


def test_tied_experts_go_whole():
    model = small_mixture()
    groups, shapes = only_experts(model), describe(model).shapes
    limits = make_budget(groups, shapes, 0.5, "model", "experts")
    rank_N = torch.rand(2 * EXPERTS, generator=torch.Generator().manual_seed(1)).repeat_interleave(WIDTH)
    kept_N = largest_that_fits(rank_N, limits)
    assert set(kept_N.unflatten(0, (-1, WIDTH)).sum(1).tolist()) == {0, WIDTH}
    assert kept_N.sum() == EXPERTS * WIDTH and rank_N[kept_N].min() > rank_N[~kept_N].max()


def test_one_budget_an_expert_keeps_as_many_channels_of_each():
    model = small_mixture(moe_intermediate_size=32)
    groups, shapes = only_experts(model), describe(model).shapes
    limits = make_budget(groups, shapes, 0.5, "expert", "rows")
    assert len(limits.names) == 2 * EXPERTS
    kept_N = largest_that_fits(torch.rand(len(limits.share_N)), limits)
    assert kept_N.unflatten(0, (-1, 32)).sum(1).tolist() == [16] * (2 * EXPERTS)
    assert everything(groups).allowed_C.item() == len(kept_N)


# --- weights after pruning -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["lora", "full"])
def test_experts_are_trained_on_and_the_checkpoint_keeps_its_form(mixture, tmp_path, kind):
    run = tmp_path / "run"
    pruned(mixture, run, sparsity=0.4)
    before = load_file(run / "model" / "model.safetensors")
    assert secateur("recover", run, "--recover", kind, "--recover-rank", "2") == 0
    after = load_file(run / "model" / "model.safetensors")
    assert {name: t.shape for name, t in before.items()} == {name: t.shape for name, t in after.items()}
    experts = [name for name in before if ".mlp.experts." in name]
    assert experts and sum(not torch.equal(before[name], after[name]) for name in experts) > len(experts) // 2
    model = AutoModelForCausalLM.from_pretrained(run / "model", trust_remote_code=True)
    assert torch.isfinite(model(torch.tensor([[3, 4, 5]])).logits).all()
    losses = [json.loads(line)["loss"] for line in (run / "recover.jsonl").read_text().splitlines()]
    assert min(losses[-3:]) < losses[0]


def test_refit_solves_for_every_expert_over_the_tokens_sent_to_it(mixture, monkeypatch, tmp_path):
    teacher = small_mixture()
    description = describe(teacher).only(())
    plan = random_plan(description, close_experts=(2,))
    export(teacher, None, description, plan, tmp_path / "model")
    student = AutoModelForCausalLM.from_pretrained(tmp_path / "model", trust_remote_code=True).eval()
    rows, ridge = random_tokens(40, 16), 0.3
    group = description.groups[0]
    pack, experts = plan.pack(group), teacher.model.layers[0].mlp.experts
    stored = student.model.layers[0].mlp.experts.down_proj.detach().clone()
    read = {e: [] for e in range(EXPERTS)}
    with inside_experts(teacher, {group.gate_at: lambda e, x, pi: (read[e].append(x * pi), x)[1]}), torch.no_grad():
        for row in rows.split(1):
            teacher(row)
    equations = normal_equations(teacher, description.groups, plan, rows)
    losses = iter([2.0, 1.0])
    monkeypatch.setattr(refitting, "RIDGES", (ridge,))
    monkeypatch.setattr(refitting, "mean_loss", lambda *_: next(losses))
    weights, done = refit(student, equations, rows[:2])
    assert done.ridge == ridge and set(weights) == {g.writer for g in description.groups}
    assert pack.experts.tolist() == [0, 1, 3]
    for place, e in enumerate(pack.experts.tolist()):
        x_TC, filled_W = torch.cat(read[e]).double(), pack.filled_EW[place]
        x = x_TC[:, pack.channels_EW[place][filled_W]]
        weight = stored[place][:, filled_W].double()
        lacks = x_TC @ experts.down_proj[e].double().T - x @ weight.T
        a = torch.cat([x, (ridge * x.square().sum(0)).sqrt().diag()])
        b = torch.cat([lacks, lacks.new_zeros(x.shape[1], lacks.shape[1])])
        expected = (weight + torch.linalg.lstsq(a, b).solution.T).float()
        found = weights[group.writer][place]
        torch.testing.assert_close(found[:, filled_W], expected, rtol=1e-3, atol=1e-4)
        assert not found[:, ~filled_W].any(), "what only fills up stays zero"


def test_refit_and_gates_in_turns_keep_the_checkpoint_whole(mixture, monkeypatch, tmp_path):
    losses = iter([9.0 - i for i in range(100)])
    monkeypatch.setattr(refitting, "mean_loss", lambda *_: next(losses))
    pruned(mixture, tmp_path / "run", sparsity=0.4, steps=10)
    assert secateur("refit", tmp_path / "run", "--refit-rounds", "2") == 0
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "model", trust_remote_code=True)
    assert torch.isfinite(model(torch.tensor([[3, 4, 5]])).logits).all()
    assert len(json.loads((tmp_path / "run" / "refit.json").read_text())) == 2


# --- larger than memory ----------------------------------------------------------------------------------------------


def test_an_export_from_disk_is_the_same_to_the_byte(mixture, tmp_path):
    run = tmp_path / "run"
    pruned(mixture, run, max_shard_size="20KB")
    before = {path.name: path.read_bytes() for path in (run / "model").glob("*.safetensors")}
    assert len(before) > 2
    assert secateur("export", run, "--low-memory") == 0
    assert before == {path.name: path.read_bytes() for path in (run / "model").glob("*.safetensors")}
    assert not leftovers(run)
    assert secateur("verify", run) == 0


# --- what each shape costs -------------------------------------------------------------------------------------------


def test_shapes_are_compared_before_anything_is_written(mixture, tmp_path, capsys):
    run = tmp_path / "run"
    results = pruned(mixture, run, sparsity=0.5)
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file() and path.name != "timings.json"}
    capsys.readouterr()
    assert secateur("plan", run, "--compare") == 0
    said = " ".join(capsys.readouterr().out.split())
    assert {path: path.read_bytes() for path in before} == before
    costs, refused = compare_shapes(open_session(run))
    assert [c.shape for c in costs] == ["dense", "ragged", "uniform", "padded", "tp:2"]
    assert [line.partition(": ")[0] for line in refused] == ["aligned:32", "aligned:64", "aligned:128"]
    dense, ragged, uniform, padded, _ranks = costs
    assert ragged.sizes.parameters == results["pruned"]["parameters"] <= padded.sizes.parameters
    assert ragged.held_out == pytest.approx(results["rounding"]["held_out_planned"])
    assert uniform.sizes.parameters < dense.sizes.parameters
    for cost in costs:
        assert f"{cost.held_out:.3f}" in said
    for shape, cost in (("uniform", uniform), ("padded", padded)):
        assert secateur("export", run, "--shape", shape) == 0
        model = AutoModelForCausalLM.from_pretrained(run / "model", trust_remote_code=True)
        assert sum(p.numel() for p in model.parameters()) == cost.sizes.parameters
