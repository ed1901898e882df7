"""The losses and maps of deterministic differentiable pruning, as pure functions.

Every formula names its place in method.md section 3 (the paper: arXiv 2603.08065, section 3).

Shape suffixes: N units of the whole model, C constraints, B batch, T positions, V vocabulary, R = B·T rows,
D hidden states, or V where they are logits.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch

from secateur.vocabulary import Head, given, in_chunks

STRETCH_LOW, STRETCH_HIGH = -0.1, 1.1
"""l and r of hard concrete (Louizos et al. 2018): the sigmoid is stretched to (l, r), then clamped to [0, 1]."""

SCORE_SLOPE = 2.4
"""C₀ ≈ −log(−l/r): with it the retention score is 0 at z = 0 and 1 at z = 2μ."""

CHUNK_BYTES = {"cpu": 2**21, "other": 2**27}
"""Bytes of float32 logits whose softmax is worked on at a time: on a CPU what stays in its cache, elsewhere what keeps
a device busy."""


def straight_through(exact: torch.Tensor, source: torch.Tensor) -> torch.Tensor:
    """The values of `exact` with the gradient of `source`."""
    return source + (exact - source).detach()


def forward_gate(z_N: torch.Tensor) -> torch.Tensor:
    """m = ReLU(z) with an identity gradient, so that a closed gate still hears the loss. Method §3, forward gate."""
    return straight_through(z_N.relu(), z_N)


def retention_score(z_N: torch.Tensor, mu: float) -> torch.Tensor:
    """s = clamp(σ((z − μ) C₀/μ)(r − l) + l, 0, 1), identity gradient through the clamp. Method §3, retention score."""
    stretched = torch.sigmoid((z_N - mu) * (SCORE_SLOPE / mu)) * (STRETCH_HIGH - STRETCH_LOW) + STRETCH_LOW
    return straight_through(stretched.clamp(0.0, 1.0), stretched)


def annealed(progress: float, start: float, end: float, power: float = 0.5) -> float:
    """μ_t = μ_0 − (μ_0 − μ_T)(t/T)^power; the paper's square root by default. Method §3, annealing."""
    return start - (start - end) * progress**power


def lagrangian(
    violation_C: torch.Tensor,
    undecided_C: torch.Tensor,
    lambda1_C: torch.Tensor,
    lambda2_C: torch.Tensor,
    lambda3_C: torch.Tensor,
    *,
    at_most: bool = False,
) -> torch.Tensor:
    """λ₁(s̄ − ρ) + λ₂(s̄ − ρ)² + λ₃ mean(s(1 − s)), summed over constraints. Method §3, objective.

    `at_most`: s̄ ≤ ρ is asked for, not equality. Where there is so much room that the terms would pull s̄ up, its
    violation counts as the one at which they do not: the augmented Lagrangian of inequalities (Rockafellar 1973).
    """
    if at_most:
        pulls_C = -(lambda1_C / (2.0 * lambda2_C.clamp(min=1e-12))).detach()
        violation_C = torch.maximum(violation_C, pulls_C)
    return (lambda1_C * violation_C + lambda2_C * violation_C.square() + lambda3_C * undecided_C).sum()


def distillation(
    student_RV: torch.Tensor,
    teacher_RV: torch.Tensor,
    labels_R: torch.Tensor,
    weight_R: torch.Tensor,
    kd_weight: float,
    temperature: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """(L_ce + η τ² KL(teacher ‖ student), L_ce, τ² KL), sums over rows by weight, and the gradient of the first.

    Cross-entropy and KL in one pass over the rows: the gradient is formed while the softmax is in cache. With η = 0 the
    teacher is not looked at and its KL is given as 0.
    """

    def kl_of(part: slice, student: Softened) -> tuple[torch.Tensor, torch.Tensor]:
        teacher = softened(teacher_RV[part], temperature)
        apart_RV = teacher.logits_RV - student.logits_RV
        with torch.autocast(apart_RV.device.type, enabled=False):  # which rounds products of vectors, too
            logits_apart_R = torch.linalg.vecdot(teacher.p_RV, apart_RV)
        kl_R1 = logits_apart_R[:, None] + student.log_total_R1 - teacher.log_total_R1
        return kl_R1, torch.sub(student.p_RV, teacher.p_RV, out=apart_RV)

    return _in_cache(student_RV, labels_R, weight_R, kd_weight, temperature, kl_of)


class Softened(NamedTuple):
    """A softmax in float32: log p = `logits_RV` − `log_total_R1`."""

    logits_RV: torch.Tensor
    """Over the temperature."""
    p_RV: torch.Tensor
    log_total_R1: torch.Tensor


def softened(logits_RV: torch.Tensor, temperature: float = 1.0) -> Softened:
    """Softmax and the logarithm of its denominator with one exponential a logit, which is most of what a loss takes."""
    logits_RV = logits_RV.float() if temperature == 1.0 else logits_RV.float() / temperature
    p_RV = torch.softmax(logits_RV, dim=-1)
    return Softened(logits_RV, p_RV, logits_RV.amax(-1, keepdim=True) - p_RV.amax(-1, keepdim=True).log())


KlOf = Callable[[slice, Softened], tuple[torch.Tensor, torch.Tensor]]
"""Which rows, and what the student says there at temperature τ → KL of each, shape (R, 1), and τ ∂KL by its logits."""


def _in_cache(
    student_RV: torch.Tensor,
    labels_R: torch.Tensor,
    weight_R: torch.Tensor,
    kd_weight: float,
    temperature: float,
    kl_of: KlOf,
) -> tuple[torch.Tensor, torch.Tensor]:
    """What `distillation` gives, over so few rows at a time that they stay in cache."""
    grad_RV = torch.empty_like(student_RV)
    ce = torch.zeros((), device=student_RV.device)
    kl = torch.zeros_like(ce)
    chunk = CHUNK_BYTES["cpu" if student_RV.device.type == "cpu" else "other"]
    rows = max(1, chunk // (4 * student_RV.shape[1]))
    for start in range(0, len(labels_R), rows):
        part = slice(start, start + rows)
        labels_R1, weight_R1 = labels_R[part, None], weight_R[part, None]
        student = softened(student_RV[part])
        ce -= ((student.logits_RV.gather(1, labels_R1) - student.log_total_R1) * weight_R1).sum()
        grad = student.p_RV
        if kd_weight:
            kl_R1, by_kl = kl_of(part, student if temperature == 1.0 else softened(student_RV[part], temperature))
            kl += temperature**2 * (kl_R1 * weight_R1).sum()
            grad.add_(by_kl, alpha=kd_weight * temperature)
        grad.scatter_add_(1, labels_R1, grad.new_full(labels_R1.shape, -1.0))
        grad_RV[part] = grad.mul_(weight_R1)
    return torch.stack([ce + kd_weight * kl, ce, kl]), grad_RV


def distillation_loss(
    student_BTD: torch.Tensor,
    teacher_BTD: torch.Tensor,
    ids_BT: torch.Tensor,
    kd_weight: float,
    temperature: float,
    student_head: Head | None = None,
    teacher_head: Head | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """L_ce + η τ² KL(teacher ‖ student), each averaged over predicted positions, in nats a token. Method §3, objective.

    From hidden states with the heads that read them (vocabulary.py), or from logits where there is no head. Returns
    (loss, ce, kl); only `loss` carries a gradient, once, and only to `student_BTD`.
    """
    student_head = student_head or given(student_BTD.shape[-1])
    read_teacher = (teacher_head or given(teacher_BTD.shape[-1])).logits
    teacher_RD, (labels_R, weight_R) = teacher_BTD.flatten(0, 1), _labels(ids_BT)

    def work(student_RV: torch.Tensor, part: slice) -> tuple[torch.Tensor, torch.Tensor]:
        with torch.no_grad():
            teacher_RV = read_teacher(teacher_RD[part]) if kd_weight else student_RV
        return distillation(student_RV, teacher_RV, labels_R[part], weight_R[part], kd_weight, temperature)

    loss, ce, kl = in_chunks(student_BTD.flatten(0, 1), student_head, work)
    return loss, ce.detach(), kl.detach()


def _labels(ids_BT: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The word that follows each position, and what its loss weighs: nothing follows the last one of a row."""
    counted_BT = torch.ones(ids_BT.shape, device=ids_BT.device)
    counted_BT[:, -1] = 0.0
    return ids_BT.roll(-1, dims=1).flatten(), counted_BT.flatten() / counted_BT.sum()


class KeptWords(NamedTuple):
    """A teacher's distributions at temperature τ, cut down to their likeliest words (teacher.py)."""

    index_RK: torch.Tensor
    """These words, int32."""
    log_q_RK: torch.Tensor
    """Logarithms of their probabilities."""
    rest_R: torch.Tensor
    """That of the mass of all others; −inf where there are none."""
    label_R: torch.Tensor
    """That of the word that follows, at a temperature of 1."""

    def mean(self, values_R: torch.Tensor, ids_BT: torch.Tensor) -> float:
        """The mean of something over predicted positions."""
        return float((values_R * _labels(ids_BT)[1]).sum())


def kept_distillation(
    student_RV: torch.Tensor,
    teacher: KeptWords,
    labels_R: torch.Tensor,
    weight_R: torch.Tensor,
    kd_weight: float,
    temperature: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """`distillation` by a teacher's likeliest words, all others counting as one.

    KL = Σ_K q (log q − log p) + q_rest (log q_rest − log p_rest), which merging words can only lower. Its gradient by
    the student's logits, times τ, is p − q for words of K, and p (1 − q_rest / p_rest) for the others.
    """

    def kl_of(part: slice, student: Softened) -> tuple[torch.Tensor, torch.Tensor]:
        index, log_q, rest = teacher.index_RK[part].long(), teacher.log_q_RK[part], teacher.rest_R[part]
        log_p = student.logits_RV - student.log_total_R1
        log_pk, q, q_rest = log_p.gather(1, index), log_q.exp(), rest.exp()
        p_rest = log_p.scatter_(1, index, -torch.inf).logsumexp(-1)
        apart = torch.where(rest.isfinite(), q_rest * (rest - p_rest), 0.0)
        scale = torch.where(rest.isfinite(), 1.0 - (rest - p_rest).exp(), 1.0)
        by_kl = (student.p_RV * scale[:, None]).scatter_(1, index, log_pk.exp() - q)
        return ((q * (log_q - log_pk)).sum(-1) + apart)[:, None], by_kl

    return _in_cache(student_RV, labels_R, weight_R, kd_weight, temperature, kl_of)


def kept_distillation_loss(
    student_BTD: torch.Tensor,
    teacher: KeptWords,
    ids_BT: torch.Tensor,
    kd_weight: float,
    temperature: float,
    student_head: Head | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """`distillation_loss` by a teacher's likeliest words, which were found at this temperature."""
    labels_R, weight_R = _labels(ids_BT)

    def work(student_RV: torch.Tensor, part: slice) -> tuple[torch.Tensor, torch.Tensor]:
        words = KeptWords(*(tensor[part] for tensor in teacher))
        return kept_distillation(student_RV, words, labels_R[part], weight_R[part], kd_weight, temperature)

    head = student_head or given(student_BTD.shape[-1])
    loss, ce, kl = in_chunks(student_BTD.flatten(0, 1), head, work)
    return loss, ce.detach(), kl.detach()
