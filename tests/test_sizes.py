"""Other sizes from the gates of one run: each lies in the larger ones and is a run of its own; gates for a sibling."""

import json
from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from runs import complaint, described, gates_of, prune_arguments, secateur, small_llama, write_checkpoint
from secateur.api import open_session
from secateur.budget import largest_that_fits, make_budget
from secateur.checkpoints import Checkpoints
from secateur.config_file import load_config
from secateur.costs import bounds_of
from secateur.describe import describe
from secateur.files import InputError
from secateur.gates import Gates
from secateur.learn import learn
from secateur.order import kept_for, kept_in_order, largest_within, positions
from secateur.policy import policy_of
from secateur.recipes import paper_recipe
from secateur.wanted import read_budgets
from test_budgets import MODELS, counted
from test_learn import run as learn_tiny

SPARSITIES = (0.05, 0.1, 0.2, 0.3, 0.35, 0.5, 0.62, 0.8, 0.9)


def orders(description, seed=0):
    """An order and a set that is kept, as a file of gates has them."""
    generator = torch.Generator().manual_seed(seed)
    limits = make_budget(description.groups, description.shapes, 0.3, "model", "rows")
    score_N = torch.rand(len(limits.share_N), generator=generator)
    kept_N = largest_that_fits(score_N + 0.1 * torch.randn(len(score_N), generator=generator), limits)
    z_N = torch.where(kept_N, 0.2 + torch.rand(len(score_N), generator=generator), -0.1)
    return Gates(z_N, description.groups, {"sparsity": 0.3}, order_N=positions(score_N) + kept_N), kept_N


# --- the order -------------------------------------------------------------------------------------------------------


def test_positions_rank_by_the_first_key_and_where_it_is_equal_by_the_next():
    first, second = torch.tensor([2.0, 1.0, 2.0, 2.0]), torch.tensor([0.1, 9.0, 0.3, 0.2])
    assert positions(first, second).argsort().tolist() == [1, 0, 3, 2]
    assert positions(first).min() > 0 and positions(first).max() < 1


@pytest.mark.parametrize("scope", ["model", "kind"])
@pytest.mark.parametrize("name", MODELS)
def test_sizes_lie_in_each_other_and_fill_their_budgets_to_within_a_unit(name, scope):
    description = describe(MODELS[name]())
    gates, own_N = orders(description)
    larger_N = torch.ones_like(own_N)
    for sparsity in SPARSITIES:
        limits = make_budget(description.groups, description.shapes, sparsity, scope)
        kept_N = kept_in_order(gates, limits)
        assert not (kept_N & ~larger_N).any(), "within the next larger size"
        if scope == "model":
            assert not (kept_N & ~own_N).any() if sparsity > 0.3 else not (own_N & ~kept_N).any()
        for c, allowed in enumerate(limits.allowed_C.tolist()):
            inside_N = limits.constraint_N == c
            room = allowed - int(limits.params_N[inside_N & kept_N].sum())
            assert 0 <= room < int(limits.params_N[inside_N].max())
        larger_N = kept_N


@pytest.mark.parametrize("kind", ["units", "params", "total-params", "flops", "kv", "bytes"])
@pytest.mark.parametrize("name", ["mha", "gqa", "latent"])
def test_sizes_by_any_one_budget_lie_in_each_other(name, kind):
    description = describe(MODELS[name]())
    gates, own_N = orders(description)
    larger_N, counts = torch.ones_like(own_N), []
    for share in (0.9, 0.8, 0.7, 0.55, 0.45, 0.4):
        bounds = bounds_of(description, read_budgets([f"{kind}={share}"]), 4)
        try:
            limits = make_budget(description.groups, description.shapes, 0.0, "model", None, bounds=bounds)
        except InputError:  # no such size of this tiny model
            continue
        kept_N = kept_in_order(gates, limits)
        assert not (kept_N & ~larger_N).any()
        larger_N = kept_N
        counts.append(int(kept_N.sum()))
        units = [int(part.sum()) for part in kept_N.split([g.units for g in description.groups])]
        assert bounds[0].cost(units) <= bounds[0].allowed
    assert len(counts) > 2 and counts == sorted(counts, reverse=True) and counts[0] > counts[-1]


@pytest.mark.parametrize("counted", ["units", "params"])
def test_nothing_is_taken_after_a_unit_that_does_not_fit_though_smaller_ones_would(counted):
    description = describe(MODELS["mha"]())
    kinds = [g.kind for g in description.groups for _ in range(g.units)]
    channels = [n for n, kind in enumerate(kinds) if kind == "channels"]
    heads = [n for n, kind in enumerate(kinds) if kind == "heads"]
    order_N = torch.empty(len(kinds))
    order_N[[*channels[:60], *heads, *channels[60:]]] = torch.arange(len(kinds), 0, -1).float()
    gates = Gates(order_N, description.groups, {}, order_N=order_N)
    whole = make_budget(description.groups, description.shapes, 0.5, "model")
    room = 61 * int(whole.params_N.min())  # a head is many channels
    limits = replace(whole, allowed_C=torch.tensor([room]))
    if counted == "params":
        fixed = bounds_of(description, read_budgets(["params=0.9"]), 4)[0].fixed
        bounds = bounds_of(description, read_budgets([f"params={fixed + room + 1}"]), 4)
        bounds = tuple(
            replace(b, costs=tuple(replace(c, opening=0) for c in b.costs), allowed=b.fixed + room) for b in bounds
        )
        limits = make_budget(description.groups, description.shapes, 0.0, "model", bounds=bounds)
    assert kept_in_order(gates, limits).nonzero().flatten().tolist() == sorted(channels[:60])
    assert largest_that_fits(order_N, limits).sum() == 61


def test_a_budget_on_the_cache_alone_leaves_channels_whole():
    description = describe(MODELS["gqa"]())
    gates, _ = orders(description)
    bounds = bounds_of(description, read_budgets(["kv=0.5"]), 4)
    limits = make_budget(description.groups, description.shapes, 0.0, "model", bounds=bounds)
    kept = kept_in_order(gates, limits).split([g.units for g in description.groups])
    assert all(part.all() for part, g in zip(kept, description.groups, strict=True) if g.kind == "channels")
    assert sum(int(p.sum()) for p, g in zip(kept, description.groups, strict=True) if g.attends) == 9


@pytest.mark.parametrize("shape", ["aligned:8", "aligned:16", "tp:2"])
@pytest.mark.parametrize("name", ["gqa", "mixture"])
def test_sizes_of_aligned_shapes_lie_in_each_other(name, shape):
    description = describe(MODELS[name]())
    gates, _ = orders(description)
    gates = replace(gates, z_N=gates.z_N.abs())  # no expert is gone whole
    larger_N = torch.ones(len(gates.z_N), dtype=torch.bool)
    for sparsity in (0.1, 0.2, 0.3, 0.5, 0.7):
        limits = make_budget(description.groups, description.shapes, sparsity, "model", "rows", policy_of(shape))
        kept_N = kept_in_order(gates, limits)
        assert kept_N.any() and not (kept_N & ~larger_N).any()
        larger_N = kept_N


def test_a_set_within_another_takes_nothing_from_outside():
    _, limits = described(small_llama(), 0.4)
    rank_N = torch.rand(len(limits.share_N), generator=torch.Generator().manual_seed(0))
    within_N = torch.rand(len(rank_N), generator=torch.Generator().manual_seed(1)) < 0.8
    kept_N = largest_within(rank_N, limits, within_N)
    assert kept_N.any() and not (kept_N & ~within_N).any()
    lowest = rank_N[kept_N].min()
    assert (rank_N[within_N & ~kept_N] < lowest).all()
    few_N = kept_N & (torch.arange(len(kept_N)) % 2 == 0)
    assert torch.equal(largest_within(rank_N, limits, few_N), few_N), "all of it, though more would fit"


# --- what learning leaves --------------------------------------------------------------------------------------------


def test_learned_gates_rank_what_they_keep_first_and_the_others_by_what_they_are_worth():
    model = small_llama()
    learned = learn_tiny(model, steps=20)
    order_N, kept_N = learned.order_N, learned.z_N > 0
    assert (order_N[kept_N] > 1).all() and (order_N[~kept_N] < 1).all() and len(order_N.unique()) == len(order_N)
    assert torch.equal(learned.kept_N, kept_N)
    start = 0
    for group in describe(model).groups:  # within a layer and a kind all units hold as much
        here_N = torch.zeros_like(kept_N)
        here_N[start : start + group.units] = True
        start += group.units
        for mask_N, worth_N in (
            (here_N & ~kept_N, learned.sensitivity_N),
            (here_N & kept_N, learned.sensitivity_N * learned.value_N),
        ):
            assert torch.equal(order_N[mask_N].argsort(), worth_N[mask_N].argsort())


def test_without_sensitivity_gates_that_closed_later_rank_above_those_that_closed_earlier():
    model, seen = small_llama(), {}
    description, limits = described(model, 0.5)
    tokens = torch.randint(3, 64, (122, 12), generator=torch.Generator().manual_seed(1))
    recipe = replace(paper_recipe(60), lr=0.1, warmup_steps=1)
    learned = learn(model, description.groups, tokens[:120], tokens[120:], limits, recipe, steps=60, batch_size=2)
    assert learned.sensitivity_N is None
    closed_N = (learned.z_N <= 0) & ~learned.kept_N
    assert closed_N.sum() > 10
    seen = positions(learned.order_N)[closed_N]
    assert len(seen.unique()) == int(closed_N.sum())


def test_the_order_survives_an_interruption_bit_for_bit(tmp_path):
    model, checkpoints = small_llama(), Checkpoints(tmp_path / "checkpoints")

    def stop(step):
        if step.step == 7:
            raise KeyboardInterrupt

    def fast(steps):
        return replace(paper_recipe(steps), lr=0.5, warmup_steps=1)  # gates close before the interruption, too

    for recipe in ("auto", "paper"):
        options = {} if recipe == "auto" else {"recipe": fast}
        with pytest.raises(KeyboardInterrupt):
            learn_tiny(model, checkpoints=checkpoints, on_step=stop, **options)
        resumed, whole = learn_tiny(model, checkpoints=checkpoints, **options), learn_tiny(model, **options)
        assert torch.equal(resumed.order_N, whole.order_N)
        if recipe == "auto":
            assert torch.equal(resumed.sensitivity_N, whole.sensitivity_N)
        checkpoints.discard()


def test_a_size_that_gates_were_not_learned_for_opens_what_the_order_says():
    description = describe(small_llama())
    gates, own_N = orders(description)
    limits = make_budget(description.groups, description.shapes, 0.1, "model")
    kept_N = kept_for(gates, limits, 0.1, ())
    lowest = gates.order_N[kept_N & ~own_N].min()
    assert (gates.order_N[~kept_N] < lowest).all()
    assert not torch.equal(kept_N, largest_that_fits(gates.z_N, limits))


def test_gates_that_an_earlier_version_saved_give_smaller_sizes_only():
    description = describe(small_llama())
    gates, own_N = orders(description)
    gates = replace(gates, order_N=None)

    def kept(sparsity):
        limits = make_budget(description.groups, description.shapes, sparsity, "model")
        return kept_for(gates, limits, sparsity, ())

    assert torch.equal(kept(0.3), own_N) and not (kept(0.6) & ~own_N).any()
    with pytest.raises(InputError, match="only smaller sizes are possible"):
        kept(0.1)


# --- the command line ------------------------------------------------------------------------------------------------


def kept(folder):
    plan = json.loads((folder / "plan.json").read_text())
    return {(name, index) for name, found in plan["kept"].items() for index in found}


def files(folder):
    return {
        p: p.read_bytes()
        for p in sorted(folder.rglob("*"))
        if p.is_file() and not {"sizes", "timings.json"} & {*p.parts}
    }


def test_a_run_is_exported_at_other_sizes_which_are_runs_of_their_own(run, capsys):
    before = files(run)
    for sparsity in (0.1, 0.5, 0.4):
        assert secateur("export", run, "--sparsity", sparsity) == 0
        size = run / "sizes" / str(sparsity)
        said = " ".join(capsys.readouterr().out.split())
        assert f"wrote {size}/model" in said and f"secateur verify {size}" in said
        for command in ("verify", "eval"):
            assert secateur(command, size) == 0
        assert json.loads((size / "verify.json").read_text())["passed"]
        results = json.loads((size / "eval.json").read_text())
        assert results["rounding"]["kept"] <= 1 - sparsity + 1e-6
        assert results["rounding"]["kept"] > 1 - sparsity - 0.03 and results["fixing"] is None
        assert load_config(size / "config.yaml").sparsity == sparsity
        assert f"pruned by {sparsity:.0%}" in (size / "model" / "README.md").read_text()
    assert files(run) == before
    sets = [kept(run / "sizes" / "0.5"), kept(run / "sizes" / "0.4"), kept(run), kept(run / "sizes" / "0.1")]
    assert all(smaller < larger for smaller, larger in pairwise(sets))
    assert secateur("prune", "--resume", run / "sizes" / "0.5") == 0
    assert secateur("plan", run / "sizes" / "0.5", "--shape", "aligned:16") == 0


def test_sizes_by_budget_are_met_from_below(run):
    assert secateur("plan", run, "--budget", "params=0.6", "--budget", "kv=0.5") == 0
    size = run / "sizes" / "params=0.6,kv=0.5"
    assert secateur("export", size) == 0 and secateur("verify", size) == 0
    found = counted(size / "model")
    dense = counted_dense(run)
    assert found["params"] <= 0.6 * dense["params"] < found["params"] + 400 and found["kv"] <= 0.5 * dense["kv"]


def counted_dense(run):
    return counted(type(run)(load_config(run / "config.yaml").model))


def test_gates_scored_once_give_any_size(dense, text, tmp_path):
    assert secateur(*prune_arguments(dense, text, tmp_path / "run", method="wanda-sp", per="model")) == 0
    sets = [kept(tmp_path / "run")]
    for sparsity in (0.1, 0.6):
        assert secateur("plan", tmp_path / "run", "--sparsity", sparsity) == 0
        sets.append(kept(tmp_path / "run" / "sizes" / str(sparsity)))
    assert sets[2] < sets[0] < sets[1]


def test_what_no_size_can_be_is_one_line_and_makes_no_folder(capsys, run):
    said = complaint(capsys, "export", run, "--sparsity", 0.3)
    assert "is the run's own size" in said and f"secateur export {run}" in said
    assert "between 0 and 1" in complaint(capsys, "export", run, "--sparsity", 1.5)
    assert "cannot be met" in complaint(capsys, "plan", run, "--budget", "bytes=10B")
    said = complaint(capsys, "export", run, "--sparsity", 0.4, "--low-memory")
    assert f"secateur plan {run} --sparsity 0.4" in said and f"secateur export {run}/sizes/0.4 --low-memory" in said
    assert not (run / "sizes").exists()
    assert secateur("plan", run, "--sparsity", 0.4) == 0
    assert secateur("export", run / "sizes" / "0.4", "--low-memory") == 0


# --- gates that travel -----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def sibling(base):
    """Other weights in the same shapes, but for a larger vocabulary."""
    return write_checkpoint(base / "sibling", seed=3, vocab_size=70)


@pytest.fixture(scope="module")
def finetuned(base):
    folder = write_checkpoint(base / "finetuned")
    path = folder / "model.safetensors"
    with safe_open(path, "pt") as file:
        tensors = {name: file.get_tensor(name) * 1.03 for name in file.keys()}  # noqa: SIM118
    save_file(tensors, path, metadata={"format": "pt"})
    return folder


def test_gates_are_taken_as_they_are_by_a_sibling_which_is_said(finished, sibling, text, tmp_path, capsys):
    arguments = prune_arguments(sibling, text, tmp_path / "run", gates=finished / "gates.safetensors", steps=0)
    assert secateur(*arguments) == 0
    said = " ".join(capsys.readouterr().out.split())
    assert said.count("holds gates found on other weights") == 2, "of the file given and of the run's own"
    assert kept(tmp_path / "run") == kept(finished)
    assert json.loads((tmp_path / "run" / "verify.json").read_text())["passed"]
    first, second = gates_of(finished), gates_of(tmp_path / "run")
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_the_same_weights_are_not_warned_of_in_another_dtype(finished, dense, text, tmp_path, capsys):
    arguments = prune_arguments(dense, text, tmp_path / "run", gates=finished / "gates.safetensors", steps=0)
    assert secateur(*arguments, "--dtype", "bfloat16") == 0
    assert "other weights" not in capsys.readouterr().out
    assert kept(tmp_path / "run") == kept(finished)


@pytest.mark.parametrize("sparsity", [0.3, 0.5])
def test_gates_are_tuned_to_a_sibling_at_any_size(finished, finetuned, text, tmp_path, sparsity):
    given = finished / "gates.safetensors"
    options = {"gates": given, "sparsity": sparsity}
    assert secateur(*prune_arguments(finetuned, text, tmp_path / "still", **options, steps=0)) == 0
    assert secateur(*prune_arguments(finetuned, text, tmp_path / "tuned", **options, steps=8)) == 0
    assert kept(tmp_path / "tuned") == kept(tmp_path / "still")
    losses = [
        json.loads((tmp_path / name / "plan.json").read_text())["rounding"]["held_out_planned"]
        for name in ("still", "tuned")
    ]
    assert losses[0] != losses[1]
    session = open_session(tmp_path / "tuned")
    about = session_gates(session).about
    assert about["from"]["model"] != about["model"] == str(finetuned) and about["from"]["sparsity"] == 0.3
    assert about["steps"] == 16 and about["weights"] == session.weights != about["from"]["weights"]


def session_gates(session):
    from secateur.gates import load_gates

    return load_gates(session.run.gates, session.loaded.description.groups, session.architecture)


def test_interrupted_tuning_goes_on_bit_for_bit(finished, finetuned, text, tmp_path, monkeypatch):
    from secateur.optimise import Optimiser

    options = {"gates": finished / "gates.safetensors", "steps": 8, "checkpoint_every": 3}
    assert secateur(*prune_arguments(finetuned, text, tmp_path / "whole", **options)) == 0
    advance = Optimiser.advance

    def stop(optimiser, *arguments):
        if optimiser.done == 5:
            raise KeyboardInterrupt
        return advance(optimiser, *arguments)

    with monkeypatch.context() as patched:
        patched.setattr(Optimiser, "advance", stop)
        assert secateur(*prune_arguments(finetuned, text, tmp_path / "parts", **options)) == 130
    assert secateur("prune", "--resume", tmp_path / "parts") == 0
    first, second = gates_of(tmp_path / "whole"), gates_of(tmp_path / "parts")
    assert first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


def test_gates_of_another_architecture_are_one_line_before_any_text_is_read(capsys, finished, text, tmp_path):
    other = write_checkpoint(tmp_path / "other", intermediate_size=48)
    given = finished / "gates.safetensors"
    said = complaint(capsys, *prune_arguments(other, text, tmp_path / "run", gates=given, steps=0))
    assert "gates of another architecture" in said and "layers.0.channels does not fit: 48 units here, 64 there" in said
    assert not (tmp_path / "run" / "data.safetensors").exists()
    arguments = prune_arguments(other, text, tmp_path / "run2", gates=tmp_path / "none", steps=0)
    assert "is no file" in complaint(capsys, *arguments)
    wider = write_checkpoint(tmp_path / "wider", hidden_size=64)
    said = complaint(capsys, *prune_arguments(wider, text, tmp_path / "run3", gates=given, steps=0))
    assert "the shapes of its weights differ" in said


@pytest.mark.parametrize(
    ("options", "reason"),
    [({"steps": 0}, "--steps must be at least 1"), ({"gates": "g", "method": "flap"}, "contradicts"),
     ({"gates": "g", "steps": 0, "refit": True}, "need calibration text")],
)  # fmt: skip
def test_settings_of_gates_that_contradict_are_refused(options, reason):
    from secateur.config import Config

    with pytest.raises(InputError, match=reason):
        Config("m", sparsity=0.2, **options)
