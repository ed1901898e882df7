"""Losses over the vocabulary in chunks are what the plain formula gives, for every family, without whole logits."""

import math
import warnings
import weakref
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import LlamaForCausalLM

from runs import described, random_tokens, small_llama
from secateur import vocabulary
from secateur.attach import attached
from secateur.budget import make_budget
from secateur.describe import describe
from secateur.evaluate import mean_loss
from secateur.gates import by_group
from secateur.importance import taylor_vector
from secateur.learn import learn
from secateur.load import autocast
from secateur.objective import distillation_loss
from secateur.recipes import auto_recipe
from secateur.recover import Recovery, recover
from secateur.vocabulary import Head, Vocabulary
from test_families import MIXTURES, PARTLY, VARIANTS, WHOLE, build
from tiny import tiny, tokens

HEADS = {
    "a cap that bites": ("gemma2", {"final_logit_softcapping": 0.5}),
    "a scale": ("granite", {"logits_scaling": 8.0}),
    "a bias": ("phi", {}),
    "tied, scaled": ("cohere", {"logit_scale": 0.3, "tie_word_embeddings": True}),
}
FAMILIES = {name: (name, {}) for name in (*WHOLE, *PARTLY)} | VARIANTS | MIXTURES | HEADS
CPU = torch.device("cpu")


def rows_at_once(monkeypatch, rows, words):
    monkeypatch.setitem(vocabulary.LOGITS_AT_ONCE, "cpu", 4 * words * rows)


def plain(student_BTV, teacher_BTV, ids_BT, kd_weight, temperature):
    """The loss by the book, from whole logits."""
    student_RV, teacher_RV = (logits[:, :-1].flatten(0, 1).float() for logits in (student_BTV, teacher_BTV))
    log_p, log_q = ((x / temperature).log_softmax(-1) for x in (student_RV, teacher_RV))
    kl = temperature**2 * F.kl_div(log_p, log_q, reduction="batchmean", log_target=True)
    return F.cross_entropy(student_RV, ids_BT[:, 1:].flatten()) + kd_weight * kl


def losses_and_gradients(model, groups, gate_N, ids_BT, temperature, precision="float32"):
    """In chunks, and plainly: the loss of the gated model and its gradient by the gates."""
    results = []
    for chunked in (True, False):
        z_N = gate_N.clone().requires_grad_()
        with autocast(CPU, precision):
            cut = Vocabulary(model)
            assert cut.whole is None
            with torch.no_grad():
                teacher = cut.hidden(ids_BT) if chunked else model(ids_BT).logits
            with attached(model, groups, by_group(z_N, groups)):
                student = cut.hidden(ids_BT) if chunked else model(ids_BT).logits
                if chunked:
                    loss = distillation_loss(student, teacher, ids_BT, 2.0, temperature, cut.head, cut.head)[0]
                else:
                    loss = plain(student, teacher, ids_BT, 2.0, temperature)
                (grad_N,) = torch.autograd.grad(loss, z_N)
        results.append((loss.detach(), grad_N))
    return results


@pytest.mark.parametrize("family", FAMILIES)
def test_losses_and_gradients_in_chunks_are_those_of_the_plain_formula(family, monkeypatch):
    """Caps, scales and biases of heads included; chunks that are not whole sequences."""
    rows_at_once(monkeypatch, 5, 128)
    model_type, changes = FAMILIES[family]
    model = (tiny(model_type, **changes) if changes else build(model_type)).requires_grad_(False)
    groups = describe(model).groups
    gate_N = 0.5 + torch.rand(sum(g.units for g in groups), generator=torch.Generator().manual_seed(0))
    temperature = 1.0 if len(family) % 2 else 2.0
    (loss, grad_N), (expected, expected_N) = losses_and_gradients(model, groups, gate_N, tokens(), temperature)
    assert loss.item() == pytest.approx(expected.item(), rel=1e-6)
    assert expected_N.norm() > 0 and (grad_N - expected_N).norm() <= 1e-6 * expected_N.norm()


@pytest.mark.parametrize("tied", [True, False])
def test_under_autocast_losses_and_gradients_are_as_near_to_float32_as_the_plain_ones(tied, monkeypatch):
    rows_at_once(monkeypatch, 7, 64)
    model, ids_BT = small_llama(tie_word_embeddings=tied), random_tokens(4, 24)
    groups = describe(model).groups
    gate_N = 0.5 + torch.rand(sum(g.units for g in groups), generator=torch.Generator().manual_seed(0))
    _, (exact, exact_N) = losses_and_gradients(model, groups, gate_N, ids_BT, 1.0)
    (ours, ours_N), (theirs, theirs_N) = losses_and_gradients(model, groups, gate_N, ids_BT, 1.0, "bfloat16")
    assert 0 < abs(ours - exact) < max(2 * abs(theirs - exact), 1e-3 * exact)
    assert 0 < (ours_N - exact_N).norm() < 1.2 * (theirs_N - exact_N).norm()


def test_under_autocast_the_head_is_lowered_once_for_all_chunks(monkeypatch):
    rows_at_once(monkeypatch, 2, 64)
    model, seen = small_llama(), []
    hidden_RD = torch.randn(8, 32)
    with autocast(CPU, "bfloat16"), torch.no_grad():
        head = Vocabulary(model).head
        model.lm_head.register_forward_hook(lambda module, *_: seen.append(module.weight))
        logits_RV = torch.cat([head.logits(hidden_RD[part]) for part in head.chunks(8, CPU)])
        expected_RV = F.linear(hidden_RD, model.lm_head.weight)
    assert len(seen) == 4 and {w.dtype for w in seen} == {torch.bfloat16} and len({w.data_ptr() for w in seen}) == 1
    assert torch.equal(logits_RV, expected_RV)
    assert model.lm_head.weight.dtype == torch.float32


def test_a_teacher_of_its_own_is_read_by_its_own_head():
    """Of another width, which the student's head could not read."""
    description, limits = described(model := small_llama(), 0.3)
    ids_NT, kls = random_tokens(2, 9), []
    for teacher in (None, small_llama(seed=1, hidden_size=16, head_dim=8)):
        learn(
            model, description.groups, ids_NT, ids_NT[:1], limits, auto_recipe(1), steps=1, batch_size=2,
            teacher=teacher, on_step=lambda step: kls.append(step.kl),
        )  # fmt: skip
    assert kls[0] < kls[1]


# --- memory ----------------------------------------------------------------------------------------------------------

WORDS, ROWS, LENGTH = 512, 4, 32
WHOLE_LOGITS = ROWS * LENGTH * WORDS


class Largest(TorchDispatchMode):
    """Float32 numbers that the largest tensor takes of what anything makes, forward or backward."""

    numbers = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        made = func(*args, **(kwargs or {}))
        for tensor in made if isinstance(made, tuple | list) else (made,):
            if isinstance(tensor, torch.Tensor):
                self.numbers = max(self.numbers, tensor.untyped_storage().nbytes() // 4)
        return made


def learning(model, ids_NT):
    groups = describe(model).groups
    limits = make_budget(groups, describe(model).shapes, 0.3, "model")
    learn(model, groups, ids_NT, ids_NT[:1], limits, auto_recipe(1), steps=1, batch_size=ROWS)


def recovering(model, ids_NT):
    student = small_llama(seed=1, vocab_size=WORDS)
    recover(student, model, "model.layers", ids_NT, Recovery("full", 1, ROWS, 1e-3, 4, 2.0, 1.0, seed=0))


def evaluating(model, ids_NT):
    mean_loss(model, ids_NT)


def scoring(model, ids_NT):
    description, limits = described(model, 0.3)
    taylor_vector(model, description.groups, ids_NT.reshape(1, -1)[:, : ROWS * LENGTH], limits, lambda _: None)


def largest_of(work):
    ids_NT = random_tokens(ROWS, LENGTH)
    model = small_llama(vocab_size=WORDS, max_position_embeddings=ROWS * LENGTH)
    with Largest() as largest:
        work(model, ids_NT)
    return largest.numbers


@pytest.mark.parametrize("work", [learning, recovering, evaluating, scoring])
def test_no_tensor_of_tokens_times_vocabulary_is_ever_whole(work, monkeypatch):
    rows_at_once(monkeypatch, 16, WORDS)
    assert largest_of(work) <= max(16, 32) * WORDS  # of a chunk, or of the embedding of 512 words in 32 channels
    monkeypatch.setattr(Vocabulary, "_reason", lambda *_: "of a test")
    with pytest.warns(UserWarning, match="of a test"):
        assert largest_of(work) >= WHOLE_LOGITS


def test_the_logits_of_a_chunk_are_gone_before_the_next_ones_are_made():
    """Two chunks' worth would be as much again."""
    weight_DV, made = torch.randn(8, WORDS), []

    def logits(hidden_RD):
        assert all(reference() is None for reference in made)
        logits_RV = hidden_RD @ weight_DV
        made.append(weakref.ref(logits_RV))
        return logits_RV

    def work(logits_RV, part):
        by_logits_RV = logits_RV.softmax(-1)
        made.append(weakref.ref(by_logits_RV))
        return logits_RV.logsumexp(-1).sum(0, keepdim=True), by_logits_RV

    vocabulary.in_chunks(torch.randn(3 * 128, 8, requires_grad=True), Head(WORDS, logits), work).sum().backward()
    assert len(made) == 6


@pytest.mark.parametrize(("words", "most", "rows"), [(49_152, 128, 125), (2**20, 64, 63), (2**27, 1, 1)])
def test_chunks_are_even_and_as_large_as_memory_says(words, most, rows):
    parts = list(vocabulary.given(words).chunks(1000, CPU))
    assert {part.stop - part.start for part in parts} == {rows} and len(parts) == math.ceil(1000 / most)
    assert parts[0].start == 0 and parts[-1].stop >= 1000
    assert 4 * words * most <= 2**28 < 4 * words * (most + 1) or most in (1, 128)
    assert not list(vocabulary.given(words).chunks(0, CPU))


# --- models that cannot be cut ---------------------------------------------------------------------------------------


class Mixing(LlamaForCausalLM):
    """Its logits depend on other positions."""

    def forward(self, *args, **kwargs):
        output = super().forward(*args, **kwargs)
        output.logits = output.logits + output.logits.cumsum(1)
        return output


class Looking(LlamaForCausalLM):
    """Its logits depend on something else than hidden states."""

    def forward(self, input_ids, **kwargs):
        output = super().forward(input_ids, **kwargs)
        output.logits = output.logits * (1.0 + input_ids[..., None])
        return output


class Pooling(LlamaForCausalLM):
    """It gives one row of logits a sequence."""

    def forward(self, *args, **kwargs):
        output = super().forward(*args, **kwargs)
        output.logits = output.logits[:, -1:]
        return output


class Reading(LlamaForCausalLM):
    """Its head reads more than the last hidden state."""

    def forward(self, input_ids, **kwargs):
        output = super().forward(input_ids, output_hidden_states=True, **kwargs)
        return SimpleNamespace(logits=output.logits + self.lm_head(output.hidden_states[1]))


class Twice(LlamaForCausalLM):
    """It runs its base model twice."""

    def forward(self, input_ids, **kwargs):
        first = super().forward(input_ids, **kwargs).logits
        return SimpleNamespace(logits=first + super().forward(input_ids.flip(1), **kwargs).logits)


class Alone(LlamaForCausalLM):
    """It has no base model."""

    base_model_prefix = ""


@pytest.mark.parametrize(
    ("kind", "reason"),
    [
        (Mixing, "other logits for rows of hidden states alone"),
        (Looking, "other logits for rows of hidden states alone"),
        (Pooling, "does not give a row of logits for a row"),
        (Reading, "does not read its base model's last hidden states alone"),
        (Twice, "other logits for rows of hidden states alone"),
        (Alone, "is not a base model and a head"),
    ],
)
def test_heads_that_need_more_than_a_row_of_hidden_states_get_whole_logits_and_the_reason_is_said(kind, reason):
    model = kind(small_llama().config).eval().requires_grad_(False)
    model.load_state_dict(small_llama().state_dict())
    with pytest.warns(UserWarning, match=f"held at once: .*{kind.__name__}.*{reason}|held at once: .*{reason}"):
        cut = Vocabulary(model)
    ids_BT = random_tokens(2, 9)
    with torch.no_grad():
        logits_RV = cut.head.logits(cut.hidden(ids_BT).flatten(0, 1))
        assert torch.equal(logits_RV, model(ids_BT).logits.flatten(0, 1))


def test_a_model_that_is_broken_is_not_put_down_to_its_head():
    model = small_llama()
    model.model.embed_tokens.weight.data.fill_(math.nan)
    with warnings.catch_warnings(action="error"):
        assert Vocabulary(model).whole is None


def test_models_are_left_as_they_were():
    model = small_llama()
    own = model.model.forward
    vars(model.model)["forward"] = own  # as accelerate does
    cut = Vocabulary(model)
    hidden_BTD = cut.hidden(random_tokens(2, 9))
    with torch.no_grad():
        cut.head.logits(hidden_BTD[0])
    with pytest.raises(RuntimeError):
        cut.head.logits(hidden_BTD[0, :, :5])
    assert vars(model.model)["forward"] is own
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    plain_model = small_llama()
    Vocabulary(plain_model)
    assert "forward" not in vars(plain_model.model)


def test_a_head_that_is_trained_is_refused():
    """Its gradient would be lost."""
    model = small_llama()
    model.lm_head.requires_grad_(True)
    head, hidden_RD = Vocabulary(model).head, torch.zeros(2, 32)
    assert head.logits(hidden_RD).shape == (2, 64)
    with pytest.raises(AssertionError, match="head"):
        head.logits(hidden_RD.requires_grad_())
