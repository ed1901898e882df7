"""GGUF files: llama.cpp computes and splits text as transformers does, or one line says why not."""

import json
import shutil

import pytest
import torch
from gguf import GGUFReader
from tokenizers import normalizers, pre_tokenizers, processors
from transformers import AutoTokenizer

from runs import complaint, leftovers, secateur
from secateur.describe import describe
from secateur.export import export
from secateur.files import InputError
from secateur.gguf_file import write_gguf
from secateur.gguf_tokenizer import add_numbers
from secateur.plan import Plan
from secateur.runtimes import compare, hf
from tiny import random_plan, tiny, tokens
from vocabularies import CUTS, LINES, byte_tokenizer, piece_tokenizer, split_by_llamacpp

llamacpp = pytest.importorskip("secateur.runtimes.llamacpp")

ROPE_LLAMA3 = {"rope_type": "llama3", "rope_theta": 10000.0, "factor": 4.0, "low_freq_factor": 1.0,
               "high_freq_factor": 4.0, "original_max_position_embeddings": 16}  # fmt: skip
ROPE_LINEAR = {"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0}
ATTENTION, CHANNELS = "layers.{}.kv_groups", "layers.{}.channels"


def exported(folder, model_type="llama", *, shape="ragged", close=(), means=None, tokenizer=None, **changes):
    """A tiny random model, pruned at random; the folder of its checkpoint."""
    model = tiny(model_type, **changes)
    description = describe(model)
    plan = random_plan(description, close=close, shape=shape)
    if means is not None:
        own = {g.name: torch.rand(model.get_parameter(g.writer).shape[1]) for g in description.groups}
        plan = Plan(plan.kept, plan.scales, plan.shape, own)
    export(model, tokenizer, description, plan, folder / "model")
    return folder / "model"


def agreement(checkpoint, new_tokens=12):
    """The worst difference of llama.cpp's log-probabilities, and whether all greedy tokens are the same."""
    prompts = [row.tolist() for row in tokens(batch=2, length=9)]
    found = compare(hf.greedy(checkpoint, prompts, new_tokens), llamacpp.greedy(checkpoint, prompts, new_tokens))
    return max(a.difference for a in found), all(a.equal for a in found)


def said(path):
    return {name: field.contents() for name, field in GGUFReader(path).fields.items()}


# --- what is computed ------------------------------------------------------------------------------------------------

CASES = {
    "llama, uniform": ("llama", {"model_type": "llama", "shape": "uniform"}),
    "llama, uniform, with biases": ("llama", {"shape": "uniform", "attention_bias": True, "mlp_bias": True}),
    "llama, uniform, llama3 positions": ("llama", {"shape": "uniform", "rope_parameters": ROPE_LLAMA3}),
    "qwen2, uniform, heads pruned": ("llama", {"model_type": "qwen2", "shape": "uniform"}),
    "qwen3, uniform": ("qwen3", {"model_type": "qwen3", "shape": "uniform"}),
    "llama, ragged": ("deci", {}),
    "mistral, ragged": ("deci", {"model_type": "mistral", "sliding_window": None}),
    "qwen2, ragged": ("deci", {"model_type": "qwen2"}),
    "heads as wide as the model has no room for": ("deci", {"head_dim": 16}),
    "tied embeddings": ("deci", {"tie_word_embeddings": True}),
    "biases everywhere": ("deci", {"attention_bias": True, "mlp_bias": True}),
    "llama3 positions": ("deci", {"rope_parameters": ROPE_LLAMA3}),
    "linear positions": ("deci", {"rope_parameters": ROPE_LINEAR}),
    "no attention in the first layer": ("deci", {"close": (ATTENTION.format(0),)}),
    "no attention in the last layer": ("deci", {"close": (ATTENTION.format(2),)}),
    "no MLP in the first layer": ("deci", {"close": (CHANNELS.format(0),)}),
    "no MLP in the last layer": ("deci", {"close": (CHANNELS.format(2),)}),
    "a layer of nothing": ("deci", {"close": (ATTENTION.format(1), CHANNELS.format(1))}),
    "the last layer of nothing": ("deci", {"close": (ATTENTION.format(2), CHANNELS.format(2))}),
    "biases of what is gone": (
        "deci", {"close": (ATTENTION.format(1), CHANNELS.format(0)), "attention_bias": True, "mlp_bias": True}
    ),
    "biases that stand for removed units": ("deci", {"means": True, "close": (ATTENTION.format(2),)}),
}  # fmt: skip


@pytest.mark.parametrize(("architecture", "changes"), CASES.values(), ids=CASES)
def test_llamacpp_computes_what_transformers_computes(architecture, changes, tmp_path):
    checkpoint = exported(tmp_path, **changes)
    assert write_gguf(checkpoint, tmp_path / "x.gguf", "f32", tokenizer=False).architecture == architecture
    difference, equal = agreement(checkpoint)
    assert difference < 2e-5 and equal


def test_a_dense_qwen2_keeps_its_architecture(tmp_path):
    model = tiny("qwen2")
    model.save_pretrained(tmp_path / "model")
    assert write_gguf(tmp_path / "model", tmp_path / "x.gguf", "f32", tokenizer=False).architecture == "qwen2"
    difference, equal = agreement(tmp_path / "model")
    assert difference < 2e-5 and equal


def test_widths_are_said_by_layer_and_a_closed_mlp_by_one_channel_of_zeros(tmp_path):
    checkpoint = exported(tmp_path, close=(ATTENTION.format(1), CHANNELS.format(2)))
    assert write_gguf(checkpoint, tmp_path / "x.gguf", "f32", tokenizer=False).zero_channels == 1
    fields = said(tmp_path / "x.gguf")
    assert fields["deci.attention.head_count"] == [2, 0, 4]  # of 6, in groups of 2
    assert fields["deci.attention.head_count_kv"] == [1, 0, 2]
    assert fields["deci.feed_forward_length"] == [26, 14, 1]
    assert fields["deci.attention.key_length"] == fields["deci.rope.dimension_count"] == 8


def test_no_more_context_is_promised_than_the_model_attends_to(tmp_path):
    checkpoint = exported(tmp_path, "mistral", sliding_window=32)
    write_gguf(checkpoint, tmp_path / "x.gguf", "f32", tokenizer=False)
    assert said(tmp_path / "x.gguf")["deci.context_length"] == 32


# --- types -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("kind", "matrices"), [("f32", "F32"), ("f16", "F16"), ("q8_0", "Q8_0")])
def test_matrices_have_the_type_asked_for_and_norms_stay_float32(kind, matrices, tmp_path):
    sizes = {"hidden_size": 64, "head_dim": 32, "num_attention_heads": 4, "num_key_value_heads": 2}
    checkpoint = exported(tmp_path, **sizes)
    written = write_gguf(checkpoint, tmp_path / "x.gguf", kind, tokenizer=False)
    types = {t.name: t.tensor_type.name for t in GGUFReader(tmp_path / "x.gguf").tensors}
    assert {t for name, t in types.items() if "norm" in name} == {"F32"}
    assert {t for name, t in types.items() if "norm" not in name} == {matrices}
    # Widths of 14, 26 and 20 become 32 each in blocks of 32.
    assert written.zero_channels == (3 * 32 - (14 + 26 + 20) if kind == "q8_0" else 0)
    ids = tokens(batch=1, length=9)[0].tolist()
    (expected,) = hf.greedy(checkpoint, [ids], 1)
    server = llamacpp.serve(tmp_path / "x.gguf", 16)
    assert abs(llamacpp._greedy(server, ids, 1).logprobs[0] - expected.logprobs[0]) < 0.05


def test_q8_0_takes_layers_without_attention_or_mlp(tmp_path):
    sizes = {"hidden_size": 64, "head_dim": 32, "num_attention_heads": 4, "num_key_value_heads": 2}
    checkpoint = exported(tmp_path, close=(ATTENTION.format(1), CHANNELS.format(2)), **sizes)
    write_gguf(checkpoint, tmp_path / "x.gguf", "q8_0", tokenizer=False)
    assert said(tmp_path / "x.gguf")["deci.feed_forward_length"] == [32, 32, 32]
    ids = tokens(batch=1, length=9)[0].tolist()
    (expected,) = hf.greedy(checkpoint, [ids], 1)
    server = llamacpp.serve(tmp_path / "x.gguf", 16)
    assert abs(llamacpp._greedy(server, ids, 1).logprobs[0] - expected.logprobs[0]) < 0.05


@pytest.mark.parametrize(
    ("sizes", "what"),
    [
        ({}, "token_embd.weight has rows of 48"),
        ({"hidden_size": 64, "num_attention_heads": 8, "num_key_value_heads": 4}, "attn_output.weight has rows of 16"),
    ],
)
def test_q8_0_refuses_rows_that_no_zeros_can_fill(sizes, what, tmp_path):
    checkpoint = exported(tmp_path, **sizes)
    with pytest.raises(InputError, match=f"{what}, and q8_0 wants a multiple of 32.*f16"):
        write_gguf(checkpoint, tmp_path / "x.gguf", "q8_0", tokenizer=False)
    assert not (tmp_path / "x.gguf").exists() and not leftovers(tmp_path)


# --- refusals --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"model_type": "qwen3"}, "norms of queries and keys, which qwen3 has; the nearest is `--shape uniform`"),
        ({"model_type": "gemma"}, "gemma models are not written as GGUF; models of these types are: llama, mistral"),
        ({"hidden_act": "gelu"}, "computes silu, the model gelu"),
        ({"rope_parameters": ROPE_LINEAR | {"rope_type": "yarn", "original_max_position_embeddings": 16}}, "yarn"),
        ({"model_type": "qwen2", "rope_parameters": ROPE_LINEAR}, "positions of type linear"),
    ],
)
def test_what_llamacpp_has_no_place_for_is_refused_in_one_line(changes, reason, tmp_path):
    checkpoint = exported(tmp_path, **changes)
    with pytest.raises(InputError, match=reason) as error:
        write_gguf(checkpoint, tmp_path / "x.gguf", "f32", tokenizer=False)
    assert "\n" not in str(error.value) and not (tmp_path / "x.gguf").exists()


# --- tokenizers ------------------------------------------------------------------------------------------------------


def with_tokenizer(folder, tokenizer):
    checkpoint = exported(folder, tokenizer=tokenizer, vocab_size=len(tokenizer) + 5)
    write_gguf(checkpoint, folder / "x.gguf", "f16")
    return checkpoint, folder / "x.gguf"


@pytest.mark.parametrize("cut", CUTS)
def test_llamacpp_splits_text_as_tokenizers_over_bytes_do(cut, tmp_path):
    checkpoint, path = with_tokenizer(tmp_path, byte_tokenizer(cut))
    assert said(path)["tokenizer.ggml.pre"] == cut
    tokenizer = AutoTokenizer.from_pretrained(checkpoint, trust_remote_code=True)
    for line, ids in zip(LINES, split_by_llamacpp(path, LINES), strict=True):
        assert ids == tokenizer(line)["input_ids"], line


@pytest.mark.parametrize("space_first", [True, False])
def test_llamacpp_splits_text_as_sentencepieces_tokenizers_do(space_first, tmp_path):
    checkpoint, path = with_tokenizer(tmp_path, piece_tokenizer(space_first))
    types = said(path)["tokenizer.ggml.token_type"]
    assert types[:3] == [2, 3, 3] and set(types[3:259]) == {6} and set(types[259:-5]) == {1} and set(types[-5:]) == {5}
    tokenizer = AutoTokenizer.from_pretrained(checkpoint, trust_remote_code=True)
    for line, ids in zip(LINES, split_by_llamacpp(path, LINES), strict=True):
        assert ids == tokenizer(line)["input_ids"], line


def test_bos_eos_and_the_chat_template_travel(tmp_path):
    tokenizer = byte_tokenizer()
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", 1), ("</s>", 2)]
    )
    tokenizer.chat_template = "{{ messages }}"
    _checkpoint, path = with_tokenizer(tmp_path, tokenizer)
    fields = said(path)
    assert fields["tokenizer.chat_template"] == "{{ messages }}"
    assert (fields["tokenizer.ggml.bos_token_id"], fields["tokenizer.ggml.eos_token_id"]) == (1, 2)
    assert fields["tokenizer.ggml.add_bos_token"] and fields["tokenizer.ggml.add_eos_token"]
    (ids,) = split_by_llamacpp(path, ["the cat"])
    assert ids == tokenizer("the cat")["input_ids"] and ids[0] == 1 and ids[-1] == 2


def test_the_file_continues_text(tmp_path):
    _checkpoint, path = with_tokenizer(tmp_path, byte_tokenizer())
    answer = llamacpp.serve(path, 64).handle_completions({"prompt": "the cat", "max_tokens": 4, "temperature": 0})
    assert answer["usage"]["prompt_tokens"] == len(byte_tokenizer()("the cat")["input_ids"])
    assert answer["usage"]["completion_tokens"] >= 1


def normalised():
    tokenizer = byte_tokenizer()
    tokenizer.backend_tokenizer.normalizer = normalizers.Lowercase()
    return tokenizer


def in_another_order():
    tokenizer = piece_tokenizer()
    rules = json.loads(tokenizer.backend_tokenizer.to_str())
    rules["model"]["merges"].pop()
    tokenizer._tokenizer = type(tokenizer.backend_tokenizer).from_str(json.dumps(rules))
    return tokenizer


@pytest.mark.parametrize(
    ("tokenizer", "reason"),
    [
        (lambda: byte_tokenizer(pre_tokenizers.Sequence([pre_tokenizers.Whitespace(), CUTS["gpt-2"]])), "Whitespace"),
        (lambda: byte_tokenizer(pre_tokenizers.ByteLevel(add_prefix_space=True)), "add_prefix_space"),
        (normalised, "cuts text in a way that is not known"),
        (in_another_order, "llama.cpp would join them"),
    ],
)
def test_a_tokenizer_that_llamacpp_lacks_is_refused_in_one_line(tokenizer, reason, tmp_path):
    with pytest.raises(InputError, match=reason) as error:
        with_tokenizer(tmp_path, tokenizer())
    assert "\n" not in str(error.value) and not (tmp_path / "x.gguf").exists() and not leftovers(tmp_path)


def test_a_tokenizer_larger_than_the_model_is_refused(tmp_path):
    checkpoint = exported(tmp_path, tokenizer=byte_tokenizer(size=300))
    with pytest.raises(InputError, match="has token 299, the model only 128 embeddings"):
        write_gguf(checkpoint, tmp_path / "x.gguf", "f16")


# --- the command -----------------------------------------------------------------------------------------------------


def test_a_tokenizer_that_is_refused_makes_the_command_say_one_line(run, capsys):
    assert "only BPE is written as GGUF" in complaint(capsys, "export", run, "--format", "gguf")
    assert not list(run.glob("*.gguf"))


def test_the_command_converts_what_is_there_and_makes_it_where_it_is_not(monkeypatch, run):
    monkeypatch.setattr("secateur.gguf_tokenizer.add_tokenizer", lambda writer, _words, size: add_numbers(writer, size))
    weights = run / "model/model.safetensors"
    before = weights.stat().st_mtime_ns
    assert secateur("export", run, "--format", "gguf") == 0
    assert weights.stat().st_mtime_ns == before and said(run / "model-f16.gguf")["general.architecture"] == "deci"
    assert secateur("export", run, "--format", "gguf", "--gguf-type", "f32", "--shape", "uniform") == 0
    assert weights.stat().st_mtime_ns != before and said(run / "model-f32.gguf")["general.architecture"] == "llama"
    assert not (run / "model-f16.gguf").exists()
    shutil.rmtree(run / "model")
    assert secateur("export", run, "--format", "gguf") == 0
    assert (run / "model-f16.gguf").exists() and weights.exists()


def test_an_export_that_failed_verification_is_not_converted(run, capsys):
    (run / "model").rename(run / "model-failed-verification")
    assert "failed verification" in complaint(capsys, "export", run, "--format", "gguf")


@pytest.mark.parametrize("command", ["export", "refit"])
def test_other_weights_remove_what_was_made_of_the_earlier_ones(command, run):
    for name in ("model-f16.gguf", "verify-llamacpp.json"):
        (run / name).write_text("{}")
    assert secateur(command, run) == 0
    assert not (run / "model-f16.gguf").exists() and not (run / "verify-llamacpp.json").exists()
