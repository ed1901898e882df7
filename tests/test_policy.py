"""What `--shape` can say, which widths follow from it, and what it says where a model or a budget cannot have them: one
line that names the nearest shape that works.
"""

import re

import pytest

from runs import complaint, prune_arguments
from secateur.budget import largest_that_fits, make_budget
from secateur.config import Config
from secateur.describe import describe
from secateur.files import InputError
from secateur.policy import permitted, policy_of
from test_shapes import MODELS, ranks, widths
from tiny import MIXTURE, tiny


@pytest.fixture(scope="module")
def gqa():
    return describe(MODELS["gqa"]())


# --- words -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("said", "read"),
    [("ragged", "ragged"), ("aligned:64", "aligned:64"), ("tp:2", "tp:2"), ("aligned:64,tp:2", "tp:2,aligned:64"),
     ("aligned:64, uniform", "uniform,aligned:64"), ("ragged,aligned:064", "aligned:64"), ("aligned:1", "ragged"),
     ("uniform,tp:1", "uniform"), ("padded", "padded")],
)  # fmt: skip
def test_words_are_read_in_any_order_and_written_in_one(said, read):
    assert str(policy_of(said)) == read and policy_of(read) == policy_of(said)
    assert Config(model="m", sparsity=0.3, shape=said).shape == read


WRONG = [
    ("aligned:0", "least is"), ("aligned:x", "least is"), ("aligned", "least is"), ("aligned:-8", "least is"),
    ("tp:0", "least is"), ("tp:2.5", "least is"), ("trapezoid", "'trapezoid' is no shape"), ("", "is no shape"),
    ("uniform:4", "is no shape"), ("aligned:8,aligned:16", "twice"), ("uniform,ragged", "contradicts"),
    ("padded,aligned:8", "stands alone"), ("padded,tp:2", "stands alone"), ("aligned:64 tp:2", "least is"),
]  # fmt: skip


@pytest.mark.parametrize(("shape", "reason"), WRONG)
def test_what_is_no_shape_is_refused_in_one_line(shape, reason):
    with pytest.raises(InputError, match=reason) as error:
        policy_of(shape)
    assert "--shape" in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("shape", ["uniform,aligned:64", "uniform,tp:2"])
def test_equal_widths_contradict_other_budgets_and_biases_whatever_they_are_multiples_of(shape):
    for option, value in (("per", "model"), ("method", "flap")):
        with pytest.raises(InputError, match="--shape uniform,") as error:
            Config(model="m", sparsity=0.3, shape=shape, **{option: value})
        assert f"--{option} {value}" in str(error.value)
    assert Config(model="m", sparsity=0.3, shape=shape).resolved().per == "expert"


# --- what a model cannot be ------------------------------------------------------------------------------------------


def refused(description, shape, sparsity=0.4, **options):
    """What is said of a shape: one line that names another one, which is not refused."""
    with pytest.raises(InputError) as error:
        possible(description, shape, sparsity, **options)
    said = str(error.value)
    assert "\n" not in said and (f"--shape {shape}" in said or "no equal widths" in said)
    if found := re.search("the nearest that works is --shape ([a-z0-9:,]+)$", said):
        possible(description, found[1], sparsity, **options)
    return said


def possible(description, shape, sparsity=0.4, **options):
    description.check_shape(shape)
    options = {"scope": "model", "tie": "rows"} | options
    return make_budget(description.groups, description.shapes, sparsity, policy=policy_of(shape), **options)


def test_shapes_that_a_model_cannot_have_are_refused_and_the_nearest_is_named(gqa):
    """6 groups of 2 heads, 80 channels."""
    assert refused(gqa, "aligned:81").endswith(
        "layers.0.channels has 80 channels, fewer than 81; the nearest that works is --shape aligned:80"
    )
    assert refused(gqa, "tp:2,aligned:48").endswith(
        "80 channels, fewer than 48 on each of 2 ranks; the nearest that works is --shape tp:2,aligned:40"
    )
    said = refused(gqa, "tp:7,aligned:4")
    assert "neither the 12 heads in 6 groups of layers.0.kv_groups nor fewer divide over 7 ranks" in said
    assert said.endswith("the nearest that works is --shape tp:6,aligned:4")
    assert refused(gqa, "tp:1000000").endswith("--shape tp:12")
    assert refused(gqa, "aligned:999999999").endswith("--shape aligned:80")


def test_experts_want_multiples_of_8_whatever_else(gqa):
    description = describe(tiny("qwen3_moe", **MIXTURE)).only(["expert_channels"])
    said = refused(description, "aligned:20")
    assert said.endswith("has 32 channels, fewer than 40; the nearest that works is --shape aligned:16")


def test_heads_without_groups_divide_or_are_refused():
    four = describe(tiny("llama", num_attention_heads=4, num_key_value_heads=4))
    assert permitted(four.groups[0], policy_of("tp:3")) == (3,), "one head fewer divides"
    assert refused(four, "tp:5").endswith("--shape tp:4")
    nine = describe(nine_heads())
    assert permitted(nine.groups[0], policy_of("tp:2")) == (2,), "one group fewer divides"
    assert "neither the 9 heads in 3 groups" in refused(nine, "tp:4")
    narrow = describe(nine_heads(intermediate_size=8))
    assert "neither the 8 channels of" in refused(narrow, "tp:9")
    one = describe(tiny("qwen2", num_attention_heads=5, num_key_value_heads=1))
    assert refused(one, "tp:6").endswith("--shape tp:5")


def nine_heads(**changes):
    return tiny("qwen2", **{"num_attention_heads": 9, "num_key_value_heads": 3} | changes)


def test_what_stays_whole_must_divide_as_it_is():
    description = describe(nine_heads(intermediate_size=60)).only(["channels"])
    said = refused(description, "tp:2")
    assert "layers.0.kv_groups stays whole, and the 9 heads in 3 groups do not divide over 2 ranks" in said
    assert said.endswith("add heads to --units, or the nearest that works is --shape tp:3")
    description.check_shape("tp:3")
    description.check_shape("aligned:16")
    heads = describe(nine_heads(intermediate_size=60)).only(["heads"])
    heads.check_shape("aligned:16")  # of what is not pruned no width is asked


def test_budgets_that_a_shape_cannot_meet_are_refused(gqa):
    assert "leaves no room for any width" in refused(gqa, "aligned:80", 0.995)
    nine = describe(nine_heads(intermediate_size=64))
    said = refused(nine, "tp:2", 0.05)
    assert "--shape tp:2 permits no more than" in said and said.endswith("--shape tp:3")
    needed = float(re.search("--sparsity ([0-9.]+) or above", said)[1])
    possible(nine, "tp:2", needed)
    with pytest.raises(InputError):
        possible(nine, "tp:2", needed - 0.02)
    said = refused(nine, "aligned:48", 0.05)
    assert "permits no more than" in said and said.endswith("--shape aligned:56")
    deep = describe(nine_heads(intermediate_size=64, num_hidden_layers=6))
    said = refused(deep, "aligned:48", 0.05, scope="kind")
    assert "no more than 75.0% of the parameters in channels" in said and "use --sparsity 0.25 or above" in said


def test_equal_widths_that_leave_much_of_a_budget_are_refused(gqa):
    said = refused(gqa, "uniform,aligned:64", 0.7, scope="expert")
    assert "no equal widths" in said and said.endswith("--shape uniform,aligned:16")
    nine = describe(nine_heads(intermediate_size=64))
    assert refused(nine, "uniform,tp:2", 0.05, scope="expert").endswith("--shape uniform,tp:3")


def test_whole_experts_need_a_width_that_divides():
    heads = {"num_attention_heads": 12, "num_key_value_heads": 12}
    description = describe(tiny("qwen3_moe", **MIXTURE | heads | {"moe_intermediate_size": 64})).only(
        ["expert_channels"]
    )
    said = refused(description, "tp:3", scope="layer", tie="experts")
    assert "removes whole experts" in said and said.endswith("--shape tp:2")
    assert refused(description, "aligned:48", scope="layer", tie="experts").endswith("--shape aligned:32")
    limits = possible(description, "tp:2", scope="layer", tie="experts")
    found = widths(description, largest_that_fits(ranks(description), limits))
    assert all(width == [64] for width in found.values())


def test_what_no_shape_mends_names_none():
    description = describe(MODELS["qwen3_moe"]())
    with pytest.raises(InputError) as error:
        possible(description, "uniform,tp:2", scope="expert", tie="experts")
    assert str(error.value).endswith("equal widths of all experts contradict it")


@pytest.mark.parametrize(
    ("shape", "reason"),
    [*WRONG[:4], WRONG[6], ("aligned:65", "the nearest that works is --shape aligned:64"), ("tp:9", "--shape tp:8")],
)
def test_bad_shapes_end_in_one_line_and_before_any_text_is_read(capsys, dense, text, tmp_path, run, shape, reason):
    assert reason in complaint(capsys, *prune_arguments(dense, text, tmp_path / "new", shape=shape))
    assert not (tmp_path / "new" / "data.safetensors").exists()
    for command in ("plan", "export"):
        assert reason in complaint(capsys, command, run, "--shape", shape)


# --- widths ----------------------------------------------------------------------------------------------------------


def test_widths_that_tensor_parallelism_permits_by_hand():
    groups = {g.kind: g for g in describe(tiny("llama", num_attention_heads=24, num_key_value_heads=6)).groups}
    heads, channels = groups["kv_groups"], groups["channels"]  # 4 query heads a group; 40 channels
    assert permitted(heads, policy_of("tp:2")) == (1, 2, 4, 6)  # one group: its key is replicated, 2 heads a rank
    assert permitted(heads, policy_of("tp:4")) == (1, 2, 4)
    assert permitted(heads, policy_of("tp:3")) == (3, 6)
    assert permitted(heads, policy_of("tp:8")) == (2, 4)
    assert permitted(channels, policy_of("tp:3")) == tuple(range(3, 40, 3))  # 40 itself does not divide
    assert permitted(channels, policy_of("tp:2,aligned:12")) == (24,)
    assert permitted(channels, policy_of("aligned:16")) == (16, 32)  # 40 itself is no multiple
    assert permitted(channels, policy_of("tp:2")) == tuple(range(2, 41, 2))
    one = next(g for g in describe(MODELS["mqa"]()).groups if g.attends)
    assert permitted(one, policy_of("tp:4")) == (4, 8, 12)
    experts = next(g for g in describe(MODELS["qwen3_moe"]()).groups if g.experts)
    assert permitted(experts, policy_of("aligned:12")) == (24, 48)
    assert permitted(experts, policy_of("tp:2")) == (16, 32, 48, 64)
    assert permitted(experts, policy_of("tp:3")) == (24, 48)
    assert permitted(experts, policy_of("ragged")) == tuple(range(8, 65, 8))
