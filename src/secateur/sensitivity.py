"""How much the model would change if a gate moved: the diagonal of the Fisher information of the gates at m = 1.

It sets which units start inside the budget, and each gate's step size, so that a gate moves as far as it is
unimportant: Adam alone moves every gate by about its learning rate a step, whatever it is worth.

Two choices make it accurate (docs/study.md has the figures). Labels are drawn from the model, not read off the text:
that is the Fisher information itself, the curvature of the KL divergence from the dense model, where squared gradients
of the text's own labels also count what the model gets wrong. And gradients are summed over a sequence before they are
squared: a gate is one number for all positions, whose effects add up.

Shape suffixes: N rows, B batch, T positions, R = rows of hidden states, D hidden size, V vocabulary.
"""

from collections.abc import Callable
from contextlib import ExitStack

import torch
from transformers import PreTrainedModel

from secateur.attach import attached, writer
from secateur.evaluate import mean_loss
from secateur.experts import Inside, inside_experts
from secateur.gates import by_group
from secateur.ranks import ALONE, Ranks
from secateur.recipes import Recipe
from secateur.units import Group
from secateur.vocabulary import Vocabulary, in_chunks

ROWS_AT_ONCE = 2
"""Sequences a forward pass: more do not fit a CPU's cache, and a GPU has enough to do with one."""

REMOVED_ON = 8
"""Rows on which the removal of each sublayer that has a gate is measured."""


class _Probe(torch.autograd.Function):
    """Identity that adds (Σ_tokens Σ_block x ∂L/∂x)² of every sequence to an accumulator in its backward pass; and the
    same of all blocks together to another one, if there is one."""

    @staticmethod
    def forward(ctx, x, _anchor, total, block, whole=None):  # type: ignore[no-untyped-def]
        ctx.save_for_backward(x)
        ctx.total, ctx.block, ctx.whole = total, block, whole
        return x.view_as(x)

    @staticmethod
    def backward(ctx, grad):  # type: ignore[no-untyped-def]
        (x,) = ctx.saved_tensors
        by_unit = (x.float() * grad.float()).unflatten(-1, (-1, ctx.block)).sum((-3, -1))
        ctx.total += by_unit.square().sum(0)
        if ctx.whole is not None:
            ctx.whole += by_unit.sum(-1).square().sum()
        return grad, None, None, None, None


def gate_sensitivity(
    model: PreTrainedModel,
    groups: tuple[Group, ...],
    ids_NT: torch.Tensor,
    on_row: Callable[[int], None] = lambda _: None,
    seed: int = 0,
    rows: int | None = None,
    ranks: Ranks = ALONE,
) -> torch.Tensor:
    """Diagonal Fisher information of every gate at m = 1, in nats a token, shape (units of the model,), float32.

    A forward and a backward pass over the rows of `ids_NT`, with labels drawn by `seed`; ½ of the value estimates
    the KL divergence from the dense model when the unit is removed alone (optimal brain damage, LeCun et al. 1990, with
    the Fisher information for the Hessian). Of a gate of a whole sublayer, twice the measured rise if that is more.
    With N rows its relative error is about √(2/N). `rows`: the most that go through the model at once; ranks take them
    in turns.
    """
    device = ids_NT.device
    generator = torch.Generator(device).manual_seed(seed)
    anchor = torch.zeros((), device=device, requires_grad=True)
    totals = [torch.zeros(g.units, device=device) for g in groups]
    place = {g.name: number for number, g in enumerate(groups)}
    vocabulary = Vocabulary(model)
    alone = any(g.experts for g in groups)  # experts see tokens without their sequences
    parts = ids_NT.split(1 if alone else min(ROWS_AT_ONCE, rows or ROWS_AT_ONCE))
    tokens = ids_NT.shape[1] - 1
    luck = [torch.rand((len(part_BT) * tokens, 1), device=device, generator=generator) for part_BT in parts]
    with ExitStack() as stack:
        experts = {}
        for group, total in zip(groups, totals, strict=True):
            if group.experts:
                experts[group.gate_at] = _probed(group.by_expert(total), anchor)
                continue
            if group.is_sublayer and group.after:
                norm = model.get_submodule(group.after)

                def probe_behind(_module, _args, output, total=total):  # type: ignore[no-untyped-def]
                    return _Probe.apply(output, anchor, total, output.shape[-1])

                stack.callback(norm.register_forward_hook(probe_behind).remove)
                continue
            if group.gate_only:
                continue  # heard of where its units are
            module = writer(model, group)
            block = module.in_features // group.units
            whole = totals[place[group.depth]] if group.depth and group.writes and not group.after else None

            def probe(_module, args, total=total, block=block, whole=whole):  # type: ignore[no-untyped-def]
                return (_Probe.apply(args[0], anchor, total, block, whole), *args[1:])

            stack.callback(module.register_forward_pre_hook(probe).remove)
        stack.enter_context(inside_experts(model, experts))

        def of_part(number: int) -> torch.Tensor:
            for total in totals:
                total.zero_()
            (surprise(vocabulary, parts[number], luck[number]) / tokens).backward()
            return torch.cat(totals)

        sum_N, done = torch.zeros_like(torch.cat(totals)), 0
        for part_BT, found_N in zip(parts, ranks.in_turn(range(len(parts)), of_part), strict=True):
            sum_N += found_N
            done += len(part_BT)
            on_row(done)
    return _with_removals(sum_N * (tokens / len(ids_NT)), model, groups, ids_NT[:REMOVED_ON], ranks)


def surprise(vocabulary: Vocabulary, ids_BT: torch.Tensor, luck_R1: torch.Tensor) -> torch.Tensor:
    """−log likelihood of a label that the model draws at each position, summed over all of them."""
    hidden_RD = vocabulary.hidden(ids_BT)[:, :-1].flatten(0, 1)

    def of_chunk(logits_RV, part):  # type: ignore[no-untyped-def]
        p_RV = logits_RV.float().softmax(dim=-1)
        labels_R1 = drawn(p_RV, luck_R1[part])
        p_R1 = p_RV.gather(1, labels_R1)
        p_RV.scatter_add_(1, labels_R1, torch.full_like(p_R1, -1.0))
        return -p_R1.log().sum(0), p_RV.to(logits_RV.dtype)

    return in_chunks(hidden_RD, vocabulary.head, of_chunk)[0]


def sensitivity_at(
    model: PreTrainedModel,
    groups: tuple[Group, ...],
    ids_NT: torch.Tensor,
    gate_N: torch.Tensor,
    on_row: Callable[[int], None] = lambda _: None,
    seed: int = 0,
    ranks: Ranks = ALONE,
) -> torch.Tensor:
    """The same at other gates, shape (units of the model,): the diagonal Fisher information of the model that they make
    of it, which draws the labels.

    By the gradients of the gates themselves, a row at a time.
    """
    generator = torch.Generator(ids_NT.device).manual_seed(seed)
    vocabulary, tokens = Vocabulary(model), ids_NT.shape[1] - 1
    luck = [torch.rand((tokens, 1), device=ids_NT.device, generator=generator) for _ in ids_NT]

    def of_row(row: int) -> torch.Tensor:
        at_N = gate_N.clone().requires_grad_()
        with attached(model, groups, by_group(at_N, groups)):  # to the end, where layers may be computed once more
            loss = surprise(vocabulary, ids_NT[row : row + 1], luck[row])
            (grad_N,) = torch.autograd.grad(loss, at_N)
        return grad_N.square() / tokens

    sum_N = torch.zeros_like(gate_N)
    for done, found_N in enumerate(ranks.in_turn(range(len(ids_NT)), of_row), start=1):
        sum_N += found_N
        on_row(done)
    return sum_N / len(ids_NT)


@torch.no_grad()
def _with_removals(
    found_N: torch.Tensor, model: PreTrainedModel, groups: tuple[Group, ...], ids_NT: torch.Tensor, ranks: Ranks
) -> torch.Tensor:
    """The same with gates of whole sublayers by what the loss rises when each is removed, twice that, where it is more:
    from 1 to 0 is too far for a curvature at 1 (docs/study.md)."""
    if not any(g.is_sublayer for g in groups):
        return found_N
    dense, start = mean_loss(model, ids_NT, ranks=ranks), 0
    for group in groups:
        if group.is_sublayer:
            gate_N = torch.ones_like(found_N)
            gate_N[start] = 0.0
            rise = mean_loss(model, ids_NT, groups, by_group(gate_N, groups), ranks=ranks) - dense
            found_N[start] = max(float(found_N[start]), 2.0 * rise)
        start += group.units
    return found_N


def _probed(total_EC: torch.Tensor, anchor: torch.Tensor) -> Inside:
    def inside(expert: int, x_TC: torch.Tensor, _routing: torch.Tensor) -> torch.Tensor:
        probed: torch.Tensor = _Probe.apply(x_TC[None], anchor, total_EC[expert], 1)
        return probed[0]

    return inside


def drawn(p_RV: torch.Tensor, luck_R1: torch.Tensor) -> torch.Tensor:
    """A token of each row of probabilities, shape (R, 1), by inverting the distribution function at `luck_R1`.

    torch.multinomial is many times slower.
    """
    cumulative_RV = p_RV.cumsum(dim=-1)
    return torch.searchsorted(cumulative_RV, luck_R1 * cumulative_RV[:, -1:]).clamp(max=p_RV.shape[1] - 1)


def weighted(sensitivity_N: torch.Tensor, groups: tuple[Group, ...], attention_weight: float) -> torch.Tensor:
    """Sensitivities with those of heads and KV groups counted `attention_weight` times (docs/study.md)."""
    parts = sensitivity_N.split([g.units for g in groups])
    return torch.cat([attention_weight * p if g.attends else p for p, g in zip(parts, groups, strict=True)])


def balanced(sensitivity_N: torch.Tensor, groups: tuple[Group, ...], strength: float) -> torch.Tensor:
    """Channels' sensitivities with the differences between layers evened out: by 0 not at all, by 1 wholly.

    Each layer is divided by (its geometric mean over that of all layers) to the power `strength`.
    """
    parts = list(sensitivity_N.split([g.units for g in groups]))
    place = {g.name: i for i, g in enumerate(groups)}
    for kind in dict.fromkeys(g.kind for g in groups if not g.attends and not g.gate_only):
        of_kind = [i for i, g in enumerate(groups) if g.kind == kind and (parts[i] > 0).any()]
        levels = {i: parts[i][parts[i] > 0].log().mean() for i in of_kind}  # what no token reached says nothing
        if not levels:
            continue
        middle = torch.stack(list(levels.values())).mean()
        for i, level in levels.items():
            factor = torch.exp(-strength * (level - middle))
            parts[i] = parts[i] * factor
            if groups[i].depth:  # compared with its units
                parts[place[groups[i].depth]] = parts[place[groups[i].depth]] * factor
    return torch.cat(parts)


def weighed(
    sensitivity_N: torch.Tensor, groups: tuple[Group, ...], recipe: Recipe
) -> tuple[torch.Tensor, torch.Tensor]:
    """Sensitivities by which gates step, and those by which they are worth keeping."""
    sensitivity_N = weighted(sensitivity_N, groups, recipe.attention_weight)
    return sensitivity_N, balanced(sensitivity_N, groups, recipe.layer_balance)
