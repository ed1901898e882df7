"""Recovery: the weights that are left learn on, with the dense model as their teacher. Serves `--recover lora|full`.

The paper learns gates only and leaves weights to future work. The loss is that of the gates (method.md section 3):
L_ce + η KL(teacher ‖ student), on the run's calibration tokens once more. `lora` trains low-rank updates of every
linear map in the layers (Hu et al. 2021, arXiv 2106.09685), those of fused experts included, by PEFT, and merges them:
the checkpoint keeps its format.
`full` trains all weights of the layers. Embeddings, output head and final norm stay as they are.

Shape suffixes: N rows, B batch, T positions, D hidden size.
"""

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from secateur.checkpoints import Checkpoints, State
from secateur.experts import is_fused, reader
from secateur.files import InputError
from secateur.interrupts import held_back
from secateur.objective import distillation_loss
from secateur.passes import recomputing
from secateur.vocabulary import Vocabulary

LR = {"lora": 3e-3, "full": 3e-4}
"""Peak step sizes of AdamW (docs/study.md)."""
WARMUP = 0.05
"""Share of the steps over which the step size rises linearly; a cosine to zero follows."""
LARGEST_GRADIENT = 1.0
"""Norm that gradients of the loss, divided by 1 + η, are clipped to."""


@dataclass(frozen=True)
class Recovery:
    """What `recover` is told."""

    kind: str
    """`lora` or `full`."""
    steps: int
    batch_size: int
    lr: float
    rank: int
    """Rank of the low-rank updates."""
    kd_weight: float
    """η."""
    kd_temperature: float
    """τ."""
    seed: int
    """Of the updates' random half at the start."""
    after: tuple[str, ...] = ()
    """What was done to the student's weights before."""


@dataclass(frozen=True)
class RecoveryStep:
    """One line of recover.jsonl; losses in nats a token."""

    step: int
    loss: float
    ce: float
    kl: float
    lr: float


def recover(
    student: PreTrainedModel,
    teacher: PreTrainedModel,
    layers: str,
    calibration_NT: Tensor,
    settings: Recovery,
    *,
    micro_batch_size: int | None = None,
    gradient_checkpointing: bool = False,
    checkpoints: Checkpoints | None = None,
    on_step: Callable[[RecoveryStep], None] = lambda _: None,
) -> dict[str, Tensor]:
    """Trains `student`, the exported model, whose decoder layers are at `layers`; its new weights by parameter name.

    calibration_NT: steps × batch_size rows of token ids, used in their order, `micro_batch_size` of them at once, into
    which batches divide evenly (None: the batch). `gradient_checkpointing`: layers keep only their inputs for the
    backward pass. The student is used up. With `checkpoints`, states are saved there, also when interrupted; a run that
    finds one goes on from it to bit-identical weights. Raises InputError when the loss is not finite, or when PEFT is
    missing.
    """
    teacher.eval().requires_grad_(False)
    device = next(student.parameters()).device
    batches = calibration_NT.split(settings.batch_size)[: settings.steps]
    assert len(batches) == settings.steps, f"{settings.steps} steps need {settings.steps} batches, got {len(batches)}"
    dense, pruned = Vocabulary(teacher), Vocabulary(student.eval().requires_grad_(False))
    with (
        _trainable(student, layers, settings) as (weights, finished),
        recomputing(student, gradient_checkpointing),
    ):
        adam = torch.optim.AdamW(list(weights.values()), lr=settings.lr, betas=(0.9, 0.99), weight_decay=0.0)
        about = f"{settings} seq_len={calibration_NT.shape[1]}"
        done = 0
        if checkpoints is not None and (found := checkpoints.latest(about)) is not None:
            done = found.step
            with checkpoints.restoring():
                _restore(found.tensors, weights, adam)

        def losses(ids_BT: Tensor, of: int) -> Tensor:
            """Goes backwards through one of so many parts; its share of the loss, its cross-entropy and KL."""
            with torch.no_grad():
                teacher_BTD = dense.hidden(ids_BT)
            found = distillation_loss(
                pruned.hidden(ids_BT), teacher_BTD, ids_BT, settings.kd_weight, settings.kd_temperature,
                pruned.head, dense.head,
            )  # fmt: skip
            (found[0] / (of * (1.0 + settings.kd_weight))).backward()
            return torch.stack([part.detach() for part in found]) / of

        try:
            while done < settings.steps:
                parts = batches[done].to(device).split(micro_batch_size or settings.batch_size)
                loss, ce, kl = torch.stack([losses(ids_BT, len(parts)) for ids_BT in parts]).sum(0)
                norm = nn.utils.clip_grad_norm_(weights.values(), LARGEST_GRADIENT)
                if not (torch.isfinite(loss) and torch.isfinite(norm)):
                    raise InputError(
                        f"the loss of recovery became NaN or infinite at step {done + 1}; the export is as it was. "
                        "Lower --recover-lr or use --precision float32"
                    )
                adam.param_groups[0]["lr"] = rate = settings.lr * _schedule(done, settings.steps)
                with held_back():  # what an interrupt saves is the state of a whole step that was heard of
                    adam.step()
                    done += 1
                    on_step(RecoveryStep(done, loss.item(), ce.item(), kl.item(), rate))
                adam.zero_grad(set_to_none=True)
                if checkpoints is not None and checkpoints.due(done, settings.steps):
                    checkpoints.save(State(done, about, _state(weights, adam)))
        except KeyboardInterrupt:
            if checkpoints is not None and done:
                checkpoints.save(State(done, about, _state(weights, adam)))
            raise
        return finished()


def _schedule(done: int, steps: int) -> float:
    warm = min(1.0, (done + 1) / max(1, int(WARMUP * steps)))
    return warm * 0.5 * (1.0 + math.cos(math.pi * done / steps))


@contextmanager
def _trainable(
    student: PreTrainedModel, layers: str, settings: Recovery
) -> Iterator[tuple[dict[str, nn.Parameter], Callable[[], dict[str, Tensor]]]]:
    """What is trained, in `student` as it stands within, and what gives the finished weights by their names there."""
    inside = f"{layers}."
    if settings.kind == "full":
        weights = {name: p for name, p in student.named_parameters() if name.startswith(inside)}
        for parameter in weights.values():
            parameter.requires_grad_()
        yield weights, lambda: {name: p.detach() for name, p in weights.items()}
        return
    try:
        from peft import LoraConfig, get_peft_model
    except ModuleNotFoundError:
        raise InputError(
            "--recover lora needs PEFT, which is not installed; run: pip install 'secateur[recover]'"
        ) from None
    targets = [n for n, m in student.named_modules() if isinstance(m, nn.Linear) and n.startswith(inside)]
    experts = [(n, m) for n, m in student.named_modules() if is_fused(m) and n.startswith(inside)]
    fused = [f"{n}.{p}" for n, m in experts for p in (reader(m), "down_proj")]
    config = LoraConfig(
        r=settings.rank,
        lora_alpha=settings.rank,
        lora_dropout=0.0,
        target_modules=targets,
        target_parameters=fused or None,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(settings.seed)
        adapted = get_peft_model(student, config).eval()

    def merged() -> dict[str, Tensor]:
        plain = adapted.merge_and_unload()
        names = [*(f"{name}.weight" for name in targets), *fused]
        return {name: plain.get_parameter(name).detach() for name in names}

    yield {name: p for name, p in adapted.named_parameters() if p.requires_grad}, merged


# --- over an interruption --------------------------------------------------------------------------------------------


def _state(weights: dict[str, nn.Parameter], adam: torch.optim.AdamW) -> dict[str, Tensor]:
    tensors = {}
    for name, parameter in weights.items():
        tensors[f"weight.{name}"] = parameter.detach()
        tensors |= {f"{key}.{name}": value for key, value in adam.state[parameter].items()}
    return {name: tensor.cpu().contiguous() for name, tensor in tensors.items()}


def _restore(tensors: dict[str, Tensor], weights: dict[str, nn.Parameter], adam: torch.optim.AdamW) -> None:
    state = {}
    for index, (name, parameter) in enumerate(weights.items()):
        keys = ("weight", "exp_avg", "exp_avg_sq")
        own = {key: tensors[f"{key}.{name}"] for key in keys if f"{key}.{name}" in tensors}
        if wrong := [key for key, tensor in own.items() if tensor.shape != parameter.shape]:
            raise ValueError(f"{wrong[0]}.{name} has shape {list(own[wrong[0]].shape)}")
        parameter.data.copy_(own.pop("weight"))
        state[index] = own | ({"step": tensors[f"step.{name}"]} if f"step.{name}" in tensors else {})
    adam.load_state_dict({"state": state, "param_groups": adam.state_dict()["param_groups"]})
