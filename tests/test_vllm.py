"""Real vLLM writes of pruned checkpoints what transformers writes: offline, behind its server, with two ranks.

Runs in an environment of its own (`make test-serve`); elsewhere it is skipped.
"""

import dataclasses
import json
import os
import socket
import subprocess
import sys
import time
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from pydoc_data.topics import topics

import pytest

from runs import complaint, prune_arguments, secateur, small_tokenizer, write_checkpoint
from secateur.describe import describe
from secateur.equivalence import tolerance, within
from secateur.export import export
from secateur.runtimes import compare, hf
from tiny import LATENT, random_plan, tiny, tokens

pytest.importorskip("vllm", reason="needs vLLM: make test-serve", exc_type=ImportError)
vllm = pytest.importorskip("secateur.runtimes.vllm")

# As vLLM's kernels for CPUs want them: heads of 32; of latent attention, a cache of 576.
WIDE = {"vocab_size": 128, "hidden_size": 128, "intermediate_size": 96, "max_position_embeddings": 128}
WIDE |= {"num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 32}
EXPERTS = {"num_experts": 8, "num_local_experts": 8, "n_routed_experts": 8, "num_experts_per_tok": 2}
EXPERTS |= {"moe_intermediate_size": 64}
SHARED = EXPERTS | {"shared_expert_intermediate_size": 48, "n_shared_experts": 2}
GROUPED = SHARED | {"first_k_dense_replace": 1, "n_group": 2, "topk_group": 1}
LATENT_SIZES = {"kv_lora_rank": 512, "qk_rope_head_dim": 64, "qk_nope_head_dim": 128, "v_head_dim": 128}
DEEPSEEK = GROUPED | LATENT | LATENT_SIZES | {"num_key_value_heads": 8}
SIGMOID = {"topk_method": "noaux_tc", "scoring_func": "sigmoid"}
DEEPSEEK_MOE = GROUPED | {"num_attention_heads": 4, "head_dim": None}

CLOSED = ("layers.0.kv_groups", "layers.0.heads", "layers.1.channels")
NO_HEADS = ("channels", "expert_channels", "shared_channels")

DENSE = [
    pytest.param("llama", {}, id="llama"),
    pytest.param("llama", {"attention_bias": True, "mlp_bias": True}, id="llama-biases"),
    pytest.param("llama", {"num_key_value_heads": 8}, id="llama-mha"),
    pytest.param("mistral", {}, id="mistral"),
    pytest.param("qwen2", {}, id="qwen2"),
    pytest.param("qwen3", {}, id="qwen3"),
    pytest.param("gemma", {}, id="gemma"),
    pytest.param("gemma2", {}, id="gemma2"),
    pytest.param("gemma3_text", {}, id="gemma3"),
]
MIXTURES = [
    pytest.param("qwen3_moe", EXPERTS, None, id="qwen3_moe"),
    pytest.param("qwen2_moe", SHARED, None, id="qwen2_moe"),
    pytest.param("mixtral", EXPERTS, None, id="mixtral"),
    pytest.param("deepseek_v2", DEEPSEEK | {"topk_method": "group_limited_greedy"}, NO_HEADS, id="deepseek_v2"),
    pytest.param(
        "deepseek_v3", DEEPSEEK | {"topk_method": "noaux_tc", "scoring_func": "sigmoid"}, NO_HEADS, id="deepseek_v3"
    ),
    pytest.param("deepseek", DEEPSEEK_MOE, None, id="deepseek"),
    pytest.param("glm4_moe", GROUPED, None, id="glm4_moe"),
]
MODEL = Path(__file__).parents[1] / ".cache/smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
PROMPTS = [row.tolist() for row in tokens(batch=8, length=12)]


def exported(folder, model_type, changes, units=None, tokenizer=None, attention_unit=None, **plan):
    """A pruned checkpoint of a tiny random model, and the unpruned one beside it."""
    model = tiny(model_type, **WIDE | changes)
    description = describe(model, attention_unit)
    if units is not None:
        groups = tuple(g for g in description.groups if g.kind in units)
        description = dataclasses.replace(description, groups=groups)
    export(model, tokenizer, description, random_plan(description, **plan), folder / "pruned")
    export(model, tokenizer, description, random_plan(description, share=1.0), folder / "dense")
    return folder / "pruned"


def compared(folder, prompts=PROMPTS, new_tokens=32):
    """How far vLLM writes what transformers writes after each prompt."""
    return compare(hf.greedy(folder, prompts, new_tokens), vllm.greedy(folder, prompts, new_tokens))


def check(folder):
    """Tokens equal, log-probabilities to a few float32 digits; where vLLM itself is further off, as far as it is on the
    unpruned model."""
    found, allowed = compared(folder / "pruned"), 1e-4
    if not all(within(agreement, allowed) for agreement in found):
        allowed = tolerance(compared(folder / "dense"))
        assert allowed <= 8e-2
    assert all(within(agreement, allowed) for agreement in found), found


@pytest.mark.parametrize(("model_type", "changes"), DENSE)
def test_dense_models_with_widths_by_layer(tmp_path, model_type, changes):
    assert config(exported(tmp_path, model_type, changes))["architectures"][0].startswith("Pruned")
    check(tmp_path)


@pytest.mark.parametrize(("model_type", "changes"), DENSE[1:2] + DENSE[4:6])
def test_sublayers_that_are_gone(tmp_path, model_type, changes):
    exported(tmp_path, model_type, changes, close=CLOSED)
    check(tmp_path)


@pytest.mark.parametrize("unit", ["heads", "nested"])
@pytest.mark.parametrize(("model_type", "changes"), [DENSE[1], DENSE[5], DENSE[8]])
def test_query_heads_within_groups(tmp_path, model_type, changes, unit):
    more = {"num_attention_heads": 16, "num_key_value_heads": 4}
    written = config(exported(tmp_path, model_type, changes | more, attention_unit=unit, close=("layers.0.channels",)))
    said = [
        set(layer) & {"num_attention_heads", "num_key_value_heads"} for layer in written["per_layer_config"].values()
    ]
    assert all(keys == {"num_attention_heads"} for keys in said) is (unit == "heads")
    check(tmp_path)


@pytest.mark.parametrize(("model_type", "changes", "units"), MIXTURES)
def test_mixtures_with_widths_by_layer_and_experts_that_are_gone(tmp_path, monkeypatch, model_type, changes, units):
    if "kv_lora_rank" in changes:
        from vllm.model_executor.layers.rotary_embedding.base import RotaryEmbedding

        # Of unpruned models of this kind, too, vLLM 0.32's kernel for CPUs rotates the heads wrongly.
        monkeypatch.setattr(RotaryEmbedding, "forward_cpu", RotaryEmbedding.forward_native)
    written = config(exported(tmp_path, model_type, changes, units, close_experts=(1, 3)))
    assert written["secateur"]["experts"]
    check(tmp_path)


@pytest.mark.parametrize(("model_type", "changes"), [("llama", {}), ("mixtral", EXPERTS), ("qwen3_moe", EXPERTS)])
def test_uniform_exports_are_stock_models(tmp_path, model_type, changes):
    written = config(exported(tmp_path, model_type, changes, shape="uniform"))
    assert not written["architectures"][0].startswith("Pruned") and "auto_map" not in written
    check(tmp_path)


def test_latent_attention_in_float32_leaves_kernels_alone_that_know_bfloat16_only(monkeypatch):
    from vllm.platforms import current_platform

    from secateur.workers.vllm import attention

    assert attention("float32") == {"attention_backend": "CPU_MLA"} and attention("bfloat16") == {}
    monkeypatch.setattr(type(current_platform), "is_cpu", lambda _self: False)
    assert attention("float32") == {}


def config(folder):
    return json.loads((folder / "config.json").read_text())


def test_what_vllm_reads_is_what_is_there(tmp_path):
    """A model whose weights are not those of the export is told apart."""
    exported(tmp_path, "llama", {})
    one = hf.greedy(tmp_path / "dense", PROMPTS, 32)
    assert not all(within(a, 8e-2) for a in compare(one, vllm.greedy(tmp_path / "pruned", PROMPTS, 32)))


# --- without the plugin, with two ranks, behind the server -----------------------------------------------------------


GREEDY = """
import sys
from pathlib import Path
import vllm

def main():
    folder, ranks, trust = sys.argv[1], int(sys.argv[2]), sys.argv[3] == "trust"
    llm = vllm.LLM(folder, dtype="float32", skip_tokenizer_init=True, enforce_eager=True, max_model_len=48, seed=0,
                   kv_cache_memory_bytes=2**28, tensor_parallel_size=ranks, trust_remote_code=trust,
                   model_impl=sys.argv[5])
    params = vllm.SamplingParams(temperature=0.0, max_tokens=32, ignore_eos=True, detokenize=False)
    prompts = [{"prompt_token_ids": ids} for ids in eval(sys.argv[4])]
    print("ARCHITECTURE", llm.llm_engine.vllm_config.model_config.architecture)
    print("WRITTEN", [list(o.outputs[0].token_ids) for o in llm.generate(prompts, params, use_tqdm=False)])

if __name__ == "__main__":
    main()
"""


def written_by_a_process(folder, ranks=1, trust=False, implementation="auto", **environment):
    """What vLLM says and writes in a process of its own, where it finds the plugin by its entry point."""
    script = folder.parent / "greedy.py"  # no other code lies in an export
    script.write_text(GREEDY)
    arguments = [sys.executable, str(script), str(folder), str(ranks), "trust" if trust else "", repr(PROMPTS)]
    arguments.append(implementation)
    settings = {"VLLM_CPU_OMP_THREADS_BIND": "nobind", "OMP_NUM_THREADS": "1", "VLLM_LOGGING_LEVEL": "ERROR"}
    done = subprocess.run(arguments, env={**os.environ, **settings, **environment}, capture_output=True, text=True)
    said = dict(line.split(" ", 1) for line in done.stdout.splitlines() if line.startswith(("ARCH", "WRITTEN")))
    assert done.returncode == 0, done.stderr[-2000:]
    return said["ARCHITECTURE"], json.loads(said["WRITTEN"])


def expected(folder):
    return [continuation.tokens for continuation in hf.greedy(folder, PROMPTS, 32)]


def test_without_the_plugin_dense_models_run_in_the_transformers_backend(tmp_path):
    folder = exported(tmp_path, "qwen3", {})
    architecture, written = written_by_a_process(folder, trust=True, VLLM_PLUGINS="none")
    assert architecture.startswith("Transformers") and written == expected(folder)


def test_uniform_qwen2_with_fewer_heads_runs_in_the_transformers_backend(tmp_path):
    folder = exported(tmp_path, "qwen2", {}, shape="uniform")
    assert config(folder)["num_attention_heads"] * config(folder)["head_dim"] != WIDE["num_attention_heads"] * 32
    _, written = written_by_a_process(folder, implementation="transformers")
    assert written == expected(folder)


def test_two_ranks_share_widths_that_they_divide(tmp_path):
    model = tiny("qwen3_moe", **WIDE, **EXPERTS)
    description = describe(model)
    plan = random_plan(description)
    for group in description.groups:  # widths of two ranks, different from layer to layer
        if group.kind == "kv_groups":
            plan.kept[group.name] = plan.kept[group.name].new_tensor([[0, 1], [0, 1, 2, 3], [2, 3]][group.layer])
            plan.scales[group.name] = plan.scales[group.name].new_ones(len(plan.kept[group.name])) * 0.5
    export(model, None, description, plan, tmp_path / "model")
    _, written = written_by_a_process(tmp_path / "model", ranks=2)
    assert written == expected(tmp_path / "model")


@contextmanager
def server(folder):
    """What `vllm serve` runs (the command itself fails in the build for CPUs), till it answers."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    settings = {"VLLM_CPU_OMP_THREADS_BIND": "nobind", "OMP_NUM_THREADS": "1", "VLLM_NO_USAGE_STATS": "1"}
    options = ["--port", str(port), "--dtype", "float32", "--max-model-len", "64", "--enforce-eager"]
    options += ["--kv-cache-memory-bytes", str(2**28)]
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(folder), *options]
    log = (folder / "server.log").open("w")
    process = subprocess.Popen(command, stdout=log, stderr=log, env={**os.environ, **settings})
    try:
        url = f"http://127.0.0.1:{port}"
        end = time.time() + 300
        while process.poll() is None and time.time() < end:
            try:
                with urllib.request.urlopen(f"{url}/health", timeout=5):
                    break
            except OSError:
                time.sleep(0.5)
        assert process.poll() is None and time.time() < end, (folder / "server.log").read_text()[-2000:]
        yield url
    finally:
        process.terminate()
        process.wait(30)


def asked(url, path, body):
    request = urllib.request.Request(url + path, json.dumps(body).encode(), {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=120) as response:
        return json.loads(response.read())


def test_the_server_answers_clients_at_once_as_transformers_would(tmp_path):
    folder = exported(tmp_path, "qwen3_moe", EXPERTS, close_experts=(1, 3), tokenizer=small_tokenizer())
    with server(folder) as url:
        body = {"model": str(folder), "max_tokens": 32, "ignore_eos": True, "temperature": 0, "return_token_ids": True}
        with ThreadPoolExecutor(len(PROMPTS)) as clients:
            answers = list(clients.map(lambda ids: asked(url, "/v1/completions", body | {"prompt": ids}), PROMPTS))
        text = asked(url, "/v1/completions", body | {"prompt": "w1 w2", "max_tokens": 4})
    assert [a["choices"][0]["token_ids"] for a in answers] == expected(folder)
    assert text["usage"] == text["usage"] | {"prompt_tokens": 2, "completion_tokens": 4}


# --- a real model ----------------------------------------------------------------------------------------------------


@pytest.mark.real
@pytest.mark.slow
@pytest.mark.parametrize("sparsity", [0.2, 0.5])
def test_a_real_model_is_continued_as_in_transformers(tmp_path, sparsity):
    assert MODEL.is_file(), f"{MODEL} is missing; `make model` fetches it"
    data, run = tmp_path / "text.txt", tmp_path / "run"
    data.write_text("\n".join(topics.values()))
    options = {"sparsity": sparsity, "steps": 6, "seq_len": 128, "batch_size": 1, "held_out_tokens": 1024}
    assert secateur(*prune_arguments(MODEL, data, run, **options)) == 0
    assert secateur("verify", run, "--runtime", "vllm", "--prompts", "8", "--new-tokens", "32") == 0
    report = json.loads((run / "verify-vllm.json").read_text())
    for agreement in report["pruned"] + report["dense"]:
        assert agreement["equal"] or agreement["margin"] < 1e-3
        assert agreement["difference"] < 1e-3


# --- bad input -------------------------------------------------------------------------------------------------------


def refused(folder, **options):
    with pytest.raises(Exception) as caught:  # vLLM wraps what its plugins raise
        vllm.vllm.LLM(str(folder), skip_tokenizer_init=True, enforce_eager=True, **options)
    return " ".join(str(caught.value).split())


def test_a_newer_format_is_refused(tmp_path):
    folder = exported(tmp_path, "llama", {})
    values = config(folder)
    values["secateur"]["format"] = 9
    (folder / "config.json").write_text(json.dumps(values))
    assert "has export format 9, and this secateur reads up to 1: update secateur" in refused(folder)


def test_a_number_of_ranks_that_does_not_divide_a_width_is_refused(tmp_path):
    folder = exported(tmp_path, "llama", {})
    said = refused(folder, tensor_parallel_size=2, distributed_executor_backend="mp")
    assert "tensor parallel size 2 does not divide num_" in said and "export with `--shape tp:2`" in said


def test_another_vllm_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr("secateur.vllm_plugin.TESTED", ("0.7", "0.8"))
    said = refused(exported(tmp_path, "llama", {}))
    assert "serves pruned models in vLLM 0.7 up to, not including, 0.8; this is" in said


def test_latent_attention_whose_heads_differ_is_refused(tmp_path):
    said = refused(exported(tmp_path, "deepseek_v3", DEEPSEEK))
    assert "latent attention whose head count varies by layer" in said and "--shape uniform" in said


# --- the command -----------------------------------------------------------------------------------------------------


def test_verify_compares_with_vllm_and_sees_other_weights(text, tmp_path, capsys):
    dense, run = write_checkpoint(tmp_path / "dense", hidden_size=64, head_dim=32), tmp_path / "run"
    assert secateur(*prune_arguments(dense, text, run)) == 0
    options = ("--runtime", "vllm", "--prompts", "3", "--new-tokens", "6")
    assert secateur("verify", run, *options) == 0, capsys.readouterr().err
    report = json.loads((run / "verify-vllm.json").read_text())
    assert report["passed"] and len(report["pruned"]) == len(report["dense"]) == 3
    assert "vLLM" in capsys.readouterr().out

    def other(model, prompts, new_tokens):
        written = stock(model, prompts, new_tokens)
        return [dataclasses.replace(c, logprobs=[x - 0.2 for x in c.logprobs]) for c in written]

    stock, vllm.greedy = vllm.greedy, other
    try:
        said = complaint(capsys, "verify", run, *options, code=1)
    finally:
        vllm.greedy = stock
    assert "does not compute what transformers" in said


def test_verify_says_why_vllm_does_not_load_a_model(run, capsys, monkeypatch):
    monkeypatch.setattr("secateur.vllm_plugin.TESTED", ("0.7", "0.8"))
    said = complaint(capsys, "verify", run, "--runtime", "vllm")
    assert "does not load" in said and "this is" in said
