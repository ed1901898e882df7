"""What a run would take, from the configuration alone."""

import json
import shutil

import pytest
import torch

from runs import complaint, secateur, small_llama, write_checkpoint
from secateur import estimate as estimating
from secateur.config import Config
from secateur.describe import describe
from secateur.footprint import Ledger, footprint
from secateur.load import Described
from test_families import MIXTURES
from tiny import tiny

BIG = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": 8192, "intermediate_size": 28672,
    "num_hidden_layers": 8, "num_attention_heads": 64, "num_key_value_heads": 8, "vocab_size": 128256,
    "dtype": "bfloat16", "tie_word_embeddings": False,
}  # fmt: skip


@pytest.fixture
def big(tmp_path):
    """A folder that holds the configuration of a 9 B model, few and wide layers, and nothing else."""
    (tmp_path / "config.json").write_text(json.dumps(BIG))
    return tmp_path


def estimated(folder, hardware="H100", devices=1, **settings):
    return estimating.estimate(Config(str(folder), sparsity=0.5, **settings), hardware, devices)


def test_a_configuration_is_enough(big, capsys):
    assert secateur("estimate", big, "--hardware", "h200", "--gradient-checkpointing") == 0
    said = capsys.readouterr().out
    assert "8,946,589,696" in "".join(said.split()) and "17.89 GB" in said and "learning" in said and "verify" in said
    assert "40%" in said, "the utilisation that is assumed"


def test_flops_of_a_step_are_three_passes(big):
    found = estimated(big, steps=10, batch_size=2, seq_len=1024)
    learning = next(s for s in found.stages if s.name == "learning")
    tokens, layers = 10 * 2 * 1024, 8
    maps = layers * (2 * 8192 * 8192 + 2 * 8192 * 1024 + 3 * 8192 * 28672) + 8192 * 128256
    expected = 3 * tokens * (2 * maps + 4 * layers * 8192 * (1024 + 1) / 2)
    assert learning.tokens == tokens and learning.flops == pytest.approx(expected, rel=1e-6)
    again = next(s for s in estimated(big, steps=10, gradient_checkpointing=True).stages if s.name == "learning")
    assert 3.5 < again.flops / (again.tokens * 2 * maps) < 4.2


def test_checkpointing_smaller_batches_and_narrower_weights_take_less():
    model = small_llama(num_hidden_layers=6)
    described = Described(model, describe(model), model.config)
    groups = described.description.groups

    def total(batch=2, checkpointing=False, dtype=torch.float32):
        return footprint(model.config, groups, batch, 32, dtype, dtype, checkpointing).activations

    assert total(checkpointing=True) < total() / 3
    assert total(4) == pytest.approx(2 * total(2), rel=0.05)
    assert total(dtype=torch.bfloat16) < 0.7 * total()


@pytest.mark.parametrize("family", MIXTURES)
def test_mixtures_are_reckoned_too(family):
    model_type, changes = MIXTURES[family]
    model = tiny(model_type, **changes)
    found = footprint(model.config, describe(model).groups, 2, 16, torch.float32, torch.float32, False)
    assert found.activations > 0 and found.logits > 0


def test_what_a_step_keeps_is_what_autograd_keeps():
    """Against saved tensors of a real pass: the same storages, counted once, but for weights."""
    from secateur.attach import attached
    from secateur.gates import by_group

    model = small_llama()
    groups = describe(model).groups
    z_N = torch.ones(sum(g.units for g in groups), requires_grad=True)
    weights = {p.untyped_storage()._cdata for p in [*model.parameters(), *model.buffers(), z_N]}
    held = {}

    def pack(tensor):
        if tensor.untyped_storage()._cdata not in weights:
            held[tensor.untyped_storage()._cdata] = tensor.untyped_storage()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t), attached(model, groups, by_group(z_N, groups)):
        output = model.base_model(torch.zeros((4, 64), dtype=torch.long), use_cache=False).last_hidden_state
    found = footprint(model.config, groups, 4, 64, torch.float32, torch.float32, False)
    teacher = output.nbytes
    assert found.activations - teacher == pytest.approx(sum(s.nbytes() for s in held.values()), rel=0.15)


def test_a_ledger_hears_tensors_come_and_go():
    with Ledger() as ledger:
        first = torch.ones(1000)
        second = first + 1
        assert ledger.live == 8000
        del first
        assert ledger.live == 4000
        second.view(10, 100).add_(1)
        assert (ledger.live, ledger.peak) == (4000, 8000)


def test_what_does_not_fit_is_refused_with_settings_that_would(big, capsys):
    said = complaint(capsys, "estimate", big, "--hardware", "A100-80GB", "--batch-size", 16)
    assert "this does not fit: learn takes" in said and "--gradient-checkpointing would (" in said
    assert secateur("estimate", big, "--hardware", "A100-80GB", "--batch-size", 16, "--gradient-checkpointing") == 0
    words = ["--method", "deterministic", "--teacher", "cache", "--recover", "lora"]
    said = complaint(capsys, "estimate", big, "--hardware", "L4", *words)
    assert "no settings would, but --hardware A100-80GB would" in said, "one that has to hold the whole model"


def test_settings_that_would_fit_are_tried_in_turn(big, capsys):
    words = ["estimate", big, "--hardware", "A100-80GB", "--dtype", "float32", "--seq-len", 16384, "--batch-size", 16]
    said = complaint(capsys, *words)
    assert "--gradient-checkpointing --dtype bfloat16 --micro-batch-size 1 would (" in said


def test_offloaded_layers_leave_room_and_take_time(big):
    plain = estimated(big, gradient_checkpointing=True)
    offloaded = estimated(big, offload="cpu")
    assert offloaded.config.gradient_checkpointing
    less = sum(plain.memory["learn"].values()) - sum(offloaded.memory["learn"].values())
    assert less == pytest.approx(2 * plain.in_layers * 7 / 8)
    for stage in ("verify", "eval"):  # of both models
        assert sum(offloaded.memory[stage].values()) < 0.5 * sum(plain.memory[stage].values())
    small = {"batch_size": 1, "seq_len": 128, "steps": 10}
    hours = [sum(map(e.seconds, e.stages)) for e in (estimated(big, **small), estimated(big, **small, offload="cpu"))]
    assert hours[1] > 2 * hours[0], "weights come slower than a small step uses them"


# --- several devices -------------------------------------------------------------------------------------------------


def of_learning(found):
    return sum(found.memory["learn"].values())


def test_sensitivity_is_measured_again_by_the_size_that_goes_first(big):
    def rows(**settings):
        config = Config(str(big), **{"sparsity": 0.5, "steps": 200, "batch_size": 2, "seq_len": 64} | settings)
        stages = estimating.estimate(config, "H100").stages
        return next(s.tokens for s in stages if s.name == "sensitivity") // 64 - 2 * 120

    assert rows() == 3 * 48 and rows(sparsity=0.2) == rows(remeasure=False) == 0
    assert rows(sparsity=None, sweep="0.2,0.5") == 0 and rows(sparsity=None, sweep="0.4,0.5") == 2 * 48
    assert rows(sparsity=0.4, keep=("layers.0", "layers.1")) == 3 * 48, "it is 53 % of what --keep leaves"
    assert rows(gates="gates.safetensors") == 0


def test_devices_take_their_share_of_the_rows_and_all_of_the_weights(big):
    one = estimated(big, batch_size=4, gradient_checkpointing=True)
    four = estimated(big, batch_size=16, gradient_checkpointing=True, devices=4)
    assert four.memory == one.memory and four.rows == one.rows == 4
    again = estimated(big, batch_size=16, micro_batch_size=1, gradient_checkpointing=True, devices=4)
    assert again.rows == 1 and of_learning(again) < of_learning(four)


def test_learning_takes_a_part_of_the_time_and_all_else_as_long(big):
    one, four = (estimated(big, batch_size=16, devices=devices) for devices in (1, 4))
    hours = [{stage.name: e.seconds(stage) for stage in e.stages} for e in (one, four)]
    for name in ("learning", "sensitivity"):
        assert hours[1][name] == pytest.approx(hours[0][name] / 4)
    assert hours[1]["evaluation"] == hours[0]["evaluation"]
    scored = [estimated(big, batch_size=16, devices=devices, method="flap") for devices in (1, 4)]
    assert scored[0].seconds(scored[0].stages[0]) == scored[1].seconds(scored[1].stages[0]), "rank 0 alone scores"


def test_spread_layers_are_split_and_all_else_is_on_every_device(big):
    whole, spread = (
        estimated(big, batch_size=8, gradient_checkpointing=True, devices=4, shard=shard) for shard in (False, True)
    )
    layer = 2 * spread.in_layers / 8
    less = of_learning(whole) - of_learning(spread)
    assert less == pytest.approx(2 * spread.in_layers * 3 / 4 - 2 * layer)
    tables = 2 * 128256 * 8192 * 2
    assert spread.memory["learn"]["weights outside of layers, on every device"] == pytest.approx(tables, rel=0.01)
    assert spread.peak == ("learn", of_learning(spread)), "what the first rank's CPU holds is no device's"
    evaluation = next(s for s in spread.stages if s.name == "evaluation")
    learning = next(s for s in spread.stages if s.name == "learning")
    assert spread.seconds(evaluation) is None
    assert spread.seconds(learning) > whole.seconds(learning), "layers have to be gathered"


def test_spread_weights_in_float32_leave_copies_in_bfloat16_to_the_backward_pass():
    """As autocast has no lowered weights there."""
    model = small_llama(num_hidden_layers=6)
    groups = describe(model).groups

    def kept(spread, checkpointing):
        types = torch.float32, torch.bfloat16, checkpointing
        return footprint(model.config, groups, 1, 4, *types, "other", spread=spread).activations

    linear = sum(p.numel() for name, p in model.named_parameters() if "proj" in name)
    assert kept(True, False) > 2 * linear
    assert kept(True, True) < linear / 2 < 2 * linear < kept(False, True), "else these are lowered once"


def test_what_is_each_devices_is_said(big, capsys):
    words = ["estimate", big, "--hardware", "L4", "--shard", "--gradient-checkpointing", "--devices", 4]
    assert secateur(*words) == 0
    said = capsys.readouterr().out
    for part in (
        "on each of 4 devices",
        "4 × L4, each",
        "verify on the first rank's CPU",
        "unknown",
        "on these devices",
    ):
        assert part in said, part


def test_more_devices_are_suggested_where_one_does_not_do(big, capsys):
    said = complaint(capsys, "estimate", big, "--hardware", "L4")
    assert "verify takes 58.48 GB, and L4 has 24.00 GB; " in said and "--offload cpu would (" in said
    assert ", and so would --devices 2 --shard --gradient-checkpointing (" in said
    assert said.rstrip().endswith("GB on each)")
    words = ["--devices", 2, "--shard", "--gradient-checkpointing"]
    assert secateur("estimate", big, "--hardware", "L4", *words) == 0
    said = complaint(capsys, "estimate", big, "--hardware", "L4", "--devices", 2, "--gradient-checkpointing")
    assert "verify takes 58.48 GB on the first device" in said and "--shard would (" in said


def test_layers_elsewhere_are_suggested_beside_more_devices(big, capsys):
    words = ["--hardware", "A100-80GB", "--seq-len", 64000, "--batch-size", 8, "--micro-batch-size", 1]
    said = complaint(capsys, "estimate", big, *words, "--gradient-checkpointing", "--steps", 10)
    assert "; --offload cpu would (" in said and ", and so would --devices 2 --shard (" in said


def test_processes_of_a_cpu_share_its_memory_and_its_cores(tmp_path):
    model = write_checkpoint(tmp_path / "dense")
    settings = {"steps": 10, "device": "cpu", "batch_size": 4, "precision": "float32"}
    one, two, spread = (
        estimated(model, "present", **settings, **more) for more in ({}, {"devices": 2}, {"devices": 2, "shard": True})
    )
    assert two.held("learn") == pytest.approx(2 * of_learning(two)) and two.held("verify") == one.held("verify")
    assert spread.held("learn") == pytest.approx(2 * of_learning(spread) + 4 * spread.parameters)
    assert spread.held("verify") == one.held("verify")
    for found in (one, two):
        found.hardware = one.hardware
    learning = next(s for s in one.stages if s.name == "learning")
    assert two.seconds(learning) == one.seconds(learning)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--devices", 0], "--devices must be at least 1, not 0"),
        (["--shard"], "--shard spreads a model over ranks: say --devices 2 or more"),
        (["--devices", 3], "--batch-size 4 cannot be shared evenly by 3 ranks; say --batch-size 6, or start 2"),
        (["--devices", 4, "--micro-batch-size", 2], "in parts of --micro-batch-size 2 on 4 ranks; take"),
        (["--devices", 2, "--sweep", "0.1:0.3"], "--sweep learns on one rank, not on 2; take one"),
        (["--devices", 2, "--shard", "--offload", "cpu"], "leave it or --offload out"),
    ],
)
def test_what_devices_cannot_do_is_refused_as_ranks_refuse_it(big, capsys, words, said):
    assert said in complaint(capsys, "estimate", big, "--hardware", "H100", *words)


# --- bad input -------------------------------------------------------------------------------------------------------


def test_bad_input_is_one_line(big, capsys):
    assert "--hardware abacus is not known; there are present, A100-40GB" in complaint(
        capsys, "estimate", big, "--hardware", "abacus"
    )
    assert "--batch-size must be at least 1" in complaint(capsys, "estimate", big, "--batch-size", 0)
    shutil.rmtree(big)
    assert "neither a model folder" in complaint(capsys, "estimate", big)


def test_the_present_machine_is_measured(tmp_path, capsys):
    model = write_checkpoint(tmp_path / "dense")
    assert secateur("estimate", model, "--steps", 10, "--device", "cpu", "--recover", "full") == 0
    said = capsys.readouterr().out
    assert "this CPU" in said and "FLOP/s" in said and "recover" in said
