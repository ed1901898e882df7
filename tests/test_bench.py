"""`secateur bench`: visits in turns, statistics, prices on paper, processes that hold models, what is said of it."""

import importlib.util
import json
import os
import shutil
import signal
import textwrap
import time
from pathlib import Path

import pytest
import torch

from runs import complaint, leftovers, secateur, small_llama, small_tokenizer, write_checkpoint
from secateur import measure as measuring
from secateur.bench import bench
from secateur.bench_report import lines
from secateur.budget import figures
from secateur.describe import describe
from secateur.export import export
from secateur.files import InputError
from secateur.ideal import CONTEXT, HEAD, MAPS, UNPRICED, cost_of, eaten, ideals, odd_widths
from secateur.measure import Settings, measure, speedups, spread
from secateur.workers.child import prompts, rates
from secateur.workers.hf import REST, seconds_of
from secateur.workers.parent import Worker
from tiny import random_plan

SIZE = ("--prompt-tokens", "12", "--new-tokens", "4", "--rounds", "2", "--batch-sizes", "1", "3", "--threads", "1")


@pytest.fixture(autouse=True)
def no_pause(monkeypatch):
    monkeypatch.setattr(measuring, "PAUSE", 0.0)


# --- visits and statistics -------------------------------------------------------------------------------------------


class Fake:
    """A model whose figures are scripted; it notes its visits in a common list."""

    def __init__(self, name, visits, figures):
        self.name, self.visits, self.figures = name, visits, figures

    def ask(self, do, **options):
        self.visits.append((self.name, do, options["batch"], options["seed"]))
        return next(self.figures)


def scripted(batch_sizes=(1,), rounds=3, profile=None, dense=(), pruned=()):
    visits = []
    models = {name: Fake(name, visits, iter(f)) for name, f in (("dense", dense), ("pruned", pruned))}
    settings = Settings(batch_sizes=batch_sizes, rounds=rounds)
    return measure(models, settings, lambda _: None, profile), visits


def test_medians_spreads_and_paired_ratios_are_exact_and_the_warm_up_does_not_count():
    dense = [{"decode": v, "first_token": 1.0} for v in (1e9, 10.0, 20.0, 40.0)]
    pruned = [{"decode": v, "first_token": v / 100} for v in (1e9, 30.0, 30.0, 100.0)]
    measured, _ = scripted(dense=dense, pruned=pruned)
    decode, first = measured.timings
    assert (decode.metric, decode.batch_size) == ("decode", 1)
    assert decode.dense.values == [10.0, 20.0, 40.0] and decode.pruned.median == 30.0
    assert decode.speedup.values == [3.0, 1.5, 2.5]  # by pair: the ratio of medians would be 1.5
    assert (decode.speedup.median, decode.speedup.low, decode.speedup.high) == (2.5, 1.5, 3.0)
    assert first.speedup.values == pytest.approx([1 / 0.3, 1 / 0.3, 1.0])  # seconds: less is better


def test_models_are_visited_in_turns_at_each_batch_size_with_prompts_of_their_own():
    figures = [{"decode": 1.0}] * 8
    _, visits = scripted(batch_sizes=(1, 8), dense=figures, pruned=figures)
    for batch, order in ((1, "dppddppd"), (8, "pddppddp")):
        mine = [visit for visit in visits if visit[2] == batch]
        assert "".join(name[0] for name, *_ in mine) == order
        seeds = [seed for *_, seed in mine]
        assert seeds[::2] == seeds[1::2] and len(set(seeds)) == 4  # the same in a pair, and never again
    assert len({(batch, seed) for _, _, batch, seed in visits}) == len({seed for *_, seed in visits}) == 8


def test_parts_are_medians_over_passes_of_their_own():
    figures = [{"decode": 1.0}] * 2
    parts = [{"decode": {"head": s}} for s in (3.0, 1.0, 2.0)]
    measured, visits = scripted(rounds=1, profile={"layers": "l"}, dense=figures + parts, pruned=figures + parts)
    assert measured.parts == {"decode": {1: {"dense": {"head": 2.0}, "pruned": {"head": 2.0}}}}
    seeds = {do: {seed for _, d, _, seed in visits if d == do} for do in ("measure", "profile")}
    assert not seeds["measure"] & seeds["profile"]


def test_statistics_of_known_numbers():
    assert (spread([4.0, 1.0, 3.0, 2.0]).median, spread([4.0, 1.0]).low, spread([4.0, 1.0]).high) == (2.5, 1.0, 4.0)
    assert speedups("prefill", [10.0], [20.0]) == [2.0] and speedups("between_tokens", [10.0], [20.0]) == [0.5]
    assert rates(2, 10, 4, 0.5, 0.1) == {"prefill": 40.0, "decode": 80.0}
    with pytest.raises(InputError, match="--new-tokens"):
        rates(2, 10, 4, 0.5, 0.0)


def test_prompts_repeat_by_seed_and_differ_otherwise():
    assert prompts(2, 5, 100, 7) == prompts(2, 5, 100, 7) != prompts(2, 5, 100, 8)
    drawn = prompts(3, 50, 10, 0)
    assert [len(ids) for ids in drawn] == [50] * 3 and {i for ids in drawn for i in ids} == set(range(10))


def test_time_of_maps_inside_attention_is_not_counted_twice():
    inside = f"{MAPS} in attention"
    events = [(inside, 1.0, 2.0), (CONTEXT, 0.5, 3.0), (MAPS, 3.0, 5.0), (HEAD, 5.0, 5.5), (MAPS, 9.0, 11.0)]
    found = seconds_of(events, 0.0, 10.0)  # the last one ends in the next phase
    assert found == {HEAD: 0.5, MAPS: 3.0, CONTEXT: 1.5, REST: 5.0}


# --- on paper --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    """A dense and a pruned checkpoint, with their descriptions."""
    folder = tmp_path_factory.mktemp("pair")
    write_checkpoint(folder / "dense")
    model = small_llama()
    description = describe(model)
    export(model, small_tokenizer(), description, random_plan(description, shape="uniform"), folder / "pruned")
    return folder


@pytest.fixture(scope="module")
def costs():
    model = small_llama()
    narrow = small_llama(intermediate_size=32, num_attention_heads=4, num_key_value_heads=4)
    return cost_of(describe(model)), cost_of(describe(narrow))


def test_a_cost_agrees_with_the_exact_figures(costs):
    description = describe(small_llama())
    exact, cost = figures(description, None, 1), costs[0]
    flops = cost.flops(2, 10)
    assert 2 * (sum(w for w, _ in cost.maps) + cost.head) == exact.flops_per_token
    assert cost.kv_values == exact.kv_bytes_per_token == 2 * 3 * 32
    assert flops[HEAD] == 2 * 2 * 64 * 32  # of the last token of each of two prompts
    assert flops[MAPS] == 20 * (exact.flops_per_token - 2 * 64 * 32)
    assert flops[CONTEXT] == 20 * 5.5 * 3 * 2 * (2 * 32)  # scores and values, 2 FLOPs each, over 5.5 tokens on average


def test_bytes_of_a_step_are_weights_once_and_the_cache_of_each_sequence(costs):
    read = costs[0].bytes_read(4, 100, 2, 1)
    assert read == {MAPS: 2 * sum(w for w, _ in costs[0].maps), HEAD: 2 * 64 * 32, CONTEXT: 4 * 100 * 192}


def test_of_experts_a_batch_reads_those_that_even_routing_reaches(costs):
    cost = type(costs[0])(0, ((1000, 0.25),), 0, 0, 0, {})
    assert cost.bytes_read(1, 0, 1, 1)[MAPS] == 250 and cost.bytes_read(2, 0, 1, 1)[MAPS] == 1000 * (1 - 0.75**2)
    assert cost.flops(1, 1)[MAPS] == 500


def test_ideals_are_ratios_of_flops_and_bytes(costs):
    dense, pruned = costs
    found = ideals(dense, pruned, 2, 10, 4, 2, 2)
    assert found["prefill"].by == "flops" and found["decode"].by == "bytes"
    assert found["prefill"].kept == pytest.approx(0.5) == found["decode"].kept
    assert found["prefill"].speedup == sum(dense.flops(2, 10).values()) / sum(pruned.flops(2, 10).values())
    read = [sum(cost.bytes_read(2, 12.5, 2, 2).values()) for cost in costs]
    assert found["decode"].speedup == read[0] / read[1] < 2


def test_what_eats_the_difference_adds_up_to_it_by_measured_parts(costs):
    ideal = ideals(*costs, 1, 10, 4, 2, 2)["decode"]
    seconds = {"dense": {HEAD: 2.0, MAPS: 8.0}, "pruned": {HEAD: 2.0, MAPS: 4.0}}
    found = eaten(1 / 0.6, ideal, seconds)
    assert found.by == {HEAD: pytest.approx(0.1), MAPS: pytest.approx(0.0)}  # half of the head's 20 % is not saved
    assert sum(found.by.values()) == pytest.approx(found.time - found.kept)


def test_what_eats_the_difference_adds_up_to_it_on_paper(costs):
    ideal = ideals(*costs, 1, 10, 4, 2, 2)["decode"]
    found = eaten(1.25, ideal, None)
    dense = ideal.parts["dense"]
    assert found.by[HEAD] == pytest.approx(0.5 * dense[HEAD] / sum(dense.values()))
    assert found.by[UNPRICED] == pytest.approx(0.8 - 1 / ideal.speedup)
    assert sum(found.by.values()) == pytest.approx(0.8 - 0.5)


def test_a_context_that_pruning_leaves_eats_its_share_on_paper():
    costs = cost_of(describe(small_llama())), cost_of(describe(small_llama(intermediate_size=16)))
    ideal = ideals(*costs, 1, 40, 4, 2, 2)["decode"]
    found, dense = eaten(ideal.speedup, ideal, None), ideal.parts["dense"]
    assert 0 < found.by[CONTEXT] == pytest.approx((1 - ideal.kept) * dense[CONTEXT] / sum(dense.values()))
    assert found.by[UNPRICED] == pytest.approx(0) and sum(found.by.values()) == pytest.approx(found.time - ideal.kept)


def test_odd_widths_are_columns_not_units(costs):
    assert odd_widths(costs[0]) == {64: {f"layers.{i}.heads": 32 for i in range(3)}, 32: {}}  # 8 heads of 4
    assert set(odd_widths(costs[1])[32]) == {f"layers.{i}.heads" for i in range(3)}  # 4 heads of 4


# --- processes -------------------------------------------------------------------------------------------------------


@pytest.fixture
def worker(tmp_path, monkeypatch):
    """Makes a process of a few lines that define `Model`."""
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    opened = []

    def make(source, timeout=20.0):
        text = "import os, subprocess, sys, time\nfrom secateur.workers.child import serve\n" + textwrap.dedent(source)
        (tmp_path / "scripted.py").write_text(text + "\nserve(Model)\n")
        opened.append(Worker("scripted", "dense", {"runtime": "vllm", "threads": 3}, timeout=timeout))
        return opened[-1]

    yield make
    for one in opened:
        one.close()


MODEL = """
class Model:
    def __init__(self, options):
        print("libraries print to standard output")
        self.about = {"threads": os.environ["OMP_NUM_THREADS"]}
    def measure(self, batch):
        print("on its way", file=sys.stderr)
        %s
"""


def test_a_process_answers_whatever_its_libraries_print(worker):
    one = worker(MODEL % 'return {"decode": batch * 2.0}')
    assert one.loaded() == {"threads": "3"} and one.ask("measure", batch=3) == {"decode": 6.0}


@pytest.mark.parametrize("end", ["os._exit(7)", 'raise RuntimeError("out of luck")', "os.kill(os.getpid(), 9)"])
def test_a_process_that_dies_is_one_line_with_what_it_said_last(worker, end):
    one = worker(MODEL % end)
    one.loaded()
    with pytest.raises(InputError) as error:
        one.ask("measure", batch=3)
    said = str(error.value)
    assert "dense model's process died (measure at batch size 3, exit code" in said and "\n" not in said
    assert ("out of luck" if "luck" in end else "on its way") in said


def test_a_process_that_died_between_two_requests_is_found_out(worker):
    one = worker(MODEL % "return {}")
    one.loaded()
    os.kill(one.process.pid, signal.SIGKILL)
    one.process.wait()
    with pytest.raises(InputError, match="died"):
        one.ask("measure", batch=1)


def test_a_process_that_does_not_answer_is_given_up_in_time(worker):
    one = worker(MODEL % "time.sleep(60)", timeout=15.0)
    one.loaded()
    one.timeout = 0.3
    with pytest.raises(InputError, match=r"did not answer within 0.3 s \(measure at batch size 1\); raise --timeout"):
        one.ask("measure", batch=1)


def test_what_a_process_started_ends_with_it(worker):
    one = worker(MODEL % 'return {"child": subprocess.Popen(["sleep", "60"]).pid}')
    one.loaded()
    child = one.ask("measure", batch=1)["child"]
    one.close()
    for _ in range(50):
        if not _running(child):
            return
        time.sleep(0.1)
    pytest.fail("the child still runs")


def _running(process):
    status = Path(f"/proc/{process}/stat")
    return status.exists() and status.read_text().rpartition(")")[2].split()[0] != "Z"


def test_a_runtime_that_is_not_installed_is_one_line_with_what_to_run(worker):
    one = worker("class Model:\n    def __init__(self, options):\n        import no_such_runtime")
    with pytest.raises(InputError, match=r"--runtime vllm needs no_such_runtime.* run: pip install vllm"):
        one.loaded()


# --- the command -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def benched(finished, tmp_path_factory):
    folder = shutil.copytree(finished, tmp_path_factory.mktemp("bench") / "run")
    assert secateur("bench", folder, *SIZE) == 0
    return folder


def test_bench_writes_every_figure(benched):
    results = json.loads((benched / "bench-transformers.json").read_text())
    assert [(t["metric"], t["batch_size"]) for t in results["timings"]] == [
        ("prefill", 1), ("prefill", 3), ("decode", 1), ("decode", 3),
    ]  # fmt: skip
    for timing in results["timings"]:
        for name in ("dense", "pruned", "speedup"):
            found = timing[name]
            assert len(found["values"]) == 2 and 0 < found["low"] <= found["median"] <= found["high"]
        assert timing["unit"] == "tokens/s" and 1 < timing["ideal"]["speedup"] < 2
        assert timing["ideal"]["by"] == ("flops" if timing["metric"] == "prefill" else "bytes")
        assert all(seconds >= 0 for parts in timing["part_seconds"].values() for seconds in parts.values())
        assert all(parts[MAPS] > 0 and parts[CONTEXT] > 0 for parts in timing["part_seconds"].values())
        eats = timing["eaten"]
        assert sum(eats["by"].values()) == pytest.approx(eats["time"] - eats["kept"])
    sizes = json.loads((benched / "eval.json").read_text())
    for name in ("dense", "pruned"):
        about = results[name]
        assert about["parameters"] == sizes[name]["parameters"] and about["weight_bytes"] == 4 * about["parameters"]
        assert about["kv_bytes_per_token"] == sizes[name]["kv_bytes_per_token"] and about["peak_bytes"] > 1e7
        assert about["versions"]["torch"] == torch.__version__ and about["threads"] == 1
    dense, pruned = results["dense"], results["pruned"]
    assert dense["kv_space_bytes"] + dense["weight_bytes"] == pruned["kv_space_bytes"] + pruned["weight_bytes"]
    assert dense["kv_tokens"] == dense["kv_space_bytes"] // dense["kv_bytes_per_token"] < pruned["kv_tokens"]
    assert results["dtype"] == "float32" and results["settings"]["rounds"] == 2 and results["machine"]["cores"] > 0


def test_bench_draws_a_plot_and_leaves_nothing_else(benched, finished):
    assert (benched / "bench-transformers.png").read_bytes().startswith(b"\x89PNG")
    new = {path.name for path in benched.iterdir()} - {path.name for path in finished.iterdir()}
    assert new == {"bench-transformers.json", "bench-transformers.png"} and not leftovers(benched)


def test_what_is_said_names_what_eats_the_difference(benched):
    results = json.loads((benched / "bench-transformers.json").read_text())
    said = list(lines(results))
    assert said[0].startswith("prefill, 1 at a time: takes ") and "norms, rope, dispatch" in said[0]
    assert any("no multiple of 32" in line for line in said) and any("peak memory" in line for line in said)
    assert any(line.startswith("tokens whose keys and values fit in the memory beside the weights") for line in said)


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        (("--batch-sizes", "4", "0"), "--batch-sizes is 4 0"),
        (("--rounds", "0"), "--rounds is 0"),
        (("--threads", "-1"), "--threads is -1"),
        (("--prompt-tokens", "60"), "93 positions; the model has 64"),
        (("--runtime", "llamacpp", "--dtype", "bfloat16"), "--dtype bfloat16 and --runtime llamacpp"),
        (("--dtype", "q8_0"), "--dtype q8_0 and --runtime transformers"),
        (("--python", "nowhere"), "--python nowhere"),
    ],
)
def test_settings_that_cannot_be_are_refused_before_anything_is_loaded(capsys, benched, options, reason):
    assert reason in complaint(capsys, "bench", benched, *options)


def test_an_export_that_failed_verification_is_refused(capsys, run):
    (run / "model").rename(run / "model-failed-verification")
    assert "failed verification" in complaint(capsys, "bench", run)


def test_a_broken_export_is_one_line_and_leaves_no_result(capsys, run):
    (run / "model" / "model.safetensors").write_bytes(b"nothing")
    said = complaint(capsys, "bench", run, *SIZE)
    assert "the pruned model: cannot load the weights" in said and not leftovers(run)


# --- other runtimes --------------------------------------------------------------------------------------------------


def timed(pair, tmp_path, runtime, **options):
    settings = Settings(
        runtime=runtime, batch_sizes=(1, 2), prompt_tokens=20, new_tokens=8, rounds=1, threads=1, **options
    )
    return bench(str(pair / "dense"), str(pair / "pruned"), settings, tmp_path)


@pytest.mark.parametrize("dtype", ["auto", "float32"])
def test_llama_cpp(pair, tmp_path, dtype):
    pytest.importorskip("xllamacpp")
    results = timed(pair, tmp_path, "llamacpp", dtype=dtype)
    assert [(t["metric"], t["batch_size"]) for t in results["timings"]] == [
        ("prefill", 1), ("prefill", 2), ("decode", 1), ("decode", 2),
    ]  # fmt: skip
    assert results["dtype"] == ("float16" if dtype == "auto" else dtype)
    assert results["pruned"]["kv_tokens"] > results["dense"]["kv_tokens"]


@pytest.fixture(scope="module")
def wide_heads(tmp_path_factory):
    """As vLLM's attention on CPUs wants them."""
    folder = tmp_path_factory.mktemp("wide")
    changes = {"hidden_size": 64, "head_dim": 32}
    write_checkpoint(folder / "dense", **changes)
    model = small_llama(**changes)
    description = describe(model)
    export(model, small_tokenizer(), description, random_plan(description), folder / "pruned")
    return folder


@pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="vLLM is not installed")
@pytest.mark.parametrize("runtime", ["vllm", "vllm-server"])
def test_vllm(wide_heads, tmp_path, runtime):
    results = timed(wide_heads, tmp_path, runtime, eager=True)
    metrics = ["prefill", "decode"] if runtime == "vllm" else ["first_token", "between_tokens", "requests"]
    assert list(dict.fromkeys(t["metric"] for t in results["timings"])) == metrics
    tokens = [results[name]["kv_space_bytes"] / results[name]["kv_bytes_per_token"] for name in ("dense", "pruned")]
    assert results["dense"]["kv_tokens"] == pytest.approx(tokens[0], rel=0.1)
    assert results["dense"]["kv_tokens"] < results["pruned"]["kv_tokens"] <= 1.1 * tokens[1]
