"""The passes of a learning step: the unpruned model, the gated one, and back to the gates.

For the loop in learn.py, which says over which rows and with which gates.

Shape suffixes: N units of the whole model, F = N + 4, B batch, T positions, D hidden size.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import reduce

import torch
from torch.utils.checkpoint import set_checkpoint_early_stop
from transformers import PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

from secateur.attach import attached
from secateur.files import InputError
from secateur.gates import by_group
from secateur.objective import KeptWords, distillation_loss, kept_distillation_loss
from secateur.offloaded import is_offloaded
from secateur.ranks import ALONE, Ranks
from secateur.recipes import Recipe
from secateur.teacher import Exactness, TeacherCache
from secateur.units import Group
from secateur.vocabulary import Vocabulary


@dataclass(frozen=True)
class Found:
    """What the passes over a batch give; losses in nats a token."""

    loss: float
    """L_ce + η L_kl."""
    ce: float
    kl: float
    grad_N: torch.Tensor
    """Of the loss, by z."""
    dense_ce: float | None
    """L_ce of the unpruned model, where it was asked for."""
    teacher_rest: float | None = None
    """Of a teacher that is kept on disk, the mean mass of the words that are left out."""


class Passes:
    """A frozen model with gates, and its teacher: the model itself without gates unless another one is given."""

    def __init__(
        self,
        model: PreTrainedModel,
        groups: tuple[Group, ...],
        recipe: Recipe,
        teacher: PreTrainedModel | None = None,
        gradient_checkpointing: bool = False,
        rows: int | None = None,
        ranks: Ranks = ALONE,
        cache: TeacherCache | None = None,
    ) -> None:
        """`rows`: how many of a batch go through the model at once, by default all of them."""
        self.model, self.groups, self.recipe = model, groups, recipe
        self.gradient_checkpointing, self.rows, self.ranks = gradient_checkpointing, rows, ranks
        self.cache = cache
        self.student = Vocabulary(model)
        self.teacher = self.student if teacher is None else Vocabulary(teacher)

    def over(
        self,
        ids_BT: torch.Tensor,
        z_N: torch.Tensor,
        gates_of: Callable[[torch.Tensor], torch.Tensor],
        dense: bool = False,
    ) -> Found:
        """Teacher, student, and the gradient by z, over a batch, of which ranks take parts of equal size in turns.

        `gates_of` makes of z what the student is multiplied by. `dense`: L_ce without gates is wanted, too.
        """
        parts = ids_BT.split(self.rows or len(ids_BT))
        found = self.ranks.in_turn(parts, lambda part_BT: self._pass(part_BT, z_N, gates_of, dense))
        mean_F = reduce(torch.Tensor.add_, found) / len(parts)
        loss, ce, kl, dense_ce, rest = mean_F[-5:].tolist()
        return Found(loss, ce, kl, mean_F[:-5], dense_ce if dense else None, None if self.cache is None else rest)

    def _pass(
        self, ids_BT: torch.Tensor, z_N: torch.Tensor, gates_of: Callable[[torch.Tensor], torch.Tensor], dense: bool
    ) -> torch.Tensor:
        """The gradient, shape (N,), four losses in a row: all, L_ce, L_kl, the unpruned model's L_ce or 0; and the mass
        that a teacher on disk leaves out, or 0."""
        z_N, recipe = z_N.clone().requires_grad_(), self.recipe
        gate_N, ids_BT = gates_of(z_N), ids_BT.to(z_N.device)
        if self.cache is not None:
            return self._over_kept(self.cache.of(ids_BT, self.teacher), ids_BT, z_N, gate_N)
        student, teacher = self.student, self.teacher
        with torch.no_grad():
            teacher_BTD = teacher.hidden(ids_BT)
        # Gates stay on to the end of the backward pass, which may compute the layers once more.
        with attached(self.model, self.groups, by_group(gate_N, self.groups)):
            with recomputing(self.model, self.gradient_checkpointing):
                student_BTD = student.hidden(ids_BT)
            loss, ce, kl = distillation_loss(
                student_BTD, teacher_BTD, ids_BT, recipe.kd_weight, recipe.kd_temperature, student.head, teacher.head
            )
            (grad_N,) = torch.autograd.grad(loss, z_N)
        dense_ce = torch.zeros_like(ce)
        if dense:
            dense_ce = distillation_loss(teacher_BTD, teacher_BTD, ids_BT, 0.0, 1.0, teacher.head, teacher.head)[1]
        return torch.cat([grad_N, torch.stack([loss.detach(), ce, kl, dense_ce, torch.zeros_like(ce)])])

    def _over_kept(
        self, words: KeptWords, ids_BT: torch.Tensor, z_N: torch.Tensor, gate_N: torch.Tensor
    ) -> torch.Tensor:
        """The same by a teacher's distributions that are kept on disk."""
        kd_weight, temperature = self.recipe.kd_weight, self.recipe.kd_temperature
        with attached(self.model, self.groups, by_group(gate_N, self.groups)):
            with recomputing(self.model, self.gradient_checkpointing):
                student_BTD = self.student.hidden(ids_BT)
            loss, ce, kl = kept_distillation_loss(student_BTD, words, ids_BT, kd_weight, temperature, self.student.head)
            (grad_N,) = torch.autograd.grad(loss, z_N)
        dense_ce, rest = (loss.new_tensor(words.mean(of, ids_BT)) for of in (-words.label_R, words.rest_R.exp()))
        return torch.cat([grad_N, torch.stack([loss.detach(), ce, kl, dense_ce, rest])])

    @torch.no_grad()
    def exactness(self, ids_BT: torch.Tensor, gate_N: torch.Tensor) -> Exactness | None:
        """What the words that are not kept cost on some rows, with these gates; None where the teacher is asked."""
        if self.cache is None:
            return None
        ids_BT, temperature = ids_BT[: self.rows].to(gate_N.device), self.recipe.kd_temperature
        words, teacher_BTD = self.cache.of(ids_BT, self.teacher), self.teacher.hidden(ids_BT)
        with attached(self.model, self.groups, by_group(gate_N, self.groups)):
            student_BTD = self.student.hidden(ids_BT)
            kl = kept_distillation_loss(student_BTD, words, ids_BT, 1.0, temperature, self.student.head)[2]
            heads = self.student.head, self.teacher.head
            exact = distillation_loss(student_BTD, teacher_BTD, ids_BT, 1.0, temperature, *heads)[2]
        return Exactness(words.mean(words.rest_R.exp(), ids_BT), kl.item(), exact.item())


@contextmanager
def recomputing(model: PreTrainedModel, wanted: bool) -> Iterator[None]:
    """Within the context, if `wanted`, layers keep only their inputs for the backward pass; dropout stays off.

    What torch leaves out of a layer that is computed again, all after the last thing that the backward pass needs, is
    done where weights are offloaded: it takes the weights of the last linear map out of memory once more.

    Raises InputError where the model cannot.
    """
    if not wanted:
        yield
        return
    if not model.supports_gradient_checkpointing:
        raise InputError(f"{type(model).__name__} does not support gradient checkpointing; leave the option out")
    layers = [m for m in model.modules() if isinstance(m, GradientCheckpointingLayer)]
    model.gradient_checkpointing_enable({"use_reentrant": False})
    try:
        for layer in layers:
            layer.training = True  # of the layer's own flag alone, which is what switches checkpointing on
        with set_checkpoint_early_stop(not is_offloaded(model)):
            yield
    finally:
        for layer in layers:
            layer.training = False
        model.gradient_checkpointing_disable()
