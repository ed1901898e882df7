"""Several ranks learn the gates of one, spread weights change nothing, and none hangs when another one is gone."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from ranked import launch
from runs import (
    complaint,
    described,
    gates_of,
    prune_arguments,
    random_tokens,
    same_gates,
    secateur,
    small_llama,
    write_checkpoint,
    write_texts,
)
from secateur import ranks
from secateur.cli import COMMANDS
from secateur.config import Config
from secateur.files import InputError
from secateur.learn import learn
from secateur.options import parse
from secateur.passes import Passes
from secateur.ranks import ALONE, Ranks
from secateur.recipes import auto_recipe
from tiny import MIXTURE, tiny

ROOT = Path(__file__).parents[1]
SHARED = {"batch_size": 8, "micro_batch_size": 2, "steps": 8, "precision": "float32"}


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ranks")
    write_checkpoint(folder / "dense")
    write_texts(folder / "text.jsonl", documents=200)
    write_texts(folder / "other.jsonl", documents=200, words=30)
    mixture = tiny("qwen3_moe", num_hidden_layers=2, **MIXTURE)
    mixture.save_pretrained(folder / "mixture")
    for file in (folder / "dense").glob("*token*"):
        shutil.copy(file, folder / "mixture")
    return folder


def arguments(base, out, *flags, model="dense", **options):
    return [*prune_arguments(base / model, base / "text.jsonl", out, **SHARED | options), *flags]


VARIANTS = {
    "gates": ([], {}),
    "guarded": (["--guard", "other.jsonl:0.1"], {"measure_every": 3}),
    "noisy": ([], {"method": "hard-concrete", "steps": 6}),
    "half": (["--gradient-checkpointing"], {"precision": "bfloat16"}),
    "mixture": ([], {"model": "mixture", "steps": 6, "micro_batch_size": 1}),
    "kept": (["--guard", "other.jsonl:0.1"], {"teacher": "cache", "teacher_top_k": 8, "steps": 4}),
}


def variant(base, out, name, *more):
    flags, options = VARIANTS[name]
    flags = [str(base / flag) if ".jsonl" in flag else flag for flag in flags]
    return arguments(base, out, *flags, *more, **options)


@pytest.fixture(scope="module")
def alone(base):
    """Runs of one rank, by variant, made when they are asked for."""

    def made(name):
        folder = base / f"{name}-alone"
        if not folder.exists():
            assert secateur(*variant(base, folder, name)) == 0
        return folder

    return made


def metrics(run):
    return (run / "metrics.jsonl").read_text()


# --- the same gates --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "count"), [*((name, 2) for name in VARIANTS), ("gates", 4), ("guarded", 4)])
def test_ranks_learn_the_gates_of_one_bit_for_bit(base, alone, tmp_path, name, count):
    launched = launch(count, variant(base, tmp_path / "run", name), tmp_path)
    assert launched.ended() == [0] * count, launched.said()
    assert same_gates(tmp_path / "run", alone(name))
    assert metrics(tmp_path / "run") == metrics(alone(name))
    assert (tmp_path / "run/model/model.safetensors").read_bytes() == (
        alone(name) / "model/model.safetensors"
    ).read_bytes()
    assert f"{count} ranks learn" in launched.said()
    assert [launched.said(rank) for rank in range(1, count)] == [""] * (count - 1)


@pytest.mark.parametrize(("name", "count"), [("gates", 2), ("half", 2), ("guarded", 4), ("mixture", 4)])
def test_spread_weights_give_the_same_gates(base, alone, tmp_path, name, count):
    launched = launch(count, variant(base, tmp_path / "run", name, "--shard"), tmp_path)
    assert launched.ended() == [0] * count, launched.said()
    assert same_gates(tmp_path / "run", alone(name))


def layers_have_to_be_elsewhere():
    from secateur import methods

    load = methods.load

    def watched(*arguments):
        loaded = load(*arguments)
        layers = loaded.model.get_submodule(loaded.description.layers)
        assert all(p.is_meta for p in layers.parameters()), "this rank has the layers in memory"
        return loaded

    methods.load = watched


@pytest.mark.parametrize("model", ["dense", "mixture"])
def test_layers_are_offloaded_on_all_ranks(base, tmp_path, model):
    options = {"steps": 3, "micro_batch_size": 1, "model": model}
    assert secateur(*arguments(base, tmp_path / "one", **options)) == 0
    words = arguments(base, tmp_path / "two", "--offload", "disk", **options)
    places = {"TMPDIR": tmp_path / "scratch"}
    places["TMPDIR"].mkdir()
    launched = launch(2, words, tmp_path, layers_have_to_be_elsewhere, **places)
    assert launched.ended() == [0, 0], launched.said() + launched.said(1)
    assert same_gates(tmp_path / "one", tmp_path / "two")
    assert not list(places["TMPDIR"].iterdir())


def test_ranks_without_a_micro_batch_size_take_their_share_of_a_batch(base, tmp_path):
    options = {"micro_batch_size": 4, "steps": 4}
    assert secateur(*arguments(base, tmp_path / "one", **options)) == 0
    words = arguments(base, tmp_path / "two", **options)
    at = words.index("--micro-batch-size")
    launched = launch(2, words[:at] + words[at + 2 :], tmp_path)
    assert launched.ended() == [0, 0], launched.said()
    assert same_gates(tmp_path / "one", tmp_path / "two")
    assert "micro_batch_size: 4" in (tmp_path / "two/config.yaml").read_text()  # which repeats the run on one rank


def test_what_is_scored_once_one_rank_does_and_the_others_leave(base, tmp_path):
    launched = launch(2, arguments(base, tmp_path / "run", method="magnitude", steps=2), tmp_path)
    assert launched.ended() == [0, 0] and (tmp_path / "run/eval.json").exists()


def test_a_run_that_was_learned_goes_on_on_one_rank_and_the_others_leave(base, alone, tmp_path):
    run = shutil.copytree(alone("gates"), tmp_path / "run")
    (run / "eval.json").unlink()
    launched = launch(2, ["prune", "--resume", run], tmp_path)
    assert launched.ended() == [0, 0] and (run / "eval.json").exists()


def test_learn_learns_a_run_again_in_ranks(base, alone, tmp_path):
    run = shutil.copytree(alone("gates"), tmp_path / "run")
    (run / "gates.safetensors").unlink()
    launched = launch(2, ["learn", run], tmp_path)
    assert launched.ended() == [0, 0] and same_gates(run, alone("gates"))


# --- interruptions ---------------------------------------------------------------------------------------------------

LONG = {"steps": 60, "epochs": 20, "checkpoint_every": 1000}


@pytest.fixture(scope="module")
def long(base):
    assert secateur(*arguments(base, base / "long", **LONG)) == 0
    return base / "long"


@pytest.mark.parametrize(("count", "then"), [(2, 4), (4, 1), (1, 2)])
def test_a_run_goes_on_with_another_number_of_ranks_to_the_same_gates(base, long, tmp_path, count, then):
    run = tmp_path / "run"
    launched = launch(count, arguments(base, run, **LONG), tmp_path).after_step(run, 10)
    for rank in range(count):  # as launchers do, and Ctrl-C
        launched.kill(rank, signal.SIGTERM)
    first, *others = launched.ended()
    assert first == 130 and {*others} <= {130, 0}  # 0 where rank 0 had left before
    assert launched.said().endswith(f"interrupted; nothing is lost, go on with: secateur prune --resume {run}\n")
    (state,) = set(run.glob("checkpoints/*")) - {run / "checkpoints/step-00000000.safetensors"}
    assert int(state.stem[5:]) >= 9
    again = launch(then, ["prune", "--resume", run], tmp_path)
    assert again.ended() == [0] * then, again.said()
    assert same_gates(run, long) and metrics(run) == metrics(long)


def test_a_rank_that_dies_is_named_and_what_was_learned_is_saved(base, long, tmp_path):
    run = tmp_path / "run"
    launched = launch(4, arguments(base, run, **LONG), tmp_path).after_step(run, 10)
    start = time.monotonic()
    launched.kill(2)
    first, second, killed, fourth = launched.ended()
    assert (first, killed) == (130, -9) and {second, fourth} <= {130, 0}
    assert time.monotonic() - start < 60
    *_, line = launched.said().splitlines()
    own = rf"rank 2 of 4 \(.*, process {launched.processes[2].pid}\)"
    assert re.fullmatch(f"{own}: ended without a word; nothing is lost, go on with: .* --resume {run}", line), line
    assert "Traceback" not in "".join(map(launched.said, range(4)))
    assert secateur("prune", "--resume", run) == 0
    assert same_gates(run, long)


def little_grace():
    ranks.GRACE = 2.0


def test_a_rank_that_hangs_ends_all(base, tmp_path):
    run = tmp_path / "run"
    launched = launch(2, arguments(base, run, **LONG), tmp_path, little_grace, SECATEUR_RANK_TIMEOUT=10)
    launched.after_step(run, 10).kill(1, signal.SIGSTOP)
    launched.processes[0].join(60)
    launched.kill(1)
    assert launched.ended() == [130, -9]
    assert "rank 1 of 2" in launched.said() and "has not been heard of for 10 seconds" in launched.said()


def fail_on_rank_1(error):
    from secateur import methods

    def fail(*_arguments):
        raise error

    if os.environ["RANK"] == "1":
        methods.load = fail


def no_model():
    fail_on_rank_1(InputError("cannot load the weights"))


def a_bug():
    fail_on_rank_1(RuntimeError("out of memory\nmore"))


@pytest.mark.parametrize(
    ("first", "said", "code"), [(no_model, "cannot load the weights", 2), (a_bug, "RuntimeError: out of memory", 1)]
)
def test_what_goes_wrong_on_another_rank_is_said_in_a_line(base, tmp_path, first, said, code):
    launched = launch(2, arguments(base, tmp_path / "run"), tmp_path, first)
    assert launched.ended() == [130, code], launched.said()
    own = rf"rank 1 of 2 \(.*, process {launched.processes[1].pid}\): {said}; nothing is lost"
    assert re.search(own, launched.said()), launched.said()
    assert ("Traceback" in launched.said(1)) == (first is a_bug) and "Traceback" not in launched.said()


def diverge():
    from secateur import optimise

    advance = optimise.Optimiser.advance

    def broken(self, grad_N, *more):
        step = advance(self, grad_N, *more)
        if self.done == 3:
            self.z_N = self.z_N * float("nan")
        return step

    optimise.Optimiser.advance = broken


def test_a_loss_that_is_not_finite_is_said_once(base, tmp_path):
    launched = launch(2, arguments(base, tmp_path / "run"), tmp_path, diverge)
    assert launched.ended() == [2, 0]
    assert "NaN or infinite at step 4" in launched.said() and "NaN" not in launched.said(1)
    assert (tmp_path / "run/gates-step-3.safetensors").exists()


# --- lines -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "count", "said"),
    [
        ({"batch_size": 6, "micro_batch_size": 2}, 2,
         "--batch-size 6 does not come out even in parts of --micro-batch-size 2 on 2 ranks; take --micro-batch-size "
         "1 or 3, or --batch-size 8"),
        ({"batch_size": 3, "micro_batch_size": 1}, 2, "take fewer ranks, or --batch-size 4"),
        ({"batch_size": 6}, 4, "--batch-size 6 cannot be shared evenly by 4 ranks; say --batch-size 8, or start 3"),
        ({"sparsity": None, "sweep": "0.1:0.3"}, 2, "--sweep learns on one rank, not on 2; take one"),
        ({"shard": True}, 1, "--shard spreads a model over ranks: start several, with torchrun or accelerate launch"),
        ({"device": "cuda:1"}, 4, "each rank takes the CUDA device of its own number; say cuda or cpu"),
        ({"device": "cuda"}, 4, "4 ranks were started on a node of"),
    ],
)  # fmt: skip
def test_what_ranks_cannot_do_is_one_line(monkeypatch, options, count, said):
    monkeypatch.setattr(ranks, "_here", Ranks(0, count))
    monkeypatch.setenv("LOCAL_WORLD_SIZE", str(count))
    with pytest.raises(InputError) as error:
        ranks.check(Config("model", **{"sparsity": 0.2} | options))
    assert said in str(error.value) and "\n" not in str(error.value)


def test_a_micro_batch_size_that_does_not_divide_the_batch_is_one_line(capsys, base, tmp_path):
    said = complaint(capsys, *arguments(base, tmp_path / "run", micro_batch_size=3))
    assert "take --micro-batch-size 1 or 2 or 4 or 8, or --batch-size 9" in said


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["eval", "run"], "eval runs in one process, not in 2; start one"),
        (["prune", "model", "--sparsity", "0.2", "--batch-size", "3"], "cannot be shared evenly by 2 ranks"),
        (["prune", "nowhere/", "--sparsity", "0.2"], "nowhere/"),
        (["prune", "model", "--nonsense"], "nonsense"),
    ],
)
def test_bad_input_is_said_by_rank_0_alone_and_ends_all(tmp_path, monkeypatch, words, said):
    monkeypatch.chdir(tmp_path)
    launched = launch(2, words, tmp_path)
    codes = launched.ended()
    assert codes[0] == 2 and codes[1] in (0, 2), codes
    assert said in launched.said() and said not in launched.said(1)
    assert "Traceback" not in launched.said(0) + launched.said(1)


def test_a_timeout_that_is_none_is_one_line(monkeypatch):
    monkeypatch.setenv("SECATEUR_RANK_TIMEOUT", "soon")
    with pytest.raises(InputError, match="SECATEUR_RANK_TIMEOUT is a number of seconds, 10 or more, not 'soon'"):
        ranks._patience()


# --- one rank --------------------------------------------------------------------------------------------------------


def test_one_rank_knows_nothing_of_others():
    assert ranks.here() is ALONE and ALONE.first and ALONE.why() is None and ALONE.handed(3) == 3
    assert [t.item() for t in ALONE.in_turn([1, 2, 3], lambda n: torch.tensor(n * n))] == [1, 4, 9]
    ALONE.leave()
    assert not torch.distributed.is_initialized()


def test_micro_batches_give_the_gradient_of_the_batch():
    model = small_llama()
    groups = described(model, 0.3)[0].groups
    z_N = 1.0 + 0.1 * torch.randn(sum(g.units for g in groups), generator=torch.Generator().manual_seed(3))
    whole, parts = (
        Passes(model, groups, auto_recipe(8), rows=rows).over(random_tokens(8, 12), z_N, torch.relu, dense=True)
        for rows in (None, 2)
    )
    torch.testing.assert_close(parts.grad_N, whole.grad_N, rtol=1e-4, atol=1e-6)
    for name in ("loss", "ce", "kl", "dense_ce"):
        assert getattr(parts, name) == pytest.approx(getattr(whole, name), rel=1e-5)


def test_so_many_rows_go_through_the_model_at_once(monkeypatch):
    model = small_llama()
    description, limits = described(model, 0.3)
    seen, forward = set(), model.model.forward

    def watched(input_ids, **more):
        seen.add(len(input_ids))
        return forward(input_ids, **more)

    monkeypatch.setattr(model.model, "forward", watched)
    learn(
        model, description.groups, random_tokens(24, 12), random_tokens(1, 12), limits, auto_recipe(3), steps=3,
        batch_size=8, micro_batch_size=1,
    )  # fmt: skip
    assert seen == {1}


# --- launchers -------------------------------------------------------------------------------------------------------


def environment(**more):
    return os.environ | {"PYTHONPATH": str(ROOT / "src"), "OMP_NUM_THREADS": "1"} | more


def test_torchrun_starts_it(base, alone, tmp_path):
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    words = variant(base, tmp_path / "run", "gates")
    ended = subprocess.run(
        [*torchrun, "-m", "secateur", *words], env=environment(), capture_output=True, text=True, timeout=300
    )
    assert ended.returncode == 0, ended.stdout + ended.stderr
    assert same_gates(tmp_path / "run", alone("gates"))
    assert json.loads((tmp_path / "run/eval.json").read_text())["pruned"]["perplexity"] > 0
    assert gates_of(tmp_path / "run")


STUBS = {
    "srun": 'shift; exec "$@"',  # without its own option
    "torchrun": 'echo "$@" > "$SAID/torchrun.said"; exit $CODE',
    "scontrol": '[ "$1" = show ] && echo node-1 || echo "$@" > "$SAID/scontrol.said"',
}


def test_the_slurm_example_starts_a_run_goes_on_with_one_and_queues_again_what_was_interrupted(tmp_path):
    for name, script in STUBS.items():
        (tmp_path / name).write_text(f"#!/bin/bash\n{script}\n")
        (tmp_path / name).chmod(0o755)
    run = tmp_path / "run"
    settings = {"SLURM_JOB_NODELIST": "node-[1-2]", "SLURM_NNODES": "2", "SLURM_GPUS_ON_NODE": "8", "SLURM_JOB_ID": "7"}
    settings |= {"SAID": str(tmp_path), "PATH": f"{tmp_path}:{os.environ['PATH']}"}

    def submitted(code):
        command = ["bash", str(ROOT / "examples/slurm.sh"), "model", "texts/", str(run)]
        ended = subprocess.run(command, env=environment(CODE=str(code), **settings), capture_output=True, text=True)
        assert ended.returncode == code, ended.stderr
        launcher, _, words = (tmp_path / "torchrun.said").read_text().strip().partition(" -m secateur ")
        assert "--nnodes 2 --nproc-per-node 8" in launcher and "--rdzv-endpoint node-1:29500" in launcher
        return words.split()

    command, *words = submitted(0)
    options = parse(command, COMMANDS[command][0], words)
    assert (options.model, options.data, options.out, options.sparsity) == ("model", "texts/", run, 0.2)
    assert options.batch_size % (16 * options.micro_batch_size) == 0
    submitted(2)  # which queueing again would not put right
    assert not (tmp_path / "scontrol.said").exists()
    (run / "checkpoints").mkdir(parents=True)
    (run / "config.yaml").touch()
    assert submitted(1) == ["prune", "--resume", str(run)]
    assert (tmp_path / "scontrol.said").read_text() == "requeue 7\n"
