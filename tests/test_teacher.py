"""A teacher whose distributions are kept on disk: exact where all words are kept, near it where some are."""

import json

import pytest
import torch
from safetensors.torch import load_file

from runs import complaint, gates_of, prune_arguments, same_gates, secateur, write_checkpoint, write_texts
from secateur import teacher as keeping
from secateur.objective import KeptWords, distillation, distillation_loss, kept_distillation, kept_distillation_loss

V, R = 11, 6


def logits(seed, scale=2.0):
    return scale * torch.randn(R, V, generator=torch.Generator().manual_seed(seed), dtype=torch.float32)


def words_of(logits_RV, labels_R, k, temperature):
    log_q_RV = (logits_RV / temperature).log_softmax(-1)
    log_q_RK, index_RK = log_q_RV.topk(k)
    rest_R = log_q_RV.scatter(1, index_RK, -torch.inf).logsumexp(-1)
    label_R = logits_RV.log_softmax(-1).gather(1, labels_R[:, None])[:, 0]
    return KeptWords(index_RK.int(), log_q_RK, rest_R, label_R)


LABELS = torch.arange(R) % V
WEIGHTS = torch.arange(1.0, R + 1) / 21


@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_all_words_kept_are_the_exact_loss_and_gradient(temperature):
    student, teacher = logits(0), logits(1)
    words = words_of(teacher, LABELS, V, temperature)
    exact = distillation(student, teacher, LABELS, WEIGHTS, 2.0, temperature)
    found = kept_distillation(student, words, LABELS, WEIGHTS, 2.0, temperature)
    for a, b in zip(exact, found, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("temperature", [1.0, 2.0])
@pytest.mark.parametrize("k", [1, 4, V - 1])
def test_some_words_give_the_loss_of_merged_words_and_its_gradient(k, temperature):
    student, teacher = logits(0).requires_grad_(), logits(1)
    words = words_of(teacher, LABELS, k, temperature)
    p, q = ((x / temperature).softmax(-1) for x in (student, teacher))
    merged = []
    for of in (p, q):
        kept = of.gather(1, words.index_RK.long())
        merged.append(torch.cat([kept, 1 - kept.sum(-1, keepdim=True)], -1))
    kl = temperature**2 * (WEIGHTS[:, None] * merged[1] * (merged[1].log() - merged[0].log())).sum()
    ce = -(student.log_softmax(-1).gather(1, LABELS[:, None])[:, 0] * WEIGHTS).sum()
    (by_hand,) = torch.autograd.grad(ce + 2.0 * kl, student)
    values, grad = kept_distillation(student.detach(), words, LABELS, WEIGHTS, 2.0, temperature)
    torch.testing.assert_close(values, torch.stack([ce + 2.0 * kl, ce, kl]).detach(), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(grad, by_hand, rtol=1e-4, atol=1e-5)
    exact = distillation(student.detach(), teacher, LABELS, WEIGHTS, 2.0, temperature)[0]
    assert values[2] <= exact[2] + 1e-6, "merging words can only lower it"


def test_without_distillation_there_is_the_cross_entropy_alone():
    ids_BT = torch.randint(V, (2, R), generator=torch.Generator().manual_seed(3))
    student = logits(0).repeat(2, 1).view(2, R, V)
    words = words_of(logits(1).repeat(2, 1), ids_BT.roll(-1, 1).flatten(), 3, 1.0)
    exact = distillation_loss(student, student, ids_BT, 0.0, 1.0)
    found = kept_distillation_loss(student, words, ids_BT, 0.0, 1.0)
    for a, b in zip(exact, found, strict=True):
        torch.testing.assert_close(a, b)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    folder = tmp_path_factory.mktemp("teacher")
    return write_checkpoint(folder / "dense"), write_texts(folder / "texts.jsonl")


def learned(made, folder, **options):
    assert secateur(*prune_arguments(*made, folder, precision="float32", **options)) == 0
    return gates_of(folder)


def test_gates_by_all_words_are_those_by_the_teacher_itself(made, tmp_path):
    live = learned(made, tmp_path / "live")
    kept = learned(made, tmp_path / "kept", teacher="cache", teacher_top_k=1000)
    for name, gate in live.items():
        torch.testing.assert_close(gate, kept[name], rtol=1e-3, atol=1e-4)


def test_what_is_left_out_is_told_and_recorded(made, tmp_path, capsys):
    learned(made, tmp_path / "run", teacher="cache", teacher_top_k=8)
    said = " ".join(capsys.readouterr().out.split())
    assert "teacher cut down to 8 words" in said and "by all words" in said
    line = json.loads((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()[0])
    assert 0 < line["teacher_rest"] < 1
    from safetensors import safe_open

    with safe_open(tmp_path / "run" / "gates.safetensors", "pt") as file:
        about = json.loads(file.metadata()["secateur"])["teacher"]
    assert about["top_k"] == 8 and 0 < about["rest"] < 1 and 0 <= about["kl"] <= about["exact_kl"]


def test_what_was_computed_once_is_read_and_leads_to_the_same_gates(made, tmp_path, monkeypatch):
    learned(made, tmp_path / "run", teacher="cache", teacher_top_k=8)
    before = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "run" / "teacher").iterdir()}
    assert len(before) == 8 + 1, "a file a batch, and whose they are"
    first = (tmp_path / "run" / "gates.safetensors").read_bytes()

    def never(*_):
        raise AssertionError("the teacher was asked")

    monkeypatch.setattr(keeping.TeacherCache, "_ask", never)
    assert secateur("learn", tmp_path / "run") == 0
    assert {path.name: path.stat().st_mtime_ns for path in (tmp_path / "run" / "teacher").iterdir()} == before
    assert (tmp_path / "run" / "gates.safetensors").read_bytes() == first


def test_a_broken_file_is_computed_anew(made, tmp_path):
    learned(made, tmp_path / "run", teacher="cache", teacher_top_k=8)
    path = next((tmp_path / "run" / "teacher").glob("*.safetensors"))
    whole = {name: tensor.clone() for name, tensor in load_file(path).items()}
    path.write_bytes(path.read_bytes()[:100])
    assert secateur("learn", tmp_path / "run") == 0
    again = load_file(path)
    for name in whole:
        torch.testing.assert_close(whole[name], again[name])


def test_another_teachers_distributions_are_refused(made, tmp_path, capsys):
    learned(made, tmp_path / "run", teacher="cache", teacher_top_k=8)
    about = tmp_path / "run" / "teacher" / "about.json"
    values = json.loads(about.read_text())
    for key in ("weights", "top_k", "temperature", "precision"):
        about.write_text(json.dumps(values | {key: "else"}))
        said = complaint(capsys, "learn", tmp_path / "run")
        assert str(about.parent) in said and f"other {key} (else" in said and "remove that folder" in said


def test_sizes_of_a_sweep_share_a_teacher_and_other_text_is_never_taken(made, tmp_path):
    folder = tmp_path / "run"
    arguments = prune_arguments(*made, folder, teacher="cache", teacher_top_k=8, sweep="0.2,0.4")
    del arguments[arguments.index("--sparsity") : arguments.index("--sparsity") + 2]
    assert secateur(*arguments) == 0
    files = {path.name for path in (folder / "teacher").glob("*.safetensors")}
    assert len(files) == 8 and not list((folder / "sizes").rglob("teacher"))
    single = tmp_path / "single"
    learned(made, single, teacher="cache", teacher_top_k=8)
    assert {path.name for path in (single / "teacher").glob("*.safetensors")} == files, "the same text"
    assert not same_gates(single, folder / "sizes" / "0.2")


def test_what_contradicts_is_one_line(made, tmp_path, capsys):
    said = complaint(capsys, *prune_arguments(*made, tmp_path / "a", teacher="cache", method="magnitude"))
    assert "--teacher cache is a setting of learning" in said
    said = complaint(capsys, *prune_arguments(*made, tmp_path / "b", teacher="cache", teacher_top_k=0))
    assert "--teacher-top-k must be at least 1" in said
