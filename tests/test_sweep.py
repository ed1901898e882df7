"""Many sizes in one run: each within the one before, on budget, resumed bit for bit; compared, drawn and picked."""

import json
from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from safetensors import safe_open

from made_runs import made_bench
from runs import complaint, gates_of, prune_arguments, same_gates, secateur
from secateur import pareto
from secateur.api import open_session, prune
from secateur.config import Config
from secateur.config_file import load_config
from secateur.files import InputError
from secateur.optimise import Optimiser
from secateur.pareto import picked
from secateur.plan import Plan
from secateur.sweep import recipe_for, steps_of, swept_runs
from secateur.wanted import read_pick, read_sweep
from test_mixtures import mixture  # noqa: F401
from test_sizes import kept


def arguments(model, data, out, sweep="0.2,0.4,0.6", **options):
    """Of `prune`, with a sweep in the place of a sparsity."""
    name, *rest = prune_arguments(model, data, out, **{"steps": 16} | options)
    at = rest.index("--sparsity")
    return [name, *rest[:at], *rest[at + 2 :], "--sweep", sweep]


def about(folder):
    with safe_open(folder / "gates.safetensors", "pt") as file:
        return json.loads(file.metadata()["secateur"])


def table_of(run):
    return json.loads((run / "sizes.json").read_text())


@pytest.fixture(scope="module")
def swept(base):
    assert secateur(*arguments(base / "dense", base / "text.jsonl", base / "swept")) == 0
    return base / "swept"


# --- what is said ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("said", "sizes"),
    [
        ("0.1:0.6", ("0.1", "0.2", "0.3", "0.4", "0.5", "0.6")),
        ("0.6:0.1", ("0.1", "0.2", "0.3", "0.4", "0.5", "0.6")),
        ("0.1:0.35", ("0.1", "0.2", "0.3", "0.35")),
        ("0.1:0.2:0.05", ("0.1", "0.15", "0.2")),
        ("0.5, 0.2,0.35", ("0.2", "0.35", "0.5")),
        ("params=0.9:0.7", ("params=0.9", "params=0.8", "params=0.7")),
        ("kv=0.5,0.75", ("kv=0.75", "kv=0.5")),
    ],
)
def test_a_sweep_is_read_from_the_largest_model_to_the_smallest(said, sizes):
    assert read_sweep(said) == sizes


@pytest.mark.parametrize(
    "said", ["0.1", "", "0.1:1.2", "0:0.5", "0.2,0.2", "0.3:0.3", "0.1:0.5:0", "0.1:0.5:-1", "0.1:0.5,0.6", "a:b",
             "0.1:0.5:1e-9", "size=0.1:0.5", "0.1:0.2:0.3:0.4", "1/0,0.2"],
)  # fmt: skip
def test_what_is_no_sweep_is_one_line(said):
    with pytest.raises(InputError, match="--sweep") as error:
        read_sweep(said)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("said", ["loss", "loss<1.05", "size<=0.5", "loss<=", "loss<=x", "", "loss<=1.05;params<=1"])
def test_what_picks_nothing_is_one_line(said):
    with pytest.raises(InputError, match="--pick"):
        read_pick(said)


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({"sparsity": 0.3}, "--sparsity 0.3 contradicts it"),
        ({"method": "flap"}, "ranks all units once"),
        ({"method": "grasprune"}, "ranks all units once"),
        ({"gates": "g"}, "--gates contradicts it"),
        ({"steps": 3}, "--steps 3 are too few for 3 sizes"),
        ({"pick": "lost<=1"}, "--pick lost<=1"),
        ({"budget": ("units=0.5",)}, "contradicts --budget units"),
        ({"sweep": "kv=0.5,0.7", "budget": ("kv=0.5",)}, "say kv once"),
    ],
)
def test_settings_that_contradict_a_sweep_are_refused(settings, reason):
    with pytest.raises(InputError, match=reason):
        Config("m", **{"sweep": "0.2,0.4,0.6"} | settings)
    with pytest.raises(InputError, match="--pick loss<=2 chooses among the sizes of a --sweep"):
        Config("m", sparsity=0.2, pick="loss<=2")


def test_steps_are_divided_with_a_third_more_for_the_first_size():
    assert steps_of(100, 3) == [40, 30, 30] and steps_of(1000, 6)[1:] == [157] * 5
    assert all(sum(steps_of(n, k)) == n and min(steps_of(n, k)) > 0 for n in range(7, 40) for k in range(1, 7))


def test_step_sizes_of_a_part_are_those_of_one_run_of_all_steps_so_far_and_what_was_set_by_hand_stays():
    c = Config("m", sparsity=0.2, steps=100).resolved()
    assert recipe_for(c, 25, 75).lr == pytest.approx(c.learning.lr)
    assert recipe_for(c, 50, 0).lr == pytest.approx(c.learning.lr * 2**0.5)
    assert recipe_for(c, 25, 75).sensitivity_batches == c.learning.sensitivity_batches == 100
    by_hand = replace(c, learning=replace(c.learning, mu_end=0.02))
    assert recipe_for(by_hand, 25, 75).mu_end == 0.02 and recipe_for(by_hand, 25, 75).dual_lr[0] == 2.0
    assert recipe_for(replace(c, lr=0.5, learning=None).resolved(), 25, 75).lr == 0.5


# --- sizes -----------------------------------------------------------------------------------------------------------


def test_each_size_lies_in_the_one_before_on_its_budget_and_says_what_it_is(swept):
    sizes = [swept / "sizes" / name for name in ("0.2", "0.4", "0.6")]
    sets = [kept(size) for size in sizes]
    assert all(smaller < larger for larger, smaller in pairwise(sets))
    steps = 0
    for size, sparsity, own in zip(sizes, (0.2, 0.4, 0.6), (8, 4, 4), strict=True):
        plan, said = json.loads((size / "plan.json").read_text()), about(size)
        assert -1e-6 <= 1 - sparsity - plan["rounding"]["kept"] < 0.025 and plan["rounding"]["reopened"] == 0
        steps += own
        assert (said["sparsity"], said["steps"], said["tokens"]) == (sparsity, steps, steps * 2 * 16)
        assert len((size / "metrics.jsonl").read_text().splitlines()) == own
        assert load_config(size / "config.yaml").sparsity == sparsity and not (size / "checkpoints").exists()
        open_units = {(n, i) for n, z in gates_of(size).items() if "." in n and n.startswith("layers")
                      for i in (z > 0).nonzero().flatten().tolist()}  # fmt: skip
        assert open_units == kept(size), "what is planned is what was learned"


def test_the_order_of_a_size_has_what_it_keeps_first_then_what_larger_sizes_kept(swept):
    sizes = [gates_of(swept / "sizes" / name) for name in ("0.2", "0.4", "0.6")]
    for number in (1, 2, 3):
        for name in (n for n in sizes[0] if n.startswith("layers")):
            kept_in = sum((gates[name] > 0).int() for gates in sizes[:number])
            assert torch.equal(sizes[number - 1][f"order.{name}"].floor().int(), kept_in)


def test_kept_gates_go_on_from_the_size_before(swept):
    first, second = (gates_of(swept / "sizes" / name) for name in ("0.2", "0.4"))
    both = {n: (first[n] > 0) & (second[n] > 0) for n in first if n.startswith("layers")}
    before, after = (torch.cat([gates[n][mask] for n, mask in both.items()]) for gates in (first, second))
    assert torch.corrcoef(torch.stack([before, after]))[0, 1] > 0.3 and not torch.equal(before, after)


def test_sizes_between_those_of_a_sweep_lie_between_them_with_the_gates_of_the_next_larger_one(swept, capsys):
    for sparsity in (0.1, 0.3, 0.35, 0.5, 0.8):
        assert secateur("plan", swept, "--sparsity", sparsity) == 0
    names = ("0.8", "0.6", "0.5", "0.4", "0.35", "0.3", "0.2", "0.1")
    sets = [kept(swept / "sizes" / name) for name in names]
    assert all(smaller < larger for smaller, larger in pairwise(sets))
    for name, source in (("0.1", "0.2"), ("0.3", "0.2"), ("0.5", "0.4"), ("0.8", "0.6")):
        found, of = gates_of(swept / "sizes" / name), gates_of(swept / "sizes" / source)
        assert all(torch.equal(found[n], of[n]) for n in of if not n.startswith("order"))
    capsys.readouterr()
    assert secateur("sizes", swept) == 0
    said = capsys.readouterr().out
    assert "not within" not in said
    assert [size["name"] for size in table_of(swept)["sizes"]] == list(reversed(names))


@pytest.mark.parametrize("options", [{"recipe": "paper"}, {"method": "hard-concrete"}, {"shape": "aligned:16"}])
def test_a_sweep_by_any_recipe_method_and_shape(dense, text, tmp_path, options):
    run = tmp_path / "run"
    assert secateur(*arguments(dense, text, run, "0.3,0.6", steps=12, **options)) == 0
    assert kept(run / "sizes" / "0.6") < kept(run / "sizes" / "0.3")
    assert all(size["inside"] for size in table_of(run)["sizes"])
    assert secateur("export", run, "--pick", "params<=0.9") == 0
    assert secateur("verify", run / "sizes" / table_of(run)["sizes"][0]["name"]) in (0, 2)


def test_a_sweep_by_a_budget_beside_another_one(dense, text, tmp_path):
    run = tmp_path / "run"
    assert secateur(*arguments(dense, text, run, "params=0.8,0.6", steps=12), "--budget", "kv=0.5") == 0
    sizes = [run / "sizes" / f"params={share},kv=0.5" for share in (0.8, 0.6)]
    assert kept(sizes[1]) < kept(sizes[0])
    for size, share in zip(sizes, (0.8, 0.6), strict=True):
        first, second = json.loads((size / "plan.json").read_text())["rounding"]["budgets"]
        assert first["pruned"] <= first["bound"] == int(share * first["dense"])
        assert second["pruned"] <= second["bound"]


def test_a_sweep_over_a_mixture(mixture, tmp_path):  # noqa: F811
    run = tmp_path / "run"
    assert secateur(*arguments(mixture / "dense", mixture / "text.jsonl", run, "0.25,0.5", steps=12)) == 0
    assert kept(run / "sizes" / "0.5") < kept(run / "sizes" / "0.25")
    assert secateur("export", run / "sizes" / "0.5") == 0 and secateur("verify", run / "sizes" / "0.5") == 0


# --- interruption ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("at", [1, 6, 8, 9, 11, 12, 14])
def test_an_interrupted_sweep_goes_on_to_the_same_gates_bit_for_bit(swept, dense, text, tmp_path, monkeypatch, at):
    run, advance, done = tmp_path / "run", Optimiser.advance, []

    def stop(optimiser, *values):
        done.append(None)
        if len(done) == at:
            raise KeyboardInterrupt
        return advance(optimiser, *values)

    with monkeypatch.context() as patched:
        patched.setattr(Optimiser, "advance", stop)
        assert secateur(*arguments(dense, text, run)) == 130
    assert not json.loads((run / "sweep.json").read_text())["done"]
    taken = []
    with monkeypatch.context() as patched:
        patched.setattr(Optimiser, "advance", lambda o, *values: taken.append(None) or advance(o, *values))
        assert secateur("prune", "--resume", run) == 0
    assert len(taken) == 16 - at + 1, "what was learned is not learned again"
    for name in ("0.2", "0.4", "0.6"):
        assert same_gates(run / "sizes" / name, swept / "sizes" / name)
        lines = [(folder / "sizes" / name / "metrics.jsonl").read_text() for folder in (run, swept)]
        assert lines[0] == lines[1]


def test_a_finished_sweep_learned_again_gives_the_same_gates(swept, dense, text, tmp_path):
    run = tmp_path / "run"
    assert secateur(*prune_arguments(dense, text, run, steps=16)) == 0
    before = (run / "gates.safetensors").read_bytes(), (run / "plan.json").read_bytes()
    for _ in range(2):
        assert secateur("learn", run, "--sweep", "0.2,0.4,0.6") == 0
        assert all(same_gates(run / "sizes" / n, swept / "sizes" / n) for n in ("0.2", "0.4", "0.6"))
    assert before == ((run / "gates.safetensors").read_bytes(), (run / "plan.json").read_bytes())
    assert secateur("sizes", run) == 0
    assert {size["name"] for size in table_of(run)["sizes"]} == {"own", "0.2", "0.4", "0.6"}
    assert secateur("learn", run, "--sweep", "0.3,0.5") == 0
    assert secateur("plan", run, "--sparsity", 0.4) == 0
    assert about(run / "sizes" / "0.4")["sparsity"] == 0.3, "of the last sweep, not of the one before"


# --- the sizes beside each other -------------------------------------------------------------------------------------


def test_the_table_has_each_sizes_figures_and_the_plot_is_drawn(swept, capsys):
    assert secateur("sizes", swept) == 0
    said = " ".join(capsys.readouterr().out.split())
    found = table_of(swept)
    assert (swept / "sizes.png").read_bytes()[:4] == b"\x89PNG" and f"wrote {swept}/sizes.png" in said
    session = open_session(swept)
    assert found["dense"]["loss"] == pytest.approx(session.held_out_loss(None))
    for size in found["sizes"]:
        plan = json.loads((swept / "sizes" / size["name"] / "plan.json").read_text())
        assert size["loss"] == plan["rounding"]["held_out_planned"]
        assert size["shares"]["loss"] == pytest.approx(size["loss"] / found["dense"]["loss"])
        assert size["shares"]["units"] == pytest.approx(plan["rounding"]["kept"])
        assert f"│ {size['shares']['loss']:.3f} │ {size['shares']['perplexity']:.3f} │" in said


def test_without_matplotlib_the_table_is_there_and_one_line_says_what_to_install(swept, capsys, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "matplotlib", None)
    assert secateur("sizes", swept) == 0
    assert "no sizes.png: matplotlib is not installed; run: pip install 'secateur[bench]'" in capsys.readouterr().out


def test_time_comes_from_a_bench_of_the_size(swept, tmp_path, capsys):
    found = made_bench(0.6)
    asked = {("prefill", 1): 9.0, ("decode", 8): 1.1, ("decode", 1): 1.6}
    found["timings"] = [
        found["timings"][0] | {"metric": metric, "batch_size": size, "speedup": {"median": x, "low": x, "high": x}}
        for (metric, size), x in asked.items()
    ]
    file = swept / "sizes" / "0.6" / "bench-vllm.json"
    file.write_text(json.dumps(found))
    try:
        assert secateur("sizes", swept) == 0
        said = capsys.readouterr().out
        assert "62.5%" in said and "…" not in said, "a terminal of 80 columns has room"
        shares = {size["name"]: size["shares"].get("time") for size in table_of(swept)["sizes"]}
        assert shares["0.6"] == pytest.approx(1 / 1.6) and shares["0.2"] is None
        assert picked(table_of(swept), "time<=0.7")["name"] == "0.6"
    finally:
        file.unlink()


def size(name, loss, parameters, **shares):
    return {"name": name, "loss": 3.0 * loss, "parameters": parameters, "shares": {"loss": loss} | shares}


SIZES = {"sizes": [size("a", 1.01, 90, params=0.9), size("b", 1.04, 70, params=0.7), size("c", 1.2, 50, params=0.5)]}


@pytest.mark.parametrize(
    ("said", "name"),
    [("loss<=1.05", "b"), ("loss<=1.02", "a"), ("params<=0.8", "b"), ("params<=0.6", "c"), ("params<=1", "a"),
     ("loss<=1.3,params<=0.8", "c"), ("loss<=1.04, params<=0.95", "b")],
)  # fmt: skip
def test_the_smallest_size_that_is_good_enough_is_picked_else_the_best_that_is_small_enough(said, name):
    assert picked(SIZES, said)["name"] == name


def test_where_no_size_is_within_the_bounds_the_nearest_is_named():
    with pytest.raises(InputError, match=r"no size has that; the least loss is 1.010, of size a"):
        picked(SIZES, "loss<=1.001")
    with pytest.raises(InputError, match="time is not known of any: run `secateur bench`"):
        picked(SIZES, "time<=0.5")


def row(name, loss, parameters, *kept_units):
    found = pareto.SizeCost(name, name, {}, loss, parameters, 0, None, None, True, True)
    return found, Plan({"g": torch.tensor(kept_units)}, {})


def test_the_front_has_no_size_that_another_beats_and_sizes_outside_of_others_are_named():
    rows = [row("s", 2.0, 10, 1), row("worse", 2.0, 30, 1, 2), row("m", 1.5, 20, 1, 2), row("l", 1.0, 40, 1, 3, 4)]
    found = pareto._placed(rows)
    assert [(size.name, size.front, size.inside) for size in found] == [
        ("l", True, True), ("worse", False, False), ("m", True, True), ("s", True, True),
    ]  # fmt: skip


# --- through the command line ----------------------------------------------------------------------------------------


def test_a_sweep_that_picks_exports_verifies_and_evaluates_what_it_picks(dense, text, tmp_path, capsys):
    run = tmp_path / "run"
    assert secateur(*arguments(dense, text, run), "--pick", "units<=0.7") == 0
    said = " ".join(capsys.readouterr().out.split())
    best = min((s for s in table_of(run)["sizes"] if s["shares"]["units"] <= 0.7), key=lambda s: s["loss"])["name"]
    folder = run / "sizes" / best
    assert "sizes, from the largest to the smallest" in said and "perplexity" in said
    assert json.loads((folder / "verify.json").read_text())["passed"] and (folder / "eval.json").exists()
    steps = about(folder)["steps"]
    assert f"- tokens: {steps} steps × 2 × 16 = {steps * 32}" in (folder / "model" / "README.md").read_text()
    assert not any((run / "sizes" / n / "model").exists() for n in {"0.2", "0.4", "0.6"} - {best})
    assert secateur("prune", "--resume", run) == 0


def test_a_sweep_from_python(dense, text, tmp_path):
    config = Config(str(dense), sweep="0.2,0.5", data=str(text), out=tmp_path / "run", steps=8, batch_size=2,
                    seq_len=16, held_out_tokens=64, pick="params<=1")  # fmt: skip
    found = prune(config)
    assert [size["name"] for size in found.sizes] == ["0.2", "0.5"]
    assert found.folder.parent == tmp_path / "run" / "sizes" and found.pruned.perplexity > 0
    assert [size.folder.name for size in swept_runs(open_session(tmp_path / "run").run)] == ["0.2", "0.5"]


def test_the_folder_of_a_sweep_is_no_run_of_one_size(capsys, swept, tmp_path):
    for command in ("verify", "eval", "refit", "recover", "bench", "export", "plan"):
        said = complaint(capsys, command, swept)
        assert "is a sweep over sizes (" in said and f"say {swept}/sizes/SIZE" in said
    assert "contradicts" in complaint(capsys, "export", swept, "--sparsity", 0.4, "--pick", "loss<=2")
    assert "no size has that" in complaint(capsys, "export", swept, "--pick", "loss<=0.01")
    assert "has no gates yet" in complaint(capsys, "sizes", tmp_path) or True


def test_what_no_size_of_a_sweep_can_be_is_said_before_anything_is_learned(capsys, dense, text, tmp_path):
    said = complaint(capsys, *arguments(dense, text, tmp_path / "run", "bytes=0.9,0.01"))
    assert "--budget bytes=0.01 cannot be met" in said and not (tmp_path / "run" / "sweep.json").exists()
