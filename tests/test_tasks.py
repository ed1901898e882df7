"""Zero-shot tasks: lm-eval's scores are log P(choice | query), differences are paired, and mistakes are one line."""

import gzip
import json
import random
import statistics
import sys
from functools import cache

import pytest
import torch
import zstandard
from lm_eval.tasks import TaskManager
from tokenizers import Tokenizer, models, processors
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

from runs import complaint, prune_arguments, secateur, small_llama, small_tokenizer
from secateur import tasks as module
from secateur.tasks import FileTask, Model, load_tasks, read_items


def words(rng, count):
    return " ".join(f"w{rng.randrange(61)}" for _ in range(count))


def plain_items(count=20, seed=0):
    rng = random.Random(seed)
    return [
        {"task": "plain", "id": f"q{i}", "query": words(rng, rng.randint(1, 8)), "gold": rng.randrange(3),
         "choices": [" " + words(rng, length) for length in rng.sample(range(1, 7), 3)]}
        for i in range(count)
    ]  # fmt: skip


def paired_items(count=20, seed=1):
    rng = random.Random(seed)
    items = []
    for i in range(count):
        ending = " " + words(rng, 3)
        queries = [words(rng, rng.randint(1, 5)) for _ in range(2)]
        items.append({"id": i, "query": None, "queries": queries, "choices": [ending] * 2, "gold": rng.randrange(2)})
    return items


ITEMS = {"plain": plain_items(), "paired": paired_items()}


def write_items(path, items):
    data = "".join(json.dumps(item) + "\n" for item in items).encode()
    packed = {".gz": gzip.compress, ".zst": zstandard.compress}.get(path.suffix, bytes)(data)
    path.write_bytes(packed)
    return path


def log_probability(model, tokenizer, query, choice):
    """log P(choice | query), token by token."""
    given, whole = tokenizer(query)["input_ids"], tokenizer(query + choice)["input_ids"]
    assert whole[: len(given)] == given
    logprobs_TV = model(torch.tensor([whole])).logits[0].log_softmax(-1)
    return sum(logprobs_TV[place - 1, whole[place]].item() for place in range(len(given), len(whole)))


def scores(model, tokenizer, item):
    queries = item.get("queries") or [item["query"]] * len(item["choices"])
    return [log_probability(model, tokenizer, q, c) for q, c in zip(queries, item["choices"], strict=True)]


@cache
def known_answers(form, seed):
    return answers(small_llama(seed), small_tokenizer(), ITEMS[form])


def answers(model, tokenizer, items):
    """Whether each item is answered right, by the best choice and by the best a character."""
    acc, acc_norm = [], []
    for item in items:
        found = scores(model, tokenizer, item)
        lengths = [len(choice) - 1 for choice in item["choices"]]
        best = max(range(len(found)), key=found.__getitem__)
        best_norm = max(range(len(found)), key=lambda i: found[i] / lengths[i])
        acc.append(float(best == item["gold"]))
        acc_norm.append(float(best_norm == item["gold"]))
    return {"acc": acc, "acc_norm": acc_norm}


def loaded(paths, model=None, tokenizer=None, limit=None, seed=0):
    tasks = load_tasks([str(path) for path in paths], limit, seed)
    tasks.check(model or small_llama(), tokenizer or small_tokenizer(), None)
    return tasks


def nothing(*_numbers):
    pass


# --- scores ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", ITEMS)
@pytest.mark.parametrize("rows", [1, 5])
def test_lm_eval_scores_the_log_probability_of_each_choice_given_its_query(tmp_path, form, rows):
    model, tokenizer = small_llama(), small_tokenizer()
    tasks = loaded([write_items(tmp_path / f"{form}.jsonl", ITEMS[form])])
    found = Model(model, tokenizer, None, rows, nothing).loglikelihood(tasks.loaded[form].instances)
    expected = [score for item in ITEMS[form] for score in scores(model, tokenizer, item)]
    assert [score for score, _greedy in found] == pytest.approx(expected, abs=1e-4)


@pytest.mark.parametrize("form", ITEMS)
def test_both_models_figures_and_their_paired_difference_are_those_computed_by_hand(tmp_path, form):
    dense, pruned, tokenizer = small_llama(), small_llama(seed=3), small_tokenizer()
    tasks = loaded([write_items(tmp_path / f"{form}.jsonl", ITEMS[form])])
    found = tasks.compare(dense, pruned, tokenizer, None, nothing)[form]
    first, second = (known_answers(form, seed) for seed in (0, 3))
    for metric in ("acc", "acc_norm"):
        gaps = [b - a for a, b in zip(first[metric], second[metric], strict=True)]
        for name, values in (("dense", first[metric]), ("pruned", second[metric]), ("difference", gaps)):
            error = statistics.stdev(values) / len(values) ** 0.5
            assert found[name][metric] == pytest.approx(statistics.mean(values)), (name, metric)
            assert found[name][f"{metric}_stderr"] == pytest.approx(error), (name, metric)
    assert len(set(gaps)) == 3 and found["items"] == found["of"] == 20 and found["fewshot"] == 0


def test_a_model_does_not_differ_from_itself(tmp_path):
    tasks = loaded([write_items(tmp_path / "plain.jsonl", ITEMS["plain"])])
    found = tasks.compare(small_llama(), small_llama(), small_tokenizer(), None, nothing)["plain"]
    assert found["difference"] == {"acc": 0, "acc_stderr": 0, "acc_norm": 0, "acc_norm_stderr": 0}
    assert 0 < found["dense"]["acc_stderr"] < 1


def test_length_is_counted_in_characters_without_the_first_space(tmp_path):
    item = {"query": "w1", "choices": [" a", " bbb"], "gold": 1}
    task = FileTask("lengths", read_items(write_items(tmp_path / "lengths.jsonl", [item])))
    result = task.process_results(task.eval_docs[0], [(-1.0, False), (-2.4, False)])
    assert result == {"acc": 0, "acc_norm": 1}  # −1/1 < −2.4/3, but −1/2 > −2.4/4


def test_a_model_that_wants_bos_gets_it_before_every_query(tmp_path):
    model, tokenizer = small_llama(), small_tokenizer()
    tasks = load_tasks([str(write_items(tmp_path / "plain.jsonl", ITEMS["plain"][:4]))], None, 0)
    tasks.check(model, tokenizer, 1)
    found = Model(model, tokenizer, 1, 2, nothing).loglikelihood(tasks.loaded["plain"].instances)
    expected = [
        log_probability(model, tokenizer, "<s> " + item["query"], choice)
        for item in ITEMS["plain"][:4] for choice in item["choices"]
    ]  # fmt: skip
    assert [score for score, _greedy in found] == pytest.approx(expected, abs=1e-4)


def test_a_limit_takes_a_sample_by_seed_and_not_the_first_items(tmp_path):
    path = write_items(tmp_path / "plain.jsonl", ITEMS["plain"])
    drawn = [loaded([path], limit=8, seed=seed) for seed in (0, 0, 1)]
    ids = [[r.doc["id"] for r in tasks.loaded["plain"].instances[::3]] for tasks in drawn]
    assert ids[0] == ids[1] != ids[2] and len(set(ids[0])) == 8
    assert ids[0] != [item["id"] for item in ITEMS["plain"][:8]]
    chosen = [item for item in ITEMS["plain"] if item["id"] in ids[0]]
    found = drawn[0].compare(small_llama(), small_llama(3), small_tokenizer(), None, nothing)["plain"]
    assert found["dense"]["acc"] == statistics.mean(answers(small_llama(), small_tokenizer(), chosen)["acc"])
    assert (found["items"], found["of"], found["limit"]) == (8, 20, 8)


@pytest.mark.parametrize("suffix", ["jsonl", "jsonl.gz", "jsonl.zst"])
def test_files_may_be_compressed(tmp_path, suffix):
    tasks = load_tasks([str(write_items(tmp_path / f"plain.{suffix}", ITEMS["plain"]))], None, 0)
    assert list(tasks.loaded) == ["plain"] and len(tasks.loaded["plain"].eval_docs) == 20


def test_items_longer_than_the_context_lose_their_beginning_and_are_counted(tmp_path):
    items = [{"query": words(random.Random(i), 30 * (i + 1)), "choices": [" w1", " w2"], "gold": 0} for i in range(4)]
    tasks = loaded([write_items(tmp_path / "long.jsonl", items)])
    assert tasks.cut == {"long": 2}  # of 90 and 120 tokens; the context is 64
    tasks.compare(small_llama(), small_llama(), small_tokenizer(), None, nothing)


def test_reading_and_scoring_leave_the_random_state_alone(tmp_path):
    random.seed(5)
    before = random.getstate()
    tasks = loaded([write_items(tmp_path / "plain.jsonl", ITEMS["plain"])])
    tasks.compare(small_llama(), small_llama(), small_tokenizer(), None, nothing)
    assert random.getstate() == before


# --- a run -----------------------------------------------------------------------------------------------------------


def test_eval_compares_dense_and_export_on_every_task_and_shows_it(run, tmp_path, capsys):
    paths = [write_items(tmp_path / f"{form}.jsonl", items) for form, items in ITEMS.items()]
    assert secateur("eval", run, "--tasks", *paths) == 0
    said = capsys.readouterr().out
    card = (run / "model" / "README.md").read_text()
    results = json.loads((run / "eval.json").read_text())
    tokenizer = AutoTokenizer.from_pretrained(run / "model", trust_remote_code=True)
    exported = AutoModelForCausalLM.from_pretrained(run / "model", trust_remote_code=True)
    for form, items in ITEMS.items():
        found = results["tasks"][form]
        assert found["dense"]["acc"] == pytest.approx(statistics.mean(known_answers(form, 0)["acc"]))
        assert found["pruned"]["acc"] == pytest.approx(statistics.mean(answers(exported, tokenizer, items)["acc"]))
        shown = f"{found['pruned']['acc']:.3f} ± {found['pruned']['acc_stderr']:.3f}"
        assert shown in said and shown in card and f"{form}, acc" in said
    assert "mean of 2 tasks, acc" in said and "plain 20 of 20, paired 20 of 20 items" in " ".join(said.split())
    assert str(tmp_path) not in card
    assert results["overlap"]["tasks"] == {"plain": {"items": 20, "hit": 0}, "paired": {"items": 20, "hit": 0}}


def test_prune_evaluates_tasks_at_its_end_and_exports_the_tokenizer_as_it_was(dense, text, tmp_path):
    path = write_items(tmp_path / "plain.jsonl", ITEMS["plain"])
    assert secateur(*prune_arguments(dense, text, tmp_path / "run", tasks=path, task_limit=9)) == 0
    assert json.loads((tmp_path / "run" / "eval.json").read_text())["tasks"]["plain"]["items"] == 9
    exported = AutoTokenizer.from_pretrained(tmp_path / "run" / "model", trust_remote_code=True)
    assert exported.pad_token is None and len(exported) == len(small_tokenizer())


def test_text_and_items_that_calibration_has_seen_are_warned_of(run, text, tmp_path, capsys):
    documents = [json.loads(line)["text"].split() for line in text.read_text().splitlines()]
    items = [{"query": " ".join(d[:20]), "choices": [" " + " ".join(d[20:25]), " w1"], "gold": 0} for d in documents]
    path = write_items(tmp_path / "seen.jsonl", items)
    options = ("--tasks", path, "--eval-data", text, "--eval-length", "16", "--eval-windows", "0")
    assert secateur("eval", run, *options) == 0
    overlap = json.loads((run / "eval.json").read_text())["overlap"]
    hit, shared = overlap["tasks"]["seen"]["hit"], overlap["text"]
    assert 2 <= hit < len(documents) and 0.1 < shared["covered"] / shared["words"] < 1
    said = " ".join(capsys.readouterr().out.split())
    for place in (said, (run / "model" / "README.md").read_text()):
        assert f"{hit} of {len(documents)} items of seen share a run of 13 words" in place
        assert f"share {shared['runs']} runs of 13 words" in place


# --- lm-eval's own tasks ---------------------------------------------------------------------------------------------

YAML = """
task: {name}
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}, cache_dir: {cache}}}
test_split: test
output_type: multiple_choice
num_fewshot: 2
doc_to_text: "{{{{question}}}}"
doc_to_choice: "{{{{answers}}}}"
doc_to_target: right
{more}
"""


@pytest.fixture
def own(tmp_path, monkeypatch):
    """lm-eval with three tasks instead of its fourteen thousand, which take long to list."""
    folder = tmp_path / "own"
    folder.mkdir()
    rows = [
        {"question": i["query"], "answers": [c.strip() for c in i["choices"]], "right": i["gold"]}
        for i in ITEMS["plain"]
    ]
    data = write_items(folder / "rows.json", rows)
    (folder / "utils.py").write_text("def empty(docs):\n    return docs.select([])\n")
    extra = {"own_words": "", "own_empty": "process_docs: !function utils.empty", "own_code": "unsafe_code: true"}
    for name, more in extra.items():
        (folder / f"{name}.yaml").write_text(YAML.format(name=name, data=data, cache=tmp_path / "cache", more=more))
    (folder / "own_gone.yaml").write_text(YAML.format(name="own_gone", data="gone.json", cache=tmp_path, more=""))
    manager = TaskManager(include_defaults=False, include_path=str(folder))
    monkeypatch.setattr(module, "_manager", lambda: manager)


def test_a_task_of_lm_evals_own_gives_the_figures_of_the_same_items_in_a_file_without_examples(own, tmp_path):
    models = small_llama(), small_llama(3), small_tokenizer(), None, nothing
    by_name, by_file = loaded(["own_words"]), loaded([write_items(tmp_path / "plain.jsonl", ITEMS["plain"])])
    assert by_name.loaded["own_words"].instances[0].args == (
        ITEMS["plain"][0]["query"],
        ITEMS["plain"][0]["choices"][0],
    )
    first, second = by_name.compare(*models)["own_words"], by_file.compare(*models)["plain"]
    assert first["dense"] == second["dense"] and first["difference"] == second["difference"]
    assert first["versions"]["lm_eval"] and first["items"] == 20


@pytest.mark.parametrize(
    ("name", "words"),
    [("own_word", "did you mean own_words"), ("zzz", "lm-eval ls tasks"), ("own_empty", "split is empty"),
     ("own_code", "leave it out"), ("own_gone", "own_gone cannot be loaded")],
)  # fmt: skip
def test_tasks_of_lm_eval_that_are_unknown_empty_or_unusable_are_one_line(own, run, capsys, name, words):
    before = (run / "eval.json").read_bytes()
    said = complaint(capsys, "eval", run, "--tasks", name)
    assert name in said and words in said
    assert (run / "eval.json").read_bytes() == before


# --- mistakes --------------------------------------------------------------------------------------------------------

GOOD = ITEMS["plain"][0]
BROKEN = {
    "cut short": '{"query": "w1", "choi',
    "a list": "[1, 2]",
    "no choices": json.dumps({"query": "w1", "gold": 0}),
    "one choice": json.dumps(GOOD | {"choices": [" w1"], "gold": 0}),
    "a blank choice": json.dumps(GOOD | {"choices": [" w1", " "], "gold": 0}),
    "a choice that is no text": json.dumps(GOOD | {"choices": [" w1", 2], "gold": 0}),
    "gold beyond the choices": json.dumps(GOOD | {"gold": 3}),
    "gold before the choices": json.dumps(GOOD | {"gold": -1}),
    "gold as text": json.dumps(GOOD | {"gold": "0"}),
    "no gold": json.dumps({"query": "w1", "choices": [" w1", " w2"]}),
    "a blank query": json.dumps(GOOD | {"query": " "}),
    "no query": json.dumps({"choices": [" w1", " w2"], "gold": 0}),
    "too few queries": json.dumps(GOOD | {"query": None, "queries": ["w1"]}),
}


@pytest.mark.parametrize("fault", BROKEN)
def test_a_broken_line_is_named_before_anything_is_loaded_or_learned(dense, text, tmp_path, capsys, fault):
    path = tmp_path / "broken.jsonl"
    path.write_text(json.dumps(GOOD) + "\n\n" + BROKEN[fault] + "\n")
    said = complaint(capsys, *prune_arguments(dense, text, tmp_path / "run", tasks=path))
    assert "broken.jsonl, line 3" in said
    assert {p.name for p in (tmp_path / "run").iterdir()} == {"config.yaml"}


def test_halves_of_surrogate_pairs_are_no_reason_to_stop(run, tmp_path):
    item = '{"id": "\\ud83d", "query": "w1 \\ud83d", "choices": [" w1 \\udc00", " w2"], "gold": 0}'
    (tmp_path / "odd.jsonl").write_text(item + "\n")
    assert secateur("eval", run, "--tasks", tmp_path / "odd.jsonl") == 0
    assert json.loads((run / "eval.json").read_text())["tasks"]["odd"]["items"] == 1


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [("empty.jsonl", "", "holds no items"), ("blank.jsonl", "\n\n", "holds no items"),
     ("gone.jsonl", None, "no such file"), ("items.csv", "a,b", "ends in .jsonl"),
     ("no.jsonl.gz", "not gzip", "cannot be read")],
)  # fmt: skip
def test_files_that_are_empty_missing_or_of_another_type_are_one_line(run, tmp_path, capsys, name, content, words):
    if content is not None:
        (tmp_path / name).write_text(content)
    said = complaint(capsys, "eval", run, "--tasks", tmp_path / name)
    assert name in said and words in said


def test_two_tasks_of_one_name_are_refused(run, tmp_path, capsys):
    paths = [write_items(tmp_path / name, ITEMS["plain"]) for name in ("plain.jsonl", "plain.jsonl.gz")]
    assert "plain twice" in complaint(capsys, "eval", run, "--tasks", *paths)


def test_a_limit_below_one_item_is_refused(run, capsys):
    assert "--task-limit" in complaint(capsys, "eval", run, "--task-limit", "0")


def test_a_choice_longer_than_the_context_is_refused(run, tmp_path, capsys):
    item = {"id": "huge", "query": "w1", "choices": [" w1", " " + words(random.Random(0), 70)], "gold": 0}
    said = complaint(capsys, "eval", run, "--tasks", write_items(tmp_path / "long.jsonl", [GOOD, item]))
    assert "long, item huge" in said and "64 tokens" in said


def test_without_lm_eval_the_command_that_installs_it_is_named(run, monkeypatch, tmp_path, capsys):
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    monkeypatch.delitem(sys.modules, "secateur.tasks")
    for name in [name for name in sys.modules if name.startswith("lm_eval.")]:
        monkeypatch.delitem(sys.modules, name)
    said = complaint(capsys, "eval", run, "--tasks", write_items(tmp_path / "plain.jsonl", ITEMS["plain"]))
    assert "pip install 'secateur[eval]'" in said


# --- tokenizers that split elsewhere than between query and choice ----------------------------------------------------


def character_tokenizer(merges=(), ending=None):
    letters = ["<unk>", "<s>", "</s>", *"abcdefghijklmnopqrstuvwxyz: 0123456789"]
    vocabulary = {token: i for i, token in enumerate([*letters, *(a + b for a, b in merges)])}
    inner = Tokenizer(models.BPE(vocabulary, list(merges), unk_token="<unk>"))
    if ending:
        inner.post_processor = processors.TemplateProcessing("$A </s>", special_tokens=[("</s>", 2)])
    return PreTrainedTokenizerFast(tokenizer_object=inner, unk_token="<unk>", bos_token="<s>", eos_token="</s>")


ASKED = {"id": "first", "query": "is it so:", "choices": [" yes", " no"], "gold": 0}


@pytest.mark.parametrize(
    ("tokenizer", "item"),
    [(character_tokenizer([(":", " ")]), ASKED), (character_tokenizer(ending=True), ASKED),
     (character_tokenizer([("o", "k")]), ASKED | {"query": "is it so", "choices": ["k", "l"]})],
    ids=["joins the space to the query", "ends every text", "no space between"],
)  # fmt: skip
def test_a_tokenizer_that_joins_query_and_choice_is_refused_before_learning(broken, tmp_path, capsys, tokenizer, item):
    tokenizer.save_pretrained(broken)
    (tmp_path / "text.txt").write_text("is it so or not " * 200)
    path = write_items(tmp_path / "asked.jsonl", [item])
    said = complaint(capsys, *prune_arguments(broken, tmp_path / "text.txt", tmp_path / "run", tasks=path))
    assert "asked, item first" in said and "begin choices with a space" in said
    assert not (tmp_path / "run" / "metrics.jsonl").exists()


@pytest.mark.parametrize(
    ("tokenizer", "item"),
    [(character_tokenizer(), ASKED), (character_tokenizer([(" ", "y")]), ASKED),
     (character_tokenizer([(":", " ")]), ASKED | {"query": "is it so: ", "choices": ["yes", "no"]})],
    ids=["the space is a token of its own", "the space belongs to a choice", "lm-eval gives the query's space away"],
)  # fmt: skip
def test_tokens_that_are_those_of_the_text_are_scored(tmp_path, tokenizer, item):
    model = small_llama()
    if item is ASKED:
        tasks = loaded([write_items(tmp_path / "asked.jsonl", [item])], model, tokenizer)
        found = Model(model, tokenizer, None, 1, nothing).loglikelihood(tasks.loaded["asked"].instances)
        assert [score for score, _greedy in found] == pytest.approx(scores(model, tokenizer, item), abs=1e-4)
    else:
        with pytest.raises(ValueError, match="asked, item first"):
            loaded([write_items(tmp_path / "asked.jsonl", [item])], model, tokenizer)


def test_lm_evals_own_task_is_scored_with_a_count_of_such_items(own, monkeypatch):
    tokenizer = small_tokenizer()
    encode = Model.tok_encode
    monkeypatch.setattr(
        Model, "tok_encode", lambda self, text, *a, **k: encode(self, text, *a, **k)[:: -1 if "w7 " in text else 1]
    )
    tasks = loaded(["own_words"], tokenizer=tokenizer)
    assert 0 < tasks.joined["own_words"] < 20
