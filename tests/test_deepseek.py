"""DeepSeekMoE, the family that transformers lacks: what it computes, what its checkpoints are called, the whole way."""

import json

import torch
import torch.nn.functional as F
from safetensors import safe_open
from transformers import AutoModelForCausalLM

from runs import SIZES, complaint, prune_arguments, random_tokens, secateur, small_tokenizer, write_texts
from secateur.families.modeling_deepseek import DeepseekConfig, DeepseekForCausalLM

OWN = {
    "n_routed_experts": 4, "num_experts_per_tok": 2, "n_shared_experts": 2, "moe_intermediate_size": 24,
    "first_k_dense_replace": 1, "num_hidden_layers": 2,
}  # fmt: skip


def small_deepseek(**changes):
    torch.manual_seed(0)
    model = DeepseekForCausalLM(DeepseekConfig(**SIZES | OWN | changes))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.normal_(std=parameter.shape[-1] ** -0.5)
    return model.eval()


def mlp(gate, up, down, x_TH):
    return F.linear(F.silu(F.linear(x_TH, gate)) * F.linear(x_TH, up), down)


def test_a_layer_computes_shared_and_routed_experts_with_softmax_weights_as_they_are():
    block = small_deepseek().model.layers[1].mlp
    x_TH = torch.randn(7, SIZES["hidden_size"])
    shared = block.shared_experts
    expected_TH = mlp(shared.gate_proj.weight, shared.up_proj.weight, shared.down_proj.weight, x_TH)
    weight_TE = F.linear(x_TH, block.gate.weight).softmax(-1)
    for t in range(len(x_TH)):
        for e in weight_TE[t].topk(2).indices.tolist():
            gate, up = block.experts.gate_up_proj[e].chunk(2)
            expected_TH[t] += weight_TE[t, e] * mlp(gate, up, block.experts.down_proj[e], x_TH[t])
    torch.testing.assert_close(block(x_TH[None])[0], expected_TH)


def test_the_first_layers_are_dense():
    layers = small_deepseek().model.layers
    assert not hasattr(layers[0].mlp, "experts") and hasattr(layers[1].mlp, "experts")


def test_experts_are_saved_and_read_one_by_one(tmp_path):
    model = small_deepseek()
    model.save_pretrained(tmp_path)
    with safe_open(tmp_path / "model.safetensors", framework="pt") as file:
        names = set(file.keys())
    assert {f"model.layers.1.mlp.experts.3.{n}_proj.weight" for n in ("gate", "up", "down")} < names
    assert "model.layers.1.mlp.shared_experts.down_proj.weight" in names
    ids = random_tokens(2, 9)
    torch.testing.assert_close(DeepseekForCausalLM.from_pretrained(tmp_path)(ids).logits, model(ids).logits)


def test_it_is_pruned_and_loads_with_the_files_that_travel(tmp_path):
    small_deepseek().save_pretrained(tmp_path / "dense")
    small_tokenizer().save_pretrained(tmp_path / "dense")
    text = write_texts(tmp_path / "text.jsonl")
    for shape in ("ragged", "uniform"):
        run = tmp_path / shape
        arguments = prune_arguments(tmp_path / "dense", text, run, shape=shape)
        assert secateur(*arguments, "--units", "expert_channels", "shared_channels") == 0
        assert json.loads((run / "verify.json").read_text())["passed"]
        files = {path.name for path in (run / "model").glob("*.py")}
        assert files == {"modeling_deepseek.py"} | ({"modeling_pruned.py"} if shape == "ragged" else set())
        assert all("secateur" not in line for name in files for line in imports(run / "model" / name))
        model = AutoModelForCausalLM.from_pretrained(run / "model", trust_remote_code=True)
        assert not type(model).__module__.startswith("secateur")
        assert model.generate(torch.tensor([[3, 4]]), max_new_tokens=3, do_sample=False).shape[1] > 2


def imports(path):
    return [line for line in path.read_text().splitlines() if line.startswith(("import ", "from "))]


def test_a_router_that_the_file_does_not_compute_is_refused(tmp_path, capsys):
    small_deepseek().save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"norm_topk_prob": True}))
    assert "not normalised again" in complaint(capsys, "inspect", tmp_path)
