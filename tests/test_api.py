"""Pruning from Python: a model in memory goes the way of any other, stays as it is; what comes back can be shown."""

import json
import shutil
import subprocess
import sys
import warnings

import datasets
import pytest
import torch
import yaml
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

import secateur as library
from runs import complaint, described, gates_of, random_tokens, same_gates, secateur, small_llama, small_tokenizer
from secateur import api
from secateur.data import POOL_CHARACTERS
from secateur.evaluate import perplexity
from secateur.files import InputError
from secateur.learn import StopLearning, learn
from secateur.listeners import Progress
from secateur.optimise import Step
from secateur.recipes import auto_recipe
from tiny import LATENT, MIXTURE, tiny

FEW = {"sparsity": 0.3, "steps": 8, "batch_size": 2, "seq_len": 16, "held_out_tokens": 64, "checkpoint_every": 3}


@pytest.fixture
def model(dense):
    return AutoModelForCausalLM.from_pretrained(dense, dtype=torch.float32)


@pytest.fixture
def tokenizer(dense):
    return AutoTokenizer.from_pretrained(dense)


@pytest.fixture
def documents(text):
    return [json.loads(line)["text"] for line in text.read_text().splitlines()]


@pytest.fixture(scope="module")
def result(base):
    own = AutoModelForCausalLM.from_pretrained(base / "dense", dtype=torch.float32)
    tokens = AutoTokenizer.from_pretrained(base / "dense")
    return library.prune(own, tokens, data=base / "text.jsonl", out=base / "from-python", **FEW)


def refusal(call, *arguments, **settings):
    with pytest.raises(InputError) as error:
        call(*arguments, **settings)
    assert "\n" not in str(error.value) and isinstance(error.value, ValueError)
    return str(error.value)


# --- the same stages -------------------------------------------------------------------------------------------------


def test_a_model_in_memory_comes_to_what_its_checkpoint_comes_to_on_the_command_line(result, finished):
    assert same_gates(result.folder, finished)
    for name in ("metrics.jsonl", "model/model.safetensors", "model/config.json", "verify.json"):
        first, second = ((folder / name).read_text("latin1") for folder in (result.folder, finished))
        if name == "model/config.json":
            first, second = ({**json.loads(said), "secateur": 0} for said in (first, second))
        assert first == second, name
    assert json.loads((result.folder / "verify.json").read_text())["passed"]


def test_a_named_model_and_a_config_do_too(dense, text, tmp_path, finished):
    assert same_gates(library.prune(str(dense), data=text, out=tmp_path / "a", **FEW).folder, finished)
    config = library.Config(str(dense), data=str(text), out=tmp_path / "b", **FEW)
    assert same_gates(library.prune(config).folder, finished)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_model_that_was_given_is_left_as_it_is(dense, text, tokenizer, tmp_path, dtype):
    model = AutoModelForCausalLM.from_pretrained(dense, dtype=dtype, attn_implementation="eager").train()
    model.model.layers[1].eval()
    model.get_input_embeddings().weight.requires_grad_(False)
    heard = []
    model.model.layers[0].register_forward_hook(lambda *_: heard.append(1))

    def state():
        weights = {n: (p.data_ptr(), p.dtype, p.requires_grad, p.detach().clone()) for n, p in model.named_parameters()}
        kept = [(m.training, len(m._forward_hooks), set(vars(m))) for m in model.modules()]
        return weights, kept, model.config.to_dict(), model.config._attn_implementation

    before = state()
    result = library.prune(model, tokenizer, data=text, out=tmp_path / "run", refit=True, **FEW)
    after = state()
    assert before[1:] == after[1:] and not heard and after[3] == "eager"
    for name, (*kept, values) in before[0].items():
        assert kept == list(after[0][name][:3]) and torch.equal(values, after[0][name][3]), name
    assert result.model.dtype == dtype


def test_the_weights_are_shared_and_not_copied(model, tokenizer, dense, text, tmp_path):
    session = library.new_session(model, tokenizer, data=text, out=tmp_path / "run", **FEW)
    own = dict(model.named_parameters())
    for name, parameter in session.loaded.model.named_parameters():
        assert parameter.data_ptr() == own[name].data_ptr() and parameter is not own[name]


def test_rotary_frequencies_that_were_cast_with_the_model_do_not_spoil_the_export(dense, tokenizer, text, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(dense, dtype=torch.float32).to(torch.bfloat16)
    assert model.model.rotary_emb.inv_freq.dtype == torch.bfloat16
    result = library.prune(model, tokenizer, data=text, out=tmp_path / "run", **FEW)
    assert json.loads((result.folder / "verify.json").read_text())["passed"]
    assert model.model.rotary_emb.inv_freq.dtype == torch.bfloat16


def test_tied_embeddings_stay_tied(tokenizer, text, tmp_path):
    model = small_llama(tie_word_embeddings=True)
    result = library.prune(model, tokenizer, data=text, out=tmp_path / "run", **FEW)
    assert result.model.lm_head.weight is result.model.model.embed_tokens.weight
    assert result.dense.parameters == sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize("kind", ["gemma2", "mixtral", "deepseek_v3", "gpt_oss"])
def test_other_architectures_are_pruned_in_memory(tmp_path, kind):
    model = tiny(kind, **(MIXTURE if kind != "gemma2" else {}) | (LATENT if kind == "deepseek_v3" else {}))
    data = [" ".join(f"w{int(i)}" for i in row) for row in random_tokens(40, 40)]
    result = library.prune(model, small_tokenizer(), data=data, out=tmp_path / "run", **FEW)
    assert result.pruned.parameters < result.dense.parameters == sum(p.numel() for p in model.parameters())


# --- text ------------------------------------------------------------------------------------------------------------


def test_texts_may_be_given_in_memory_in_any_form(model, tokenizer, documents, tmp_path, finished):
    dataset = datasets.Dataset.from_dict({"said": documents})
    forms = {"list": documents, "dataset": dataset, "stream": dataset.to_iterable_dataset(), "once": iter(documents)}
    for name, data in forms.items():
        column = {"text_column": "said"} if name in ("dataset", "stream") else {}
        run = library.prune(model, tokenizer, data=data, out=tmp_path / name, **FEW, **column).folder
        assert same_gates(run, finished), name
        assert yaml.safe_load((run / "config.yaml").read_text())["data"] == str(run / "texts-given-in-python.jsonl")
        assert "calibration data: texts-given-in-python.jsonl" in (run / "model/README.md").read_text()


def test_a_text_is_cut_as_a_text_file_is(model, tokenizer, documents, tmp_path):
    whole = "\n\n".join(documents * 12)
    (tmp_path / "text.txt").write_text(whole)
    runs = [
        library.prune(model, tokenizer, data=data, out=tmp_path / name, eval_data=whole, **FEW)
        for name, data in (("file", tmp_path / "text.txt"), ("text", whole))
    ]
    assert same_gates(runs[0].folder, runs[1].folder)
    assert runs[0].dense == runs[1].dense and "evaluation-texts-given-in-python.txt" in runs[0].results["text"]


def test_of_an_endless_stream_no_more_is_written_than_can_be_used(model, tokenizer, documents, tmp_path, monkeypatch):
    monkeypatch.setattr("secateur.in_memory.POOL_CHARACTERS", 10_000)
    assert POOL_CHARACTERS > 10_000

    def endless():
        while True:
            yield from documents

    session = library.new_session(model, tokenizer, data=endless(), out=tmp_path / "run", **FEW)
    assert 10_000 < (tmp_path / "run" / "texts-given-in-python.jsonl").stat().st_size < 40_000
    assert len(session.blocks.calibration_NT) == 16


@pytest.mark.parametrize(("data", "said"), [
    (5, "data is a int"),
    ([1, 2], "data[0] is a int, not text"),
    ({"train": ["a"]}, "(it has 'train': give one of them)"),
    ([{"body": "a"}], "no column 'text' (columns: body)"),
    (["w1 w2"], "is too short"),
    ("nowhere.txt", "no such file"),
])  # fmt: skip
def test_what_is_no_text_is_said_in_a_line(model, tokenizer, documents, tmp_path, data, said):
    assert said in refusal(library.prune, model, tokenizer, data=data, out=tmp_path / "run", **FEW)
    library.new_session(model, tokenizer, data=documents, out=tmp_path / "run", **FEW)  # the folder is free again


# --- what comes back -------------------------------------------------------------------------------------------------


def test_the_pruned_model_and_its_figures_come_back(result):
    assert result.model.num_parameters() == result.pruned.parameters < result.dense.parameters
    assert not result.model.training and result.model is result.model
    ids_NT = library.open_session(result.folder, *again(result)).evaluation_windows[0]
    assert perplexity(result.model, ids_NT).perplexity == pytest.approx(result.pruned.perplexity)
    assert result.pruned.block_parameters <= 0.7 * result.dense.block_parameters
    assert sum(len(kept) for kept in result.plan.kept.values()) < result.gates.z_N.numel()
    assert [row["step"] for row in result.metrics] == list(range(1, 9))
    assert result.report.is_file() and result.results["samples"] and result.tokenizer("w1").input_ids


def again(result):
    folder = result.folder.parent / "dense"
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32), AutoTokenizer.from_pretrained(folder)


def test_a_notebook_shows_a_table_and_a_terminal_one_line(result):
    html, said = result._repr_html_(), repr(result)
    assert "\n" not in said and said.startswith(f"Pruned({result.folder}: parameters ") and len(said) < 300
    for text in ("perplexity", "FLOPs a token", f"{result.pruned.perplexity:.2f}", "texts", str(result.report)):
        assert text in html or text == "texts"
    assert html.count("<tr>") == html.count("</tr>") > 6 and "<table>" in html


def test_what_is_shown_is_escaped(result):
    import dataclasses

    settings = dataclasses.replace(result.run.config, model="<script>alert(1)</script>")
    shown = dataclasses.replace(
        result, run=dataclasses.replace(result.run, config=settings), results=result.results | {"text": "<b>a & b</b>"}
    )
    assert "<script>" not in shown._repr_html_() and "&lt;script&gt;" in shown._repr_html_()
    assert "&lt;b&gt;a &amp; b&lt;/b&gt;" in shown._repr_html_()


def test_inspect_says_of_a_model_in_memory_what_it_says_of_its_name(model, dense):
    first, second = library.inspect(model), library.inspect(dense)
    assert first.description == second.description and first.unit_parameters == 30_720
    assert "35.1%" in first._repr_html_() and "30,720 parameters" in first._repr_html_()
    assert "\n" not in repr(first) and "channels" in repr(first)


# --- callbacks -------------------------------------------------------------------------------------------------------


class Notes(Progress):
    def __init__(self):
        self.stages, self.steps = [], []

    def stage(self, name):
        self.stages.append(name)

    def step(self, step):
        self.steps.append(step.step)


def test_callbacks_hear_of_steps_and_stages(model, tokenizer, text, tmp_path):
    losses, notes = [], Notes()
    library.prune(model, tokenizer, data=text, out=tmp_path / "run", callbacks=[losses.append, notes], **FEW)
    assert all(isinstance(step, Step) and step.loss > 0 for step in losses)
    assert [step.step for step in losses] == notes.steps == list(range(1, 9))
    assert [s for s in notes.stages if s not in ("data", "report")] == ["learn", "plan", "export", "verify", "eval"]


def stop_at(number):
    def hear(step):
        if step.step == number:
            raise StopLearning

    return hear


def test_a_callback_ends_learning_and_the_run_is_finished_with_the_gates_of_then(model, tokenizer, text, tmp_path):
    result = library.prune(model, tokenizer, data=text, out=tmp_path / "run", callbacks=stop_at(3), **FEW)
    assert [row["step"] for row in result.metrics] == [1, 2, 3]
    assert result.gates.about["steps"] == result.gates.about["stopped"] == 3
    assert result.gates.about["tokens"] == 3 * 2 * 16
    assert 0.3 <= 1 - result.pruned.block_parameters / result.dense.block_parameters < 0.32
    assert "- tokens: 3 steps × 2 × 16 = 96" in (result.folder / "model/README.md").read_text()
    assert json.loads((result.folder / "verify.json").read_text())["passed"]
    assert not (result.folder / "checkpoints").exists()


def test_the_gates_after_stopping_are_those_of_that_step():
    model = small_llama()
    description, limits = described(model, 0.3)
    rows, held_out, seen = random_tokens(16, 16), random_tokens(4, 16, seed=2), []

    def hear(step):
        seen.append(step)
        if step.step == 3:
            raise StopLearning

    def learned(on_step):
        return learn(model, description.groups, rows, held_out, limits, auto_recipe(8), steps=8, batch_size=2,
                     on_step=on_step)  # fmt: skip

    stopped = learned(hear)
    assert stopped.stopped == 3 == len(seen) and learned(lambda _: None).stopped is None
    assert limits.share_of(stopped.z_N > 0) == pytest.approx(seen[-1].kept, abs=0.01)  # which is before the step
    assert stopped.fixing is None and not torch.equal(stopped.z_N, learned(lambda _: None).z_N)


def test_an_error_in_a_callback_comes_out_and_the_run_goes_on_from_where_it_was(
    model, tokenizer, text, tmp_path, finished
):
    def fail(step):
        if step.step == 5:
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        library.prune(model, tokenizer, data=text, out=tmp_path / "run", callbacks=[fail], **FEW)
    result = library.resume(tmp_path / "run", model, tokenizer)
    assert same_gates(result.folder, finished)


def test_what_is_no_callback_is_refused(model, tokenizer, text, tmp_path):
    said = refusal(library.prune, model, tokenizer, data=text, out=tmp_path / "run", callbacks=[3], **FEW)
    assert "a callback is a function of a Step" in said and not (tmp_path / "run").exists()


def test_warnings_are_those_of_python(model, tokenizer, text, tmp_path):
    session = library.new_session(model, tokenizer, data=text, out=tmp_path / "run", **FEW)
    with pytest.warns(UserWarning, match="mind this"):
        session.progress.warned("mind this")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        api._listeners([Notes()]).warned("heard")


def test_show_prints_what_the_command_line_prints(capsys, model, tokenizer, text, tmp_path):
    library.prune(model, tokenizer, data=text, out=tmp_path / "run", show=True, **FEW)
    said = capsys.readouterr().out
    assert "learning gates" in said and "step 8/8" in said and "drawing the report" in said


# --- runs on a model in memory, later --------------------------------------------------------------------------------


def test_the_settings_say_that_the_model_was_in_memory(result, base):
    settings = yaml.safe_load((result.folder / "config.yaml").read_text())
    assert settings["model"].startswith("in memory: dense, weights ")
    card = (result.folder / "model/README.md").read_text()
    assert "# dense (a model in memory), pruned by 30%" in card and "base_model" not in card
    assert str(base) not in card + (result.folder / "model/config.json").read_text()


@pytest.mark.parametrize("command", [("verify",), ("eval",), ("prune", "--resume")])
def test_the_command_line_asks_for_the_model_in_a_line_and_takes_it(capsys, result, base, tmp_path, command):
    run = shutil.copytree(result.folder, tmp_path / "run")
    (run / "eval.json").unlink()
    said = complaint(capsys, *command, run)
    assert "a model in memory: dense, weights" in said and "save_pretrained" in said and "`model:`" in said
    file = run / "config.yaml"
    named = file.read_text().replace(yaml.safe_load(file.read_text())["model"], str(base / "dense"))
    file.write_text(named)
    assert secateur(*command, run) == 0


def test_a_run_goes_on_in_python_with_the_same_model_only(result, tmp_path, text):
    run = shutil.copytree(result.folder, tmp_path / "run")
    for name in ("plan.json", "verify.json", "eval.json"):
        (run / name).unlink()
    shutil.rmtree(run / "model")
    model, tokenizer = again(result)
    resumed = library.resume(run, model, tokenizer)
    assert resumed.pruned == result.pruned
    assert (
        load_file(run / "model/model.safetensors").keys() == load_file(result.folder / "model/model.safetensors").keys()
    )
    with torch.no_grad():
        model.lm_head.weight += 1.0
    assert "has other weights" in refusal(library.resume, run, model, tokenizer)
    assert "a model in memory: dense" in refusal(library.prune, str(run), data=text, out=tmp_path / "x") or True


def test_stages_are_verbs_of_their_own(model, tokenizer, text, tmp_path, finished):
    session = library.new_session(model, tokenizer, data=text, out=tmp_path / "run", **FEW)
    gates = library.learn_stage(session)
    plan, rounding = library.plan_stage(session)
    library.export_stage(session)
    assert all(c.passed for c in library.verify_stage(session))
    assert library.eval_stage(session)["pruned"]["parameters"] > 0
    assert gates.z_N.numel() > sum(map(len, plan.kept.values())) and 0 < rounding.kept <= 0.7 + 1e-6
    assert gates_of(tmp_path / "run").keys() == gates_of(finished).keys()


# --- mistakes --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("settings", "said"), [
    ({"spasity": 0.3}, "there is no setting spasity; did you mean sparsity?"),
    ({"sparsity": 1.5}, "1.5"),
    ({"steps": "many"}, "steps: "),
    ({"shape": "round"}, "round"),
    ({"dtype": "int8"}, "dtype: "),
    ({"sweep": "0.1:0.3", "sparsity": None}, "a sweep ends in one model here"),
    ({"budget": "weights=0.5", "sparsity": None}, "weights=0.5"),
    ({"keep": "layers.9"}, "--keep layers.9: the model has 3 layers"),
])  # fmt: skip
def test_wrong_settings_are_one_line_and_nothing_is_made(model, tokenizer, text, tmp_path, settings, said):
    found = refusal(library.prune, model, tokenizer, data=text, out=tmp_path / "run", **FEW | settings)
    assert said in found and not (tmp_path / "run").exists()


def test_models_that_cannot_be_pruned_in_memory_are_refused(dense, model, tokenizer, text, tmp_path):
    def said(*given):
        return refusal(library.prune, *given, data=text, out=tmp_path / "run", **FEW)

    assert "needs its tokenizer" in said(model)
    assert "brings its own tokenizer" in said(str(dense), tokenizer)
    assert "not a Linear" in said(torch.nn.Linear(2, 2), tokenizer)
    with torch.device("meta"):
        assert "not in memory" in said(AutoModelForCausalLM.from_config(model.config), tokenizer)
    from peft import LoraConfig, get_peft_model

    other = AutoModelForCausalLM.from_pretrained(dense)
    assert "merge_and_unload" in said(get_peft_model(other, LoraConfig(target_modules=["q_proj"])), tokenizer)
    other = AutoModelForCausalLM.from_pretrained(dense)
    other.add_adapter(LoraConfig(target_modules=["q_proj"]))
    assert "has adapters of PEFT" in said(other, tokenizer)
    tied = small_llama(tie_word_embeddings=True)
    tied.lm_head.weight = torch.nn.Parameter(tied.lm_head.weight.clone())
    assert "lm_head.weight is (64, 32) in memory and none by the configuration" in said(tied, tokenizer)
    model.model.layers = model.model.layers[:2]
    assert "is not what its configuration says" in said(model, tokenizer)
    assert not (tmp_path / "run").exists()


def test_runs_go_to_runs_by_default(model, tokenizer, text, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    session = library.new_session(model, tokenizer, data=text, **FEW)
    assert str(session.run.folder) == "runs/dense-s0.3" and (tmp_path / "runs/dense-s0.3/config.yaml").exists()


# --- import ----------------------------------------------------------------------------------------------------------


def test_importing_the_package_is_quick_and_imports_nothing_heavy():
    code = (
        "import sys, time; start = time.perf_counter(); import secateur; took = time.perf_counter() - start\n"
        "heavy = {'torch', 'transformers', 'numpy', 'datasets', 'matplotlib', 'pydantic', 'tyro'} & set(sys.modules)\n"
        "assert 'prune' in dir(secateur); print(took, sorted(heavy))"
    )
    said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split(" ", 1)
    assert float(said[0]) < 2 and said[1].strip() == "[]"


def test_all_public_names_are_there_whatever_was_imported_before():
    import pkgutil

    modules = {module.name for module in pkgutil.iter_modules(library.__path__)}
    assert not modules & set(library._HOMES), "a module would take the place of what is public"
    assert all(getattr(library, name) is not None for name in library.__all__)
